"""Run on from the middle: one run of the model is kept, and variants of it are continued from any text layer.

    run = kept_run(model, inputs, reads=[last])              # one forward
    row = Continuation(model, run, example=0)
    first, stop = row.span(changed=40)                       # the rows that a change at position 40 can reach
    x = row.stream(3)[first:stop].expand(n, -1, -1).clone()  # n variants of the stream that enters layer 3
    ... write into x ...
    for layer in range(3, len(run.layers)):
        x = row.run(layer, x, rows=torch.arange(first, stop))
    logits = row.logits(x[:, -1:])

Every layer is the stock Hugging Face module, called with the arguments it had in the kept run, cut to the rows that
are run; so norms, M-RoPE, post-norms and experts are the model's own. Only attention is told where its keys are: the
keys and values before the first row are those of the kept run, held once for all variants, the others are each
variant's own. Masks are the rows of the layer's own mask.

What it does not do: layers whose outputs depend on earlier rows otherwise than through their own self-attention
(linear attention, keys shared between layers, cross-attention) are refused with ``NotResumable``, as is everything
that could not be cut to rows. ``Continuation.faithful`` compares an unchanged variant with the kept run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mech.model.attention import AttentionCall, softmax, stepwise
from mech.model.families import layers_of, module_at
from mech.model.hooked import HookedMLLM
from mech.model.points import hooked

ROWS = 16384  # rows of the stream in one call of a layer; a single variant may have more
SCORES = 2**24  # attention scores held at once where they are computed step by step


class NotResumable(Exception):
    """This model or run cannot be continued from the middle exactly; the message is the reason."""


@dataclass(frozen=True, eq=False)
class LayerRun:
    """What one text layer was given and did.

    Attributes:
        args: positional arguments behind the stream.
        kwargs: keyword arguments.
        stream: the residual stream that entered.
        call: what its attention saw and produced.
        added: what the model adds to the stream behind the layer (DeepStack), None for nothing.
    """

    args: tuple
    kwargs: dict[str, Any]
    stream: Float[Tensor, "batch pos d_model"]
    call: AttentionCall
    added: Float[Tensor, "batch pos d_model"] | None


@dataclass(frozen=True, eq=False)
class KeptRun:
    """One forward of a batch: every text layer, the stream that leaves the last one, and the logits at ``reads``."""

    layers: tuple[LayerRun, ...]
    last: Float[Tensor, "batch pos d_model"]
    reads: tuple[int, ...]
    logits: Float[Tensor, "batch read vocab"]
    shaped: Callable[[Tensor], Tensor]  # what becomes of the unembedding's output: most often nothing


@torch.no_grad()
def kept_run(model: HookedMLLM, inputs: Any, reads: Sequence[int]) -> KeptRun:
    """Run ``inputs`` once and keep what continuing needs: per layer the stream, queries, keys, values and z.

    Raises:
        NotResumable: a layer whose work is not its own self-attention and row by row, or hooks on the model.

    Cost: one forward; memory of a KV cache and of three streams a layer.
    """
    if hooked(model.hook_dict.values()) or any(record.observers for _, record in model._layers):
        raise NotResumable("there are hooks on the model")
    layers = layers_of(model.hf_model, model.family.text)
    norm = module_at(model.hf_model, model.family.final_norm)
    calls: dict[int, list[AttentionCall]] = {}
    given: dict[int, tuple] = {}
    left: dict[int, Tensor] = {}
    final: list[Tensor] = []

    def enter(index: int) -> Callable:
        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            stream = args[0] if args else kwargs["hidden_states"]
            # A layer may write into the stream it was given, and so may whatever runs behind it.
            given[index] = (args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}, stream.clone())

        return before

    def leave(index: int) -> Callable:
        def after(module: nn.Module, args: tuple, output: Any) -> None:
            left[index] = (output[0] if isinstance(output, tuple) else output).clone()

        return after

    def look(call: AttentionCall) -> None:
        calls.setdefault(call.layer, []).append(call)

    handles = [norm.register_forward_pre_hook(lambda module, args: final.append(args[0].clone()))]
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(enter(index), with_kwargs=True))
        handles.append(layer.register_forward_hook(leave(index)))
    try:
        with model.attending(look):
            logits = model(inputs, logits_to_keep=torch.as_tensor(reads, device=model.device))
    finally:
        for handle in handles:
            handle.remove()
    kept = []
    for index in range(len(layers)):
        args, kwargs, stream = given[index]
        _refuse(index, args, kwargs, stream, calls.get(index, []))
        behind = given[index + 1][2] if index + 1 < len(layers) else final[0]
        added = behind - left[index]
        kept.append(LayerRun(args, kwargs, stream, calls[index][0], added if added.any() else None))
    unembed: Any = module_at(model.hf_model, model.family.unembed)
    shaped = _shape_of(model, unembed(norm(final[0][:, list(reads)])), logits)
    return KeptRun(tuple(kept), final[0], tuple(reads), logits, shaped)


def _shape_of(model: HookedMLLM, unembedded: Tensor, logits: Tensor) -> Callable[[Tensor], Tensor]:
    """What the model does to the unembedding's output. It is tried: a config may name what its model leaves out."""
    config = model.hf_model.config.get_text_config()
    scale, cap = (getattr(config, name, None) or 1.0 for name in ("logit_scale", "final_logit_softcapping"))
    shapes = (lambda x: x, lambda x: x * scale, lambda x: torch.tanh(x / cap) * cap)
    gaps = [float((shape(unembedded) - logits).abs().max()) for shape in shapes]
    if min(gaps) <= _tolerance(logits):
        return shapes[gaps.index(min(gaps))]
    raise NotResumable("the logits are not the unembedding of the final norm")


def _tolerance(logits: Tensor) -> float:
    """What rounding may move logits by."""
    # Norms and rotations compute in single precision in many models, whatever the dtype of the rest.
    eps = max(torch.finfo(kind).eps for kind in (logits.dtype, torch.float32))
    return float(logits.abs().max()) * 32 * eps**0.75


_ROWLESS = (type(None), bool, int, float, str)
_SLICED = ("position_embeddings", "position_ids", "cache_position")
_REPLACED = ("attention_mask", "past_key_values", "past_key_value")


def _refuse(index: int, args: tuple, kwargs: dict, stream: Tensor, calls: list[AttentionCall]) -> None:
    """Refuse a layer that cannot be run on some rows alone."""
    if len(calls) != 1:
        raise NotResumable(f"layer {index} calls attention {len(calls)} times")
    call = calls[0]
    if call.k.shape[2] != stream.shape[1] or call.q.shape[2] != stream.shape[1] or call.q.shape[0] != stream.shape[0]:
        raise NotResumable(f"layer {index} does not attend to its own positions")
    if call.mask is not None and call.mask.dtype != torch.bool:
        raise NotResumable(f"layer {index} adds a bias to its scores")
    if call.cross:
        raise NotResumable(f"layer {index} attends to another sequence")
    for name, value in kwargs.items():
        if name not in (*_SLICED, *_REPLACED) and not isinstance(value, _ROWLESS):
            raise NotResumable(f"layer {index} is given {name!r}, which is not known to be cut to rows")
    for value in args:
        if not isinstance(value, _ROWLESS) and not (isinstance(value, Tensor) and value.shape[:2] == stream.shape[:2]):
            raise NotResumable(f"layer {index} is given an argument that is not known to be cut to rows")


Attend = Callable[[AttentionCall], Tensor]


@dataclass(eq=False)
class Continuation:
    """One example of a kept run, ready to be run on from any layer.

    ``row_layers`` counts the rows that have passed a layer since the beginning: what the continuing cost.
    """

    model: HookedMLLM
    kept: KeptRun
    example: int
    reads: Int[Tensor, " read"]
    row_layers: int = 0
    _modules: list[nn.Module] = field(init=False, repr=False)
    _attention: dict[int, tuple[nn.Module, Any]] = field(init=False, repr=False)
    _causal: bool = field(init=False, repr=False)
    _needed: Tensor | None = field(init=False, repr=False)

    def __post_init__(self):
        self._modules = layers_of(self.model.hf_model, self.model.family.text)
        self._attention = {r.layer: (module, r) for module, r in self.model._layers if r.stack == "text"}
        self._causal = all(layer.call.mask is None and layer.call.causal for layer in self.kept.layers)
        self._needed = None if self._causal else self._reach()

    def __len__(self) -> int:
        return len(self.kept.layers)

    def stream(self, layer: int) -> Float[Tensor, "pos d_model"]:
        """The residual stream that enters a layer; that behind the last one for ``layer == len(self)``."""
        return (self.kept.last if layer == len(self) else self.kept.layers[layer].stream)[self.example]

    def added(self, layer: int) -> Float[Tensor, "pos d_model"] | None:
        """What the model adds to the stream behind a layer."""
        added = self.kept.layers[layer].added
        return None if added is None else added[self.example]

    def span(self, changed: int) -> tuple[int, int]:
        """First row, and the row behind the last, of what has to be run when ``changed`` is the first changed row.

        Under a causal mask this is from the change to the last row that is read. Where earlier rows may look ahead
        (bidirectional image blocks) it begins with the first that sees a changed one.
        """
        first = min(changed, int(self.reads.min()))
        if self._needed is None:
            stop = int(self.reads.max()) + 1
        else:
            useful = self._needed.any(1)
            stop = int(useful.nonzero().max()) + 1
            while True:  # rows before `first` that matter and see a row behind it
                seeing = self._needed[:first, first:].any(1).nonzero()
                if not len(seeing):
                    break
                first = int(seeing.min())
        # A short prefix costs less than the explicit mask that cutting it off would need.
        return (0 if self._causal and first * 16 < stop else first), stop

    def _reach(self) -> Tensor:
        """Which keys each row sees in some layer, for the rows from which a read row can be reached, and no others."""
        length = self.kept.last.shape[1]
        seen = torch.eye(length, dtype=torch.bool, device=self.kept.last.device)
        for mask in {id(layer.call.mask): layer.call for layer in self.kept.layers}.values():
            visible = mask.visible(torch.arange(length))
            seen |= visible[self.example if len(visible) > 1 else 0, 0]
        wanted = torch.zeros(length, dtype=torch.bool, device=seen.device)
        wanted[self.reads] = True
        while (more := seen[wanted].any(0) | wanted).sum() > wanted.sum():
            wanted = more
        return seen & wanted[:, None]

    # -- running ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(
        self,
        layer: int,
        x: Float[Tensor, "variant row d_model"],
        rows: Int[Tensor, " row"],
        *,
        keys: str = "own",
        hooks: Sequence[tuple[str, Callable]] = (),
    ) -> Float[Tensor, "variant row d_model"]:
        """One stock layer, and what the model adds behind it, for some rows of many variants.

        Args:
            layer: which.
            x: the stream of the variants at ``rows``.
            rows: their positions; one stretch without gaps for ``keys="own"``.
            keys: ``"own"``: keys and values of ``rows`` are the variants' own, earlier ones those of the kept run;
                ``"kept"``: all are those of the kept run; ``"z"``: attention is not computed, heads put out what they
                did in the kept run.
            hooks: (point, hook) pairs of this layer; the hooks see variants in place of a batch.
        """
        attend = {"own": self._own, "kept": self._onto_kept, "z": self._z}[keys](layer, rows, int(rows[0]))
        step = len(x) if hooks else max(1, ROWS // len(rows))
        with self._given(layer, attend, hooks):
            out = [self._layer(layer, part, rows) for part in x.split(max(1, step))]
        return self._with_added(layer, torch.cat(out), rows)

    @torch.no_grad()
    def finish(
        self, x: Float[Tensor, "variant row d_model"], rows: Int[Tensor, " row"]
    ) -> Float[Tensor, "variant read d_model"]:
        """The last layer for the read rows alone: the other rows only give their keys and values."""
        layer = len(self) - 1
        reads, first = self.reads, int(rows[0])
        if len(reads) == len(rows):
            return self.run(layer, x, rows)
        out = []
        for part in x.split(max(1, ROWS // len(rows))):
            known = self._keys_alone(layer, part, rows)
            attend = self._own(layer, reads, first, known)
            with self._given(layer, attend, ()):
                out.append(self._layer(layer, part[:, reads - first], reads))
        return self._with_added(layer, torch.cat(out), reads)

    @torch.no_grad()
    def logits(self, x: Float[Tensor, "variant read d_model"]) -> Float[Tensor, "variant read vocab"]:
        """Final norm and unembedding of rows behind the last layer."""
        model = self.model
        unembed: Any = module_at(model.hf_model, model.family.unembed)
        return self.kept.shaped(unembed(module_at(model.hf_model, model.family.final_norm)(x)))

    def faithful(self) -> None:
        """Run the read rows, unchanged, through every layer and compare with the kept logits.

        Raises:
            NotResumable: they differ by more than rounding, so something in this model is not what it seems.

        Cost: as many rows as are read.
        """
        first, stop = self.span(int(self.reads.max()))
        rows = torch.arange(first, stop, device=self.reads.device)
        x = self.stream(0)[None, rows]
        for layer in range(len(self) - 1):
            x = self.run(layer, x, rows)
        again = self.logits(self.finish(x, rows))[0]
        places = torch.tensor([self.kept.reads.index(read) for read in self.reads.tolist()])
        kept = self.kept.logits[self.example, places.to(again.device)]
        gap = float((again - kept).abs().max())
        if not gap <= _tolerance(kept):
            raise NotResumable(f"running on from the kept run differs from it by {gap:.2g} in the logits")

    def _layer(self, layer: int, x: Tensor, rows: Tensor) -> Tensor:
        kept = self.kept.layers[layer]
        self.row_layers += len(x) * len(rows)
        args = [v[self._one(v), rows] if isinstance(v, Tensor) else v for v in kept.args]
        output = self._modules[layer](x, *args, **self._kwargs(kept.kwargs, rows))
        return output[0] if isinstance(output, tuple) else output

    def _one(self, value: Tensor, dim: int = 0) -> slice:
        return slice(self.example, self.example + 1) if value.shape[dim] > 1 else slice(None)

    def _kwargs(self, kwargs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
        """The keyword arguments of the kept run, for one example and some rows."""
        cut = {name: None if name in _REPLACED else value for name, value in kwargs.items()}
        turns = cut.get("position_embeddings")
        if isinstance(turns, Tensor):
            cut["position_embeddings"] = turns[..., self._one(turns, -3), rows, :]
        elif turns is not None:
            cut["position_embeddings"] = tuple(turn[..., self._one(turn, -3), rows, :] for turn in turns)
        if (ids := cut.get("position_ids")) is not None:
            cut["position_ids"] = ids[..., self._one(ids, -2), rows]
        if (places := cut.get("cache_position")) is not None:
            cut["cache_position"] = places[rows]
        return cut

    def _with_added(self, layer: int, x: Tensor, rows: Tensor) -> Tensor:
        added = self.added(layer)
        return x if added is None else x + added[rows]

    @contextmanager
    def _given(self, layer: int, attend: Attend, hooks: Sequence[tuple[str, Callable]]) -> Iterator[None]:
        record = self._attention[layer][1]
        record.resume = attend
        try:
            with self.model.hooks(list(hooks)), self.model._attached():
                yield
        finally:
            record.resume = None

    def _keys_alone(self, layer: int, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values a layer makes of the stream; nothing behind them is computed."""
        found = []

        def stop(call: AttentionCall) -> Tensor:
            found.append((call.k, call.v))
            raise _Enough

        with self._given(layer, stop, ()), suppress(_Enough):
            self._layer(layer, x, rows)
        return found[0]

    # -- attention ----------------------------------------------------------------------------------------------------

    def _call(self, layer: int) -> AttentionCall:
        """The kept attention of this example."""
        call = self.kept.layers[layer].call
        one = self._one(call.q)
        mask = call.mask if call.mask is None else call.mask[self._one(call.mask)]
        return replace(call, q=call.q[one], k=call.k[one], v=call.v[one], z=call.z[one], mask=mask)

    def _z(self, layer: int, rows: Tensor, first: int) -> Attend:
        z = self._call(layer).z[:, rows]
        return lambda call: z.expand(len(call.q), -1, -1, -1)

    def _onto_kept(self, layer: int, rows: Tensor, first: int) -> Attend:
        kept, record = self._call(layer), self._attention[layer][1]
        seen = kept.visible(rows)

        def attend(call: AttentionCall) -> Tensor:
            if not kept.fused or hooked((record.points["attn.hook_attn_scores"], record.points["attn.hook_pattern"])):
                n = len(call.q)
                whole = replace(call, k=kept.k.expand(n, -1, -1, -1), v=kept.v.expand(n, -1, -1, -1), mask=seen)
                return stepwise(whole, record)
            return _onto(call.q, kept.k[0], kept.v[0], None, seen[0, 0], kept.scale)

        return attend

    def _own(self, layer: int, rows: Tensor, first: int, known: tuple[Tensor, Tensor] | None = None) -> Attend:
        """Keys before ``first`` from the kept run, then the variants' own: those of the call, or ``known`` ones."""
        kept, (module, record) = self._call(layer), self._attention[layer]

        def attend(call: AttentionCall) -> Tensor:
            own = known or (call.k, call.v)
            if first == 0 and self._causal and kept.fused and known is None:
                return sdpa_attention_forward(module, call.q, *own, None, scaling=kept.scale)[0]
            seen = kept.visible(rows)[..., : first + own[0].shape[2]]
            before = kept.k[:, :, :first], kept.v[:, :, :first]
            if kept.fused and (known or first > 4 * len(rows)):
                return _onto(call.q, before[0][0], before[1][0], own, seen[0, 0], kept.scale)
            n = len(call.q)
            k, v = (torch.cat((old.expand(n, -1, -1, -1), new), 2) for old, new in zip(before, own, strict=True))
            if not kept.fused:
                return stepwise(replace(call, k=k, v=v, mask=seen), record)
            return sdpa_attention_forward(module, call.q, k, v, seen, scaling=kept.scale, is_causal=False)[0]

        return attend


class _Enough(Exception):
    """The keys and values are known: nothing else of this layer is wanted."""


def _onto(
    q: Float[Tensor, "variant head row d_head"],
    k: Float[Tensor, "kv_head key_pos d_head"],
    v: Float[Tensor, "kv_head key_pos d_head"],
    own: tuple[Tensor, Tensor] | None,
    seen: Tensor,
    scale: float,
) -> Float[Tensor, "variant row head d_head"]:
    """Attention of all variants to keys that they share, and to keys of their own behind them, in one softmax.

    The variants are folded into the rows of one product per key head, so that shared keys are read once. Memory is
    bounded by ``SCORES``, or by one variant.
    """
    variants, heads, rows, width = q.shape
    kv_heads, shared = k.shape[:2]
    keys, grouped_rows = seen.shape[-1], heads // kv_heads * rows  # query heads of one key head are rows of it
    wide = torch.promote_types(q.dtype, torch.float32)
    hidden = ~seen
    parts = []
    step = max(1, SCORES // (heads * rows * keys))
    for start in range(0, variants, step):
        part = q[start : start + step].to(wide) * scale
        n = len(part)
        grouped = part.reshape(n, kv_heads, grouped_rows, width)
        folded = grouped.transpose(0, 1).reshape(kv_heads, n * grouped_rows, width)
        scores = (folded @ k.to(wide).transpose(-1, -2)).unflatten(1, (n, grouped_rows)).transpose(0, 1)
        if own is not None:
            mine = own[0][start : start + step].to(wide)
            scores = torch.cat((scores, grouped @ mine.transpose(-1, -2)), -1)
        pattern = softmax(scores.reshape(n, heads, rows, keys).masked_fill(hidden, float("-inf")))
        pattern = pattern.to(v.dtype).reshape(n, kv_heads, grouped_rows, keys)
        ahead = pattern[..., :shared].transpose(0, 1).reshape(kv_heads, n * grouped_rows, shared) @ v
        z = ahead.unflatten(1, (n, grouped_rows)).transpose(0, 1)
        if own is not None:
            z = z + pattern[..., shared:] @ own[1][start : start + step]
        parts.append(z.reshape(n, heads, rows, width).transpose(1, 2))
    return torch.cat(parts)
