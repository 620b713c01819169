"""Any picture - a path, an array, a PIL image - as upright RGB.

A photograph's EXIF rotation is applied first: boxes and layouts are in pixels of the *upright* picture, as viewers show
it. Transparent pictures are laid on white, as the Hugging Face processors do. What PIL would silently reduce is
refused: an animation (to its first frame), 16 bits per channel (to the upper byte). So is a picture with more pixels
than ``Image.MAX_IMAGE_PIXELS`` (89 million): image processors hold several floating-point copies before shrinking it.
"""

import hashlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mech.errors import InputError, MechError
from mech.files import opened

SENT = ["PNG", "JPEG", "WEBP"]  # formats accepted in uploads


def picture(given: Any) -> Image.Image:
    """An upright RGB image.

    Args:
        given: a PIL image, a path, or a uint8 array ``[height, width]`` or ``[height, width, 3 or 4]``.

    Raises:
        InputError: not a picture, no pixels or too many, several frames, or more than 8 bits per channel.
    """
    if isinstance(given, str | Path):
        scheme = str(given)[:8].partition(":")[0].lower()
        if scheme in ("data", "http", "https") and ":" in str(given)[:8]:
            do = "open its bytes with Image.open(io.BytesIO(...))" if scheme == "data" else "download it first"
            raise InputError(f"a {scheme}: URL of {len(str(given))} characters", "a picture or its path", do)
        return _opened(given)
    if isinstance(given, np.ndarray):
        channels = given.shape[2] if given.ndim == 3 else 1
        if given.dtype != np.uint8 or given.ndim not in (2, 3) or channels not in (1, 3, 4) or not given.size:
            raise InputError(
                f"an array of {given.dtype} and shape {given.shape}",
                "uint8 of shape [height, width] or [height, width, 3]",
                "scale values to 0-255 and put the channels last",
            )
        given = Image.fromarray(given[..., 0] if given.ndim == 3 and channels == 1 else given)
    if not isinstance(given, Image.Image):
        do = "pass tensor.numpy(), uint8 and channels last" if hasattr(given, "numpy") else "open it"
        raise InputError(f"a picture of type {type(given).__name__}", "a PIL image, a path or a uint8 array", do)
    return _upright(given)


def pixel_digest(image: Image.Image) -> str:
    """SHA-256 of a picture's pixels, whatever file it comes in."""
    return hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()


def png(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    written = io.BytesIO()
    image.save(written, "PNG")
    return written.getvalue()


def shows(path: str | Path, digest: str) -> bool:
    """Whether a file shows the upright RGB picture with this ``pixel_digest``; False when it is missing or damaged."""
    try:
        return pixel_digest(picture(path)) == digest
    except InputError:
        return False


def decoded(raw: bytes, name: str, most_pixels: int) -> Image.Image:
    """An upright RGB image from an uploaded file: PNG, JPEG or WebP, recognised by its bytes and not by its name.

    Args:
        raw: the content of the file.
        name: the file's name, for messages.
        most_pixels: a picture with more pixels is refused before any of them is read.

    Raises:
        InputError: another format, a broken file, or too many pixels.
    """
    return _read(io.BytesIO(raw), name, SENT, most_pixels)


def _opened(path: str | Path) -> Image.Image:
    try:
        with opened(path) as file:
            return _read(file, path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _read(
    file: BinaryIO, name: str | Path, formats: list[str] | None = None, most_pixels: int | None = None
) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # PIL warns up to twice the limit and raises beyond it, both before a pixel is read.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=formats) as image:
                if most_pixels is not None and image.width * image.height > most_pixels:
                    raise _too_large(f"{str(name)!r} of {image.width} x {image.height} pixels", most_pixels)
                return _upright(image)
    except MechError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise _too_large(f"{str(name)!r}") from error
    except Exception as error:  # a broken file raises SyntaxError, ValueError or worse, depending on its format
        raise _unreadable(name, error) from error


def _upright(given: Image.Image) -> Image.Image:
    if not given.width or not given.height:
        raise InputError(f"a picture of {given.width} x {given.height} pixels", "at least one pixel", "check the crop")
    if Image.MAX_IMAGE_PIXELS and given.width * given.height > Image.MAX_IMAGE_PIXELS:
        raise _too_large(f"a picture of {given.width} x {given.height} pixels")
    # The second picture of a phone's JPEG (MPO) is a preview or a depth map.
    if getattr(given, "is_animated", False) and given.format != "MPO":
        raise InputError(
            f"a {given.format} of {getattr(given, 'n_frames', 2)} frames",
            "a single picture",
            "choose one with .seek(k) and .convert('RGB'), or pass all of them as video=[...]",
        )
    if given.mode.startswith(("I", "F")):
        raise InputError(
            f"a picture of mode {given.mode!r}", "8 bits a channel", "scale values to 0-255 and convert to 'L' or 'RGB'"
        )
    # A lower-case a: the colours are premultiplied by it.
    transparent = bool({"A", "a"} & set(given.getbands())) or "transparency" in given.info
    if given.mode == "RGB" and not transparent and not given.getexif():
        given.load()
        return given
    given = ImageOps.exif_transpose(given)
    if transparent:
        # PIL cannot convert La to RGBA.
        given = given.convert("LA") if given.mode == "La" else given
        ground = Image.new("RGBA", given.size, (255, 255, 255, 255))
        given = Image.alpha_composite(ground, given.convert("RGBA"))
    return given.convert("RGB")


def _too_large(given: str, most_pixels: int | None = None) -> InputError:
    return InputError(
        f"{given}, which is too large",
        f"at most {most_pixels or Image.MAX_IMAGE_PIXELS} pixels",
        "shrink it and its boxes by the same factor, cut it into pages, or raise PIL's Image.MAX_IMAGE_PIXELS",
    )


def _unreadable(path: str | Path, error: Exception) -> InputError:
    unknown = "it is of no kind that is read here" if isinstance(error, UnidentifiedImageError) else str(error)
    reason = getattr(error, "strerror", None) or unknown
    return InputError(f"{str(path)!r} cannot be read as a picture ({reason})", "an image file", "check path and format")


def pictures(given: Any, name: str = "images") -> list[Image.Image]:
    """Several pictures; a single one instead of a list is refused, since an array of four could be either."""
    if isinstance(given, str | Path | np.ndarray | Image.Image) or not isinstance(given, Sequence):
        raise InputError(f"{name} of type {type(given).__name__}", "a list of pictures", f"pass {name}=[...]")
    return [picture(image) for image in given]
