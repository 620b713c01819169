"""Pixtral's tower (in LLaVA and Mistral 3): any shape, one token for each patch or merged square, and row breaks.

The tokens of a row are adjacent, with ``[IMG_BREAK]`` after each row and ``[IMG_END]`` after the last. The pictures of
a batch are padded to the largest at the right and the bottom; ``image_sizes`` says where each ends.
"""

from typing import Any

import numpy as np

from mech.errors import InputError, UnsupportedModel
from mech.inputs.canvas import Canvas, Piece, Shown, Size
from mech.inputs.families import templates
from mech.inputs.families.dynamic import unresized
from mech.inputs.families.family import FAMILIES, Family, Geometry
from mech.inputs.families.fixed import sides


def measure_pixtral(name: str, config: Any, image_processor: Any) -> dict[str, Any]:
    """Sizes of Pixtral's tower, Mistral 3's merging included.

    The image processor rounds to whole tokens, but does not know about merging: it must be told at every call.
    """
    if getattr(config, "vision_feature_select_strategy", "full") != "full":
        raise UnsupportedModel(
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} with Pixtral's tower",
            "'full': the tower has no class token, and the first patch would be dropped",
            "set config.vision_feature_select_strategy = 'full'",
        )
    # Only Pixtral's can be told the patch size at every call, and has one of these two limits.
    limits = sides(image_processor.size)
    if "patch_size" not in image_processor.valid_kwargs.__annotations__ or (
        limits.keys() not in ({"longest_edge"}, {"height", "width"})
    ):
        raise UnsupportedModel(
            f"a {type(image_processor).__name__} with size={limits} for Pixtral's tower",
            "PixtralImageProcessor with a longest edge, or a height and a width",
            "load the image processor that belongs to this checkpoint",
        )
    vision = config.vision_config
    side, largest = (
        vision.patch_size * getattr(config, "spatial_merge_size", 1),
        max(limits.values()),
    )
    if getattr(image_processor, "do_center_crop", None):
        raise UnsupportedModel(
            "an image processor with do_center_crop=True", "one that keeps the whole picture", "set it to False"
        )
    if image_processor.do_resize and largest > vision.image_size:
        raise UnsupportedModel(
            f"an image processor with size={limits}",
            f"at most {vision.image_size} pixels a side, which the vision tower was made for",
            "load the image processor that belongs to this checkpoint",
        )
    return {"side": side, "options": {"patch_size": {"height": side, "width": side}}}


def show_pixtral(size: Size, image_processor: Any, geometry: Geometry, alone: bool) -> Shown:
    """A run of tokens for each row, followed by a mark."""
    canvas = _canvas(size, image_processor, geometry.side)
    tokens = canvas.tokens(geometry.side, size)
    if alone and len(tokens) == 1 and geometry.name == "mistral3":
        raise InputError(
            "a picture of {} x {} pixels, which is a single token".format(*size),
            f"more than {geometry.side} pixels on at least one side: Mistral 3's forward fails on one visual token",
            "enlarge it",
        )
    pieces: list[Piece] = []
    for row in range(canvas.grid(geometry.side)[0]):
        pieces += [tokens[tokens.row == row], "[IMG_BREAK]"]
    return Shown((*pieces[:-1], "[IMG_END]"), (canvas.width, canvas.height))


def pixtral_sizes(made: Any, image_processor: Any) -> list[tuple[int, Size]]:
    """The size of each picture, without the padding."""
    return [(1, (width, height)) for height, width in made["image_sizes"].tolist()]


def _canvas(size: Size, image_processor: Any, side: int) -> Canvas:
    width, height = size
    if not image_processor.do_resize:
        return unresized(size, side)
    from transformers.image_utils import ChannelDimension
    from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

    limits = sides(image_processor.size)
    edge = limits.get("longest_edge", 0)
    largest = limits.get("height", edge), limits.get("width", edge)
    # A picture of this size that takes no memory: only its shape is read.
    blank = np.broadcast_to(np.uint8(0), (3, height, width))
    new_height, new_width = get_resize_output_image_size(blank, largest, side, ChannelDimension.FIRST)
    if not new_height * new_width:
        raise InputError(
            f"a picture of {width} x {height} pixels, which shrinks to nothing",
            f"fewer than {max(largest)} pixels along the longer side for each pixel along the shorter",
            "crop it, or pad it to a larger picture",
        )
    return Canvas.stretched(size, new_width, new_height)


_PIXTRAL = Family(
    show_pixtral,
    measure_pixtral,
    templates.MISTRAL,
    tensors=("pixel_values", "image_sizes"),
    reads=("patch_size",),
    sizes=pixtral_sizes,
)
FAMILIES |= {"llava_pixtral": _PIXTRAL, "mistral3": _PIXTRAL}
