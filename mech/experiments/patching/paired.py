"""Patching of samples with their own counterfactuals: a sweep over many samples that can be cut into blocks.

    found = patched_pairs(model, samples, direction="noise", over=("layer", "head"))

The metric is the logit difference between each sample's answer and its counterfactual's. To patch between any two runs,
with any metric, see ``activation.py``.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import xarray as xr

from mech.arguments import Progress
from mech.axes import EXAMPLE
from mech.data.samples import Sample, Samples
from mech.experiments.metrics import LogitDiff
from mech.experiments.patching.activation import activation_patching
from mech.inputs import Inputs
from mech.model import HookedMLLM
from mech.results.provenance import data_record, jsonable
from mech.scale.measures import per_sample


def patched_pairs(model: HookedMLLM, samples: Samples, *, forced: bool = False, **options: Any) -> xr.Dataset:
    """``activation_patching`` of every sample with its counterfactual, by the logit difference of their answers.

    Args:
        forced: append the sample's answer to both runs, for answers that begin with the same tokens.
        options: of ``activation_patching``, including ``progress``.

    Raises:
        ExperimentError: as in ``activation_patching``, or a sample without a counterfactual.

    Cost: that of ``activation_patching`` for each sample.
    """
    found = per_sample_pairs(model, samples, forced=forced, batch_size=1, **options)
    # These describe all samples, even if each block has only some of them.
    metric, record = answers_apart(samples), found.attrs["provenance"]
    record = {**record, "metric": jsonable(metric), "data": data_record(Samples(samples))}
    return found.assign_attrs(measure=repr(metric), provenance=record)


@per_sample("patching")
def per_sample_pairs(
    model: HookedMLLM,
    samples: Samples,
    *,
    forced: bool = False,
    batch_size: int = 1,
    progress: Progress | None = None,
    **options: Any,
) -> xr.Dataset:
    """The numbers of ``patched_pairs``, computed pair by pair whatever the ``batch_size``."""
    clean, corrupted = (list(samples), None) if not forced else forced_inputs(model, samples)
    found = activation_patching(model, clean, corrupted, answers_apart(samples), progress=progress, **options)
    found.attrs.pop("forwards", None)  # covers only some samples if the sweep was cut into blocks
    return found.assign_coords({EXAMPLE: [sample.id or str(i) for i, sample in enumerate(samples)]})


def answers_apart(samples: Sequence[Sample]) -> LogitDiff:
    """The logit of each sample's answer minus that of its counterfactual."""
    others = [sample.counterfactual for sample in samples if sample.counterfactual]
    return LogitDiff([sample.answer for sample in samples], [other.answer for other in others])


def forced_inputs(
    model: HookedMLLM, samples: Sequence[Sample], forced: bool = True
) -> tuple[list[Inputs], list[Inputs]]:
    """The inputs of samples and of their counterfactuals, both followed by the right answer."""
    others = [sample.counterfactual for sample in samples if sample.counterfactual]
    clean = [model.inputs_of(sample, answer=forced) for sample in samples]
    return clean, [
        model.inputs_of(replace(other, answer=sample.answer), answer=forced)
        for sample, other in zip(samples, others, strict=True)
    ]
