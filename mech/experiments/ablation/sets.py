"""Measuring sets of heads at several strengths: what steering and redirection share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mech.arguments import Progress
from mech.axes import EXAMPLE
from mech.data.samples import Samples
from mech.errors import ExperimentError
from mech.experiments.ablation.redirected import BAND
from mech.experiments.ranking.checks import other_model_attrs
from mech.experiments.ranking.sets import HeadSet
from mech.model import HookedMLLM
from mech.results import heads_text, provenance


def different(name: str, values: Sequence[float], example: str) -> list[float]:
    """The values as floats; a repeated value is refused."""
    numbers = [float(value) for value in values]
    if len(set(numbers)) < len(numbers):
        raise ExperimentError(f"{name}={numbers}", "different numbers", f"use {example}")
    return numbers


def measured(
    sets: Sequence[HeadSet],
    strengths: Sequence[float],
    measure: Callable[[HeadSet, float], Mapping[str, np.ndarray]],
    progress: Progress | None,
) -> dict[str, np.ndarray]:
    """What ``measure`` returns for every set at every strength, by name: arrays over (set, strength, example)."""
    rows: list[list[Mapping[str, np.ndarray]]] = []
    for chosen in sets:
        rows.append([])
        for strength in strengths:
            rows[-1].append(measure(chosen, strength))
            if progress:
                progress(sum(map(len, rows)), len(sets) * len(strengths))
    return {name: np.stack([[values[name] for values in row] for row in rows]) for name in rows[0][0]}


def about(
    kind: str, model: HookedMLLM, samples: Samples, n_heads: int, seed: int, other: str, **settings: Any
) -> dict[str, Any]:
    """The attributes of a result; ``other`` is what ``refuse_ranking`` returned."""
    return {
        "kind": kind,
        "model": model.name,
        "domain": ", ".join(samples.domains),
        "n_heads": n_heads,
        **settings,
        **other_model_attrs([other]),
        "provenance": provenance(model, samples, seed=seed, **settings),
    }


def coords(sets: Sequence[HeadSet], axis: str, strengths: Sequence[float], examples: Sequence[str]) -> dict[str, Any]:
    """The coordinates of a result over (set, ``axis``, example)."""
    return {
        BAND: ("set", np.array([chosen.band for chosen in sets], dtype=str)),
        "draw": ("set", np.array([chosen.draw for chosen in sets])),
        "heads": ("set", np.array([heads_text(chosen.heads) for chosen in sets], dtype=str)),
        axis: list(strengths),
        EXAMPLE: list(examples),
    }
