"""Corrupted samples for patching: the same question about the same layout, without the evidence or with another.

    corrupted = without_evidence(sample, by="mean")        # or "blur", "removed"
    corrupted = asking(sample, other.question, other.answer)
    scores = activation_patching(model, model.inputs_of(sample), model.inputs_of(corrupted), metric)

Pixels are changed before the processor sees them, so that the layout stays what it was. A ``counterfactual`` of the
sample itself, with other evidence of the same kind, is the least off-distribution corruption and is to be preferred
where there is one: grey patches and blur are seen as what they are.

What it does not do: noise on embeddings (arXiv 2309.16042: off-distribution); mean-replaced tokens are an ablation,
``Ablate("hook_embed", positions="image")``.
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageFilter

from mech.data.regions import Box, Frames, Mask, Pages, Region
from mech.data.samples import Sample
from mech.errors import ExperimentError, RegionError, suggestion

WAYS = ("mean", "blur", "removed")
MARGIN = 2  # pixels around the evidence whose colour fills its place


def without_evidence(sample: Sample, by: str = "mean") -> Sample:
    """The sample with the pixels of its evidence replaced.

    Args:
        sample: with evidence.
        by: ``"mean"``: the mean colour of the picture; ``"blur"``: a Gaussian blur of a quarter of the evidence's
            shorter side; ``"removed"``: the mean colour just around the evidence, as if there were nothing.

    Raises:
        ExperimentError: an unknown way, or a sample without evidence.
        RegionError: evidence that lies outside the pictures.
    """
    if by not in WAYS:
        raise ExperimentError(f"by={by!r}", " or ".join(map(repr, WAYS)), suggestion(by, WAYS))
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


def asking(sample: Sample, question: str, answer: str) -> Sample:
    """The sample with another question. Patching refuses it where it has another number of tokens.

    Raises:
        ExperimentError: the question is the same.
    """
    if question == sample.question:
        raise ExperimentError(f"the same question {question!r}", "another one", "ask about something else")
    return replace(sample, question=question, answer=answer, counterfactual=None, id=f"{sample.id}/asking")


def _pictures_of(region: Region, count: int) -> tuple[int, ...]:
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
            raise RegionError(
                f"{region!r} on a picture of {width} x {height}", "a box that lies in it", "check the box"
            )
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
        # Where the evidence is the whole picture there is nothing around it.
        source = colours[around] if by == "removed" and around.any() else colours.reshape(-1, 3)
        filled = np.broadcast_to(source.mean(axis=0).round().astype(np.uint8), colours.shape)
    return Image.fromarray(np.where(inside[..., None], filled, colours))
