"""Evidence retrieval: can a few heads find the right page, frame or part of a picture by their attention?

    found = evidence_retrieval(model, test, ranking, over="pages")
    retrieval_table(found)                          # hit@k, recall@k and MRR of every band, with intervals and tests
    evidence_retrieval(model, test, ranking, over="cells", grid=(4, 4))

Every candidate (a page, a frame, a cell of the picture) is scored by how much a set of heads attends to it from the
question, and the candidates are ranked. Nothing is trained. A good ranking says that the heads point at the evidence,
not only that they attend to it more than other heads do. The top heads are compared with the same number of bottom
heads, random heads and vision heads, with all heads, and with a random order, on samples that did not find them.

It does not say that the model *uses* what these heads see (``mech.ablation``).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float

from mech.arguments import NOT_EMPTY, Amount, Count, Progress, Seed, checked, given_by, one_of
from mech.axes import EXAMPLE
from mech.data.regions import Frames, Pages
from mech.data.samples import Sample, Samples, SomeSamples
from mech.errors import ExperimentError
from mech.experiments.attention.rows import in_batches, mean_rows, read_rows, row_weights
from mech.experiments.effects import against_random
from mech.experiments.ranking.checks import other_model_attrs, refuse_ranking, refuse_without_evidence
from mech.experiments.ranking.ranking import Ranking
from mech.experiments.ranking.sets import HeadSet, head_sets
from mech.experiments.statistics import holm, mean_of
from mech.indices import Pairs
from mech.inputs import Inputs, TokenLayout
from mech.model import AttentionCall, HookedMLLM
from mech.results import provenance

OVER = ("pages", "frames", "cells")
REDUCE = ("mean", "sum")
BAND, RANK_K = "band", "k"


@checked
@torch.no_grad()
def evidence_retrieval(
    model: HookedMLLM,
    samples: SomeSamples,
    ranking: Ranking | Annotated[Mapping[str, Pairs], NOT_EMPTY],
    *,
    over: one_of(OVER) | None = None,
    grid: tuple[Count, Count] = (4, 4),
    heads: Amount = 0.05,
    ks: Annotated[Sequence[Count], NOT_EMPTY] = (1, 2, 5),
    reduce: one_of(REDUCE) = "mean",
    n_random: Count = 100,
    seed: Seed = 0,
    batch_size: Count = 8,
    progress: Progress | None = None,
    allow_other_model: bool = False,
) -> xr.Dataset:
    """How high sets of heads rank the candidates that hold the evidence, sample by sample.

    ``score(c) = sum over heads of mean over question rows of mean (or sum) over tokens y of c of A[x, y]``. Candidates
    are ranked by it; for ties, expected values over all orders are given. ``hit@k`` is 1 if one of the first k holds
    evidence, ``recall@k`` the share of evidence candidates among the first k, ``reciprocal_rank`` 1 over the rank of
    the first evidence candidate.

    Sign: higher is better. Unit: shares.

    Args:
        model: a hooked model.
        samples: samples with evidence that were not used to find the heads.
        ranking: its top, bottom and random ``heads`` are compared with vision heads (the same number, by attention to
            all visual tokens of the tested samples: a control that sees more than it should) and all heads. Or sets of
            heads by name.
        over: ``"pages"`` (whole pictures), ``"frames"`` (of a video) or ``"cells"`` of the picture; by default frames
            for videos, pages if every sample has several pictures, else cells.
        grid: rows and columns of the cells.
        heads: how many heads a set holds, see ``Ranking.count``.
        ks: the values of k for ``hit@k`` and ``recall@k``.
        reduce: ``"mean"`` per token, or ``"sum"``, which favours large candidates.
        n_random, seed: number and seed of the random sets, which contain no top heads; they cost no forward.
        batch_size, progress: samples per forward; called with (samples done, samples in total).
        allow_other_model: accept a ranking made on another model of this shape; the attribute ``other_model`` says so.

    Returns:
        ``reciprocal_rank`` (set, example), ``hit`` and ``recall`` (set, k, example), with the band and the draw of
        each set; for a random order ``chance_rr`` (example), ``chance_hit`` and ``chance_recall`` (k, example);
        ``n_candidates`` and ``n_right`` (example).

    Raises:
        ExperimentError: no evidence, fewer than two candidates or none without evidence, heads of another model or
            found on these samples, unknown options.

    Cost: one forward per sample, plus the question's rows.

    References: arXiv 2506.09944 (QRHead); 2503.06287 (localization heads).
    """
    samples = Samples(samples)
    _check(model, samples, ranking, ks)
    other = refuse_ranking(ranking, model, samples, allow_other_model) if isinstance(ranking, Ranking) else ""
    what = over or _natural(samples)
    rows = [model.inputs_of(sample).to("cpu") for sample in samples]
    candidates = [_candidates(row.layout.visual, what, grid) for row in rows]
    right = [_right(row.layout.visual, sample, own) for row, sample, own in zip(rows, samples, candidates, strict=True)]
    attention: list[Float[np.ndarray, "layer head candidate"]] = []
    for batch, indices in in_batches(rows, batch_size):
        attention += _of_candidates(model, batch, [candidates[i] for i in indices], reduce)
        if progress:
            progress(indices[-1] + 1, len(samples))
    if isinstance(ranking, Ranking):
        chosen = _sets(ranking, _by_vision(ranking, attention, candidates, reduce), heads, n_random, seed)
    else:
        chosen = [HeadSet(str(name), 0, tuple(map(tuple, given))) for name, given in ranking.items()]  # type: ignore[misc]
    result = _dataset(chosen, samples, attention, right, model.cfg.attention_layers, ks)
    result.attrs = {
        "kind": "retrieval", "model": model.name, "domain": ", ".join(samples.domains), "over": what, "reduce": reduce,
        "provenance": provenance(model, samples, over=what, reduce=reduce, seed=seed),
        **other_model_attrs([other]),
    }  # fmt: skip
    return result


def _of_candidates(
    model: HookedMLLM, rows: Sequence[Inputs], candidates: Sequence[Sequence[np.ndarray]], reduce: str
) -> list[Float[np.ndarray, "layer head candidate"]]:
    """The attention from each row's question to each of its candidates."""
    inputs = model.collate(rows)
    weight = row_weights(inputs, "question").to(model.device)
    at = weight.sum(0).nonzero().flatten()
    length = len(inputs.layouts[0].visual)
    member = torch.zeros(len(rows), length, max(map(len, candidates)), device=model.device)
    for row, (alone, own) in enumerate(zip(rows, candidates, strict=True)):
        left = length - len(alone.layout.visual)
        for slot, tokens in enumerate(own):
            member[row, torch.as_tensor(tokens + left), slot] = 1 / len(tokens) if reduce == "mean" else 1

    def read(call: AttentionCall, pattern: torch.Tensor) -> dict:
        mean = mean_rows(pattern, weight[:, at])
        return {"candidate": torch.einsum("bhk,bkc->bhc", mean, member.to(mean))}

    mass = read_rows(model, inputs, at, read)["candidate"].cpu().numpy()
    return [values[..., : len(own)] for values, own in zip(mass, candidates, strict=True)]


@checked
def retrieval_table(
    result: given_by("evidence_retrieval", BAND, RANK_K, "reciprocal_rank"),
) -> list[dict[str, float | str | int]]:
    """Each band of ``evidence_retrieval`` as a row: means with intervals over samples (and random sets), and p-values.

    ``p_value`` tests a band's reciprocal rank against the random sets: the larger of ``p_samples`` (sign flips) and
    ``p_sets`` (its rank among the sets). ``p_adjusted`` is Holm's correction over all bands. Chance is the last row.
    """
    random = result["reciprocal_rank"].values[result[BAND].values == "random"]
    table: list[dict[str, float | str | int]] = []
    for band in dict.fromkeys(map(str, result[BAND].values)):
        here = result.isel(set=np.flatnonzero(result[BAND].values == band))
        row: dict[str, float | str | int] = {
            "band": band,
            "n_heads": int(here["n_heads"][0]),
            "sets": here.sizes["set"],
        }
        for name, value in _measures(here):
            interval = mean_of(value)
            row |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
        if band != "random" and len(random):
            test = against_random(here["reciprocal_rank"].values.mean(0), random)
            row |= {name: test[name] for name in ("p_value", "p_samples", "p_sets")}
        table.append(row)
    tested = [row for row in table if "p_value" in row]
    for row, adjusted in zip(tested, holm(np.array([row["p_value"] for row in tested])), strict=True):
        row["p_adjusted"] = float(adjusted)
    chance: dict[str, float | str | int] = {
        "band": "chance",
        "n_heads": 0,
        "sets": 0,
        "mrr": float(result["chance_rr"].mean()),
    }
    for k in result[RANK_K].values:
        for name in ("hit", "recall"):
            chance[f"{name}@{k}"] = float(result[f"chance_{name}"].sel(k=k).mean())
    return [*table, chance]


def _measures(here: xr.Dataset) -> list[tuple[str, np.ndarray]]:
    at_k = [(f"{name}@{k}", here[name].sel(k=k).values) for k in here[RANK_K].values for name in ("hit", "recall")]
    return [("mrr", here["reciprocal_rank"].values), *at_k]


def _check(
    model: HookedMLLM,
    samples: Samples,
    ranking: Ranking | Mapping[str, Iterable[tuple[int, int]]],
    ks: Sequence[int],
) -> None:
    if len(set(ks)) < len(ks):
        raise ExperimentError(f"ks={list(ks)}", "different numbers", "use ks=(1, 2, 5)")
    refuse_without_evidence(samples)
    if not isinstance(ranking, Ranking) and (
        not ranking
        or any(
            not set(map(tuple, heads)) or not set(map(tuple, heads)) <= _all(model)
            for heads in map(list, ranking.values())
        )
    ):
        raise ExperimentError(f"sets {ranking!r}", f"heads of {model.name} by name", 'use {"mine": [(3, 2)]}')


def _all(model: HookedMLLM) -> set[tuple[int, int]]:
    return {(layer, head) for layer in model.cfg.attention_layers for head in range(model.cfg.n_heads)}


def _natural(samples: Samples) -> str:
    if any(sample.video for sample in samples):
        return "frames"
    return "pages" if all(len(sample.images) > 1 for sample in samples) else "cells"


def _candidates(layout: TokenLayout, over: str, grid: tuple[int, int]) -> list[np.ndarray]:
    """The tokens of each candidate. Frames that share their tokens are one candidate."""
    if over == "frames":
        starts = range(0, len(layout.images), layout.frames_per_token) if layout.has_video else ()
        candidates = [layout.positions(Frames(start)) for start in starts]
    elif layout.has_video:
        raise ExperimentError(f"over={over!r} of a video", "frames", 'use over="frames"')
    elif over == "pages":
        candidates = [layout.positions(Pages(page)) for page in range(len(layout.images))]
    else:
        cells = [layout.cells(*grid, image=image) for image in range(len(layout.images))]
        candidates = [np.asarray(tokens) for picture_cells in cells for tokens in picture_cells.values()]
    if len(candidates) < 2:
        raise ExperimentError(
            f"{len(candidates)} candidates (over={over!r})", "at least two to choose from", 'over="cells"'
        )
    return candidates


def _right(layout: TokenLayout, sample: Sample, candidates: list[np.ndarray]) -> Bool[np.ndarray, " candidate"]:
    """Which candidates hold evidence; for a box or mask over several candidates, those that hold the most of it."""
    evidence = layout.positions(sample.evidence)
    shared = np.array([np.isin(tokens, evidence).sum() for tokens in candidates])
    whole = any(isinstance(region, Pages | Frames) for region in sample.evidence)
    right = shared > 0 if whole else shared == max(shared.max(), 1)
    if right.all() or not right.any():
        raise ExperimentError(
            f"evidence of sample {sample.id!r} in {right.sum()} of {len(candidates)} candidates",
            "candidates with and without evidence", "choose other candidates: over=, grid=",
        )  # fmt: skip
    return right


def _by_vision(
    ranking: Ranking, attention: list[np.ndarray], candidates: list[list[np.ndarray]], reduce: str
) -> Ranking:
    """The same heads ranked by their attention to all candidates together."""
    sizes = [[len(tokens) if reduce == "mean" else 1 for tokens in groups] for groups in candidates]
    seen = np.mean([(mass * size).sum(-1) for mass, size in zip(attention, sizes, strict=True)], axis=0)
    return Ranking(seen, score="vision_mass", layers=ranking.layers)


def _sets(ranking: Ranking, vision: Ranking, heads: int | float, n_random: int, seed: int) -> list[HeadSet]:
    """The top heads and all sets they are compared with."""
    top, bottom, *others = head_sets(ranking, ("top", "bottom", "random", "all"), heads, n_random, seed)
    return [top, bottom, HeadSet("vision", 0, vision.top(len(top.heads))), *others]


def _dataset(
    sets: Sequence[HeadSet],
    samples: Samples,
    attention: list[np.ndarray],
    right: list[Bool[np.ndarray, " candidate"]],
    layers: Sequence[int],
    ks: Sequence[int],
) -> xr.Dataset:
    index_of = {layer: i for i, layer in enumerate(layers)}
    rr, hit, recall = np.zeros((len(sets), len(samples))), *np.zeros((2, len(sets), len(ks), len(samples)))
    for row, chosen in enumerate(sets):
        at = tuple(np.array([(index_of[layer], head) for layer, head in chosen.heads]).T)
        for column, (mass, gold) in enumerate(zip(attention, right, strict=True)):
            rr[row, column], hit[row, :, column], recall[row, :, column] = _judged(mass[at].sum(0), gold, ks)
    chance = [_judged(np.zeros(len(gold)), gold, ks) for gold in right]
    by_k = ("set", RANK_K, EXAMPLE)
    result = xr.Dataset(
        {
            "reciprocal_rank": (("set", EXAMPLE), rr),
            "hit": (by_k, hit),
            "recall": (by_k, recall),
            "chance_rr": (EXAMPLE, np.array([pair[0] for pair in chance])),
            "chance_hit": ((RANK_K, EXAMPLE), np.array([pair[1] for pair in chance]).T),
            "chance_recall": ((RANK_K, EXAMPLE), np.array([pair[2] for pair in chance]).T),
            "n_candidates": (EXAMPLE, np.array([len(gold) for gold in right])),
            "n_right": (EXAMPLE, np.array([int(gold.sum()) for gold in right])),
        },
        {
            BAND: ("set", np.array([chosen.band for chosen in sets], dtype=str)),
            "draw": ("set", np.array([chosen.draw for chosen in sets])),
            "n_heads": ("set", np.array([len(chosen.heads) for chosen in sets])),
            RANK_K: list(ks),
            EXAMPLE: samples.names,
        },
    )
    for name in result.data_vars:
        result[name].attrs = {"unit": "candidates" if str(name).startswith("n_") else "share", "sign": "more: better"}
    return result


def _judged(
    score: Float[np.ndarray, " candidate"], right: Bool[np.ndarray, " candidate"], ks: Sequence[int]
) -> tuple[float, np.ndarray, np.ndarray]:
    """Expected reciprocal rank, hit@k and recall@k, with tied candidates in random order."""
    n = len(score)
    rr, none_yet, hit, recall = 0.0, 1.0, np.zeros(n), np.zeros(n)
    done, found = 0, 0.0
    for value in np.unique(score)[::-1]:
        tied = score == value
        size, good = int(tied.sum()), int((tied & right).sum())
        none = 1.0  # probability that none of the first j of these holds evidence
        for j in range(1, size + 1):
            bad_left = size - good - (j - 1)
            here = 1 - max(bad_left, 0) / (size - (j - 1)) if none > 0 else 1.0
            rr += none_yet * none * here / (done + j)
            none *= 1 - here
            hit[done + j - 1] = 1 - none_yet * none
            recall[done + j - 1] = found + good * j / size
        none_yet, done, found = none_yet * none, done + size, found + good
    at = np.minimum(np.asarray(ks), n) - 1
    return rr, hit[at], recall[at] / right.sum()
