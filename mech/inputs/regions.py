"""Regions to tokens: which visual tokens a box, a mask, frames or pages cover, and which tokens a passage.

A token belongs to a box or a mask if more than the given share of *its* rectangle lies inside. The area is exact, even
where a rectangle's edge cuts a pixel: every pixel is a unit square of one value. A region that covers no token (because
the processor cropped it away) is an error, and so is a box that leaves its image by more than a pixel: such boxes are
nearly always in the coordinates of another image size.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from mech.data.regions import Box, Frames, Mask, Pages, Passage, Region
from mech.errors import RegionError

# Shares of a token's area below this are rounding, not overlap.
_ROUNDING = 1e-9


class Layout(Protocol):
    """What a region needs to know of a ``TokenLayout``: the picture and the pixels of every visual token."""

    @property
    def rect(self) -> Float[np.ndarray, "pos 4"]: ...
    @property
    def image(self) -> Int[np.ndarray, " pos"]: ...
    @property
    def frame(self) -> Int[np.ndarray, " pos"]: ...
    @property
    def images(self) -> Sequence[tuple[int, int]]: ...
    @property
    def frames_per_token(self) -> int: ...
    @property
    def memory(self) -> object: ...
    @property
    def has_video(self) -> bool: ...
    @property
    def spans(self) -> Mapping[str, tuple[int, ...]]: ...


def covered(layout: Layout, region: Region, image: int | None, coverage: float) -> Bool[np.ndarray, " pos"]:
    """Which positions a region covers; ``image`` overrides the image that a box or a mask names."""
    if isinstance(region, Frames):
        inside = whole_frames(layout, region.indices, region)
    elif isinstance(region, Pages):
        inside = whole_images(layout, region.indices, region)
    elif isinstance(region, Passage):
        inside = _passage(layout, region)
    else:
        here, size = _place(layout, region, image)
        _inside(size, region)
        rects = layout.rect[here]
        area = (rects[:, 2] - rects[:, 0]) * (rects[:, 3] - rects[:, 1])
        overlap = _box_overlap(rects, region) if isinstance(region, Box) else _mask_overlap(rects, region.pixels)
        inside = here.copy()
        # A token without a rectangle has area nan, and nan is not larger than anything.
        inside[here] = overlap / area > coverage + _ROUNDING
    if not inside.any():
        raise RegionError(
            f"{region!r} covers no visual token" + (f" by more than {coverage}" if coverage else ""),
            "a region in the part of the picture that the processor keeps",
            "see layout.overlay(picture, 'image') for what is kept, or lower coverage",
        )
    return inside


def _passage(layout: Layout, region: Passage) -> Bool[np.ndarray, " pos"]:
    """The tokens of a stretch of the context that was known when the inputs were made."""
    if region.span not in layout.spans:
        raise RegionError(
            f"{region!r} in a row that does not record where it is",
            "inputs made with passages=[...], as model.inputs_of(sample) does for a sample's evidence",
            "build the inputs from a sample that names it",
        )
    inside = np.zeros(len(layout.image), dtype=bool)
    inside[list(layout.spans[region.span])] = True
    return inside


def _place(layout: Layout, region: Box | Mask, image: int | None) -> tuple[Bool[np.ndarray, " pos"], tuple[int, int]]:
    """The visual tokens of the image or frame that a region lies in, and its size.

    A token of several frames shows the same rectangle in each of them, and is covered if it is covered in one.
    """
    if region.frame is None:
        index = region.image if image is None else image
        return whole_images(layout, [index], region), layout.images[index]
    return whole_frames(layout, [region.frame], region), layout.images[region.frame]


def whole_images(layout: Layout, indices: Sequence[int], region: Region | None = None) -> Bool[np.ndarray, " pos"]:
    """All visual tokens of some images."""
    given = repr(region) if region is not None else f"image {indices[0]}"
    if layout.has_video:
        raise RegionError(
            f"{given} on a video",
            "a frame of it",
            "say which frame: Box(..., frame=k), Mask(..., frame=k), Frames(k), or frame=k",
        )
    if layout.memory is not None:
        raise RegionError(
            f"{given} in a sequence that holds no visual tokens",
            "the memory that this model's cross-attention layers attend to",
            "ask layout.memory",
        )
    count = len(layout.images)
    if not indices or not all(0 <= index < count for index in indices):
        raise RegionError(
            f"{given} of a row with {count} images",
            f"an index from 0 to {count - 1}" if count else "a row with images",
            "count images from 0" if count else "pass images=... when the inputs are built",
        )
    return np.isin(layout.image, indices)


def whole_frames(layout: Layout, indices: Sequence[int], region: Region | None = None) -> Bool[np.ndarray, " pos"]:
    """All visual tokens of some frames; a temporal patch holds several frames, and counts if it holds any of them."""
    given = repr(region) if region is not None else f"frame {indices[0]}"
    if not layout.has_video:
        raise RegionError(
            f"{given} of a row without a video", "a row with a video", "use Pages(...) or image= for images"
        )
    count = len(layout.images)
    if not indices or not all(0 <= index < count for index in indices):
        raise RegionError(
            f"{given} of a video of {count} frames", f"indices from 0 to {count - 1}", "count frames from 0"
        )
    return np.isin(layout.frame, [index - index % layout.frames_per_token for index in indices])


def _inside(size: tuple[int, int], region: Box | Mask) -> None:
    width, height = size
    if isinstance(region, Mask):
        if region.pixels.shape != (height, width):
            raise RegionError(
                f"a mask of shape {region.pixels.shape}",
                f"({height}, {width}), height before width, the size of the original image",
                "make the mask at the size of the image, pixels[y, x]",
            )
    elif region.x0 < -1 or region.y0 < -1 or region.x1 > width + 1 or region.y1 > height + 1:
        raise RegionError(
            f"{region!r} does not fit in an image of {width} x {height} pixels",
            "a box inside the image, in pixels of the original",
            "scale relative boxes by the size of the image; use Box.from_xywh for (x, y, width, height)",
        )


def _box_overlap(rects: Float[np.ndarray, "token 4"], box: Box) -> Float[np.ndarray, " token"]:
    wide = np.minimum(rects[:, 2], box.x1) - np.maximum(rects[:, 0], box.x0)
    high = np.minimum(rects[:, 3], box.y1) - np.maximum(rects[:, 1], box.y0)
    return np.clip(wide, 0, None) * np.clip(high, 0, None)


def _mask_overlap(
    rects: Float[np.ndarray, "token 4"], pixels: Bool[np.ndarray, "height width"]
) -> Float[np.ndarray, " token"]:
    """Area of the mask in each rectangle, from the integral image interpolated between its nodes.

    Between nodes the integral of a picture of constant pixels is bilinear, so the interpolation is exact.
    """
    integral = np.pad(np.cumsum(np.cumsum(pixels.astype(bool).astype(float), axis=0), axis=1), ((1, 0), (1, 0)))

    def upto(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        left = np.clip(np.floor(x).astype(int), 0, pixels.shape[1] - 1)
        top = np.clip(np.floor(y).astype(int), 0, pixels.shape[0] - 1)
        dx, dy = x - left, y - top
        above = integral[top, left] * (1 - dx) + integral[top, left + 1] * dx
        below = integral[top + 1, left] * (1 - dx) + integral[top + 1, left + 1] * dx
        return above * (1 - dy) + below * dy

    overlap = np.full(len(rects), np.nan)
    shown = ~np.isnan(rects).any(axis=1)
    x0, y0, x1, y1 = rects[shown].T
    overlap[shown] = upto(x1, y1) - upto(x0, y1) - upto(x1, y0) + upto(x0, y0)
    return overlap
