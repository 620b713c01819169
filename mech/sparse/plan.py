"""The order in which a layer's heads are computed, and the keys they are given.

    plan = Plan.of(policy.dense(layer, n_heads), n_kv_heads)
    call = take(call, plan.dense)                # the call for some query heads

Picking heads by index copies them; a ``Run`` is a stretch of adjacent heads and groups, which are read in place.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech.model.attention import AttentionCall
from mech.sparse.masks import Near


@dataclass(frozen=True)
class Run:
    """Adjacent query heads, and the key/value heads they read.

    Attributes:
        heads: the query heads.
        groups: the key/value heads.
        held: where these stand in ``Plan.whole``, for dense runs; empty for others.
    """

    heads: slice
    groups: slice
    held: slice


@dataclass(frozen=True, eq=False)
class Plan:
    """The heads of a layer in the order in which they are computed. Worked out once per layer.

    Attributes:
        dense: query heads that attend to everything.
        dense_groups: the key/value head that each of them reads.
        whole: key/value heads that some dense head reads.
        whole_heads: all query heads of these.
        packed: dense heads by key/value head in ``whole``, padded by repeating one: for a single query row, where the
            heads of a group are rows of one call and no key is copied.
        local: key/value heads that only local heads read.
        local_heads: all query heads of these.
        inside: where each dense head stands in ``whole_heads``; the others there are local.
        near: key/value heads whose query heads are computed as local in a prompt: all of them unless many are entirely
            dense, because picking copies keys.
        near_heads: all query heads of these.
        inverse: where each query head stands in ``whole_heads`` followed by ``local_heads``.
        groups: key/value heads in the order ``whole``, ``local``.
        row: query heads in the order ``packed``, ``local_heads``: for a single query row.
        back: where each query head first stands in ``row`` followed by ``whole_heads``.
        dense_runs: the dense heads, in their order.
        near_runs: all query heads of key/value heads that some local head reads.
    """

    dense: Int[Tensor, " head"]
    dense_groups: Int[Tensor, " head"]
    whole: Int[Tensor, " kv_head"]
    whole_heads: Int[Tensor, " head"]
    packed: Int[Tensor, "kv_head head"]
    local: Int[Tensor, " kv_head"]
    local_heads: Int[Tensor, " head"]
    inside: Int[Tensor, " head"]
    near: Int[Tensor, " kv_head"]
    near_heads: Int[Tensor, " head"]
    inverse: Int[Tensor, " head"]
    groups: Int[Tensor, " kv_head"]
    row: Int[Tensor, " head"]
    back: Int[Tensor, " head"]
    dense_runs: tuple[Run, ...]
    near_runs: tuple[Run, ...]

    @classmethod
    def of(cls, dense: Bool[Tensor, " head"], n_groups: int) -> "Plan":
        """The plan for a layer's heads, given which are dense."""
        by_group = dense.reshape(n_groups, -1)
        heads = torch.arange(len(dense)).reshape(n_groups, -1)
        whole, throughout = by_group.any(1), by_group.all(1)
        near = torch.ones_like(whole) if throughout.sum() * 4 < n_groups else ~throughout
        counts = by_group.sum(1)[whole]
        ends, place = counts.cumsum(0)[:, None], torch.arange(int(counts.max()) if len(counts) else 0)
        listed = _places(dense)
        packed = listed[torch.minimum(ends - counts[:, None] + place, ends - 1)]
        row = torch.cat([packed.flatten(), heads[~whole].flatten()])
        order = torch.cat([row, heads[whole].flatten()]).tolist()
        return cls(
            dense=listed,
            dense_groups=listed // heads.shape[1],
            whole=_places(whole),
            whole_heads=heads[whole].flatten(),
            packed=packed,
            local=_places(~whole),
            local_heads=heads[~whole].flatten(),
            inside=_places(by_group[whole].flatten()),
            near=_places(near),
            near_heads=heads[near].flatten(),
            inverse=torch.argsort(torch.cat([heads[whole].flatten(), heads[~whole].flatten()])),
            groups=torch.cat([_places(whole), _places(~whole)]),
            row=row,
            back=torch.tensor([order.index(head) for head in range(len(dense))]),
            dense_runs=tuple(_dense_runs(by_group)),
            near_runs=tuple(_near_runs(by_group)),
        )

    def to(self, device: torch.device) -> "Plan":
        """The same on a device."""
        if self.inverse.device == device:
            return self
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in parts.items()}
        return Plan(**moved)


@dataclass(frozen=True, eq=False)
class Keys:
    """Keys and values in order of position, from ``start`` on, and pinned ones at any position.

    Attributes:
        pins: positions of the pinned keys of every row, -1 where there is none.
        mask_start: the position that the layer mask's first column stands for.
    """

    k: Float[Tensor, "batch kv_head key d_head"]
    v: Float[Tensor, "batch kv_head key d_head"]
    start: int
    pins: Int[Tensor, "batch pin"]
    pinned_k: Float[Tensor, "batch kv_head pin d_head"]
    pinned_v: Float[Tensor, "batch kv_head pin d_head"]
    mask_start: int = 0

    @classmethod
    def of(cls, k: Tensor, v: Tensor, start: int, near: Near, mask_start: int = 0) -> "Keys":
        """From tensors that hold every pinned key that is still seen."""
        pins = near.pins(start + k.shape[2])
        at = (pins - start).clamp(min=0)[:, None, :, None]
        pinned_k, pinned_v = (x.gather(2, at.expand(*x.shape[:2], -1, x.shape[3])) for x in (k, v))
        return cls(k, v, start, pins.masked_fill(pins < start, -1), pinned_k, pinned_v, mask_start)

    def of_groups(self, groups: slice) -> "Keys":
        """Those of some key/value heads, without a copy."""
        names = ("k", "v", "pinned_k", "pinned_v")
        return replace(self, **{name: getattr(self, name)[:, groups] for name in names})


def _near_runs(by_group: Bool[Tensor, "kv_head head"]) -> Iterator[Run]:
    each = by_group.shape[1]
    for begin, end in _stretches(~by_group.all(1)):
        yield Run(slice(begin * each, end * each), slice(begin, end), slice(0))


def _dense_runs(by_group: Bool[Tensor, "kv_head head"]) -> Iterator[Run]:
    """Fully dense groups together; in a partly dense group, its adjacent dense heads."""
    each, place = by_group.shape[1], (by_group.any(1).cumsum(0) - 1).tolist()
    full, group = by_group.all(1), 0
    ends = dict(_stretches(full))
    while group < len(by_group):
        stop = ends.get(group, group + 1)
        heads = [(0, (stop - group) * each)] if group in ends else _stretches(by_group[group])
        for begin, end in heads:
            held = slice(place[group], place[stop - 1] + 1)
            yield Run(slice(group * each + begin, group * each + end), slice(group, stop), held)
        group = stop


def _stretches(chosen: Bool[Tensor, " n"]) -> list[tuple[int, int]]:
    """Start and end of every stretch of adjacent chosen places."""
    edges = torch.cat([chosen.new_zeros(1), chosen, chosen.new_zeros(1)]).int().diff().nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def start_of(call: AttentionCall) -> int:
    """The position of the first key: a windowed layer's cache has dropped some, a static one has room for more."""
    return max(0, call.query_start + call.q.shape[2] - call.k.shape[2])


def take(call: AttentionCall, heads: Int[Tensor, " head"] | slice) -> AttentionCall:
    """The call for some query heads; its keys and values are still those of all heads."""
    mask = call.mask
    return replace(
        call,
        q=call.q[:, heads],
        mask=mask if mask is None or mask.shape[1] == 1 else mask[:, heads],
        sinks=None if call.sinks is None else call.sinks[heads],
        head_mask=None,
    )


def _places(chosen: Bool[Tensor, " n"]) -> Int[Tensor, " m"]:
    return chosen.nonzero().flatten()
