"""Pictures and frames -> the vision tower's tensors, and for every placeholder the pieces it stands for.

Pixels come from the Hugging Face image processors. Their output must be what ``mech.inputs.families.family`` expects;
otherwise it is refused.
"""

from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from mech.errors import InputError
from mech.inputs.canvas import Piece, Shown, Size, Tokens
from mech.inputs.layout import IMAGE, TEXT, VIDEO
from mech.inputs.processor import Processor


@dataclass(frozen=True, eq=False)
class Run:
    """Adjacent visual tokens of the sequence, and what they are tokens of."""

    kind: int
    image: int
    tokens: Tokens


Written = list[str | Run]  # what one placeholder is replaced by


def _runs(pieces: list[Piece] | tuple[Piece, ...], kind: int, image: int) -> Written:
    return [piece if isinstance(piece, str) else Run(kind, image, piece) for piece in pieces]


def image_visuals(processor: Processor, images: list[Image.Image]) -> tuple[dict[str, Tensor], list[Written]]:
    """Tensors for the images of one row, and what each becomes in the sequence."""
    if not images:
        return {}, []
    geometry = processor.geometry
    shown = [geometry.show(image.size, processor.image_processor, len(images) == 1) for image in images]
    given: Any = [images] if geometry.family.nested else images
    made = processor.image_processor(images=given, return_tensors="pt", **geometry.options)
    if geometry.family.sizes is not None:
        geometry.agree(
            [(image.tiles, image.tile) for image in shown], geometry.family.sizes(made, processor.image_processor)
        )
    else:
        geometry.agree(_expected(shown, made), _made(made))
    if missing := [name for name in geometry.family.tensors if name not in made]:
        raise InputError(
            f"{type(processor.image_processor).__name__} makes no {missing[0]!r}",
            f"the image processor of a {geometry.name} model",
            "load the image processor that belongs to this checkpoint",
        )
    tensors = {name: made[name] for name in geometry.family.tensors}
    return tensors, [
        _runs(image.pieces, IMAGE, k) if image.memory is None else _runs(image.pieces, TEXT, -1)
        for k, image in enumerate(shown)
    ]


def _expected(shown: list[Shown], made: Any) -> list[tuple[int, Size]]:
    """How many tiles of which size in total; those of the picture with the most, if others are padded to it."""
    counts = [image.tiles for image in shown]
    if made["pixel_values"].ndim == 5 and len(made["pixel_values"]) == len(shown):
        counts = [max(counts)]
    return [(sum(counts), shown[0].tile)]


def _made(made: Any) -> list[tuple[int, Size]]:
    *_, tiles, _, height, width = made["pixel_values"].shape
    return [(tiles, (width, height))]


def video_visuals(
    processor: Processor, frames: list[Image.Image], fps: float
) -> tuple[dict[str, Tensor], list[Written]]:
    """Tensors for the frames of one video, and what it becomes in the sequence."""
    sizes = sorted({frame.size for frame in frames})
    if len(sizes) > 1:
        raise InputError(f"frames of sizes {sizes}", "frames of one size", "resize them")
    if not fps > 0:
        raise InputError(f"fps={fps}", "more than 0", "say how many of these frames there are per second")
    video = processor.geometry.family.video
    assert video is not None, "families without video are refused when placeholders are counted"
    tensors, pieces = video(processor, frames, fps)
    return tensors, [_runs(pieces, VIDEO, -1)]
