"""Local attention of every kind as one compiled flex attention: padding, softcaps, images that attend ahead, kept text.

    out = local(call, keys, near, out, dropout)

The mask and the softcap are functions of this module that read ``_data``, so there is one function to compile, and it
stays compiled when lengths, padding or policies change; a closure per call would be compiled anew each time. Which
blocks of keys a block of rows can see at all is computed from positions: a window of blocks, and those that hold pinned
keys. No S x S tensor is made besides the layer's own mask, where it has one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech.model.attention import AttentionCall
from mech.sparse.card.flash import on_card
from mech.sparse.masks import Near
from mech.sparse.plan import Keys

SIZE = 128  # rows and keys of a block


@dataclass
class Data:
    """What the mask and the scores of one call depend on, all of it on the device.

    Attributes:
        at: position of every key, -1 for none.
        aside: which keys are pinned ones held apart from the window's: they count only outside it.
        pinned: which of the others are pinned.
        own: the layer's own mask, one column for every key, or one element for none.
        masked: whether ``own`` is a mask.
        start: position of the first row.
        window: the policy's window.
        ahead: whether rows may see later keys.
        softcap: bound of the scores; infinity for none.
    """

    at: Int[Tensor, "batch key"]
    aside: Bool[Tensor, " key"]
    pinned: Bool[Tensor, "batch key"]
    own: Bool[Tensor, "batch #row #key"]
    masked: Bool[Tensor, ""]
    start: Int[Tensor, ""]
    window: Int[Tensor, ""]
    ahead: Bool[Tensor, ""]
    softcap: Float[Tensor, ""]


_data: Data


def _sees(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    """Whether a row sees a key: ``mask_mod``."""
    row, at = _data.start + q, _data.at[b, kv]
    far = (row - at).abs() >= _data.window
    seen = torch.where(_data.aside[kv], far, ~far | _data.pinned[b, kv])
    own = _data.own[b, torch.where(_data.masked, q, 0), torch.where(_data.masked, kv, 0)]
    return seen & (at >= 0) & own & (_data.ahead | (at <= row))


def _bounded(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    """A score under the softcap: ``score_mod`` of layers that have one."""
    return _data.softcap * torch.tanh(score / _data.softcap)


@cache
def compiled() -> Callable[..., Any]:
    """Torch's flex attention, compiled at its first call; its import loads the compiler, so it waits until then."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def takes(call: AttentionCall, keys: Keys, near: Near, out: Tensor, dropout: float) -> bool:
    """Whether ``local`` computes this: on a GPU, no dropout, no bias in the mask, and one mask for all heads."""
    plain = call.mask is None or (call.mask.dtype == torch.bool and call.mask.shape[1] == 1)
    power = call.q.shape[-1] & (call.q.shape[-1] - 1) == 0
    return on_card(call.q) and plain and power and call.q.shape[-1] >= 16 and not dropout


def local(call: AttentionCall, keys: Keys, near: Near, out: Float[Tensor, "batch head pos d_head"], _: float) -> Tensor:
    """The call's heads, computed as local ones over these keys and written into ``out``."""
    from torch.nn.attention.flex_attention import AuxRequest

    global _data
    given, k, v = _of(call, keys, near)
    _data = given
    blocks = blocks_of(given, call.q.shape[2], near.policy.window)
    score = None if call.softcap is None else _bounded
    aux = None if call.sinks is None else AuxRequest(lse=True)
    z = compiled()(
        call.q, k, v, score_mod=score, block_mask=blocks, scale=call.scale, enable_gqa=call.q.shape[1] != k.shape[1],
        return_aux=aux,
    )  # fmt: skip
    if call.sinks is not None:  # the layer's own sink takes its share of the softmax, but has no value
        z, aux = z
        z = z * torch.sigmoid(aux.lse - call.sinks.to(aux.lse)[:, None])[..., None].to(z)
    return out.copy_(z)


def _of(call: AttentionCall, keys: Keys, near: Near) -> tuple[Data, Tensor, Tensor]:
    """A call's ``Data``, keys and values; where the first key is held, pinned keys lie among the others."""
    device, whole = call.q.device, keys.start == 0
    places = torch.arange(keys.start, keys.start + keys.k.shape[2], device=device).expand(len(call.q), -1)
    at, k, v = places, keys.k, keys.v
    pinned, aside = torch.zeros_like(at, dtype=torch.bool), torch.zeros(at.shape[1], dtype=torch.bool, device=device)
    if whole:
        pinned = near.pinned(places[0])
    elif keys.pins.shape[1]:
        at = torch.cat([keys.pins, places], dim=1)
        k, v = torch.cat([keys.pinned_k, k], dim=2), torch.cat([keys.pinned_v, v], dim=2)
        aside = torch.arange(at.shape[1], device=device) < keys.pins.shape[1]
        pinned = torch.zeros_like(at, dtype=torch.bool)
    own = torch.ones(len(call.q), 1, 1, dtype=torch.bool, device=device)
    if call.mask is not None:
        own = call.mask[:, 0].expand(len(call.q), -1, -1)
        columns = (at - keys.mask_start).clamp(0, own.shape[-1] - 1)
        if not whole or keys.mask_start or own.shape[-1] != at.shape[1]:
            own = own.gather(2, columns[:, None].expand(-1, own.shape[1], -1))
    given = Data(  # filled on the device: the host would wait for a copy
        at, aside, pinned, own,
        masked=torch.full((), call.mask is not None, device=device),
        start=torch.full((), call.query_start, device=device),
        window=torch.full((), near.policy.window, device=device),
        ahead=torch.full((), call.mask is not None or not call.causal, device=device),
        softcap=torch.full((), call.softcap or float("inf"), device=device),
    )  # fmt: skip
    return given, k, v


def blocks_of(given: Data, rows: int, window: int) -> Any:
    """A ``BlockMask``: which blocks of keys a block of rows can see, those near it and those that hold pinned keys.

    Args:
        given: the call's data.
        rows: its query rows.
        window: the policy's window.
    """
    from torch.nn.attention.flex_attention import BlockMask

    keys = given.at.shape[1]
    n_rows, n_keys = -(-rows // SIZE), -(-keys // SIZE)
    pad = n_keys * SIZE - keys
    at = torch.nn.functional.pad(given.at, (0, pad), value=-1).unflatten(1, (n_keys, SIZE))
    kept = torch.nn.functional.pad(given.pinned | given.aside, (0, pad)).unflatten(1, (n_keys, SIZE)).any(-1)
    begin = given.start + torch.arange(n_rows, device=at.device)[:, None] * SIZE
    low, high = at.masked_fill(at < 0, 1 << 40).amin(-1)[:, None], at.amax(-1)[:, None]
    near = (high > begin - window) & (low < begin + SIZE + window)
    seen = (near | kept[:, None]) & (given.ahead | (low < begin + SIZE)) & (high >= 0)
    counts = seen.sum(-1, dtype=torch.int32)[:, None]
    order = torch.argsort(seen.to(torch.uint8), dim=-1, descending=True, stable=True).to(torch.int32)[:, None]
    return BlockMask.from_kv_blocks(counts, order, BLOCK_SIZE=SIZE, mask_mod=_sees, seq_lengths=(rows, keys))
