"""Where evidence is, in pixels, frames and pages. Nothing here knows about tokens (``mech.inputs`` maps them).

A region is a frozen value. Boxes are half-open pixel rectangles of the *original* image, ``x`` to the right and ``y``
down: ``Box(0, 0, 16, 16)`` holds the 256 pixels of the upper left corner.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool

from mech.errors import RegionError


@dataclass(frozen=True)
class Box:
    """A pixel rectangle ``[x0, x1) x [y0, y1)`` of one image."""

    x0: float
    y0: float
    x1: float
    y1: float
    image: int = 0

    def __post_init__(self):
        if not (self.x0 < self.x1 and self.y0 < self.y1):
            raise RegionError(
                f"{self!r} holds no pixel",
                "x0 < x1 and y0 < y1, in pixels of the original image",
                "give (left, top, right, bottom); for (x, y, width, height) use Box.from_xywh",
            )

    @classmethod
    def from_xywh(cls, x: float, y: float, width: float, height: float, image: int = 0) -> "Box":
        """The same rectangle from its corner and size, as COCO and RefCOCO store it."""
        return cls(x, y, x + width, y + height, image)


@dataclass(frozen=True, eq=False)
class Mask:
    """Any set of pixels of one image: ``pixels[y, x]`` is True inside."""

    pixels: Bool[np.ndarray, "height width"] = field(repr=False)
    image: int = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.image == other.image and np.array_equal(self.pixels, other.pixels)

    def __hash__(self) -> int:
        return hash((self.image, self.pixels.shape, self.pixels.tobytes()))


@dataclass(frozen=True)
class Frames:
    """Whole frames of the video, by their index in the frames that were given."""

    indices: tuple[int, ...]

    def __init__(self, *indices: int):
        object.__setattr__(self, "indices", tuple(indices))


@dataclass(frozen=True)
class Pages:
    """Whole images, by their index: the evidence pages of a document."""

    indices: tuple[int, ...]

    def __init__(self, *indices: int):
        object.__setattr__(self, "indices", tuple(indices))


Region = Box | Mask | Frames | Pages
