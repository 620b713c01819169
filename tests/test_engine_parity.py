"""An idle wrapper is the Hugging Face model, bit for bit, and leaves nothing behind."""

import copy
import gc
import logging

import pytest
import torch
from tensors import NAMES, tensors
from transformers import AutoModelForImageTextToText

from mech.errors import UnsupportedModel
from mech.model import HookedMLLM, attention, seams
from mech.reference import tiny

ROWS = {"one image": ((1, 5),), "two images": ((2, 5),), "padded batch": ((2, 5), (1, 3), (0, 6))}


@pytest.fixture(params=NAMES)
def family(request):
    return request.param


def no_hooks(hf_model):
    """No torch hook of ours is left; transformers' own capturing hooks are allowed."""
    hooks = [
        hook
        for module in hf_model.modules()
        for table in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        for hook in table.values()
    ]
    return not [hook for hook in hooks if "mech" in str(getattr(getattr(hook, "func", hook), "__module__", ""))]


@pytest.mark.parametrize("rows", list(ROWS.values()), ids=list(ROWS))
def test_idle_logits_and_tokens_are_bit_identical(family, rows):
    hf_model, batch = tiny.model(family), tensors(family, rows)
    with torch.no_grad():
        before = hf_model(**batch).logits
        tokens = hf_model.generate(**batch, max_new_tokens=5, do_sample=False)[:, batch["input_ids"].shape[1] :]
        model = HookedMLLM.from_hf(hf_model)
        assert torch.equal(model(batch), before)
        assert torch.equal(model(**batch), before)
        assert torch.equal(model.generate(batch, max_new_tokens=5), tokens)
        model.run_with_cache(batch)
        assert torch.equal(model(batch), before), "a run with hooks changed the model"
        assert model.unwrap() is hf_model
        assert torch.equal(hf_model(**batch).logits, before)


@pytest.mark.parametrize("name, reach", [("llava_siglip", None), ("llava_mistral", 8), ("gemma3", 8)])
def test_hooked_scores_keep_the_window_of_a_layer(name, reach):
    hf_model, batch = tiny.model(name), tensors(name, ((0, 20),))
    with torch.no_grad():
        before = hf_model(**batch).logits
        logits, cache = HookedMLLM.from_hf(hf_model).run_with_cache(batch)
    torch.testing.assert_close(logits, before, atol=5e-5, rtol=1e-5)
    seen = (cache["blocks.0.attn.hook_pattern"] > 0).sum(-1).max()
    assert seen == (reach or batch["input_ids"].shape[1])


@pytest.mark.parametrize("stock", ["sdpa", "eager"])
def test_unwrap_restores_the_attention_implementation(family, stock):
    hf_model = tiny.model(family)
    if family == "paligemma2":  # Gemma2's softcap is more than SDPA can do, and transformers says so
        stock = "eager"
    hf_model.set_attn_implementation(stock)
    model = HookedMLLM.from_hf(hf_model)
    assert hf_model.config.text_config._attn_implementation == "mech"
    assert hf_model.config.vision_config._attn_implementation == "mech"
    model.unwrap()
    parts = (hf_model.config, hf_model.config.text_config, hf_model.config.vision_config)
    assert {part._attn_implementation for part in parts} == {stock}
    with pytest.raises(UnsupportedModel, match="has been unwrapped"):
        model(tensors(family))
    HookedMLLM.from_hf(hf_model)(tensors(family))


@pytest.mark.parametrize("family", [name for name in NAMES if name != "paligemma2"])
def test_idle_runs_attach_nothing_and_only_hooked_layers_compute_stepwise(family, monkeypatch):
    model, batch = HookedMLLM.from_hf(tiny.model(family)), tensors(family)
    fused, attached = [], []
    sdpa, attach = attention.sdpa_attention_forward, seams.Seam.attach
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **k: fused.append(1) or sdpa(*a, **k))
    monkeypatch.setattr(seams.Seam, "attach", lambda seam, point: attached.append(seam.point) or attach(seam, point))
    model(batch)
    idle = len(fused)
    assert idle >= 2 * tiny.LAYERS and not attached
    model.run_with_cache(batch, names_filter="blocks.1.attn.hook_pattern")
    assert len(fused) == 2 * idle - 1 and not attached
    model.run_with_cache(batch, names_filter="blocks.1.attn.hook_z")
    assert len(fused) == 3 * idle - 1 and attached == ["blocks.1.attn.hook_z"]


def test_nothing_lingers_after_success_or_exception(family):
    model, batch = HookedMLLM.from_hf(tiny.model(family)), tensors(family)
    clean = model(batch)

    def fails(value, hook):
        raise RuntimeError("on purpose")

    model.run_with_cache(batch, names_filter=lambda name: True)
    assert no_hooks(model.hf_model) and not model.list_hooks()
    for name in ("blocks.1.attn.hook_pattern", "blocks.1.hook_mlp_out", "vision.blocks.0.attn.hook_rot_q"):
        with pytest.raises(RuntimeError, match="on purpose"):
            model.run_with_hooks(batch, fwd_hooks=[(name, fails), ("blocks.0.attn.hook_z", lambda z, hook: z * 0)])
        assert no_hooks(model.hf_model) and not model.list_hooks()
        assert torch.equal(model(batch), clean)
    with pytest.raises(RuntimeError, match="on purpose"), model.attending(lambda call: fails(None, None)):
        model(batch)
    assert not any(record.active or record.observers for _, record in model._layers)
    assert torch.equal(model(batch), clean)


def test_grad_mode_and_parameters_are_left_alone(family):
    hf_model = tiny.model(family)
    wanted = [parameter.requires_grad for parameter in hf_model.parameters()]
    model = HookedMLLM.from_hf(hf_model)
    model.generate(tensors(family), max_new_tokens=2)
    assert torch.is_grad_enabled() and [p.requires_grad for p in model.parameters()] == wanted
    assert model(tensors(family)).requires_grad


def test_two_wrapped_models_do_not_meet():
    first, second = HookedMLLM.from_hf(tiny.model("llava")), HookedMLLM.from_hf(tiny.model("llava"))
    batch = tensors("llava")
    clean = second(batch)
    with first.hooks([("blocks.0.attn.hook_pattern", lambda pattern, hook: pattern * 0)]):
        assert torch.equal(second(batch), clean)
        assert not torch.equal(first(batch), clean)


def test_a_model_is_wrapped_once_and_freed_with_its_wrapper():
    hf_model = tiny.model("llava")
    model = HookedMLLM.from_hf(hf_model)
    with pytest.raises(UnsupportedModel, match="wrapped already"):
        HookedMLLM.from_hf(hf_model)
    known = len(attention._records)
    model = HookedMLLM.from_hf(model.unwrap())
    assert len(attention._records) == known
    del model
    gc.collect()
    again = HookedMLLM.from_hf(hf_model)
    assert torch.equal(again(tensors("llava")), hf_model(**tensors("llava")).logits)
    del again, hf_model
    gc.collect()
    assert len(attention._records) <= known - 5


def test_a_copy_or_a_changed_implementation_is_refused_rather_than_dead():
    model, batch = HookedMLLM.from_hf(tiny.model("llava")), tensors("llava")
    with pytest.raises(UnsupportedModel, match="is a copy"):
        copy.deepcopy(model)(batch)
    model.hf_model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModel, match="changed to"):
        model(batch)


def test_a_wrapped_model_is_saved_as_a_stock_model(family, tmp_path):
    model, batch = HookedMLLM.from_hf(tiny.model(family)), tensors(family)
    model.hf_model.save_pretrained(tmp_path)
    assert '"mech"' not in (tmp_path / "config.json").read_text()
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert stock.config._attn_implementation == "sdpa"
    assert torch.equal(stock(**batch).logits, model(batch))
    opened = HookedMLLM.from_pretrained(tmp_path, device="cpu")
    assert torch.equal(opened(batch), model(batch)) and opened.dtype == torch.float32 and not opened.training


def test_generate_is_quiet_and_greedy_whatever_the_checkpoint_prefers(family, caplog):
    hf_model, batch = tiny.model(family), tensors(family)
    stock = hf_model.generation_config
    stock.do_sample, stock.temperature, stock.top_p, stock.top_k = True, 0.01, 0.5, 7
    model = HookedMLLM.from_hf(hf_model)
    logger = logging.getLogger("transformers")
    propagate, logger.propagate = logger.propagate, True
    try:
        first, second = (model.generate(batch, max_new_tokens=4) for _ in range(2))
    finally:
        logger.propagate = propagate
    assert torch.equal(first, second) and first.shape == (1, 4)
    assert not caplog.records, [record.message for record in caplog.records]
    assert (stock.do_sample, stock.temperature) == (True, 0.01)
    assert model.generate(batch, max_new_tokens=3, do_sample=True, temperature=2.0).shape == (1, 3)
