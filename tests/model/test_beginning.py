"""A run that begins at a later layer is the whole run, in every family; models that hand on more run whole."""

import pytest
import torch

from mech.interventions import Ablate, intervene
from mech.model import HookedMLLM
from mech.model.architectures.families import layers_of
from mech.model.partial.beginning import beginning
from mech.reference import tiny, tiny_processors


def opened(name):
    return HookedMLLM.from_hf(tiny.model(name), tiny_processors.processor(name))


def batch(model):
    pictures = [tiny_processors.noise(24, 24, seed) for seed in (0, 1)]
    questions = ("What is shown here?", "Which digit is in the red frame?")
    return model.collate([model.inputs(q, [p]) for q, p in zip(questions, pictures, strict=True)])


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_run_that_begins_later_is_the_whole_run(name):
    model = opened(name)
    inputs, last = batch(model), model.cfg.attention_layers[-1]
    heads, ran = [(last, 0)], []
    with torch.no_grad(), intervene(model, Ablate(heads=heads, to="zero")) as without:
        whole = without(inputs, logits_to_keep=3)
        kept = beginning(model, inputs, logits_to_keep=3)
        first = layers_of(model.hf_model, model.family.text)[0]
        handle = (
            first.self_attn.register_forward_hook(lambda *_: ran.append(1)) if hasattr(first, "self_attn") else None
        )
        with kept.at(last):
            again = without(inputs, logits_to_keep=3)
    torch.testing.assert_close(again, whole, atol=1e-5, rtol=1e-5)
    if handle is not None:
        assert bool(ran) == (not kept.streams), "layers before are passed over exactly where their streams are held"
        handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(model(inputs, logits_to_keep=3), kept.logits)  # nothing is left behind


def test_which_models_run_whole():
    model = {name: opened(name) for name in ("llava", "gemma4")}
    kept = {name: beginning(one, batch(one)) for name, one in model.items()}
    assert list(kept["llava"].streams) == [0, 1, 2] and not kept["gemma4"].streams


def test_few_bytes_hold_few_layers():
    model = opened("llava")
    inputs = batch(model)
    stream = beginning(model, inputs).streams[0]
    held = beginning(model, inputs, most=2 * stream.numel() * stream.element_size()).streams
    assert list(held) == [0, 2] or list(held) == [0]
    assert list(beginning(model, inputs, most=1).streams) == [0]


def test_a_listener_in_a_layer_that_is_passed_over_hears_all():
    model, heard = opened("llava"), []
    inputs = batch(model)
    kept = beginning(model, inputs)
    hook = ("blocks.0.hook_resid_pre", lambda value, hook: heard.append(hook.name))
    with torch.no_grad(), model.hooks([hook]), kept.at(2):
        model(inputs)
    assert heard == ["blocks.0.hook_resid_pre"]
