"""Clean and corrupted runs of some samples, kept so that any set of heads can be exchanged between them.

    runs = Runs.of(model, samples)
    runs.lost([(3, 1), (3, 4)])     # share of the gap each sample loses when these heads are noised
    runs.recovered([(3, 1)])        # share it recovers when they are denoised, all else corrupted
    runs.direct()                   # [example layer head]: what each head loses along its direct path to the logits

Shares are of the *mean* gap between the two runs, so that a sample without a gap neither counts more than others nor
causes a division by zero. Pictures are encoded once; z of both runs and what enters their layers are held in memory: a
set of heads is run from its first layer on.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mech.data.samples import Sample, Samples
from mech.errors import ExperimentError
from mech.experiments.metrics import LogitDiff, Reading
from mech.experiments.patching.paired import answers_apart, forced_inputs
from mech.experiments.patching.plan import pairs_of
from mech.inputs import Inputs, TokenLayout
from mech.model import HookedMLLM
from mech.model.partial.beginning import MOST, Beginning, beginning
from mech.model.partial.cached_run import cached_run
from mech.model.partial.continuation import Continuation

Pairs = Sequence[tuple[int, int]]
Cache = Mapping[str, Tensor]
Hooks = list[tuple[str, Callable]]
REGIONS = ("last", "evidence", "picture", "question", "template")


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples at once: inputs, the vision stack's output for them, z and scores, each (clean, corrupted)."""

    inputs: tuple[Inputs, Inputs]
    seen: tuple[dict, dict]
    readings: tuple[Reading, ...]
    z: tuple[Cache, Cache]
    scores: tuple[np.ndarray, np.ndarray]
    regions: Mapping[str, Bool[Tensor, "batch pos"]]
    begun: tuple[Beginning, Beginning] | None = None

    def __len__(self) -> int:
        return len(self.readings)


@dataclass(frozen=True, eq=False)
class Runs:
    """The runs of all samples. Made by ``Runs.of``."""

    model: HookedMLLM
    samples: Samples
    metric: LogitDiff
    pairs: tuple[tuple[Inputs, Inputs], ...]
    batches: tuple[Batch, ...]
    forced: bool = False  # whether both runs are given the right answer

    @classmethod
    def of(cls, model: HookedMLLM, samples: Sequence[Sample], batch_size: int = 16) -> "Runs":
        """Run both sides of every sample once.

        Raises:
            ExperimentError: a sample without a counterfactual of the same layout and another answer; a model that
                does not tell the two apart.
        """
        samples = Samples(samples)
        forced = both_given(model, samples)
        metric = answers_apart(samples)
        clean, corrupted = forced_inputs(model, samples, forced)
        pairs = tuple(pairs_of(model, clean, corrupted))
        batches = []
        for start in range(0, len(pairs), batch_size):
            some = range(start, min(start + batch_size, len(pairs)))
            joined = [model.collate([pairs[i][side] for i in some]) for side in (0, 1)]
            blind, seen = zip(*map(model.encode_pictures, joined), strict=True)
            layouts = joined[0].layouts
            readings = tuple(metric.reading(model, layout, i) for i, layout in zip(some, layouts, strict=True))
            regions = _regions(layouts, [sample for i, sample in enumerate(samples) if i in some])
            batch = Batch(blind, seen, readings, ({}, {}), (np.empty(0), np.empty(0)), regions)
            z, scores = zip(*(_observed(model, batch, side) for side in (0, 1)), strict=True)
            most = MOST * batch_size // (2 * len(pairs) + batch_size)
            begun = tuple(
                beginning(model, batch.inputs[side], most=most, **_options(model, batch, side)) for side in (0, 1)
            )
            batches.append(replace(batch, z=z, scores=scores, begun=begun))
        runs = cls(model, samples, metric, pairs, tuple(batches), forced)
        refuse_gap(model, runs.gap)
        return runs

    @property
    def clean(self) -> Float[np.ndarray, " example"]:
        return np.concatenate([batch.scores[0] for batch in self.batches])

    @property
    def corrupted(self) -> Float[np.ndarray, " example"]:
        return np.concatenate([batch.scores[1] for batch in self.batches])

    @property
    def gap(self) -> float:
        """The gap that shares refer to: the mean of clean minus corrupted, in logits."""
        return float((self.clean - self.corrupted).mean())

    def lost(self, heads: Pairs, region: str | None = None) -> Float[np.ndarray, " example"]:
        """Noising: what the clean runs lose when these heads take their values from the corrupted ones."""
        return (self.clean - self._patched(0, heads, region)) / self.gap

    def recovered(self, heads: Pairs) -> Float[np.ndarray, " example"]:
        """Denoising: what the corrupted runs gain when these heads take their values from the clean ones."""
        return (self._patched(1, heads, None) - self.corrupted) / self.gap

    def _patched(self, base: int, heads: Pairs, region: str | None) -> Float[np.ndarray, " example"]:
        found = []
        for batch in self.batches:
            where = None if region is None else batch.regions[region]
            hooks = swaps(batch.z[1 - base], heads, where)
            found.append(score(self.model, batch, base, hooks, min((layer for layer, _ in heads), default=0)))
        return np.concatenate(found)

    def direct(self) -> Float[np.ndarray, "example layer head"]:
        """What the clean runs lose along each head's direct path: only the final norm sees its changed output.

        Raises:
            NotResumable: a model whose layers cannot be run on only some rows.

        Cost: a forward for each sample.
        """
        return self.legs([batch.z[1] for batch in self.batches])[0]

    def legs(
        self, others: Sequence[Cache]
    ) -> tuple[Float[np.ndarray, "example layer head"], Float[np.ndarray, "example layer"]]:
        """What is lost directly at the logits if one head, or one MLP, puts out what it does in another run.

        ``others`` are the activations of that run, batch by batch: z, and ``hook_mlp_out`` if MLPs are wanted (0
        otherwise). Errors and cost are those of ``direct``.
        """
        parts = []
        for batch, cache in zip(self.batches, others, strict=True):
            reads = _reads(batch)
            seen = {"mm_encoder_outputs": dict(batch.seen[0])}
            kept = cached_run(self.model, {**batch.inputs[0].tensors, **seen}, reads)
            for row, reading in enumerate(batch.readings):
                rows = torch.tensor(reading.positions)
                scores = _straight(Continuation(self.model, kept, row, rows), cache, row, reading)
                parts.append((batch.scores[0][row] - scores) / self.gap)
        lost = np.stack(parts)
        return lost[..., :-1], lost[..., -1]


def swaps(source: Cache, heads: Pairs, where: Bool[Tensor, "batch pos"] | None = None, point: str = "z") -> Hooks:
    """Hooks that write some heads' values from another run, everywhere or at some positions of each row."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    found: Hooks = []
    for layer, chosen in by_layer.items():
        name = f"blocks.{layer}.attn.hook_{point}"

        def write(value: Tensor, hook: object, name: str = name, chosen: list[int] = chosen) -> Tensor:
            mask = torch.zeros(value.shape[:3], dtype=torch.bool, device=value.device)
            mask[:, :, chosen] = True if where is None else where.to(value.device)[..., None]
            return torch.where(mask[..., None], source[name], value)

        found.append((name, write))
    return found


@torch.no_grad()
def score(model: HookedMLLM, batch: Batch, side: int, hooks: Hooks, layer: int = 0) -> Float[np.ndarray, " batch"]:
    """The logit difference of every row of one side under hooks, none of them before ``layer``."""
    reads = _reads(batch)
    with model.hooks(hooks), nullcontext() if batch.begun is None else batch.begun[side].at(layer):
        logits = model(batch.inputs[side], **_options(model, batch, side))
    values = []
    for row, reading in enumerate(batch.readings):
        own = logits[row, [reads.index(p) for p in reading.positions]]
        values.append(float(reading.score(own[None], own)[0]))
    return np.array(values)


def _reads(batch: Batch) -> list[int]:
    return sorted({p for reading in batch.readings for p in reading.positions})


def _options(model: HookedMLLM, batch: Batch, side: int) -> dict[str, Any]:
    """What a run of one side takes besides its inputs."""
    at = torch.as_tensor(_reads(batch), device=model.device)
    return {"logits_to_keep": at, "mm_encoder_outputs": dict(batch.seen[side])}


def points(model: HookedMLLM, names: Sequence[str] = ("z",)) -> list[str]:
    return [f"blocks.{layer}.attn.hook_{name}" for layer in model.cfg.attention_layers for name in names]


def watched(cache: dict[str, Tensor], names: Sequence[str]) -> Hooks:
    """Hooks that record the named activations."""

    def keep(value: Tensor, hook) -> None:
        cache[hook.name] = value.detach()

    return [(name, keep) for name in names]


def _observed(model: HookedMLLM, batch: Batch, side: int) -> tuple[Cache, np.ndarray]:
    cache: dict[str, Tensor] = {}
    return cache, score(model, batch, side, watched(cache, points(model)))


def _straight(row: Continuation, other: Cache, example: int, reading: Reading) -> Float[np.ndarray, "layer component"]:
    """The metric when one component's change reaches the final norm and nothing else: every head, then the MLP."""
    model, rows = row.model, row.reads
    last = row.stream(len(row))[rows]
    streams = []
    for layer in model.cfg.attention_layers:
        z = other[f"blocks.{layer}.attn.hook_z"][example, rows]
        mlp = other.get(f"blocks.{layer}.hook_mlp_out")
        n = z.shape[1]
        change: dict[str, Tensor] = {}

        def write(value: Tensor, hook: object, z: Tensor = z, n: int = n) -> Tensor:
            own = torch.eye(n + 1, n, dtype=torch.bool, device=value.device)  # the last variant is unchanged
            return torch.where(own[:, None, :, None], z[None], value)

        def heads(value: Tensor, hook: object, change: dict[str, Tensor] = change) -> None:
            change["heads"] = value[:-1] - value[-1:]

        def behind(value: Tensor, hook: object, change: dict[str, Tensor] = change, mlp: Tensor | None = mlp) -> None:
            change["mlp"] = torch.zeros_like(value[-1:]) if mlp is None else mlp[example, rows][None] - value[-1:]

        x = row.stream(layer)[None, rows].expand(n + 1, -1, -1).clone()
        names = (f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_attn_out", f"blocks.{layer}.hook_mlp_out")
        row.run(layer, x, rows, keys="z", hooks=list(zip(names, (write, heads, behind), strict=True)))
        streams += [last + change["heads"], last + change["mlp"]]
    logits = row.logits(torch.cat(streams))
    scores = reading.score(logits, logits[0]).double().cpu().numpy()  # this metric ignores the clean logits
    return scores.reshape(len(model.cfg.attention_layers), -1)


def _regions(layouts: Sequence[TokenLayout], samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Every position in one of ``REGIONS``; padding in none."""
    masks = {name: torch.zeros(len(layouts), len(layouts[0]), dtype=torch.bool) for name in REGIONS}
    for row, (layout, sample) in enumerate(zip(layouts, samples, strict=True)):
        free = np.zeros(len(layout), dtype=bool)
        free[layout.positions("all")] = True
        named = {"last": "last", "evidence": sample.evidence, "picture": "image", "question": "question"}
        if layout.memory is not None:  # visual tokens are not in the sequence
            named = {"last": "last", "question": "question"}
        for name, where in named.items():
            at = layout.positions(where) if len(where) else np.empty(0, dtype=int)
            masks[name][row, at[free[at]]] = True
            free[at] = False
        masks["template"][row, torch.as_tensor(free)] = True
    return masks


def both_given(model: HookedMLLM, samples: Samples) -> bool:
    """Whether both runs must be given the right answer, as answers that begin alike are read where they differ.

    Raises:
        ExperimentError: fewer than two samples, or one without a counterfactual.
    """
    lacking = [sample.id or str(i) for i, sample in enumerate(samples) if sample.counterfactual is None]
    if lacking or len(samples) < 2:
        first = f"{len(lacking)} samples without a counterfactual, the first is {lacking[0]!r}" if lacking else ""
        raise ExperimentError(
            first or "one sample", "at least two samples, each with a counterfactual", "set Sample.counterfactual"
        )
    return any(_fork(model, one.answer, one.counterfactual.answer) for one in samples if one.counterfactual)


def refuse_gap(model: HookedMLLM, gap: float) -> None:
    """Refuse a model that does not tell samples from their counterfactuals.

    Raises:
        ExperimentError: clean runs are no better than corrupted ones.
    """
    if not gap > 0:
        raise ExperimentError(
            f"{model.name} prefers the right answer by {gap:.2g} logits more in the clean runs than in the corrupted "
            "ones", "a model that tells the two apart", "use samples it can answer",
        )  # fmt: skip


def _fork(model: HookedMLLM, answer: str, other: str) -> int:
    """After how many common tokens two answers differ."""
    ids = zip(model.processor.answer_ids(answer), model.processor.answer_ids(other), strict=False)
    return next((i for i, (a, b) in enumerate(ids) if a != b), 0)
