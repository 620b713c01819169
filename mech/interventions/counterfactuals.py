"""Counterfactuals for samples that have none: blank the evidence, and take what the model then answers.

    pairs = with_counterfactuals(model, samples)          # those whose answer changes, each with a counterfactual
    report = causal_report(model, pairs)

Published data sets and photographs have no partner that shows another answer in the same place. Instead, the model's
answer without the evidence serves as the wrong answer, and that run is the corrupted one: same layout, same question.
Keep two things in mind. The model sees a grey patch as a grey patch (arXiv 2309.16042 on such corruptions), and a
sample whose answer does not change is dropped: it was not answered from this evidence.
"""

from collections.abc import Sequence
from dataclasses import replace

from mech.arguments import checked, one_of
from mech.data.samples import Sample, Samples, SomeSamples
from mech.errors import ExperimentError, InputError
from mech.interventions.corruption import WAYS, without_evidence
from mech.model import HookedMLLM


@checked
def with_counterfactuals(model: HookedMLLM, samples: SomeSamples, by: one_of(WAYS) = "mean") -> Samples:
    """The samples whose answer depends on their evidence, each with a counterfactual; existing ones are kept.

    Args:
        model: answers, by greedy decoding, without the evidence.
        samples: with evidence.
        by: how evidence is blanked, see ``without_evidence``.

    Raises:
        ExperimentError: a sample without evidence; or the answer changes on fewer than two of several samples.

    Cost: one generated answer for each sample without a counterfactual.
    """
    samples = Samples(samples)
    # Blank everything before running the model, so that a sample without evidence is refused at once.
    blank = blanked(samples, by)
    return paired(str(model.name), samples, blank, [another_answer(model, one) for one in blank])


def blanked(samples: Samples, by: str = "mean") -> Samples:
    """The samples without a counterfactual, with their evidence blanked."""
    return Samples([without_evidence(sample, by) for sample in samples if not sample.counterfactual])


def paired(name: str, samples: Samples, blank: Samples, answers: Sequence[str]) -> Samples:
    """Samples with counterfactuals: their own, or the ``blank`` one with its answer; those without are dropped.

    Raises:
        ExperimentError: fewer than two of several samples are left.
    """
    others = iter(zip(blank, answers, strict=True))
    found = []
    for sample in samples:
        if sample.counterfactual:
            found.append(sample)
            continue
        other, answer = next(others)
        if answer:
            found.append(replace(sample, counterfactual=replace(other, answer=answer)))
    if len(found) < min(2, len(samples)):
        raise ExperimentError(
            f"{name} answers differently on {len(found)} of {len(samples)} samples when their evidence is blanked",
            "at least two",
            "use samples that it can answer only from the evidence, or give counterfactuals",
        )
    return Samples(found)


def another_answer(model: HookedMLLM, blank: Sample) -> str:
    """The model's answer if it differs from the right one in some token, else an empty string."""
    right = model.processor.answer_ids(blank.answer)
    text = model.generate_text(model.inputs_of(blank), max_new_tokens=max(4, len(right)), do_sample=False)[0]
    try:
        wrong = model.processor.answer_ids(text) if text else ()
    except InputError:  # the text merges into the prompt's last token, as a stray line break does
        return ""
    return text if any(a != b for a, b in zip(right, wrong, strict=False)) else ""
