"""Attention of many variants to keys that all of them share, and to each variant's own keys after these.

    z = over_shared(q, k, v, own, scale)     # two fused calls, merged by their log-sum-exp: under causality alone
    z = written_out(q, k, v, own, seen, scale)   # one softmax over both: under any mask, a step of variants at a time

In both, the variants are rows of one call over the shared keys, which are never repeated. From queries, keys and values
they compute z; this file does not know layers or models.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech.model.attention import softmax

# Attention scores held at once when written out: as many as stay in a processor's caches, or a gigabyte.
SCORES = {"cpu": 2**21, "cuda": 2**28}
_HALF = (torch.float16, torch.bfloat16)
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention  # reads a group's keys in place
Own = tuple[Float[Tensor, "variant kv_head own_pos d_head"], Float[Tensor, "variant kv_head own_pos d_head"]]


def over_shared(
    q: Float[Tensor, "variant head row d_head"],
    k: Float[Tensor, "kv_head key_pos d_head"],
    v: Float[Tensor, "kv_head key_pos d_head"],
    own: Own,
    scale: float,
    rows: Int[Tensor, " row"] | None = None,
) -> Float[Tensor, "variant row head d_head"] | None:
    """z of variants that all see every shared key and, of their own keys, those up to their row.

    Args:
        q: queries.
        k: the shared keys, without gaps before the own ones; there may be none.
        v: their values.
        own: keys and values of each variant.
        scale: what q times k is multiplied by.
        rows: the own positions of the queries; by default all of them.

    Returns:
        z, or None if there is no kernel for such tensors (``written_out`` computes them).

    Cost: two kernels, however many variants there are. They are called by name: on a GPU of capability 9 or 10, SDPA
    would choose cuDNN, which makes a new plan for every number of variants, and in a sweep this number grows from layer
    to layer.
    """
    if (kernel := _kernel(q, v)) is None:
        return None
    variants, heads, length, width = q.shape
    kv_heads = len(k)
    own_k, own_v = own if kernel is _FLASH else (x.repeat_interleave(heads // kv_heads, 1) for x in own)
    if rows is None:
        other, theirs, *_ = kernel(q, own_k, own_v, is_causal=length > 1, scale=scale)
    else:
        own_k, own_v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (own_k, own_v))
        other, theirs = _at_rows(q, own_k, own_v, scale, rows)
    if not k.shape[1]:
        return other.transpose(1, 2)
    # Query heads that share a key head, and variants, are rows of it.
    grouped = q.reshape(variants, kv_heads, -1, width).transpose(0, 1).reshape(1, kv_heads, -1, width)
    z, share, *_ = kernel(grouped, k[None], v[None], is_causal=False, scale=scale)
    z = z[0].unflatten(1, (variants, -1)).transpose(0, 1).reshape(variants, heads, length, width)
    share = share[0].unflatten(1, (variants, -1)).transpose(0, 1).reshape(variants, heads, length)
    return merged(z, share, other, theirs).transpose(1, 2)


def merged(
    z: Float[Tensor, "*head row d_head"],
    share: Float[Tensor, "*head row"],
    other: Float[Tensor, "*head row d_head"],
    theirs: Float[Tensor, "*head row"],
) -> Float[Tensor, "*head row d_head"]:
    """z over two disjoint sets of keys, from z and log-sum-exp over each; ``z`` may be overwritten.

    In half precision the weights stay in single precision: where sinks take 99% of a softmax, a rounded 0.99 would make
    the other keys' share wrong by a fifth.
    """
    if z.dtype in _HALF:
        return z.mul_(torch.sigmoid(share - theirs)[..., None]).addcmul_(
            other, torch.sigmoid(theirs - share)[..., None]
        )
    return torch.lerp(z, other, torch.sigmoid(theirs - share)[..., None].to(z.dtype))


def _kernel(q: Tensor, v: Tensor) -> Callable[..., Any] | None:
    """torch's fused kernel for such tensors, in the form that also returns the log-sum-exp; None if there is none."""
    width = q.shape[-1]
    if width != v.shape[-1]:
        return None
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if not q.is_cuda or width % 8 or q.dtype == torch.float64:
        return None
    modern = _capability(q.device) >= (8, 0)
    if modern and q.dtype in _HALF and width <= 256:
        return _FLASH
    return _efficient if modern or q.dtype != torch.bfloat16 else None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _efficient(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    z, share, *_ = kernel(q, k, v, None, True, is_causal=is_causal, scale=scale)
    return z, share[..., : q.shape[2]]  # it is padded


def _at_rows(q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Tensor) -> tuple[Tensor, Tensor]:
    """z and log-sum-exp written out, for few queries."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) * scale @ k.to(wide).transpose(-1, -2)
    ahead = torch.arange(k.shape[2], device=q.device) > rows.to(q.device, non_blocking=True)[:, None]
    scores = scores.masked_fill_(ahead, float("-inf"))
    share = scores.logsumexp(-1)
    return (scores - share[..., None]).exp().to(v.dtype) @ v, share


def written_out(
    q: Float[Tensor, "variant head row d_head"],
    k: Float[Tensor, "kv_head key_pos d_head"],
    v: Float[Tensor, "kv_head key_pos d_head"],
    own: Own | None,
    seen: Bool[Tensor, "row all_pos"],
    scale: float,
) -> Float[Tensor, "variant row head d_head"]:
    """z under any mask, over the shared keys and, after them, each variant's own.

    The variants are folded into the rows of one product per key head, so that shared keys are read once. Memory is
    bounded by ``SCORES``, or by one variant.
    """
    variants, heads, rows, width = q.shape
    kv_heads, shared = k.shape[:2]
    keys, grouped_rows = seen.shape[-1], heads // kv_heads * rows  # query heads that share a key head are its rows
    wide = torch.promote_types(q.dtype, torch.float32)
    hidden = ~seen
    # Masking what all may see, and handling rows that see nothing, would each be another pass over the scores.
    masked, normalised = bool(hidden[:, :shared].any()), softmax if bool(hidden.all(-1).any()) else _plain_softmax
    parts = []
    step = max(1, SCORES.get(q.device.type, SCORES["cuda"]) // (heads * rows * keys))
    for start in range(0, variants, step):
        part = q[start : start + step].to(wide) * scale
        n = len(part)
        grouped = part.reshape(n, kv_heads, grouped_rows, width)
        folded = grouped.transpose(0, 1).reshape(kv_heads, n * grouped_rows, width)
        scores = (folded @ k.to(wide).transpose(-1, -2)).unflatten(1, (n, grouped_rows)).transpose(0, 1)
        if own is not None:
            mine = own[0][start : start + step].to(wide)
            ahead = (grouped @ mine.transpose(-1, -2)).reshape(n, heads, rows, -1)
            ahead = ahead.masked_fill_(hidden[:, shared:], float("-inf")).reshape(n, kv_heads, grouped_rows, -1)
            scores = torch.cat((scores, ahead), -1)
        scores = scores.reshape(n, heads, rows, keys)
        pattern = normalised(scores.masked_fill(hidden, float("-inf")) if masked else scores)
        pattern = pattern.to(v.dtype).reshape(n, kv_heads, grouped_rows, keys)
        folded = pattern[..., :shared].transpose(0, 1).reshape(kv_heads, n * grouped_rows, shared)
        z = (folded @ v).unflatten(1, (n, grouped_rows)).transpose(0, 1)
        if own is not None:
            z = z + pattern[..., shared:] @ own[1][start : start + step]
        parts.append(z.reshape(n, heads, rows, width).transpose(1, 2))
    return torch.cat(parts)


def _plain_softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores, -1)
