"""Do the heads matter? Bands of a ranking are ablated, and accuracy and logit difference are measured.

A band says *which* heads: the top of the ranking, its bottom, its middle, random sets of heads outside the top, and
random sets with the same number of heads in each layer as the top. A drop says something about the *ranking* only when
compared with these controls, and a control that contains a tested head would contain the treatment. The method says
*how* (see ``mech.interventions``): results of different methods are never pooled.

    ram = retrieval_attention_mass(model, train)
    effects = ablation(model, test, rank_heads(ram), reference=train, to="mean", fractions=(1, 0.05, 0.2))

A band may also be another ranking; its top heads are then ablated. Heads that attend to any visual token, or to sinks,
are controls for "these heads merely attend to the picture", or "to something".

    others = rank_heads(ram, "vision_mass"), rank_heads(attention_sinks(model, train), "sink_mass")
    effects = ablation(model, test, rank_heads(ram), reference=train, bands=("top", "random", *others))
    effects.isel(condition=effects["band"] == "by vision_mass")

Two more controls are available on request: ``unneeded``, random sets that also exclude heads known to be necessary
(``necessary=``, for instance from patching on samples outside the test set), and ``unrestricted``, random sets of all
heads; summaries and figures show the random sets that contain a top head separately.

The samples that found the heads must not be the ones that test them; sample ids are compared to make sure.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Annotated

import xarray as xr

from mech.arguments import NOT_EMPTY, Amount, Count, Progress, Seed, checked, one_of, some_of
from mech.axes import CONDITION
from mech.data.regions import where_in_words
from mech.data.samples import Samples, SomeSamples
from mech.errors import ExperimentError
from mech.experiments.ablation.bank import reference_of
from mech.experiments.metrics import ask, begun, quiz
from mech.experiments.ranking.checks import other_model_attrs, refuse_overlap, refuse_ranking
from mech.experiments.ranking.ranking import Head, Ranking
from mech.indices import Pairs
from mech.interventions import METHODS, Ablate, Reference, check_positions, intervene, reference_activations
from mech.interventions.specs import Phase, Where, Z
from mech.model import HookedMLLM
from mech.results import ablation_dataset, provenance
from mech.scale.measures import per_sample, running

BANDS = ("top", "bottom", "middle", "random", "layer_matched")
KNOWN = (*BANDS, "unneeded", "unrestricted")  # the last two on request
CONTROLS = 20  # at most this many sets of a control that no p-value is computed from
FRACTIONS = (1, 0.02, 0.05, 0.1, 0.2)
KEEPING = 1.5  # cost of keeping the first layers, in forwards


@dataclass(frozen=True)
class Condition:
    """One set of heads, ablated in one way; ``draw`` numbers the random sets of a band."""

    method: str
    band: str
    fraction: float
    heads: tuple[Head, ...]
    draw: int = 0

    def __str__(self) -> str:
        return f"{self.method}/{self.band}/{self.fraction:g}/{self.draw}"


BASELINE = Condition("none", "none", 0.0, ())


@checked
def conditions(
    ranking: Ranking,
    *,
    to: one_of(METHODS) | some_of(METHODS) = "mean",
    bands: Annotated[Sequence[one_of(KNOWN) | Ranking], NOT_EMPTY] = BANDS,
    fractions: Annotated[Sequence[Amount], NOT_EMPTY] = FRACTIONS,
    n_random: Count = 20,
    necessary: Pairs = (),
    seed: Seed = 0,
) -> list[Condition]:
    """Every combination of method, band and size, as a list that can be joined, cut and counted before it runs.

    Args:
        ranking: which heads are at the top.
        to: one method or several.
        bands: any of ``top``, ``bottom``, ``middle``, ``random`` (heads outside the top), ``layer_matched``,
            ``unneeded``, ``unrestricted``; and rankings by other scores, whose top heads form the band ``by SCORE``,
            such as ``by vision_mass``.
        fractions: an int is a number of heads, a float a share of all heads (at least one head).
        n_random: how many random sets of each size (at most 20 for the other controls); fewer if there are not that
            many. The p-value over sets cannot fall below ``1 / (1 + n_random)``.
        necessary: heads that ``unneeded`` excludes in addition to the top; not found on the test samples.
        seed: for the random sets. Every method uses the same sets.

    ``layer_matched`` and ``unneeded`` are left out if too few heads remain.

    Raises:
        ExperimentError: an unknown method or band; a band ranking of other heads, one that scores all heads alike, or
            two by the same score; ``unneeded`` without necessary heads; too few heads outside the top for ``random``.
    """
    methods = (to,) if isinstance(to, str) else tuple(to)
    others = {f"by {band.score}": band for band in bands if isinstance(band, Ranking)}
    words = [band for band in bands if isinstance(band, str)]
    if len(others) + len(words) < len(bands):
        raise ExperimentError(
            f"two bands of the same name among {', '.join(others)}", "each once", "rename the array before rank_heads"
        )
    for name, other in others.items():
        _comparable(name, other, ranking)
    if "unneeded" in words and not len(necessary):
        raise ExperimentError("the band 'unneeded' without necessary heads", "necessary=[(layer, head), ...]")
    if strange := [Head(*map(int, head)) for head in necessary if tuple(map(int, head)) not in ranking.heads]:
        raise ExperimentError(f"there is no head {strange[0]}", f"heads of {ranking!r}", "give (layer, head) pairs")
    unique: dict[Condition, None] = {}
    for method in methods:
        for band in (*words, *others):
            for size in fractions:
                count = ranking.count(size)
                sets = (
                    [others[band].top(count)]
                    if band in others
                    else _sets(ranking, band, count, n_random, necessary, seed)
                )
                for draw, heads in enumerate(sets):
                    unique[Condition(method, band, count / len(ranking), tuple(heads), draw)] = None
    return list(unique)


def _comparable(name: str, other: Ranking, ranking: Ranking) -> None:
    if (other.layers, other.n_heads) != (ranking.layers, ranking.n_heads):
        raise ExperimentError(
            f"band {name!r} of {other.n_layers} x {other.n_heads} heads",
            f"{ranking.n_layers} x {ranking.n_heads}, as the ranking has",
            "rank the heads of one model",
        )
    if other.mean.max() == other.mean.min():  # no sinks, for instance: the top would be just the first heads
        raise ExperimentError(
            f"band {name!r}, where every head scores {other.mean.max():.3g}",
            "heads with different scores",
            "leave it out",
        )


def _sets(
    ranking: Ranking, band: str, count: int, n_random: int, necessary: Sequence[tuple[int, int]], seed: int
) -> Sequence[Sequence[Head]]:
    top, few = ranking.top(count), min(n_random, CONTROLS)
    if band == "random":
        if 2 * count > len(ranking):
            raise ExperimentError(
                f"random sets of {count} of {len(ranking)} heads, none of them among the {count} tested",
                "at most half of the heads",
                "leave the band 'random' out, or use 'unrestricted'",
            )
        return ranking.random(count, n_random, seed, exclude=top)
    if band == "unrestricted":
        return ranking.random(count, few, seed)
    if band == "unneeded":
        others = len(ranking) - len({*top, *map(tuple, necessary)})
        return ranking.random(count, few, seed, exclude=(*top, *necessary)) if count <= others else []
    if band == "layer_matched":
        try:
            return ranking.layer_matched(top, few, seed)
        except ExperimentError:  # the top heads fill their layers: no heads are left to match them with
            return []
    return [{"top": ranking.top, "bottom": ranking.bottom, "middle": ranking.middle}[band](count)]


@checked
def ablation(
    model: HookedMLLM,
    samples: SomeSamples,
    ranking: Ranking | Annotated[Sequence[Condition], NOT_EMPTY],
    *,
    reference: Samples | Reference | None = None,
    to: one_of(METHODS) | some_of(METHODS) = "mean",
    bands: Annotated[Sequence[one_of(KNOWN) | Ranking], NOT_EMPTY] = BANDS,
    fractions: Annotated[Sequence[Amount], NOT_EMPTY] = FRACTIONS,
    n_random: Count = 20,
    necessary: Pairs = (),
    positions: Where = "all",
    phase: Phase = "both",
    seed: Seed = 0,
    batch_size: Count = 16,
    progress: Progress | None = None,
    allow_other_model: bool = False,
) -> xr.Dataset:
    """Accuracy and logit difference of every sample under every condition, the unablated baseline first.

    Sign: higher is better, so the cost of a condition is baseline minus condition. Unit: accuracy is 0 or 1 per sample,
    the logit difference is in logits (right minus counterfactual answer). The coordinate ``heads`` says which heads
    each condition ablated.

    Args:
        model: a hooked model.
        samples: the samples to test on.
        ranking: the heads in order, or a list from ``conditions``.
        reference: samples (or their activations) that ``mean`` and ``resample`` draw from; none of ``samples``.
        to, bands, fractions, n_random, necessary, seed: see ``conditions``.
        positions, phase: see ``Ablate``.
        batch_size: samples per forward.
        progress: called with (conditions done, conditions in all).
        allow_other_model: accept a ranking or reference activations made on another model of the same shape; the
            attribute ``other_model`` records it.

    Raises:
        ExperimentError: a sample that found the heads or is in the reference; no reference where one is needed.

    Cost: one forward per sample and condition; one per sample of ``reference``, once.

    References: arXiv 2606.05843 (bands; ``paper``), 2407.08734 (methods disagree), 2309.16042 (logit difference).
    """
    samples = Samples(samples)
    if isinstance(ranking, Ranking):
        todo = conditions(
            ranking, to=to, bands=bands, fractions=fractions, n_random=n_random, necessary=necessary, seed=seed
        )
    else:
        todo = list(ranking)
    todo = [BASELINE, *(c for c in todo if c != BASELINE)]
    given = [band for band in (ranking, *bands) if isinstance(band, Ranking)] if isinstance(ranking, Ranking) else []
    others = [refuse_ranking(band, model, samples, allow_other_model) for band in given]
    if reference is not None and not isinstance(reference, Reference):
        reference = Samples(reference)
        refuse_overlap(samples, [s.id for s in reference], "are the reference")
    if isinstance(reference, Reference):
        others.append(reference.check(model, Z, allow_other_model))
    how = How(reference, positions, phase, seed, allow_other_model)
    for condition in todo[1:]:
        how.spec(condition).check(model)
    joined = asked_without(model, samples, conditions=todo, how=how, batch_size=batch_size, progress=progress)
    joined.attrs.update(
        model=model.name,
        domain=", ".join(samples.domains),
        positions=where_in_words(positions),
        phase=phase,
        provenance=provenance(model, samples, positions=where_in_words(positions), phase=phase, seed=seed),
        **other_model_attrs(others),
    )
    return joined


@dataclass(frozen=True)
class How:
    """The options that all conditions of an ablation share; see ``Ablate``."""

    reference: Samples | Reference | None = None
    positions: Where = "all"
    phase: Phase = "both"
    seed: int = 0
    allow_other_model: bool = False

    def spec(self, condition: Condition) -> Ablate:
        common = {field.name: getattr(self, field.name) for field in fields(self)}
        return Ablate(heads=condition.heads, to=condition.method, **common)


def asked_without(
    model: HookedMLLM,
    samples: Samples,
    *,
    conditions: Sequence[Condition],
    how: How,
    batch_size: int,
    progress: Progress | None = None,
) -> xr.Dataset:
    """The results of ``ablation``, condition by condition or, inside ``mech.on_folder``, in blocks."""
    if running() is not None and isinstance(how.reference, Samples):  # made once, not for every block
        how = replace(how, reference=reference_of(model, how.reference, batch_size=batch_size, seed=how.seed))
    return per_sample_answers(
        model, samples, conditions=list(conditions), how=how, batch_size=batch_size, progress=progress
    )


@per_sample("ablation", over="conditions", classes=(Condition, Head, How, Reference))
def per_sample_answers(
    model: HookedMLLM,
    samples: Samples,
    *,
    conditions: Sequence[Condition],
    how: How,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> xr.Dataset:
    """The results of ``ablation`` without the attributes that describe all samples together."""
    parts: list[xr.Dataset] = []
    for part in ablated(model, samples, conditions, how, batch_size):
        parts.append(part)
        if progress:
            progress(len(parts), len(conditions))
    return xr.concat(parts, dim=CONDITION)


def ablated(
    model: HookedMLLM, samples: Samples, todo: Sequence[Condition], how: How, batch_size: int = 16
) -> Iterator[xr.Dataset]:
    """The conditions one by one, each as its own dataset, so that a study can save them as it goes.

    Each run begins at the first layer it changes, if together they save more than keeping the earlier layers costs.
    """
    if running() is not None:  # workers compute all conditions at once
        whole = asked_without(model, samples, conditions=todo, how=how, batch_size=batch_size)
        yield from (whole.isel({CONDITION: [i]}) for i in range(len(todo)))
        return
    questions = quiz(model, samples, batch_size, partial(check_positions, where=how.positions, phase=how.phase))
    if isinstance(how.reference, Samples):
        reference = reference_activations(model, how.reference, batch_size=batch_size, seed=how.seed)
        how = replace(how, reference=reference)
    elif how.reference is not None:
        how = replace(how, reference=how.reference.to(model.device))
    saved = sum(_begins(condition) for condition in todo) / model.cfg.n_layers
    runs = begun(model, questions) if saved > KEEPING else ()
    for condition in todo:
        if condition == BASELINE:
            scores = ask(model, questions)
        else:
            with intervene(model, how.spec(condition)) as without:
                scores = ask(without, questions, runs, _begins(condition))
        yield ablation_dataset(
            scores["accuracy"][None],
            scores["logit_diff"][None],
            method=[condition.method],
            band=[condition.band],
            fraction=[condition.fraction],
            n_heads=[len(condition.heads)],
            draw=[condition.draw],
            heads=[condition.heads],
            examples=questions.examples,
        )


def _begins(condition: Condition) -> int:
    """The first layer that a condition changes; 0 for the baseline, which runs in full."""
    return min((layer for layer, _ in condition.heads), default=0)
