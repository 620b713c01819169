"""Pictures on one canvas of a fixed size: LLaVA, PaliGemma, Gemma 3 and its crops ("pan and scan")."""

from typing import Any

import numpy as np
from jaxtyping import Int

from mech.errors import UnsupportedModel
from mech.inputs.canvas import Canvas, Piece, Shown, Size, Tokens
from mech.inputs.families import templates
from mech.inputs.families.family import FAMILIES, Family, Geometry
from mech.inputs.layout import IMAGE, TokenLayout

# How many tokens a vision tower puts before its patches.
_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


def measure_tower(name: str, config: Any, image_processor: Any) -> dict[str, Any]:
    """Sizes of a tower that takes squares of one size, with or without a class token."""
    vision = config.vision_config
    if vision.model_type not in _CLASS_TOKENS:
        raise UnsupportedModel(
            f"a {name} model with the vision tower {vision.model_type!r}",
            "one of " + ", ".join(_CLASS_TOKENS),
            "add the tower to _CLASS_TOKENS in mech/inputs/families/fixed.py if its tokens form one fixed grid",
        )
    strategy = getattr(config, "vision_feature_select_strategy", "full")
    class_tokens = _CLASS_TOKENS[vision.model_type] - (strategy == "default")
    if class_tokens < 0:
        raise UnsupportedModel(
            f"vision_feature_select_strategy='default' with {vision.model_type!r}, which would drop the first patch",
            "'full' for a tower without a class token",
            "set config.vision_feature_select_strategy = 'full'",
        )
    return {"side": vision.patch_size, "class_tokens": class_tokens, "tile": (vision.image_size,) * 2}


def show_fixed(size: Size, image_processor: Any, geometry: Geometry, alone: bool) -> Shown:
    """One run of tokens, after the class token if the model keeps it."""
    canvas = fixed_canvas(*size, image_processor)
    tokens = Tokens.join([Tokens.nowhere(geometry.class_tokens), canvas.tokens(geometry.side, size)])
    return Shown((tokens,), (canvas.width, canvas.height))


def sides(size: Any) -> dict[str, int]:
    """The fields of a transformers size (a dict or a ``SizeDict``) that are set."""
    return {name: value for name, value in dict(size or {}).items() if value}


def fixed_canvas(width: int, height: int, image_processor: Any) -> Canvas:
    """CLIP's resizing: resize (to a fixed size, or by the shortest edge), then crop or pad around the centre.

    ``do_pad`` of ``LlavaImageProcessor`` pads the picture to a square first.
    """
    left = top = 0.0
    new_width, new_height = width, height
    if getattr(image_processor, "do_pad", None):
        if not hasattr(image_processor, "pad_to_square"):
            raise UnsupportedModel(
                f"{type(image_processor).__name__} with do_pad=True",
                "a processor that pads to a square (LlavaImageProcessor), or none",
                "set image_processor.do_pad = False",
            )
        new_width = new_height = max(width, height)
        left, top = float((new_width - width) // 2), float((new_height - height) // 2)
    scale_x = scale_y = 1.0
    if image_processor.do_resize:
        before = new_width, new_height
        new_width, new_height = _resized(*before, sides(image_processor.size))
        scale_x, scale_y = new_width / before[0], new_height / before[1]
        left, top = left * scale_x, top * scale_y
    if getattr(image_processor, "do_center_crop", None):
        crop = sides(image_processor.crop_size)
        # Floor division even if the crop is larger than the picture: this is how the PIL backend pads.
        left += -((new_width - crop["width"]) // 2)
        top += -((new_height - crop["height"]) // 2)
        new_width, new_height = crop["width"], crop["height"]
    return Canvas(new_width, new_height, scale_x, scale_y, left, top)


def _resized(width: int, height: int, size: dict[str, int]) -> Size:
    if set(size) == {"height", "width"}:
        return size["width"], size["height"]
    if set(size) == {"shortest_edge"}:
        short = size["shortest_edge"]
        if width <= height:
            return short, int(short * height / width)
        return int(short * width / height), short
    raise UnsupportedModel(
        f"an image processor with size={size}",
        "{'height', 'width'} or {'shortest_edge'}",
        "set image_processor.size to one of the two",
    )


# Written around every picture and crop of Gemma 3.
_GEMMA_BEFORE, _GEMMA_AFTER = "\n\n<start_of_image>", "<end_of_image>\n\n"


def measure_pooled(name: str, config: Any, image_processor: Any) -> dict[str, Any]:
    """Gemma 3: squares of patches are averaged until ``mm_tokens_per_image`` are left."""
    edge, patch = config.vision_config.image_size, config.vision_config.patch_size
    patches, tokens = edge // patch, int(config.mm_tokens_per_image**0.5)
    if patches % tokens:
        raise UnsupportedModel(
            f"{patches} patches a side pooled to {tokens} tokens",
            "tokens of whole patches",
            "set config.mm_tokens_per_image to the square of a divisor",
        )
    side = patch * (patches // tokens)
    return {"side": side, "tile": (edge, edge), "options": pan_and_scan(image_processor)}


def show_pan_and_scan(size: Size, image_processor: Any, geometry: Geometry, alone: bool) -> Shown:
    """Gemma 3: the whole picture, and crops side by side if the picture is long and the processor is set to crop.

    The whole is view 0, the crops are views 1 and up; rows and columns of tokens continue from one crop to the next.
    """
    canvas = fixed_canvas(*size, image_processor)
    whole = canvas.tokens(geometry.side, size)
    columns, rows = _crops(size, image_processor)
    if not columns * rows:
        return Shown((_GEMMA_BEFORE, whole, _GEMMA_AFTER), (canvas.width, canvas.height))
    # Ceiling division, so that the last crop is smaller, and stretched more than the others.
    wide, high = -(-size[0] // columns), -(-size[1] // rows)
    deep, across = canvas.grid(geometry.side)
    crops = []
    for number in range(columns * rows):
        row, col = divmod(number, columns)
        corner = col * wide, row * high
        crop = min(wide, size[0] - corner[0]), min(high, size[1] - corner[1])
        x, y = canvas.width / crop[0], canvas.height / crop[1]
        moved = Canvas(canvas.width, canvas.height, x, y, -corner[0] * x, -corner[1] * y)
        crops.append(moved.tokens(geometry.side, size).at(view=number + 1, row=row * deep, col=col * across))
    pieces: list[Piece] = ["Here is the original image " + _GEMMA_BEFORE, whole]
    gap = _GEMMA_AFTER + " and here are some crops to help you see better " + _GEMMA_BEFORE
    for crop in crops:
        pieces += [gap, crop]
        gap = _GEMMA_AFTER + " " + _GEMMA_BEFORE
    return Shown((*pieces, _GEMMA_AFTER), (canvas.width, canvas.height), tiles=1 + len(crops))


def pan_and_scan(image_processor: Any) -> dict[str, Any]:
    """Gemma 3's crop settings; checkpoints leave them empty, and the Hugging Face processor fills these in."""
    filled = {
        "do_pan_and_scan": False,
        "pan_and_scan_min_crop_size": 256,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }
    return {name: value if (own := getattr(image_processor, name)) is None else own for name, value in filled.items()}


def _crops(size: Size, image_processor: Any) -> Size:
    """Columns and rows of crops; 0 and 0 for none."""
    wanted, smallest, most, ratio = pan_and_scan(image_processor).values()
    short, long = sorted(size)
    if not wanted or long / short < ratio:
        return 0, 0
    count = min(max(2, min(long // smallest, int(long / short + 0.5))), most)
    if min(-(-long // count), short) < smallest:
        return 0, 0
    return (count, 1) if size[0] >= size[1] else (1, count)


def _images(layout: TokenLayout) -> Int[np.ndarray, " pos"]:
    """1 at visual tokens, which see one another in Gemma 3."""
    return layout.kind == IMAGE


def _answered(layout: TokenLayout) -> Int[np.ndarray, " pos"]:
    """0 in PaliGemma's prompt, where every token sees every other, and 1 in the answer."""
    types = np.zeros(len(layout), dtype=int)
    types[list(layout.spans.get("answer", ()))] = 1
    return types


FAMILIES |= {
    "llava": Family(show_fixed, measure_tower, templates.VICUNA),
    "paligemma": Family(show_fixed, measure_tower, templates.PALIGEMMA, types=("token_type_ids", _answered)),
    "gemma3": Family(
        show_pan_and_scan,
        measure_pooled,
        templates.GEMMA,
        reads=("do_pan_and_scan",),
        types=("token_type_ids", _images),
        placeholder="<start_of_image>",
    ),
}
