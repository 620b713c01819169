"""Which cells of a sweep are worth patching: estimates for all of them from one forward and backward of each run.

    estimate(cell) = mean over the two runs of  gradient . (source - base)   at the cell's positions

This is the trapezoid rule on the straight line between the runs. The estimate is first order and misses cells with
higher-order effects (saturated attention, an AND of two heads). It is therefore used only to choose which cells are
patched exactly (``activation_patching(method="screened")``).

References: attribution patching, arXiv 2310.10348. Difference: the gradient is the mean over both runs, as in
integrated gradients with two steps (arXiv 2403.17806).
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mech.experiments.gradients import differentiate
from mech.experiments.patching.sweeps import SQUARE, Patches
from mech.inputs import Inputs
from mech.model import HookedMLLM


def estimates(
    model: HookedMLLM,
    base: Inputs,
    source: Inputs,
    patches: Patches,
    names: Sequence[str],
    score: Callable[[Inputs], Tensor],
) -> Float[Tensor, "batch cell"]:
    """The estimated change of the metric for every cell.

    Args:
        model: a hooked model.
        base, source: the run that would be patched into, and the run whose values would be written.
        patches: the cells of the sweep.
        names: full names of the point in every layer.
        score: runs inputs and returns the metric of every row, with a gradient.

    Raises:
        ExperimentError: a metric without a gradient.

    Cost: two forwards and two backwards.
    """
    here, there = (differentiate(model, run, names, score) for run in (base, source))
    sums: dict[str, Tensor] = {}
    where = torch.stack([region.to(model.device) for region in patches.regions])
    for name in names:
        product = (here.slopes[name] + there.slopes[name]) / 2 * (there.values[name] - here.values[name])
        product = product.sum(-1)
        if name.endswith(SQUARE):
            product = product.transpose(1, 2)
        if name == "projector.hook_out":
            sums[name] = (where.to(product) @ product)[None]
        else:
            sums[name] = torch.einsum("rbp,bp...->br...", where.to(product).expand(-1, *product.shape[:2]), product)
    return patches.sums(sums)
