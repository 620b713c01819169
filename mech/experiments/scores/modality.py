"""Do the heads that retrieve from text also retrieve from pictures? The same scenes, shown and written out.

    pictures, text = (haystacks("documents", 60, form=form) for form in ("pictures", "text"))
    found = modality_transfer(model, pictures, text, base)     # ``base``: the model before it was tuned
    found["shared"].sel(reading="pictures", other="base text"), modality_table(found)

Every head is scored on the pictures and on the text, in the model and, if given, in the base model before tuning. Do
the top heads coincide more than their layers explain? Of the heads that attend to the evidence in pictures, which
attended to it in text before the model saw any picture, and which were recruited?

That two sets coincide does not mean that they matter, least of all for the other form: ``transfer`` with
``{"pictures": pictures, "text": text}`` ablates the heads of each form on both.
"""

from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from scipy import stats

from mech.arguments import Amount, Count, Progress, Seed, checked, given_by
from mech.axes import EXAMPLE, HEAD, LAYER
from mech.data.samples import Samples, SomeSamples
from mech.errors import ExperimentError
from mech.experiments.ranking.ranking import head_count
from mech.experiments.scores.measure import head_scores
from mech.experiments.scores.published import Score
from mech.experiments.statistics import bootstrap_means
from mech.model import HookedMLLM
from mech.results import provenance

PICTURES, TEXT, BASE = "pictures", "text", "base "
KEPT, RECRUITED, TEXT_ONLY, NEITHER = "on text before, and on pictures", "on pictures only", "on text only", "neither"

Map = Float[np.ndarray, "layer head"]


@checked
def modality_transfer(
    model: HookedMLLM,
    pictures: SomeSamples,
    text: SomeSamples,
    base: HookedMLLM | None = None,
    *,
    score: str | Score = "ram",
    k: Amount = 0.05,
    n_resamples: Count = 1000,
    seed: Seed = 0,
    batch_size: Count = 8,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Where heads attend in pictures and in the same scenes as text, in the model and in its base before tuning.

    ``shared(A, B) = |top k of A, and of B|`` is compared with ``expected``: what sets with the same number of heads in
    each layer share when heads are permuted within layers. Unit: heads.

    Args:
        model: a hooked model.
        pictures: samples with pictures.
        text: the same samples written out (a ``context``, evidence as passages), with the same ids in the same order;
            ``haystacks(..., form="text")`` makes them.
        base: the model with its weights before tuning, for instance an earlier revision.
        score: a name of ``PUBLISHED`` or a ``Score``, one that needs no region of a picture.
        k: size of the top sets: a number, or a share of all heads.
        n_resamples, seed: resamples of the examples, for intervals.
        batch_size: samples per forward.
        progress: called with (readings done, readings in total).

    Returns:
        ``score`` over (reading, example, layer, head). The readings are ``pictures`` and ``text`` and, with a base,
        ``base text`` and ``base pictures``. Over (reading, other): ``shared`` with ``_low`` and ``_high`` (95%,
        bootstrap over examples), ``expected``, ``p`` (of sharing at least as many by chance) and ``within``
        (correlation of mean scores after subtracting each layer's mean). ``origin`` over (layer, head): the top sets
        that a head is in.

    Raises:
        ExperimentError: samples that differ between the forms, or a base of another shape.

    Cost: the passes of ``score`` for every sample and reading: 2 forwards, 4 with a base, for ``ram``.

    References: arXiv 2411.10950 (visual answers are found like those of textual in-context learning).
    """
    pictures, text = Samples(pictures), Samples(text)
    _check(model, pictures, text, base)
    models = {"": model, BASE: base} if base is not None else {"": model}
    name, asked = (score, (score,)) if isinstance(score, str) else ("score", {"score": score})
    readings = {f"{which}{form}": (model_read, samples) for which, model_read in models.items()
                for form, samples in ((PICTURES, pictures), (TEXT, text))}  # fmt: skip
    values, unit = [], ""
    for done, (model_read, samples) in enumerate(readings.values(), start=1):
        measured = head_scores(model_read, samples, asked, batch_size=batch_size, seed=seed)[name]
        values.append(measured.transpose(EXAMPLE, LAYER, HEAD).values)
        unit = measured.attrs.get("unit", "")
        if progress:
            progress(done, len(readings))
    scores = np.stack(values).astype(np.float64)
    count = head_count(k, scores[0, 0].size)
    data = xr.Dataset(
        {"score": (("reading", EXAMPLE, LAYER, HEAD), scores), **_compared(scores, count, n_resamples, seed)},
        {
            "reading": list(readings), "other": list(readings), LAYER: list(model.cfg.attention_layers),
            EXAMPLE: [sample.id or str(i) for i, sample in enumerate(pictures)],
        },
        {
            "model": model.name, "base": base.name if base is not None else "", "n_top": count, "unit": unit,
            "domain": ", ".join(pictures.domains), "score": name if isinstance(score, str) else score.definition,
            "provenance": provenance(model, {PICTURES: pictures, TEXT: text}, score=str(name), seed=seed),
        },
    )  # fmt: skip
    return data.assign(origin=_origin(data["score"].mean(EXAMPLE, skipna=False), count))


def _origin(means: xr.DataArray, count: int) -> xr.DataArray:
    """Which top sets each head is in: that of pictures and that of text (before tuning, if there is a base)."""
    before = f"{BASE}{TEXT}" if f"{BASE}{TEXT}" in means["reading"].values else TEXT
    on, had = (top_heads(means.sel(reading=reading).values, count) for reading in (PICTURES, before))
    origin = np.select([on & had, on & ~had, ~on & had], [KEPT, RECRUITED, TEXT_ONLY], NEITHER)
    return xr.DataArray(origin.astype(object), dims=(LAYER, HEAD))


@checked
def modality_table(result: given_by("modality_transfer", "score", "origin")) -> list[dict[str, Any]]:
    """Every head in the top set of pictures or text, best on pictures first, with its origin, scores and ranks."""
    means = result["score"].mean(EXAMPLE)
    ranks = {
        str(reading): stats.rankdata(-means.sel(reading=reading).values, method="min", axis=None).reshape(
            means.shape[1:]
        )
        for reading in result["reading"].values
    }
    rows = []
    for i, j in np.argwhere(result["origin"].values != NEITHER):
        row = {"head": f"L{int(result[LAYER][i])}H{j}", "origin": str(result["origin"].values[i, j])}
        for reading, rank in ranks.items():
            row |= {reading: float(means.sel(reading=reading).values[i, j]), f"{reading} rank": int(rank[i, j])}
        rows.append(row)
    return sorted(rows, key=lambda row: row[f"{PICTURES} rank"])


def top_heads(mean: Map, count: int) -> Bool[np.ndarray, "layer head"]:
    """The ``count`` heads with the highest scores; equal scores are in (layer, head) order, as in a ranking."""
    top = np.zeros(mean.size, dtype=bool)
    top[np.argsort(-mean, axis=None, kind="stable")[:count]] = True
    return top.reshape(mean.shape)


def matched_overlap(a: Bool[np.ndarray, "layer head"], b: Bool[np.ndarray, "layer head"]) -> tuple[float, float]:
    """(expected, p) of the number of heads two sets share if heads are permuted within each layer; exact.

    The number shared is a sum of hypergeometric variables, one per layer; ``p`` is the probability of at least as many.
    """
    total = np.ones(1)
    for mine, theirs in zip(a, b, strict=True):
        most = min(mine.sum(), theirs.sum())
        total = np.convolve(total, stats.hypergeom.pmf(np.arange(most + 1), len(mine), mine.sum(), theirs.sum()))
    return float(total @ np.arange(len(total))), float(min(1.0, total[int((a & b).sum()) :].sum()))


def _compared(scores: np.ndarray, count: int, n_resamples: int, seed: int) -> dict[str, tuple[tuple[str, str], Any]]:
    n = len(scores)
    tops = [top_heads(reading.mean(0), count) for reading in scores]
    drawn = []
    for reading in scores:  # every reading gets the same draws of examples
        means = bootstrap_means(reading, n_resamples, seed)
        drawn.append(np.stack([top_heads(mean, count) for mean in means]))
    centred = [(reading.mean(0) - reading.mean(0).mean(-1, keepdims=True)).ravel() for reading in scores]
    columns = {name: np.empty((n, n)) for name in ("shared", "shared_low", "shared_high", "expected", "p", "within")}
    for i in range(n):
        for j in range(n):
            shared = (tops[i] & tops[j]).sum()
            low, high = np.quantile((drawn[i] & drawn[j]).sum((1, 2)), [0.025, 0.975])
            expected, p = matched_overlap(tops[i], tops[j])
            size = np.linalg.norm(centred[i]) * np.linalg.norm(centred[j])
            within = centred[i] @ centred[j] / size if size else np.nan
            # Means of fewer distinct examples are noisier, so resamples share fewer heads than the full samples do.
            values = (shared, min(low, shared), max(high, shared), expected, p, within)
            for name, value in zip(columns, values, strict=True):
                columns[name][i, j] = value
    return {name: (("reading", "other"), value) for name, value in columns.items()}


def _check(model: HookedMLLM, pictures: Samples, text: Samples, base: HookedMLLM | None) -> None:
    asked = [[(item.id, item.question, item.answer) for item in samples] for samples in (pictures, text)]
    if len(pictures) < 2 or asked[0] != asked[1]:
        differ = [i for i, (a, b) in enumerate(zip(*asked, strict=False)) if a != b]
        raise ExperimentError(
            f"{len(pictures)} samples with pictures and {len(text)} of text"
            + (f", which differ first at {differ[0]}" if differ else ""),
            "the same ids, questions and answers in both, of two samples or more",
            'make both with haystacks(..., form="pictures") and form="text"',
        )
    if any(sample.images or sample.video for sample in text) or not all(s.images or s.video for s in pictures):
        raise ExperimentError("pictures among the text, or text among the pictures", "pictures first, then text")
    shapes = [(known.cfg.attention_layers, known.cfg.n_heads) for known in (model, base) if known is not None]
    if len(set(shapes)) > 1:
        raise ExperimentError(
            f"{model.name} with a base of another shape, {base.name if base else ''}",
            "the same model before it was tuned", "open a revision of it",
        )  # fmt: skip
