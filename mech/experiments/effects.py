"""Shares of right answers, what is lost of them, and the words for it: what every summary and finding is made of.

Values are ``[draw, example]``: one row for a named set of heads, several for random ones. Intervals are over examples,
and over draws too where there are several.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from mech.experiments.statistics import bootstrap_interval, proportion_interval, two_way_bootstrap

Bounds = dict[str, float]  # {"mean", "low", "high"}


def interval(values: Float[np.ndarray, "draw example"]) -> Bounds | None:
    """Over examples, and over draws too where there are several; None where a value is missing."""
    if np.isnan(values).any():
        return None
    return (two_way_bootstrap(values) if len(values) > 1 else bootstrap_interval(values[0])).as_dict()


def share(right: Float[np.ndarray, "draw example"]) -> Bounds | None:
    """The share of right answers."""
    return proportion_interval(right[0]).as_dict() if len(right) == 1 else interval(right)


def drop(before: Float[np.ndarray, " example"], after: Float[np.ndarray, "draw example"]) -> Bounds | None:
    """What is lost, paired by example: positive where there were more right answers before."""
    found = interval(before - after)
    if found is not None and found["low"] == found["high"]:
        # No resample differs, yet that no answer of n changed does not mean that none ever would (Wilson).
        slack = proportion_interval(np.zeros(len(before))).high
        found |= {"low": found["mean"] - slack, "high": found["mean"] + slack}
    return found


def points(drop: Mapping[str, float]) -> str:
    """A drop in accuracy in percentage points: ``62 points [55, 70]``."""
    low, high = sorted((100 * drop["low"], 100 * drop["high"]))
    return f"{100 * drop['mean'] + 0.0:.0f} points [{low + 0.0:.0f}, {high + 0.0:.0f}]"


def p_is(value: float) -> str:
    """``= 0.012`` or ``< 0.001``."""
    return f"= {value:.3f}" if value >= 0.001 else "< 0.001"
