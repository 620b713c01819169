"""Attention in which some heads attend to everything and the others to nearby keys only.

    z = split_heads(call, near, plan)        # dense heads in one call, local ones over nearby keys
    z = by_definition(call, near, dense)     # every head over every key, each under its own mask: the slow reference

No S x S tensor is made, and the work of a local head is linear in S. On a CPU without padding, its rows beyond the
first window run through the fused kernel over overlapping views of the keys, ``BLOCK`` rows per view and no key copied,
and once more over the sinks; the two are merged by their log-sum-exp (``_by_views``). On a GPU the flash kernel's own
window does that (``mech.sparse.card.flash``), and flex attention does what flash cannot. Everything else (padding,
sliding windows, bidirectional attention within an image, a softcap, kept text, gradients) goes block by block through
the fused kernel, with a mask per block. ``NEAR`` holds these ways in order.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mech.model.attention import AttentionCall, LayerRecord, stepwise
from mech.model.partial.shared_keys import merged
from mech.sparse.card import flash, flex
from mech.sparse.card.choice import Way, anything, first_of, nothing
from mech.sparse.masks import Near
from mech.sparse.plan import Keys, Plan, start_of, take

BLOCK = {"cpu": 64, "cuda": 1024}  # query rows at once: a small block wastes less, a large one launches fewer kernels
_SILENT = LayerRecord.idle()


def by_definition(
    call: AttentionCall, near: Near, dense: Bool[Tensor, " head"], dropout: float = 0.0
) -> Float[Tensor, "batch pos head d_head"]:
    """Every head over every key, each under its own mask, some rows at a time."""
    near, dense = near.to(call.q.device), dense.to(call.q.device)
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
    """Dense heads in one call, local ones over nearby keys; the call holds every key."""
    near, plan = near.to(call.q.device), plan.to(call.q.device)
    if flash.on_card(call.q):
        return _split_by_runs(call, near, plan, dropout)
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


def _split_by_runs(
    call: AttentionCall, near: Near, plan: Plan, dropout: float
) -> Float[Tensor, "batch pos head d_head"]:
    """The same without a copy of keys or values: adjacent heads are computed together."""
    z = call.q.new_empty(len(call.q), call.q.shape[2], call.q.shape[1], call.v.shape[3])
    out, keys = z.transpose(1, 2), Keys.of(call.k, call.v, start_of(call), near, start_of(call))
    for run in plan.near_runs:
        near_heads(take(call, run.heads), keys.of_groups(run.groups), near, out[:, run.heads], dropout)
    for run in plan.dense_runs:
        k, v = call.k[:, run.groups], call.v[:, run.groups]
        out[:, run.heads] = dense_heads(take(call, run.heads), k, v, dropout)
    return z


def dense_heads(
    call: AttentionCall, k: Tensor, v: Tensor, dropout: float = 0.0
) -> Float[Tensor, "batch head pos d_head"]:
    """The call's heads over all of these keys, under the layer's own mask."""
    if call.mask is None and call.causal:  # a static cache has room beyond what was read
        k, v = k[:, :, : call.q.shape[2]], v[:, :, : call.q.shape[2]]
    elif flash.takes_causal(call, k, dropout):  # a later chunk of a prompt
        return flash.forward(call.q, k, v, call.scale, causal=True)[0]
    mask = None if call.mask is None else call.mask[..., : k.shape[2]]
    return fused(call, call.q, k, v, mask, causal=call.causal, dropout=dropout)


def near_heads(
    call: AttentionCall,
    keys: Keys,
    near: Near,
    out: Float[Tensor, "batch head pos d_head"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "batch head pos d_head"]:
    """The call's heads, computed as local ones over these keys and written into ``out``."""
    out = call.q.new_empty(*call.q.shape[:3], call.v.shape[3]) if out is None else out
    return first_of(NEAR, call, keys, near, out, dropout)


def _takes_views(call: AttentionCall, keys: Keys, near: Near, out: Tensor, dropout: float) -> bool:
    """Causal, unpadded, no softcap, no gradient, and enough rows that some see all sinks and a whole window."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v)):
        return False
    plain = call.mask is None and call.causal and call.fused and not near.policy.keep_text and not dropout
    return plain and call.q.is_cpu and call.q.shape[2] >= near.policy.window + near.policy.sinks + BLOCK["cpu"]


def _by_views(call: AttentionCall, keys: Keys, near: Near, out: Tensor, dropout: float) -> Tensor:
    """Rows that see all sinks and a whole window: over views of the keys; earlier and leftover rows: by blocks."""
    rows, block, window = call.q.shape[2], BLOCK["cpu"], near.policy.window
    first = window + near.policy.sinks
    stop = first + (rows - first) // block * block
    _windowed(call, keys, window, first, stop, out)
    for begin, end in (*_steps(0, first, block), *_steps(stop, rows, block)):
        _block(call, keys, window, begin, end, out, dropout)
    return out


def _by_blocks(call: AttentionCall, keys: Keys, near: Near, out: Tensor, dropout: float) -> Tensor:
    for begin, end in _steps(0, call.q.shape[2], BLOCK.get(call.q.device.type, BLOCK["cpu"])):
        _block(call, keys, near.policy.window, begin, end, out, dropout)
    return out


NEAR = (
    Way("flash attention with a window", flash.takes, flash.missing, flash.local),
    Way("compiled flex attention", flex.takes, nothing, flex.local),
    Way("views of the keys", _takes_views, nothing, _by_views),
    Way("blocks under a mask", anything, nothing, _by_blocks),
)


def _steps(first: int, stop: int, size: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + size, stop)) for begin in range(first, stop, size)]


def _block(call: AttentionCall, keys: Keys, window: int, begin: int, end: int, out: Tensor, dropout: float) -> None:
    """Some rows over pinned keys and a window of the others, under their own mask."""
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
    # A pinned key within the window is there already.
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
    """Rows that see every pinned key and a whole window: causal, without padding."""
    block = BLOCK["cpu"]
    row, col = torch.arange(block)[:, None], torch.arange(window + block - 1)
    mask = call.q.new_zeros(block, len(col)).masked_fill((col < row) | (col >= row + window), float("-inf"))
    for one in range(len(out)):
        for begin, end in _steps(first, stop, 4 * block):  # intermediate results stay in the processor's cache
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


def _flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, mask: Tensor | None = None
) -> tuple[Float[Tensor, "batch head pos d_head"], Float[Tensor, "batch head pos"]]:
    """z and log-sum-exp on a CPU: torch's kernel, called by the name that returns both."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)


def of_heads(call: AttentionCall, heads: Int[Tensor, " head"]) -> AttentionCall:
    """The call with the sinks of some query heads; its queries are picked elsewhere."""
    return call if call.sinks is None else replace(call, sinks=call.sinks[heads])


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
    if rows == 1 and mask is None and not dropout and flash.takes_row(q, k, v):
        return flash.forward(q, k, v, call.scale)[0]
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
