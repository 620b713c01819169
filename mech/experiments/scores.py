"""The scores by which the literature ranks heads, side by side: RAM and its relatives, from as few passes as possible.

    found = head_scores(model, samples, ("ram", "mm_retrieval", "retrieval_head"))
    found["mm_retrieval"]                            # example, layer, head; attrs say unit, definition and source
    rankings = {name: rank_heads(found, name) for name in found}
    agreement(rankings, k=0.05)                      # do they name the same heads?

    head_scores(model, samples, {"mine": Score("last", "share", calibrate="shifted")})

A score is one frozen ``Score``: which query rows look (``queries``), what becomes of a row's attention (``reduce``),
what it is compared with (``calibrate``), and what becomes of an example (``aggregate``); the mean over rows, then over
examples, is the score of a head. ``PUBLISHED`` names those of the papers, each with its source and where it differs
here.

What scores do not say is whether a head matters (``mech.ablation``), or beats chance (``mech.retrieval_test``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mech.axes import EXAMPLE, HEAD, LAYER
from mech.data.samples import Sample, Samples
from mech.errors import ExperimentError, suggestion
from mech.experiments.attention_rows import in_batches
from mech.experiments.heads import Progress
from mech.experiments.localization import localized
from mech.experiments.ranking import head_count
from mech.experiments.scores_reading import Reading, prepared, read_pass, trimmed
from mech.model import HookedMLLM
from mech.results import provenance

NULL_QUESTION = "N/A"
REGION_DRAWS = 8  # same-size random regions for each example
OUTPUT = ("answer", "generated")
WORDS: dict[str, tuple[str, ...]] = {
    "queries": ("question", "last", *OUTPUT),
    "reduce": ("sum", "mean", "hit", "hit_size", "share", "value_norm", "trimmed", "entropy"),
    "aggregate": ("mean", "frequency"),
    "calibrate": ("none", "null_question", "size", "random", "shifted", "no_sinks"),
    "on": ("evidence", "image"),
}
UNITS = {
    "sum": "attention mass",
    "mean": "attention mass per token",
    "hit": "share of query rows",
    "hit_size": "share of query rows per token",
    "share": "share of visual attention mass",
    "value_norm": "share of value-norm-weighted attention",
    "trimmed": "attention mass",
    "entropy": "share of examples",
}


@dataclass(frozen=True)
class Score:
    """One way to score a head by its attention ``A`` [query x, key y]; ``E`` are the tokens it is scored on.

    Sign: the higher, the more the head retrieves. Unit: ``UNITS[reduce]``; of a calibrated score a difference of it;
    of ``frequency`` a share of examples.

    Attributes:
        queries: rows x: ``"question"``; ``"last"`` token of the prompt; ``"answer"``, the rows that *predict* each
            token of the right answer (teacher-forced); ``"generated"``, those that predict what the model says.
        reduce: of a row: ``"sum"`` of A over E; ``"mean"`` (sum / |E|); ``"hit"``, 1 if the argmax over all keys lies
            in E; ``"hit_size"`` (hit / |E|); ``"share"`` (sum / sum over all visual tokens, 0 where a window holds
            none); ``"value_norm"`` (A times the norm of the value, sum over E / sum over all keys); ``"trimmed"``, the
            sum over E without tokens more than two deviations below E's mean; ``"entropy"``, low entropy in space (see
            ``localization.py``).
        aggregate: ``"mean"``: an example counts by its value; ``"frequency"``: by 1 if the head is among the ``top`` of
            this example, else 0.
        calibrate: what is subtracted: nothing; the same under ``"null_question"`` ("N/A"); ``"size"``, what attention
            spread evenly over visible keys gives (for a hit: an argmax at random); ``"random"``, the mean of regions of
            the same size and shape elsewhere; ``"shifted"``, that of E moved half way through the visual tokens. Or
            ``"no_sinks"``: keys with massive activations get no attention.
        on: ``"evidence"``, or ``"image"``: all visual tokens (then evidence is not asked for).
        top: heads that count in ``frequency``, a number or a share.
        source: paper, and what differs from it.
    """

    queries: str = "question"
    reduce: str = "sum"
    aggregate: str = "mean"
    calibrate: str = "none"
    on: str = "evidence"
    top: int | float = 0.05
    source: str = ""

    def __post_init__(self):
        for field, words in WORDS.items():
            if (given := getattr(self, field)) not in words:
                raise ExperimentError(
                    f"a score with {field}={given!r}", ", ".join(words), suggestion(str(given), words)
                )
        head_count(self.top, 10**6)
        for wrong, expected in (
            (self.reduce == "trimmed" and self.calibrate not in ("none", "null_question"), "no null but the question"),
            (self.on == "image" and self.calibrate in ("random", "shifted"), "evidence: all tokens are nowhere else"),
            (
                self.reduce == "entropy"
                and (self.on, self.aggregate, self.calibrate) != ("image", "frequency", "none"),
                'on="image", aggregate="frequency", calibrate="none"',
            ),
        ):
            if wrong:
                raise ExperimentError(f"{self!r}", f"with reduce={self.reduce!r}, on={self.on!r}: {expected}")

    @property
    def unit(self) -> str:
        if self.aggregate == "frequency":
            return "share of examples"
        return UNITS[self.reduce] + ("" if self.calibrate in ("none", "no_sinks") else ", difference to its null")

    @property
    def definition(self) -> str:
        """The four words in one line."""
        return f"{self.queries} rows, {self.reduce} on {self.on}, {self.aggregate} of examples, null: {self.calibrate}"


PUBLISHED: dict[str, Score] = {
    "ram": Score(source="arXiv 2606.05843, Eq. 1"),
    "mm_retrieval": Score(calibrate="null_question", source="MMRetHead, arXiv 2605.27243"),
    "visual_retrieval": Score("answer", source="arXiv 2608.27417; of its variants output tokens, sum, mean"),
    "retrieval_head": Score(
        "generated",
        "hit",
        source="arXiv 2404.15574; a visual token cannot be copied, so that the key need not equal the generated token, "
        "and hits are shares of generated tokens instead of shares of the needle",
    ),
    "sparse_mm": Score(
        "answer",
        "hit_size",
        source="arXiv 2506.05344; the evidence stands for the box of every answer token, in place of one OCR box each",
    ),
    "vera": Score(reduce="share", source="arXiv 2602.10146; the question's rows look, as for RAM"),
    "qr_head": Score(
        reduce="trimmed",
        calibrate="null_question",
        source="arXiv 2506.09944; the evidence in place of the gold document",
    ),
    "localization": Score(
        "last",
        "entropy",
        "frequency",
        on="image",
        top=10,
        source="arXiv 2503.06287; the elbow is taken over these examples, and components do not cross pictures",
    ),
    "vision_mass": Score(on="image", source="the 'vision heads' comparator of arXiv 2606.05843"),
}


def score_called(name: str) -> Score:
    """A published score by its name.

    Raises:
        ExperimentError: there is none.
    """
    if name not in PUBLISHED:
        raise ExperimentError(f"no score is called {name!r}", ", ".join(PUBLISHED), suggestion(name, PUBLISHED))
    return PUBLISHED[name]


class Pass(NamedTuple):
    """One forward per sample: under the null question or not, and with which text behind the prompt."""

    null: bool
    text: str

    def __str__(self) -> str:
        return ("null question" if self.null else "question") + (f" + {self.text}" if self.text else "")


def passes(scores: Sequence[str] | Mapping[str, Score]) -> dict[Pass, tuple[str, ...]]:
    """The forwards per sample that a set of scores costs, and which scores read each of them.

    What follows a prompt does not change what its rows see, so that rows of the prompt are read from the pass with the
    answer where there is one. ``"generated"`` also costs the generation itself.
    """
    named = _named(scores)
    plan: dict[Pass, list[str]] = {}
    for null in (False, True):
        texts = {
            name: score.queries if score.queries in OUTPUT else ""
            for name, score in named.items()
            if not null or score.calibrate == "null_question"
        }
        fullest = next((text for text in OUTPUT if text in texts.values()), "")
        for name, text in texts.items():
            plan.setdefault(Pass(null, text or fullest), []).append(name)
    return {key: tuple(names) for key, names in plan.items()}


@torch.no_grad()
def head_scores(
    model: HookedMLLM,
    samples: Samples | Sequence[Sample],
    scores: str | Sequence[str] | Mapping[str, Score] = ("ram",),
    *,
    batch_size: int = 8,
    seed: int = 0,
    sink_tau: float = 20.0,
    max_new_tokens: int = 8,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Any scores of every text head, sample by sample, from shared passes.

    ``score[i, l, h] = mean over rows x of reduce(A[l, h, x, :], E_i) - null``; see ``Score``.

    Sign: the higher, the more the head retrieves. Unit: ``attrs["unit"]`` of each variable.

    Args:
        samples: with evidence where a score asks for it, with answers for ``"answer"`` rows.
        scores: names of ``PUBLISHED``, or name -> ``Score``.
        batch_size: samples per forward.
        seed: of the random regions.
        sink_tau: a key is a sink of a layer if the largest entry of its RMS-normed state is at least this.
        max_new_tokens: of ``"generated"``, greedy; the text it gives is teacher-forced.
        progress: called with (samples done, samples in all).

    Returns:
        One variable for each score, with dims example, layer, head; layers with no visual token in reach score 0.

    Raises:
        ExperimentError: an unknown score; no evidence, no answer, nothing generated, no room for a region elsewhere.
        RegionError: evidence outside its image, or that covers no token.

    Cost: ``len(passes(scores))`` forwards per sample (``attrs["passes"]``), plus the query rows of the attention.

    References: ``attrs["source"]`` of each variable; sinks: arXiv 2503.03321 (tau = 20), where sink dimensions are
    fixed per model and any dimension counts here.
    """
    named, samples = _named(scores), Samples(samples)
    _check(named, samples)
    plan = passes(named)
    regions = {name: {"random": REGION_DRAWS, "shifted": 1}.get(score.calibrate, 0) for name, score in named.items()}
    said = [sample.answer for sample in samples]
    rows: dict[Pass, list[Any]] = {}
    # Everything that can be refused is refused before the first forward; what was generated is known only behind one.
    for step in sorted(plan, key=lambda step: step.text == "generated"):
        if step.text == "generated" and not any(other.text == "generated" for other in rows):
            said = _generated(model, samples, batch_size, max_new_tokens)
        asked = [
            replace(
                sample,
                question=NULL_QUESTION if step.null else sample.question,
                answer=said[i] if step.text == "generated" else sample.answer,
            )
            for i, sample in enumerate(samples)
        ]
        draws = max(regions[name] for name in plan[step])
        on_evidence = any(named[name].on == "evidence" for name in plan[step])
        rows[step] = [
            prepared(model.inputs_of(sample, answer=bool(step.text)).to("cpu"),
                     sample.evidence if on_evidence else (), draws, [seed, i])
            for i, sample in enumerate(asked)
        ]  # fmt: skip
    parts: dict[str, list[np.ndarray]] = {}
    for _, batch in in_batches(samples, batch_size):
        found: dict[bool, dict[str, Tensor]] = {False: {}, True: {}}
        for step, names in plan.items():
            readings = {name: Reading(named[name], regions[name]) for name in names}
            found[step.null] |= read_pass(model, [rows[step][i] for i in batch], readings, sink_tau)
        for name, value in found[False].items():
            value = value - found[True][name] if name in found[True] else value
            if name in named and named[name].reduce == "trimmed":
                step = next(step for step in plan if name in plan[step])
                value = trimmed(value, [rows[step][i].evidence for i in batch])
            parts.setdefault(name, []).append(value.cpu().numpy())
        if progress:
            progress(batch[-1] + 1, len(samples))
    values = {name: np.concatenate(found) for name, found in parts.items()}
    return _dataset(model, samples, named, values, plan, seed)


def _named(scores: str | Sequence[str] | Mapping[str, Score]) -> dict[str, Score]:
    names = [scores] if isinstance(scores, str) else list(scores)
    if not names:
        raise ExperimentError("no scores", "at least one", f"choose from {', '.join(PUBLISHED)}")
    return dict(scores) if isinstance(scores, Mapping) else {name: score_called(name) for name in names}


def _check(named: Mapping[str, Score], samples: Samples) -> None:
    if not len(samples):
        raise ExperimentError("no samples", "at least one", "pass some")
    needs = (
        ("evidence", lambda score: score.on == "evidence", lambda sample: sample.evidence),
        ("answer", lambda score: score.queries == "answer", lambda sample: sample.answer.strip()),
    )
    for what, asks, has in needs:
        lacking = [sample.id or str(i) for i, sample in enumerate(samples) if not has(sample)]
        asking = [name for name, score in named.items() if asks(score)]
        if lacking and asking:
            raise ExperimentError(
                f"{len(lacking)} samples have no {what}, the first is {lacking[0]!r}",
                f"samples with {what}, which {asking[0]!r} asks for",
                f"set Sample.{what}, or choose scores without it (vision_mass, localization)",
            )


def _generated(model: HookedMLLM, samples: Samples, batch_size: int, max_new_tokens: int) -> list[str]:
    said: list[str] = []
    rows = [model.inputs_of(sample).to("cpu") for sample in samples]
    for batch, _ in in_batches(rows, batch_size):
        said += model.generate_text(model.collate(batch), max_new_tokens=max_new_tokens)
    if silent := [sample.id or str(i) for i, (sample, text) in enumerate(zip(samples, said, strict=True)) if not text]:
        raise ExperimentError(
            f"nothing was generated for {len(silent)} samples, the first is {silent[0]!r}",
            "an answer whose rows can be read",
            'score the rows of the right answer instead: queries="answer"',
        )
    return said


def _dataset(
    model: HookedMLLM,
    samples: Samples,
    named: Mapping[str, Score],
    values: Mapping[str, np.ndarray],
    plan: Mapping[Pass, tuple[str, ...]],
    seed: int,
) -> xr.Dataset:
    found = xr.Dataset(
        coords={
            EXAMPLE: [sample.id or str(i) for i, sample in enumerate(samples)],
            LAYER: list(model.cfg.attention_layers),
            HEAD: np.arange(values[next(iter(named))].shape[2]),
        },
        attrs={
            "model": model.name,
            "domain": ", ".join(samples.domains),
            "passes": [str(step) for step in plan],
            "provenance": provenance(model, samples, seed=seed, scores={name: repr(s) for name, s in named.items()}),
        },
    )
    for name, score in named.items():
        value = values[name].astype(np.float64)
        if score.reduce == "entropy":
            value = localized(value, values[f"{name}/mass"], score.top)
        elif score.aggregate == "frequency":
            value = _among_the_top(value, head_count(score.top, value[0].size))
        found[name] = ((EXAMPLE, LAYER, HEAD), value)
        found[name].attrs = {
            "unit": score.unit,
            "sign": "more: the head retrieves more",
            "definition": score.definition,
            "source": score.source,
            "passes": [str(step) for step, names in plan.items() if name in names],
        }
    return found


def _among_the_top(value: np.ndarray, count: int) -> np.ndarray:
    flat = value.reshape(len(value), -1)
    chosen = np.zeros_like(flat)
    np.put_along_axis(chosen, np.argsort(-flat, axis=1, kind="stable")[:, :count], 1, axis=1)
    return chosen.reshape(value.shape)
