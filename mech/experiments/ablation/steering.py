"""Steering: turn heads up or down, and see what becomes of the answer.

    curve = steering(model, test, ranking, factors=(0, 0.5, 1, 2, 4))
    curve["accuracy"].mean("example")               # (set, factor); factor 1 is the model as it is
    steering_table(curve)                           # by band and factor, with intervals

The output of a set of heads (z, before W_O) is multiplied by a factor, in every forward alike: 0 is zero ablation, 1
changes nothing, and more than 1 makes the heads louder. A head that carries evidence should raise the answer's lead as
it is turned up; random heads of the same number are the control. Far from 1 the stream is one that the model has never
seen, and every set of heads does harm.
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import numpy as np
import xarray as xr

from mech.arguments import NOT_EMPTY, Amount, Count, Seed, checked, given_by, some_of
from mech.axes import EXAMPLE
from mech.data.regions import where_in_words
from mech.data.samples import Samples, SomeSamples
from mech.errors import ExperimentError, suggestion
from mech.experiments.effects import share
from mech.experiments.metrics import ask, quiz
from mech.experiments.ranking.checks import other_model_attrs, refuse_ranking
from mech.experiments.ranking.ranking import Heads, Ranking
from mech.experiments.scores.ram import Progress
from mech.experiments.statistics import mean_of
from mech.interventions import Scale, check_positions, intervene
from mech.interventions.specs import Phase, Where
from mech.model import HookedMLLM
from mech.results import heads_text, provenance

BANDS = ("top", "bottom", "random")
FACTORS = (0.0, 0.5, 1.0, 1.5, 2.0, 4.0)
BAND, FACTOR = "band", "factor"


@checked
def steering(
    model: HookedMLLM,
    samples: SomeSamples,
    ranking: Ranking,
    *,
    factors: Annotated[Sequence[float], NOT_EMPTY] = FACTORS,
    heads: Amount = 0.05,
    bands: some_of(BANDS) = BANDS,
    n_random: Count = 5,
    positions: Where = "all",
    phase: Phase = "both",
    seed: Seed = 0,
    batch_size: Count = 16,
    progress: Progress | None = None,
    allow_other_model: bool = False,
) -> xr.Dataset:
    """Accuracy and logit difference of every sample while heads are scaled by each factor.

    Sign: higher is better. Unit: accuracy is 0 or 1 per sample; logits, right minus counterfactual answer.

    Args:
        model: a hooked model.
        samples: to test on, other ones than those that found the heads.
        ranking: which heads are at the top.
        factors: what their output is multiplied by; 1 is measured once, without any intervention.
        heads: how many, see ``Ranking.count``.
        bands: which of ``"top"``, ``"bottom"``, ``"random"``.
        n_random: random sets, of other heads than the top.
        positions, phase: see ``Scale``.
        seed: of the random sets.
        batch_size: samples per forward.
        progress: called with (runs done, runs in all).
        allow_other_model: take a ranking made on another model of this shape; the attribute ``other_model`` says so.

    Returns:
        ``accuracy`` and ``logit_diff`` over (set, factor, example), with the band and the draw of each set.

    Raises:
        ExperimentError: unknown words, factors that are not finite or come twice, heads that were found on these
            samples or of another model.

    Cost: one forward per sample, set and factor.
    """
    samples = Samples(samples)
    factors = [float(factor) for factor in factors]
    if len(set(factors)) < len(factors):
        raise ExperimentError(f"factors {factors}", "different numbers", "use (0, 1, 2)")
    other = refuse_ranking(ranking, model, samples, allow_other_model)
    sets = [
        (band, draw, chosen)
        for band in bands
        for draw, chosen in enumerate(_heads(ranking, band, heads, n_random, seed))
    ]
    for _, _, chosen in sets:
        Scale(chosen, factors[0], positions=positions, phase=phase).check(model)
    questions = quiz(model, samples, batch_size, partial(check_positions, where=positions, phase=phase))
    plain = ask(model, questions)
    parts = {name: np.empty((len(sets), len(factors), len(questions))) for name in plain}
    for row, (_, _, chosen) in enumerate(sets):
        for column, factor in enumerate(factors):
            measured = plain
            if factor != 1:
                with intervene(model, Scale(chosen, factor, positions=positions, phase=phase)) as steered:
                    measured = ask(steered, questions)
            for name, value in measured.items():
                parts[name][row, column] = value
            if progress:
                progress(row * len(factors) + column + 1, len(sets) * len(factors))
    curve = xr.Dataset(
        {name: (("set", FACTOR, EXAMPLE), value) for name, value in parts.items()},
        {
            BAND: ("set", np.array([band for band, _, _ in sets], dtype=str)),
            "draw": ("set", np.array([draw for _, draw, _ in sets])),
            "heads": ("set", np.array([heads_text(chosen) for *_, chosen in sets], dtype=str)),
            FACTOR: factors,
            EXAMPLE: list(questions.examples),
        },
        {
            "kind": "steering",
            "model": model.name,
            "domain": ", ".join(samples.domains),
            "n_heads": ranking.count(heads),
            "positions": where_in_words(positions),
            "phase": phase,
            **other_model_attrs([other]),
            "provenance": provenance(model, samples, seed=seed, positions=where_in_words(positions), phase=phase),
        },
    )
    curve["accuracy"].attrs = {"unit": "share of answers, 0 or 1 per example", "sign": "more: better"}
    curve["logit_diff"].attrs = {"unit": "logits, right minus wrong answer", "sign": "more: better"}
    return curve


@checked
def steering_table(
    curve: given_by("steering", BAND, FACTOR, "accuracy"), measure: str = "logit_diff"
) -> list[dict[str, float | str]]:
    """``{"band", "factor", "mean", "low", "high"}`` of every band and factor: 95% over samples, and random sets."""
    if measure not in curve:
        raise ExperimentError(f"measure={measure!r}", "accuracy or logit_diff", suggestion(measure, map(str, curve)))
    table: list[dict[str, float | str]] = []
    for band in dict.fromkeys(map(str, curve[BAND].values)):
        here = curve[measure].isel(set=np.flatnonzero(curve[BAND].values == band))
        for factor in curve[FACTOR].values:
            value = here.sel(factor=factor).values
            interval = share(value) if measure == "accuracy" else mean_of(value).as_dict()
            table.append({"band": band, "factor": float(factor), **(interval or {})})
    return table


def _heads(ranking: Ranking, band: str, heads: int | float, n_random: int, seed: int) -> Sequence[Heads]:
    if band == "random":
        return ranking.random(heads, n_random, seed, exclude=ranking.top(heads))
    return [ranking.top(heads) if band == "top" else ranking.bottom(heads)]
