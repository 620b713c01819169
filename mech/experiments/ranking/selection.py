"""Which heads count as retrieval heads, and how sparse they are: cut-offs on scores, and Lorenz curves.

    >>> elbow(ranking), quantile(ranking, 0.95), above(ranking, 0.1)       # sets of heads, best first  # doctest: +SKIP
    >>> lorenz(ranking).sel(heads=0.05, method="nearest")                  # share of the top 5%        # doctest: +SKIP

For a fixed number or share of heads use ``ranking.top(k)``. Cut-offs differ by a factor of ten between papers, so say
which one you used. Whether any head lies above chance is a separate question: ``mech.retrieval_test``.
"""

import numpy as np
import xarray as xr
from jaxtyping import Float

from mech.errors import ExperimentError
from mech.experiments.ranking.ranking import Heads, Ranking


def elbow_count(values: Float[np.ndarray, " n"]) -> int:
    """How many of the largest values come before the curve of sorted values flattens.

    The elbow is the value farthest below the straight line from the largest to the smallest value; the values before it
    count. If no value lies below the line, all of them count.
    """
    curve = np.sort(values)[::-1]
    line = np.linspace(curve[0], curve[-1], len(curve))
    below = line - curve
    return int(below.argmax()) if below.max() > 1e-12 * max(1e-300, np.ptp(curve)) else len(curve)


def elbow(ranking: Ranking) -> Heads:
    """The heads before the elbow of the sorted mean scores, best first (localization heads, arXiv 2503.06287)."""
    return ranking.heads[: elbow_count(ranking.mean.ravel())]


def quantile(ranking: Ranking, q: float) -> Heads:
    """The heads whose mean score is strictly above the ``q`` quantile over all heads, best first; possibly none."""
    if not 0 <= q < 1:
        raise ExperimentError(f"q={q!r}", "0 <= q < 1", "use 0.95")
    return above(ranking, float(np.quantile(ranking.mean, q)))


def above(ranking: Ranking, threshold: float) -> Heads:
    """The heads whose mean score is above ``threshold``, best first (retrieval heads: 0.1, arXiv 2404.15574)."""
    return ranking.heads[: int((ranking.mean > threshold).sum())]


def lorenz(ranking: Ranking) -> xr.DataArray:
    """The share of all positive score that the best heads hold, as a function of their share of all heads.

    ``L(i / n) = sum of the i largest / sum``, negative scores counted as 0, from (0, 0) to (1, 1). Sign: the higher the
    curve, the sparser the score; equal scores give the diagonal. ``Ranking.gini`` is twice the area between the curve
    and the diagonal, ``Ranking.half_mass_share`` the point where the curve reaches one half.

    Raises:
        ExperimentError: no head has a positive score.
    """
    mass = np.sort(np.maximum(ranking.mean, 0), axis=None)[::-1]
    if mass[0] <= 0:
        raise ExperimentError(f"{ranking!r} has no positive score", "some positive scores", "use another score")
    share = np.concatenate([[0.0], mass.cumsum() / mass.sum()])
    return xr.DataArray(share, {"heads": np.linspace(0, 1, len(share))}, ("heads",), "lorenz",
                        {"unit": f"share of all {ranking.score}"})  # fmt: skip
