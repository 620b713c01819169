"""Attention in which some heads look at everything and the others nearby: what a layer's heads cost where they are.

    z = by_definition(call, near, dense)     # every head over every key, under its own mask: the slow twin
    z = split_heads(call, near, plan)        # dense heads in one call, local ones block by block

Heads are put in an order once for each layer (``Plan``), so that those of one kind are one tensor: dense heads; local
heads whose whole KV group is local, which share keys; local heads beside a dense one, which get their own copy of the
few keys they see. Local heads go through the prompt in blocks of query rows: a block of ``BLOCK`` rows sees the pinned
keys and the window's ``window + BLOCK - 1`` keys, a small tensor for the fused kernel, so nothing of size S x S is
made and the work is linear in S.

On a GPU in half precision, without padding, local heads take the flash kernel's own window and get the pinned keys
merged in by log-sum-exp (``windowed``). That path has not been run: no GPU was at hand. What merges is tested.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mech.model.attention import AttentionCall, LayerRecord, stepwise
from mech.sparse.masks import Near

BLOCK = {"cpu": 128, "cuda": 1024}  # query rows at once: a small block wastes less, a large one starts fewer kernels
_SILENT = LayerRecord.idle()


@dataclass(frozen=True, eq=False)
class Part:
    """Heads that are computed in one call, and the key/value heads they read, one for each or one for several."""

    heads: Int[Tensor, " head"]
    groups: Int[Tensor, " kv_head"]

    def to(self, device: torch.device) -> "Part":
        return Part(self.heads.to(device), self.groups.to(device))


@dataclass(frozen=True, eq=False)
class Plan:
    """The heads of a layer in the order in which they are computed.

    Attributes:
        dense: query heads that attend to everything, each with its key/value head.
        shared: local query heads of groups that are local as a whole.
        mixed: local query heads beside a dense one, each with its key/value head.
        whole: key/value heads that a dense head reads.
        packed: dense heads by key/value head in ``whole``, filled up by repeating one: for a single query row, whose
            heads are the rows of one call that copies no key.
        slots: where each dense head stands in ``packed``.
        inverse: where each query head stands in dense, shared, mixed.
    """

    dense: Part
    shared: Part
    mixed: Part
    whole: Int[Tensor, " kv_head"]
    packed: Int[Tensor, "kv_head head"]
    slots: Int[Tensor, " head"]
    inverse: Int[Tensor, " head"]

    @classmethod
    def of(cls, dense: Bool[Tensor, " head"], n_groups: int) -> "Plan":
        group_of = torch.arange(len(dense)) // (len(dense) // n_groups)
        whole = dense.reshape(n_groups, -1).any(1)
        parts = dense, ~dense & ~whole[group_of], ~dense & whole[group_of]
        heads = [part.nonzero().flatten() for part in parts]
        counts = dense.reshape(n_groups, -1).sum(1)[whole]
        place = torch.arange(int(counts.max()) if len(counts) else 0)
        ends = counts.cumsum(0)
        packed = heads[0][torch.minimum(ends[:, None] - counts[:, None] + place, ends[:, None] - 1)]
        return cls(
            Part(heads[0], group_of[heads[0]]),
            Part(heads[1], (~whole).nonzero().flatten()),
            Part(heads[2], group_of[heads[2]]),
            whole.nonzero().flatten(),
            packed,
            (place < counts[:, None]).flatten().nonzero().flatten(),
            torch.argsort(torch.cat(heads)),
        )

    def to(self, device: torch.device) -> "Plan":
        """The same on a device."""
        if self.inverse.device == device:
            return self
        return Plan(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


@dataclass(frozen=True, eq=False)
class Keys:
    """Keys and values in the order of their positions, from ``start`` on, and pinned ones wherever they are."""

    k: Float[Tensor, "batch kv_head key d_head"]
    v: Float[Tensor, "batch kv_head key d_head"]
    start: int
    pins: Int[Tensor, "batch pin"]
    pinned_k: Float[Tensor, "batch kv_head pin d_head"]
    pinned_v: Float[Tensor, "batch kv_head pin d_head"]
    mask_start: int = 0  # the position of the mask's first column

    @classmethod
    def of(cls, k: Tensor, v: Tensor, start: int, near: Near, mask_start: int = 0) -> "Keys":
        """Those of tensors that hold every pinned key that is still seen."""
        pins = near.pins(start + k.shape[2])
        at = (pins - start).clamp(min=0)[:, None, :, None]
        pinned = [x.gather(2, at.expand(*x.shape[:2], -1, x.shape[3])) for x in (k, v)]
        return cls(k, v, start, pins.masked_fill(pins < start, -1), pinned[0], pinned[1], mask_start)

    def window(self, groups: Tensor, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Pinned keys and those from position ``first`` to ``stop``, and their values, for some heads."""
        found = []
        for pinned, x in ((self.pinned_k, self.k), (self.pinned_v, self.v)):
            piece = x[:, :, first - self.start : stop - self.start]
            found.append(torch.cat([pinned[:, groups], piece[:, groups]], dim=2))
        return found[0], found[1]


def start_of(call: AttentionCall) -> int:
    """The position of the first key: a windowed layer's cache has dropped some, a static one has room for more."""
    return max(0, call.query_start + call.q.shape[2] - call.k.shape[2])


def by_definition(
    call: AttentionCall, near: Near, dense: Bool[Tensor, " head"], dropout: float = 0.0
) -> Float[Tensor, "batch pos head d_head"]:
    """Every head over every key, under a mask of its own, ``BLOCK`` rows at a time."""
    keys = start_of(call) + torch.arange(call.k.shape[2], device=call.q.device)
    plain, parts = replace(call, narrow=None), []
    every = torch.arange(call.q.shape[1], device=call.q.device)
    for rows in torch.arange(call.q.shape[2], device=call.q.device).split(BLOCK["cpu"]):
        seen = near.heads(call.query_start + rows, keys, dense)
        mask = call.mask if call.mask is None else call.mask[:, :, rows, : call.k.shape[2]]
        seen = seen & plain.visible(rows)
        if mask is not None and mask.dtype != torch.bool:
            seen = mask.masked_fill(~seen, float("-inf"))
        parts.append(fused(call, call.q[:, :, rows], call.k, call.v, seen, every, dropout=dropout))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def split_heads(
    call: AttentionCall, near: Near, plan: Plan, dropout: float = 0.0
) -> Float[Tensor, "batch pos head d_head"]:
    """Dense heads in one call, local ones block by block; the call holds every key."""
    heads, groups = plan.dense.heads, plan.dense.groups
    parts = []
    if len(heads):
        parts.append(dense_heads(call, call.k[:, groups], call.v[:, groups], heads, dropout))
    keys = Keys.of(call.k, call.v, start_of(call), near, start_of(call))
    parts += [near_heads(call, keys, part, near, dropout) for part in (plan.shared, plan.mixed) if len(part.heads)]
    return merged_heads(parts, plan)


def merged_heads(
    parts: Sequence[Float[Tensor, "batch head pos d_head"]], plan: Plan
) -> Float[Tensor, "batch pos head d_head"]:
    """z of all heads, from its parts in the order of the plan."""
    return torch.cat(list(parts), dim=1).transpose(1, 2).index_select(2, plan.inverse)


def dense_heads(
    call: AttentionCall, k: Tensor, v: Tensor, heads: Int[Tensor, " head"], dropout: float = 0.0
) -> Float[Tensor, "batch head pos d_head"]:
    """Heads that attend to all of these keys, under the layer's own mask."""
    rows, mask = call.q.shape[2], call.mask
    if mask is None and call.causal:  # a static cache has room behind what was read
        k, v = k[:, :, :rows], v[:, :, :rows]
    elif mask is not None:
        mask = _of_heads(mask[..., : k.shape[2]], heads)
    return fused(call, call.q[:, heads], k, v, mask, heads, causal=call.causal, dropout=dropout)


def near_heads(
    call: AttentionCall, keys: Keys, part: Part, near: Near, dropout: float = 0.0
) -> Float[Tensor, "batch head pos d_head"]:
    """Local heads, block by block."""
    window, device = near.policy.window, call.q.device
    q = call.q[:, part.heads]
    block = BLOCK["cuda" if q.is_cuda else "cpu"]
    ahead = 0 if call.mask is None and call.causal else window - 1
    found = []
    for first in range(0, q.shape[2], block):
        stop = min(first + block, q.shape[2])
        rows = torch.arange(first, stop, device=device)
        at = call.query_start + rows
        low = max(keys.start, call.query_start + first - window + 1)
        high = min(keys.start + keys.k.shape[2], call.query_start + stop + ahead)
        k, v = keys.window(part.groups, low, high)
        mask = _block_mask(call, rows, at, torch.arange(low, high, device=device), keys, near)
        found.append(fused(call, q[:, :, first:stop], k, v, _of_heads(mask, part.heads), part.heads, dropout=dropout))
    return torch.cat(found, dim=2)


def _block_mask(call: AttentionCall, rows: Tensor, at: Tensor, cols: Tensor, keys: Keys, near: Near) -> Tensor:
    """What a block of rows sees of the pinned keys and of its window, as one mask over both."""
    window = ((at[:, None] - cols).abs() < near.policy.window)[None, None]
    pins = keys.pins[:, None, None, :]
    # In the window a pinned key is there already.
    pinned = ((at[:, None] - pins).abs() >= near.policy.window) & (pins >= 0)
    if call.mask is None:
        if call.causal:
            window, pinned = window & (cols <= at[:, None]), pinned & (pins <= at[:, None])
        return torch.cat([pinned, window.expand(len(pinned), -1, -1, -1)], dim=-1)
    own = call.mask[:, :, rows].expand(max(len(call.mask), len(pins)), -1, -1, -1)
    of_pins = own.gather(3, (pins - keys.mask_start).clamp(min=0).expand(*own.shape[:3], -1))
    own = torch.cat([of_pins, own[..., cols - keys.mask_start]], dim=-1)
    seen = torch.cat([pinned.expand(len(own), -1, -1, -1), window.expand(len(own), -1, -1, -1)], dim=-1)
    return own & seen if own.dtype == torch.bool else own.masked_fill(~seen, float("-inf"))


def fused(
    call: AttentionCall,
    q: Float[Tensor, "batch head pos d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    v: Float[Tensor, "batch kv_head key d_head"],
    mask: Tensor | None,
    heads: Int[Tensor, " head"],
    *,
    causal: bool = False,
    dropout: float = 0.0,
) -> Float[Tensor, "batch head pos d_head"]:
    """Some heads of a layer over some keys, as the layer computes them: its scale, softcap and sinks."""
    batch, n_heads, rows, _ = q.shape
    if not call.fused:
        sinks = None if call.sinks is None else call.sinks[heads]
        own = replace(call, q=q, k=k, v=v, mask=mask, causal=causal, query_start=0, sinks=sinks, narrow=None)
        return stepwise(own, _SILENT, dropout).transpose(1, 2)
    options: dict[str, Any] = {"scale": call.scale, "dropout_p": dropout}
    if rows == 1 and n_heads != k.shape[1] and (mask is None or mask.shape[1] == 1):
        # The heads of a group become its rows, so that its keys are read once.
        z = nn.functional.scaled_dot_product_attention(
            q.reshape(batch, k.shape[1], -1, q.shape[3]), k, v, attn_mask=mask, **options
        )
        return z.reshape(batch, n_heads, 1, -1)
    if q.is_cuda and mask is not None and n_heads != k.shape[1]:  # no fused GPU kernel takes a mask and groups
        k, v = (x.repeat_interleave(n_heads // x.shape[1], dim=1) for x in (k, v))
    return nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=n_heads != k.shape[1], **options
    )


def _of_heads(mask: Tensor, heads: Int[Tensor, " head"]) -> Tensor:
    return mask if mask.shape[1] == 1 else mask[:, heads]
