"""The pieces of sparse inference: masks, budgets, kernels and stores against their literal definitions."""

from pathlib import Path

import pytest
import torch

from mech.errors import ExperimentError
from mech.experiments.ranking.ranking import Ranking
from mech.model import AttentionCall
from mech.model.architectures.families import ModelConfig
from mech.sparse.kernels import by_definition, merged, split_heads
from mech.sparse.masks import Near
from mech.sparse.plan import Plan
from mech.sparse.policy import Policy
from mech.sparse.stores import FullStore, RingStore

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def near(policy, rows=1, first=None, prompt=10_000, text=None):
    first = torch.zeros(rows, dtype=torch.long) if first is None else torch.tensor(first)
    return Near(policy, first, torch.full((rows,), prompt), text)


def call(q, k, v, mask=None, causal=True, start=0, **options):
    return AttentionCall("text", 0, q, k, v, q.transpose(1, 2), mask, q.shape[-1] ** -0.5, causal, start, **options)


def attended(rows=1, heads=8, groups=8, length=300, d_head=8, seed=0):
    q = numbers(rows, heads, length, d_head, seed=seed)
    return q, *(numbers(rows, groups, length, d_head, seed=seed + i) for i in (1, 2))


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_text", [False, True])
@pytest.mark.parametrize("phase", ["both", "prefill", "decode"])
def test_the_mask_is_what_the_words_say(keep_text, phase):
    text = torch.tensor([[False] * 3 + [True] * 2 + [False] * 4 + [True] * 2] * 2)
    policy = Policy([(0, 1)], sinks=2, window=3, keep_text=keep_text, phase=phase)
    made = near(policy, 2, first=[0, 2], prompt=11, text=text if keep_text else None)
    positions = torch.arange(14)
    found = made.heads(positions, positions, torch.tensor([False, True]))
    for batch, first in ((0, 0), (1, 2)):
        for row in range(14):
            for key in range(14):
                local = abs(row - key) <= 2 or first <= key < first + 2
                local |= keep_text and (key >= 11 or bool(text[batch, key]))
                local |= row < 11 if phase == "decode" else (phase == "prefill" and row >= 11)
                assert found[batch, 0, row, key] == local and found[batch, 1, row, key]
    every = made.pins(14)
    for batch in range(2):
        pins = every[batch][every[batch] >= 0]
        assert torch.equal(pins, made.pinned(positions)[batch].nonzero().flatten())


# -- budgets -----------------------------------------------------------------------------------------------------------

CFG = ModelConfig(
    "test", n_layers=2, n_heads=4, n_kv_heads=2, d_model=32, d_head=8, d_mlp=1, vocab=9, vision_layers=0,
    vision_heads=0, vision_d_model=0, vision_d_head=0, vision_d_mlp=0, attention_layers=(0, 1), kv_heads=(2, 2),
    d_heads=(8, 8),
)  # fmt: skip


@pytest.mark.parametrize("length", [5, 9, 40])
@pytest.mark.parametrize("windows", [{}, {1: 8}, {1: 3}])
@pytest.mark.parametrize("phase", ["both", "prefill", "decode"])
def test_budgets_count_the_masks(length, windows, phase):
    policy = Policy([(0, 1), (1, 0), (1, 3)], sinks=2, window=5, phase=phase)
    found = policy.budgets(CFG, length, windows=windows)
    rows = torch.arange(length)
    seen = {True: 0, False: 0}
    held = {True: 0, False: 0}
    for layer in (0, 1):
        own = (rows[:, None] >= rows) & (rows[:, None] - rows < windows.get(layer, length))
        dense = policy.dense(layer, 4)
        masks = near(policy).heads(rows, rows, dense)[0] & own if phase != "decode" else own.expand(4, -1, -1)
        seen[True] += int(masks.sum())
        seen[False] += int(own.sum()) * 4
        for group in range(2):
            whole = own[-1].sum()
            window = min(policy.window, windows.get(layer, length), length)
            local = min(whole, window + min(2, max(0, length - policy.window)))
            kept = phase == "prefill" or dense.reshape(2, -1)[group].any()
            held[True] += int(whole if kept else local)
            held[False] += int(whole)
    assert found.flops == pytest.approx(seen[True] / seen[False])
    assert found.kv_bytes == pytest.approx(held[True] / held[False])
    assert found.prefill_bound == 1 / found.flops and found.decode_bound == 1 / found.kv_bytes


def test_a_budget_is_filled_and_not_exceeded():
    ranking = Ranking(numbers(2, 4).numpy())
    for name in ("kv_bytes", "flops"):
        for budget in (0.3, 0.55, 0.8, 1.0):
            options = {"sinks": 2, "window": 30}
            policy = Policy.fit(ranking, CFG, 1000, **{name: budget}, **options)
            count = len(policy.dense_heads)
            assert policy.dense_heads == ranking.heads[:count]
            assert getattr(policy.budgets(CFG, 1000), name) <= budget
            if count < 8:
                more = Policy(ranking.heads[: count + 1], **options)
                assert getattr(more.budgets(CFG, 1000), name) > budget


def test_budgets_that_cannot_be_are_refused():
    ranking = Ranking(numbers(2, 4).numpy())
    with pytest.raises(ExperimentError, match=r"at least 0\.032"):
        Policy.fit(ranking, CFG, 1000, kv_bytes=0.01, sinks=2, window=30)
    with pytest.raises(ExperimentError, match="one of the two"):
        Policy.fit(ranking, CFG, 1000)
    with pytest.raises(ExperimentError, match="a ranking of 3 x 4 heads"):
        Policy.fit(Ranking(numbers(3, 4).numpy()), CFG, 1000, flops=0.5)
    assert "of the KV bytes" in str(Policy().budgets(CFG, 1000))


# -- kernels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups, dense", [(8, [3]), (8, []), (2, [1, 4, 5]), (4, [0, 1, 2, 3, 6]), (1, [7])])
@pytest.mark.parametrize("sinks, window", [(4, 20), (0, 5), (3, 130)])
def test_kernels_are_the_definition(groups, dense, sinks, window):
    q, k, v = attended(2, 8, groups)
    chosen = torch.zeros(8, dtype=torch.bool)
    chosen[dense] = True
    made, plan = near(Policy(sinks=sinks, window=window), 2), Plan.of(chosen, groups)
    one = call(q, k, v)
    torch.testing.assert_close(split_heads(one, made, plan), by_definition(one, made, chosen), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("extra", [{"softcap": 5.0}, {"sinks": torch.linspace(-1, 2, 8)}])
def test_softcaps_and_sinks_of_a_layer_stay(extra):
    q, k, v = attended(1, 8, 4, length=150)
    chosen = torch.tensor([True] + [False] * 7)
    one, made = call(q, k, v, **extra), near(Policy(sinks=2, window=9))
    found, expected = split_heads(one, made, Plan.of(chosen, 4)), by_definition(one, made, chosen)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    assert (expected - by_definition(call(q, k, v), made, chosen)).abs().max() > 1e-2


@pytest.mark.parametrize("boolean", [True, False])
def test_masks_of_a_layer_stay(boolean):
    """Padding, images that see themselves both ways, a bias: whatever the layer's own mask is."""
    q, k, v = attended(2, 8, 2, length=150)
    rows = torch.arange(150)
    mask = (rows[:, None] >= rows) | ((rows[:, None] // 30 == rows // 30) & (rows < 60))
    mask = mask & (rows >= torch.tensor([0, 7])[:, None])[:, None, None, :]
    if not boolean:
        mask = torch.where(mask, numbers(1, 1, 150, 150), torch.tensor(torch.finfo(torch.float32).min))
    chosen = torch.tensor([False, True] * 2 + [False] * 4)
    one, made = call(q, k, v, mask, causal=False), near(Policy(sinks=2, window=9), 2, first=[0, 7])
    found, expected = split_heads(one, made, Plan.of(chosen, 2)), by_definition(one, made, chosen)
    torch.testing.assert_close(found[0], expected[0], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(found[1, 7:], expected[1, 7:], atol=2e-6, rtol=1e-5)


def test_gradients_are_those_of_the_definition():
    chosen, made = torch.tensor([True] + [False] * 7), near(Policy(sinks=2, window=9))
    grads = []
    for attend in (
        lambda one: split_heads(one, made, Plan.of(chosen, 4)),
        lambda one: by_definition(one, made, chosen),
    ):
        tensors = [x.requires_grad_() for x in attended(1, 8, 4, length=100)]
        (attend(call(*tensors)) * numbers(1, 100, 8, 8)).sum().backward()
        grads.append([x.grad for x in tensors])
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_two_disjoint_sets_of_keys_merge_into_one_softmax():
    q, k, v = numbers(1, 2, 5, 8), numbers(1, 2, 12, 8, seed=1), numbers(1, 2, 12, 8, seed=2)
    scores = q @ k.transpose(-1, -2)
    parts = []
    for keys in (slice(0, 3), slice(3, 12)):
        parts += [scores[..., keys].softmax(-1) @ v[:, :, keys], scores[..., keys].logsumexp(-1)]
    torch.testing.assert_close(merged(*parts), scores.softmax(-1) @ v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_sinks_leave_is_merged_without_loss(dtype):
    """They take 99% of a softmax and give nothing, as in trained models: what counts is the hundredth."""
    z, share = numbers(1, 2, 50, 8).to(dtype), torch.zeros(1, 2, 50)
    sinks, theirs = torch.zeros_like(z), torch.linspace(3, 7, 50).expand(1, 2, -1)
    expected = z.float() * torch.sigmoid(-theirs)[..., None]
    found = merged(z.clone(), share, sinks, theirs)
    torch.testing.assert_close(found.float(), expected, atol=1e-7, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float64, 1e-12)])
def test_every_precision(dtype, tolerance):
    q, k, v = (x.to(dtype) for x in attended(1, 8, 4))
    chosen, made = torch.tensor([True] + [False] * 7), near(Policy(sinks=4, window=20))
    one = call(q, k, v)
    found, expected = split_heads(one, made, Plan.of(chosen, 4)), by_definition(one, made, chosen)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [8, 2])
def test_the_gpu_computes_what_the_cpu_does(dtype, groups):
    q, k, v = attended(2, 8, groups, length=1500, d_head=64)
    chosen, policy = torch.tensor([True] + [False] * 7), Policy(sinks=4, window=100)
    expected = split_heads(call(q, k, v), near(policy, 2), Plan.of(chosen, groups))
    moved = [x.to("cuda", dtype) for x in (q, k, v)]
    found = split_heads(call(*moved), near(policy, 2).to(moved[0].device), Plan.of(chosen, groups).to(moved[0].device))
    torch.testing.assert_close(found.float().cpu(), expected, atol=1e-4 if dtype == torch.float32 else 3e-2, rtol=1e-3)


# -- stores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[1] * 40, [30, 1, 1, 7, 1, 20, 1], [3, 50, 1]])
def test_a_ring_is_the_end_of_what_was_appended(sizes):
    policy = Policy(sinks=2, window=8)
    k, v = numbers(2, 3, sum(sizes), 4), numbers(2, 3, sum(sizes), 4, seed=1)
    ring, grown, at = RingStore(8, near(policy, 2, first=[0, 3])), FullStore(), 0
    for size in sizes:
        step = k[:, :, at : at + size], v[:, :, at : at + size]
        grown.append(*step)
        linear = ring.extend(*step) if size > 1 else ring.append(*step)
        at += size
        if linear is not None:
            assert torch.equal(linear[0], k[:, :, linear[2] : at]) and linear[2] == max(0, at - size - 8)
        held, values, mask = ring.now(None)
        positions = ring.positions() if at > 8 else torch.arange(at).expand(2, -1)
        for row, first in ((0, 0), (1, 3)):
            seen = torch.ones(held.shape[2], dtype=torch.bool) if mask is None else mask[row, 0, 0]
            expected = {p for p in range(at) if p >= at - 8 or first <= p < first + 2}
            assert sorted(positions[row][seen].tolist()) == sorted(expected)
            assert torch.equal(held[row][:, seen], k[row][:, positions[row][seen]])
            assert torch.equal(values[row][:, seen], v[row][:, positions[row][seen]])
    assert torch.equal(grown.k, k) and torch.equal(grown.v, v)
    positions = ring.positions()
    ring.select(torch.tensor([1, 0]))
    assert torch.equal(ring.positions(), positions.flip(0))


def test_a_growing_store_reserves_a_sixteenth():
    grown = FullStore()
    grown.append(numbers(1, 1, 3200, 4), numbers(1, 1, 3200, 4))
    assert grown.nbytes == 2 * 4 * 4 * (3200 + 200)
    before = grown.k.data_ptr()
    for _ in range(200):
        grown.append(numbers(1, 1, 1, 4), numbers(1, 1, 1, 4))
    assert grown.k.data_ptr() == before and grown.length == 3400


def test_near_heads_alone_take_any_start():
    """Queries that follow on what a cache holds: chunks of a prompt."""
    q, k, v = attended(1, 4, 4, length=200)
    made = near(Policy(sinks=3, window=20))
    whole = by_definition(call(q, k, v), made, torch.zeros(4, dtype=torch.bool))
    rows = torch.arange(120, 200)
    mask = (rows[:, None] >= torch.arange(200))[None, None]
    part = call(q[:, :, 120:], k, v, mask, causal=False, start=120)
    found = split_heads(part, made, Plan.of(torch.zeros(4, dtype=torch.bool), 4))
    torch.testing.assert_close(found, whole[:, 120:], atol=2e-6, rtol=1e-5)


# -- benchmarks --------------------------------------------------------------------------------------------------------


def test_what_is_timed_is_the_policy(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import sparse_inference

    chosen, near_to = sparse_inference.policy().dense(0, 16), sparse_inference.near_of(700)
    for kv_heads in (16, 4):
        q, k, v = sparse_inference.layer(kv_heads, 700)
        runs = sparse_inference.prefill_runs(kv_heads, 700)
        expected = by_definition(sparse_inference.call_of(q, k, v), near_to, chosen)
        torch.testing.assert_close(runs["sparse"](), expected, atol=2e-6, rtol=1e-5)
        dense = runs["dense"]().transpose(1, 2)
        torch.testing.assert_close(expected[:, :, 5], dense[:, :, 5], atol=2e-6, rtol=1e-5)
        steps = sparse_inference.decode_runs(kv_heads, 400)
        one = {name: run() for name, run in steps.items()}
        torch.testing.assert_close(one["reserved"], one["default"])
        torch.testing.assert_close(one["sparse"][:, :, 5], one["default"][:, :, 5], atol=2e-6, rtol=1e-5)
        assert (one["sparse"] - one["default"])[:, :, 0].abs().max() > 1e-3
