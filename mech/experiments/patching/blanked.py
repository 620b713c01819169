"""Counterfactuals by blanking the evidence, in blocks: the model's answers to blanked samples, one sample at a time.

pairs = paired_by_blanking(model, samples)            # what mech.with_counterfactuals gives
"""

from collections.abc import Callable

import xarray as xr

from mech.axes import EXAMPLE
from mech.data.samples import Samples
from mech.interventions.counterfactuals import another_answer, blanked, paired
from mech.model import HookedMLLM
from mech.scale.measures import per_sample


def paired_by_blanking(model: HookedMLLM, samples: Samples, by: str = "mean") -> Samples:
    """``with_counterfactuals``; inside ``mech.on_folder`` and ``mech.on_ray``, workers generate the answers.

    Raises:
        ExperimentError: as in ``with_counterfactuals``.

    Cost: one generated answer for each sample without a counterfactual.
    """
    blank = blanked(samples, by)
    answers = per_sample_other_answers(model, blank, batch_size=1)["answer"].values if len(blank) else ()
    return paired(str(model.name), samples, blank, [str(answer) for answer in answers])


@per_sample("answers without evidence")
def per_sample_other_answers(
    model: HookedMLLM, samples: Samples, *, batch_size: int = 1, progress: Callable[[int, int], None] | None = None
) -> xr.Dataset:
    """The model's answer to each sample, one by one, if it differs from the sample's own answer."""
    answers = [another_answer(model, sample) for sample in samples]
    return xr.Dataset({"answer": (EXAMPLE, answers)}, {EXAMPLE: samples.names})
