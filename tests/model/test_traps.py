"""Traps in which other tools were caught: each is set on purpose here, and seen to be caught."""

import pytest
import torch
from laws import broken, failures, wrapped
from transformers import LlamaConfig
from transformers.modeling_utils import AttentionInterface

import mech
from mech.errors import UnsupportedModel
from mech.interventions import Redirect, digest_of
from mech.model import HookedMLLM, attention
from mech.model.check.laws import LAWS
from mech.model.check.run import check
from mech.reference import tiny, tiny_processors


@pytest.fixture(scope="module")
def wide():
    """Heads of 16 dimensions where width / heads is 8, as in Qwen3-4B (128 where it is 80)."""
    config = tiny.MODELS["llava"]()
    config.text_config = LlamaConfig(**{**config.text_config.to_dict(), "head_dim": 16})
    return HookedMLLM.from_hf(tiny.build(config), tiny_processors.processor("llava"), name="wide heads")


def test_heads_may_be_wider_than_the_stream_over_their_number(wide):
    assert (wide.cfg.d_model, wide.cfg.n_heads, wide.cfg.d_head) == (32, 4, 16)
    report = check(wide)
    assert report.ok, str(report)
    inputs = wide.inputs("What is shown here?", [tiny_processors.noise(24, 24)])
    _, cache = wide.run_with_cache(inputs, names_filter=["blocks.1.attn.hook_z", "blocks.1.attn.hook_v"])
    assert cache["blocks.1.attn.hook_z"].shape[2:] == (4, 16) and cache["blocks.1.attn.hook_v"].shape[2:] == (2, 16)
    assert wide.blocks[1].attn.W_O.shape == (4, 16, 32)
    with mech.intervene(wide, mech.Ablate(heads=[(1, 2)], to="zero")) as ablated:
        found = ablated(inputs)
    columns = slice(32, 48)  # of W_O; at 8 dimensions a head they would be those of head 4, which there is not
    handle = wide.hf_model.model.language_model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda module, args: (args[0].index_fill(-1, torch.arange(*columns.indices(64)), 0.0),)
    )
    expected = wide(inputs)
    handle.remove()
    torch.testing.assert_close(found, expected)


def test_heads_cut_at_width_over_number_are_found(wide):
    """The trap: eight heads of eight dimensions instead of four of sixteen. Nothing crashes; numbers are off."""
    sites = wide._sites
    cut = broken(wide, "blocks.2.attn.hook_q", heads=8)
    try:
        assert [one.where for one in failures(LAWS["names"], cut)] == ["blocks.2.attn.hook_q"]
    finally:
        wide._sites = sites


def test_the_output_of_the_output_projection_is_not_its_input():
    """As wide as the heads together, so that nothing crashes: an edit there is no edit of a head."""
    model = broken(wrapped(), "blocks.2.attn.hook_z", side="out")
    assert any("blocks.2.attn.hook_z" in one.where for one in failures(LAWS["meaning"], model))


def test_continuous_batching_is_refused_and_not_dense(monkeypatch):
    model = wrapped("llava")
    for name in (attention.PAGED, attention.IMPLEMENTATION):
        with pytest.raises(UnsupportedModel, match="unwrap"):
            AttentionInterface()[name](None, *[torch.zeros(1, 4, 3, 8)] * 3, None, write_index=[torch.arange(3)])
    assert not failures(LAWS["serving"], model)
    twins = AttentionInterface._global_mapping
    with monkeypatch.context() as patch:
        patch.delitem(twins, attention.PAGED)
        assert [one.where for one in failures(LAWS["serving"], model)] == ["paged twin"]
    with monkeypatch.context() as patch:
        patch.setitem(twins, attention.PAGED, lambda *args, **options: (None, None))
        assert [one.where for one in failures(LAWS["serving"], model)] == ["paged twin refuses"]


def test_answers_of_one_intervention_are_not_those_of_another():
    specs = [Redirect([(1, 0)], "image", bias) for bias in (0.0, 4.0)]
    specs += [mech.Ablate(heads=[(1, head)], to="zero") for head in (0, 1)]
    assert len({digest_of(spec) for spec in specs} | {digest_of(), digest_of(*specs)}) == 6
    assert digest_of(specs[0]) == digest_of(Redirect([(1, 0)], "image", 0.0))
