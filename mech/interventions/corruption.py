"""Corrupted samples for patching: the same layout, with the evidence removed or another question asked.

    corrupted = without_evidence(sample, by="mean")        # or "blur", "removed"
    corrupted = with_question(sample, other.question, other.answer)
    scores = activation_patching(model, model.inputs_of(sample), model.inputs_of(corrupted), metric)
    blind = without_pictures(model, model.inputs_of(sample))     # every visual token becomes their mean

Pixels are changed before the processor sees them, so the layout stays the same. The sample's own ``counterfactual``,
with other evidence of the same kind, is the least off-distribution corruption; prefer it where there is one, since the
model sees grey patches and blur for what they are.

This module adds no noise to embeddings (arXiv 2309.16042: off-distribution). To replace only some visual tokens, use an
ablation: ``Ablate("hook_embed", positions=box)``.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image, ImageFilter
from torch import Tensor

from mech.arguments import Text, checked, one_of
from mech.data.regions import Box, Frames, Mask, Pages, Passage, Region
from mech.data.samples import Sample
from mech.errors import ExperimentError, RegionError
from mech.inputs import Inputs
from mech.model import HookedMLLM

WAYS = ("mean", "blur", "removed")
MARGIN = 2  # pixels around the evidence whose mean colour replaces it


@checked
def without_evidence(sample: Sample, by: one_of(WAYS) = "mean") -> Sample:
    """The sample with the pixels of its evidence replaced.

    Args:
        sample: with evidence.
        by: ``"mean"``: the mean colour of the picture; ``"blur"``: a Gaussian blur with a radius of a quarter of
            the evidence's shorter side; ``"removed"``: the mean colour just around the evidence, as if nothing were
            there.

    Raises:
        ExperimentError: an unknown way, or a sample without evidence.
        RegionError: evidence that lies outside the pictures.
    """
    if not sample.evidence:
        raise ExperimentError(
            f"sample {sample.id!r} has no evidence", "a sample that says where it is", "set Sample.evidence"
        )
    pictures = list(sample.images or sample.video)
    for region in sample.evidence:
        for index in _pictures_of(region, len(pictures)):
            pictures[index] = _replaced(pictures[index], _inside(region, pictures[index].size), by)
    changed = {"images" if sample.images else "video": tuple(pictures)}
    return replace(sample, **changed, counterfactual=None, id=f"{sample.id}/{by}")


@checked
def with_question(sample: Sample, question: Text, answer: str) -> Sample:
    """The sample with another question. Patching refuses it if the number of tokens differs.

    Raises:
        ExperimentError: the question is the same.
    """
    if question == sample.question:
        raise ExperimentError(f"the same question {question!r}", "another one", "ask about something else")
    return replace(sample, question=question, answer=answer, counterfactual=None, id=f"{sample.id}/with_question")


@checked
def without_pictures(model: HookedMLLM, inputs: Inputs, reference: Sequence[Inputs] = ()) -> Inputs:
    """Inputs with every visual token replaced by the mean visual token, at the output of the vision stack.

    Features that enter between layers (DeepStack) are averaged too. Only for forward passes: generation and points
    before the text stack need the pictures.

    Args:
        model: encodes the pictures.
        inputs: with pictures.
        reference: other inputs with pictures to take the mean over; ``inputs`` itself if there are none.

    Raises:
        ExperimentError: nothing to replace or to average.
        UnsupportedModel: the architecture has no way to run its vision stack alone.

    Cost: one run of the vision stack on all inputs.

    References: mean-embedding ablation of visual tokens, arXiv 2410.07149 (over a data set; here over the inputs).
    """
    blind, seen = model.encode_pictures(inputs)
    known = [model.encode_pictures(other)[1] for other in reference] or [seen]
    for kind in seen or ("image",):
        if not all(kind in outputs for outputs in (seen, *known)):
            raise ExperimentError(f"inputs without {kind}s", "pictures in inputs and reference", "leave the others out")
    means = {kind: _averaged(output, [outputs[kind] for outputs in known]) for kind, output in seen.items()}
    return replace(blind, tensors={**blind.tensors, "mm_encoder_outputs": means})


def _averaged(output: Any, known: Sequence[Any]) -> Any:
    """The output of a vision stack, with each token replaced by the mean over ``known``."""
    if isinstance(output, Tensor):
        return _filled(output, known)
    handed = "last_hidden_state" if output.get("pooler_output") is None else "pooler_output"
    changed = {handed: _filled(output[handed], [each[handed] for each in known])}
    if (layers := output.get("deepstack_features")) is not None:
        others = zip(*(each["deepstack_features"] for each in known), strict=True)
        changed["deepstack_features"] = [_filled(*pair) for pair in zip(layers, others, strict=True)]
    return replace(output, **changed)


def _filled(tokens: Any, known: Sequence[Any]) -> Any:
    """A tensor of tokens, or one for each picture, with every token replaced by the mean over ``known``."""
    flat = [part for output in known for part in ([output] if isinstance(output, Tensor) else output)]
    mean = torch.cat([part.flatten(0, -2) for part in flat]).mean(0)
    return mean.expand_as(tokens) if isinstance(tokens, Tensor) else [mean.expand_as(part) for part in tokens]


def _pictures_of(region: Region, count: int) -> tuple[int, ...]:
    if isinstance(region, Passage):
        raise RegionError(f"{region!r} of pictures", "a region of a picture", "corrupt text by a counterfactual sample")
    if isinstance(region, Frames | Pages):
        indices = region.indices
    else:
        indices = (region.image if region.frame is None else region.frame,)
    if not all(0 <= index < count for index in indices):
        raise RegionError(f"{region!r} of {count} pictures", f"indices from 0 to {count - 1}", "count from 0")
    return indices


def _inside(region: Region, size: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
    width, height = size
    if isinstance(region, Mask):
        if region.pixels.shape != (height, width):
            raise RegionError(f"a mask of shape {region.pixels.shape}", f"({height}, {width})", "use the image's size")
        return region.pixels.astype(bool)
    inside = np.ones((height, width), dtype=bool)
    if isinstance(region, Box):
        x, y = np.arange(width), np.arange(height)[:, None]
        inside = (x + 1 > region.x0) & (x < region.x1) & (y + 1 > region.y0) & (y < region.y1)
        if not inside.any():
            raise RegionError(f"{region!r} on a picture of {width} x {height}", "a box inside it", "check the box")
    return inside


def _replaced(picture: Image.Image, inside: Bool[np.ndarray, "height width"], by: str) -> Image.Image:
    colours = np.asarray(picture.convert("RGB"))
    rows, cols = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    if by == "blur":
        radius = max(1.0, float(min(np.ptp(rows), np.ptp(cols))) / 4)
        filled = np.asarray(picture.convert("RGB").filter(ImageFilter.GaussianBlur(radius)))
    else:
        around = np.zeros_like(inside)
        around[max(0, rows[0] - MARGIN) : rows[-1] + 1 + MARGIN, max(0, cols[0] - MARGIN) : cols[-1] + 1 + MARGIN] = (
            True
        )
        around &= ~inside
        # Evidence that fills the whole picture has nothing around it.
        source = colours[around] if by == "removed" and around.any() else colours.reshape(-1, 3)
        filled = np.broadcast_to(source.mean(axis=0).round().astype(np.uint8), colours.shape)
    return Image.fromarray(np.where(inside[..., None], filled, colours))
