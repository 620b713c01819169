"""Attention in which some heads attend to everything and the others nearby: what a layer's heads cost where they are.

    z = split_heads(call, near, plan)        # dense heads in one call, local ones nearby
    z = by_definition(call, near, dense)     # every head over every key, under a mask of its own: the slow twin

Nothing of size S x S is made, and the work of a local head is linear in S. Without padding, its rows beyond the first
window take the fused kernel over overlapping views of the keys, ``BLOCK`` rows to a view and no key copied, and once
more over the sinks; the two are merged by their log-sum-exp (``_windowed``). Everything else (padding, sliding windows,
images that see themselves both ways, a softcap, text that is kept, gradients) goes block by block through that kernel,
under a mask of the block (``_block``).

On a GPU in half precision the flash kernel's own window takes the place of the views (``_windowed_on_gpu``). That
function has not been run: no GPU was at hand.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mech.model.attention import AttentionCall, LayerRecord, stepwise
from mech.sparse.masks import Near

BLOCK = {"cpu": 64, "cuda": 1024}  # query rows at once: a small block wastes less, a large one starts fewer kernels
_SILENT = LayerRecord.idle()


@dataclass(frozen=True, eq=False)
class Plan:
    """The heads of a layer in the order in which they are computed. Worked out once.

    Attributes:
        dense: query heads that attend to everything.
        dense_groups: the key/value head that each of them reads.
        whole: key/value heads that some dense head reads.
        whole_heads: all query heads of these.
        packed: dense heads by key/value head in ``whole``, filled up by repeating one: for a single query row, where
            the heads of a group are rows of one call and no key is copied.
        slots: where each dense head stands in ``packed``.
        local: key/value heads that only local heads read.
        local_heads: all query heads of these.
        inside: where each dense head stands in ``whole_heads``; the others there are local.
        near: key/value heads whose query heads are computed as local in a prompt: all of them unless many are dense
            throughout, for picking copies keys.
        near_heads: all query heads of these.
        inverse: where each query head stands in ``whole_heads`` and ``local_heads``.
        groups: key/value heads in the order ``whole``, ``local``.
        row: query heads in the order ``packed``, ``local_heads``: for a single query row.
        back: where each query head stands first in ``row`` and, behind it, ``whole_heads``.
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

    @classmethod
    def of(cls, dense: Bool[Tensor, " head"], n_groups: int) -> "Plan":
        """The plan of a layer's heads, of which some are dense."""
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
        )

    def to(self, device: torch.device) -> "Plan":
        """The same on a device."""
        if self.inverse.device == device:
            return self
        return Plan(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


@dataclass(frozen=True, eq=False)
class Keys:
    """Keys and values in the order of their positions, from ``start`` on, and pinned ones wherever they are.

    Attributes:
        pins: positions of the pinned keys of every row, -1 where there is none.
        mask_start: the position that the first column of the layer's mask is for.
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
        """Those of tensors that hold every pinned key that is still seen."""
        pins = near.pins(start + k.shape[2])
        at = (pins - start).clamp(min=0)[:, None, :, None]
        pinned_k, pinned_v = (x.gather(2, at.expand(*x.shape[:2], -1, x.shape[3])) for x in (k, v))
        return cls(k, v, start, pins.masked_fill(pins < start, -1), pinned_k, pinned_v, mask_start)


def start_of(call: AttentionCall) -> int:
    """The position of the first key: a windowed layer's cache has dropped some, a static one has room for more."""
    return max(0, call.query_start + call.q.shape[2] - call.k.shape[2])


def by_definition(
    call: AttentionCall, near: Near, dense: Bool[Tensor, " head"], dropout: float = 0.0
) -> Float[Tensor, "batch pos head d_head"]:
    """Every head over every key, under a mask of its own, some rows at a time."""
    keys = start_of(call) + torch.arange(call.k.shape[2], device=call.q.device)
    plain, parts = replace(call, head_mask=None), []
    for rows in torch.arange(call.q.shape[2], device=call.q.device).split(128):
        seen = near.heads(call.query_start + rows, keys, dense) & plain.visible(rows)
        if call.mask is not None and call.mask.dtype != torch.bool:
            seen = call.mask[:, :, rows, : len(keys)].masked_fill(~seen, float("-inf"))
        parts.append(fused(call, call.q[:, :, rows], call.k, call.v, seen, dropout=dropout))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def split_heads(
    call: AttentionCall, near: Near, plan: Plan, dropout: float = 0.0
) -> Float[Tensor, "batch pos head d_head"]:
    """Dense heads in one call, local ones nearby; the call holds every key."""
    batch, n_heads, rows, _ = call.q.shape
    z = call.q.new_empty(batch, rows, n_heads, call.v.shape[3])
    few = len(plan.near_heads) < n_heads
    near_call = take(call, plan.near_heads) if few else call
    k, v = (call.k[:, plan.near], call.v[:, plan.near]) if few else (call.k, call.v)
    out = z[:, :, plan.near_heads] if few else z
    near_heads(near_call, Keys.of(k, v, start_of(call), near, start_of(call)), near, out.transpose(1, 2), dropout)
    if few:
        z = z.index_copy(2, plan.near_heads, out)
    if len(plan.dense):
        k, v = call.k[:, plan.dense_groups], call.v[:, plan.dense_groups]
        z = z.index_copy_(2, plan.dense, dense_heads(take(call, plan.dense), k, v, dropout).transpose(1, 2))
    return z


def take(call: AttentionCall, heads: Int[Tensor, " head"]) -> AttentionCall:
    """The call of some query heads; its keys and values are still those of all."""
    mask = call.mask
    return replace(
        call,
        q=call.q[:, heads],
        mask=mask if mask is None or mask.shape[1] == 1 else mask[:, heads],
        sinks=None if call.sinks is None else call.sinks[heads],
        head_mask=None,
    )


def dense_heads(
    call: AttentionCall, k: Tensor, v: Tensor, dropout: float = 0.0
) -> Float[Tensor, "batch head pos d_head"]:
    """The call's heads over all of these keys, under the layer's own mask."""
    if call.mask is None and call.causal:  # a static cache has room behind what was read
        k, v = k[:, :, : call.q.shape[2]], v[:, :, : call.q.shape[2]]
    mask = None if call.mask is None else call.mask[..., : k.shape[2]]
    return fused(call, call.q, k, v, mask, causal=call.causal, dropout=dropout)


def near_heads(
    call: AttentionCall,
    keys: Keys,
    near: Near,
    out: Float[Tensor, "batch head pos d_head"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "batch head pos d_head"]:
    """The call's heads as local ones over these keys, written into ``out``."""
    rows, policy = call.q.shape[2], near.policy
    out = call.q.new_empty(*call.q.shape[:3], call.v.shape[3]) if out is None else out
    block = BLOCK.get(call.q.device.type, BLOCK["cpu"])
    kernel = call.q.is_cpu or (call.q.is_cuda and call.q.dtype in (torch.float16, torch.bfloat16))
    plain = call.mask is None and call.causal and call.fused and not policy.keep_text and not dropout
    grads = torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v))
    # From `first` on every row sees all sinks and a whole window.
    first = policy.window + policy.sinks
    stop = first + max(0, rows - first) // block * block
    if not (kernel and plain) or grads:
        stop = first = 0
    elif first < stop:
        (_windowed_on_gpu if call.q.is_cuda else _windowed)(call, keys, policy.window, first, stop, out)
    for begin, end in (*_steps(0, min(first, rows), block), *_steps(min(stop, rows), rows, block)):
        _block(call, keys, policy.window, begin, end, out, dropout)
    return out


def _steps(first: int, stop: int, size: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + size, stop)) for begin in range(first, stop, size)]


def _block(call: AttentionCall, keys: Keys, window: int, begin: int, end: int, out: Tensor, dropout: float) -> None:
    """Some rows over pinned keys and a window of the others, under a mask of their own."""
    ahead = 0 if call.mask is None and call.causal else window - 1
    low = max(keys.start, call.query_start + begin - window + 1)
    high = min(keys.start + keys.k.shape[2], call.query_start + end + ahead)
    if call.mask is not None:
        next_one = call.query_start + end
        coming = call.mask[:, :, begin:end, next_one - keys.mask_start : high - keys.mask_start]
        if not (coming if coming.dtype == torch.bool else coming > torch.finfo(coming.dtype).min / 2).any():
            high = min(high, next_one)  # the layer does not attend ahead here
    here = slice(low - keys.start, high - keys.start)
    k = torch.cat([keys.pinned_k, keys.k[:, :, here]], dim=2)
    v = torch.cat([keys.pinned_v, keys.v[:, :, here]], dim=2)
    mask = _block_mask(call, (begin, end), (low, high), keys, window)
    out[:, :, begin:end] = fused(call, call.q[:, :, begin:end], k, v, mask, dropout=dropout)


def _block_mask(
    call: AttentionCall, rows: tuple[int, int], cols: tuple[int, int], keys: Keys, window: int
) -> Bool[Tensor, "batch #head row key"] | Float[Tensor, "batch #head row key"]:
    """What a block of rows sees of the pinned keys and of the window's positions, as one mask over both."""
    at = call.query_start + torch.arange(*rows, device=call.q.device)[:, None]
    places, pins = torch.arange(*cols, device=call.q.device), keys.pins[:, None, None, :]
    inside = ((at - places).abs() < window)[None, None]
    # In the window a pinned key is there already.
    pinned = ((at - pins).abs() >= window) & (pins >= 0)
    if call.mask is None:
        if call.causal:
            inside, pinned = inside & (places <= at), pinned & (pins <= at)
        return torch.cat([pinned, inside.expand(len(pinned), -1, -1, -1)], dim=-1)
    own = call.mask[:, :, slice(*rows)].expand(max(len(call.mask), len(pins)), -1, -1, -1)
    of_pins = own.gather(3, (pins - keys.mask_start).clamp(min=0).expand(*own.shape[:3], -1))
    own = torch.cat([of_pins, own[..., cols[0] - keys.mask_start : cols[1] - keys.mask_start]], dim=-1)
    seen = torch.cat([pinned.expand(len(own), -1, -1, -1), inside.expand(len(own), -1, -1, -1)], dim=-1)
    return own & seen if own.dtype == torch.bool else own.masked_fill(~seen, float("-inf"))


def _windowed(call: AttentionCall, keys: Keys, window: int, first: int, stop: int, out: Tensor) -> None:
    """Rows that see every pinned key and a whole window: without padding, causal."""
    block = BLOCK["cpu"]
    row, col = torch.arange(block)[:, None], torch.arange(window + block - 1)
    mask = call.q.new_zeros(block, len(col)).masked_fill((col < row) | (col >= row + window), float("-inf"))
    for one in range(len(out)):
        for begin, end in _steps(first, stop, 4 * block):  # what is made on the way stays in the processor's cache
            # Row i of a block sees its keys i to i + window - 1; blocks are a batch, their keys overlapping views.
            blocks = call.q[one, :, begin:end].unflatten(1, (-1, block)).transpose(0, 1)
            k, v = (
                x[one, :, begin - window + 1 : end].unfold(1, len(col), block).permute(1, 0, 3, 2)
                for x in (keys.k, keys.v)
            )
            found = _flash(blocks, k, v, call.scale, mask=mask.expand(*blocks.shape[:2], -1, -1))
            z, share = (x.transpose(0, 1).flatten(1, 2)[None] for x in found)
            if keys.pins.shape[1]:
                only = slice(one, one + 1)
                z = merged(
                    z, share, *_flash(call.q[only, :, begin:end], keys.pinned_k[only], keys.pinned_v[only], call.scale)
                )
            out[one, :, begin:end] = z[0]


def _windowed_on_gpu(call: AttentionCall, keys: Keys, window: int, first: int, stop: int, out: Tensor) -> None:
    """The same by the flash kernel's own window. It has not been run."""
    q = call.q[:, :, first:stop]
    k, v = (x[:, :, first - window + 1 : stop] for x in (keys.k, keys.v))
    z, share = _flash(q, k, v, call.scale, window=window)
    if keys.pins.shape[1]:
        z = merged(z, share, *_flash(q, keys.pinned_k, keys.pinned_v, call.scale))
    out[:, :, first:stop] = z


def merged(z: Tensor, share: Tensor, other: Tensor, theirs: Tensor) -> Float[Tensor, "batch head row d_head"]:
    """z over two disjoint sets of keys, from z and log-sum-exp over each."""
    return torch.lerp(z, other, torch.sigmoid(theirs - share)[..., None].to(z.dtype))


def _flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, mask: Tensor | None = None, window: int = 0
) -> tuple[Tensor, Tensor]:
    """z and log-sum-exp: torch's kernels, by the names that return the latter. ``mask`` on CPU, ``window`` on GPU."""
    if not q.is_cuda:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    sides = {"window_size_left": window - 1, "window_size_right": 0} if window else {}
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    z, share, *_ = torch.ops.aten._flash_attention_forward(
        *rows, None, None, q.shape[2], k.shape[2], 0.0, bool(window), False, scale=scale, **sides
    )
    return z.transpose(1, 2), share


def fused(
    call: AttentionCall,
    q: Float[Tensor, "batch head pos d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    v: Float[Tensor, "batch kv_head key d_head"],
    mask: Tensor | None,
    *,
    causal: bool = False,
    dropout: float = 0.0,
) -> Float[Tensor, "batch head pos d_head"]:
    """The call's heads over some keys, as the layer computes them: its scale, softcap and sinks."""
    batch, n_heads, rows, _ = q.shape
    if not call.fused:
        own = replace(call, q=q, k=k, v=v, mask=mask, causal=causal, query_start=0, head_mask=None)
        return stepwise(own, _SILENT, dropout).transpose(1, 2)
    options: dict[str, Any] = {"scale": call.scale, "dropout_p": dropout}
    if rows == 1 and n_heads != k.shape[1] and (mask is None or mask.shape[1] == 1):
        # The heads of a group become its rows, so that its keys are read once.
        q = q.reshape(batch, k.shape[1], -1, q.shape[3])
        z = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
        return z.reshape(batch, n_heads, 1, -1)
    if q.is_cuda and mask is not None and n_heads != k.shape[1]:  # no fused GPU kernel takes a mask and groups
        k, v = (x.repeat_interleave(n_heads // x.shape[1], dim=1) for x in (k, v))
    return nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=n_heads != k.shape[1], **options
    )


def _places(chosen: Bool[Tensor, " n"]) -> Int[Tensor, " m"]:
    return chosen.nonzero().flatten()
