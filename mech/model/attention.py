"""The one attention function that every attention layer calls.

It is registered once in transformers' ``AttentionInterface`` (and its masks in ``AttentionMaskInterface``: without
that, padding would silently be ignored) under the name ``mech``. A wrapped model is switched to that name, so every
layer of both stacks calls ``attention`` with queries and keys after RoPE.

A call takes one of three paths:

* no hook or observer: transformers' own SDPA function is called with the arguments unchanged, bit for bit;
* an observer (``HookedMLLM.attending``): SDPA runs, then the observer receives an ``AttentionCall`` from which it can
  compute the exact attention of a few query rows without any query x key tensor, and may replace ``z``;
* the layer's scores or pattern are hooked: attention is computed step by step, for that layer only.

A layer whose heads may attend to less than its mask allows (``HeadMask``) computes z in its own way instead of calling
SDPA; observers and hooks then see a separate mask for every head.

Where SDPA cannot compute a layer (a softcap, sinks), the first two paths use ``_eager`` instead.

Continuous batching (``generate_batch``) keeps keys and values in pages that this function does not read, and would run
without hooks or masks. It is refused, under the name transformers looks up (``paged|mech``) and by its arguments.

A weak mapping from each attention module to its ``LayerRecord`` says which wrapped model the layer belongs to. The
record is active only while that model's own forward runs. This file knows neither module paths (``families.py``) nor
the points outside attention (``hook_sites.py``).
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any, NoReturn, Protocol
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from mech.errors import InputError, UnsupportedModel
from mech.model.hook_sites import INSIDE_ATTENTION, Step
from mech.model.points import checked, fire, hooked

IMPLEMENTATION = "mech"
PAGED = f"paged|{IMPLEMENTATION}"


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What one attention layer saw and produced. Positions count the query rows of this call, from 0.

    Attributes:
        stack: "text" or "vision".
        layer: the layer's index in its stack.
        q: queries after RoPE.
        k: keys after RoPE, cached ones included.
        v: values, cached ones included.
        z: each head's output before W_O.
        mask: the layer's own mask (True = visible, or an additive bias), None if it is fully described by ``causal``.
        scale: what q times k is multiplied by.
        causal: whether a missing mask means causal attention.
        query_start: the absolute position of the first query row; nonzero while generating with a cache.
        cross: whether the keys are a memory outside the sequence (the tiles of an image), not its positions.
        softcap: bound c of the scores, ``c tanh(scores / c)`` before the mask (Gemma2); None for none.
        sinks: logits of each head's attention sink, which takes a share of the softmax but has no value; None for none.
        head_mask: which of the keys allowed by the mask each head sees; None for all.
        carried: for a ``KeySums``, the attention-weighted sums of its columns, ``[batch pos head column]``.
    """

    stack: str
    layer: int
    q: Float[Tensor, "batch head pos d_head"]
    k: Float[Tensor, "batch kv_head key_pos d_head"]
    v: Float[Tensor, "batch kv_head key_pos d_head"]
    z: Float[Tensor, "batch pos head d_head"]
    mask: Tensor | None
    scale: float
    causal: bool
    query_start: int
    cross: bool = False
    softcap: float | None = None
    sinks: Float[Tensor, " head"] | None = None
    head_mask: "HeadMask | None" = None
    carried: Float[Tensor, "batch pos head column"] | None = None

    @property
    def fused(self) -> bool:
        """Whether transformers' SDPA computes this: it refuses a softcap and silently ignores sinks."""
        return self.softcap is None and self.sinks is None

    def visible(self, rows: Sequence[int] | Tensor) -> Bool[Tensor, "batch #head rows key_pos"]:
        """Which keys these query rows may attend to: padding, causality and windows as the layer applies them.

        One mask for all heads, unless a ``head_mask`` narrows them.
        """
        index = torch.as_tensor(rows, device=self.q.device, dtype=torch.long)
        index = torch.where(index < 0, index + self.q.shape[2], index)
        seen = self._visible_to_all(index)
        return seen if self.head_mask is None else seen & self.head_mask.seen(self, index)

    def _visible_to_all(self, index: Tensor) -> Bool[Tensor, "batch 1 rows key_pos"]:
        batch, keys = len(self.q), self.k.shape[2]
        if self.mask is None:
            limit = index + self.query_start if self.causal else torch.full_like(index, keys - 1)
            seen = torch.arange(keys, device=index.device) <= limit[:, None]
            return seen.expand(batch, 1, *seen.shape)
        mask = self.mask[:, :, index, :keys]
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return seen.expand(batch, *seen.shape[1:])

    def rows(
        self,
        positions: Sequence[int] | Tensor,
        bias: Float[Tensor, "batch #head #rows key_pos"] | None = None,
    ) -> Float[Tensor, "batch head rows key_pos"]:
        """The exact post-softmax attention of these query rows, at least in float32; ``bias`` is added to the scores.

        Recomputed from q, k and the mask, so what a hook wrote to the pattern does not show here. A row that may attend
        to nothing (a padding row) is all zeros. Cost: ``len(positions) * key_pos * d_head`` per head.
        """
        index = torch.as_tensor(positions, device=self.q.device, dtype=torch.long)
        scores = self._scores(index)
        return self._pattern(scores if bias is None else scores + bias)

    def _scores(self, index: Tensor) -> Tensor:
        scores = _dot(self.q[:, :, index], self.k, self.scale)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.mask is not None and self.mask.dtype != torch.bool:
            scores = scores + self.mask[:, :, index, : self.k.shape[2]]
        return scores.masked_fill(~self.visible(index), float("-inf"))

    def _pattern(self, scores: Tensor) -> Tensor:
        if self.sinks is None:
            return softmax(scores)
        sinks = self.sinks.to(scores).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]


class HeadMask(Protocol):
    """Narrows what each head of a layer attends to (``mech.sparse``)."""

    def seen(self, call: AttentionCall, rows: Tensor) -> Bool[Tensor, "batch head rows key_pos"]:
        """Which keys each head may attend to in these query rows; the layer's own mask still applies."""
        ...

    def attend(self, call: AttentionCall, dropout: float) -> Float[Tensor, "batch pos head d_head"] | None:
        """z under these masks; None if they change nothing."""
        ...


Observer = Callable[[AttentionCall], Tensor | None]


@dataclass(frozen=True, eq=False)
class KeySums:
    """An observer with extra columns for every key, which attention sums along with the values: ``call.carried``.

        model.attending(KeySums(columns, fn))

    The columns are appended to the values, so one fused call gives z and their sums: with the indicator vectors of
    token sets as columns, the attention that *every* query pays to each set. The sums have the model's own precision,
    and z may round differently in its last digit.
    """

    columns: Float[Tensor, "batch key_pos column"]
    fn: Observer

    def __call__(self, call: AttentionCall) -> Tensor | None:
        return self.fn(call)


@dataclass(eq=False)
class LayerRecord:
    """What the attention function knows about one layer of a wrapped model. It holds no module of that model."""

    stack: str
    layer: int
    owner: Callable[[], object | None]
    points: dict[str, HookPoint]
    observers: list[Observer] = field(default_factory=list)
    active: bool = False
    resume: Callable[[AttentionCall], Tensor] | None = (
        None  # computes z while variants continue a cached run (``partial/continuation.py``)
    )
    head_mask: HeadMask | None = None
    step: Step | None = None  # of the text stack
    cross: bool = False
    windows: Tensor | None = None  # boundaries of the attention windows that are computed in one call

    @classmethod
    def idle(cls) -> "LayerRecord":
        """The record for a layer without listeners whose attention is nevertheless computed here."""
        return cls("", 0, lambda: None, {point: HookPoint() for point in INSIDE_ATTENTION})

    def has_listeners(self) -> bool:
        """Whether the layer has observers, or hooks inside its attention."""
        return bool(self.observers) or hooked(self.points.values())

    def wanted(self) -> bool:
        return self.resume is not None or self.head_mask is not None or self.has_listeners()


_records: WeakKeyDictionary[nn.Module, LayerRecord] = WeakKeyDictionary()


_IDLE = LayerRecord.idle()


def register(module: nn.Module, record: LayerRecord) -> None:
    """Tie a layer's attention module to its record."""
    _records[module] = record


def forget(module: nn.Module) -> None:
    """Untie it."""
    _records.pop(module, None)


def owner_of(module: nn.Module) -> object | None:
    """The wrapper that still holds this attention module, if any."""
    record = _records.get(module)
    return record.owner() if record is not None else None


def attention(
    module: nn.Module,
    query: Float[Tensor, "batch head pos d_head"],
    key: Float[Tensor, "batch kv_head key_pos d_head"],
    value: Float[Tensor, "batch kv_head key_pos d_head"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Float[Tensor, "batch pos head d_head"], None]:
    """The function transformers calls; arguments are those of its ``AttentionInterface``."""
    if "write_index" in kwargs:
        refuse_paged()
    # Compiled code has no listeners: while there are any, the model runs eagerly.
    record: LayerRecord | None = None if torch.compiler.is_compiling() else _records.get(module)
    options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    if record is None or not record.active:
        if kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        record = _IDLE
    call = _call_of(record, module, (query, key, value), attention_mask, options)
    if record.resume is not None:
        return record.resume(call), None
    # The keys of cross attention are not positions of the sequence, so nothing is carried from them.
    carries = [observer for observer in record.observers if isinstance(observer, KeySums) and not record.cross]
    z, carried = _attended(module, call, record, carries, options)
    return _observed(record, call, z, carried), None


def _call_of(
    record: LayerRecord, module: nn.Module, qkv: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, options: dict
) -> AttentionCall:
    """The call as observers see it, with the values that hooks wrote."""
    query = fire(record.points["attn.hook_rot_q"], qkv[0].transpose(1, 2)).transpose(1, 2)
    key = fire(record.points["attn.hook_rot_k"], qkv[1].transpose(1, 2)).transpose(1, 2)
    if record.windows is not None:
        mask = _same_window(record.windows, key.shape[2])
    causal, scaling = options["is_causal"], options["scaling"]
    causal = getattr(module, "is_causal", True) if causal is None else causal
    return AttentionCall(
        stack=record.stack,
        layer=record.layer,
        q=query,
        k=key,
        v=qkv[2],
        z=query.transpose(1, 2),  # a placeholder of the right shape until z is known
        mask=mask,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=bool(causal and mask is None and query.shape[2] > 1),
        query_start=0 if record.step is None else record.step.start,
        cross=record.cross,
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
        head_mask=record.head_mask,
    )


def _attended(
    module: nn.Module, call: AttentionCall, record: LayerRecord, carries: Sequence[KeySums], options: dict
) -> tuple[Tensor, dict[Observer, Tensor]]:
    """z by the fastest applicable method, and what each of ``carries`` sums over keys."""
    run = _widened(call, carries) if carries else call
    if hooked((record.points["attn.hook_attn_scores"], record.points["attn.hook_pattern"])):
        z = stepwise(run, record, options["dropout"])
    elif record.head_mask is not None and (masked := record.head_mask.attend(run, options["dropout"])) is not None:
        z = masked
    elif not call.fused:
        z = _eager(module, run, record, options)
    else:
        options = options | {"scaling": call.scale} if carries else options
        z, _ = sdpa_attention_forward(module, run.q, run.k, run.v, call.mask, **options)
    if not carries:
        return z, {}
    widths = [call.v.shape[-1], *(carry.columns.shape[-1] for carry in carries), _padding(carries)]
    z, *sums = z.split(widths, dim=-1)
    return z.contiguous(), dict(zip(carries, sums, strict=False))


def _observed(record: LayerRecord, call: AttentionCall, z: Tensor, carried: dict[Observer, Tensor]) -> Tensor:
    """z after every observer has seen and perhaps replaced it."""
    for observe in record.observers:
        mine = carried.get(observe) if isinstance(observe, KeySums) else None
        replaced = observe(replace(call, z=z, carried=mine))
        if replaced is not None:
            z = checked(replaced, z, f"attending, {record.stack} layer {record.layer}", "batch pos head d_head")
    return z


def _widened(call: AttentionCall, carries: Sequence[KeySums]) -> AttentionCall:
    """The call with the columns appended to the values; queries and keys get zeros, which keep their products."""
    batch, kv_heads, keys, _ = call.v.shape
    columns = torch.cat([carry.columns for carry in carries], dim=-1)
    if columns.shape[:2] != (batch, keys):
        raise InputError(
            f"columns to carry for {tuple(columns.shape[:2])} (rows, keys)", f"({batch}, {keys})",
            "give a value for every key of every row; generation with a cache has more keys than the prompt",
        )  # fmt: skip
    padding = _padding(carries)
    columns = nn.functional.pad(columns.to(call.v), (0, padding))[:, None].expand(-1, kv_heads, -1, -1)
    more = (0, columns.shape[-1])
    return replace(
        call,
        q=nn.functional.pad(call.q, more),
        k=nn.functional.pad(call.k, more),
        v=torch.cat([call.v, columns], dim=-1),
    )


def _padding(carries: Sequence[KeySums]) -> int:
    # The fused GPU kernels need head sizes that are multiples of eight.
    return -sum(carry.columns.shape[-1] for carry in carries) % 8


def softmax(scores: Float[Tensor, "... key_pos"]) -> Float[Tensor, "... key_pos"]:
    """Softmax over keys in which a row of ``-inf`` becomes zeros, as in the fused kernels, with a gradient of zero."""
    dead = scores.amax(-1, keepdim=True) == float("-inf")
    if not dead.any():
        return torch.softmax(scores, dim=-1)
    return torch.softmax(scores.masked_fill(dead, 0.0), dim=-1).masked_fill(dead, 0.0)


def stepwise(call: AttentionCall, record: LayerRecord, dropout: float = 0.0) -> Float[Tensor, "batch pos head d_head"]:
    """z through scores and pattern, each with its hooks."""
    rows = torch.arange(call.q.shape[2], device=call.q.device)
    scores = fire(record.points["attn.hook_attn_scores"], call._scores(rows))
    pattern = fire(record.points["attn.hook_pattern"], call._pattern(scores))
    if dropout:
        pattern = nn.functional.dropout(pattern, dropout)
    batch, heads, queries, keys = pattern.shape
    kv_heads = call.v.shape[1]
    # Query heads that share a key/value head are folded into its rows, so keys and values are never repeated.
    grouped = pattern.to(call.v.dtype).reshape(batch, kv_heads, -1, keys) @ call.v
    return grouped.reshape(batch, heads, queries, -1).transpose(1, 2).contiguous()


def _eager(module: nn.Module, call: AttentionCall, record: LayerRecord, options: dict[str, Any]) -> Tensor:
    """z as transformers computes it under a softcap: by its own eager function for this class, rounding included.

    Sinks are computed here: an eager function that supports them reads them from the module, not from the call.
    """
    theirs = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if call.sinks is not None or theirs is None or "softcap" not in signature(theirs).parameters:
        return stepwise(call, record, options["dropout"])
    hidden = ~call.visible(torch.arange(call.q.shape[2], device=call.q.device))
    mask = torch.zeros_like(hidden, dtype=call.q.dtype).masked_fill(hidden, torch.finfo(call.q.dtype).min)
    if call.mask is not None and call.mask.dtype != torch.bool:
        mask = call.mask[..., : call.k.shape[2]]
    return theirs(module, call.q, call.k, call.v, mask, **{**options, "scaling": call.scale})[0]


def _dot(q: Tensor, k: Tensor, scale: float) -> Tensor:
    batch, heads, rows, d_head = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    folded = q.to(wide).reshape(batch, k.shape[1], -1, d_head)
    return (folded @ k.to(wide).transpose(-1, -2)).reshape(batch, heads, rows, -1) * scale


def _same_window(boundaries: Tensor, length: int) -> Bool[Tensor, "1 1 pos pos"]:
    window = torch.searchsorted(boundaries[1:].contiguous(), torch.arange(length, device=boundaries.device), right=True)
    return (window[:, None] == window[None, :])[None, None]


def refuse_paged(*_: Any, **__: Any) -> NoReturn:
    """The paged twin of ``attention``: what continuous batching would call.

    Raises:
        UnsupportedModel: always.
    """
    raise UnsupportedModel(
        "continuous batching of a wrapped model, whose paged keys and values mech does not read",
        "generation in which heads can be hooked and masked",
        "use HookedMLLM.generate with a batch, or unwrap() the model first",
    )


AttentionInterface.register(IMPLEMENTATION, attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
# Some versions of transformers silently run a name without a paged twin dense.
AttentionInterface.register(PAGED, refuse_paged)
AttentionMaskInterface.register(PAGED, sdpa_mask)
