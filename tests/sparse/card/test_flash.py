"""What a card would compute, with its kernels written out: every call around them, against the definition."""

import warnings

import pytest
import torch
from flash import on_card

import mech
import mech.sparse.kernels as kernels
from mech.model import AttentionCall, HookedMLLM
from mech.reference import tiny
from mech.reference.tiny_processors import noise, processor
from mech.sparse.card import choice, flash
from mech.sparse.kernels import by_definition, dense_heads, near_heads, split_heads
from mech.sparse.masks import Near
from mech.sparse.plan import Keys, Plan
from mech.sparse.policy import Policy, StillDense

PLANS = [
    (8, [3]), (8, []), (2, [1, 4, 5]), (2, [4, 5, 6, 7]), (4, [0, 1, 2, 3, 6]), (4, [0, 1, 7]), (1, [7]), (2, range(8)),
]  # fmt: skip


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def near(policy, rows=1):
    return Near(policy, torch.zeros(rows, dtype=torch.long), torch.full((rows,), 10_000))


def call(q, k, v, mask=None, start=0, **options):
    scale = q.shape[-1] ** -0.5
    return AttentionCall("text", 0, q, k, v, q.transpose(1, 2), mask, scale, mask is None, start, **options)


def attended(rows, groups, length, dtype=torch.float32):
    return tuple(numbers(rows, heads, length, 8, seed=i).to(dtype) for i, heads in enumerate((8, groups, groups)))


def chosen_of(heads):
    dense = torch.zeros(8, dtype=torch.bool)
    dense[list(heads)] = True
    return dense


@pytest.fixture
def twin(monkeypatch):
    def no_mask(*args, **kwargs):
        raise AssertionError("a block under a mask")

    made = on_card(monkeypatch)
    monkeypatch.setattr(kernels, "_block", no_mask)
    return made


@pytest.mark.parametrize("groups, dense", PLANS)
@pytest.mark.parametrize("sinks, window", [(4, 20), (0, 5), (3, 1), (16, 100)])
def test_a_prompt_is_the_definition_without_masks_or_copies(twin, groups, dense, sinks, window):
    chosen, policy = chosen_of(dense), Policy(sinks=sinks, window=window)
    plan = Plan.of(chosen, groups)
    for length in (2, window + sinks - 1, window + sinks, window + sinks + 1, 150):
        one = call(*attended(2, groups, max(length, 2)))
        found = split_heads(one, near(policy, 2), plan)
        torch.testing.assert_close(found, by_definition(one, near(policy, 2), chosen), atol=2e-6, rtol=1e-5)
        whole = {x.untyped_storage().data_ptr() for x in (one.k, one.v)}
        for _, k, v in twin.calls:  # all but the few sinks are read where they lie
            assert k.shape[1] == sinks or {x.untyped_storage().data_ptr() for x in (k, v)} <= whole
        twin.calls.clear()


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision(twin, dtype, tolerance):
    chosen, policy = chosen_of([3]), Policy(sinks=4, window=20)
    one = call(*attended(1, 4, 300, dtype))
    found, expected = split_heads(one, near(policy), Plan.of(chosen, 4)), by_definition(one, near(policy), chosen)
    assert found.dtype == dtype and twin.calls
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("start", [0, 1, 10, 23, 24, 120])
def test_chunks_of_a_prompt(twin, start):
    """Rows behind others, under the causal mask that a cache brings: local and dense heads."""
    q, k, v = attended(2, 4, 200)
    policy, local = Policy(sinks=4, window=20), chosen_of([])
    whole = by_definition(call(q, k, v), near(policy, 2), local)
    dense = by_definition(call(q, k, v), near(policy, 2), chosen_of(range(8)))
    rows = torch.arange(start, 200)
    mask = (rows[:, None] >= torch.arange(200)).expand(2, 1, -1, -1)
    part = call(q[:, :, start:], k, v, mask, start)
    found = split_heads(part, near(policy, 2), Plan.of(local, 4))
    torch.testing.assert_close(found, whole[:, start:], atol=2e-6, rtol=1e-5)
    found = dense_heads(part, k, v).transpose(1, 2)
    torch.testing.assert_close(found, dense[:, start:], atol=2e-6, rtol=1e-5)
    assert len(twin.calls) >= 2


def test_a_chunk_behind_a_ring(twin):
    """Only the window before the chunk is held, and the sinks beside it."""
    q, k, v = attended(1, 4, 200)
    policy, local = Policy(sinks=4, window=20), chosen_of([])
    whole = by_definition(call(q, k, v), near(policy), local)
    mask = (torch.arange(120, 200)[:, None] >= torch.arange(200))[None, None]
    pins = torch.arange(4)[None]
    keys = Keys(k[:, :, 100:], v[:, :, 100:], 100, pins, k[:, :, :4], v[:, :, :4])
    found = near_heads(call(q[:, :, 120:], k, v, mask, 120), keys, near(policy)).transpose(1, 2)
    torch.testing.assert_close(found, whole[:, 120:], atol=2e-6, rtol=1e-5)
    assert len(twin.calls) == 2


def test_masks_that_say_more_than_causality_are_not_passed_over(monkeypatch):
    twin = on_card(monkeypatch)
    q, k, v = attended(2, 4, 60)
    rows, policy, chosen = torch.arange(60), Policy(sinks=2, window=9), chosen_of([1])
    causal = (rows[:, None] >= rows).expand(2, 1, -1, -1)
    padded = causal & (rows >= torch.tensor([0, 7])[:, None])[:, None, None]
    window = causal & (rows[:, None] - rows < 30)
    ahead = causal | ((rows[:, None] // 30 == rows // 30) & (rows < 60))
    for mask in (padded, window, ahead, torch.where(causal, 0.0, torch.finfo(torch.float32).min)):
        one, made = call(q, k, v, mask), Near(policy, torch.tensor([0, 7]), torch.full((2,), 99))
        found, expected = split_heads(one, made, Plan.of(chosen, 4)), by_definition(one, made, chosen)
        torch.testing.assert_close(found[:, 7:], expected[:, 7:], atol=2e-6, rtol=1e-5)
        assert not twin.calls
    split_heads(call(q, k, v, causal), near(policy, 2), Plan.of(chosen, 4))
    assert twin.calls


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "paligemma2"])
def test_models_on_a_card_are_what_they_are_on_a_cpu(monkeypatch, name):
    """Prompt, chunks, and generation from stores of fixed size: their kernel counts keys and masks none."""
    model = HookedMLLM.from_hf(tiny.model(name), processor(name), name=name)
    ids = torch.randint(200, 240, (2, 60), generator=torch.Generator().manual_seed(0)) % model.cfg.vocab
    layers = model.cfg.attention_layers
    policy = Policy([(layer, head) for layer in layers for head in ((0,) if layer else (1, 2))], 2, 6)
    picture = model.inputs("Which digit is red?", images=[noise(40, 24)])

    def run():
        with warnings.catch_warnings(), mech.localize(model, policy, graph=True) as fast:
            warnings.simplefilter("ignore", StillDense)
            yield fast({"input_ids": ids})
            for inputs in ({"input_ids": ids}, picture):
                yield fast.generate(inputs, max_new_tokens=14)
            yield fast.generate({"input_ids": ids}, max_new_tokens=14, prefill_chunk_size=9)

    expected = list(run())
    twin = on_card(monkeypatch)
    for found, wanted in zip(run(), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    rows = [q for q, _, _ in twin.calls if q.ndim == 3]
    assert bool(rows) == (name != "paligemma2")  # whose softcap no flash kernel of torch computes


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_rows_padded_on_the_left_take_the_kernel_of_a_row_alone(monkeypatch, name):
    """Every token in every layer, grouped heads and windows of a layer's own included, without a mask."""
    model, options = HookedMLLM.from_hf(tiny.model(name), processor(name), name=name), {"max_new_tokens": 14}
    pictures = {"Which digit is red?": (40, 24), "Which is red?": (24, 24)}
    padded = model.collate([model.inputs(text, images=[noise(*size)]) for text, size in pictures.items()])
    assert not padded.tensors["attention_mask"].all()
    options["min_new_tokens"] = 14
    plain, twin = model.generate(padded, **options), on_card(monkeypatch)
    with mech.dense_static(model, graph=True) as dense:
        assert torch.equal(dense.generate(padded, **options), plain) and dense.decoding == "step"
    rows = [q for q, _, _ in twin.calls if q.ndim == 3]
    assert len(rows) == 13 * len(model.cfg.attention_layers) and all(len(q) == 2 for q in rows)


# -- machines without them ---------------------------------------------------------------------------------------------


def test_what_a_machine_lacks(monkeypatch):
    half, bf16 = torch.zeros(1, dtype=torch.float16), torch.zeros(1, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "capability 7.5 without bfloat16; load the model in float16" in flash.lacking(bf16)
    assert "flash kernels need 8.0" in flash.lacking(half)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert flash.lacking(bf16) == "this build of torch has no flash attention"
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert flash.lacking(bf16) == ""
    assert flash.lacking(torch.zeros(1)) == "float32, and flash kernels take bfloat16 or float16"


def test_single_precision_takes_another_way_and_says_so_once(monkeypatch):
    twin = on_card(monkeypatch, float32=False)
    policy, chosen = Policy(sinks=2, window=9), chosen_of([1])
    one = call(*attended(1, 4, 60))
    with pytest.warns(
        choice.Fallback, match="flash attention with a window is not used .not in half precision"
    ) as said:
        found = [split_heads(one, near(policy), Plan.of(chosen, 4)) for _ in range(2)]
    assert len(said) == 1 and not twin.calls
    torch.testing.assert_close(found[1], by_definition(one, near(policy), chosen), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("groups", [8, 2])
def test_a_token_in_a_growing_cache_is_no_plan_of_cudnn(monkeypatch, groups):
    """SDPA is not asked: on some cards it would choose a library that plans anew for every number of keys."""
    twin = on_card(monkeypatch)
    q, k, v = attended(2, groups, 70)
    one = call(q[:, :, -1:], k, v, start=69)
    expected = by_definition(one, near(Policy(window=9), 2), chosen_of(range(8)))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    found = kernels.fused(one, one.q, k, v, None).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    assert len(twin.calls) == 1


def test_a_card_without_bfloat16_falls_back_and_says_so_once(monkeypatch):
    twin = on_card(monkeypatch)
    monkeypatch.setattr(flash, "lacking", lambda q: "a card of capability 7.5 without bfloat16")
    policy, chosen = Policy(sinks=2, window=9), chosen_of([1])
    one = call(*attended(1, 4, 60, torch.bfloat16))
    with pytest.warns(choice.Fallback, match="without bfloat16"):
        found = split_heads(one, near(policy), Plan.of(chosen, 4))
    torch.testing.assert_close(found, by_definition(one, near(policy), chosen), atol=2e-2, rtol=2e-2)
    split_heads(one, near(policy), Plan.of(chosen, 4))  # no warning, which would be an error
    assert not twin.calls


def test_a_kernel_that_fails_is_passed_over_from_then_on(monkeypatch):
    calls = []

    def broken(*args, **options):
        calls.append(args)
        raise RuntimeError("no kernel image is available for execution on the device\nmore")

    on_card(monkeypatch, broken)
    policy, chosen = Policy(sinks=2, window=9), chosen_of([])
    one = call(*attended(1, 4, 60))
    with pytest.warns(choice.Fallback, match="no kernel image is available") as said:
        for _ in range(3):
            found = split_heads(one, near(policy), Plan.of(chosen, 4))
    torch.testing.assert_close(found, by_definition(one, near(policy), chosen), atol=2e-6, rtol=1e-5)
    assert len(said) == 1 and len(calls) == 1

    def full(*args, **options):
        raise torch.OutOfMemoryError("out of memory")

    on_card(monkeypatch, full)
    with pytest.raises(torch.OutOfMemoryError):
        split_heads(one, near(policy), Plan.of(chosen, 4))
