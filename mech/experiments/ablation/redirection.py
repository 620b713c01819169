"""Redirection: pull heads towards another region, and see whether the answer follows.

    found = redirection(model, test, ranking, bias=(2, 4, 8))
    redirection_table(found)              # by band and bias: answers that became the distractor's, with intervals

Ablation shows that an answer *needs* a set of heads; redirection asks whether these heads decide where the answer comes
from. Each sample names distractors: regions that answer the same question about something else, with another answer. A
bias is added to the heads' scores for one distractor's tokens before the softmax. If the answer turns into the
distractor's, and does not when the same number of random heads is pulled, the heads are *sufficient* to choose the
evidence. Pulling all heads is the third control: it shows what the bias does to the model as a whole.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr

from mech.arguments import NOT_EMPTY, Amount, Count, Progress, Seed, checked, some_of
from mech.axes import EXAMPLE
from mech.data.samples import Distractor, Sample, Samples, SomeSamples
from mech.errors import ExperimentError
from mech.experiments.ablation.redirected import BIAS
from mech.experiments.ablation.sets import about, coords, different, measured
from mech.experiments.metrics import Quiz, answer_logits, quiz
from mech.experiments.ranking.checks import refuse_ranking
from mech.experiments.ranking.ranking import Ranking
from mech.experiments.ranking.sets import HeadSet, head_sets
from mech.interventions import PerRow, Redirect, intervene
from mech.interventions.specs import Phase, Where
from mech.model import HookedMLLM

BANDS = ("top", "bottom", "random", "all")
BIASES = (2.0, 4.0, 8.0, 16.0)
ATTRS = {
    "redirected": {"unit": "share of answers, 0 or 1 per example", "sign": "more: the answer followed the heads"},
    "kept": {"unit": "share of answers, 0 or 1 per example", "sign": "more: the answer stayed right"},
    "logit_diff": {"unit": "logits, distractor's minus own answer", "sign": "more: towards the distractor"},
}


@checked
def redirection(
    model: HookedMLLM,
    samples: SomeSamples,
    ranking: Ranking,
    *,
    bias: Annotated[Sequence[float], NOT_EMPTY] = BIASES,
    heads: Amount = 0.05,
    bands: some_of(BANDS) = BANDS,
    n_random: Count = 10,
    query: Where = "all",
    phase: Phase = "both",
    seed: Seed = 0,
    batch_size: Count = 16,
    progress: Progress | None = None,
    allow_other_model: bool = False,
) -> xr.Dataset:
    """How often the answer becomes that of the region towards which heads are pulled.

    ``redirected[set, bias, example] = 1`` if the distractor's token is the most likely one where the two answers first
    differ; ``kept`` is the same for the sample's own answer.

    Sign: higher ``redirected`` and ``logit_diff`` mean that the answer followed the heads. Unit: ``redirected`` and
    ``kept`` are 0 or 1 per sample; ``logit_diff`` is in logits, the distractor's minus the sample's own answer.

    Args:
        model: a hooked model.
        samples: test samples with ``distractors``, one of which is drawn for each by ``seed``; not those that found the
            heads.
        ranking: which heads are at the top.
        bias: what is added to the scores of the distractor's tokens; the run without it is ``plain_...``.
        heads: how many; see ``Ranking.count``.
        bands: any of ``"top"``, ``"bottom"``, ``"random"`` (heads outside the top) and ``"all"``.
        n_random: number of random sets.
        query, phase: which rows are pulled and when, see ``Redirect``.
        seed, batch_size, progress, allow_other_model: as in ``steering``; the seed also draws the distractors.

    Returns:
        ``redirected``, ``kept`` and ``logit_diff`` over (set, bias, example), with band, draw and heads of each set;
        ``plain_...`` over example, the same without intervention: what chance and the model's errors give.

    Raises:
        ExperimentError: samples without distractors, an answer that equals the distractor's, unknown names, no bias or
            a repeated one, heads of another model or found on these samples.
        RegionError: a distractor that covers no token.

    Cost: one forward per sample, set and bias, and one per sample without intervention.

    References: Gaze heads, arXiv 2606.14703 (there with the last token's rows, the top 100 heads and six panels).
    """
    samples, biases = Samples(samples), different("bias", bias, "(2, 4, 8)")
    other = refuse_ranking(ranking, model, samples, allow_other_model)
    chosen = drawn_distractors(model, samples, seed)
    sets = head_sets(ranking, bands, heads, n_random, seed)
    for pulled in sets:
        Redirect(pulled.heads, "image", biases[0], query=query, phase=phase).check(model)
    questions = _questions(model, chosen, batch_size)
    plain = _answers(model, questions)

    def answers(pulled: HeadSet, bias: float) -> dict[str, np.ndarray]:
        return _pulled(model, questions, chosen, Redirect(pulled.heads, "image", bias, query=query, phase=phase))

    values = measured(sets, biases, answers, progress)
    attrs = about("redirection", model, samples, ranking.count(heads), seed, other, query=query, phase=phase)
    data: dict[str, Any] = {name: (("set", BIAS, EXAMPLE), value, ATTRS[name]) for name, value in values.items()}
    data |= {f"plain_{name}": (EXAMPLE, value, ATTRS[name]) for name, value in plain.items()}
    return xr.Dataset(data, coords(sets, BIAS, biases, questions.examples), attrs)


def drawn_distractors(model: HookedMLLM, samples: Samples, seed: int = 0) -> list[tuple[Sample, Distractor]]:
    """A distractor for every sample; the draw depends only on the seed and the sample's index.

    Raises:
        ExperimentError: samples without distractors, or an answer that equals the distractor's.
        RegionError: a distractor that covers no token.
    """
    lacking = [sample.id or str(i) for i, sample in enumerate(samples) if not sample.distractors]
    if lacking or not len(samples):
        raise ExperimentError(
            f"{len(lacking)} samples without distractors, the first is {lacking[0]!r}" if lacking else "no samples",
            "samples that name regions with other answers",
            'set Sample(distractors=(Distractor(Box(...), "4"),)); haystacks have them',
        )
    draws = (np.random.default_rng([seed, i]).integers(len(s.distractors)) for i, s in enumerate(samples))
    chosen = [(sample, sample.distractors[draw]) for sample, draw in zip(samples, draws, strict=True)]
    for sample, target in chosen:
        model.inputs_of(sample).layout.visual.positions(target.region)  # refuses a region that covers no token
        own, theirs = (model.processor.answer_ids(text) for text in (sample.answer, target.answer))
        if all(a == b for a, b in zip(own, theirs, strict=False)):
            raise ExperimentError(
                f"sample {sample.id!r} whose distractor's answer begins with all of {sample.answer!r}",
                "a distractor with another answer",
                "leave that distractor out",
            )
    return chosen


def _questions(model: HookedMLLM, chosen: Sequence[tuple[Sample, Distractor]], batch_size: int) -> Quiz:
    """The samples' questions, with the distractor's answer as the wrong one."""
    asked = [replace(s, counterfactual=replace(s, answer=d.answer, counterfactual=None)) for s, d in chosen]
    return quiz(model, asked, batch_size)


def _pulled(
    model: HookedMLLM, questions: Quiz, chosen: Sequence[tuple[Sample, Distractor]], pull: Redirect
) -> dict[str, np.ndarray]:
    """The answers while heads are pulled, batch by batch: each row towards its own distractor."""
    parts, row = [], 0
    for index, batch in enumerate(questions.batches):
        rows = slice(row, row + len(batch))
        to = PerRow(tuple(target.region for _, target in chosen[rows]))
        with intervene(model, replace(pull, to=to)) as pulled:
            parts.append(_answers(pulled, questions.batch(index)))
        row = rows.stop
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@torch.no_grad()
def _answers(forward: object, questions: Quiz) -> dict[str, np.ndarray]:
    """For each sample: is the distractor's answer the most likely, is its own, and their difference in logits."""
    redirected, unchanged, difference = [], [], []
    for row, says in enumerate(answer_logits(forward, questions)):  # type: ignore[arg-type]
        at, wrong = questions.forks[row], questions.wrong[row]
        right = questions.answers[row][at]
        first = int(says[at].argmax())
        redirected.append(float(first == wrong))
        unchanged.append(float(first == right))
        difference.append(float(says[at, wrong] - says[at, right]))
    return {"redirected": np.array(redirected), "kept": np.array(unchanged), "logit_diff": np.array(difference)}
