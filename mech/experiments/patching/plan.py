"""A requested patching sweep, checked and resolved before any forward: pairs of runs, cells, positions.

A *cell* of the sweep is one patch. A ``Sweep`` is the request. ``Plan.of`` turns its axes, picture regions and span
names into cells and position masks for one pair of runs, and refuses comparisons of things that do not correspond.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mech.axes import EXAMPLE, HEAD, LAYER
from mech.data.regions import where_in_words
from mech.data.samples import Sample
from mech.errors import ExperimentError, suggestion
from mech.experiments.metrics import Metric, Reading
from mech.experiments.patching.sweeps import BEHIND_ATTENTION, ENTRY, KEYS, QUERIES, Cell, names_of
from mech.indices import indices
from mech.inputs import Inputs
from mech.inputs.layout import Where
from mech.model import HookedMLLM

KV_HEAD, POSITION, REGION = "kv_head", "position", "region"
POINTS = (*ENTRY, *BEHIND_ATTENTION, *QUERIES, *KEYS)
EFFECT = {"unit": "share of the gap between the runs", "sign": "0: no effect, 1: all that differs between the runs"}
GLOBAL = ("hook_embed", "projector.hook_out")
Regions = Mapping[str, Where] | Sequence[Where]
Given = Inputs | Sample | Sequence[Inputs] | Sequence[Sample]


def pairs_of(model: HookedMLLM, clean: Given, corrupted: Given | None) -> list[tuple[Inputs, Inputs]]:
    """Pairs of clean and corrupted inputs with the same layout, built from samples where samples are given."""
    ours = [clean] if isinstance(clean, Inputs | Sample) else list(clean)
    if corrupted is None:
        missing = [sample for sample in ours if not isinstance(sample, Sample) or sample.counterfactual is None]
        if missing:
            raise ExperimentError(
                "nothing corrupted was given", "samples with a counterfactual, or corrupted inputs", "pass corrupted"
            )
        theirs: list[Any] = [sample.counterfactual for sample in ours if isinstance(sample, Sample)]
    else:
        theirs = [corrupted] if isinstance(corrupted, Inputs | Sample) else list(corrupted)
    if len(ours) != len(theirs) or not ours:
        raise ExperimentError(
            f"{len(ours)} clean and {len(theirs)} corrupted inputs", "the same number of each, at least one"
        )
    pairs = []
    for sample, other in zip(ours, theirs, strict=True):
        pair = [model.inputs_of(given) if isinstance(given, Sample) else given for given in (sample, other)]
        pair[0].check_same_layout(pair[1])
        pairs.append((pair[0], pair[1]))
    return pairs


@dataclass(frozen=True, eq=False)
class Plan:
    """One pair of runs, checked and resolved to positions and cells; nothing is run yet."""

    clean: Inputs
    corrupted: Inputs
    point: str
    over: tuple[str, ...]
    sizes: dict[str, list[int]]
    cells: list[Cell]
    regions: list[Tensor]
    readings: list[Reading]
    names: list[str]
    confirm: int | None = None  # how many cells are patched, if not all

    @classmethod
    def of(
        cls, model: HookedMLLM, clean: Inputs, corrupted: Inputs, metric: Metric, sweep: "Sweep", example: int = 0
    ) -> "Plan":
        """The plan of a sweep for one pair of runs. Its first row is example number ``example`` of the metric."""
        sweep.check()
        point, over, vision = sweep.point, sweep.over, sweep.point.startswith("vision.")
        chosen = [] if point in GLOBAL else _layers(model, point.removeprefix("vision."), vision, sweep.layers)
        names = names_of(point, chosen)
        model.select(names)
        masks, places = _regions(clean, sweep.positions, sweep.regions, POSITION in over and not vision)
        heads = {HEAD: model.cfg.vision_heads if vision else model.cfg.n_heads, KV_HEAD: model.cfg.n_kv_heads}
        sizes = {
            LAYER: chosen,
            **{axis: list(range(size)) for axis, size in heads.items()},
            POSITION: places,
            REGION: list(range(len(masks))),
        }
        cells = []
        for values in itertools.product(*(range(len(sizes[axis])) for axis in over)):
            at = dict(zip(over, values, strict=True))
            cells.append(
                Cell(
                    (chosen[at[LAYER]],) if LAYER in at else tuple(chosen),
                    at.get(HEAD, at.get(KV_HEAD)),
                    at.get(POSITION, at.get(REGION, 0)),
                )
            )
        readings = [metric.reading(model, layout, example + i) for i, layout in enumerate(clean.layouts)]
        return cls(clean, corrupted, point, over, {a: sizes[a] for a in over}, cells, masks, readings, names)

    def coords(self, regions: Regions | None) -> dict[str, Any]:
        """The coordinates of the result's axes."""
        coords: dict[str, Any] = dict(self.sizes)
        if regions is not None:
            coords[REGION] = (
                list(regions) if isinstance(regions, Mapping) else [where_in_words(region) for region in regions]
            )
        return coords

    @property
    def reads(self) -> list[int]:
        """All positions that the metric reads in any example."""
        return sorted({position for reading in self.readings for position in reading.positions})

    @property
    def places(self) -> list[list[int]]:
        """For every example, the indices of its positions in ``reads``."""
        return [[self.reads.index(p) for p in reading.positions] for reading in self.readings]

    def count(self, confirm: int | float) -> int:
        """How many cells ``confirm`` means: an int is a number, a float a share of the cells (at least one)."""
        n = len(self.cells)
        if isinstance(confirm, int) and 1 <= confirm <= n:
            return confirm
        if isinstance(confirm, float) and 0 < confirm < 1:
            return max(1, round(confirm * n))
        raise ExperimentError(f"confirm={confirm!r} of {n} cells", f"1 to {n}, or a share between 0 and 1", "use 0.15")

    def scores(self, logits: Tensor, clean: Tensor) -> Tensor:
        """The metric of every row of a batch."""
        values = [r.score(logits[i : i + 1, at], clean[i, at])
                 for i, (r, at) in enumerate(zip(self.readings, self.places, strict=True))]  # fmt: skip
        return torch.cat(values)


@dataclass(frozen=True)
class Sweep:
    """What a sweep patches, as requested; see the arguments of ``activation_patching``."""

    point: str = "attn.hook_z"
    over: tuple[str, ...] = (LAYER, HEAD)
    positions: Where = "all"
    regions: Regions | None = None
    layers: Iterable[int] | None = None

    def plans(self, model: HookedMLLM, clean: Given, corrupted: Given | None, metric: Metric) -> list[Plan]:
        """One plan for each pair of runs."""
        plans, example = [], 0
        for ours, theirs in pairs_of(model, clean, corrupted):
            plans.append(Plan.of(model, ours, theirs, metric, self, example))
            example += len(ours)
        if POSITION in self.over and any(plan.sizes[POSITION] != plans[0].sizes[POSITION] for plan in plans):
            raise ExperimentError(
                "examples whose positions differ", "the same positions in every example",
                "sweep over regions instead of positions",
            )  # fmt: skip
        return plans

    def check(self) -> None:
        """Refuse axes that the point does not have, and regions or positions that match no axis."""
        point, bare = self.point, self.point.removeprefix("vision.")
        if point not in GLOBAL and bare not in POINTS:
            raise ExperimentError(
                f"point={point!r}", f"one of {', '.join((*POINTS, *GLOBAL))}", suggestion(bare, POINTS)
            )
        axes = _axes_of(bare, point in GLOBAL)
        wrong = [axis for axis in self.over if axis not in axes]
        if wrong or len(set(self.over)) < len(self.over) or {POSITION, REGION} <= set(self.over):
            raise ExperimentError(
                f"over={self.over!r} at {point!r}",
                f"different axes from {', '.join(axes)}; position or region, not both",
                "",
            )
        if (self.regions is not None) != (REGION in self.over):
            raise ExperimentError(
                f"over={self.over!r} with regions={'given' if self.regions is not None else None}",
                "regions=[...] and 'region' in over, or neither", "pass both",
            )  # fmt: skip
        if point.startswith("vision.") and (self.positions != "all" or self.regions is not None):
            raise ExperimentError(
                "positions or regions at the vision stack", "positions='all'", "use point='projector.hook_out'"
            )

    def settings(self, **others: Any) -> dict[str, Any]:
        """The attributes of a result that describe the sweep."""
        return {"point": self.point, "positions": where_in_words(self.positions), "zero": "no effect", **others}


@dataclass(frozen=True, eq=False)
class Scores:
    """What a sweep measured: the metric of every cell and of the two runs."""

    metric: Float[np.ndarray, "example cell"]
    clean: Float[np.ndarray, " example"]
    corrupted: Float[np.ndarray, " example"]
    direction: str

    def effect_of(self, metric: Float[np.ndarray, "example cell"]) -> Float[np.ndarray, "example cell"]:
        return effect_of(metric, self.clean, self.corrupted, self.direction)

    def variables(self, plan: Plan, unit: str) -> dict[str, Any]:
        """The variables of a result: ``effect`` and ``metric`` over the axes of the sweep, and both runs' metrics."""
        dims, shape = (EXAMPLE, *plan.over), [len(values) for values in plan.sizes.values()]
        return {
            "effect": (dims, self.effect_of(self.metric).reshape(-1, *shape), dict(EFFECT)),
            "metric": (dims, self.metric.reshape(-1, *shape), {"unit": unit}),
            "clean": (EXAMPLE, self.clean, {"unit": unit}),
            "corrupted": (EXAMPLE, self.corrupted, {"unit": unit}),
        }


def _axes_of(point: str, is_global: bool) -> tuple[str, ...]:
    if is_global:
        return (POSITION, REGION)
    heads = (KV_HEAD,) if point in KEYS else (HEAD,) if point.startswith("attn.") else ()
    return (LAYER, *heads, POSITION, REGION)


def _layers(model: HookedMLLM, point: str, vision: bool, layers: Iterable[int] | None) -> list[int]:
    """The requested layers, by default all that have the point."""
    count = model.cfg.vision_layers if vision else model.cfg.n_layers
    if layers is None:
        live = set(model.points())
        present = [i for i in range(count) if names_of(f"{'vision.' * vision}{point}", [i])[0] in live]
        return present or [0]  # refused later, by name and with the reason
    listed = list(indices("layers", layers).check_mask("layers", (count,)))
    if not listed or len(set(listed)) < len(listed) or not all(0 <= layer < count for layer in listed):
        raise ExperimentError(f"layers={listed}", f"different layers from 0 to {count - 1}", "count layers from 0")
    return listed


def _regions(clean: Inputs, positions: Where, regions: Regions | None, each: bool) -> tuple[list[Tensor], list[int]]:
    """The sets of positions as masks over (row, position), and the positions if each one is a separate set."""

    def mask(where: Where) -> Tensor:
        chosen = torch.zeros(len(clean), len(clean.layouts[0]), dtype=torch.bool)
        for row, layout in enumerate(clean.layouts):
            chosen[row, torch.as_tensor(layout.positions(where))] = True
        return chosen

    if regions is not None:
        if not len(regions):
            raise ExperimentError("regions=[]", "at least one region", "pass layout.cells(6, 6), or boxes")
        return [mask(region) for region in (regions.values() if isinstance(regions, Mapping) else regions)], []
    whole = mask(positions)
    if not each:
        return [whole], []
    if (whole != whole[:1]).any():
        raise ExperimentError(
            "rows whose positions differ", "the same positions in every row",
            "sweep over regions, or pass the rows as a list",
        )  # fmt: skip
    places = whole[0].nonzero()[:, 0].tolist()
    return [mask([position]) for position in places], places


def effect_of(
    metric: Float[np.ndarray, "example *cells"],
    clean: Float[np.ndarray, " example"],
    corrupted: Float[np.ndarray, " example"],
    direction: str,
) -> Float[np.ndarray, "example *cells"]:
    """``(metric - base) / (source - base)``: 0 at the run that is patched into, 1 at the run that is patched from.

    The base is the corrupted run when denoising, the clean run when noising. nan where both runs score the same.
    """
    base, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    gap = np.where(source == base, np.nan, source - base).reshape(-1, *[1] * (metric.ndim - 1))
    return (metric - base.reshape(gap.shape)) / gap


def in_tower(plan: Plan, mask: Tensor, written: dict[str, Tensor]) -> Tensor:
    """A mask over (row, position) converted to the positions of a point in the vision tower or the projector."""
    if plan.point.startswith("vision."):
        length = next(iter(written.values())).shape[1]
        return torch.ones(1, length, dtype=torch.bool)
    if plan.point != "projector.hook_out":
        return mask
    visual = torch.stack([torch.as_tensor((layout.kind == 1) | (layout.kind == 2)) for layout in plan.clean.layouts])
    chosen = mask[visual]
    if len(chosen) != len(written[plan.point]):
        raise ExperimentError(
            f"{len(written[plan.point])} projected features for {len(chosen)} visual positions",
            "one for each", "use point='hook_embed', which is patched at the same positions",
        )  # fmt: skip
    return chosen
