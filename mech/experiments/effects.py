"""Shares of right answers, losses of accuracy, and how both are worded in every summary and finding.

Values are ``[draw, example]``: one row for a named set of heads, several for random ones. Intervals are over examples,
and over draws too if there are several. A loss has the same interval everywhere: ``accuracy_interval``.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from mech.experiments.statistics import Interval, accuracy_interval, mean_of, permutation_test, proportion_interval

Bounds = dict[str, float]  # {"mean", "low", "high"}


def interval(values: Float[np.ndarray, "draw example"]) -> Bounds | None:
    """The interval over examples, and over draws too if there are several; None if a value is missing."""
    return None if np.isnan(values).any() else mean_of(values).as_dict()


def share(right: Float[np.ndarray, "draw example"]) -> Bounds | None:
    """The share of right answers with Wilson's interval, or over examples and draws if there are several draws."""
    if np.isnan(right).any():
        return None
    if len(right) == 1:
        return proportion_interval(right[0]).as_dict()
    return {name: (1 + value) / 2 for name, value in accuracy_interval(2 * right - 1).as_dict().items()}


def drop(before: Float[np.ndarray, " example"], after: Float[np.ndarray, "draw example"]) -> Bounds | None:
    """The loss of accuracy, paired by example: positive if more answers were right before."""
    change = before - after
    return None if np.isnan(change).any() else accuracy_interval(change).as_dict()


def against_random(
    top: Float[np.ndarray, " example"], random: Float[np.ndarray, "draw example"], n_permutations: int = 10_000
) -> dict[str, Any]:
    """Does a set of heads cost more than random ones, on new samples *and* against new sets?

    ``p_samples``: sign flips over samples, given these random sets. ``p_sets``: the rank of the set among the random
    ones, given these samples; never below ``smallest_p_sets``. ``p_value`` is the larger of the two: a claim needs
    both. ``sets_as_costly``: how many random sets cost at least as much; None if the set itself costs nothing.

    Sign of ``statistic``: positive if the set costs more. Unit: that of the costs.
    """
    samples, sets = (permutation_test(top, random, over, n_permutations) for over in ("examples", "sets"))  # type: ignore[arg-type]
    as_costly = round(sets.p_value * (len(random) + 1)) - 1
    return {
        "statistic": samples.statistic,
        "p_value": max(samples.p_value, sets.p_value),
        "p_samples": samples.p_value,
        "p_sets": sets.p_value,
        "smallest_p_sets": sets.smallest_p,
        "draws": len(random),
        "sets_as_costly": as_costly if float(np.mean(top)) > 0 else None,
    }


def both_units(test: Mapping[str, Any]) -> str:
    """The two p-values of ``against_random`` in words, each with its unit of resampling."""
    as_costly = test.get("sets_as_costly")
    sets = f"; {as_costly} of {test['draws']} random sets cost as much" if as_costly is not None else ""
    return f"p {p_is(test['p_samples'])} over samples (sign flips), p {p_is(test['p_sets'])} over sets (rank){sets}"


def points(drop: Mapping[str, float] | Interval) -> str:
    """A drop in accuracy in percentage points: ``62 points [55, 70]``."""
    interval = drop.as_dict() if isinstance(drop, Interval) else drop
    low, high = sorted((interval["low"], interval["high"]))
    mean, low, high = (round(100 * value) for value in (interval["mean"], low, high))  # whole numbers have no -0
    return f"{mean} point{'s' * (abs(mean) != 1)} [{low}, {high}]"


def p_is(value: float) -> str:
    """``= 0.012`` or ``< 0.001``."""
    return f"= {value:.3f}" if value >= 0.001 else "< 0.001"
