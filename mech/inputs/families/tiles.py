"""Pictures cut into tiles of the tower's size, together with a view of the whole.

InternVL, Cohere Vision, Idefics 3, SmolVLM and Llama 4 write the tiles one after the other and the whole picture last;
LLaVA-NeXT and -OneVision write the whole first, then the rows of all tiles as if of one large picture, each followed by
a line break. The tokens of tiles count rows and columns in the grid of the whole picture. Pixel shuffle and pooling
need no function: the merged square is that many patches wide.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from mech.errors import InputError, UnsupportedModel
from mech.inputs.canvas import Canvas, Piece, Shown, Size, Tokens
from mech.inputs.families import templates
from mech.inputs.families.family import FAMILIES, Family, Geometry
from mech.inputs.families.fixed import measure_tower, sides

if TYPE_CHECKING:
    from mech.inputs.processor import Processor


def _shuffled(config: Any, factor: float, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Sizes of a square tower whose patches are merged by pixel shuffle."""
    vision = config.vision_config
    edge, patch = (size if isinstance(size, int) else size[0] for size in (vision.image_size, vision.patch_size))
    if edge // patch % round(factor):
        raise UnsupportedModel(
            f"{edge // patch} patches a side merged {round(factor)} at a time",
            "tokens of whole patches",
            "load the config that belongs to this checkpoint",
        )
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    if strategy != "default":
        raise UnsupportedModel(
            f"vision_feature_select_strategy={strategy!r} in a {config.model_type} model",
            "'default': pixel shuffle takes a square of patches, without a class token",
            "set config.vision_feature_select_strategy = 'default'",
        )
    return {"side": patch * round(factor), "tile": (edge, edge), "options": options or {}}


def measure_internvl(name: str, config: Any, image_processor: Any) -> dict[str, Any]:
    """Sizes of InternVL's tower; its Hugging Face processor cuts tiles, whatever ``crop_to_patches`` says."""
    return _shuffled(config, 1 / config.downsample_ratio, {"crop_to_patches": True})


def measure_cohere2(name: str, config: Any, image_processor: Any) -> dict[str, Any]:
    """Sizes of Cohere Vision's tower."""
    return _shuffled(config, config.downsample_factor)


def measure_idefics3(name: str, config: Any, image_processor: Any) -> dict[str, Any]:
    """Sizes of the tower of Idefics 3 and SmolVLM."""
    return _shuffled(config, config.scale_factor)


def measure_llama4(name: str, config: Any, image_processor: Any) -> dict[str, Any]:
    """Sizes of Llama 4's tower."""
    return _shuffled(config, 1 / config.vision_config.pixel_shuffle_ratio)


def _cut(canvas: Canvas, size: Size, geometry: Geometry) -> list[Tokens]:
    """The tiles of a canvas in their order, views 1 and up."""
    across = _tile(geometry)[0] // geometry.side
    return canvas.tokens(geometry.side, size).tiled(across, across)


def _tile(geometry: Geometry) -> Size:
    """The size of a tile."""
    assert geometry.tile is not None, "towers that take tiles have one size"
    return geometry.tile


def _thumbnail(size: Size, tile: Size, geometry: Geometry) -> Tokens:
    return Canvas.stretched(size, *tile).tokens(geometry.side, size)


def show_internvl(size: Size, image_processor: Any, geometry: Geometry, alone: bool) -> Shown:
    """InternVL: all tiles and, where there are several, the whole picture, as one run.

    ``image_processor.max_patches = 1`` turns tiles off.
    """
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    edge = sides(image_processor.size)
    tile, limits = (edge["width"], edge["height"]), (image_processor.min_patches, image_processor.max_patches)
    columns, rows = (1, 1) if limits[1] <= 1 else get_optimal_tiled_canvas(size[::-1], tile[::-1], *limits)
    views = _tiles_and_whole(size, tile, columns, rows, geometry)
    return Shown(("<img>", Tokens.join(views), "</img>"), tile, len(views))


def _tiles_and_whole(size: Size, tile: Size, columns: int, rows: int, geometry: Geometry) -> list[Tokens]:
    """Tiles, then the whole; a picture of a single tile is the whole itself."""
    whole = _thumbnail(size, tile, geometry)
    if columns * rows == 1:
        return [whole]
    return [*_cut(Canvas.stretched(size, columns * tile[0], rows * tile[1], tile), size, geometry), whole]


def show_cohere2(size: Size, image_processor: Any, geometry: Geometry, alone: bool) -> Shown:
    """Cohere Vision: like InternVL, with a line break after every view."""
    edge = sides(image_processor.size)
    tile = edge["width"], edge["height"]
    (columns, rows), _ = image_processor.arrangement(size)
    views = _tiles_and_whole(size, tile, columns, rows, geometry)
    pieces: list[Piece] = ["<|START_OF_IMG|>"]
    for view in views:
        pieces += [view, "<|IMG_LINE_BREAK|>"]
    return Shown((*pieces, "<|END_OF_IMG|>"), tile, len(views))


def show_idefics3(size: Size, image_processor: Any, geometry: Geometry, alone: bool) -> Shown:
    """Idefics 3 and SmolVLM: every tile after its row and column, the whole picture last."""
    edge = sides(image_processor.max_image_size)["longest_edge"]
    whole = _thumbnail(size, (edge, edge), geometry)
    around, mark = "<fake_token_around_image>", "<fake_token_around_image><global-img>"
    width, height = _idefics3_size(size, image_processor, edge)
    if not image_processor.do_image_splitting or max(width, height) <= edge:
        return Shown((mark, whole, around), (edge, edge))
    columns = width // edge
    pieces: list[Piece] = []
    for number, tile in enumerate(_cut(Canvas.stretched(size, width, height, (edge, edge)), size, geometry)):
        row, col = divmod(number, columns)
        newline = "\n" if row and not col else ""
        pieces += [f"{newline}{around}<row_{row + 1}_col_{col + 1}>", tile]
    return Shown((*pieces, f"\n\n{mark}", whole, around), (edge, edge), 1 + columns * (height // edge))


def _idefics3_size(size: Size, image_processor: Any, edge: int) -> Size:
    """The size that is cut into tiles: the longest edge as set, then both sides rounded up to whole tiles."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import get_resize_output_image_size

    width, height = size
    if image_processor.do_resize:
        asked = sides(image_processor.size)
        if "longest_edge" in asked:
            # The function reads only the picture's shape.
            shape = np.broadcast_to(np.uint8(0), (1, height, width))
            height, width = get_resize_output_image_size(shape, asked["longest_edge"])
        else:
            width, height = asked["width"], asked["height"]
    ratio = width / height
    if width >= height:
        width = -(-width // edge) * edge
        return width, -(-int(width / ratio) // edge) * edge
    height = -(-height // edge) * edge
    return -(-int(height * ratio) // edge) * edge, height


def show_llama4(size: Size, image_processor: Any, geometry: Geometry, alone: bool) -> Shown:
    """Llama 4: tiles with separators, padded at the right and the bottom; the whole picture last."""
    edge = sides(image_processor.size)
    tile = edge["width"], edge["height"]
    (columns, rows), (width, height) = image_processor.arrangement(size)
    canvas = Canvas(columns * tile[0], rows * tile[1], width / size[0], height / size[1], tile=tile)
    start = "<|image_start|>"
    if columns * rows == 1:
        return Shown((f"{start}<|image|>", canvas.tokens(geometry.side, size), "<|image_end|>"), tile)
    pieces: list[Piece] = [start]
    for number, view in enumerate(_cut(canvas, size, geometry), start=1):
        pieces += [view, "<|tile_x_separator|>" if number % columns else "<|tile_y_separator|>"]
    whole = _thumbnail(size, tile, geometry)
    return Shown((*pieces, "<|image|>", whole, "<|image_end|>"), tile, columns * rows + 1)


def measure_anyres(name: str, config: Any, image_processor: Any) -> dict[str, Any]:
    """LLaVA-NeXT and -OneVision: as for the tower alone, with checks that several settings are one size."""
    sizes = measure_tower(name, config, image_processor)
    if sizes["class_tokens"]:
        raise UnsupportedModel(
            f"vision_feature_select_strategy='full' with {config.vision_config.model_type!r} in a {name} model",
            "'default': tiles are squares of patches, without a class token",
            "set config.vision_feature_select_strategy = 'default'",
        )
    theirs, ours = ([list(pair) for pair in each.image_grid_pinpoints] for each in (config, image_processor))
    if ours != theirs:
        raise UnsupportedModel(
            f"an image processor with image_grid_pinpoints={ours}",
            f"{theirs}, as the model's config says",
            "load the image processor that belongs to this checkpoint",
        )
    edges = set(sides(image_processor.size).values())
    if image_processor.do_center_crop:
        edges |= set(sides(image_processor.crop_size).values())
    if edges != {config.vision_config.image_size}:
        raise UnsupportedModel(
            f"an image processor that makes tiles of {sorted(edges)} pixels",
            f"{config.vision_config.image_size}, the tower's image_size",
            "set size and crop_size of the image processor to it",
        )
    return sizes


def show_llava_next(size: Size, image_processor: Any, geometry: Geometry, alone: bool) -> Shown:
    """LLaVA-NeXT: the whole picture, then the rows of the tiles without padding, each with a line break."""
    tile = _tile(geometry)
    canvas, cropped = _anyres(size, image_processor, geometry)
    grid = canvas.tokens(geometry.side, size)
    high, wide = cropped
    inside = (grid.row >= high.start) & (grid.row < high.stop) & (grid.col >= wide.start) & (grid.col < wide.stop)
    across = tile[0] // geometry.side
    view = (grid.row // across) * (canvas.width // tile[0]) + grid.col // across + 1
    tokens = grid.at(row=-high.start, col=-wide.start)
    tokens = Tokens(tokens.row, tokens.col, tokens.rect, view, tokens.frame)[inside]
    run = Tokens.join([_thumbnail(size, tile, geometry), _with_breaks(tokens)])
    return Shown((run,), tile, 1 + canvas.width * canvas.height // (tile[0] * tile[1]))


def show_onevision(size: Size, image_processor: Any, geometry: Geometry, alone: bool) -> Shown:
    """LLaVA-OneVision: like LLaVA-NeXT, interpolated to fewer tokens if there would be too many.

    One of several pictures is padded to a square and has one view, with one line break at its end. An interpolated
    token also mixes in its neighbours; here it stands for its share of the picture.
    """
    tile = _tile(geometry)
    if not alone:
        longest = max(size)
        scale = tile[0] / longest
        left, top = ((longest - length) // 2 * scale for length in size)
        tokens = Canvas(*tile, scale, scale, left, top).tokens(geometry.side, size)
        return Shown((Tokens.join([tokens, Tokens.nowhere(1)]),), tile)
    shown = show_llava_next(size, image_processor, geometry, alone)
    canvas, (high, wide) = _anyres(size, image_processor, geometry)
    rows, columns, across = high.stop - high.start, wide.stop - wide.start, tile[0] // geometry.side
    most = int(geometry.config.vision_aspect_ratio.rsplit("_")[-1])
    ratio = (rows * columns / (most * across**2)) ** 0.5
    if ratio <= 1.1:
        return shown
    fewer = canvas.resampled(geometry.side, size, int(rows // ratio), int(columns // ratio), (high, wide)).at(view=1)
    return Shown((Tokens.join([_thumbnail(size, tile, geometry), _with_breaks(fewer)]),), tile, shown.tiles)


def _anyres(size: Size, image_processor: Any, geometry: Geometry) -> tuple[Canvas, tuple[slice, slice]]:
    """The canvas of all tiles, and which of its rows and columns of tokens are left when the padding is removed.

    The model removes whole tokens by the picture's shape, with other rounding than the image processor's: a token that
    shows padding may stay, and one that shows a sliver of the picture may go.
    """
    from transformers.image_processing_utils import select_best_resolution

    width, height = size
    high, wide = select_best_resolution((height, width), image_processor.image_grid_pinpoints)
    if wide / width < high / height:
        new_width, new_height = wide, min(int(np.ceil(height * (wide / width))), high)
    else:
        new_width, new_height = min(int(np.ceil(width * (high / height))), wide), high
    left, top = float((wide - new_width) // 2), float((high - new_height) // 2)
    canvas = Canvas(wide, high, new_width / width, new_height / height, left, top, _tile(geometry))
    rows, columns = canvas.grid(geometry.side)
    cut_rows = cut_columns = 0
    if width / height > columns / rows:
        cut_rows = (rows - int(round(height * (columns / width), 7))) // 2
    else:
        cut_columns = (columns - int(round(width * (rows / height), 7))) // 2
    if 2 * cut_rows >= rows or 2 * cut_columns >= columns:
        raise InputError(
            f"a picture of {width} x {height} pixels, of which no whole token is left without the padding",
            "a picture that is less elongated",
            "crop it, or pad it to a larger picture",
        )
    return canvas, (slice(cut_rows, rows - cut_rows), slice(cut_columns, columns - cut_columns))


def _with_breaks(tokens: Tokens) -> Tokens:
    """Add a token that stands for no pixels after every row."""
    rows = [tokens[tokens.row == row] for row in range(tokens.row.max() + 1)]
    return Tokens.join([part for row in rows for part in (row, Tokens.nowhere(1, view=int(row.view[-1])))])


def video_framed(
    processor: "Processor", frames: list[Image.Image], fps: float
) -> tuple[dict[str, Tensor], list[Piece]]:
    """InternVL: every frame is a picture of a single tile, after its number."""
    geometry, tile = processor.geometry, _tile(processor.geometry)
    pixels = processor.image_processor(images=frames, return_tensors="pt", crop_to_patches=False)["pixel_values"]
    geometry.agree((len(frames), 3, *tile[::-1]), tuple(pixels.shape))
    tokens = _thumbnail(frames[0].size, tile, geometry)
    pieces: list[Piece] = []
    for number in range(len(frames)):
        gap = "</img>\n" if number else ""
        pieces += [f"{gap}Frame{number + 1}: <img>", tokens.at(frame=number)]
    return {"pixel_values": pixels}, [*pieces, "</img>"]


def video_pooled(
    processor: "Processor", frames: list[Image.Image], fps: float
) -> tuple[dict[str, Tensor], list[Piece]]:
    """LLaVA-OneVision: frames without tiles, their tokens halved in both directions, one line break at the very end."""
    geometry, image_processor, tile = processor.geometry, processor.image_processor, _tile(processor.geometry)
    squares = [frame.resize(tile, Image.Resampling(image_processor.resample)) for frame in frames]
    # Given as several pictures of the tower's size, they get neither tiles nor padding; a single frame is sent twice.
    pixels = image_processor(images=[squares * (1 + (len(frames) == 1))], return_tensors="pt")["pixel_values"]
    pixels = pixels[: len(frames), 0]
    geometry.agree((len(frames), 3, *tile[::-1]), tuple(pixels.shape))
    across = tile[0] // geometry.side
    whole, half = slice(0, across), -(-across // 2)
    size = frames[0].size
    tokens = Canvas.stretched(size, *tile).resampled(geometry.side, size, half, half, (whole, whole))
    run = [tokens.at(frame=number) for number in range(len(frames))]
    return {"pixel_values_videos": pixels[None]}, [Tokens.join([*run, Tokens.nowhere(1)])]


_SPLIT = Family(
    show_idefics3,
    measure_idefics3,
    templates.IDEFICS,
    tensors=("pixel_values", "pixel_attention_mask"),
    reads=("max_image_size",),
    nested=True,
)
FAMILIES |= {
    "llava_next": Family(
        show_llava_next,
        measure_anyres,
        templates.INST,
        tensors=("pixel_values", "image_sizes"),
        reads=("image_grid_pinpoints",),
    ),
    "llava_onevision": Family(
        show_onevision,
        measure_anyres,
        templates.ONEVISION,
        tensors=("pixel_values", "image_sizes", "batch_num_images"),
        reads=("image_grid_pinpoints", "pad_to_square"),
        nested=True,
        video=video_pooled,
    ),
    "internvl": Family(
        show_internvl,
        measure_internvl,
        templates.INTERNVL,
        reads=("crop_to_patches", "min_patches"),
        video=video_framed,
        video_placeholder="<video>",
        video_as_images=True,
    ),
    "cohere2_vision": Family(show_cohere2, measure_cohere2, templates.COHERE, reads=("arrangement", "crop_to_patches")),
    "llama4": Family(
        show_llama4,
        measure_llama4,
        templates.LLAMA4,
        reads=("arrangement", "resize_to_max_canvas"),
        placeholder="<|image|>",
    ),
    "idefics3": _SPLIT,
    "smolvlm": _SPLIT,
}
