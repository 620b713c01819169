"""Activation patching: which head, layer, position or region carries the difference between two runs.

    clean, corrupted = model.inputs_of(sample), model.inputs_of(sample.counterfactual)
    metric = LogitDiff(sample.answer, sample.counterfactual.answer)
    heads = activation_patching(model, clean, corrupted, metric, over=("layer", "head"), positions="question")
    grid  = activation_patching(model, clean, corrupted, metric, point="hook_resid_post", over=("layer", "region"),
                                regions=clean.layout.cells(6, 6))
    heads.effect.mean("example")

Denoising writes activations of the clean run into the corrupted one and shows what is *sufficient*; noising does the
reverse and shows what is *necessary*. In both directions 0 is no effect, and 1 means that the whole answer is restored
(denoising) or lost (noising).

Sweeps are exact. In text stacks whose layers can be run from the middle, all cells share one pass
(``sweeps.Wavefront``); everywhere else each cell takes its own forward. The result says which algorithm was used.

For *paths* see ``mech.experiments.paths.path_patching``; for estimates see ``candidates``.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mech.arguments import Amount, Progress, checked, one_of
from mech.axes import EXAMPLE, HEAD, LAYER
from mech.data.samples import Samples
from mech.errors import ExperimentError
from mech.experiments.metrics import AnyMetric
from mech.experiments.patching.candidates import estimates
from mech.experiments.patching.plan import EFFECT, POINTS, Given, Plan, Regions, Scores, Sweep, in_tower
from mech.experiments.patching.sweeps import Patches, Wavefront, literal
from mech.indices import Layers
from mech.inputs import Inputs
from mech.inputs.layout import Where
from mech.model import HookedMLLM
from mech.model.partial.cached_run import BufferPool, CachedRun, NotResumable, cached_run, last_mlp_at
from mech.model.partial.continuation import Continuation
from mech.model.partial.room import too_large
from mech.results import provenance

METHODS = ("auto", "wavefront", "literal", "screened")
DIRECTIONS = ("denoise", "noise")


@checked
def activation_patching(
    model: HookedMLLM,
    clean: Given,
    corrupted: Given | None,
    metric: AnyMetric,
    *,
    point: str = "attn.hook_z",
    over: Sequence[str] = (LAYER, HEAD),
    positions: Where = "all",
    regions: Regions | None = None,
    layers: Layers | None = None,
    direction: one_of(DIRECTIONS) = "denoise",
    method: one_of(METHODS) = "auto",
    confirm: Amount = 0.15,
    progress: Progress | None = None,
) -> xr.Dataset:
    """The metric after each patch, and how far the patch moves it from the run patched into (0) to the other run (1).

    ``effect = (metric - corrupted) / (clean - corrupted)`` when denoising, ``(clean - metric) / (clean - corrupted)``
    when noising; nan where both runs score the same.

    Sign: more is more sufficient (denoising), more necessary (noising); 0 is no effect. Unit: share of the gap.

    Args:
        model: a hooked model.
        clean: ``Inputs`` (any number of rows), a ``Sample``, or a list of either.
        corrupted: the same inputs with other evidence and the same layout; None for the samples' counterfactuals.
        metric: see ``mech.experiments.metrics``.
        point: an activation point without its layer (``"hook_resid_post"``, ``"vision.attn.hook_z"``); or
            ``"hook_embed"``, ``"projector.hook_out"``.
        over: the axes of the sweep, in the order of the result: ``layer``, ``head`` (``kv_head`` at keys and values),
            ``position`` or ``region``. Along axes that are not named, everything is patched at once.
        positions: where to patch, as ``TokenLayout.positions`` takes it; with ``position`` in ``over``, each position
            separately.
        regions: for ``region`` in ``over``: anything that ``TokenLayout.positions`` takes; a mapping names the regions.
        layers: which layers; all by default.
        direction: ``"denoise"`` or ``"noise"``.
        method: ``"wavefront"`` and ``"literal"`` force an algorithm; both give the same result. ``"screened"``
            estimates all cells from gradients and patches only those with the largest estimates.
        confirm: how many cells (int) or what share of them (float) a screened sweep patches.
        progress: called with (cells done, cells in total), counted over all examples.

    Returns:
        ``effect`` and ``metric`` over (example, *over); ``clean`` and ``corrupted`` over example. Attributes: point,
        positions, direction, algorithm (and the reason if it is not the wavefront), the cost in forwards. A screened
        sweep also has ``confirmed`` and ``estimate`` (of ``effect``); cells that were not patched are nan.

    Raises:
        ExperimentError: layouts that differ (the message names the first difference), axes the point does not have, or
            an answer that cannot be read off the inputs. Raised before any forward.
        PointError: the point is misspelt or not live in this model.

    Cost: two forwards plus the sweep: for a wavefront see ``attrs["forwards"]``, literally one forward per cell.
    Screening adds two forwards and two backwards (counted as four forwards).

    References: arXiv 2202.05262, 2211.00593, 2309.16042 (metrics), 2404.15255 (directions), 2406.16320 (normalisation;
    there the corrupted run is 0 in both directions).
    """
    sweep = Sweep(point, tuple(over), positions, regions, layers)
    plans = sweep.plans(model, clean, corrupted, metric)
    if method == "screened":
        plans = [replace(plan, confirm=plan.count(confirm)) for plan in plans]
    tick = _counter(progress, sum((plan.confirm or len(plan.cells)) * len(plan.clean) for plan in plans))
    parts = [swept(model, plan, direction, method, tick) for plan in plans]
    values, ours, theirs = _joined((part.values, part.clean, part.corrupted) for part in parts)
    scores = Scores(values, ours, theirs, direction)
    data = scores.variables(plans[0], metric.unit)
    if method == "screened":
        dims, shape = data["effect"][0], data["effect"][1].shape
        (estimate,) = _joined((part.estimate,) for part in parts)
        base = scores.corrupted if direction == "denoise" else scores.clean
        data["estimate"] = (dims, scores.effect_of(base[:, None] + estimate).reshape(shape), dict(EFFECT))
        data["confirmed"] = (dims, np.isfinite(scores.metric).reshape(shape))
    settings = sweep.settings(direction=direction, algorithm=parts[0].algorithm, reason=parts[0].reason)
    samples = clean if isinstance(clean, Samples) else None
    attrs = {
        "model": model.name,
        **settings,
        "measure": repr(metric),
        "forwards": sum(part.forwards for part in parts),
        "provenance": provenance(model, samples, metric=metric, over=list(over), **settings),
    }
    return xr.Dataset(data, {EXAMPLE: np.arange(len(scores.metric)), **plans[0].coords(regions)}, attrs)


def _counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """A function that counts finished cells and reports every one to ``progress``."""
    done = itertools.count(1)

    def tick(times: int = 1) -> None:
        for _ in range(times):
            count = next(done)
            if progress:
                progress(count, total)

    return tick


def _joined(parts: Iterable[tuple[Tensor, ...]]) -> list[np.ndarray]:
    return [torch.cat(values).double().cpu().numpy() for values in zip(*parts, strict=True)]


@dataclass(frozen=True, eq=False)
class _Part:
    """The result of one pair of runs: the metric of every cell, and of the two runs."""

    values: Tensor
    clean: Tensor
    corrupted: Tensor
    algorithm: str
    reason: str
    forwards: float
    estimate: Tensor


def swept(model: HookedMLLM, plan: Plan, direction: str, method: str, tick: Callable[[int], None]) -> _Part:
    """The metric of the plan's cells and of the two runs.

    Raises:
        ExperimentError: one forward of the runs does not fit into memory.
    """
    try:
        return _swept(model, plan, direction, method, tick)
    except torch.OutOfMemoryError:
        raise too_large(f"a forward of {len(plan.clean)} x {len(plan.clean.layouts[0])} positions") from None


@torch.no_grad()
def _swept(model: HookedMLLM, plan: Plan, direction: str, method: str, tick: Callable[[int], None]) -> _Part:
    base, source = (plan.corrupted, plan.clean) if direction == "denoise" else (plan.clean, plan.corrupted)
    at = torch.as_tensor(plan.reads, device=model.device)
    written, source_logits = _written(model, source, plan)
    cached, reason = _if_exact(lambda: _cached(model, base, plan), method)
    base_logits = model(base, logits_to_keep=at) if cached is None else cached.logits
    clean_logits = source_logits if direction == "denoise" else base_logits
    ends = [plan.scores(logits, clean_logits) for logits in (source_logits, base_logits)]
    if direction == "noise":
        ends.reverse()

    def score(run: Inputs) -> Tensor:
        return plan.scores(model(run, logits_to_keep=at), clean_logits)

    every = Patches(plan.point, plan.cells, [in_tower(plan, mask, written) for mask in plan.regions])
    patches, estimate, forwards = every, ends[0].new_zeros(0), 2.0
    if plan.confirm is not None:
        estimate = estimates(model, base, source, every, plan.names, score)
        best = estimate.abs().mean(0).argsort(descending=True)[: plan.confirm]
        patches, forwards = replace(every, cells=[plan.cells[i] for i in sorted(best.tolist())]), forwards + 4
    exact = None
    if cached is not None:
        exact, reason = _if_exact(lambda: _wavefront(model, plan, cached, patches, written, clean_logits, tick), method)
    if exact is None:
        exact = literal(model, base, patches, written, score, lambda: tick(len(base))), len(patches.cells)
    algorithm = "literal" if reason else "wavefront"
    values = exact[0]
    if plan.confirm is not None:
        values = values.new_full((len(base), len(plan.cells)), float("nan"))
        values[:, [plan.cells.index(cell) for cell in patches.cells]] = exact[0]
    return _Part(values, ends[0], ends[1], algorithm, reason, forwards + exact[1], estimate)


def _if_exact(run: Callable[[], Any], method: str) -> tuple[Any, str]:
    """The result of ``run``, or None and the reason why the model or sweep cannot be run from the middle."""
    if method == "literal":
        return None, "asked for"
    try:
        return run(), ""
    except NotResumable as error:
        if method == "wavefront":
            raise ExperimentError(
                f"method='wavefront': {error}", "a model and sweep it is exact for", "use method='auto'"
            ) from None
        return None, str(error)


def _written(model: HookedMLLM, source: Inputs, plan: Plan) -> tuple[dict[str, Tensor], Tensor]:
    """A run's activations at the patched points, and its logits at the positions that the metric reads."""
    written: dict[str, Tensor] = {}
    pool = BufferPool(len(plan.names))
    keep = [(name, lambda value, hook: written.update({hook.name: pool.put(value)})) for name in plan.names]
    with model.hooks(keep), last_mlp_at(model, plan.reads):
        logits = model(source, logits_to_keep=torch.as_tensor(plan.reads, device=model.device))
    if silent := [name for name in plan.names if name not in written]:
        raise ExperimentError(f"nothing passed through {silent[0]!r}", "inputs with a picture", "choose another point")
    return written, logits


def _cached(model: HookedMLLM, base: Inputs, plan: Plan) -> CachedRun:
    if plan.point not in POINTS:
        raise NotResumable(f"{plan.point} lies before the text layers")
    if any(len(cell.layers) > 1 for cell in plan.cells):
        raise NotResumable("several layers are patched at once")
    return cached_run(model, base, plan.reads)


def _wavefront(
    model: HookedMLLM, plan: Plan, cached: CachedRun, patches: Patches, written: dict[str, Tensor],
    clean_logits: Tensor, tick: Callable[[int], None],
) -> tuple[Tensor, float]:  # fmt: skip
    """The metric of every cell from one pass per row, and the cost in forwards."""
    rows = [Continuation(model, cached, i, torch.tensor(reading.positions))
            for i, reading in enumerate(plan.readings)]  # fmt: skip
    values = []
    for i, (row, reading) in enumerate(zip(rows, plan.readings, strict=True)):
        mine = {name: value[i : i + 1] for name, value in written.items()}
        clean_row = clean_logits[i, plan.places[i]]
        wavefront = Wavefront(row, plan.point, mine, [mask[i].cpu() for mask in patches.regions])
        score = lambda logits, r=reading, c=clean_row: r.score(logits, c)  # noqa: E731
        values.append(wavefront.measure(patches.cells, score, lambda: tick(1), check=i == 0))
    whole = len(cached.layers) * cached.last.shape[0] * cached.last.shape[1]
    return torch.stack(values), sum(row.row_layers for row in rows) / whole
