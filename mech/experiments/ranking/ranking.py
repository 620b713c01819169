"""From a score per head to sets of heads: the ranking, its sets of heads, their controls, and how far to trust it.

    >>> ranking = rank_heads(ram)                                  # doctest: +SKIP
    >>> ranking.top(0.05), ranking.half_mass_share()               # doctest: +SKIP
    >>> ranking.layer_matched(ranking.top(0.05), n_draws=20)       # 20 control sets    # doctest: +SKIP

A ranking orders all heads of a model by the mean of a score over examples, best first. Heads with equal scores are in
(layer, head) order, so the same scores give the same sets on every machine. The ranking keeps the score of every
example; intervals and stability are computed by resampling the examples.

The ranking says which heads *attend*. ``ablation`` tests whether they matter, on examples that were not used for the
ranking and against the control sets defined here.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Float

from mech.arguments import Amount, Count, Seed, Share, checked, is_whole, short
from mech.axes import EXAMPLE, HEAD, LAYER
from mech.errors import ExperimentError, OutputError, printable
from mech.experiments.statistics import bootstrap_interval, bootstrap_means
from mech.identity import weights_in
from mech.indices import Pairs
from mech.notebook import Shown
from mech.results.store import read_json, write_json


class _Pair(NamedTuple):
    layer: int
    head: int


class Head(_Pair):
    """A query head: layer and head index, both counted from 0. Equal to the plain tuple ``(layer, head)``."""

    __slots__ = ()

    def __new__(cls, layer: int, head: int) -> "Head":
        if not (is_whole(layer) and is_whole(head)):
            raise ExperimentError(f"Head({short(layer)}, {short(head)})", "two whole numbers", "give Head(3, 5)")
        return super().__new__(cls, layer, head)

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"

    __repr__ = __str__


Heads = tuple[Head, ...]


def head_count(k: int | float, n: int, name: str = "k") -> int:
    """How many of ``n`` heads ``k`` means: see ``Ranking.count``. ``name`` is what the caller calls it."""
    if isinstance(k, int | np.integer) and not isinstance(k, bool) and 1 <= k <= n:
        return int(k)
    if isinstance(k, float | np.floating) and 0 < k < 1:
        # The last bits of a product such as 0.3 * 15 must not affect the count.
        return max(1, math.floor(round(float(k) * n, 9) + 0.5))
    raise ExperimentError(
        f"{name}={k!r} of {n} heads", f"an int from 1 to {n}, or a share between 0.0 and 1.0",
        f"use {name}=1 or {name}=0.05",
    )  # fmt: skip


@checked
@dataclass(frozen=True, eq=False, repr=False)
class Ranking(Shown):
    """All heads of a model ordered by their mean score, best first. Made by ``rank_heads``.

    Wherever a method takes a number of heads ``k``, an int is a count and a float between 0 and 1 is a share of all
    heads of the model (see ``count``).
    """

    mean: Float[np.ndarray, "layer head"]
    per_example: Float[np.ndarray, "example layer head"] | None = None
    score: str = "ram"
    model: str = ""
    domain: str = ""
    examples: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()  # the layers that have heads, by default 0, 1, 2, ...; ``n_layers`` is their number
    weights: str = ""  # digest of the model's weights, if known
    heads: Heads = field(init=False)

    def __post_init__(self):
        if self.mean.ndim != 2 or not self.mean.size:
            raise ExperimentError(f"scores of shape {self.mean.shape}", "(layer, head)", "use rank_heads(scores)")
        if not np.isfinite(self.mean).all():
            bad = Head(*map(int, np.argwhere(~np.isfinite(self.mean))[0]))
            raise ExperimentError(f"the score of {bad} is nan or inf", "a finite score for every head")
        object.__setattr__(self, "layers", tuple(map(int, self.layers)) or tuple(range(len(self.mean))))
        order = np.argsort(-self.mean, axis=None, kind="stable")  # stable: equal scores stay in (layer, head) order
        object.__setattr__(self, "heads", tuple(self._head(i) for i in order))

    # Contents

    @property
    def n_layers(self) -> int:
        return self.mean.shape[0]

    @property
    def n_heads(self) -> int:
        """Number of query heads per layer."""
        return self.mean.shape[1]

    @property
    def n_examples(self) -> int | None:
        """How many examples the mean is taken over; None if the scores per example were not kept."""
        return None if self.per_example is None else len(self.per_example)

    @cached_property
    def table(self) -> list[tuple[int, int, float]]:
        """``(layer, head, score)`` of every head as plain numbers, best first."""
        return [(layer, head, float(self.mean[self.layers.index(layer), head])) for layer, head in self.heads]

    def scores(self) -> xr.DataArray:
        """The mean score of every head, over (layer, head)."""
        return self._map(self.mean, self.score)

    # Sets of heads

    def count(self, k: int | float) -> int:
        """How many heads ``k`` means.

        An int is a number of heads; a float between 0 and 1 is a share of all heads of the model, rounded to the
        nearest whole number (halves are rounded up), at least 1. ``1.0`` is refused: it could mean one head or all.
        """
        return head_count(k, self.mean.size)

    def top(self, k: int | float) -> Heads:
        """The best ``k`` heads, best first."""
        return self.heads[: self.count(k)]

    def bottom(self, k: int | float) -> Heads:
        """The worst ``k`` heads, worst first."""
        return self.heads[::-1][: self.count(k)]

    def middle(self, k: int | float) -> Heads:
        """``k`` heads around the median rank, best first."""
        count = self.count(k)
        start = (len(self.heads) - count) // 2
        return self.heads[start : start + count]

    @checked
    def random(self, k: Amount, n_draws: Count = 20, seed: Seed = 0, exclude: Pairs = ()) -> tuple[Heads, ...]:
        """``n_draws`` sets of ``k`` heads, each drawn from all heads except ``exclude``.

        All sets differ; fewer are returned if fewer different sets exist. With the same seed, a larger number of draws
        starts with the same sets. If nothing is excluded, a draw can contain top heads. This is what makes the test
        over sets exact, because the top set could then itself have been one of the draws.
        """
        count = self.count(k)
        excluded = set(self._known(exclude))
        pool = [i for i in range(self.mean.size) if self._head(i) not in excluded]
        if count > len(pool):
            raise ExperimentError(
                f"{count} random heads from {len(pool)} (of {self.mean.size}, {len(excluded)} excluded)",
                "at least as many heads as are drawn",
                "draw fewer, or exclude fewer",
            )
        rng = np.random.default_rng([seed, count])
        return self._draws(
            lambda: [self._head(i) for i in rng.choice(pool, count, replace=False)],
            n_draws,
            math.comb(len(pool), count),
        )

    @checked
    def layer_matched(self, heads: Pairs, n_draws: Count = 20, seed: Seed = 0) -> tuple[Heads, ...]:
        """Random sets with the same number of heads in each layer as ``heads``: the control for "it is only the layer".

        They are drawn from the *other* heads of each layer. If a layer has too few others, all of them are taken and
        the remainder is drawn from the given heads of that layer, so that the count still matches. Such a control
        shares heads with the set, and its effect is an upper bound.

        Raises:
            ExperimentError: the given heads fill their layers, so every draw would be the set itself.
        """
        given = set(self._known(heads))
        layers: list[tuple[list[Head], list[Head]]] = []  # per layer: the other heads; the given heads that fill up
        n_possible = 1
        for layer in sorted({head.layer for head in given}):
            inside = sorted(head for head in given if head.layer == layer)
            others = [Head(layer, h) for h in range(self.n_heads) if Head(layer, h) not in given]
            layers.append((others, inside))
            short = len(inside) - len(others)
            n_possible *= math.comb(len(inside), short) if short > 0 else math.comb(len(others), len(inside))
        if not any(others for others, _ in layers):
            raise ExperimentError(
                f"{len(given)} heads that fill their layers",
                "a set that leaves other heads in at least one of its layers",
                "use random sets as the control",
            )
        rng = np.random.default_rng([seed, len(given)])

        def draw() -> list[Head]:
            drawn: list[Head] = []
            for others, inside in layers:
                short = max(0, len(inside) - len(others))
                chosen = rng.choice(len(others), len(inside) - short, replace=False)
                filled = rng.choice(len(inside), short, replace=False)
                drawn += [others[i] for i in chosen] + [inside[i] for i in filled]
            return drawn

        return self._draws(draw, n_draws, n_possible)

    # How far to trust it

    @checked
    def interval(self, level: Share = 0.95, n_resamples: Count = 2000, seed: Seed = 0) -> xr.Dataset:
        """Mean, low and high of every head's score: bootstrap over examples, separately for each head."""
        bounds = bootstrap_interval(self._examples(), level, n_resamples, seed)
        parts = {"mean": bounds.mean, "low": bounds.low, "high": bounds.high}
        return xr.Dataset({name: self._map(value, name) for name, value in parts.items()}, attrs={"level": level})

    @checked
    def stability(self, n_resamples: Count = 1000, k: Amount = 0.05, seed: Seed = 0) -> xr.DataArray:
        """How often each head is in the top ``k`` when examples are resampled (0 to 1; the map sums to ``k``)."""
        count = self.count(k)
        means = bootstrap_means(self._examples(), n_resamples, seed).reshape(n_resamples, -1)
        # Sums in a different order differ in their last bits; heads with equal scores must stay in (layer, head) order.
        means = np.round(means / (np.abs(self.mean).max() or 1.0), 12)
        chosen = np.argsort(-means, axis=1, kind="stable")[:, :count]
        share = np.bincount(chosen.ravel(), minlength=self.mean.size) / n_resamples
        return self._map(share.reshape(self.mean.shape), "share of resamples in the top set")

    def half_mass_share(self) -> float:
        """The share of heads that hold half of all positive score. Small means sparse; nan if no score is positive."""
        mass = np.sort(np.maximum(self.mean, 0), axis=None)[::-1].cumsum()
        if mass[-1] <= 0:
            return float("nan")
        return float((np.searchsorted(mass, mass[-1] / 2 * (1 - 1e-12)) + 1) / mass.size)

    def gini(self) -> float:
        """Inequality of the positive scores: 0 if all heads score the same, near 1 if one head has everything.

        ``sum_i (2 i - n - 1) x_i / (n sum x)`` over the scores in ascending order, negative scores counted as 0; nan if
        no score is positive.
        """
        x = np.sort(np.maximum(self.mean, 0), axis=None)
        if x.sum() <= 0:
            return float("nan")
        return float(((2 * np.arange(1, x.size + 1) - x.size - 1) @ x) / (x.size * x.sum()))

    # To and from a file

    def to_json(self, path: str | Path | None = None) -> dict[str, Any]:
        """``{"model", "weights", "domain", "score", "n_examples", "examples", "layers", "heads"}``, plain values.

        ``heads`` are ``[layer, head, score]``, best first; ``weights`` is the digest of the model's weights. If
        ``path`` is given, the dict is also written there. Only the names of the examples are kept, because these
        examples must not test the heads.
        """
        value = {
            "model": self.model,
            "weights": self.weights,
            "domain": self.domain,
            "score": self.score,
            "n_examples": self.n_examples,
            "examples": list(self.examples),
            "layers": list(self.layers),
            "heads": [list(row) for row in self.table],
        }
        if path is not None:
            write_json(value, path)
        return value

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, Any], score: str | None = None) -> "Ranking":
        """A ranking from the output of ``to_json``, as a path or a dict. It must list every head of the model once.

        A ``HeadRecord`` works too: ``score`` chooses the score and may be omitted if the record has ``"ram"`` or only
        one score.
        """
        if isinstance(source, Mapping):
            value, where = source, "this ranking"
        else:
            where = str(source)
            try:
                value = read_json(source)
            except (OSError, ValueError) as error:
                raise OutputError(f"{where} cannot be read ({error})", "a file written by Ranking.to_json") from error
        if isinstance(value.get("scores") if isinstance(value, Mapping) else None, Mapping):
            value = _of_record(value, score, where)
        try:
            rows = [(int(layer), int(head), float(score)) for layer, head, score in value["heads"]]
            layers, n_heads = value.get("layers") or range(max(row[0] for row in rows) + 1), max(r[1] for r in rows) + 1
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise OutputError(f"{where} holds no heads ({error!r})", '"heads": [[layer, head, score], ...]') from error
        if sorted(row[:2] for row in rows) != [(i, j) for i in layers for j in range(n_heads)]:
            raise OutputError(
                f"{where} lists {len(rows)} heads for {len(layers)} layers of {n_heads}",
                "every head of the model, once",
                "add the missing heads with their scores",
            )
        mean = np.array([score for *_, score in sorted(rows)]).reshape(len(layers), n_heads)
        model, domain, weights = (str(value.get(name) or "") for name in ("model", "domain", "weights"))
        score, named = str(value.get("score", "ram")), tuple(value.get("examples") or ())
        return cls(mean, None, score, model, domain, named, tuple(layers), weights)

    def __len__(self) -> int:
        return len(self.heads)

    def __repr__(self) -> str:
        best = ", ".join(f"{Head(i, j)} {score:.3g}" for i, j, score in self.table[:3])
        of = " ".join(part for part in (self.model, self.domain) if part)
        size = f"{self.n_layers} x {self.n_heads} heads by {self.score}"
        return printable(f"Ranking({of + ': ' if of else ''}{size}: {best}, ...)")

    def _head(self, flat: int | np.integer) -> Head:
        row, head = divmod(int(flat), self.n_heads)
        return Head(self.layers[row], head)

    def _known(self, heads: Iterable[tuple[int, int]]) -> list[Head]:
        chosen = [Head(int(layer), int(head)) for layer, head in heads]
        for head in chosen:
            if not (head.layer in self.layers and 0 <= head.head < self.n_heads):
                raise ExperimentError(f"there is no head {head}", f"{self.n_layers} layers of {self.n_heads} heads")
        return chosen

    def _draws(self, draw: Callable[[], list[Head]], n_draws: int, n_possible: int) -> tuple[Heads, ...]:
        draws: list[Heads] = []
        seen: set[Heads] = set()
        while len(draws) < min(n_draws, n_possible):  # a set drawn twice would count twice
            heads = tuple(sorted(draw()))
            if heads not in seen:
                seen.add(heads)
                draws.append(heads)
        return tuple(draws)

    def _map(self, values: np.ndarray, name: str) -> xr.DataArray:
        coords = {LAYER: np.array(self.layers), HEAD: np.arange(self.n_heads)}
        return xr.DataArray(values, coords, (LAYER, HEAD), name)

    def _examples(self) -> np.ndarray:
        if self.per_example is None:
            raise ExperimentError(
                "a ranking that keeps only the mean", "scores per example", "make it with rank_heads(scores)"
            )
        return self.per_example


def _of_record(value: Mapping[str, Any], score: str | None, where: str) -> dict[str, Any]:
    """One score of a ``HeadRecord``, in the format of ``Ranking.to_json``."""
    known = list(value["scores"])
    name = score or ("ram" if "ram" in known else known[0] if len(known) == 1 else None)
    if name not in known:
        raise OutputError(f"{where} without the score {name!r}" if name else f"{where} of {len(known)} scores",
                          ", ".join(map(str, known)), "pass score=")  # fmt: skip
    try:
        layers, data, model = value["layers"], value["data"], value["model"]
        rows = zip(layers, value["scores"][name]["mean"], strict=True)
        heads = [[layer, head, mean] for layer, means in rows for head, mean in enumerate(means)]
        about = {"model": model["name"], "weights": model["weights"], "domain": data["domain"]}
        return {**about, "examples": data["samples"], "layers": layers, "score": name, "heads": heads}
    except (KeyError, TypeError, ValueError) as error:
        raise OutputError(
            f"{where} is not a record of heads ({error!r})", "the output of HeadRecord.to_json"
        ) from error


@checked
def rank_heads(
    scores: xr.Dataset | xr.DataArray, score: str = "ram", *, model: str | None = None, domain: str | None = None
) -> Ranking:
    """Order all heads by their mean score over examples, best first.

    Args:
        scores: an array over (example, layer, head) in any order, or over (layer, head); or a dataset, from which the
            variable ``score`` is taken.
        score: the name of the score; for an array without a name it is only a label.
        model, domain: labels; by default those in the attributes of ``scores``.

    Raises:
        ExperimentError: other dimensions, or scores that are nan or infinite.
    """
    attrs = dict(scores.attrs)
    if isinstance(scores, xr.Dataset):
        if score not in scores:
            known = ", ".join(map(str, scores.data_vars))
            raise ExperimentError(f"there is no score {score!r} in this dataset", known or "a variable", "pass score=")
        array = scores[score]
        attrs |= array.attrs
    else:
        array, score = scores, str(scores.name or score)
    dims = (EXAMPLE, LAYER, HEAD) if EXAMPLE in array.dims else (LAYER, HEAD)
    if set(array.dims) != set(dims):
        given = f"scores over ({', '.join(map(str, array.dims))})"
        raise ExperimentError(
            given, "(example, layer, head) or (layer, head)", "average or select the other dimensions"
        )
    values = np.asarray(array.transpose(*dims).values, dtype=np.float64)
    if values.ndim == 3 and not len(values):
        raise ExperimentError("scores of no examples", "at least one example", "measure some examples")
    if not np.isfinite(values).all():
        where = dict(zip(dims, map(int, np.argwhere(~np.isfinite(values))[0]), strict=True))
        raise ExperimentError(f"the score at {where} is nan or inf", "finite scores", "drop the example, or fix it")
    model = str(attrs.get("model") or "") if model is None else model
    domain = str(attrs.get("domain") or "") if domain is None else domain
    weights = weights_in(attrs)
    layers = tuple(map(int, scores[LAYER].values)) if LAYER in scores.coords else ()
    if values.ndim == 2:
        return Ranking(values, None, score, model, domain, layers=layers, weights=weights)
    ids = tuple(map(str, scores[EXAMPLE].values)) if EXAMPLE in scores.coords else ()
    if "samples" in attrs:  # one example stands for several samples (causal head gating)
        ids = tuple(map(str, attrs["samples"]))
    return Ranking(values.mean(axis=0), values, score, model, domain, ids, layers, weights)
