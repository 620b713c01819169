"""Attribution patching: an estimate of every cell of a patching sweep from a few forwards and backwards.

    metric = LogitDiff(sample.answer, sample.counterfactual.answer)
    found  = attribution(model, clean, corrupted, metric, over=("layer", "head"))
    found.effect.mean("example")                # like activation_patching's, in the same units
    found.attrs["rank_correlation"]             # with exact patching, on a sample of cells: can it be trusted?
    tokens = input_attribution(model, clean, metric, over="visual")

An estimate is first order: the change of an activation times the metric's slope there. Saturated softmaxes, and sets of
which any one member is enough, have a slope of zero and an effect that is not zero. There are three remedies: queries
and keys are sent through their softmax exactly (``qk_fix``), slopes can be averaged along a path between the two runs
(``ig_steps``), and every result is compared with exact patching (``check``).

For edges see ``edge_attribution``, for exact effects ``patching``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mech.arguments import Seed, Whole, checked, one_of
from mech.axes import EXAMPLE, HEAD, LAYER
from mech.data.samples import Samples
from mech.errors import ExperimentError
from mech.experiments.gradients import Slopes, between, check_smooth, differentiate, midpoints
from mech.experiments.metrics import AnyMetric, Metric
from mech.experiments.patching.plan import Given, Plan, Scores, Sweep, in_tower
from mech.experiments.patching.sweeps import KEYS, SQUARE, Patches, literal
from mech.experiments.statistics import spearman
from mech.indices import Layers
from mech.inputs import Inputs
from mech.inputs.layout import Where
from mech.model import AttentionCall, HookedMLLM
from mech.results import provenance

DIRECTIONS = ("denoise", "noise")
PATHS = ("embed", "point")
SOFTMAXED = ("attn.hook_q", "attn.hook_rot_q", "attn.hook_k", "attn.hook_rot_k")


@checked
def attribution(
    model: HookedMLLM,
    clean: Given,
    corrupted: Given | None,
    metric: AnyMetric,
    *,
    point: str = "attn.hook_z",
    over: Sequence[str] = (LAYER, HEAD),
    positions: Where = "all",
    regions: Sequence[Where] | Mapping[str, Where] | None = None,
    layers: Layers | None = None,
    ig_steps: Whole = 0,
    path: one_of(PATHS) = "embed",
    qk_fix: bool = True,
    direction: one_of(DIRECTIONS) = "denoise",
    check: Whole = 8,
    seed: Seed = 0,
) -> xr.Dataset:
    """The estimated effect of every patch of ``activation_patching``, checked against exact effects of some patches.

    ``metric = base + sum over the cell's places of (source - base) . d metric / d activation``, with the slope at the
    run that is patched into, or its mean along a path to the other run; ``effect`` is normalised as in
    ``activation_patching``.

    Sign: higher is more sufficient (denoising) or more necessary (noising); 0 is no effect. Unit: share of the gap.

    Args:
        model, clean, corrupted, metric, point, over, positions, regions, layers: as in ``activation_patching``.
        ig_steps: 0 for the slope at the run itself, else the number of midpoints on the path.
        path: what moves from one run to the other: ``"embed"``, the embeddings (visual ones included); ``"point"``, the
            point's activations, one layer at a time. Features added between layers (DeepStack) do not.
        qk_fix: at queries and keys without ``ig_steps``, recompute the attention of what is patched exactly, and use
            the slope at the pattern.
        direction: ``"denoise"`` (clean into corrupted) or ``"noise"``.
        check, seed: how many random cells are also patched exactly, 0 for none.

    Returns:
        ``effect`` and ``metric`` over (example, *over); ``clean`` and ``corrupted`` over example; ``exact`` and
        ``estimate``, effects over (example, check), with the coordinate ``cell``. Attributes: ``rank_correlation``
        (Spearman, over the checked cells), ``worst`` (the largest errors), ``forwards`` and ``backwards``.

    Raises:
        ExperimentError: as ``activation_patching``; a metric without a gradient. Raised before any forward.

    Cost: two forwards (noising: three) and one backward for each pair of inputs; with steps as many forwards and
    backwards more (``path="point"``: for each layer), and a forward for each checked cell. ``qk_fix`` adds two explicit
    attentions for each layer at queries, and at keys one for each layer and region, a group of heads at a time.
    Memory: the activations of the text stack from the first point on.

    References: Nanda 2023 (attribution patching); arXiv 2310.10348; 2403.00745 (q/k fix: AtP*; keys of a whole region
    are patched together here); 2403.17806 (integrated gradients; we take midpoints instead of right endpoints);
    2506.09047.
    """
    sweep = Sweep(point, tuple(over), positions, regions, layers)
    plans = sweep.plans(model, clean, corrupted, metric)
    for plan in plans:
        _check(model, plan, metric)
    cells = np.random.default_rng(seed).permutation(len(plans[0].cells))[:check]
    slope = _Slope(ig_steps, path, qk_fix and ig_steps == 0 and point.removeprefix("vision.") in SOFTMAXED)
    parts = [_estimated(model, plan, direction, slope, cells) for plan in plans]
    estimate, exact, ours, theirs = (torch.cat(v).double().cpu().numpy() for v in zip(*parts, strict=True))
    scores = Scores(estimate, *((theirs, ours) if direction == "denoise" else (ours, theirs)), direction)
    checked_cells = scores.effect_of(estimate)[:, cells], scores.effect_of(exact)
    coords = plans[0].coords(regions)
    labels = [_label(index, plans[0], coords) for index in cells]
    settings = sweep.settings(
        direction=direction, ig_steps=ig_steps, path=path if ig_steps else "none", qk_fix=int(slope.fixed)
    )
    passes = ig_steps * (len(plans[0].names) if path == "point" else 1)
    samples = clean if isinstance(clean, Samples) else None
    return xr.Dataset(
        {**scores.variables(plans[0], metric.unit), **compared(*checked_cells)},
        {EXAMPLE: np.arange(len(estimate)), **coords, "cell": ("check", labels)},
        {"model": model.name, **settings, "measure": repr(metric), **agreement_of(*checked_cells, labels)},
    ).assign_attrs(
        forwards=(2 + (direction == "noise") + passes + len(cells)) * len(plans), backwards=(1 + passes) * len(plans),
        provenance=provenance(model, samples, metric=metric, seed=seed, over=list(over), **settings),
    )  # fmt: skip


def _check(model: HookedMLLM, plan: Plan, metric: Metric) -> None:
    """Refuse metrics without a gradient, and points where rows cannot be told apart."""
    check_smooth(model, plan.readings, metric)
    if model.cfg.cross_layers and plan.point in KEYS:
        raise ExperimentError(
            f"{plan.point!r} of {model.name}, where keys are not positions in some layers",
            "a point indexed by position",
            "use attn.hook_z",
        )  # fmt: skip
    rows = len(plan.clean)
    if rows > 1 and (plan.point.startswith("vision.") or plan.point == "projector.hook_out"):
        raise ExperimentError(
            f"{rows} rows at {plan.point!r}, where the pictures of all rows form one batch", "one row at a time",
            "pass the rows as a list",
        )  # fmt: skip


def compared(estimate: np.ndarray, exact: np.ndarray) -> dict[str, Any]:
    """The two variables that compare an estimate with exact patching."""
    share = {"unit": "share of the gap between the runs"}
    return {"estimate": ((EXAMPLE, "check"), estimate, share), "exact": ((EXAMPLE, "check"), exact, share)}


def agreement_of(estimate: np.ndarray, exact: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """How well estimates agree with exact effects: rank correlation, and the largest errors in words."""
    known = ~np.isnan(exact + estimate)
    enough = known.sum() >= 3
    miss = np.where(known, abs(exact - estimate), -1.0)
    worst = np.dstack(np.unravel_index(np.argsort(-miss, axis=None)[:3], miss.shape))[0] if miss.size else []
    return {
        "rank_correlation": spearman(estimate[known], exact[known]) if enough else float("nan"),
        "worst": "; ".join(
            f"{labels[cell]} of example {row}: exact {exact[row, cell]:.3g}, estimate {estimate[row, cell]:.3g}"
            for row, cell in worst
            if known[row, cell]
        ),
    }


def _label(index: int, plan: Plan, coords: dict[str, Any]) -> str:
    places = np.unravel_index(index, [len(values) for values in plan.sizes.values()]) if plan.over else ()
    return ", ".join(f"{axis} {coords[axis][at]}" for axis, at in zip(plan.over, places, strict=True)) or "everything"


@dataclass(frozen=True)
class _Slope:
    """Where slopes are taken: at the run itself (no steps), or at midpoints of a path to the other run.

    ``fixed``: at the pattern instead of the query or key.
    """

    steps: int
    path: str
    fixed: bool


def _estimated(
    model: HookedMLLM, plan: Plan, direction: str, slope: _Slope, sample: np.ndarray
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Estimated metric of every cell, exact metric of the sampled ones, and the metric of the base and the source."""
    base, source = (plan.corrupted, plan.clean) if direction == "denoise" else (plan.clean, plan.corrupted)
    at = torch.as_tensor(plan.reads, device=model.device)
    bare, stack = plan.point.removeprefix("vision."), "vision" if plan.point.startswith("vision.") else "text"
    layers = [int(name.split("blocks.")[1].split(".")[0]) for name in plan.names] if slope.fixed else []
    seen: dict[int, AttentionCall] = {}
    embed = ["hook_embed"] if slope.steps and slope.path == "embed" and plan.point != "hook_embed" else []
    names = [*plan.names, *embed]
    with torch.no_grad(), model.attending(lambda call: seen.update({call.layer: call}) if slope.fixed else None, stack):
        logits, cache = model.run_with_cache(source, names_filter=names, logits_to_keep=at)
    clean_logits = logits
    if direction == "noise":  # the clean run is the one that is patched into
        with torch.no_grad():
            clean_logits = model(base, logits_to_keep=at)

    def score(run: Inputs) -> Tensor:
        return plan.scores(model(run, logits_to_keep=at), clean_logits)

    here = differentiate(model, base, names, score, attention=(stack, layers) if slope.fixed else None)
    if slope.steps:
        _along_path(model, base, here, cache, plan.names, score, slope)
    patches = Patches(plan.point, plan.cells, [in_tower(plan, mask, dict(cache)) for mask in plan.regions])
    masks = torch.stack(list(patches.regions)).to(model.device)
    if bare != plan.point or plan.point == "projector.hook_out":  # pictures of one row: their tokens are its own
        masks = masks.reshape(len(masks), 1, -1)
    sums = {}
    for index, name in enumerate(plan.names):
        if not slope.fixed:
            sums[name] = _summed(_first_order(cache[name], here, name), masks).to(here.scores.device)
            continue
        layer = layers[index]
        inside = here.calls[layer], seen[layer], here.slopes[layer]
        found = _summed(_of_queries(*inside), masks) if bare.endswith("q") else _of_keys(*inside, masks)
        sums[name] = found.to(here.scores.device)
    estimate = here.scores[:, None] + patches.sums(sums).to(here.scores)
    exact = here.scores.new_zeros(len(base), 0)
    if len(sample):
        exact = literal(model, base, replace(patches, cells=[plan.cells[i] for i in sample]), dict(cache), score)
    return estimate, exact, here.scores, plan.scores(logits, clean_logits)


def _along_path(
    model: HookedMLLM, base: Inputs, here: Slopes, source: Any, names: Sequence[str], score: Callable, slope: _Slope
) -> None:
    """Replace the slope at the base by the mean slope along the path."""
    ours = dict(here.values)
    groups = [(["hook_embed"], list(names))] if slope.path == "embed" else [([name], [name]) for name in names]
    for moved, read in groups:
        total = {name: torch.zeros_like(here.slopes[name]) for name in read}
        for share in midpoints(slope.steps):
            edits = [between(name, ours[name], source[name], share) for name in moved]
            step = differentiate(model, base, read, score, edits=edits)
            for name in read:
                total[name] += step.slopes[name] / slope.steps
        here.slopes.update(total)


def _first_order(source: Tensor, here: Slopes, name: str) -> Float[Tensor, "row pos head"]:
    """Change times slope at every place; points without heads count as one head."""
    wide = torch.promote_types(source.dtype, torch.float32)
    product = ((source.to(wide) - here.values[name].to(wide)) * here.slopes[name].to(wide)).sum(-1)
    if name.endswith(SQUARE):
        return product.transpose(1, 2)
    if name == "projector.hook_out":
        return product[None, :, None]
    return product if here.values[name].ndim == 4 else product[..., None]


def _summed(local: Float[Tensor, "row pos head"], masks: Tensor) -> Float[Tensor, "batch region head"]:
    if masks.shape[1] == 1 and local.shape[0] > 1:  # several tiles or windows of one row
        local = local.reshape(1, -1, local.shape[-1])
    if masks.shape[-1] != local.shape[1]:
        masks = masks[..., :1].expand(-1, -1, local.shape[1])
    return torch.einsum("rbp,bph->brh", masks.to(local), local)


def _groups(call: AttentionCall, slope: Float[Tensor, "batch pos head d_head"]) -> Any:
    """One key/value head at a time: its attention, which query heads share it, and the slope at their pattern."""
    size = call.q.shape[1] // call.k.shape[1]
    for kv in range(call.k.shape[1]):
        heads = slice(kv * size, (kv + 1) * size)
        group = replace(
            call, q=call.q[:, heads], k=call.k[:, kv : kv + 1], v=call.v[:, kv : kv + 1],
            sinks=None if call.sinks is None else call.sinks[heads],
        )  # fmt: skip
        # z = pattern @ v, so the slope at the pattern is a product, and no pattern has to be kept for the backward.
        yield kv, heads, group, torch.einsum("bqhd,bkd->bhqk", slope[:, :, heads], group.v[:, 0])


def _of_queries(call: AttentionCall, other: AttentionCall, slope: Tensor) -> Float[Tensor, "batch pos head"]:
    """The effect of the pattern that each patched query would make, by the slope at the pattern."""
    rows = torch.arange(call.q.shape[2], device=call.q.device)
    effects = []
    for _, heads, group, slopes in _groups(call, slope):
        change = replace(group, q=other.q[:, heads]).rows(rows) - group.rows(rows)
        effects.append((change * slopes).sum(-1))
    return torch.cat(effects, 1).transpose(1, 2)


def _of_keys(
    call: AttentionCall, other: AttentionCall, slope: Tensor, masks: Tensor
) -> Float[Tensor, "batch region kv_head"]:
    """The same for keys: all keys of a region are patched together, and every query's softmax is recomputed."""
    rows = torch.arange(call.q.shape[2], device=call.q.device)
    where = masks.expand(-1, len(call.q), call.k.shape[2])[:, :, None, :, None].to(call.k.device)
    effects = []
    for kv, _, group, slopes in _groups(call, slope):
        before, theirs = group.rows(rows), other.k[:, kv : kv + 1]
        changes = (replace(group, k=torch.where(region, theirs, group.k)).rows(rows) - before for region in where)
        effects.append(torch.stack([(change * slopes).sum((1, 2, 3)) for change in changes], 1))
    effect = torch.stack(effects, -1)
    return effect if masks.shape[1] == len(call.q) else effect.sum(0, keepdim=True)
