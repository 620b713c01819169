"""Counterfactuals by blanked evidence, in blocks: what the model says then is asked sample by sample.

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
    """``with_counterfactuals``; inside ``mech.on_folder`` and ``mech.on_ray`` workers say what the model answers.

    Raises:
        ExperimentError: as there.

    Cost: one generation of an answer for each sample without a counterfactual.
    """
    blank = blanked(samples, by)
    answers = per_sample_other_answers(model, blank, batch_size=1)["answer"].values if len(blank) else ()
    return paired(str(model.name), samples, blank, [str(answer) for answer in answers])


@per_sample("answers without evidence")
def per_sample_other_answers(
    model: HookedMLLM, samples: Samples, *, batch_size: int = 1, progress: Callable[[int, int], None] | None = None
) -> xr.Dataset:
    """What the model says of each sample, if it is another answer than the sample's; one by one."""
    answers = [another_answer(model, sample) for sample in samples]
    return xr.Dataset({"answer": (EXAMPLE, answers)}, {EXAMPLE: samples.names})
