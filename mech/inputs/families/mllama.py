"""Mllama (Llama 3.2 Vision): the picture is not in the sequence but in a memory that some layers attend to.

A picture is resized onto a canvas of one to four tiles and padded at the right and the bottom. In the sequence it is
one placeholder, an ordinary text token. The vision tower makes a class token and a grid of patch tokens for each tile;
the memory is all tiles of all pictures of a row, one after the other, empty ones included:

    inputs.layout.positions("question")              # rows of the sequence
    inputs.layout.memory.positions(mech.Box(...))    # the keys that cross-attention layers may attend to

``cross_attention_mask`` lets text attend to the pictures in front of it, up to the next one. Text that sees no picture
attends to the whole memory evenly: transformers computes it this way, so all rows of a batch need the same number of
pictures.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.mllama.image_processing_pil_mllama import (
    get_all_supported_aspect_ratios,
    get_image_size_fit_to_canvas,
    get_optimal_tiled_canvas,
)

from mech.errors import UnsupportedModel
from mech.inputs.canvas import Canvas, Shown, Size, Tokens
from mech.inputs.families import templates
from mech.inputs.families.family import FAMILIES, Family, Geometry
from mech.inputs.layout import IMAGE, PADDING, TokenLayout


def measure_mllama(name: str, config: Any, image_processor: Any) -> dict[str, Any]:
    """Sizes of a tower that takes tiles; the image processor must cut the same ones."""
    vision = config.vision_config
    ours = (image_processor.size["height"], image_processor.max_image_tiles)
    theirs = (vision.image_size, vision.max_num_tiles)
    if ours != theirs:
        raise UnsupportedModel(
            "the image processor cuts at most {1} tiles of {0} pixels".format(*ours),
            "at most {1} of {0}, as the model's config says".format(*theirs),
            "load the image processor that belongs to this checkpoint",
        )
    return {"side": vision.patch_size}


def show_memory(size: Size, image_processor: Any, geometry: Geometry, alone: bool) -> Shown:
    """The placeholder, and what the memory holds of the picture."""
    tile, most = image_processor.size["height"], image_processor.max_image_tiles
    width, height = size
    high, wide = (int(side) for side in get_optimal_tiled_canvas(height, width, most, tile))
    new_height, new_width = get_image_size_fit_to_canvas(height, width, high, wide, tile)
    canvas = Canvas(wide, high, new_width / width, new_height / height)
    tokens, across = canvas.tokens(geometry.side, size), tile // geometry.side
    tiles = [tokens] if (wide, high) == (tile, tile) else tokens.tiled(across, across)
    memory = Tokens.join(
        [part for shown_tile in tiles for part in (Tokens.nowhere(1, int(shown_tile.view[0])), shown_tile)]
    )
    return Shown((Tokens.nowhere(1, view=-1),), (wide, high), len(tiles), memory)


def canvas_sizes(made: Any, image_processor: Any) -> list[tuple[int, Size]]:
    """The number of tiles and the canvas of each picture that the image processor made."""
    tile, ratios = image_processor.size["height"], get_all_supported_aspect_ratios(image_processor.max_image_tiles)
    chosen = [ratios[index - 1] for index in made["aspect_ratio_ids"][0].tolist()]
    return [
        (count, (columns * tile, rows * tile))
        for count, (rows, columns) in zip(made["num_tiles"][0], chosen, strict=True)
    ]


def with_memory(
    tensors: dict[str, Tensor], layout: TokenLayout, shown: list[Shown], geometry: Geometry
) -> tuple[dict[str, Tensor], TokenLayout]:
    """The mask of what each position may attend to, and the layout of the memory."""
    vision = geometry.config.vision_config
    ids = tensors["input_ids"][0].numpy()
    length, tiles = len(ids), vision.max_num_tiles
    starts = np.flatnonzero(ids == geometry.config.image_token_id).tolist()
    mask = torch.zeros(1, length, len(shown), tiles, dtype=torch.long)
    for image, tokens in enumerate(shown):
        # Up to the next picture; adjacent pictures are attended to together.
        later = [start for start, before in zip(starts[1:], starts, strict=False) if start > before + 1]
        end = next((start for start in later if start > starts[image]), length)
        mask[0, starts[image] : end, image, : tokens.tiles] = 1
    per_tile = (vision.image_size // vision.patch_size) ** 2 + 1
    memory = memory_layout(
        [tokens.memory for tokens in shown if tokens.memory is not None], tiles * per_tile, layout.images
    )
    return {**tensors, "cross_attention_mask": mask}, layout.beside(memory)


def memory_layout(parts: list[Tokens], each: int, images: tuple[Size, ...]) -> TokenLayout:
    """What every key of the memory is; each picture takes ``each`` places, of which the last ones are empty."""
    empty = [each - len(part) for part in parts]
    tokens = Tokens.join(
        [section for part, n in zip(parts, empty, strict=True) for section in (part, Tokens.nowhere(n, -1))]
    )
    filled = np.concatenate([np.arange(each) < len(part) for part in parts])
    return TokenLayout(
        kind=np.where(filled, IMAGE, PADDING),
        image=np.where(filled, np.repeat(np.arange(len(parts)), each), -1),
        frame=tokens.frame,
        row=tokens.row,
        col=tokens.col,
        view=tokens.view,
        rect=tokens.rect,
        tokens=("",) * len(tokens),
        spans={},
        images=images,
    )


FAMILIES["mllama"] = Family(
    show_memory,
    measure_mllama,
    templates.MLLAMA,
    tensors=("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"),
    reads=("max_image_tiles",),
    sizes=canvas_sizes,
    nested=True,
    memory=with_memory,
)
