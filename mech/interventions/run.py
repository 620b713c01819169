"""Specs -> a model that runs with them.

    with intervene(model, Ablate(heads=ranking.top(0.05), to="mean", reference=train)) as ablated:
        logits = ablated(inputs)
        text   = ablated.generate_text(inputs)      # the KV cache is on, the heads stay ablated

Ablation acts where a head's output leaves attention, before ``hook_z`` fires, so hooks and caches see the ablated
values. Leaving the block leaves nothing behind.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int

from mech.errors import ExperimentError
from mech.inputs import PADDING, Inputs, TokenLayout
from mech.interventions.reference import TEXT_KIND, Reference, kinds, reference_activations
from mech.interventions.specs import Ablate
from mech.model import AttentionCall, HookedMLLM

ROWS = 512  # query rows at once where a mask is averaged over: bounds memory at 512 x S


@contextmanager
def intervene(model: HookedMLLM, *specs: Ablate) -> Iterator["Intervened"]:
    """A view of ``model`` whose runs all pass through ``specs``.

    Raises:
        ExperimentError: a spec that does not fit the model (before any forward); a spec that changed nothing in a run.

    Cost: of the forward alone; samples given as ``reference`` cost one forward each, once.
    """
    if not specs:
        raise ExperimentError("no intervention", "at least one", "pass mech.Ablate(heads=..., to='mean', ...)")
    for spec in specs:
        spec.check(model)
    intervened = Intervened(model, tuple(_with_activations(spec, model) for spec in specs))
    with model.attending(intervened._edit):
        yield intervened


def _with_activations(spec: Ablate, model: HookedMLLM) -> Ablate:
    """The spec with the activations of its reference samples in place of the samples."""
    if spec.to not in ("mean", "resample") or spec.reference is None or isinstance(spec.reference, Reference):
        return spec
    return replace(spec, reference=reference_activations(model, spec.reference))


class Intervened:
    """What ``intervene`` yields: call it, or let it generate, as the model itself."""

    def __init__(self, model: HookedMLLM, specs: tuple[Ablate, ...]):
        self.model, self.specs = model, specs
        self._heads = [_head_mask(model, spec) for spec in specs]
        self._plan: _Plan | None = None
        self._fired: set[int] = set()

    def __repr__(self) -> str:
        return f"Intervened({self.model.name}, {', '.join(map(repr, self.specs))})"

    def __call__(self, inputs: Inputs, **options: Any) -> Float[torch.Tensor, "batch pos vocab"]:
        """The logits of ``inputs`` under the interventions."""
        with self._running(inputs):
            return self.model(inputs, **options)

    def run_with_cache(self, inputs: Inputs, **options: Any):
        """``HookedMLLM.run_with_cache`` under the interventions."""
        with self._running(inputs):
            return self.model.run_with_cache(inputs, **options)

    def generate(self, inputs: Inputs, **options: Any) -> Int[torch.Tensor, "batch new_pos"]:
        """``HookedMLLM.generate`` under the interventions."""
        with self._running(inputs):
            return self.model.generate(inputs, **options)

    def generate_text(self, inputs: Inputs, **options: Any) -> list[str]:
        """``HookedMLLM.generate_text`` under the interventions."""
        with self._running(inputs):
            return self.model.generate_text(inputs, **options)

    @contextmanager
    def _running(self, inputs: Inputs) -> Iterator[None]:
        self._plan, self._fired = _Plan(inputs, self.specs), set()
        try:
            yield
        finally:
            self._plan = None
        idle = [spec for index, spec in enumerate(self.specs) if index not in self._fired]
        if idle:
            raise ExperimentError(
                f"{idle[0]!r} changed nothing: no position {idle[0].positions!r} in phase {idle[0].phase!r} was run",
                "interventions that act on these inputs",
                "choose other positions or another phase",
            )

    def _edit(self, call: AttentionCall) -> torch.Tensor | None:
        if self._plan is None:  # the model is run directly inside the block: it is not intervened on
            return None
        z = None
        for index, (spec, heads) in enumerate(zip(self.specs, self._heads, strict=True)):
            chosen = heads[call.layer].to(call.z.device)
            if not chosen.any():
                continue
            where = self._plan.where(index, call).to(call.z.device)
            if not where.any():
                continue
            self._fired.add(index)
            z = call.z if z is None else z
            new = self._plan.replacement(spec, call).to(z)
            z = torch.where(where[:, :, None, None] & chosen[None, None, :, None], new, z)
        return z


def _head_mask(model: HookedMLLM, spec: Ablate) -> Bool[torch.Tensor, "layer head"]:
    mask = torch.zeros(model.cfg.n_layers, model.cfg.n_heads, dtype=torch.bool)
    for layer, head in spec.heads:
        mask[layer, head] = True
    return mask


class _Plan:
    """Where each spec acts in one run, worked out from the layouts before the run."""

    def __init__(self, inputs: Inputs, specs: tuple[Ablate, ...]):
        self.length = len(inputs.layouts[0].kind)
        self.kind = torch.stack([kinds(layout) for layout in inputs.layouts])
        self.chosen = [torch.stack([_positions(spec, layout) for layout in inputs.layouts]) for spec in specs]
        # A teacher-forced answer is not part of the prompt: it must not be seen by it, nor decide its draws.
        self.prompt_end = torch.tensor([min(layout.spans.get("answer") or [self.length]) for layout in inputs.layouts])
        self.seeds = [
            zlib.crc32(row[:end][row_kind[:end] >= 0].numpy().tobytes())
            for row, row_kind, end in zip(inputs.tensors["input_ids"].cpu(), self.kind, self.prompt_end, strict=True)
        ]
        self.specs = specs
        self._draws: dict[tuple[int, int], torch.Tensor] = {}

    def where(self, index: int, call: AttentionCall) -> Bool[torch.Tensor, "batch pos"]:
        """The query rows of this call on which spec ``index`` acts."""
        spec, (start, stop) = self.specs[index], _span(call)
        known = self.chosen[index][:, start : min(stop, self.length)]
        generated = spec.positions in ("all", "text") and spec.phase != "prefill"
        rows = torch.full((len(known), stop - max(start, self.length)), generated) if stop > self.length else None
        return _for_beams(known if rows is None else torch.cat([known, rows], dim=1), call)

    def replacement(self, spec: Ablate, call: AttentionCall) -> Float[torch.Tensor, "batch pos head d_head"]:
        """What the heads put out instead."""
        if spec.to == "zero":
            return torch.zeros_like(call.z)
        if spec.to == "uniform":
            return _grouped(_mean_of_visible(call), call)
        if spec.to == "paper":
            return _grouped(_mean_of_all(call, _for_beams(self.prompt_end, call)), call)
        reference = spec.reference
        if not isinstance(reference, Reference):
            raise ExperimentError(f"{spec!r} without reference activations", "a Reference", "run it through intervene")
        start, stop = _span(call)
        kind = torch.nn.functional.pad(self.kind, (0, max(0, stop - self.length)), value=TEXT_KIND)[:, start:stop]
        kind = _for_beams(kind, call).clamp(min=0).to(reference.mean.device)
        if spec.to == "mean":
            return reference.mean[kind, call.layer]
        draw = _for_beams(self.draw(spec, reference.draws.shape[1], start, stop), call).to(reference.draws.device)
        return reference.draws[kind, draw, call.layer]

    def draw(self, spec: Ablate, n: int, start: int, stop: int) -> Int[torch.Tensor, "batch pos"]:
        """Which draw each position takes: the same in every layer, whatever else is in the batch."""
        rows = []
        for row, seed in enumerate(self.seeds):
            if (spec.seed, row) not in self._draws:
                generator = torch.Generator().manual_seed(spec.seed * 1_000_003 + seed)
                self._draws[spec.seed, row] = torch.randint(n, (4096,), generator=generator)
            padding = int((self.kind[row] < 0).sum())
            rows.append(self._draws[spec.seed, row][(torch.arange(start, stop) - padding) % 4096])
        return torch.stack(rows)


def _positions(spec: Ablate, layout: TokenLayout) -> Bool[torch.Tensor, " pos"]:
    """The positions of a prompt on which a spec acts; a teacher-forced answer is what decoding would write."""
    chosen = torch.zeros(len(layout.kind), dtype=torch.bool)
    answer = list(layout.spans.get("answer", ()))
    real = torch.as_tensor(layout.kind) != PADDING
    written = torch.zeros_like(chosen)
    written[answer] = True
    if spec.positions == "last":
        chosen[int((real & ~written).nonzero()[-1])] = True
    elif spec.positions == "image" and not (kinds(layout) == 1).any():
        return chosen
    else:
        chosen[torch.as_tensor(layout.positions(spec.positions))] = True
    if spec.phase == "prefill":
        chosen &= ~written
    elif spec.phase == "decode":
        chosen &= written
    return chosen


def _span(call: AttentionCall) -> tuple[int, int]:
    return call.query_start, call.query_start + call.q.shape[2]


def _for_beams(rows: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """Generation may run several continuations of each row, one after the other."""
    times = call.q.shape[0] // len(rows)
    return rows.repeat_interleave(times, dim=0) if times > 1 else rows


def _grouped(mean: Float[torch.Tensor, "batch kv_head pos d_head"], call: AttentionCall) -> torch.Tensor:
    return repeat(mean, "batch kv pos d -> batch pos (kv group) d", group=call.q.shape[1] // mean.shape[1])


def _mean_of_visible(call: AttentionCall) -> Float[torch.Tensor, "batch kv_head pos d_head"]:
    start, stop = _span(call)
    v = call.v.float()
    if call.mask is None and call.causal:
        count = torch.arange(1, v.shape[2] + 1, device=v.device)[:, None]
        return (v.cumsum(2) / count)[:, :, start:stop]
    means = []
    for first in range(0, stop - start, ROWS):
        rows = torch.arange(first, min(first + ROWS, stop - start), device=v.device)
        weight = call.visible(rows)[:, 0].float()
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=1)
        means.append(torch.einsum("brk,bhkd->bhrd", weight, v))  # not `@`: that would copy the weights for every head
    return torch.cat(means, dim=2)


def _mean_of_all(
    call: AttentionCall, prompt_end: Int[torch.Tensor, " batch"]
) -> Float[torch.Tensor, "batch kv_head pos d_head"]:
    """Every row of the prompt sees the whole prompt; a row behind it sees what has been written by then."""
    start, stop = _span(call)
    # The last row sees every key that is not padding.
    real = call.visible([call.q.shape[2] - 1])[..., 0, :, None].float()
    mean = (call.v.float() * real).cumsum(2) / real.cumsum(2).clamp(min=1)
    rows = torch.arange(start, stop, device=mean.device)
    seen = torch.maximum(rows[None], prompt_end.to(mean.device)[:, None] - 1).clamp(max=mean.shape[2] - 1)
    return mean.gather(2, seen[:, None, :, None].expand(-1, mean.shape[1], -1, mean.shape[3]))
