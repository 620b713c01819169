"""Steering: turn heads up or down, and see what happens to the answer.

    curve = steering(model, test, ranking, factors=(0, 0.5, 1, 2, 4))
    curve["accuracy"].mean("example")               # (set, factor); factor 1 is the unchanged model
    steering_table(curve)                           # by band and factor, with intervals

The output of a set of heads (z, before W_O) is multiplied by the same factor in every forward: 0 is zero ablation, 1
changes nothing, and a factor above 1 amplifies the heads. Turning up a head that carries evidence should raise the
answer's lead; the same number of random heads is the control. Far from 1 the residual stream is one that the model has
never seen, and every set of heads does harm.
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import numpy as np
import xarray as xr

from mech.arguments import NOT_EMPTY, Amount, Count, Progress, Seed, checked, given_by, some_of
from mech.axes import EXAMPLE
from mech.data.regions import where_in_words
from mech.data.samples import Samples, SomeSamples
from mech.errors import ExperimentError, suggestion
from mech.experiments.ablation.redirected import BAND, table
from mech.experiments.ablation.sets import about, coords, different, measured
from mech.experiments.effects import share
from mech.experiments.metrics import ask, quiz
from mech.experiments.ranking.checks import refuse_ranking
from mech.experiments.ranking.ranking import Ranking
from mech.experiments.ranking.sets import HeadSet, head_sets
from mech.experiments.statistics import mean_of
from mech.interventions import Scale, check_positions, intervene
from mech.interventions.specs import Phase, Where
from mech.model import HookedMLLM

BANDS = ("top", "bottom", "random")
FACTORS = (0.0, 0.5, 1.0, 1.5, 2.0, 4.0)
FACTOR = "factor"
ATTRS = {
    "accuracy": {"unit": "share of answers, 0 or 1 per example", "sign": "more: better"},
    "logit_diff": {"unit": "logits, right minus wrong answer", "sign": "more: better"},
}


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
    """Accuracy and logit difference of every sample with heads scaled by each factor.

    Sign: higher is better. Unit: accuracy is 0 or 1 per sample; the logit difference is in logits, right minus
    counterfactual answer.

    Args:
        model: a hooked model.
        samples: test samples; not those that found the heads.
        ranking: which heads are at the top.
        factors: what the heads' output is multiplied by; 1 is measured once, without any intervention.
        heads: how many; see ``Ranking.count``.
        bands: any of ``"top"``, ``"bottom"``, ``"random"``.
        n_random: number of random sets of heads outside the top.
        positions, phase: see ``Scale``.
        seed, batch_size, allow_other_model: as in ``ablation``.
        progress: called with (runs done, runs in all).

    Returns:
        ``accuracy`` and ``logit_diff`` over (set, factor, example), with the band and the draw of each set.

    Raises:
        ExperimentError: unknown names, factors that are repeated or not finite, heads found on these samples or of
            another model.

    Cost: one forward per sample, and one per sample, set and factor other than 1.
    """
    samples, factors = Samples(samples), different("factors", factors, "(0, 1, 2)")
    other = refuse_ranking(ranking, model, samples, allow_other_model)
    sets = head_sets(ranking, bands, heads, n_random, seed)
    for chosen in sets:
        Scale(chosen.heads, factors[0], positions=positions, phase=phase).check(model)
    questions = quiz(model, samples, batch_size, partial(check_positions, where=positions, phase=phase))
    plain = ask(model, questions)

    def scaled(chosen: HeadSet, factor: float) -> dict[str, np.ndarray]:
        if factor == 1:
            return plain
        with intervene(model, Scale(chosen.heads, factor, positions=positions, phase=phase)) as steered:
            return ask(steered, questions)

    values = measured(sets, factors, scaled, progress)
    settings = {"positions": where_in_words(positions), "phase": phase}
    attrs = about("steering", model, samples, ranking.count(heads), seed, other, **settings)
    data = {name: (("set", FACTOR, EXAMPLE), value, ATTRS[name]) for name, value in values.items()}
    return xr.Dataset(data, coords(sets, FACTOR, factors, questions.examples), attrs)


@checked
def steering_table(
    curve: given_by("steering", BAND, FACTOR, "accuracy"), measure: str = "logit_diff"
) -> list[dict[str, float | str]]:
    """``{"band", "factor", "mean", "low", "high"}`` for every band and factor; 95% over samples and random sets."""
    if measure not in curve:
        raise ExperimentError(f"measure={measure!r}", "accuracy or logit_diff", suggestion(measure, map(str, curve)))
    if measure == "accuracy":
        return table(curve, FACTOR, lambda here: share(here[measure].values) or {})
    return table(curve, FACTOR, lambda here: mean_of(here[measure].values).as_dict())
