"""Image processors of Llama 4 and Cohere Vision on PIL. transformers has them only for torchvision.

They read the same settings (``preprocessor_config.json``) and cut the same tiles; pixels are resized by PIL, and kept
in 32 bits where Llama 4's own are rounded to bfloat16.
"""

import math
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.utils.constants import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from mech.errors import InputError
from mech.inputs.canvas import Size
from mech.inputs.families.lfm2 import Lfm2VlImageProcessorPil

Arrangement = tuple[Size, Size]  # (columns, rows) of tiles, (width, height) of the picture on them


class _Tiling(PilBackend):
    """Tiles, followed by the whole picture if there are several."""

    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    size: ClassVar[dict[str, int]]
    max_patches: int

    def arrangement(self, size: Size) -> Arrangement:
        """Which tiles a picture of ``size`` is put on, and its size on them."""
        raise NotImplementedError

    def _preprocess(self, images: list[np.ndarray], size: SizeDict, resample: Any, **options: Any) -> BatchFeature:
        if not options["do_resize"]:
            raise InputError(
                f"do_resize=False of {type(self).__name__}",
                "pictures resized to whole tiles",
                "set image_processor.do_resize = True",
            )
        tiles, counts, ratios = [], [], []
        high, wide = self.size["height"], self.size["width"]
        for image in images:
            (columns, rows), (width, height) = self.arrangement((image.shape[2], image.shape[1]))
            resized = self.resize(image, SizeDict(height=height, width=width), resample)
            padded = np.pad(resized, ((0, 0), (0, rows * high - height), (0, columns * wide - width)))
            grid = padded.reshape(len(image), rows, high, columns, wide).transpose(1, 3, 0, 2, 4)
            views = list(grid.reshape(-1, len(image), high, wide))
            views += [self.resize(image, size, resample)] if columns * rows > 1 else []
            counts.append(len(views))
            ratios.append((rows, columns))
            for view in views:
                scaled = self.rescale(view, options["rescale_factor"]) if options["do_rescale"] else view
                normal = options["do_normalize"]
                tiles.append(self.normalize(scaled, options["image_mean"], options["image_std"]) if normal else scaled)
        # The last two are what the Hugging Face processors of the two families read.
        data = {"pixel_values": np.stack(tiles), "num_patches": counts, "aspect_ratios": ratios}
        return BatchFeature(data=data, tensor_type=options["return_tensors"])

    def _candidates(self) -> list[Size]:
        """Every (columns, rows) of at most ``max_patches`` tiles, the fewest tiles first."""
        most = self.max_patches
        grids = [(columns, rows) for columns in range(1, most + 1) for rows in range(1, most // columns + 1)]
        return sorted(grids, key=lambda grid: grid[0] * grid[1])

    def _scales(self, size: Size, precision: type) -> Float[np.ndarray, " grid"]:
        """By how much a picture can be enlarged on each of the candidates; ties depend on the precision."""
        edges = np.array([self.size["width"], self.size["height"]], precision)
        return (np.array(self._candidates(), precision) * edges / np.array(size, precision)).min(axis=1)


class Cohere2VisionImageProcessorPil(_Tiling):
    """Stretches a picture over the tiles that enlarge it least or, if all are too small, shrink it least."""

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size: ClassVar[dict[str, int]] = {"height": 512, "width": 512}
    crop_to_patches = True
    max_patches = 12
    patch_size = 16

    def arrangement(self, size: Size) -> Arrangement:
        """Which tiles a picture of ``size`` is put on, and its size on them."""
        columns, rows = 1, 1
        if self.crop_to_patches:
            scales = self._scales(size, np.float64)
            enlarging = np.where(scales < 1, np.inf, scales)
            best = np.argmin(enlarging) if (scales >= 1).any() else np.argmax(scales)
            columns, rows = self._candidates()[best]
        return (columns, rows), (columns * self.size["width"], rows * self.size["height"])


class Llama4ImageProcessorPil(_Tiling):
    """Keeps a picture's shape and pads it at the right and the bottom; enlarges it to a tile at most."""

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size: ClassVar[dict[str, int]] = {"height": 336, "width": 336}
    max_patches = 16
    resize_to_max_canvas = False

    def arrangement(self, size: Size) -> Arrangement:
        """Which tiles a picture of ``size`` is put on, and its size on them."""
        scales = self._scales(size, np.float32)
        enlarging = scales[scales >= 1]
        chosen = scales.max()
        if len(enlarging) and not self.resize_to_max_canvas:
            chosen = enlarging.min()
        # The first has the fewest tiles, so the least padding.
        columns, rows = self._candidates()[int(np.flatnonzero(scales == chosen)[0])]
        edge = self.size["height"]
        target = columns * edge, rows * edge
        if not self.resize_to_max_canvas:
            target = min(max(size[0], edge), target[0]), min(max(size[1], edge), target[1])
        factors = target[0] / size[0], target[1] / size[1]
        if factors[0] < factors[1]:
            width, height = target[0], min(math.floor(size[1] * factors[0]), target[1])
        else:
            width, height = min(math.floor(size[0] * factors[1]), target[0]), target[1]
        return (columns, rows), (max(width, 1), max(height, 1))


_KINDS = (Cohere2VisionImageProcessorPil, Lfm2VlImageProcessorPil, Llama4ImageProcessorPil)
OWN = {kind.__name__: kind for kind in _KINDS}
