"""One row over stores of fixed size is the definition: before the ring comes round and after, in every precision."""

import pytest
import torch
from flash import on_card

from mech.model import AttentionCall
from mech.sparse.cache import SplitCache, SplitLayer
from mech.sparse.kernels import by_definition
from mech.sparse.masks import Near
from mech.sparse.plan import Plan
from mech.sparse.policy import Policy
from mech.sparse.step.fixed import FixedCache
from mech.sparse.step.loop import shape_of

LENGTH, GROUPS = 70, 4
DENSE = torch.tensor([True, True, False, True, False, False, False, False])  # a whole, a mixed and two local groups


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def call(q, k, v, mask, start, **options):
    return AttentionCall("text", 0, q, k, v, q.transpose(1, 2), mask, 0.3, False, start, **options)


def split_cache(near, plan, own, k, v):
    """A prompt's keys in a growing cache of one layer."""
    cache = SplitCache.__new__(SplitCache)
    cache.near, cache.layers = near, [SplitLayer(cache, plan, own)]
    cache.layers[0].update(k, v)
    return cache


def compared(
    dtype, tolerance, policy, prompt, own=None, first=(0, 0), text=None, dense=DENSE, chunked=False, holes=(), **options
):
    """Feeds the tokens behind a prompt one by one and compares each row; gives the cache.

    ``first`` is where the rows begin, ``holes`` are padding behind that; ``own`` is the layer's window, or its chunks.
    """
    rows = len(first)
    q, k, v = (numbers(rows, heads, LENGTH, 8, seed=i).to(dtype) for i, heads in enumerate((8, GROUPS, GROUPS)))
    near = Near(policy, torch.tensor(first), torch.full((rows,), prompt), text)
    split = split_cache(near, Plan.of(dense, GROUPS), own, k[:, :, :prompt], v[:, :, :prompt])
    keys = torch.arange(LENGTH)
    real = keys >= torch.tensor(first)[:, None]
    real[-1, list(holes)] = False
    mask = real[:, :prompt].long() if any(first) or holes else None
    shape = shape_of(near, split, torch.Size((rows, LENGTH)), mask)
    cache = FixedCache(split, near, shape, q.device, {0} if chunked else set())
    cache.load(split, near, mask)
    layer = cache.layers[0]
    for at in range(prompt, LENGTH):
        row = slice(at, at + 1)
        cache.clock.begin()
        layer.update(k[:, :, row], v[:, :, row])
        found = layer.attend(call(q[:, :, row], k[:, :, row], v[:, :, row], None, at, **options))
        cache.clock.advance()
        inside = keys > at - (own or LENGTH)
        if chunked:
            begun = torch.tensor(first)[:, None]
            inside = (keys - begun) // own == (at - begun) // own
        seen = real & (keys <= at) & inside
        whole = call(q[:, :, row], k[:, :, : at + 1], v[:, :, : at + 1], seen[:, None, None, : at + 1], at, **options)
        expected = by_definition(whole, near, dense)
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=max(tolerance, 1e-5))
    return cache


PRECISION = [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]


@pytest.mark.parametrize("dtype, tolerance", PRECISION)
@pytest.mark.parametrize("extra", [{}, {"softcap": 5.0}, {"sinks": torch.linspace(-1, 2, 8)}])
@pytest.mark.parametrize("first", [(0, 0), (0, 3)])
def test_every_precision_padding_softcap_and_sinks(dtype, tolerance, extra, first):
    compared(dtype, tolerance, Policy(sinks=4, window=9), 12, first=first, **extra)


@pytest.mark.parametrize("heads", [(0, 1), (), range(8), (7,)])
def test_heads_that_lie_in_order_and_others(heads):
    dense = torch.tensor([head in heads for head in range(8)])
    for extra in ({}, {"sinks": torch.linspace(-1, 2, 8)}):
        compared(torch.float32, 2e-6, Policy(sinks=4, window=9), 40, dense=dense, **extra)


@pytest.mark.parametrize("prompt", [1, 3, 9, 13, 40])
@pytest.mark.parametrize("own", [None, 5, 20])
def test_every_length_of_the_prompt_and_window_of_the_layer(prompt, own):
    compared(torch.float32, 2e-6, Policy(sinks=4, window=9), prompt, own)


@pytest.mark.parametrize("first", [(0, 0), (0, 5)])
def test_kept_text(first):
    text = numbers(2, 12) > 0.5
    compared(torch.float32, 2e-6, Policy(window=9, keep_text=True), 12, first=first, text=text)


@pytest.mark.parametrize("extra", [{}, {"own": 12}, {"own": 12, "chunked": True}])
def test_padding_between_tokens(extra):
    compared(torch.float32, 2e-6, Policy(sinks=4, window=9), 30, first=(2, 0), holes=(3, 20, 29), **extra)


@pytest.mark.parametrize("dtype, tolerance", PRECISION)
@pytest.mark.parametrize(
    "prompt, first", [(1, (0, 0)), (12, (0, 0)), (40, (0, 0)), (12, (0, 8)), (40, (17, 0)), (40, (3, 36))]
)
def test_a_flash_kernel_that_counts_keys_sees_the_same(monkeypatch, dtype, tolerance, prompt, first):
    """What a row sees are the first slots of every store, so a count on the device is all the kernel needs.

    Padding on the left included, whether the rings have come round in no row, in one, or in all.
    """
    twin = on_card(monkeypatch)
    cache = compared(dtype, tolerance, Policy(sinks=4, window=9), prompt, first=first)
    assert len(twin.calls) == 3 * (LENGTH - prompt)  # dense groups, local groups, local heads of dense groups
    held = {x.untyped_storage().data_ptr() for store in cache.layers[0].stores() for x in (store.k, store.v)}
    where_they_lie = [x.untyped_storage().data_ptr() in held for _, k, v in twin.calls for x in (k, v)]
    assert sum(where_they_lie) == 4 * (LENGTH - prompt)  # no copy, but of what the last read


@pytest.mark.parametrize("first", [(0, 0), (0, 7)])
@pytest.mark.parametrize("prompt", [13, 40])
@pytest.mark.parametrize("own, chunked, counted", [(20, False, 1), (5, False, 3), (20, True, 1), (9, True, 1)])
def test_a_layer_with_a_window_of_its_own_lets_go_of_pinned_keys(monkeypatch, own, chunked, counted, prompt, first):
    """Of the earliest first, so that what is seen are not the first slots: then a mask says it."""
    twin = on_card(monkeypatch)
    compared(torch.float32, 2e-6, Policy(sinks=4, window=9), prompt, own, first, chunked=chunked)
    assert len(twin.calls) == counted * (LENGTH - prompt)


def test_rows_that_have_not_reached_the_sinks_have_holes(monkeypatch):
    """One row has two tokens, the other all four sinks."""
    twin = on_card(monkeypatch)
    compared(torch.float32, 2e-6, Policy(sinks=4, window=9), 12, first=(10, 0))
    assert not twin.calls


def test_kept_text_is_counted_in_a_row_alone(monkeypatch):
    """Rows that keep different numbers of tokens have holes between them."""
    twin, policy, text = on_card(monkeypatch), Policy(window=9, keep_text=True), numbers(2, 12) > 0.5
    compared(torch.float32, 2e-6, policy, 12, text=text)
    assert not twin.calls
    compared(torch.float32, 2e-6, policy, 12, first=(0,), text=text[:1])
    assert twin.calls
