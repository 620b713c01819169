"""Hooks against what would leave them out: torch.compile in every form, layers that run again in the backward pass."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

import mech
from mech.model import HookedMLLM
from mech.model.architectures.families import layers_of
from mech.reference import tiny, tiny_processors

POINTS = ("blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern", "blocks.1.hook_mlp_out", "hook_embed")


def wrapped(name="llava", hf_model=None):
    hf_model = tiny.model(name) if hf_model is None else hf_model
    return HookedMLLM.from_hf(hf_model, tiny_processors.processor(name))


def inputs_of(model):
    return model.inputs("What is here?", images=[tiny_processors.noise(24, 20)])


def halve(value, hook):
    return value * 0.5


class Backend:
    """A compiler that leaves graphs as they are and counts them, and how often they run."""

    def __init__(self):
        self.graphs = self.runs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1

        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.fixture
def backend():
    torch._dynamo.reset()
    yield Backend()
    torch._dynamo.reset()


def text_layers(hf_model, model):
    return layers_of(hf_model, model.family.text)


def replaced(model, backend):
    model.hf_model.model.language_model.layers[1] = torch.compile(
        text_layers(model.hf_model, model)[1], backend=backend
    )


def attention_replaced(model, backend):
    layer = text_layers(model.hf_model, model)[1]
    layer.self_attn = torch.compile(layer.self_attn, backend=backend)


FORMS = {
    "the model": lambda model, backend: model.hf_model.compile(backend=backend),
    "a layer, whole": lambda model, backend: text_layers(model.hf_model, model)[1].compile(
        backend=backend, fullgraph=True
    ),
    "a layer replaced": replaced,
    "attention replaced": attention_replaced,
    "forward": lambda model, backend: setattr(
        model.hf_model, "forward", torch.compile(model.hf_model.forward, backend=backend)
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_hooks_see_through_compiled_code_which_is_there_again_afterwards(form, backend):
    model, plain = wrapped(), wrapped()
    inputs = model.inputs("What is here?")
    FORMS[form](model, backend)
    with torch.no_grad():
        idle = model(inputs)
        assert backend.graphs and backend.runs  # an idle model runs what was compiled
        torch.testing.assert_close(idle, plain(inputs))
        runs = backend.runs
        for point in POINTS:
            hooks = [(point, halve)]
            expected = plain.run_with_hooks(inputs, fwd_hooks=hooks)
            assert (expected - idle).abs().max() > 0.01
            assert torch.equal(model.run_with_hooks(inputs, fwd_hooks=hooks), expected)
        assert len(model.run_with_cache(inputs)[1]) == len(plain.run_with_cache(inputs)[1])
        assert backend.runs == runs
        graphs = backend.graphs
        torch.testing.assert_close(model(inputs), idle)
        assert backend.runs > runs and backend.graphs == graphs  # compiled once, hooks or not


@pytest.mark.parametrize("name", ["qwen2_5_vl", "paligemma2", "gemma4", "mllama"])
def test_a_layer_compiled_before_it_is_wrapped(name, backend):
    """Windows, softcaps, shared keys, cross-attention; `fullgraph`: what `mech` adds to a layer breaks no graph."""
    hf_model, plain = tiny.model(name), wrapped(name)
    layer = plain.cfg.attention_layers[-1]
    text_layers(hf_model, plain)[layer].compile(backend=backend, fullgraph=plain.cfg.family != "paligemma")
    model = wrapped(name, hf_model)
    inputs = inputs_of(model)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), plain(inputs), atol=1e-5, rtol=1e-4)
        assert backend.runs
        for point in ("attn.hook_z", "attn.hook_pattern", "hook_resid_mid"):
            hooks = [(f"blocks.{layer}.{point}", halve)]
            assert torch.equal(
                model.run_with_hooks(inputs, fwd_hooks=hooks), plain.run_with_hooks(inputs, fwd_hooks=hooks)
            )


def test_the_module_that_torch_compile_returns_is_wrapped_and_given_back(backend):
    hf_model, plain = tiny.model("llava"), wrapped()
    compiled = torch.compile(hf_model, backend=backend)
    model = wrapped(hf_model=compiled)
    inputs = model.inputs("What is here?")
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), plain(inputs))
        assert backend.runs
        hooks = [(POINTS[0], halve)]
        assert torch.equal(model.run_with_hooks(inputs, fwd_hooks=hooks), plain.run_with_hooks(inputs, fwd_hooks=hooks))
    assert model.hf_model is hf_model and model.unwrap() is compiled


def test_the_wrapper_compiles_what_is_inside(backend):
    model = wrapped()
    model.compile(backend=backend)
    assert model.hf_model._compiled_call_impl is not None and model._compiled_call_impl is None


def test_interventions_and_scores_of_a_compiled_model(backend):
    model, plain = (HookedMLLM.from_pretrained("reference:llava-s") for _ in range(2))
    samples = mech.haystacks("grounding", n=2, seed=0)
    text_layers(model.hf_model, model)[0].compile(backend=backend)
    with torch.no_grad():
        model(model.inputs_of(samples[0]))
    ours, theirs = (mech.retrieval_attention_mass(one, samples)["ram"].values for one in (model, plain))
    assert (ours == theirs).all()
    moved = []
    for one in (model, plain):
        with torch.no_grad(), mech.intervene(one, mech.Ablate("hook_mlp_out", layers=[0], to="zero")) as ablated:
            moved.append(ablated(one.inputs_of(samples[0])))
    assert torch.equal(*moved)


def test_a_wrapper_inside_compiled_code_runs_with_its_hooks(backend):
    model, plain = wrapped(), wrapped()
    inputs = model.inputs("What is here?")
    around = torch.compile(lambda given: model(given) * 2, backend=backend)
    with torch.no_grad(), model.hooks([(POINTS[0], halve)]):
        expected = plain.run_with_hooks(inputs, fwd_hooks=[(POINTS[0], halve)])
        torch.testing.assert_close(around(inputs), expected * 2)
        torch.testing.assert_close(torch.compile(model, backend=backend)(inputs), expected)


# -- gradient checkpointing -------------------------------------------------------------------------------------------


def gradients(model, point):
    """Of a loss under an edit, after the hooks are gone."""
    hf_model = model.hf_model
    hf_model.train()
    for module in hf_model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with model.hooks([(point, halve)]):
        logits = model(inputs_of(model))
    (logits[0, -1] ** 2).sum().backward()
    return {name: each.grad for name, each in hf_model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("name", tiny.NAMES)
def test_gradients_under_hooks_are_those_without_checkpointing(name):
    for point in ("attn.hook_z", "attn.hook_pattern", "hook_mlp_out"):
        plain, model = wrapped(name), wrapped(name)
        model.hf_model.activation_checkpointing_enable()
        layer = plain.cfg.attention_layers[-1]
        expected, found = (gradients(one, f"blocks.{layer}.{point}") for one in (plain, model))
        assert found.keys() == expected.keys()
        for parameter, slope in expected.items():
            torch.testing.assert_close(found[parameter], slope, msg=lambda text, at=parameter: f"{at}: {text}")
        assert model.hf_model.is_activation_checkpointing  # as it was


@pytest.mark.parametrize("reentrant", [False, True])
def test_every_form_of_checkpointing(reentrant):
    """Reentrant checkpointing, and layers that torch.distributed wrapped."""
    point = "blocks.1.attn.hook_z"
    expected = gradients(wrapped(), point)
    ours = wrapped()
    ours.hf_model.activation_checkpointing_enable({"use_reentrant": reentrant})
    around = tiny.model("llava")
    layers = around.model.language_model.layers
    for index, layer in enumerate(layers):
        layers[index] = CheckpointWrapper(layer)
    for model in (ours, wrapped(hf_model=around)):
        found = gradients(model, point)
        for (name, slope), other in zip(expected.items(), found.values(), strict=True):
            torch.testing.assert_close(other, slope, msg=lambda text, at=name: f"{at}: {text}")


def test_attribution_with_checkpointing():
    samples, effects = mech.haystacks("grounding", n=2, seed=0), []
    for switch in (False, True):
        model = HookedMLLM.from_pretrained("reference:llava-s")
        model.hf_model.train()
        if switch:
            model.hf_model.activation_checkpointing_enable()
        metric = mech.LogitDiff([one.answer for one in samples], [one.counterfactual.answer for one in samples])
        pair = (model.collate([model.inputs_of(one) for one in rows])
                for rows in (samples, [one.counterfactual for one in samples]))  # fmt: skip
        effects.append(mech.attribution(model, *pair, metric, ig_steps=2).effect.values)
    assert abs(effects[0]).max() > 0.01
    assert (effects[0] == effects[1]).all()


def test_a_cache_survives_train_mode_with_checkpointing():
    """transformers would drop it, and decode every token without its prompt."""
    plain, model = wrapped(), wrapped()
    model.hf_model.activation_checkpointing_enable()
    model.hf_model.train()
    inputs = inputs_of(model)
    assert torch.equal(model.generate(inputs, max_new_tokens=4), plain.generate(inputs, max_new_tokens=4))
