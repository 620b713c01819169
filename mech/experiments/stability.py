"""Do rankings agree: two scores, two domains, two halves of the samples, two sizes of a model, a published list?

    >>> agreement({"ram": a, "vera": b}, k=0.05, n_resamples=500).spearman     # doctest: +SKIP
    >>> sample_curve(ranking).jaccard                   # how many samples are enough    # doctest: +SKIP
    >>> overlap(ranking, read_heads("published.json")) # a list without all heads       # doctest: +SKIP

Every overlap of sets stands beside what random sets of their sizes share. How often a head stays in the top set when
samples are drawn anew is ``Ranking.stability``. Agreement is not importance: heads can be found by every score and
matter to none of the answers (``mech.ablation``).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from scipy import stats

from mech.errors import ExperimentError, OutputError
from mech.experiments.ranking import Head, Heads, Ranking
from mech.experiments.statistics import bootstrap_means, jaccard, jaccard_null, kendall, overlap_p_value, spearman


def agreement(
    rankings: Mapping[str, Ranking], k: int | float = 0.05, n_resamples: int = 0, seed: int = 0
) -> xr.Dataset:
    """How far rankings of *one* model agree: whole maps by rank correlation, top sets by overlap.

    ``jaccard_null`` is the overlap that two random sets of this size have, and ``overlap_p`` the probability of
    sharing at least as many heads by chance; both take heads as alike whatever their layer.

    Args:
        rankings: of one model, by name.
        k: heads of the top sets.
        n_resamples: with a positive number, 95% percentile intervals by drawing examples anew: the same ones for
            rankings of the same examples. Fewer distinct examples make maps noisier, so intervals of maps that agree
            well lie rather low; they hold the estimate.
        seed: of the resamples.

    Returns:
        ``spearman``, ``kendall``, ``jaccard``, ``jaccard_null``, ``overlap_p`` over (ranking, other), by name; with
        ``n_resamples`` also ``spearman_low``, ``spearman_high``, ``jaccard_low``, ``jaccard_high``.

    Raises:
        ExperimentError: no rankings, or of different models; intervals without scores per example.
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
            "compare checkpoints by giving both one name",
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
    ids = list({ranking.examples: None for ranking in rankings.values()})
    ranks, tops = [], []
    for name, ranking in rankings.items():
        if ranking.per_example is None:
            raise ExperimentError(
                f"the ranking {name!r} keeps no single examples", "scores per example", "leave out n_resamples"
            )
        means = bootstrap_means(ranking.per_example, n_resamples, [seed, ids.index(ranking.examples)])
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
    found = {}
    for name, draws in drawn.items():
        found[f"{name}_low"] = np.minimum(np.quantile(draws, 0.025, axis=-1), values[name])
        found[f"{name}_high"] = np.maximum(np.quantile(draws, 0.975, axis=-1), values[name])
    return found


def sample_curve(
    ranking: Ranking, sizes: Sequence[int] | None = None, k: int | float = 0.05, n_splits: int = 50, seed: int = 0
) -> xr.Dataset:
    """How many samples are enough: the agreement of two rankings from two disjoint sets of ``size`` samples.

    Sign: the higher, the more a ranking from ``size`` samples can be trusted. Unit: correlation; Jaccard index, to be
    compared with ``attrs["jaccard_null"]``.

    Args:
        ranking: with scores per example.
        sizes: at most half of the examples; by default 1, 2, 4, ... and the half.
        k: heads of the top sets.
        n_splits: how often the examples are split.
        seed: of the splits.

    Returns:
        ``spearman`` and ``jaccard`` over (size, split).

    Raises:
        ExperimentError: no scores per example, fewer than two, or sizes beyond half of them.
    """
    n = ranking.n_examples
    if n is None or n < 2:
        raise ExperimentError(f"a ranking of {n} examples", "scores of at least two examples", "use rank_heads(scores)")
    sizes = list(sizes) if sizes is not None else sorted({*(2**i for i in range(20) if 2**i <= n // 2), n // 2})
    if not sizes or min(sizes) < 1 or max(sizes) > n // 2 or n_splits < 1:
        raise ExperimentError(f"sizes {sizes}, {n_splits} splits", f"sizes from 1 to {n // 2}: halves are disjoint")
    rng, count, scores = np.random.default_rng(seed), ranking.count(k), ranking.per_example
    assert scores is not None
    found = np.empty((2, len(sizes), n_splits))
    for split in range(n_splits):
        order = rng.permutation(n)
        for i, size in enumerate(sizes):
            a, b = (scores[order[start : start + size]].mean(axis=0) for start in (0, size))
            tops = [set(np.argsort(-mean, axis=None, kind="stable")[:count].tolist()) for mean in (a, b)]
            found[:, i, split] = spearman(a, b), jaccard(*tops)
    data = {name: (("size", "split"), values) for name, values in zip(("spearman", "jaccard"), found, strict=True)}
    null = jaccard_null(ranking.mean.size, count, count)
    return xr.Dataset(data, {"size": sizes}, {"n_top": count, "jaccard_null": null})


def overlap(ranking: Ranking, heads: Iterable[tuple[int, int]]) -> dict[str, float]:
    """A list of heads, such as a published one, against as many top heads of a ranking of the same model.

    Returns:
        ``jaccard``, ``jaccard_null`` (two random sets of this size), ``overlap_p`` and ``mean_rank`` of the listed
        heads (0 the best head, 1 the worst, 0.5 by chance).

    Raises:
        ExperimentError: no heads, or one that the model does not have.
    """
    listed = {Head(*map(int, head)) for head in heads}
    places = {head: place for place, head in enumerate(ranking.heads)}
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


def read_heads(source: str | Path | Sequence[Any] | Mapping[str, Any]) -> Heads:
    """A list of heads as papers publish it, best first: of any length, without the sizes of its model.

    Understood are ``[[layer, head], ...]``, ``[[layer, head, score], ...]``, what ``Ranking.to_json`` wrote, and
    ``{"layer-head": score or [scores]}`` (ordered by the mean), given as such or as a JSON file.

    Raises:
        OutputError: a file that cannot be read, or something else in it; a head that comes twice.
    """
    value: Any = source
    if isinstance(source, str | Path):
        try:
            value = json.loads(Path(source).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OutputError(f"{source} cannot be read ({error})", "a JSON file of heads") from error
    try:
        if isinstance(value, Mapping) and "heads" not in value:
            named = [(name.split("-"), float(np.mean(score))) for name, score in value.items()]
            rows = [(int(layer), int(head), score) for (layer, head), score in named]
        else:
            rows = [tuple(row) for row in (value["heads"] if isinstance(value, Mapping) else value)]
        heads = [(Head(int(row[0]), int(row[1])), float(row[2]) if len(row) > 2 else -i) for i, row in enumerate(rows)]
    except (TypeError, ValueError, IndexError) as error:
        raise OutputError(f"no list of heads ({error})", "[[layer, head, score], ...]") from error
    if not heads or len({head for head, _ in heads}) < len(heads):
        raise OutputError(f"{len(heads)} heads, some twice" if heads else "an empty list", "each head once")
    return tuple(head for head, _ in sorted(heads, key=lambda pair: -pair[1]))


def scale_agreement(a: Ranking, b: Ranking, n_bins: int | None = None) -> xr.Dataset:
    """Whether two models of different size keep their score at the same *relative* depth.

    Depth runs from 0 (first layer begins) to 1 (last layer ends). Each layer's share of the positive score is spread
    evenly over its stretch of depth and collected in ``n_bins`` bins (by default as many as the shallower model has
    layers).

    Returns:
        ``share`` over (ranking, depth); ``centre`` over (ranking), the mean depth of the score; and two numbers:
        ``overlap`` (sum of the smaller share in each bin: 1 alike, 0 apart) and ``pearson`` (correlation of the shares;
        nan with fewer than three bins or an even profile, and weak evidence with few).
    """
    n_bins = min(a.n_layers, b.n_layers) if n_bins is None else n_bins
    if n_bins < 1:
        raise ExperimentError(f"n_bins={n_bins}", "at least 1")
    profiles = []
    centres = []
    for ranking in (a, b):
        mass = np.maximum(ranking.mean, 0).sum(axis=1)
        if mass.sum() <= 0:
            raise ExperimentError(f"{ranking!r} has no positive score", "some mass to place", "use another score")
        edges = np.linspace(0, 1, ranking.n_layers + 1)
        cumulated = np.concatenate([[0.0], np.cumsum(mass / mass.sum())])
        profiles.append(np.diff(np.interp(np.linspace(0, 1, n_bins + 1), edges, cumulated)))
        centres.append(float((edges[:-1] + edges[1:]) @ mass / (2 * mass.sum())))
    shares = np.array(profiles)
    even = n_bins < 3 or np.ptp(shares, axis=1).min() < 1e-12
    pearson = float("nan") if even else float(np.corrcoef(shares)[0, 1])
    names = [a.model or "a", b.model or "b"] if a.model != b.model else ["a", "b"]
    return xr.Dataset(
        {
            "share": (("ranking", "depth"), shares),
            "centre": ("ranking", np.array(centres)),
            "overlap": float(np.minimum(shares[0], shares[1]).sum()),
            "pearson": pearson,
        },
        {"ranking": names, "depth": (np.arange(n_bins) + 0.5) / n_bins},
    )
