"""Flex attention of local heads against the definition: uncompiled, and once compiled for the CPU."""

import pytest
import torch
from flash import on_card

import mech.sparse.kernels as kernels
from mech.model import AttentionCall
from mech.sparse.card import flex
from mech.sparse.kernels import by_definition, near_heads
from mech.sparse.masks import Near
from mech.sparse.plan import Keys
from mech.sparse.policy import Policy

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what torch's compiler imports
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore::mech.sparse.card.choice.Fallback"),  # flash, in single precision
]
LENGTH = 300
NONE = torch.zeros(8, dtype=torch.bool)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(length=LENGTH, groups=4, dtype=torch.float32):
    return tuple(numbers(2, heads, length, 16, seed=i).to(dtype) for i, heads in enumerate((8, groups, groups)))


def call(q, k, v, mask=None, start=0, **options):
    return AttentionCall("text", 0, q, k, v, q.transpose(1, 2), mask, 0.25, mask is None, start, **options)


def near(policy, text=None):
    return Near(policy, torch.tensor([0, 7]), torch.full((2,), LENGTH), text)


def own_masks():
    rows = torch.arange(LENGTH)
    causal = (rows[:, None] >= rows).expand(2, 1, -1, -1)
    real = (rows >= torch.tensor([0, 7])[:, None])[:, None, None]
    return {
        "padding": causal & real,
        "an image that looks ahead": (causal | ((rows[:, None] // 50 == rows // 50) & (rows < 200))) & real,
        "a window": causal & (rows[:, None] - rows < 40) & real,
    }


@pytest.fixture
def card(monkeypatch):
    """A card without flash; no block under a mask."""

    def no_mask(*args, **kwargs):
        raise AssertionError("a block under a mask")

    on_card(monkeypatch, float32=False)
    monkeypatch.setattr(flex, "on_card", lambda x: True)
    monkeypatch.setattr(kernels, "_block", no_mask)


@pytest.fixture
def eager(card, monkeypatch):
    """Flex attention there, without its compiler."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(flex, "compiled", lambda: flex_attention)


def close(found, expected, tolerance=2e-6):
    for row, first in ((0, 0), (1, 7)):  # nothing is seen from a row of padding
        torch.testing.assert_close(found[row, first:], expected[row, first:], atol=tolerance, rtol=max(1e-5, tolerance))


def local(one, made):
    keys = Keys.of(one.k, one.v, 0, made)
    return near_heads(one, keys, made).transpose(1, 2)


@pytest.mark.parametrize("mask", own_masks())
@pytest.mark.parametrize("sinks, window", [(4, 20), (0, 5), (3, 150)])
def test_masks_of_a_layer(eager, mask, sinks, window):
    made, one = near(Policy(sinks=sinks, window=window)), call(*layer(), own_masks()[mask])
    close(local(one, made), by_definition(one, made, NONE))


@pytest.mark.parametrize("extra", [{"softcap": 5.0}, {"sinks": torch.linspace(-1, 2, 8)}])
def test_softcaps_and_sinks_of_a_layer(eager, extra):
    made, one = near(Policy(sinks=4, window=20)), call(*layer(), own_masks()["padding"], **extra)
    close(local(one, made), by_definition(one, made, NONE))


def test_kept_text_and_no_mask(eager):
    text = numbers(2, LENGTH) > 1
    made, one = near(Policy(sinks=0, window=20, keep_text=True), text), call(*layer())
    close(local(one, made), by_definition(one, made, NONE))


def test_bfloat16(eager):
    made, one = near(Policy(sinks=4, window=20)), call(*layer(dtype=torch.bfloat16), own_masks()["padding"])
    close(local(one, made), by_definition(one, made, NONE), 2e-2)


def test_a_chunk_behind_a_ring(eager):
    """Pinned keys lie before the others, and count only outside the window."""
    q, k, v = layer()
    policy = Policy(sinks=4, window=20)
    made, mask = near(policy), own_masks()["padding"]
    for begin, start in ((120, 100), (22, 2)):  # in the second, some sinks are in the window too
        whole = by_definition(call(q, k, v, mask), made, NONE)[:, begin:]
        pins = torch.tensor([[0, 1, 2, 3], [7, 8, 9, 10]])
        at = pins[:, None, :, None].expand(-1, 4, -1, 16)
        keys = Keys(k[:, :, start:], v[:, :, start:], start, pins, k.gather(2, at), v.gather(2, at))
        found = near_heads(call(q[:, :, begin:], k, v, mask[:, :, begin:], begin), keys, made).transpose(1, 2)
        torch.testing.assert_close(found, whole, atol=2e-6, rtol=1e-5)


def test_blocks_that_nobody_sees_are_left_out():
    made = near(Policy(sinks=4, window=20))
    q, k, v = layer(2048)
    given, _, _ = flex._of(call(q, k, v), Keys.of(k, v, 0, made), made)
    blocks = flex.blocks_of(given, 2048, 20)
    counts = blocks.kv_num_blocks[0, 0].tolist()
    assert counts == [1, 2] + [3] * 14  # sinks, the block before, its own
    assert sorted(blocks.kv_indices[0, 0, 9, :3].tolist()) == [0, 8, 9]


@pytest.mark.slow
def test_compiled_once_for_every_mask_and_policy(card):
    """Lengths stay: for those that change, torch's compiler (2.13) writes C++ that no compiler takes."""
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    with torch.no_grad():
        for sinks, window in ((4, 20), (0, 130)):
            for mask in own_masks().values():
                made, one = near(Policy(sinks=sinks, window=window)), call(*layer(), mask)
                close(local(one, made), by_definition(one, made, NONE), 1e-5)
    assert graphs["unique_graphs"] == before + 1
