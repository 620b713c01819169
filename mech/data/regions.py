"""Where evidence is: in pixels, frames, pages, or a text. Tokens do not appear here (``mech.inputs`` maps regions).

A region is a frozen value. Boxes are half-open pixel rectangles of the *original* image, ``x`` to the right and ``y``
down: ``Box(0, 0, 16, 16)`` holds the 256 pixels in the upper left corner. In a video a box or a mask names its frame,
and a tube is one box per frame:

    Sample(question, answer, video=frames, evidence=tuple(Box(*corners, frame=k) for k, corners in tube.items()))
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool

from mech.arguments import checking, is_whole
from mech.errors import RegionError
from mech.indices import Indices, indices


@checking(RegionError)
@dataclass(frozen=True)
class Box:
    """A pixel rectangle ``[x0, x1) x [y0, y1)`` of one image, or of one frame of the video."""

    x0: float
    y0: float
    x1: float
    y1: float
    image: int = 0
    frame: int | None = None

    def __post_init__(self):
        if not (self.x0 < self.x1 and self.y0 < self.y1):
            raise RegionError(
                f"{self!r} holds no pixel",
                "x0 < x1 and y0 < y1, in pixels of the original image",
                "give (left, top, right, bottom); for (x, y, width, height) use Box.from_xywh",
            )
        _one_place(self)

    @classmethod
    @checking(RegionError)
    def from_xywh(
        cls, x: float, y: float, width: float, height: float, image: int = 0, frame: int | None = None
    ) -> "Box":
        """The same rectangle from its corner and size, as COCO, RefCOCO and VidSTG store it."""
        return cls(x, y, x + width, y + height, image, frame)


@checking(RegionError)
@dataclass(frozen=True, eq=False)
class Mask:
    """Any set of pixels of one image, or of one frame of the video: ``pixels[y, x]`` is True inside."""

    pixels: Bool[np.ndarray, "height width"] = field(repr=False)
    image: int = 0
    frame: int | None = None

    def __post_init__(self):
        # Floats are more often probabilities than masks, and nan would count as inside.
        if not isinstance(self.pixels, np.ndarray) or self.pixels.ndim != 2 or self.pixels.dtype.kind not in "bui":
            given = getattr(self.pixels, "dtype", type(self.pixels).__name__), getattr(self.pixels, "shape", "unknown")
            raise RegionError(
                "a mask of {} and shape {}".format(*given),
                "a bool array [height, width]",
                "compare with a threshold, such as scores > 0.5, and drop axes of length one",
            )
        _one_place(self)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Mask)
            and (self.image, self.frame) == (other.image, other.frame)
            and np.array_equal(self.pixels, other.pixels)
        )

    def __hash__(self) -> int:
        return hash((self.image, self.frame, self.pixels.shape, self.pixels.tobytes()))


@checking(RegionError)
@dataclass(frozen=True)
class Frames:
    """Whole frames of the video, by their index among the frames given."""

    indices: tuple[int, ...]

    def __init__(self, *indices: int):
        object.__setattr__(self, "indices", tuple(indices))


@checking(RegionError)
@dataclass(frozen=True)
class Pages:
    """Whole images, by their index: the evidence pages of a document."""

    indices: tuple[int, ...]

    def __init__(self, *indices: int):
        object.__setattr__(self, "indices", tuple(indices))


@checking(RegionError)
@dataclass(frozen=True)
class Passage:
    """A stretch of the sample's ``context``: its characters ``[start, stop)``."""

    start: int
    stop: int

    def __post_init__(self):
        if not 0 <= self.start < self.stop:
            raise RegionError(f"{self!r} holds no character", "0 <= start < stop", "count characters of the context")

    @property
    def span(self) -> str:
        """The name of its positions in a layout."""
        return f"passage {self.start}:{self.stop}"


Region = Box | Mask | Frames | Pages | Passage


def where(name: str, given: Any) -> str | Region | tuple[Region, ...] | Indices:
    """A choice of positions as a frozen value: a name, a region, several regions, or positions.

    A boolean mask means the positions where it is True.

    Raises:
        RegionError: anything else.
    """
    if isinstance(given, str | Region):
        return given
    if isinstance(given, Sequence) and given and all(isinstance(part, Region) for part in given):
        return tuple(given)
    return indices(name, [given] if is_whole(given) else given, RegionError)


def where_in_words(given: Any) -> str:
    """A choice of positions as text, for a coordinate or an attribute."""
    read = where("positions", given)
    return read if isinstance(read, str) else repr(list(read) if isinstance(read, tuple) else read)


def _one_place(region: Box | Mask) -> None:
    if region.image and region.frame is not None:
        raise RegionError(
            f"{region!r} lies in an image and in a frame", "one of the two", "leave out image=: a row has one video"
        )
