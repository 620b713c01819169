"""Which visual tokens, or which pixels, an answer rests on: integrated gradients from a baseline picture.

    found = input_attribution(model, inputs, metric, over="visual", ig_steps=16)
    found.attribution                           # one number for each visual token; coordinates image, row, col
    found.attrs["completeness_gap"]             # what the sum misses of metric - baseline: falls with more steps

The sum over tokens is the metric minus the metric at the baseline, up to the completeness gap. Without steps it is
gradient times input, which has no such property.

It does not say what is *necessary*. For that, knock tokens out or patch them (``activation_patching``).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from mech.arguments import Whole, checked, one_of
from mech.axes import TOKEN
from mech.errors import ExperimentError
from mech.experiments.gradients import Edit, Score, check_smooth, differentiate, midpoints, still
from mech.experiments.metrics import AnyMetric
from mech.inputs import Inputs, TokenLayout
from mech.model import HookedMLLM
from mech.results import provenance

OVER = ("visual", "pixels")
BASELINES = ("mean", "zero")
PIXELS = ("pixel_values", "pixel_values_videos")


@checked
def input_attribution(
    model: HookedMLLM,
    inputs: Inputs,
    metric: AnyMetric,
    *,
    over: one_of(OVER) = "visual",
    ig_steps: Whole = 16,
    baseline: one_of(BASELINES) | Inputs = "mean",
) -> xr.Dataset:
    """How much each visual token, or each pixel, contributes to the metric relative to a baseline.

    ``attribution = (x - baseline) . mean over the straight path of d metric / d x``, summed over features or channels.

    Sign: positive raises the metric above the baseline's. Unit: that of the metric.

    Args:
        model: a hooked model.
        inputs: one row.
        metric: see ``mech.experiments.metrics``.
        over: ``"visual"``: the visual tokens as the text stack receives them (features added between layers stay);
            ``"pixels"``: the tensor the vision stack receives.
        ig_steps: midpoints on the path; 0 for the gradient at the inputs alone.
        baseline: ``"mean"`` (of the visual tokens; of each channel of a picture), ``"zero"``, or inputs of the same
            layout (the counterfactual). Zero tokens are a poor baseline: a first norm without centring sees the same
            picture all along the path and nothing at its end, so the gap remains.

    Returns:
        ``attribution`` over token (coordinates pos, image, row, col), over (picture, y, x) or, if the processor cuts
        pictures itself, over patch; ``metric`` and ``baseline``. Attributes: ``completeness_gap`` (metric - baseline -
        sum of attributions), ``forwards`` and ``backwards``.

    Raises:
        ExperimentError: several rows, no pictures, a metric without a gradient, or a baseline of another shape.

    Cost: two forwards, and one forward and backward for each step; over pixels with the vision stack in the graph.

    References: arXiv 1703.01365 (integrated gradients), 2506.09047.
    """
    if len(inputs) != 1 or ig_steps < 0:
        raise ExperimentError(f"{len(inputs)} rows, ig_steps={ig_steps}", "one row, 0 or more steps", "pass row by row")
    layout = inputs.layout
    if layout.memory is not None and over == "visual":
        raise ExperimentError(
            "visual tokens outside the sequence", "tokens among the embeddings", "use over='pixels'"
        )  # fmt: skip
    if isinstance(baseline, Inputs):
        inputs.check_same_layout(baseline)
    reading = metric.reading(model, layout, 0)
    check_smooth(model, [reading], metric)
    at = torch.as_tensor(reading.positions, device=model.device)
    with torch.no_grad():
        clean = model(inputs, logits_to_keep=at)

    def score(run: Inputs) -> Tensor:
        return reading.score(model(run, logits_to_keep=at), clean[0])

    measured = _of_tokens if over == "visual" else _of_pixels
    values, start = measured(model, inputs, score, midpoints(ig_steps) if ig_steps else [1.0], baseline)
    end = float(reading.score(clean, clean[0]))
    settings = {"over": over, "ig_steps": ig_steps, "baseline": baseline if isinstance(baseline, str) else "inputs"}
    unit = {"unit": metric.unit}
    found = xr.Dataset({"attribution": _labelled(values, layout, over), "metric": end, "baseline": start})
    found["attribution"].attrs = unit | {"sign": "positive raises the metric"}
    for name in ("metric", "baseline"):
        found[name].attrs = unit
    return found.assign_attrs(
        model=model.name, **settings, measure=repr(metric),
        completeness_gap=end - start - float(values.sum()), forwards=2 + (ig_steps or 1), backwards=ig_steps or 1,
        provenance=provenance(model, metric=metric, **settings),
    )  # fmt: skip


def _labelled(values: Tensor, layout: TokenLayout, over: str) -> xr.DataArray:
    """The attribution with its dimensions; for tokens also what each stands for."""
    array = values.double().cpu().numpy()
    if over != "visual":
        return xr.DataArray(array, dims=("patch",) if array.ndim == 1 else ("picture", "y", "x"))
    where = layout.positions("image")
    names = ("image", "frame", "row", "col", "view")
    facts = {"pos": where} | {name: getattr(layout, name)[where] for name in names}
    return xr.DataArray(array, {name: (TOKEN, fact) for name, fact in facts.items()}, (TOKEN,))


def _of_tokens(
    model: HookedMLLM, inputs: Inputs, score: Score, shares: Sequence[float], baseline: str | Inputs
) -> tuple[Float[Tensor, " token"], float]:
    """Attributions of the visual tokens, and the metric at the baseline."""
    where = torch.as_tensor(inputs.layout.positions("image"), device=model.device)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter="hook_embed", logits_to_keep=1)
        ours = cache["hook_embed"][:, where]
        if isinstance(baseline, Inputs):
            _, cache = model.run_with_cache(baseline, names_filter="hook_embed", logits_to_keep=1)
            theirs = cache["hook_embed"][:, where]
        else:
            theirs = ours.mean(1, keepdim=True).expand_as(ours) if baseline == "mean" else torch.zeros_like(ours)

    def at(share: float) -> list[Edit]:
        def write(value: Tensor, hook: HookPoint) -> Tensor:
            value = value.clone()
            value[:, where] = torch.lerp(theirs, ours, share)
            return value

        return [("hook_embed", write)]

    slope = torch.zeros_like(ours)
    for share in shares:
        step = differentiate(model, inputs, ["hook_embed"], score, edits=at(share))
        slope += step.slopes["hook_embed"][:, where] / len(shares)
    with torch.no_grad(), model.hooks(at(0.0)):
        start = float(score(inputs))
    return ((ours - theirs) * slope).sum(-1)[0], start


def _of_pixels(
    model: HookedMLLM, inputs: Inputs, score: Score, shares: Sequence[float], baseline: str | Inputs
) -> tuple[Tensor, float]:
    """The same for pixels or patches."""
    name = next((name for name in PIXELS if inputs.tensors.get(name) is not None), None)
    if name is None:
        raise ExperimentError("inputs without pixels", "an image or a video", "build them with model.inputs(...)")
    ours = inputs.to(model.device, model.dtype).tensors[name]
    if isinstance(baseline, Inputs):
        theirs = baseline.to(model.device, model.dtype).tensors[name]
    elif baseline == "zero":
        theirs = torch.zeros_like(ours)
    else:  # of each channel of a picture, or of each pixel of a patch
        theirs = ours.mean((-2, -1) if ours.ndim >= 4 else 0, keepdim=True).expand_as(ours)
    slope = torch.zeros_like(ours)
    for share in shares:
        with still(model):
            pixels = torch.lerp(theirs, ours, share).requires_grad_()
            total = score(replace(inputs, tensors={**inputs.tensors, name: pixels})).sum()
            slope += torch.autograd.grad(total, pixels)[0] / len(shares)
    with torch.no_grad():
        start = float(score(replace(inputs, tensors={**inputs.tensors, name: theirs})))
    product = (ours - theirs) * slope
    if ours.ndim < 4:
        return product.reshape(len(product), -1).sum(-1), start
    return product.sum(-3).reshape(-1, *product.shape[-2:]), start
