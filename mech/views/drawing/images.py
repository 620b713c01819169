"""Pictures in pages: encoded once, shown small, and grey under anything drawn over them.

    picture = embedded(image)                        # a PIL image, an array [height width channel] or a path
    stage(picture, marks, dim=True)                  # marks: SVG in pixels of the original
    styles([picture])                                # the pixels themselves, once for all stages

``pictures_on`` reads what users pass as ``on=``: pictures, or one or more samples.
"""

import base64
import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mech.data.samples import Sample, Samples, outlines, pictures_of
from mech.errors import OutputError
from mech.files import read
from mech.views.drawing.page import PACKED_FROM, escape, packed

LARGEST = 640  # pixels; larger pictures are scaled down, or a page of scans would weigh 100 MB
MOST_MARKS = 60_000  # rectangles over the pictures of a page, about 20 MB
Rectangle = Sequence[float]  # x0, y0, x1, y1 in pixels of the original


@dataclass(frozen=True)
class Picture:
    """A picture, named by its style, with the size of the original."""

    name: str
    width: int
    height: int
    uri: str


def embedded(source: Any) -> Picture:
    """A picture ready for a page.

    Raises:
        OutputError: it cannot be read.
    """
    from PIL import Image

    try:
        if isinstance(source, str | Path):
            raw = read(source)
            picture = Image.open(io.BytesIO(raw))
            picture.load()
        else:
            raw, picture = b"", source if isinstance(source, Image.Image) else Image.fromarray(np.asarray(source))
    except Exception as error:  # Pillow's formats have no common error
        name = source if isinstance(source, str | Path) else f"a {type(source).__name__}"
        raise OutputError(
            f"the picture {name} cannot be read ({type(error).__name__})",
            "a PIL image, a uint8 array, or a file (for a study: those next to maps.nc)",
            "pass on=image; delete a damaged maps.nc and run the study again",
        ) from error
    width, height = picture.size
    kind = (picture.format or "png").lower()
    large = max(picture.size) > LARGEST
    if large or not raw or kind == "png":
        small, buffer = picture.convert("RGB"), io.BytesIO()
        if large:
            small.thumbnail((LARGEST, LARGEST))
            small.save(buffer, "JPEG", quality=85)
        else:  # the same pixels as PNG in half the bytes
            small.save(buffer, "WEBP", lossless=True)
        raw, kind = buffer.getvalue(), "jpeg" if large else "webp"
    name = hashlib.sha256(raw).hexdigest()[:12]
    return Picture(name, width, height, f"data:image/{kind};base64,{base64.b64encode(raw).decode()}")


def pictures_on(on: Any) -> list[Picture]:
    """The pictures in what a user passed as ``on=``."""
    if isinstance(on, Sample):
        return [embedded(picture) for picture in pictures_of(on)]
    if isinstance(on, Samples | list | tuple):
        return [picture for part in on for picture in pictures_on(part)]
    return [embedded(on)]


def owners(image: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Which of ``pictures_on`` every token lies in: its image or, for a video, the first frame that it shows."""
    return np.maximum(np.maximum(image, frame), 0)


def evidence_on(on: Any) -> list[list[float]]:
    """The evidence as ``[picture, x0, y0, x1, y1]``; only a sample has any."""
    return outlines(on) if isinstance(on, Sample) else []


def styles(pictures: Iterable[Picture]) -> str:
    """The pixels of all pictures, each once."""
    known = {picture.name: picture.uri for picture in pictures}
    rules = "".join(f".px-{name}{{background-image:url({uri})}}" for name, uri in known.items() if uri)
    return f"<style>{rules}</style>"


def stage(picture: Picture, marks: str = "", *, dim: bool = False, evidence: Iterable[Rectangle] = ()) -> str:
    """A picture with marks over it, and the evidence outlined.

    Marks stay in a template until the picture scrolls into view (``page.js``): they make up most of a page.
    """
    outlined = "".join(f'<rect class="edge" {place(rect)}/><rect class="evidence" {place(rect)}/>' for rect in evidence)
    size = f"aspect-ratio:{picture.width}/{picture.height}"
    view = f'viewBox="0 0 {picture.width} {picture.height}" preserveAspectRatio="none"'
    drawn = f"<svg {view}>{marks}{outlined}</svg>" if marks or outlined else ""
    if marks:
        many = len(drawn) > PACKED_FROM
        drawn = f"<template data-gzip>{packed(drawn)}</template>" if many else f"<template>{drawn}</template>"
    pixels = f'<div class="pixels px-{picture.name}"></div>'
    return f'<div class="stage{" dim" if dim else ""}" style="{size}">{pixels}{drawn}</div>'


def mark(rect: Rectangle, colour: str, opacity: float, tip: str, kind: str = "") -> str:
    """A coloured rectangle with ``tip`` as its tooltip."""
    named = f'class="{kind}" ' if kind else ""
    return f'<rect {named}{place(rect)} fill="{colour}" fill-opacity="{opacity:.2f}" data-tip="{escape(tip)}"/>'


def refuse_many(marks: int) -> None:
    """Refuse what a browser would choke on: a long context in every layer.

    Raises:
        OutputError: more marks than ``MOST_MARKS``.
    """
    if marks > MOST_MARKS:
        raise OutputError(
            f"{marks:,} cells to draw",
            f"at most {MOST_MARKS:,}",
            "choose layers: view(result.sel(layer=[0, 8, 16]))",
        )


def place(rect: Rectangle) -> str:
    """A rectangle as SVG attributes."""
    x0, y0, x1, y1 = rect
    return f'x="{x0:g}" y="{y0:g}" width="{x1 - x0:g}" height="{y1 - y0:g}"'


def cell(at: Sequence[int], of: tuple[int, int], picture: Picture) -> list[float]:
    """The rectangle of a cell (row, column) of ``of`` equal rows and columns."""
    (row, col), (rows, cols) = at, of
    wide, high = picture.width / cols, picture.height / rows
    return [col * wide, row * high, (col + 1) * wide, (row + 1) * high]
