"""Continue from the middle: one run of the model is kept, and variants of it are continued from any text layer.

    run = cached_run(model, inputs, reads=[last])              # one forward
    row = Continuation(model, run, example=0)
    first, stop = row.span(changed=40)                       # the rows that a change at position 40 can reach
    x = row.stream(3)[first:stop].expand(n, -1, -1).clone()  # n variants of the stream that enters layer 3
    ... write into x ...
    for layer in range(3, len(run.layers)):
        x = row.run(layer, x, rows=torch.arange(first, stop))    # positions are kept on the CPU
    logits = row.logits(x[:, -1:])

Every layer is the stock Hugging Face module, called with the arguments it had in the cached run, cut to the rows that
are run; so norms, M-RoPE, post-norms and experts are the model's own. Only attention is told where its keys are: the
keys and values before the first row are those of the cached run, held once for all variants; the others are each
variant's own (``shared_keys.py``). Masks are rows of the layer's own mask. If layers are on several devices, streams
are on that of the first layer.

Layers whose outputs depend on earlier rows other than through their own self-attention (linear attention, keys shared
between layers, cross-attention) are refused with ``NotResumable``, as is anything that cannot be cut to rows.
``Continuation.faithful`` compares an unchanged variant with the cached run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mech.model.architectures.families import layers_of, module_at
from mech.model.attention import AttentionCall, stepwise
from mech.model.hooked import HookedMLLM
from mech.model.partial.cached_run import REPLACED, CachedRun, NotResumable, tolerance
from mech.model.partial.shared_keys import over_shared, written_out
from mech.model.points import hooked

Attend = Callable[[AttentionCall], Tensor]


@dataclass(eq=False)
class Continuation:
    """One example of a cached run, ready to be continued from any layer.

    ``row_layers`` counts the rows passed through a layer so far: the cost of continuing.
    """

    model: HookedMLLM
    kept: CachedRun
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
        self.reads = self.reads.cpu()

    def __len__(self) -> int:
        return len(self.kept.layers)

    def stream(self, layer: int) -> Float[Tensor, "pos d_model"]:
        """The residual stream that enters a layer; for ``layer == len(self)``, the one that leaves the last layer."""
        return (self.kept.last if layer == len(self) else self.kept.layers[layer].stream)[self.example]

    def added(self, layer: int) -> Float[Tensor, "pos d_model"] | None:
        """What the model adds to the stream after a layer."""
        added = self.kept.layers[layer].added
        return None if added is None else added[self.example]

    def span(self, changed: int) -> tuple[int, int]:
        """The rows that must be run, ``(first, stop)``, when ``changed`` is the first changed row.

        Under a causal mask they go from the change to the last row that is read. Where earlier rows may attend ahead
        (bidirectional image blocks) they begin with the first row that sees a changed one.
        """
        first = min(changed, int(self.reads.min()))
        if self._needed is None:
            stop = int(self.reads.max()) + 1
        else:
            useful = self._needed.any(1)
            stop = int(useful.nonzero().max()) + 1
            while True:  # rows before `first` that matter and see it or a later row
                seeing = self._needed[:first, first:].any(1).nonzero()
                if not len(seeing):
                    break
                first = int(seeing.min())
        # A short prefix costs less than the explicit mask that cutting it off would need.
        return (0 if self._causal and first * 16 < stop else first), stop

    def _reach(self) -> Tensor:
        """Which keys each row sees in some layer, for only those rows that can affect a read row."""
        length = self.kept.last.shape[1]
        seen = torch.eye(length, dtype=torch.bool)
        for mask in {id(layer.call.mask): layer.call for layer in self.kept.layers}.values():
            visible = mask.visible(torch.arange(length))
            seen |= visible[self.example if len(visible) > 1 else 0, 0].cpu()
        wanted = torch.zeros(length, dtype=torch.bool)
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
        n_unchanged: int = 0,
        hooks: Sequence[tuple[str, Callable]] = (),
    ) -> Float[Tensor, "variant row d_model"]:
        """Run one stock layer, and what the model adds after it, for some rows of many variants.

        Args:
            layer: which layer.
            x: the stream of the variants at ``rows``.
            rows: their positions, on the CPU; contiguous for ``keys="own"``.
            keys: ``"own"``: keys and values of ``rows`` are the variants' own, earlier ones those of the cached run;
                ``"kept"``: all are those of the cached run; ``"z"``: attention is not computed, heads output what they
                did in the cached run.
            n_unchanged: how many variants at the end still equal the cached run; their heads output what they did.
            hooks: (point, hook) pairs of this layer; the hooks see variants in place of a batch.
        """
        attend = {"own": self._own, "kept": self._onto_kept, "z": self._z}[keys](layer, rows, int(rows[0]))
        if n_unchanged:
            attend = self._split_unchanged(n_unchanged, attend, self._z(layer, rows, 0))
        step = len(x) if hooks else self.at_once(rows)
        with self._given(layer, attend, hooks):
            out = [self._layer(layer, part, rows) for part in x.split(max(1, step))]
        return self._with_added(layer, torch.cat(out) if len(out) > 1 else out[0], rows)

    @torch.no_grad()
    def project(
        self,
        layer: int,
        x: Float[Tensor, "variant row d_model"],
        rows: Int[Tensor, " row"],
        hooks: Sequence[tuple[str, Callable]] = (),
    ) -> tuple[Tensor, Tensor]:
        """The keys and values a layer makes from the stream; hooks also see queries, nothing later is computed."""
        found = []

        def stop(call: AttentionCall) -> Tensor:
            found.append((call.k, call.v))
            raise _Enough

        with self._given(layer, stop, hooks), suppress(_Enough):
            self._layer(layer, x, rows)
        return found[0]

    @torch.no_grad()
    def finish(
        self,
        x: Float[Tensor, "variant row d_model"],
        rows: Int[Tensor, " row"],
        hooks: Sequence[tuple[str, Callable]] = (),
    ) -> Float[Tensor, "variant read d_model"]:
        """Run the last layer for the read rows only; the others give just keys and values, which hooks may write."""
        layer = len(self) - 1
        reads, first = self.reads, int(rows[0])
        if len(reads) == len(rows):
            return self.run(layer, x, rows, hooks=hooks)
        out = []
        for part in x.split(len(x) if hooks else self.at_once(rows)):
            known = self.project(layer, part, rows, hooks)
            attend = self._own(layer, reads, first, known)
            with self._given(layer, attend, ()):
                out.append(self._layer(layer, part[:, stretch(reads - first)], reads))
        return self._with_added(layer, torch.cat(out), reads)

    @torch.no_grad()
    def logits(self, x: Float[Tensor, "variant read d_model"]) -> Float[Tensor, "variant read vocab"]:
        """Final norm and unembedding of rows that leave the last layer."""
        model = self.model
        unembed: Any = module_at(model.hf_model, model.family.unembed)
        return self.kept.shaped(unembed(module_at(model.hf_model, model.family.final_norm)(x))).to(x.device)

    def faithful(self) -> None:
        """Run the read rows, unchanged, through every layer and compare with the kept logits.

        Raises:
            NotResumable: they differ by more than rounding, so something in this model is not what it seems.

        Cost: as many rows as are read.
        """
        first, stop = self.span(int(self.reads.max()))
        rows = torch.arange(first, stop)
        x = self.stream(0)[None, first:stop]
        for layer in range(len(self) - 1):
            x = self.run(layer, x, rows)
        self.agree(self.logits(self.finish(x, rows))[0])

    def agree(self, again: Float[Tensor, "read vocab"]) -> None:
        """Compare the logits of an unchanged variant with the kept ones.

        Raises:
            NotResumable: as in ``faithful``.
        """
        places = torch.tensor([self.kept.reads.index(read) for read in self.reads.tolist()])
        kept = self.kept.logits[self.example, places]
        gap = float((again - kept).abs().max())
        if not gap <= tolerance(kept):
            raise NotResumable(f"continuing from the cached run differs from it by {gap:.2g} in the logits")

    def at_once(self, rows: Int[Tensor, " row"]) -> int:
        """How many variants go through a layer in one call."""
        return max(1, self.kept.room.called // len(rows))

    def _layer(self, layer: int, x: Tensor, rows: Tensor) -> Tensor:
        kept = self.kept.layers[layer]
        self.row_layers += len(x) * len(rows)
        args = [v[self._one(v), stretch(rows)] if isinstance(v, Tensor) else v for v in kept.args]
        output = self._modules[layer](x, *args, **self._kwargs(kept.kwargs, rows))
        return (output[0] if isinstance(output, tuple) else output).to(x.device)

    def _one(self, value: Tensor, dim: int = 0) -> slice:
        return slice(self.example, self.example + 1) if value.shape[dim] > 1 else slice(None)

    def _kwargs(self, kwargs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
        """The keyword arguments of the cached run, for one example and some rows."""
        cut = {name: None if name in REPLACED else value for name, value in kwargs.items()}
        these = stretch(rows)
        turns = cut.get("position_embeddings")
        if isinstance(turns, Tensor):
            cut["position_embeddings"] = turns[..., self._one(turns, -3), these, :]
        elif turns is not None:
            cut["position_embeddings"] = tuple(turn[..., self._one(turn, -3), these, :] for turn in turns)
        if (ids := cut.get("position_ids")) is not None:
            cut["position_ids"] = ids[..., self._one(ids, -2), these]
        if (places := cut.get("cache_position")) is not None:
            cut["cache_position"] = places[these]
        return cut

    def _with_added(self, layer: int, x: Tensor, rows: Tensor) -> Tensor:
        added = self.added(layer)
        return x if added is None else x + added[stretch(rows)]

    @contextmanager
    def _given(self, layer: int, attend: Attend, hooks: Sequence[tuple[str, Callable]]) -> Iterator[None]:
        record = self._attention[layer][1]
        with self.model.turns.taken(running=True):
            record.resume = attend
            try:
                # Removing hooks looks at every point, which is not worth it for none.
                with self.model.hooks(list(hooks)) if hooks else nullcontext(), self.model._attached():
                    yield
            finally:
                record.resume = None

    # -- attention ----------------------------------------------------------------------------------------------------

    def _call(self, layer: int) -> AttentionCall:
        """The attention call of this example in the cached run."""
        call = self.kept.layers[layer].call
        one = self._one(call.q)
        mask = call.mask if call.mask is None else call.mask[self._one(call.mask)]
        return replace(call, q=call.q[one], k=call.k[one], v=call.v[one], z=call.z[one], mask=mask)

    def _z(self, layer: int, rows: Tensor, first: int) -> Attend:
        z = self._call(layer).z[:, stretch(rows)]
        return lambda call: z.expand(len(call.q), -1, -1, -1)

    @staticmethod
    def _split_unchanged(n_unchanged: int, attend: Attend, unchanged: Attend) -> Attend:
        """``attend`` for all variants but the last ``n_unchanged``, which have nothing to compute."""

        def both(call: AttentionCall) -> Tensor:
            old, new = (replace(call, q=call.q[at], k=call.k[at], v=call.v[at])
                        for at in (slice(None, -n_unchanged), slice(-n_unchanged, None)))  # fmt: skip
            return torch.cat((attend(old), unchanged(new)))

        return both

    def _onto_kept(self, layer: int, rows: Tensor, first: int) -> Attend:
        kept, record = self._call(layer), self._attention[layer][1]
        seen = kept.visible(rows)

        def attend(call: AttentionCall) -> Tensor:
            if not kept.fused or hooked((record.points["attn.hook_attn_scores"], record.points["attn.hook_pattern"])):
                n = len(call.q)
                whole = replace(call, k=kept.k.expand(n, -1, -1, -1), v=kept.v.expand(n, -1, -1, -1), mask=seen)
                return stepwise(whole, record)
            return written_out(call.q, kept.k[0], kept.v[0], None, seen[0, 0], kept.scale)

        return attend

    def _own(self, layer: int, rows: Tensor, first: int, known: tuple[Tensor, Tensor] | None = None) -> Attend:
        """Keys before ``first`` from the cached run, then the variants' own: those of the call, or ``known`` ones."""
        kept, (module, record) = self._call(layer), self._attention[layer]

        def attend(call: AttentionCall) -> Tensor:
            own, plain = known or (call.k, call.v), self._causal and kept.fused
            alone = first == 0 and known is None
            before = kept.k[:, :, :first], kept.v[:, :, :first]
            if plain and (first or (alone and not call.q.is_cpu)):
                at = None if known is None else rows - first
                if (z := over_shared(call.q, before[0][0], before[1][0], own, kept.scale, at)) is not None:
                    return z
            if plain and alone:
                return sdpa_attention_forward(module, call.q, *own, None, scaling=kept.scale)[0]
            seen = kept.visible(rows)[..., : first + own[0].shape[2]]
            if kept.fused and (known or first > 4 * len(rows)):
                return written_out(call.q, before[0][0], before[1][0], own, seen[0, 0], kept.scale)
            n = len(call.q)
            k, v = (torch.cat((old.expand(n, -1, -1, -1), new), 2) for old, new in zip(before, own, strict=True))
            if not kept.fused:
                return stepwise(replace(call, k=k, v=v, mask=seen), record)
            return sdpa_attention_forward(module, call.q, k, v, seen, scaling=kept.scale, is_causal=False)[0]

        return attend


def stretch(rows: Int[Tensor, " row"]) -> slice | Tensor:
    """Rows as a slice if they have no gaps: cutting then gives a view, and nothing is copied to a device."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows


class _Enough(Exception):
    """The keys and values are known: nothing else of this layer is needed."""
