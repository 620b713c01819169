"""Intervals and tests for effects measured per example: how certain, compared with what, and after how many tests.

Three questions come up whenever heads are ablated, and each has its own answer here:

* *How large is the effect, give or take?* ``accuracy_interval`` for every loss of accuracy; for other measures
  ``bootstrap_interval`` over examples (of the difference, if two runs share them), and ``two_way_bootstrap`` if
  examples *and* random sets of heads were drawn.
* *Is it more than random heads would do?* ``permutation_test``. It has two forms because the question has two meanings:
  over examples (these random sets, new examples) and over sets (these examples, new random sets).
* *How many of my findings are luck?* ``holm`` and ``benjamini_hochberg`` over everything that was tested, and
  ``jaccard_null`` / ``overlap_p_value`` for two sets of heads that share some by chance.

    >>> drop_top, drop_random = accuracy - top, accuracy - random      # [example], [draw example]  # doctest: +SKIP
    >>> permutation_test(drop_top, drop_random, over="sets").p_value   # doctest: +SKIP

Axis 0 of ``values`` is the example; several random sets are ``(draw, example)``, as in an ablation result. All
functions are pure and seeded. They know nothing about heads, and none of them can repair a test on samples that also
chose what is tested.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from scipy import stats

from mech.errors import ExperimentError

_CHUNK = 4_000_000  # numbers held at once while resampling: 32 MB


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; arrays if there are axes besides the example."""

    mean: Any
    low: Any
    high: Any
    level: float = 0.95

    def as_dict(self) -> dict[str, Any]:
        """``{"mean", "low", "high"}`` in plain numbers, as ``summary.json`` holds them."""
        return {name: np.asarray(getattr(self, name)).tolist() for name in ("mean", "low", "high")}


@dataclass(frozen=True)
class Test:
    """One test: the statistic, its p-value, and the smallest p-value that this many draws could have given."""

    __test__ = False  # not a case for pytest

    statistic: float
    p_value: float
    smallest_p: float
    over: str


def bootstrap_interval(
    values: Float[np.ndarray, "example *rest"], level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> Interval:
    """The mean over examples with an expanded percentile bootstrap interval.

    Examples are drawn with replacement ``n_resamples`` times. The plain percentile interval is too narrow by
    ``sqrt((n - 1) / n)`` and uses normal tails where t belongs; the percentiles are therefore taken at
    ``Phi(-sqrt(n / (n - 1)) t[(1 - level) / 2, n - 1])`` instead (Hesterberg 2015, arXiv 1411.5279). Every column of
    ``rest`` uses the same resamples.

    When all values are equal the interval has no width. For shares near 0 or 1 that claims too much: use
    ``proportion_interval``.

    Raises:
        ExperimentError: fewer than two examples, or values that are nan.
    """
    values = _examples(values)
    low, high = _percentiles(bootstrap_means(values, n_resamples, seed), len(values), level)
    return _interval(values.mean(axis=0), low, high, level)


def bootstrap_means(
    values: Float[np.ndarray, "example *rest"], n_resamples: int = 2000, seed: int | list[int] = 0
) -> Float[np.ndarray, "resample *rest"]:
    """The mean of every resample of the examples, from which intervals and stability are computed."""
    values = _examples(values)
    flat = values.reshape(len(values), -1)
    means = [weights @ flat for weights in _weights(len(flat), n_resamples, seed, width=flat.shape[1])]
    return np.concatenate(means).reshape(n_resamples, *values.shape[1:])


def two_way_bootstrap(
    values: Float[np.ndarray, "draw example"], level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> Interval:
    """The mean over examples and random sets, with an interval that treats both as samples.

    Each resample draws examples and, independently, sets with replacement, and averages the crossing (the pigeonhole
    bootstrap, Owen 2007, Annals of Applied Statistics 1(2); it errs on the wide side). It is the interval for "random
    heads cost x" under new examples *and* new random heads.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2:
        raise ExperimentError(
            f"values of shape {values.shape}",
            "(draw, example) with at least two draws",
            "draw more sets, or use bootstrap_interval for one",
        )
    by_example = _examples(values.T)
    n, n_draws = by_example.shape
    examples = bootstrap_means(by_example, n_resamples, seed)
    sets = np.concatenate(list(_weights(n_draws, n_resamples, [seed, 1])))
    low, high = _percentiles((examples * sets).sum(axis=1), min(n, n_draws), level)
    return _interval(values.mean(), low, high, level)


def accuracy_interval(change: Float[np.ndarray, "*batch draw example"], level: float = 0.95) -> Interval:
    """The mean change of accuracy, paired by example: the only interval used for what an intervention costs.

    ``change`` is right before minus right after, -1, 0 or 1, [..., draw, example]; a named set is one draw. Two
    pseudo-examples, +x and -x, are added to the n real ones, and the mean of all has the interval

        mean +- t sqrt(var_examples / (n + 2) + var_sets / draws - var_residual / (n draws))

    within -1 and 1. With one draw x is 1: Bonett and Price's adjusted interval (2012, Journal of Educational and
    Behavioral Statistics 37). With several it is a random-effects interval over examples *and* sets (Satterthwaite's
    degrees of freedom for the sets), x the largest mean change of an example, but at least ``max(1 / 2,
    1 / sqrt(draws))``. Its width is never zero: if none of n answers changed, that does not mean that none ever would,
    however many sets were tried.

    Unit of resampling: examples; with several draws examples crossed with sets. With few sets (under about twenty) that
    differ much, the coverage is below the level.

    Raises:
        ExperimentError: changes beyond -1 to 1, or nan.
    """
    change = np.asarray(change, dtype=np.float64)
    if change.ndim < 2 or 0 in change.shape or not (np.abs(change) <= 1).all():
        raise ExperimentError(
            f"changes of accuracy of shape {change.shape}", "numbers from -1 to 1, (draw, example)", "pair the answers"
        )
    *_, draws, n = change.shape
    by_example, by_set = change.mean(axis=-2), change.mean(axis=-1)
    pseudo = 2 * np.maximum(np.abs(by_example).max(axis=-1), max(0.5, draws**-0.5)) ** 2
    centre, mean = by_example.sum(axis=-1) / (n + 2), by_example.mean(axis=-1)
    variance = (((by_example**2).sum(axis=-1) + pseudo) / (n + 2) - centre**2) / (n + 2)
    reach = stats.norm.ppf((1 + level) / 2)
    if draws > 1:
        of_sets, of_examples = by_set.var(axis=-1, ddof=1) / draws, variance
        residual = change - by_example[..., None, :] - by_set[..., None] + mean[..., None, None]
        shared = (residual**2).sum(axis=(-2, -1)) / (max(n - 1, 1) * (draws - 1) * n * draws)
        variance = np.maximum(of_examples + of_sets - shared, np.maximum(of_examples, of_sets))
        freedom = (draws - 1) * (variance / np.maximum(of_sets, 1e-12 * variance)) ** 2
        reach = stats.t.ppf((1 + level) / 2, freedom)
    half = reach * np.sqrt(variance)
    return _interval(mean, np.maximum(centre - half, -1.0), np.minimum(centre + half, 1.0), level)


def mean_of(values: Float[np.ndarray, "draw example"]) -> Interval:
    """The mean of any measure: bootstrap over examples, and over sets too if there are several draws."""
    return two_way_bootstrap(values) if len(values) > 1 else bootstrap_interval(values[0])


def proportion_interval(correct: Float[np.ndarray, "example"], level: float = 0.95) -> Interval:
    """The share of right answers with Wilson's interval, which keeps its width when all are right or all wrong.

    50 of 50 right is [0.93, 1.00], not [1.00, 1.00] (Wilson 1927, JASA 22).
    """
    correct = np.asarray(correct, dtype=np.float64)
    if correct.ndim != 1 or not len(correct) or not np.isin(correct, (0, 1)).all():
        raise ExperimentError(
            "values that are not 0 or 1 per example", "one 0 or 1 per example", "use bootstrap_interval"
        )
    bounds = stats.binomtest(int(correct.sum()), len(correct)).proportion_ci(level, method="wilson")
    return Interval(float(correct.mean()), float(bounds.low), float(bounds.high), level)


def permutation_test(
    top: Float[np.ndarray, "example"],
    random: Float[np.ndarray, "draw example"],
    over: Literal["examples", "sets", "both"] = "examples",
    n_permutations: int = 10_000,
    seed: int = 0,
) -> Test:
    """Does ablating the top heads cost more than ablating the same number of random heads?

    ``top[i]`` and ``random[d, i]`` are the cost of ablation on example i (baseline minus ablated). The statistic is

        T = mean_i( top[i] - mean_d random[d, i] )

    and the null depends on ``over``:

    * ``over="examples"``: *given these random sets*, does the top band cost more on examples in general? The sign of
      every example's difference is flipped at random; p is the share of flips with a mean of at least T (all 2^n of
      them when there are no more than ``n_permutations``, otherwise (1 + hits) / (1 + n_permutations)). Because the
      squares do not change under flips this is also the studentised test, valid in large samples without symmetry
      (Janssen 1997, Statistics & Probability Letters 36). It gains power with examples and says nothing about
      other random sets.
    * ``over="sets"``: *given these examples*, does the top set cost more than a random set would? p is its rank among
      the draws, (1 + number of draws that cost at least as much) / (1 + draws), exact when the top set could have been
      one of the draws (Phipson & Smyth 2010, arXiv 1603.05766). It never falls below 1 / (1 + draws): 19 draws are
      needed for 0.05, and more if several tests are then corrected for.
    * ``over="both"``: the larger of the two, the test of "on new examples and against new sets" (intersection-union,
      Berger 1982, Technometrics 24).

    One-sided: small p means the top band costs *more*. Sign of the statistic: positive when it does.

    Raises:
        ExperimentError: shapes that do not fit, fewer than two examples, no draws, or nan.
    """
    top = _examples(top)
    random = np.atleast_2d(np.asarray(random, dtype=np.float64))
    if top.ndim != 1 or random.ndim != 2 or random.shape[1] != len(top) or not len(random):
        raise ExperimentError(
            f"top of shape {top.shape} and random of shape {random.shape}",
            "(example,) and (draw, example) over the same examples",
            "put the draws on axis 0 of random",
        )
    if np.isnan(random).any():
        raise ExperimentError("random holds nan", "a number for every draw and example", "drop those examples")
    difference = top - random.mean(axis=0)
    statistic = float(difference.mean())
    tests = {}
    if over in ("examples", "both"):
        tests["examples"] = _sign_flips(difference, max(_slack(top), _slack(random)), n_permutations, seed)
    if over in ("sets", "both"):
        costs = random.mean(axis=1)
        hits = int((costs >= top.mean() - _slack(random)).sum())
        tests["sets"] = ((1 + hits) / (1 + len(costs)), 1 / (1 + len(costs)))
    if not tests:
        raise ExperimentError(f"over={over!r}", "'examples', 'sets' or 'both'")
    p_value, smallest = (max(values) for values in zip(*tests.values(), strict=True))
    return Test(statistic, p_value, smallest, over)


def sign_flip_test(
    values: Float[np.ndarray, "example *rest"], n_permutations: int = 10_000, seed: int = 0
) -> Float[np.ndarray, "*rest"]:
    """Is the mean over examples 0? The two-sided p-value, for each column separately.

    The sign of each example is flipped at random; p is the share of flips whose mean is at least as far from 0 (all
    2^n of them when there are no more than ``n_permutations``, otherwise (1 + hits) / (1 + n_permutations)).
    """
    values = _examples(values)
    flat = values.reshape(len(values), -1)
    n = len(flat)
    if exact := n <= 20 and 2**n <= n_permutations:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(n_permutations, n))
    least = np.abs(flat.sum(0)) - n * 1e-12 * np.abs(flat).max(0)  # ties must count as ties
    hits = np.zeros(flat.shape[1])
    for part in np.array_split(signs, -(-signs.shape[0] * flat.shape[1] // _CHUNK)):
        hits += (np.abs(part @ flat) >= least).sum(0)
    p = hits / len(signs) if exact else (1 + hits) / (1 + len(signs))
    return p.reshape(values.shape[1:])


def holm(p_values: Float[np.ndarray, "*tests"]) -> Float[np.ndarray, "*tests"]:
    """Adjusted p-values: rejecting those below alpha makes *any* error with probability at most alpha.

    ``max_{j <= i} min(1, (m - j + 1) p_(j))`` over the sorted p-values, under any dependence (Holm 1979, Scandinavian
    Journal of Statistics 6).
    """
    p = _probabilities(p_values)
    order = np.argsort(p, axis=None, kind="stable")
    steps = p.reshape(-1)[order] * np.arange(p.size, 0, -1)
    adjusted = np.empty(p.size)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted.reshape(p.shape)


def benjamini_hochberg(p_values: Float[np.ndarray, "*tests"]) -> Float[np.ndarray, "*tests"]:
    """Adjusted p-values: of those below alpha, a share of at most alpha is expected to be false.

    For independent or positively dependent tests, such as a map of all heads (Benjamini & Hochberg 1995, JRSS B 57).
    """
    p = _probabilities(p_values)
    return np.asarray(stats.false_discovery_control(p.reshape(-1))).reshape(p.shape) if p.size else p


def jaccard(a: Any, b: Any) -> float:
    """Shared over all members of two sets; 1 for equal sets, 0 for disjoint ones. Two empty sets are an error."""
    a, b = set(a), set(b)
    if not a | b:
        raise ExperimentError("two empty sets", "at least one member", "choose k of at least 1")
    return len(a & b) / len(a | b)


def jaccard_null(n: int, k1: int, k2: int) -> float:
    """The mean Jaccard index of two random sets of ``k1`` and ``k2`` out of ``n``.

    ``E[X / (k1 + k2 - X)]`` with X hypergeometric. It treats all heads as alike; sets that only share their *layers*
    exceed it too, so compare with layer-matched draws before claiming that the heads are the same.
    """
    _check_sizes(n, k1, k2)
    shared = np.arange(max(0, k1 + k2 - n), min(k1, k2) + 1)
    return float((stats.hypergeom.pmf(shared, n, k1, k2) * shared / (k1 + k2 - shared)).sum())


def overlap_p_value(n: int, k1: int, k2: int, shared: int) -> float:
    """The probability that random sets of ``k1`` and ``k2`` out of ``n`` share at least ``shared``."""
    _check_sizes(n, k1, k2)
    if not max(0, k1 + k2 - n) <= shared <= min(k1, k2):
        raise ExperimentError(f"{shared} shared of {k1} and {k2} out of {n}", "a possible overlap")
    return float(stats.hypergeom.sf(shared - 1, n, k1, k2))


def spearman(a: Float[np.ndarray, "*shape"], b: Float[np.ndarray, "*shape"]) -> float:
    """Rank correlation of two maps of the same shape, ties sharing their rank; nan when one of them is constant.

    No p-value: heads of one model are not independent draws.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.size < 3 or np.isnan(a).any() or np.isnan(b).any():
        raise ExperimentError(
            f"maps of shapes {a.shape} and {b.shape}", "the same shape, at least three values, none of them nan"
        )
    x, y = (stats.rankdata(values, axis=None) - (a.size + 1) / 2 for values in (a, b))
    if not x.any() or not y.any():
        return float("nan")
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def kendall(a: Float[np.ndarray, "*shape"], b: Float[np.ndarray, "*shape"]) -> float:
    """Kendall's tau-b of two maps: pairs in the same order minus those in the other; nan if one is constant."""
    result: Any = stats.kendalltau(a, b)
    return float(result.statistic)


def _examples(values: Any) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim == 0 or len(values) < 2:
        given = "one value" if values.ndim == 0 else f"{len(values)} example{'' if len(values) == 1 else 's'}"
        raise ExperimentError(given, "at least two examples, on axis 0", "measure more examples")
    if not np.isfinite(values).all():
        bad = int(np.argwhere(~np.isfinite(values))[0][0])
        raise ExperimentError(f"example {bad} holds nan or inf", "finite numbers", "drop the example or fix its score")
    return values


def _weights(n: int, n_resamples: int, seed: int | list[int], width: int = 1) -> Iterator[np.ndarray]:
    """Resamples as weights over the examples, in chunks: a mean is then one matrix product."""
    if n_resamples < 1:
        raise ExperimentError(f"n_resamples={n_resamples}", "a positive number", "use 2000")
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // max(n, width))
    for start in range(0, n_resamples, step):
        yield rng.multinomial(n, np.full(n, 1 / n), size=min(step, n_resamples - start)) / n


def _percentiles(draws: np.ndarray, n: int, level: float) -> tuple[np.ndarray, np.ndarray]:
    if not 0 < level < 1:
        raise ExperimentError(f"level={level}", "between 0 and 1", "use 0.95")
    tail = stats.norm.cdf(np.sqrt(n / (n - 1)) * stats.t.ppf((1 - level) / 2, n - 1))
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    return low, high


def _interval(mean: Any, low: Any, high: Any, level: float) -> Interval:
    # Resampled means of equal values differ from the mean in the last bit; the interval contains its mean.
    low, high = np.minimum(low, mean), np.maximum(high, mean)
    mean, low, high = (float(x) if np.ndim(x) == 0 else x for x in (mean, low, high))
    return Interval(mean, low, high, level)


def _slack(values: np.ndarray) -> float:
    """How far two means of the same numbers in another order may differ: ties must count as ties."""
    return 1e-12 * float(np.abs(values).max())


def _sign_flips(difference: np.ndarray, slack: float, n_permutations: int, seed: int) -> tuple[float, float]:
    if n_permutations < 1:
        raise ExperimentError(f"n_permutations={n_permutations}", "a positive number", "use 10000")
    n = len(difference)
    least = difference.sum() - n * slack
    if n <= 20 and 2**n <= n_permutations:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((signs @ difference >= least).mean()), 0.5**n
    rng = np.random.default_rng(seed)
    hits, step = 0, max(1, _CHUNK // n)
    for start in range(0, n_permutations, step):
        flips = rng.integers(0, 2, size=(min(step, n_permutations - start), n), dtype=np.int8)
        hits += int((difference.sum() - 2.0 * (flips @ difference) >= least).sum())
    return (1 + hits) / (1 + n_permutations), 1 / (1 + n_permutations)


def _probabilities(p_values: Any) -> np.ndarray:
    p = np.asarray(p_values, dtype=np.float64)
    if p.size and not ((p >= 0) & (p <= 1)).all():
        raise ExperimentError(
            "p-values that are nan or outside 0 to 1", "probabilities", "drop tests that were not run"
        )
    return p


def _check_sizes(n: int, k1: int, k2: int) -> None:
    if not (1 <= k1 <= n and 1 <= k2 <= n):
        raise ExperimentError(f"sets of {k1} and {k2} out of {n}", "between 1 and all", "choose smaller sets")
