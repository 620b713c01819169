"""LFM2-VL: one picture, or tiles and a thumbnail, each as a list of patches of its own length.

transformers has this image processor only for torchvision; here it runs on PIL. It reads the same settings and plans
the same tiles and sizes; resized pixels may differ from torchvision's in the last bit.

    images = Lfm2VlImageProcessorPil(tile_size=512)
    images.plan((1200, 900))                        # Plan(rows=3, columns=4, width=576, height=448)

Tiles are cut from the picture resized to ``columns x rows`` tiles. The thumbnail, or the picture if it is small enough
to stay whole, keeps its shape and stays between two numbers of tokens.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs

from mech.errors import InputError, UnsupportedModel
from mech.inputs.canvas import Canvas, Piece, Shown, Size
from mech.inputs.families import templates
from mech.inputs.families.family import FAMILIES, Family, Geometry


@dataclass(frozen=True)
class Plan:
    """How a picture is shown: ``rows x columns`` tiles (1 x 1: none), and the size of the whole."""

    rows: int
    columns: int
    width: int
    height: int

    @property
    def tiled(self) -> bool:
        return self.rows * self.columns > 1

    def views(self, thumbnail: bool) -> int:
        """How many pictures the tower sees: the whole, or the tiles and perhaps the whole."""
        return self.rows * self.columns + (self.tiled and thumbnail)


class _Settings(ImagesKwargs, total=False):
    downsample_factor: int
    do_image_splitting: bool
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool
    min_image_tokens: int
    max_image_tokens: int
    encoder_patch_size: int
    tile_size: int
    max_pixels_tolerance: float


class Lfm2VlImageProcessorPil(PilBackend):
    """``Lfm2VlImageProcessor`` on PIL: the same settings under the same names, with the same defaults."""

    valid_kwargs = _Settings
    model_input_names = ["pixel_values", "pixel_attention_mask", "spatial_shapes"]  # noqa: RUF012
    resample = PILImageResampling.BILINEAR
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    size = {"height": 512, "width": 512}  # noqa: RUF012
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    downsample_factor = 2
    do_image_splitting = True
    min_tiles = 2
    max_tiles = 10
    use_thumbnail = True
    min_image_tokens = 64
    max_image_tokens = 256
    encoder_patch_size = 16
    tile_size = 512
    max_pixels_tolerance = 2.0

    @property
    def side(self) -> int:
        """Pixels along one side of a visual token."""
        return self.encoder_patch_size * self.downsample_factor

    def plan(self, size: Size) -> Plan:
        """How a picture of this size is shown."""
        wide, high = (max(self.encoder_patch_size, round(edge / self.side) * self.side) for edge in size)
        large = high * wide > self.max_image_tokens * self.side**2 * self.max_pixels_tolerance
        if large and self.do_image_splitting and (self.min_tiles, self.max_tiles) != (1, 1):
            return Plan(*self._tiles(*size), *self._whole(*size))
        return Plan(1, 1, *self._whole(*size))

    def _whole(self, width: int, height: int) -> Size:
        """Both sides whole tokens, the area between the two numbers of tokens, the shape kept as well as possible."""
        side, least, most = self.side, self.min_image_tokens * self.side**2, self.max_image_tokens * self.side**2
        new_width, new_height = (max(side, round(edge / side) * side) for edge in (width, height))
        if new_width * new_height > most:
            shrink = math.sqrt(width * height / most)
            new_width, new_height = (max(side, math.floor(edge / shrink / side) * side) for edge in (width, height))
        elif new_width * new_height < least:
            grow = math.sqrt(least / (width * height))
            new_width, new_height = (math.ceil(edge * grow / side) * side for edge in (width, height))
        if new_width * new_height > most:  # one side is a single token: the other cannot shrink enough
            raise InputError(
                f"a picture of {width} x {height} pixels, which would become {new_width} x {new_height}",
                f"at most {self.max_image_tokens} tokens of {side} x {side} pixels",
                "crop it, or pad it to a larger picture",
            )
        return new_width, new_height

    def _tiles(self, width: int, height: int) -> Size:
        """Rows and columns with the nearest shape; among ties, the last that the picture more than half fills."""
        low, high = self.min_tiles, self.max_tiles
        pairs = {(w, h) for n in range(low, high + 1) for w in range(1, n + 1) for h in range(1, n + 1)}
        best, nearest = (1, 1), math.inf
        for columns, rows in sorted((p for p in pairs if low <= p[0] * p[1] <= high), key=math.prod):
            away = abs(width / height - columns / rows)
            if away < nearest:
                best, nearest = (columns, rows), away
            elif away == nearest and width * height > 0.5 * self.tile_size**2 * columns * rows:
                best = columns, rows
        return best[1], best[0]

    def _preprocess(self, images: list[np.ndarray], resample: Any, **options: Any) -> BatchFeature:
        """Lists of patches, padded to one length: tiles row by row and then the thumbnail, for each picture in turn."""
        side = self.encoder_patch_size
        tile = (self.tile_size // side) ** 2 if self.do_image_splitting else 0
        length = max(self.max_image_tokens * self.downsample_factor**2, tile)
        pixels, masks, shapes, tiles = [], [], [], []
        for image in images:
            plan = self.plan((image.shape[2], image.shape[1]))
            tiles.append(plan.views(self.use_thumbnail))
            for view in self._views(image, plan, resample):
                scaled = self.rescale(view, options["rescale_factor"]) if options["do_rescale"] else view
                if options["do_normalize"]:
                    scaled = self.normalize(scaled, options["image_mean"], options["image_std"])
                rows, columns = scaled.shape[1] // side, scaled.shape[2] // side
                # channel height width -> patches, each with its own height, width, channel
                patches = (
                    scaled.reshape(-1, rows, side, columns, side).transpose(1, 3, 2, 4, 0).reshape(rows * columns, -1)
                )
                room = max(0, length - len(patches))
                pixels.append(np.pad(patches, ((0, room), (0, 0))))
                masks.append((np.arange(len(pixels[-1])) < len(patches)).astype(np.int32))
                shapes.append((rows, columns))
        data = {
            "pixel_values": np.stack(pixels).astype(np.float32),
            "pixel_attention_mask": np.stack(masks),
            "spatial_shapes": np.array(shapes),
            "tiles": np.array(tiles),
        }
        return BatchFeature(data=data, tensor_type=options["return_tensors"])

    def _views(self, image: np.ndarray, plan: Plan, resample: Any) -> list[np.ndarray]:
        whole = self.resize(image, SizeDict(height=plan.height, width=plan.width), resample)
        if not plan.tiled:
            return [whole]
        tile = self.tile_size
        large = self.resize(image, SizeDict(height=plan.rows * tile, width=plan.columns * tile), resample)
        grid = large.reshape(-1, plan.rows, tile, plan.columns, tile).transpose(1, 3, 0, 2, 4)
        views = list(grid.reshape(plan.rows * plan.columns, -1, tile, tile))
        return [*views, whole] if self.use_thumbnail else views


def measure_lfm2(name: str, config: Any, image_processor: Any) -> dict[str, Any]:
    """Sizes of a tower that takes lists of patches; the image processor must cut the same ones."""
    ours = (image_processor.encoder_patch_size, image_processor.downsample_factor)
    theirs = (config.vision_config.patch_size, config.downsample_factor)
    if ours != theirs:
        raise UnsupportedModel(
            f"the image processor cuts patches of (patch, downsampling) {ours}",
            f"{theirs}, as the model's config says",
            "load the image processor that belongs to this checkpoint",
        )
    if image_processor.do_image_splitting and image_processor.tile_size % image_processor.side:
        raise UnsupportedModel(
            f"tiles of {image_processor.tile_size} pixels and tokens of {image_processor.side}",
            "whole tokens in a tile",
            "set image_processor.tile_size to a multiple of encoder_patch_size * downsample_factor",
        )
    return {"side": image_processor.side}


def show_tiles(size: Size, image_processor: Lfm2VlImageProcessorPil, geometry: Geometry, alone: bool) -> Shown:
    """The whole, or tiles row by row, each after the mark of its place, and the thumbnail; between two marks."""
    plan, side, tile = image_processor.plan(size), geometry.side, image_processor.tile_size
    whole = Canvas.stretched(size, plan.width, plan.height).tokens(side, size)
    pieces: list[Piece] = []
    if plan.tiled:
        large = Canvas.stretched(size, plan.columns * tile, plan.rows * tile).tokens(side, size)
        for number, tokens in enumerate(large.tiled(tile // side, tile // side)):
            row, column = divmod(number, plan.columns)
            pieces += [f"<|img_row_{row + 1}_col_{column + 1}|>", tokens]
        pieces += ["<|img_thumbnail|>", whole] if image_processor.use_thumbnail else []
    else:
        pieces = [whole]
    last = (plan.width, plan.height) if image_processor.use_thumbnail or not plan.tiled else (tile, tile)
    return Shown(("<|image_start|>", *pieces, "<|image_end|>"), last, plan.views(image_processor.use_thumbnail))


def tile_sizes(made: Any, image_processor: Lfm2VlImageProcessorPil) -> list[tuple[int, Size]]:
    """For each picture, the number of its views and the size of the last: the whole if it is shown."""
    counts, patch = made["tiles"].tolist(), image_processor.encoder_patch_size
    lasts = (made["spatial_shapes"][np.cumsum(counts) - 1] * patch).tolist()
    return [(count, (width, height)) for count, (height, width) in zip(counts, lasts, strict=True)]


FAMILIES["lfm2_vl"] = Family(
    show_tiles,
    measure_lfm2,
    templates.LFM2,
    tensors=("pixel_values", "pixel_attention_mask", "spatial_shapes"),
    reads=("encoder_patch_size", "downsample_factor", "tile_size"),
    sizes=tile_sizes,
)
