"""A KV cache of fixed shapes: a generation step always writes to and reads from the same addresses.

    cache = FixedCache(split, near, shape, device, chunked)     # allocated once per shape
    cache.load(split, near, mask)                               # moves in what a prompt left in a ``SplitCache``
    hf_model(token, past_key_values=cache)                      # one token, again and again

Dense KV groups have a store with room for every position, the others a ring of the window and the pinned keys
(``mech.sparse.stores``). Which slots count is computed from positions on the device (``clock``).
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from mech.errors import UnsupportedModel
from mech.model import AttentionCall
from mech.sparse.cache import SplitCache, SplitLayer, WholeLayer
from mech.sparse.card import flash
from mech.sparse.card.choice import Way, anything, first_of, nothing
from mech.sparse.kernels import fused, of_heads
from mech.sparse.masks import Near
from mech.sparse.plan import Plan, take
from mech.sparse.step.clock import Clock, Kind, Seen, Shape
from mech.sparse.stores import FullStore, Store


class FixedStore:
    """Keys and values of some KV groups: a ring, followed by the pinned ones. Memory is laid out by position."""

    def __init__(self, kind: Kind, clock: Clock, like: tuple[Tensor, Tensor]):
        self.kind, self.clock = kind, clock
        slots = kind.ring + (clock.shape.pins if kind.pinned else 0)
        # The heads of a position are adjacent, so a flash kernel sees the rows of a batch as one row of positions.
        self.k, self.v = (x.new_zeros(len(x), slots, x.shape[1], x.shape[3]).transpose(1, 2) for x in like)

    def load(self, held: Store, shifted: bool) -> None:
        """Copy what a growing store holds.

        Args:
            held: the growing store.
            shifted: whether some row begins with padding: its keys move to the front.
        """
        count = held.length if isinstance(held, FullStore) else held.window
        at = (self.clock.first[:, None] + torch.arange(count, device=self.k.device)) % count
        for mine, theirs in ((self.k, held.k), (self.v, held.v)):
            ring, pins = theirs[:, :, :count], theirs[:, :, count:]
            mine[:, :, :count] = ring.gather(2, _places(at, ring)) if shifted else ring
            if self.kind.pinned:
                mine[:, :, self.kind.ring : self.kind.ring + pins.shape[2]] = pins

    def write(self, k: Float[Tensor, "batch kv_head 1 d_head"], v: Float[Tensor, "batch kv_head 1 d_head"]) -> None:
        """Write the key and value of the clock's position."""
        for mine, new in ((self.k, k), (self.v, v)):
            mine.scatter_(2, _places(self.clock.slot(self.kind)[:, None], new), new)
            if self.kind.pinned and self.clock.shape.pinning:
                mine.index_copy_(2, self.clock.next_pin + self.kind.ring, new)

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


class FixedLayer(WholeLayer):
    """A layer's stores, and attention of one token over them."""

    def __init__(self, clock: Clock, plan: Plan, layer: SplitLayer, window: int, chunked: bool):
        super().__init__(layer.is_sliding)
        assert layer.dense is not None
        self.clock, self.plan = clock, plan
        self._in_order = bool((plan.back == torch.arange(len(plan.back), device=plan.back.device)).all())
        own = layer.sliding_window
        whole = Kind(own or clock.shape.room, own=own, chunked=chunked)
        self._near = Kind(min(window, own or window), True, own, chunked)
        self.dense = FixedStore(whole, clock, (layer.dense.k, layer.dense.v)) if len(plan.whole) else None
        self.local = None if layer.local is None else FixedStore(self._near, clock, (layer.local.k, layer.local.v))
        self.given: Tensor | None = None

    def load(self, layer: SplitLayer, shifted: bool) -> None:
        """Move here what a layer holds after the prompt (``FixedStore.load``); that layer is left empty."""
        for mine, theirs in ((self.dense, layer.dense), (self.local, layer.local)):
            if mine is not None and theirs is not None:
                mine.load(theirs, shifted)
        self.seen = layer.seen
        layer.empty()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.given = key_states
        k, v = key_states, value_states
        if self.dense is not None and self.local is not None:
            k, v = k.index_select(1, self.plan.groups), v.index_select(1, self.plan.groups)
        whole = len(self.plan.whole)
        if self.dense is not None:
            self.dense.write(k[:, :whole], v[:, :whole])
        if self.local is not None:
            self.local.write(k[:, whole:], v[:, whole:])
        return key_states, value_states

    def stores(self) -> list[Any]:
        return [store for store in (self.dense, self.local) if store is not None]

    def attend(self, call: AttentionCall) -> Float[Tensor, "batch pos head d_head"]:
        """z of all heads of one token, after ``update``.

        Raises:
            UnsupportedModel: the model changed the keys that ``update`` returned.
        """
        given, self.given = self.given, None
        if given is None or call.k.data_ptr() != given.data_ptr() or call.k.shape != given.shape:
            raise UnsupportedModel(
                f"keys that layer {call.layer} changes after they were cached", "keys and values passed on unchanged",
                "localize with graph=False",
            )  # fmt: skip
        plan, parts, dense = self.plan, [], self.plan.packed.numel()
        q = call.q if self._in_order else call.q.index_select(1, plan.row)
        for store, heads in ((self.dense, slice(dense)), (self.local, slice(dense, None))):
            if store is not None and q[:, heads].shape[1]:
                own = of_heads(call, plan.row[heads])
                parts.append(first_of(ROWS, own, q[:, heads], store.k, store.v, self.clock.seen(store.kind)))
        if len(plan.dense) < len(plan.whole_heads):
            parts.append(self._beside(take(call, plan.whole_heads)))
        z = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return (z if self._in_order else z.index_select(1, plan.back)).transpose(1, 2)

    def _beside(self, call: AttentionCall) -> Float[Tensor, "batch head pos d_head"]:
        """All heads of the groups that are kept whole, computed as local ones."""
        assert self.dense is not None
        at, seen = self.clock.nearby(self.dense.kind, self._near)
        k, v = (x.gather(2, _places(at, x)) for x in (self.dense.k, self.dense.v))
        return first_of(ROWS, call, call.q, k, v, seen)


class FixedCache(Cache):
    """The cache of a captured generation, for ``past_key_values=``: it cannot grow, and takes one token at a time."""

    def __init__(self, split: SplitCache, near: Near, shape: Shape, device: torch.device, chunked: set[int]):
        self.clock = Clock(shape, near.policy, device)
        self.fixed = [
            FixedLayer(self.clock, layer.plan, layer, near.policy.window, index in chunked)
            for index, layer in enumerate(split_layers(split))
        ]
        super().__init__(layers=[*self.fixed])

    def load(self, split: SplitCache, near: Near, mask: Tensor | None) -> None:
        """Move in what a prompt left; the other cache is empty afterwards.

        Args:
            split: the prompt's cache.
            near: the policy for the rows of this run.
            mask: which of the prompt's positions are not padding; None for all.
        """
        self.clock.load(near, split.get_seq_length(), pins_of(split, near), mask)
        shifted = bool(near.first.any())
        for mine, theirs in zip(self.fixed, split_layers(split), strict=True):
            mine.load(theirs, shifted)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, all of them reserved."""
        return sum(layer.nbytes for layer in self.fixed)


def split_layers(split: SplitCache) -> list[SplitLayer]:
    """The layers of a cache that can move into stores of fixed size: all of them are split."""
    return [layer for layer in split.layers if isinstance(layer, SplitLayer)]


def pins_of(split: SplitCache, near: Near) -> Int[Tensor, "batch pin"] | None:
    """Positions of the keys pinned in a prompt, in the order that all layers share; None if no head is local."""
    held = [layer.local.pins for layer in split_layers(split) if layer.local is not None]
    if held:
        return held[0]
    beside = any(len(layer.plan.dense) < len(layer.plan.whole_heads) for layer in split_layers(split))
    return near.listed(0, split.get_seq_length()) if beside else None


def _places(at: Int[Tensor, "batch slot"], x: Float[Tensor, "batch kv_head pos d_head"]) -> Int[Tensor, "..."]:
    """Slots of every row, for each of its heads and their whole width."""
    return at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])


# -- one query row -----------------------------------------------------------------------------------------------------


def _masked(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Float[Tensor, "batch head 1 d_head"]:
    if call.fused:
        return fused(call, q, k, v, seen.mask)
    # Like ``stepwise``, without its check for rows that see nothing: reading that would wait for the GPU.
    scores = (q.float().unflatten(1, (k.shape[1], -1))[:, :, :, 0] @ k.float().transpose(-1, -2)) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.masked_fill(~seen.mask, float("-inf"))
    if call.sinks is not None:
        sinks = call.sinks.float().reshape(1, k.shape[1], -1, 1).expand(len(scores), -1, -1, -1)
        pattern = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    else:
        pattern = torch.softmax(scores, dim=-1)
    return (pattern.to(v.dtype) @ v).flatten(1, 2)[:, :, None]


def _flash(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Float[Tensor, "batch head 1 d_head"]:
    return flash.row(q, k, v, seen.used, seen.rows, seen.begins, call.scale)


def _flash_takes(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> bool:
    return flash.on_card(q) and flash.fits(q, v) and call.fused and seen.counts


ROWS = (
    Way("flash attention over stores of fixed size", _flash_takes, flash.missing, _flash),
    Way("attention under a mask", anything, nothing, _masked),
)
