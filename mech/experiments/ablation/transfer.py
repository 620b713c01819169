"""Do the heads of one task serve another? Heads found on A are ablated on B.

    find, test = {...}, {...}                                     # name -> Samples; no sample in both
    found = transfer(model, find, test, k=5)
    found.lost.to_pandas()                                        # rows: found on; columns: tested on
    found.lost - found.random_lost                                # compared with the same number of random heads

A row with a large loss in every column is a general reading circuit; a diagonal is one circuit for each task. Rankings
that agree cannot tell which: heads can look alike everywhere and matter in one place only.

Specificity has two sides. *Other tasks*: include tasks in ``find`` and ``test`` whose samples have no evidence (for
instance a text question with a blank picture): they find no heads, and a loss on them is not a loss of retrieval. *The
form of the answer*: ``in_form`` says how often the model without the heads still gives one of the answers that occur in
this task. A model that can no longer find the evidence gives a wrong one; a broken model says something else.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr

from mech.arguments import NOT_EMPTY, Amount, Count, Progress, Seed, at_least, checked, one_of
from mech.axes import CONDITION, EXAMPLE
from mech.data.samples import Samples
from mech.errors import ExperimentError
from mech.experiments.ablation.ablation import BASELINE, Condition
from mech.experiments.ablation.bank import reference_of
from mech.experiments.effects import against_random
from mech.experiments.metrics import Quiz, ask, quiz
from mech.experiments.ranking.checks import other_model_attrs, refuse_overlap, refuse_ranking
from mech.experiments.ranking.ranking import Head, Ranking, rank_heads
from mech.experiments.scores.ram import retrieval_attention_mass
from mech.experiments.statistics import accuracy_interval
from mech.interventions import METHODS, Ablate, Reference, intervene
from mech.model import HookedMLLM
from mech.results import heads_text, provenance
from mech.scale.measures import per_sample


@checked
def transfer(
    model: HookedMLLM,
    find: Annotated[Mapping[str, Samples], NOT_EMPTY],
    test: Annotated[Mapping[str, Samples], NOT_EMPTY],
    *,
    rankings: Annotated[Mapping[str, Ranking], NOT_EMPTY] | None = None,
    k: Amount = 0.05,
    to: one_of(METHODS) = "mean",
    n_random: Annotated[int, at_least(2)] = 20,
    seed: Seed = 0,
    batch_size: Count = 16,
    progress: Progress | None = None,
    allow_other_model: bool = False,
) -> xr.Dataset:
    """The top heads of every task, and random heads, ablated on every task.

    ``lost[A, B] = mean over examples of B of (accuracy - accuracy without the top heads of A)``

    Sign: positive when the heads are needed. Unit: share of answers; -1 to 1.

    Args:
        model: a hooked model.
        find: samples by task. A task's samples rank its heads, if they have evidence, and are the reference for
            ablation on it (a head's mean output *on this task*).
        test: samples by task, none of them in ``find``; all or some of the tasks of ``find``.
        rankings: of this model by another score, by name; they replace those by RAM on ``find``.
        k: size of each set: a number or a share of heads.
        to: the ablation method, see ``Ablate``.
        n_random: number of random sets of this size, the same for every task; without the top heads of any task if
            enough other heads remain, see ``attrs["random_of"]``.
        seed, batch_size, allow_other_model: as in ``ablation``.
        progress: called with (conditions done, conditions in all).

    Returns:
        ``accuracy``, ``logit_diff`` and ``in_form`` (0 or 1) over (tested_on, condition, example), nan beyond the end
        of a task, with ``band`` ("none", a name, "random") and ``heads`` of each condition. From the accuracy, ``lost``
        over (found_on, tested_on) and ``random_lost`` over (tested_on), each with ``_low`` and ``_high`` (95%);
        ``p_samples`` (sign flips over samples), ``p_sets`` (rank of the top set among the random ones) and ``p``, the
        larger of the two, not corrected for the number of cells.

    Raises:
        ExperimentError: samples in both ``find`` and ``test``, a task in ``test`` but not in ``find``, no task with
            evidence, fewer than two examples or random sets, a ranking of another model.

    Cost: one forward for each sample of ``find`` for RAM and one for the reference; ``1 + tasks + n_random`` for each
    sample of ``test``.

    References: arXiv 2606.05843 (compares domains by rank correlation only; nothing is transferred there).
    """
    _check(find, test)
    rankings = dict(rankings or _ranked(model, find, batch_size))
    others = [
        refuse_ranking(ranking, model, samples, allow_other_model)
        for ranking in rankings.values()
        for samples in test.values()
    ]
    first = next(iter(rankings.values()))
    tops = [Condition(to, name, ranked.count(k) / len(ranked), ranked.top(k)) for name, ranked in rankings.items()]
    tested = tuple({head: None for top in tops for head in top.heads})
    apart = len(tested) + len(tops[0].heads) <= len(first)
    drawn = first.random(k, n_random, seed, exclude=tested if apart else ())
    todo = [BASELINE, *tops, *(Condition(to, "random", tops[0].fraction, heads, i) for i, heads in enumerate(drawn))]
    parts: list[xr.Dataset] = []
    for task, samples in test.items():
        reference = reference_of(model, find[task], batch_size=batch_size, seed=seed)

        def tell(done: int, total: int, before: int = len(parts)) -> None:
            if progress:
                progress(before * total + done, len(test) * total)

        options: dict[str, Any] = dict(reference=reference, seed=seed, batch_size=batch_size, progress=tell)
        parts.append(per_sample_forms(model, samples, conditions=todo, **options))
    joined = _by_task(dict(zip(test, parts, strict=True)), todo)
    joined.attrs.update(
        model=model.name, method=to, n_heads=len(tops[0].heads), unit="share of answers", sign="positive: needed",
        random_of="other heads than the tested ones" if apart else "all heads",
        provenance=provenance(model, {"find": _joined(find), "test": _joined(test)}, seed=seed),
        **other_model_attrs(others),
    )  # fmt: skip
    return joined.merge(_summary(joined, list(rankings)))


def _by_task(parts: Mapping[str, xr.Dataset], todo: Sequence[Condition]) -> xr.Dataset:
    """The answers of all tasks side by side, the shorter ones padded, and whether each has the right form."""
    length, padded = max(part.sizes[EXAMPLE] for part in parts.values()), []
    for part in parts.values():
        in_form = np.isin(part["first_token"], part["right_token"]).astype(float)
        ids = {"example_id": (EXAMPLE, part[EXAMPLE].values.astype(object))}
        part = part.drop_vars(["first_token", "right_token", EXAMPLE]).assign(in_form=((CONDITION, EXAMPLE), in_form))
        padded.append(part.assign_coords(ids).pad(example=(0, length - part.sizes[EXAMPLE])))
    joined = xr.concat(padded, dim=xr.Variable("tested_on", list(parts)))
    return joined.assign_coords(
        example_id=joined["example_id"].fillna("").astype(str),
        band=(CONDITION, [condition.band for condition in todo]),
        draw=(CONDITION, [condition.draw for condition in todo]),
        heads=(CONDITION, [heads_text(condition.heads) for condition in todo]),
    )


def _summary(effects: xr.Dataset, names: list[str]) -> xr.Dataset:
    names_of_p = ("p", "p_samples", "p_sets")
    cells: dict[str, list[Any]] = {name: [] for name in ("lost", "lost_low", "lost_high", *names_of_p)}
    chance: dict[str, list[float]] = {name: [] for name in ("random_lost", "random_lost_low", "random_lost_high")}
    for task in effects["tested_on"].values:
        accuracy = effects["accuracy"].sel(tested_on=task).dropna("example")
        bands = accuracy["band"].values
        (full,) = accuracy.values[bands == "none"]
        random = full - accuracy.values[bands == "random"]
        by_chance = accuracy_interval(random)
        for name, value in zip(chance, (by_chance.mean, by_chance.low, by_chance.high), strict=True):
            chance[name].append(value)
        tops = [accuracy.values[bands == name][0] for name in names]
        lost = [accuracy_interval((full - top)[None]) for top in tops]
        tests = [against_random(full - top, random) for top in tops]
        columns = (
            [interval.mean for interval in lost],
            [interval.low for interval in lost],
            [interval.high for interval in lost],
        )
        columns += tuple([test[name] for test in tests] for name in ("p_value", "p_samples", "p_sets"))
        for name, column in zip(cells, columns, strict=True):
            cells[name].append(column)
    values = {name: (("found_on", "tested_on"), np.array(columns).T) for name, columns in cells.items()}
    return xr.Dataset({**values, **{name: ("tested_on", row) for name, row in chance.items()}}, {"found_on": names})


@per_sample("transfer", over="conditions", classes=(Condition, Head, Reference))
def per_sample_forms(
    model: HookedMLLM,
    samples: Samples,
    *,
    conditions: Sequence[Condition],
    reference: Reference,
    seed: int,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> xr.Dataset:
    """The results of ``transfer`` on one task: ``ask``, the first token of each answer, and the right one."""
    questions, bank = quiz(model, samples, batch_size), reference.to(model.device)
    rows: list[dict[str, np.ndarray]] = []
    for condition in conditions:
        rows.append(_asked(model, questions, condition, bank, seed))
        if progress:
            progress(len(rows), len(conditions))
    values = {name: ((CONDITION, EXAMPLE), np.stack([row[name] for row in rows])) for name in rows[0]}
    right = [answer[0] for answer in questions.answers]
    return xr.Dataset({**values, "right_token": (EXAMPLE, right)}, {EXAMPLE: list(questions.examples)})


def _asked(
    model: HookedMLLM, questions: Quiz, condition: Condition, reference: Any, seed: int
) -> dict[str, np.ndarray]:
    """``ask``, and the first token of each answer."""
    answers: list[torch.Tensor] = []

    def listening(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def listened(*args: Any, **options: Any) -> torch.Tensor:
            logits = forward(*args, **options)
            answers.extend(logits.argmax(-1).cpu())
            return logits

        return listened

    if condition == BASELINE:
        scores = ask(listening(model), questions)
    else:
        spec = Ablate(heads=condition.heads, to=condition.method, reference=reference, seed=seed)
        with intervene(model, spec) as without:
            scores = ask(listening(without), questions)
    # Rows end with the answer: its first token is predicted one row earlier.
    begins = [int(row[-len(answer) - 1]) for row, answer in zip(answers, questions.answers, strict=True)]
    return {**scores, "first_token": np.array(begins)}


def _ranked(model: HookedMLLM, find: Mapping[str, Samples], batch_size: int) -> dict[str, Ranking]:
    located = {name: samples for name, samples in find.items() if all(sample.evidence for sample in samples)}
    if not located:
        raise ExperimentError("no task whose samples have evidence", "at least one", "set Sample.evidence")
    scores = {name: retrieval_attention_mass(model, split, batch_size=batch_size) for name, split in located.items()}
    return {name: rank_heads(score, domain=name) for name, score in scores.items()}


def _check(find: Mapping[str, Samples], test: Mapping[str, Samples]) -> None:
    if lacking := [name for name in test if name not in find]:
        raise ExperimentError(
            f"the task {lacking[0]!r} is tested and has no samples in find",
            "samples of every task in find: its reference",
            "split them: find[name], test[name] = samples.split(0.5)",
        )
    if reserved := {"none", "random"} & {*find}:
        raise ExperimentError(f"a task called {min(reserved)!r}", "another name: a control has this one")
    few = [name for name, samples in test.items() if len(samples) < 2]
    if few:
        raise ExperimentError(f"{len(test[few[0]])} examples of {few[0]!r}", "at least two examples of each")
    everything = [sample.id for samples in find.values() for sample in samples]
    for samples in test.values():
        refuse_overlap(samples, everything, "are in find")


def _joined(tasks: Mapping[str, Samples]) -> Samples:
    return Samples([sample for samples in tasks.values() for sample in samples])
