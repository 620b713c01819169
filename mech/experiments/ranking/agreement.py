"""Do rankings agree across scores, domains, lengths, checkpoints, halves of the samples, model sizes or seeds?

    >>> agreement({"ram": a, "vera": b}, k=0.05, n_resamples=500).spearman     # doctest: +SKIP
    >>> sample_curve(ranking).jaccard                   # how many samples are enough    # doctest: +SKIP
    >>> overlap(ranking, read_heads("published.json")) # a list without all heads       # doctest: +SKIP
    >>> scale_agreement(small, large).overlap           # by relative depth              # doctest: +SKIP
    >>> seed_agreement(one, two).same_examples          # heads are matched first        # doctest: +SKIP

``agreement`` compares head by head. This is right for one model on other data, with another score, or at another step
of *one* training run. Two training runs number their heads differently, because any order of the heads within a layer
gives the same model. Compared head by head, their rankings agree only by chance, even if the two models are equivalent;
``seed_agreement`` compares what does not depend on the order. Models of different sizes can be compared only by depth
(``scale_agreement``).

Every overlap of sets comes with the overlap of random sets of the same sizes. ``Ranking.stability`` says how often a
head stays in the top set when samples are resampled. Agreement is not importance: all scores can find the same heads
even if no answer depends on them (``mech.ablation``).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from scipy import optimize, stats

from mech.arguments import Amount, Count, Seed, Whole, checked, checking
from mech.errors import ExperimentError, OutputError
from mech.experiments.ranking.ranking import Head, Heads, Ranking
from mech.experiments.statistics import bootstrap_means, jaccard, jaccard_null, kendall, overlap_p_value, spearman
from mech.indices import Pairs
from mech.results.store import read_json


@checked
def agreement(rankings: Mapping[str, Ranking], k: Amount = 0.05, n_resamples: Whole = 0, seed: Seed = 0) -> xr.Dataset:
    """How well rankings of *one* model agree: whole maps by rank correlation, top sets by overlap.

    ``jaccard_null`` is the overlap of two random sets of this size; ``overlap_p`` is the probability of sharing at
    least as many heads by chance. Both treat all heads alike, whatever their layer.

    Args:
        rankings: rankings of one model, by name.
        k: size of the top sets.
        n_resamples: if positive, 95% percentile intervals from resampled examples; rankings of the same examples share
            their resamples. A resample has fewer distinct examples, which makes the maps noisier, so intervals of maps
            that agree well lie rather low; they always contain the estimate.
        seed: seed of the resamples.

    Returns:
        ``spearman``, ``kendall``, ``jaccard``, ``jaccard_null``, ``overlap_p`` over (ranking, other), by name; with
        ``n_resamples`` also ``spearman_low``, ``spearman_high``, ``jaccard_low``, ``jaccard_high``.

    Raises:
        ExperimentError: no rankings, rankings of different models, or intervals without scores per example.
    """
    names = list(rankings)
    if not names:
        raise ExperimentError("no rankings", "at least one", "pass {'name': ranking, ...}")
    shapes = {name: (ranking.mean.shape, ranking.layers) for name, ranking in rankings.items()}
    if len(set(shapes.values())) > 1:
        given = {name: shape for name, (shape, _) in shapes.items()}
        raise ExperimentError(f"rankings of different models: {given}", "one model", "use scale_agreement(a, b)")
    models = {ranking.model for ranking in rankings.values() if ranking.model}
    if len(models) > 1:
        raise ExperimentError(
            f"rankings of different models: {sorted(models)}",
            "one model",
            "use seed_agreement(a, b); to compare checkpoints of one training run, give both the same name",
        )
    n, count = rankings[names[0]].mean.size, rankings[names[0]].count(k)
    tops = {name: set(ranking.top(k)) for name, ranking in rankings.items()}
    pairs = [[(rankings[a], rankings[b], tops[a], tops[b]) for b in names] for a in names]
    values = {
        "spearman": [[spearman(a.mean, b.mean) for a, b, _, _ in row] for row in pairs],
        "kendall": [[kendall(a.mean, b.mean) for a, b, _, _ in row] for row in pairs],
        "jaccard": [[jaccard(top_a, top_b) for _, _, top_a, top_b in row] for row in pairs],
        "jaccard_null": [[jaccard_null(n, count, count)] * len(names)] * len(names),
        "overlap_p": [[overlap_p_value(n, count, count, len(x & y)) for _, _, x, y in row] for row in pairs],
    }
    if n_resamples:
        values |= _intervals(rankings, values, count, n_resamples, seed)
    dims = ("ranking", "other")
    data = {name: (dims, np.array(value)) for name, value in values.items()}
    return xr.Dataset(data, {"ranking": names, "other": names}, {"n_top": count})


def _intervals(
    rankings: Mapping[str, Ranking], values: Mapping[str, Any], count: int, n_resamples: int, seed: int
) -> dict[str, np.ndarray]:
    # Rankings of the same examples share their draws; a fit of several samples (causal head gating) is one example.
    ids = list({(ranking.examples, ranking.n_examples): None for ranking in rankings.values()})
    ranks, tops = [], []
    for name, ranking in rankings.items():
        if ranking.per_example is None:
            raise ExperimentError(
                f"the ranking {name!r} keeps only the mean", "scores per example", "leave out n_resamples"
            )
        means = bootstrap_means(
            ranking.per_example, n_resamples, [seed, ids.index((ranking.examples, ranking.n_examples))]
        )
        means = np.round(means.reshape(n_resamples, -1) / (np.abs(ranking.mean).max() or 1.0), 12)  # ties stay ties
        order = stats.rankdata(means, axis=1)
        order -= order.mean(axis=1, keepdims=True)
        size = np.linalg.norm(order, axis=1, keepdims=True)
        ranks.append(np.divide(order, size, out=np.full_like(order, np.nan), where=size > 0))
        top = np.zeros(means.shape, dtype=bool)
        np.put_along_axis(top, np.argsort(-means, axis=1, kind="stable")[:, :count], True, axis=1)
        tops.append(top)
    drawn = {
        "spearman": np.array([[(a * b).sum(1) for b in ranks] for a in ranks]),
        "jaccard": np.array([[(a & b).sum(1) / (a | b).sum(1) for b in tops] for a in tops]),
    }
    intervals = {}
    for name, draws in drawn.items():
        intervals[f"{name}_low"] = np.minimum(np.quantile(draws, 0.025, axis=-1), values[name])
        intervals[f"{name}_high"] = np.maximum(np.quantile(draws, 0.975, axis=-1), values[name])
    return intervals


@checked
def sample_curve(
    ranking: Ranking, sizes: Sequence[int] | None = None, k: Amount = 0.05, n_splits: Count = 50, seed: Seed = 0
) -> xr.Dataset:
    """How many samples are enough: how well rankings from two disjoint sets of ``size`` samples agree.

    Sign: the higher, the more a ranking from ``size`` samples can be trusted. Unit: correlation; Jaccard index, to be
    compared with ``attrs["jaccard_null"]``.

    Args:
        ranking: a ranking with scores per example.
        sizes: numbers of samples, at most half of the examples; by default 1, 2, 4, ... and half of the examples.
        k: size of the top sets.
        n_splits: how often the examples are split.
        seed: seed of the splits.

    Returns:
        ``spearman`` and ``jaccard`` over (size, split).

    Raises:
        ExperimentError: no scores per example, fewer than two examples, or sizes above half of them.
    """
    n = ranking.n_examples
    if n is None or n < 2:
        raise ExperimentError(f"a ranking of {n} examples", "scores of at least two examples", "use rank_heads(scores)")
    sizes = list(sizes) if sizes is not None else sorted({*(2**i for i in range(20) if 2**i <= n // 2), n // 2})
    if not sizes or min(sizes) < 1 or max(sizes) > n // 2 or n_splits < 1:
        raise ExperimentError(f"sizes {sizes}, {n_splits} splits", f"sizes from 1 to {n // 2}: halves are disjoint")
    rng, count, scores = np.random.default_rng(seed), ranking.count(k), ranking.per_example
    assert scores is not None
    agreements = np.empty((2, len(sizes), n_splits))
    for split in range(n_splits):
        order = rng.permutation(n)
        for i, size in enumerate(sizes):
            a, b = (scores[order[start : start + size]].mean(axis=0) for start in (0, size))
            tops = [set(np.argsort(-mean, axis=None, kind="stable")[:count].tolist()) for mean in (a, b)]
            agreements[:, i, split] = spearman(a, b), jaccard(*tops)
    data = {name: (("size", "split"), values) for name, values in zip(("spearman", "jaccard"), agreements, strict=True)}
    null = jaccard_null(ranking.mean.size, count, count)
    return xr.Dataset(data, {"size": sizes}, {"n_top": count, "jaccard_null": null})


@checked
def overlap(ranking: Ranking, heads: Pairs) -> dict[str, float]:
    """Compare a list of heads, such as a published one, with the same number of top heads of a ranking of that model.

    Returns:
        ``jaccard``, ``jaccard_null`` (two random sets of this size), ``overlap_p`` and ``mean_rank`` of the listed
        heads (0: the best head, 1: the worst, 0.5: chance).

    Raises:
        ExperimentError: no heads, or a head that the model does not have.
    """
    listed = {Head(*map(int, head)) for head in heads}
    places = {head: rank for rank, head in enumerate(ranking.heads)}
    if not listed or not listed <= set(places):
        raise ExperimentError(
            f"there is no head {min(listed - set(places))}" if listed else "an empty list",
            f"heads of {ranking!r}",
            "compare lists of the same model only",
        )
    n, count = len(places), len(listed)
    top = set(ranking.top(count))
    return {
        "jaccard": jaccard(top, listed),
        "jaccard_null": jaccard_null(n, count, count),
        "overlap_p": overlap_p_value(n, count, count, len(top & listed)),
        "mean_rank": float(np.mean([places[head] for head in listed]) / max(n - 1, 1)),
    }


@checking(OutputError)
def read_heads(source: str | Path | Sequence[Any] | Mapping[str, Any]) -> Heads:
    """A list of heads as papers publish it, best first. It can have any length and need not state the model's size.

    Accepted formats: ``[[layer, head], ...]``, ``[[layer, head, score], ...]``, the output of ``Ranking.to_json``, and
    ``{"layer-head": score or [scores]}`` (ordered by the mean), as Python values or as a JSON file.

    Raises:
        OutputError: the file cannot be read or has another format, or a head is listed twice.
    """
    value: Any = source
    if isinstance(source, str | Path):
        try:
            value = read_json(source)
        except (OSError, ValueError) as error:
            raise OutputError(f"{source} cannot be read ({error})", "a JSON file of heads") from error
    try:
        if isinstance(value, Mapping) and "heads" not in value:
            named = [(name.split("-"), float(np.mean(score))) for name, score in value.items()]
            rows = [(int(layer), int(head), score) for (layer, head), score in named]
        else:
            rows = [tuple(row) for row in (value["heads"] if isinstance(value, Mapping) else value)]
        heads = [(Head(*row[:2]), float(row[2]) if len(row) > 2 else -i) for i, row in enumerate(rows)]
    except (TypeError, ValueError, IndexError) as error:  # an ExperimentError is a ValueError
        raise OutputError(
            f"not a list of heads ({str(error).splitlines()[0]})", "[[layer, head, score], ...]"
        ) from error
    if not heads or len({head for head, _ in heads}) < len(heads):
        raise OutputError(f"{len(heads)} heads, some twice" if heads else "an empty list", "each head once")
    return tuple(head for head, _ in sorted(heads, key=lambda pair: -pair[1]))


@checked
def scale_agreement(
    a: Ranking, b: Ranking, n_bins: Count | None = None, n_permutations: Count = 1000, seed: Seed = 0
) -> xr.Dataset:
    """Whether two models of different size have their score at the same *relative* depth.

    Depth runs from 0 (start of the first layer) to 1 (end of the last). Each layer's share of the positive score is
    spread evenly over the layer's interval of depth and collected in ``n_bins`` bins (by default the number of layers
    of the shallower model).

    Returns:
        ``share`` over (ranking, depth); ``centre`` over (ranking), the mean depth of the score; and numbers:
        ``overlap`` (sum over bins of the smaller share; 1: same profile, 0: disjoint), ``overlap_null`` (its mean when
        the heads of ``b`` are permuted across its layers, so that no depth is special), ``overlap_p`` (the share of
        such permutations that overlap at least as much) and ``pearson`` (correlation of the shares; nan with fewer than
        three bins or an even profile, and weak evidence with few bins).

    Raises:
        ExperimentError: no bins, or a ranking without a positive score.
    """
    n_bins = min(a.n_layers, b.n_layers) if n_bins is None else n_bins
    if n_bins < 1:
        raise ExperimentError(f"n_bins={n_bins}", "at least 1")
    for ranking in (a, b):
        if ranking.mean.max() <= 0:
            raise ExperimentError(f"{ranking!r} has no positive score", "some positive scores", "use another score")
    shares = np.array([_profile(ranking.mean, n_bins) for ranking in (a, b)])
    middles = [(np.arange(ranking.n_layers) + 0.5) / ranking.n_layers for ranking in (a, b)]
    centres = [float(_profile(r.mean, r.n_layers) @ middle) for r, middle in zip((a, b), middles, strict=True)]
    overlap = float(np.minimum(*shares).sum())
    null = [np.minimum(shares[0], _profile(mixed, n_bins)).sum() for mixed in _permuted(b.mean, n_permutations, seed)]
    even = n_bins < 3 or np.ptp(shares, axis=1).min() < 1e-12
    pearson = float("nan") if even else float(np.corrcoef(shares)[0, 1])
    names = [a.model or "a", b.model or "b"] if a.model != b.model else ["a", "b"]
    return xr.Dataset(
        {
            "share": (("ranking", "depth"), shares),
            "centre": ("ranking", np.array(centres)),
            "overlap": overlap,
            "overlap_null": float(np.mean(null)),
            "overlap_p": _tail(overlap, null),
            "pearson": pearson,
        },
        {"ranking": names, "depth": (np.arange(n_bins) + 0.5) / n_bins},
    )


@checked
def seed_agreement(a: Ranking, b: Ranking, k: Amount = 0.05, n_permutations: Count = 200, seed: Seed = 0) -> xr.Dataset:
    """How similar the heads of two training runs of one architecture are, however the heads are numbered.

    Three comparisons, from coarse to fine, each with its null:

    * *depth*: the share of the score in each layer, as in ``scale_agreement``.
    * *order within layers*: ``sorted_spearman``, the rank correlation of the maps after each layer's heads are sorted
      by score. Null: the heads of ``b`` are permuted across layers, then sorted.
    * *the same examples*: heads are matched by what they do. The ``similarity`` of two heads is the correlation of
      their scores over examples; the one-to-one matching over all layers maximises the sum of similarities (Hungarian
      method). ``same_examples`` is the mean similarity of a's top heads to their partners. Null: the examples of ``b``
      are shuffled and the heads matched again. ``top_matched`` is the share of a's top heads whose partner is a top
      head of ``b``; ``top_matched_null`` is that share for random partners.

    Args:
        a: a ranking of one model.
        b: a ranking of another model of the same architecture, by the same score.
        k: size of the top sets.
        n_permutations: permutations for each null; a p-value is at least ``1 / (1 + n_permutations)``.
        seed: seed of the permutations.

    Returns:
        Everything in ``scale_agreement``; ``sorted_spearman``, ``sorted_spearman_null``, ``sorted_spearman_p``; and if
        both rankings keep the scores of the same examples, at least three, ``same_examples`` (with ``_null``, ``_p``),
        ``top_matched`` (with ``_null``), and over (layer, head) of ``a``: ``similarity``, ``partner_layer``,
        ``partner_head``.

    Raises:
        ExperimentError: models of different shapes, different scores, or rankings without a positive score.

    References: arXiv 1511.07543 (convergent learning: units of two training runs are matched by correlation).
    """
    if (a.layers, a.n_heads) != (b.layers, b.n_heads) or a.score != b.score:
        raise ExperimentError(
            f"{a.n_layers} x {a.n_heads} heads by {a.score!r} and {b.n_layers} x {b.n_heads} by {b.score!r}",
            "two models of the same shape, by the same score",
            "use scale_agreement for models of different size",
        )
    result = scale_agreement(a, b, n_permutations=n_permutations, seed=seed)
    ours = np.sort(a.mean, axis=1)
    alike = spearman(ours, np.sort(b.mean, axis=1))
    deals = [spearman(ours, np.sort(mixed, axis=1)) for mixed in _permuted(b.mean, n_permutations, seed)]
    result = result.assign(
        sorted_spearman=alike, sorted_spearman_null=float(np.mean(deals)), sorted_spearman_p=_tail(alike, deals)
    )
    if a.per_example is None or b.per_example is None or a.examples != b.examples or len(a.examples) < 3:
        return result
    places = {head: i for i, head in enumerate(sorted(a.heads))}
    tops = [[places[head] for head in ranking.top(k)] for ranking in (a, b)]
    mine, theirs = (_standardised(ranking.per_example) for ranking in (a, b))
    partner, similarity = _matched(mine, theirs)
    rng = np.random.default_rng(seed)
    shuffled = [_matched(mine, theirs[:, rng.permutation(theirs.shape[1])])[1] for _ in range(n_permutations)]
    same, nulls = similarity[tops[0]].mean(), [null[tops[0]].mean() for null in shuffled]
    layer, head = np.divmod(partner, a.n_heads)
    dims, shape = ("layer", "head"), a.mean.shape
    return result.assign_coords(layer=list(a.layers), head=np.arange(a.n_heads)).assign(
        same_examples=float(same),
        same_examples_null=float(np.mean(nulls)),
        same_examples_p=_tail(same, nulls),
        top_matched=float(np.isin(partner[tops[0]], tops[1]).mean()),
        top_matched_null=len(tops[1]) / len(partner),
        similarity=(dims, similarity.reshape(shape)),
        partner_layer=(dims, np.array(a.layers)[layer].reshape(shape)),
        partner_head=(dims, head.reshape(shape)),
    )


def _profile(scores: np.ndarray, n_bins: int) -> np.ndarray:
    """The share of positive score in each of ``n_bins`` equal intervals of depth."""
    mass = np.maximum(scores, 0).sum(axis=1)
    cumulated = np.concatenate([[0.0], np.cumsum(mass / mass.sum())])
    edges = np.linspace(0, 1, len(scores) + 1)
    return np.diff(np.interp(np.linspace(0, 1, n_bins + 1), edges, cumulated))


def _permuted(scores: np.ndarray, n: int, seed: int) -> Iterator[np.ndarray]:
    """The scores of all heads, permuted across layers ``n`` times."""
    if n < 1:
        raise ExperimentError(f"n_permutations={n}", "a positive number", "use 200")
    rng = np.random.default_rng(seed)
    return (rng.permutation(scores.ravel()).reshape(scores.shape) for _ in range(n))


def _tail(value: float, nulls: Sequence[float]) -> float:
    """The share of the null that is at least as large as the value, which is counted as part of the null."""
    return float((1 + (np.asarray(nulls) >= value - 1e-12).sum()) / (1 + len(nulls)))


def _standardised(scores: Any) -> np.ndarray:
    """(head, example): the product of two rows is a correlation; heads with constant scores correlate with nothing."""
    rows = scores.reshape(len(scores), -1).T
    rows = rows - rows.mean(axis=1, keepdims=True)
    size = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, size, out=np.zeros_like(rows), where=size > 1e-9)


def _matched(mine: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The partner of each row of ``mine`` in the one-to-one matching of largest total correlation, and its value."""
    alike = mine @ theirs.T
    _, partner = optimize.linear_sum_assignment(alike, maximize=True)
    return partner, alike[np.arange(len(partner)), partner]
