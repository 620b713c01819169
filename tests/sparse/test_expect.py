"""Predicted gains: the figures they were calibrated on, and what ``auto=True`` does with them."""

from types import SimpleNamespace

import pytest
import torch

import mech
import mech.sparse.expect as expect
from mech.errors import ExperimentError
from mech.model import HookedMLLM
from mech.model.architectures.families import ModelConfig
from mech.reference import tiny
from mech.reference.tiny_processors import processor
from mech.sparse.policy import Policy, StillDense

# One layer of Qwen3-VL-8B's sizes.
CFG = ModelConfig(
    "test", n_layers=1, n_heads=32, n_kv_heads=8, d_model=4096, d_head=128, d_mlp=1, vocab=9, vision_layers=0,
    vision_heads=0, vision_d_model=0, vision_d_head=0, vision_d_mlp=0, attention_layers=(0,), kv_heads=(8,),
    d_heads=(128,),
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return HookedMLLM.from_hf(tiny.model("llava"), processor("llava"))


def ids(length):
    return {"input_ids": torch.randint(200, 240, (1, length), generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize(
    "length, dense_ms, sparse_ms", [(8192, 0.97, 0.53 + 0.21), (32768, 15.0, 1.93 + 1.82), (131072, 251.7, 7.6 + 31.1)]
)
def test_a_layer_on_a_card_is_predicted_as_it_was_measured(length, dense_ms, sparse_ms):
    policy, card = Policy([(0, head) for head in range(4)], 16, 1024), expect.MACHINES["cuda"]
    dense, local, all_dense = expect._attention(SimpleNamespace(cfg=CFG), policy, length, {})
    assert 1e3 * all_dense / card.dense == pytest.approx(dense_ms, rel=0.05)
    found = 1e3 * (dense / card.dense + local / card.local + card.layer)
    assert found == pytest.approx(sparse_ms, rel=0.15)


def test_a_layer_on_a_cpu_is_predicted_as_it_was_measured():
    cfg = SimpleNamespace(cfg=SimpleNamespace(**{**vars(CFG), "n_heads": 16, "d_heads": (64,)}))
    for length, measured in ((8192, 4.41), (16384, 6.54)):
        cpu = expect.MACHINES["cpu"]
        dense, local, all_dense = expect._attention(cfg, Policy([(0, 5)], 16, 256), length, {})
        found = all_dense / cpu.dense / (dense / cpu.dense + local / cpu.local + cpu.layer)
        assert found == pytest.approx(measured, rel=0.15)


def test_long_runs_gain_and_short_ones_do_not(model):
    policy = Policy([(0, 0)], 4, 32)
    short, long = (expect.expected(model, policy, length) for length in (40, 20_000))
    assert short.runs == "dense" and long.runs == "sparse"
    assert long.prefill > 5 and long.decode > 1.2 and short.prefill < 1.01
    nothing = expect.expected(model, Policy([(layer, head) for layer in range(3) for head in range(4)]), 20_000)
    assert nothing.runs == "dense" and nothing.decode == nothing.prefill == 1
    prefill = expect.expected(model, Policy([(0, 0)], 4, 32, phase="prefill"), 20_000)
    decode = expect.expected(model, Policy([(0, 0)], 4, 32, phase="decode"), 20_000)
    assert prefill.decode == decode.prefill == 1 and prefill.prefill == long.prefill


def test_on_a_card_tokens_gain_nothing_uncaptured(model):
    """As measured there: 0.6 times as fast, for launches are all there is."""
    card = SimpleNamespace(cfg=model.cfg, device=torch.device("cuda"), dtype=torch.bfloat16,
                           hf_model=model.hf_model, family=model.family)  # fmt: skip
    policy = Policy([(0, 0)], 4, 32)
    assert expect.expected(card, policy, 20_000).decode == pytest.approx(0.6, abs=0.05)
    assert expect.expected(card, policy, 20_000, captured=True).decode > 1.5


def test_what_would_gain_nothing_runs_dense_to_the_bit_and_says_so(model):
    plain, tokens = model(ids(40)), model.generate(ids(40), max_new_tokens=9)
    with mech.localize(model, sinks=2, window=6, auto=True) as fast:
        assert fast.expects(40).runs == "dense"
        with pytest.warns(StillDense, match="40 tokens the policy gains nothing"):
            assert torch.equal(fast(ids(40)), plain)
        with pytest.warns(StillDense, match="49 tokens the policy gains nothing"):
            assert torch.equal(fast.generate(ids(40), max_new_tokens=9), tokens)
        with pytest.warns(StillDense):
            _, cache = fast.run_with_cache(ids(40), names_filter=["blocks.1.attn.hook_pattern"])
        assert (cache["blocks.1.attn.hook_pattern"][0, :, -1] > 0).all()  # the heads as they were


def test_what_gains_runs_sparse(model, monkeypatch):
    monkeypatch.setitem(expect.MACHINES, "cpu", expect.Machine(1e20, 1e11, 1e11, 1e20, 0.0, (0.0, 0.0)))
    with mech.localize(model, sinks=2, window=6, graph=True) as fast:
        expected, tokens = fast(ids(40)), fast.generate(ids(40), max_new_tokens=9)
    with mech.localize(model, sinks=2, window=6, auto=True, graph=True) as fast:
        assert fast.expects(40).runs == "sparse"
        assert torch.equal(fast(ids(40)), expected) and torch.equal(fast.generate(ids(40), max_new_tokens=9), tokens)
    with pytest.raises(ExperimentError, match="auto"):
        mech.localize(model, auto="yes")
