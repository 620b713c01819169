"""Run a model with interventions.

    with intervene(model, Ablate(heads=ranking.top(0.05), to="mean", reference=train)) as ablated:
        logits = ablated(inputs)
        text   = ablated.generate_text(inputs)      # the KV cache is on, the heads stay ablated

On heads, ``Ablate``, ``Scale``, ``Knockout`` and ``Redirect`` act where a head's output leaves attention, before
``hook_z`` fires, so hooks and caches see the changed values; other specs write to their points as hooks do. Specs at
the same place act in the order given. Leaving the block removes them all.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech.arguments import checked
from mech.errors import ExperimentError
from mech.inputs import Inputs
from mech.interventions.heads import drawn, knocked_out, redirected, replacement, span
from mech.interventions.pieces import check_pieces, counterpart
from mech.interventions.reference import Reference, reference_activations
from mech.interventions.specs import PATCHED, Ablate, Custom, Knockout, Patch, Redirect, Scale, Spec, Z, names_of
from mech.interventions.where import Plan, for_beams
from mech.model import AttentionCall, HookedMLLM


@checked
@contextmanager
def intervene(model: HookedMLLM, *specs: Spec) -> Iterator["Intervened"]:
    """A view of ``model`` that applies ``specs`` in every run.

    Raises:
        ExperimentError: a spec that does not fit the model or the inputs (before any forward); a spec that changed
            nothing in a run.

    Cost: that of the forward alone; samples given as ``reference`` cost one forward each, and inputs given as
    ``source`` one forward, once.
    """
    if not specs:
        raise ExperimentError("no intervention", "at least one", "pass mech.Ablate(heads=..., to='mean', ...)")
    for spec in specs:
        if not isinstance(spec, Spec):
            raise ExperimentError(
                f"an intervention of type {type(spec).__name__}", "Ablate, Patch, Knockout, Redirect, Scale or Custom"
            )
        spec.check(model)
    intervened = Intervened(model, tuple(_ready(spec, model) for spec in specs))
    with intervened._installed():
        yield intervened


def _ready(spec: Spec, model: HookedMLLM) -> Spec:
    """The spec with reference activations in place of the samples they come from."""
    if isinstance(spec, Ablate) and spec.to in ("mean", "resample") and not isinstance(spec.reference, Reference):
        assert spec.reference is not None  # check() has refused it
        activations = reference_activations(model, spec.reference, point=spec.point)
        return replace(spec, reference=activations)
    return spec


class Intervened:
    """What ``intervene`` yields: call it, or generate with it, like the model itself."""

    def __init__(self, model: HookedMLLM, specs: tuple[Spec, ...]):
        self.model, self.specs = model, specs
        self._heads = [_head_mask(model, spec) for spec in specs]
        self._sources: dict[int, Any] = {}
        self._plan: Plan | None = None
        self._fired: set[int] = set()

    def __repr__(self) -> str:
        return f"Intervened({self.model.name}, {', '.join(map(repr, self.specs))})"

    def __call__(self, inputs: Inputs, **options: Any) -> Float[Tensor, "batch pos vocab"]:
        """The logits of ``inputs`` under the interventions."""
        with self._running(inputs, options):
            return self.model(inputs, **options)

    def run_with_cache(self, inputs: Inputs, **options: Any):
        """``HookedMLLM.run_with_cache`` under the interventions."""
        with self._running(inputs, options):
            return self.model.run_with_cache(inputs, **options)

    def generate(self, inputs: Inputs, **options: Any) -> Int[Tensor, "batch new_pos"]:
        """``HookedMLLM.generate`` under the interventions."""
        with self._running(inputs, options):
            return self.model.generate(inputs, **options)

    def generate_text(self, inputs: Inputs, **options: Any) -> list[str]:
        """``HookedMLLM.generate_text`` under the interventions."""
        with self._running(inputs, options):
            return self.model.generate_text(inputs, **options)

    def answer(self, inputs: Inputs, **options: Any) -> str:
        """``HookedMLLM.answer`` under the interventions."""
        with self._running(inputs, options):
            return self.model.answer(inputs, **options)

    @contextmanager
    def _installed(self) -> Iterator[None]:
        with ExitStack() as stack:
            if any(mask is not None for mask in self._heads):
                stack.enter_context(self.model.attending(self._edit))
            hooks: list[Any] = []
            for index, spec in enumerate(self.specs):
                if isinstance(spec, Custom):
                    names = self.model.select(spec.point if isinstance(spec.point, str) else list(spec.point))
                    hooks += [(name, partial(self._custom, index)) for name in names]
                elif self._heads[index] is None:
                    assert isinstance(spec, Ablate | Patch)
                    hooks += [(name, partial(self._write, index, name)) for name in names_of(spec)]
            if hooks:
                stack.enter_context(self.model.hooks(hooks))
            yield

    @contextmanager
    def _running(self, inputs: Inputs, options: Mapping[str, Any]) -> Iterator[None]:
        check_pieces(self.model, self.specs, inputs, options)
        with self.model.turns.taken(running=True):  # the plan belongs to this run, even if threads share the block
            yield from self._planned(inputs)

    def _planned(self, inputs: Inputs) -> Iterator[None]:
        plan = Plan(inputs)
        for index, spec in enumerate(self.specs):
            if isinstance(spec, Ablate | Patch | Scale):
                plan.prepare(spec.positions, getattr(spec, "phase", "both"))
            elif isinstance(spec, Knockout | Redirect):
                plan.prepare(spec.query, spec.phase)
                plan.prepare(spec.key if isinstance(spec, Knockout) else spec.to)
            if isinstance(spec, Patch):
                self._sources[index] = self._source(spec, inputs)
        self._plan, self._fired = plan, set()
        try:
            yield
        finally:
            self._plan = None
        idle = [spec for index, spec in enumerate(self.specs) if index not in self._fired]
        if idle:
            where = getattr(idle[0], "positions", getattr(idle[0], "query", ""))
            raise ExperimentError(
                f"{idle[0]!r} changed nothing: no position {where!r} in phase {getattr(idle[0], 'phase', 'both')!r} "
                "was run",
                "interventions that act on these inputs",
                "choose other positions or another phase",
            )

    def _source(self, spec: Patch, inputs: Inputs) -> Any:
        if not isinstance(spec.source, Inputs):
            return spec.source
        inputs.check_same_layout(spec.source)
        if id(spec.source) not in (held := self._sources.setdefault(-1, {})):
            names = [name for other in self.specs if isinstance(other, Patch) and other.source is spec.source
                     for name in names_of(other)]  # fmt: skip
            with torch.no_grad():  # no plan is set yet, so the source run has no interventions
                held[id(spec.source)] = self.model.run_with_cache(spec.source, names_filter=names)[1]
        return held[id(spec.source)]

    # -- what the hooks do --

    def _edit(self, call: AttentionCall) -> Tensor | None:
        if self._plan is None:  # the model itself is run inside the block: no interventions
            return None
        z, batch = None, call.q.shape[0]
        for index, (spec, heads) in enumerate(zip(self.specs, self._heads, strict=True)):
            if heads is None or not heads[call.layer].any():
                continue
            chosen = heads[call.layer].to(call.z.device)
            where = self._rows(spec, *span(call), batch).to(call.z.device)
            if not where.any():
                continue
            now = call.z if z is None else z
            if isinstance(spec, Knockout | Redirect):
                to = spec.key if isinstance(spec, Knockout) else spec.to
                keys = for_beams(self._plan.keys(to, call), batch).to(where.device)
                if isinstance(spec, Knockout):
                    z, acted = knocked_out(call, now, where, keys, chosen)
                else:
                    z, acted = redirected(call, now, where, keys, spec.bias, chosen)
                if not acted:
                    continue
            else:
                assert isinstance(spec, Ablate | Scale)
                new = now * spec.factor if isinstance(spec, Scale) else replacement(spec, call, self._plan).to(now)
                z = torch.where(where[:, :, None, None] & chosen[None, None, :, None], new, now)
            self._fired.add(index)
        return z

    def _rows(self, spec: Any, start: int, stop: int, batch: int) -> Bool[Tensor, "batch pos"]:
        assert self._plan is not None
        if isinstance(spec, Knockout | Redirect):
            rows = self._plan.rows(spec.query, spec.phase, start, stop, written=("all", "text", "last"))
        else:
            rows = self._plan.rows(spec.positions, getattr(spec, "phase", "both"), start, stop)
        return for_beams(rows, batch)

    def _custom(self, index: int, value: Tensor, hook: Any) -> Tensor | None:
        spec = self.specs[index]
        assert isinstance(spec, Custom)
        if self._plan is None:
            return None
        self._fired.add(index)
        return spec.fn(value, hook)

    def _write(self, index: int, name: str, value: Tensor, hook: Any) -> Tensor | None:
        spec = self.specs[index]
        assert isinstance(spec, Ablate | Patch)
        if self._plan is None:
            return None
        start, stop = self.model.step.start, self.model.step.stop
        if isinstance(spec, Patch) and start >= self._plan.length:  # generated tokens have no counterpart
            return None
        where = self._rows(spec, start, stop, len(value)).to(value.device)
        if not where.any():
            return None
        layer = 0 if name == "hook_embed" else int(name.split(".")[1])
        by_row = spec.point in ("attn.hook_pattern", "attn.hook_attn_scores")  # [batch head query_pos key_pos]
        if isinstance(spec, Ablate):
            new = torch.zeros_like(value)
            if spec.to != "zero":
                new = drawn(spec, layer, self._plan, start, stop, batch=len(value))
        else:
            new = counterpart(for_beams(self._sources[index][name], len(value)), value, start, stop, by_row)
        chosen = where.reshape(*where.shape, *[1] * (value.ndim - 2))
        if isinstance(spec, Patch) and PATCHED[spec.point]:
            axis = 1 if by_row else 2
            chosen = where[:, None, :, None] if by_row else chosen
            heads = [head for at, head in spec.heads if at == layer] or range(value.shape[axis])
            mask = torch.zeros(value.shape[axis], dtype=torch.bool, device=value.device)
            mask[list(heads)] = True
            chosen = chosen & mask.reshape([-1 if dim == axis else 1 for dim in range(value.ndim)])
        self._fired.add(index)
        return torch.where(chosen, new.to(value), value)


def _head_mask(model: HookedMLLM, spec: Spec) -> Bool[Tensor, "layer head"] | None:
    """Which heads a spec changes inside attention; None if it does not act there."""
    if not (isinstance(spec, Knockout | Redirect | Scale) or (isinstance(spec, Ablate) and spec.point == Z)):
        return None
    mask = torch.zeros(model.cfg.n_layers, model.cfg.n_heads, dtype=torch.bool)
    for layer, head in spec.heads:
        mask[layer, head] = True
    if isinstance(spec, Knockout) and not spec.heads:
        mask[list(spec.layers) or slice(None)] = True
    return mask
