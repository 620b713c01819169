"""PEFT adapters: whatever is read or written through them is what the merged model gives."""

import pytest
import torch
from tensors import tensors

from mech.errors import UnsupportedModel
from mech.model import HookedMLLM
from mech.model.architectures.families import family_of, layers_of, part_at
from mech.model.check.laws import make_batches
from mech.model.check.projections import weights
from mech.model.check.run import check
from mech.model.check.trial import apart, picture
from mech.model.hook_sites import attention_of
from mech.reference import tiny, tiny_processors

peft = pytest.importorskip("peft")


def projections(hf):
    """The names of the linear layers of the text stack, and of the vision stack's output projections."""
    family, names = family_of(hf), {id(module): name for name, module in hf.named_modules()}
    found = []
    for stack, paths in ((family.text, "qkvo"), (family.vision, "o")):
        for layer in layers_of(hf, stack):
            attn, mlp = attention_of(layer, stack), getattr(layer, stack.mlp)
            found += [part_at(attn, getattr(stack, path)) for path in paths]
            if stack is family.text:
                found += [part_at(mlp, path) for path in (stack.up, stack.gate, stack.down)]
    linear = [module for module in found if type(module) is torch.nn.Linear]
    return sorted({names[id(module)] for module in linear})


def lora(hf, **options):
    targets = options.pop("target_modules", None) or projections(hf)
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **options)


def adapted(name, **options):
    torch.manual_seed(0)
    hf = tiny.model(name)
    hf.add_adapter(lora(hf, **options))
    return hf.eval()


def holds(model, law=weights):
    with torch.no_grad():
        found = list(law(model, make_batches(model, full=True)))
    return found and not [f"{one.where}: {one.says}" for one in found if one.ok is False]


def wrapped(hf, name):
    return HookedMLLM.from_hf(hf, tiny_processors.processor(name), name=name)


def everything(model, batch):
    """What is read of a model by name: logits, what heads write, what they look for, weights."""
    points = [name for name in model.points() if name.endswith(("hook_result", "hook_q", "hook_post", "hook_attn_out"))]
    with torch.no_grad():
        logits, cache = model.run_with_cache(batch, names_filter=points)
        written = model.run_with_hooks(batch, fwd_hooks=[(points[0], lambda value, hook: value * 0.5)])
    of_layers = [(b.attn.W_O, b.attn.W_Q, b.attn.W_V, b.mlp.W_out, b.mlp.W_in) for b in model.blocks]
    return [logits, written, *(cache[name] for name in points), *sum(of_layers, ()), model.W_E]


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("name", tiny.NAMES)
def test_everything_is_what_the_merged_model_gives(name):
    plain, hf = wrapped(tiny.model(name), name), adapted(name)
    batch = plain.inputs("What is shown here?", images=[picture(40, 24)])
    model = wrapped(hf, name)
    with torch.no_grad():
        assert not torch.allclose(model(batch), plain(batch), atol=1e-2)
        before = everything(model, batch)
        for module in hf.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.merge()
        after = everything(model, batch)
    assert max(apart(one, other) for one, other in zip(before, after, strict=True) if one is not None) < 1e-4


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@pytest.mark.parametrize("name", ["llava_phi3", "qwen3_vl", "mllama", "gemma3"])
def test_adapters_that_come_and_go_after_wrapping(name):
    hf = tiny.model(name)
    targets, model = projections(hf), wrapped(hf, name)
    batch = model.inputs("What is shown here?", images=[picture(40, 24)])
    with torch.no_grad():
        clean = model(batch)
        seen = [model.W_O[1]]
        torch.manual_seed(1)
        hf.add_adapter(lora(hf, target_modules=targets), "one")
        assert holds(model)
        seen.append(model.W_O[1])
        hf.add_adapter(lora(hf, target_modules=targets, use_dora=True), "two")  # becomes the active one
        assert holds(model)
        seen.append(model.W_O[1])
        hf.set_adapter(["one", "two"])
        assert holds(model)
        seen.append(model.W_O[1])
        hf.set_adapter("one")
        torch.testing.assert_close(model.W_O[1], seen[1])
        hf.disable_adapters()
        torch.testing.assert_close(model.W_O[1], seen[0])
        assert torch.equal(model(batch), clean) and holds(model)
    assert all((one - other).abs().max() > 1e-3 for i, one in enumerate(seen) for other in seen[:i])


@pytest.mark.parametrize("kind", ["IA3Config", "OFTConfig", "LoHaConfig"])
def test_adapters_of_other_kinds(kind):
    hf, batch = tiny.model("llava"), tensors("llava")
    options = {"feedforward_modules": []} if kind == "IA3Config" else {"init_weights": False}
    options |= {"oft_block_size": 4, "r": 0} if kind == "OFTConfig" else {}
    before = hf.model.language_model.layers[1].self_attn.o_proj.weight.clone()
    hf.add_adapter(getattr(peft, kind)(target_modules=["o_proj", "q_proj"], **options))
    for name, parameter in hf.named_parameters():
        if "ia3" in name:
            parameter.data.add_(torch.rand_like(parameter))
    model = wrapped(hf.eval(), "llava")
    assert holds(model)
    written = model.blocks[1].attn.W_O.flatten(0, 1).T
    assert (written - before).abs().max() > 1e-3 and torch.isfinite(model(batch)).all()


def test_every_law_holds_of_an_adapted_model():
    assert check(wrapped(adapted("llava"), "llava"), full=True).ok


def test_check_notices_a_base_matrix_in_place_of_the_adapted_one(monkeypatch):
    from mech.model import hook_sites
    from mech.model.named import weights as named
    from mech.model.named.projections import LinearMap

    model = wrapped(adapted("llava"), "llava")
    for place in (hook_sites, named):
        monkeypatch.setattr(place, "linear_map", lambda module: LinearMap(module.weight, module.bias))
    failed = {one.where for law, one in check(model, full=True).failures() if law == "weights"}
    assert {"blocks.1.attn.hook_result", "blocks.1.attn.W_O", "blocks.0.mlp.W_out"} <= failed


def test_a_gradient_reaches_the_adapters_through_the_results_of_heads():
    hf, batch = adapted("llava"), tensors("llava")
    model = wrapped(hf, "llava")
    out = hf.model.language_model.layers[1].self_attn.o_proj.lora_A["default"].weight
    grads = []
    for hooks in ([], [("blocks.1.attn.hook_result", lambda value, hook: value)]):
        hf.zero_grad()
        with model.hooks(hooks):
            model(batch)[0, -1, 7].backward()
        grads.append(out.grad.clone())
    assert grads[0].abs().max() > 1e-3
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-4)


def test_dropout_in_training_mode_is_refused_where_heads_are_told_apart():
    hf = adapted("llava", lora_dropout=0.5)
    model = wrapped(hf, "llava")
    quiet = model.W_O
    hf.train()
    torch.testing.assert_close(model.W_O, quiet)
    with pytest.raises(UnsupportedModel, match="hook_result of a projection with dropout"):
        model.run_with_cache(tensors("llava"), names_filter="blocks.1.attn.hook_result")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_peft_model_is_opened_and_given_back():
    torch.manual_seed(0)
    hf, batch = tiny.model("llava"), tensors("llava")
    with torch.no_grad():
        given = peft.get_peft_model(hf, lora(hf, modules_to_save=["lm_head"])).eval()
        hf.lm_head.modules_to_save["default"].weight.mul_(1.5)
        expected = given(**batch).logits
        model = wrapped(given, "llava")
        assert torch.equal(model(batch), expected) and holds(model)
        assert not torch.allclose(model.W_U, hf.lm_head.original_module.weight.T)
        assert model.unwrap() is given and torch.equal(given(**batch).logits, expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_around_the_model_are_refused():
    hf = tiny.model("llava")
    prompts = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, num_layers=3, token_dim=32, num_attention_heads=4
    )
    around = peft.get_peft_model(hf, prompts)
    with pytest.raises(UnsupportedModel, match="PROMPT_TUNING, which is applied around the model"):
        HookedMLLM.from_hf(around)
    called = lora(hf, target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    invoked = peft.get_peft_model(tiny.model("llava"), called)
    with pytest.raises(UnsupportedModel, match="applied around the model"):
        HookedMLLM.from_hf(invoked)
