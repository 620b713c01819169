"""What the laws do not say of running: tokens, kernels, saving, unwrapping, copies, two models side by side.

That idle logits are transformers' own, that nothing lingers and that ``unwrap()`` restores is for ``test_check.py``.
"""

import copy
import gc
import logging

import pytest
import torch
from tensors import FEW, tensors
from transformers import AutoModelForImageTextToText

from mech.errors import UnsupportedModel
from mech.model import HookedMLLM, attention, hook_sites
from mech.reference import tiny


@pytest.mark.parametrize("name", FEW)
def test_generated_tokens_are_those_of_transformers(name):
    hf_model, batch = tiny.model(name), tensors(name, ((2, 5), (1, 3), (0, 6)))
    with torch.no_grad():
        tokens = hf_model.generate(**batch, max_new_tokens=5, do_sample=False)[:, batch["input_ids"].shape[1] :]
        model = HookedMLLM.from_hf(hf_model)
        assert torch.equal(model.generate(batch, max_new_tokens=5), tokens)
        assert torch.equal(model(**batch), model(batch))


@pytest.mark.parametrize("name, reach", [("llava_siglip", None), ("llava_mistral", 8), ("gemma3", 8)])
def test_hooked_scores_keep_the_window_of_a_layer(name, reach):
    hf_model, batch = tiny.model(name), tensors(name, ((0, 20),))
    with torch.no_grad():
        before = hf_model(**batch).logits
        logits, cache = HookedMLLM.from_hf(hf_model).run_with_cache(batch)
    torch.testing.assert_close(logits, before, atol=5e-5, rtol=1e-5)
    seen = (cache["blocks.0.attn.hook_pattern"] > 0).sum(-1).max()
    assert seen == (reach or batch["input_ids"].shape[1])


@pytest.mark.parametrize("name, stock", [("llava", "eager"), ("qwen3_vl", "sdpa"), ("paligemma2", "eager")])
def test_unwrap_restores_the_attention_implementation_that_was_chosen(name, stock):
    hf_model = tiny.model(name)
    hf_model.set_attn_implementation(stock)
    model = HookedMLLM.from_hf(hf_model)
    assert hf_model.config.text_config._attn_implementation == "mech"
    assert hf_model.config.vision_config._attn_implementation == "mech"
    model.unwrap()
    parts = (hf_model.config, hf_model.config.text_config, hf_model.config.vision_config)
    assert {part._attn_implementation for part in parts} == {stock}
    with pytest.raises(UnsupportedModel, match="has been unwrapped"):
        model(tensors(name))
    HookedMLLM.from_hf(hf_model)(tensors(name))


@pytest.mark.parametrize("name", FEW)
def test_idle_runs_attach_nothing_and_only_hooked_layers_compute_stepwise(name, monkeypatch):
    model, batch = HookedMLLM.from_hf(tiny.model(name)), tensors(name)
    fused, attached = [], []
    sdpa, attach = attention.sdpa_attention_forward, hook_sites.HookSite.attach
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **k: fused.append(1) or sdpa(*a, **k))
    monkeypatch.setattr(
        hook_sites.HookSite, "attach", lambda site, point: attached.append(site.point) or attach(site, point)
    )
    model(batch)
    idle = len(fused)
    assert idle >= 2 * tiny.LAYERS and not attached
    model.run_with_cache(batch, names_filter="blocks.1.attn.hook_pattern")
    assert len(fused) == 2 * idle - 1 and not attached
    model.run_with_cache(batch, names_filter="blocks.1.attn.hook_z")
    assert len(fused) == 3 * idle - 1 and attached == ["blocks.1.attn.hook_z"]


def test_an_exception_anywhere_in_attention_leaves_nothing_behind():
    """At a point among other hooks, stepwise in text and vision, and in an observer: the law tries one point."""
    model, batch = HookedMLLM.from_hf(tiny.model("llava")), tensors("llava")
    clean = model(batch)

    def fails(value, hook):
        raise RuntimeError("on purpose")

    for name in ("blocks.1.attn.hook_pattern", "blocks.1.hook_mlp_out", "vision.blocks.0.attn.hook_rot_q"):
        with pytest.raises(RuntimeError, match="on purpose"):
            model.run_with_hooks(batch, fwd_hooks=[(name, fails), ("blocks.0.attn.hook_z", lambda z, hook: z * 0)])
        assert not model.list_hooks() and torch.equal(model(batch), clean)
    with pytest.raises(RuntimeError, match="on purpose"), model.attending(lambda call: fails(None, None)):
        model(batch)
    assert not any(record.active or record.observers for _, record in model._layers)
    assert torch.equal(model(batch), clean) and clean.requires_grad


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
    with pytest.raises(UnsupportedModel, match="already wrapped"):
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


def test_a_copy_works_and_a_changed_implementation_is_refused_rather_than_dead():
    model, batch = HookedMLLM.from_hf(tiny.model("llava")), tensors("llava")
    assert torch.equal(copy.deepcopy(model)(batch), model(batch))
    model.hf_model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModel, match="changed to"):
        model(batch)


@pytest.mark.parametrize("name", FEW)
def test_a_wrapped_model_is_saved_as_a_stock_model(name, tmp_path):
    model, batch = HookedMLLM.from_hf(tiny.model(name)), tensors(name)
    model.hf_model.save_pretrained(tmp_path)
    assert '"mech"' not in (tmp_path / "config.json").read_text()
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert stock.config._attn_implementation == "sdpa"
    assert torch.equal(stock(**batch).logits, model(batch))
    opened = HookedMLLM.from_pretrained(tmp_path, device="cpu")
    assert torch.equal(opened(batch), model(batch)) and opened.dtype == torch.float32 and not opened.training


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_generate_is_quiet_and_greedy_whatever_the_checkpoint_prefers(name, caplog):
    hf_model, batch = tiny.model(name), tensors(name)
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
