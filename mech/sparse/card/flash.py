"""Torch's flash kernels by the names that return the log-sum-exp: a window, lengths on the device, no copy, no mask.

    z, share = forward(q, k, v, scale, window=256)         # the last row of q is at the last key
    z = merged(z, share, *forward(q, sinks_k, sinks_v, scale))
    z = row(q, k, v, used, rows, begins, scale)            # one query row over the first ``used`` keys of each store

``local`` computes local heads. With s sinks and a window W the rows before s + W see everything before them, so a
causal call computes them; every later row sees its window and, disjoint from it, the sinks: two calls, merged.

The kernels align rows with the end of the keys: with fewer rows than keys, the last row is at the last key.
"""

from weakref import ref

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech.model.attention import AttentionCall
from mech.model.partial.shared_keys import merged
from mech.sparse.masks import Near
from mech.sparse.plan import Keys

_kernel = torch.ops.aten._flash_attention_forward
_HALF = (torch.float16, torch.bfloat16)


def on_card(x: Tensor) -> bool:
    """Whether a tensor is on a GPU, where these kernels run."""
    return x.is_cuda


def missing(call: AttentionCall, *rest: object) -> str:
    """What this machine, or this call, lacks for the kernels; "" for nothing."""
    return lacking(call.q)


def lacking(q: Tensor) -> str:
    """The same for queries."""
    if q.dtype not in _HALF:
        return f"{str(q.dtype).removeprefix('torch.')}, and flash kernels take bfloat16 or float16"
    capability = torch.cuda.get_device_capability(q.device)
    if q.dtype == torch.bfloat16 and capability < (8, 0):
        return f"a card of capability {capability[0]}.{capability[1]} without bfloat16; load the model in float16"
    if capability < (8, 0):
        return f"a card of capability {capability[0]}.{capability[1]}, and flash kernels need 8.0"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no flash attention"
    return ""


def fits(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels are built for heads of this size."""
    return q.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def takes(call: AttentionCall, keys: Keys, near: Near, out: Tensor, dropout: float) -> bool:
    """Whether ``local`` computes this: causal, unpadded, no softcap, no gradient."""
    if not on_card(call.q) or not fits(call.q, call.v) or dropout or not call.fused or near.policy.keep_text:
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v)):
        return False
    reached = keys.start == 0 or call.query_start >= near.policy.window + keys.pins.shape[1]
    return reached and causal(call)


def takes_causal(call: AttentionCall, k: Tensor, dropout: float) -> bool:
    """Whether ``forward`` computes heads that see everything before them, under a mask that is plainly causal."""
    if call.mask is None or not on_card(call.q) or not fits(call.q, call.v) or dropout or not call.fused:
        return False
    grads = torch.is_grad_enabled() and (call.q.requires_grad or k.requires_grad)
    return not grads and k.shape[2] == call.query_start + call.q.shape[2] and causal(call) and not lacking(call.q)


def takes_row(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether ``forward`` computes one query row over all of these keys.

    On GPUs of capability 9 and 10 SDPA would choose cuDNN, which plans anew for every number of keys, and in a growing
    cache each token has a new one.
    """
    if not on_card(q) or not fits(q, v) or lacking(q):
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))


def local(call: AttentionCall, keys: Keys, near: Near, out: Float[Tensor, "batch head pos d_head"], _: float) -> Tensor:
    """The call's heads, computed as local ones over these keys and written into ``out``."""
    rows, window, start = call.q.shape[2], near.policy.window, call.query_start
    first = min(rows, max(0, window + keys.pins.shape[1] - start))
    stop = start + rows - keys.start
    k, v = keys.k[:, :, :stop], keys.v[:, :, :stop]
    if first:
        seen = start + first
        out[:, :, :first], _share = forward(call.q[:, :, :first], k[:, :, :seen], v[:, :, :seen], call.scale, True)
    if first < rows:
        q, low = call.q[:, :, first:], start + first - window + 1 - keys.start
        z, share = forward(q, k[:, :, low:], v[:, :, low:], call.scale, window=window)
        if keys.pins.shape[1]:
            z = merged(z, share, *forward(q, keys.pinned_k, keys.pinned_v, call.scale))
        out[:, :, first:] = z
    return out


def forward(
    q: Float[Tensor, "batch head pos d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    v: Float[Tensor, "batch kv_head key d_head"],
    scale: float,
    causal: bool = False,
    window: int = 0,
) -> tuple[Float[Tensor, "batch head pos d_head"], Float[Tensor, "batch head pos"]]:
    """z and log-sum-exp; ``window`` counts the row itself. Query heads that share keys read them in place."""
    sides = {"window_size_left": window - 1, "window_size_right": 0} if window else {}
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    z, share, *_ = _kernel(*rows, None, None, q.shape[2], k.shape[2], 0.0, causal, False, scale=scale, **sides)
    return z.transpose(1, 2), share


def row(
    q: Float[Tensor, "batch head 1 d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    v: Float[Tensor, "batch kv_head key d_head"],
    used: Int[Tensor, " batch"],
    rows: Int[Tensor, " batch_and_1"],
    begins: Int[Tensor, " batch_and_1"],
    scale: float,
) -> Float[Tensor, "batch head 1 d_head"]:
    """z of one query row over the first ``used`` keys of each row, in the memory layout of ``FixedStore``.

    Args:
        q: queries.
        k: keys.
        v: values.
        used: how many of them each row sees.
        rows: 0, 1, 2, ...
        begins: where the keys of each row begin among those of all rows, and where the last end.
        scale: what q times k is multiplied by.
    """
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (k, v)]
    z, *_ = _kernel(
        q[:, :, 0], *flat, rows, begins, 1, k.shape[2], 0.0, False, False, scale=scale, seqused_k=used
    )  # fmt: skip
    return z[:, :, None]


_last: tuple[ref, int, bool] | None = None  # the mask that was read last: the layers of a forward share one


def causal(call: AttentionCall) -> bool:
    """Whether the layer's own mask is plainly causal; the layers of a forward share a mask, which is read once."""
    global _last
    if call.mask is None:
        return call.causal
    if _last is None or _last[0]() is not call.mask or _last[1] != call.query_start:
        _last = ref(call.mask), call.query_start, _plain(call.mask, call.query_start, call.q.shape[2])
    return _last[2]


def _plain(mask: Bool[Tensor, "batch 1 row key"], start: int, rows: int) -> bool:
    if mask.dtype != torch.bool or mask.shape[1] != 1 or mask.shape[-1] < start + rows:
        return False
    keys = torch.arange(start + rows, device=mask.device)
    for begin in range(0, rows, 1024):  # never a second mask of the size of the first
        at = torch.arange(begin, min(begin + 1024, rows), device=mask.device)
        if not bool((mask[:, :, begin : begin + 1024, : len(keys)] == (keys <= start + at[:, None])).all()):
            return False
    return True
