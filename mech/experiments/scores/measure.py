"""The scores by which the literature ranks heads: RAM and related scores, from as few passes as possible.

    found = head_scores(model, samples, ("ram", "mm_retrieval", "retrieval_head"))
    found["mm_retrieval"]                            # example, layer, head; attrs say unit, definition and source
    rankings = {name: rank_heads(found, name) for name in found}
    agreement(rankings, k=0.05)                      # do they name the same heads?

    head_scores(model, samples, {"mine": Score("last", "share", calibrate="shifted")})

A score is a frozen ``Score``. It says which query rows are read (``queries``), how a row's attention becomes a number
(``reduce``), what is subtracted (``calibrate``), and how an example counts (``aggregate``). A head's score is the mean
over rows, then over examples. ``PUBLISHED`` has the scores of the papers, each with its source and how it differs here.

Scores do not say whether a head matters (``mech.ablation``) or beats chance (``mech.retrieval_test``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mech.arguments import Count, Positive, Progress, Seed, checked
from mech.axes import EXAMPLE, HEAD, LAYER
from mech.data.samples import Samples, SomeSamples
from mech.errors import ExperimentError
from mech.experiments.attention.rows import in_batches
from mech.experiments.ranking.ranking import head_count
from mech.experiments.scores.localization import localized
from mech.experiments.scores.published import NULL, OTHER, PUBLISHED, QUESTION, Pass, Score, named_scores, passes
from mech.experiments.scores.reading import Prepared, prepared, read_pass, trimmed
from mech.model import HookedMLLM
from mech.results import provenance
from mech.scale.measures import per_sample

__all__ = ["PUBLISHED", "Pass", "Score", "head_scores", "passes"]
NULL_QUESTION = "N/A"
REGION_DRAWS = 8  # same-size random regions for each example


@checked
@torch.no_grad()
def head_scores(
    model: HookedMLLM,
    samples: SomeSamples,
    scores: str | Sequence[str] | Mapping[str, Score] = ("ram",),
    *,
    batch_size: Count = 8,
    seed: Seed = 0,
    sink_tau: Positive = 20.0,
    max_new_tokens: Count = 8,
    progress: Progress | None = None,
) -> xr.Dataset:
    """One or more scores of every text head, sample by sample, from shared passes.

    ``score[i, l, h] = mean over rows x of reduce(A[l, h, x, :], E_i) - null``; see ``Score``.

    Sign: the higher, the more the head retrieves. Unit: ``attrs["unit"]`` of each variable.

    Args:
        samples: with what the scores need: evidence, distractors or, for ``"answer"`` rows, answers.
        scores: names of ``PUBLISHED``, or name -> ``Score``.
        batch_size: samples per forward.
        seed: seed of the random regions.
        sink_tau: a key is a sink of a layer if the largest entry of its RMS-normed state is at least this.
        max_new_tokens: for ``"generated"`` rows: length of the greedy generation, which is then teacher-forced.
        progress: called with (samples done, samples in total).

    Returns:
        One variable for each score, with dims example, layer, head; layers that cannot reach visual tokens score 0.

    Raises:
        ExperimentError: an unknown score; no evidence, no answer, nothing generated, or no room for a region elsewhere.
        RegionError: evidence that lies outside its image or covers no token.

    Cost: ``len(passes(scores))`` forwards per sample (``attrs["passes"]``; the vision stack runs only in the first),
    plus the query rows of the attention.

    References: ``attrs["source"]`` of each variable; sinks: arXiv 2503.03321 (tau = 20), which fixes the sink
    dimensions per model; here any dimension counts.
    """
    named, samples = named_scores(scores), Samples(samples)
    _check(named, samples)
    asks_others = any(step.asked == OTHER for step in passes(named))
    others = [_another(samples, i) if asks_others else "" for i in range(len(samples))]
    result = per_sample_scores(
        model, samples, scores=named, others=others, how=PassOptions(seed, sink_tau, max_new_tokens),
        batch_size=batch_size, progress=progress,
    )  # fmt: skip
    values = {str(name): value.values for name, value in result.data_vars.items()}
    return _dataset(model, samples, named, values, passes(named), seed)


@dataclass(frozen=True)
class PassOptions:
    """The options of ``head_scores`` that apply to every pass."""

    seed: int = 0
    sink_tau: float = 20.0
    max_new_tokens: int = 8


@per_sample("scores", beside=("others",), classes=(Score, PassOptions))
@torch.no_grad()
def per_sample_scores(
    model: HookedMLLM,
    samples: Samples,
    *,
    scores: Mapping[str, Score],
    others: Sequence[str],
    how: PassOptions,
    first: int = 0,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> xr.Dataset:
    """The numbers of ``head_scores``, without what depends on all samples together.

    ``others`` has for each sample a question that asks something else. ``first`` is the index of the first sample among
    all samples; it seeds the random regions.
    """
    plan = passes(scores)
    rows = _prepared(model, samples, others, scores, how, batch_size, first)
    parts: dict[str, list[np.ndarray]] = {}
    for _, batch in in_batches(samples, batch_size):
        totals: dict[str, Tensor] = {}
        null: dict[str, Tensor] = {}
        pictures = None
        for step, names in plan.items():
            here = [rows[step][i] for i in batch]
            inputs = model.collate([row.inputs for row in here])
            if pictures is not None:  # every pass shows the same pictures: encode them once
                text = {key: value for key, value in inputs.tensors.items() if not key.startswith("pixel_values")}
                inputs = replace(inputs, tensors=text)
            elif len(plan) > 1:
                inputs, pictures = model.encode_pictures(inputs)
            asked = {name: scores[name] for name in names}
            own = step.asked == QUESTION
            (totals if own else null).update(read_pass(model, inputs, here, asked, how.sink_tau, pictures))
        for name, value in totals.items():
            value = value - null[name] if name in null else value
            if name in scores and scores[name].reduce == "trimmed":
                step = next(step for step in plan if name in plan[step])
                value = trimmed(value, [rows[step][i].evidence for i in batch])
            parts.setdefault(name, []).append(value.cpu().numpy())
        if progress:
            progress(batch[-1] + 1, len(samples))
    values = {name: ((EXAMPLE, LAYER, HEAD), np.concatenate(batches)) for name, batches in parts.items()}
    return xr.Dataset(values, {EXAMPLE: [sample.id or str(first + i) for i, sample in enumerate(samples)]})


def _prepared(
    model: HookedMLLM,
    samples: Samples,
    others: Sequence[str],
    named: Mapping[str, Score],
    how: PassOptions,
    batch_size: int,
    first: int,
) -> dict[Pass, list[Prepared]]:
    """The rows of every pass. Everything that can be refused is refused before the first forward.

    ``first`` is the index of the first sample among all samples.
    """
    plan = passes(named)
    rows: dict[Pass, list[Prepared]] = {}
    texts: list[str] = []
    for step in sorted(plan, key=lambda step: step.text == "generated"):  # generating costs forwards, so last
        scores = [named[name] for name in plan[step]]
        draws = REGION_DRAWS if any(score.calibrate in ("random", "shifted") for score in scores) else 0
        if step.text == "generated" and not texts:
            texts = _generated(model, samples, batch_size, how.max_new_tokens)
        rows[step] = []
        for i, sample in enumerate(samples):
            asked = replace(
                sample,
                question={QUESTION: sample.question, NULL: NULL_QUESTION}.get(step.asked) or others[i],
                answer=texts[i] if step.text == "generated" else sample.answer,
            )
            on = {score.on for score in scores}
            evidence = sample.evidence if on & {"evidence", "parts"} else ()
            inputs = model.inputs_of(asked, answer=bool(step.text)).to("cpu")
            row = prepared(inputs, evidence, draws, [how.seed, first + i], sample if "parts" in on else None)
            if any(score.calibrate == "distractors" for score in scores):
                apart = (inputs.layout.visual.positions(distractor.region) for distractor in sample.distractors)
                row = replace(row, distractors=tuple(apart))
            rows[step].append(row)
    return rows


def _another(samples: Samples, i: int) -> str:
    """The question of the next sample after ``i`` (cyclically) that asks something else."""
    listed = list(samples)
    others = (sample.question for sample in (*listed[i + 1 :], *listed[:i]))
    return next((question for question in others if question.strip() != listed[i].question.strip()), "")


def _check(named: Mapping[str, Score], samples: Samples) -> None:
    if any(score.calibrate == "other_question" for score in named.values()) and not _another(samples, 0):
        raise ExperimentError(
            f"{len(samples)} samples that ask the same question", "samples that ask different questions",
            'calibrate by "null_question"',
        )  # fmt: skip
    needs = (
        ("evidence", lambda score: score.on != "image", lambda sample: sample.evidence),
        ("answer", lambda score: score.queries == "answer", lambda sample: sample.answer.strip()),
        ("distractors", lambda score: score.calibrate == "distractors", lambda sample: sample.distractors),
    )
    for what, asks, has in needs:
        lacking = [sample.id or str(i) for i, sample in enumerate(samples) if not has(sample)]
        asking = [name for name, score in named.items() if asks(score)]
        if lacking and asking:
            raise ExperimentError(
                f"{len(lacking)} samples have no {what}, the first is {lacking[0]!r}",
                f"samples with {what}, which {asking[0]!r} needs",
                f"set Sample.{what}, or choose scores without it (vision_mass, localization)",
            )


def _generated(model: HookedMLLM, samples: Samples, batch_size: int, max_new_tokens: int) -> list[str]:
    texts: list[str] = []
    rows = [model.inputs_of(sample).to("cpu") for sample in samples]
    for row, sample in zip(rows, samples, strict=True):
        if sample.evidence:
            row.layout.visual.positions(sample.evidence)  # refuses evidence that covers no token before generating
    for batch, _ in in_batches(rows, batch_size):
        texts += model.generate_text(model.collate(batch), max_new_tokens=max_new_tokens)
    if silent := [sample.id or str(i) for i, (sample, text) in enumerate(zip(samples, texts, strict=True)) if not text]:
        raise ExperimentError(
            f"nothing was generated for {len(silent)} samples, the first is {silent[0]!r}",
            "an answer whose rows can be read",
            'score the rows of the right answer instead: queries="answer"',
        )
    return texts


def _dataset(
    model: HookedMLLM,
    samples: Samples,
    named: Mapping[str, Score],
    values: Mapping[str, np.ndarray],
    plan: Mapping[Pass, tuple[str, ...]],
    seed: int,
) -> xr.Dataset:
    result = xr.Dataset(
        coords={
            EXAMPLE: samples.names,
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
        top = min(score.top, value[0].size) if isinstance(score.top, int) else score.top
        if score.reduce == "entropy":
            value = localized(value, values[f"{name}/mass"], top)
        elif score.aggregate == "frequency":
            value = _among_the_top(value, head_count(top, value[0].size, "top"))
        result[name] = ((EXAMPLE, LAYER, HEAD), value)
        result[name].attrs = {
            "unit": score.unit,
            "sign": "more: the head retrieves more",
            "definition": score.definition,
            "source": score.source,
            "passes": [str(step) for step, names in plan.items() if name in names],
        }
    return result


def _among_the_top(value: np.ndarray, count: int) -> np.ndarray:
    # Heads that tie for the last place are all excluded: if no head hits, the first heads of layer 0 must not count.
    ordered = np.sort(value.reshape(len(value), -1), axis=1)[:, ::-1]
    best_outside = ordered[:, count] if count < ordered.shape[1] else np.full(len(value), -np.inf)
    return (value > best_outside[:, None, None]).astype(np.float64)
