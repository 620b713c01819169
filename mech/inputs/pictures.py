"""Whatever a picture comes as - a path, an array, a PIL image - to upright RGB.

A photograph's EXIF rotation is applied first: boxes and layouts are in pixels of the *upright* picture, as viewers show
it. Transparency is laid on white, as the Hugging Face processors do.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mech.errors import InputError


def picture(given: Any) -> Image.Image:
    """An upright RGB image.

    Args:
        given: a PIL image, a path, or a uint8 array ``[height, width]`` or ``[height, width, 3 or 4]``.
    """
    if isinstance(given, str | Path):
        try:
            with Image.open(given) as opened:
                opened.load()
                given = opened
        except OSError as error:
            raise InputError(f"{str(given)!r} cannot be read as a picture", "an image file", str(error)) from error
    elif isinstance(given, np.ndarray):
        channels = given.shape[2] if given.ndim == 3 else 1
        if given.dtype != np.uint8 or given.ndim not in (2, 3) or channels not in (1, 3, 4) or not given.size:
            raise InputError(
                f"an array of {given.dtype} and shape {given.shape}",
                "uint8 of shape [height, width] or [height, width, 3]",
                "scale values to 0-255 and put the channels last",
            )
        given = Image.fromarray(given[..., 0] if given.ndim == 3 and channels == 1 else given)
    if not isinstance(given, Image.Image):
        raise InputError(f"a picture of type {type(given).__name__}", "a PIL image, a path or a uint8 array", "open it")
    if not given.width or not given.height:
        raise InputError(
            f"a picture of {given.width} x {given.height} pixels", "at least one pixel", "look at the crop"
        )
    if given.mode.startswith(("I", "F")):
        raise InputError(
            f"a picture of mode {given.mode!r}", "8 bits a channel", "scale values to 0-255 and convert to 'L' or 'RGB'"
        )
    if given.mode == "RGB" and not given.getexif():
        return given
    given = ImageOps.exif_transpose(given)
    if "A" in given.getbands() or "transparency" in given.info:
        ground = Image.new("RGBA", given.size, (255, 255, 255, 255))
        given = Image.alpha_composite(ground, given.convert("RGBA"))
    return given.convert("RGB")


def pictures(given: Any, name: str = "images") -> list[Image.Image]:
    """Several pictures; a single one in place of a list is refused, since an array of four could be either."""
    if isinstance(given, str | Path | np.ndarray | Image.Image) or not isinstance(given, Sequence):
        raise InputError(f"{name} of type {type(given).__name__}", "a list of pictures", f"pass {name}=[...]")
    return [picture(one) for one in given]
