"""Which pixels of the original image each visual token stands for, family by family.

A processor resizes, pads or crops a picture onto a *canvas* and the vision tower cuts the canvas into squares of
``side`` pixels, one visual token each, row by row. ``Canvas`` holds that map; ``FAMILIES`` is a table with one row for
each architecture: how its canvas comes about, how it writes a video, what it is asked without a chat template.

The rectangles are nominal. Resizing mixes neighbouring pixels by a kernel's width, and a vision tower with attention
spreads everything over the whole picture: the map says where a token *is*, not all it has seen.

To add a family, write a function ``(width, height, image_processor) -> Canvas`` (or take one of those here) and add a
row to ``FAMILIES``. Two-by-two merging needs no function: the merged square is ``patch_size * merge_size`` wide.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from mech.errors import InputError, UnsupportedModel, suggestion


@dataclass(frozen=True)
class Canvas:
    """Where the original picture lies on what the vision tower sees.

    Pixel ``x`` of the original is at ``x * scale_x + left`` of a canvas of ``width`` by ``height``; a negative ``left``
    means that columns were cropped away, a positive one that there is padding.
    """

    width: int
    height: int
    scale_x: float = 1.0
    scale_y: float = 1.0
    left: float = 0.0
    top: float = 0.0

    def grid(self, side: int) -> tuple[int, int]:
        """Rows and columns of tokens; what is left over at the right and the bottom is dropped by the tower."""
        return self.height // side, self.width // side

    def rectangles(self, side: int, size: tuple[int, int]) -> Float[np.ndarray, "token 4"]:
        """``(x0, y0, x1, y1)`` of every token in the original picture of ``size`` (width, height).

        Rectangles are cut at the border of the picture; a token that shows padding only has ``nan``. Neighbours share
        the very same edge, so that no token's rectangle overlaps another's by a rounding error.
        """
        rows, columns = self.grid(side)
        # Rounded, or padding would show slivers of 1e-15 pixels.
        x = np.clip(np.round((np.arange(columns + 1) * side - self.left) / self.scale_x, 9), 0, size[0])
        y = np.clip(np.round((np.arange(rows + 1) * side - self.top) / self.scale_y, 9), 0, size[1])
        x0, y0 = np.meshgrid(x[:-1], y[:-1])
        x1, y1 = np.meshgrid(x[1:], y[1:])
        rects = np.stack([x0, y0, x1, y1], axis=-1).reshape(-1, 4)
        rects[(rects[:, 0] >= rects[:, 2]) | (rects[:, 1] >= rects[:, 3])] = np.nan
        return rects


def _sides(size: Any) -> dict[str, int]:
    """The settings of a transformers size (a dict or a ``SizeDict``) that are set."""
    return {name: value for name, value in dict(size or {}).items() if value}


def fixed_canvas(width: int, height: int, image_processor: Any) -> Canvas:
    """CLIP's way: resize (to a fixed size, or by the shortest edge), then crop or pad about the centre.

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
        new_width, new_height = _resized(*before, _sides(image_processor.size))
        scale_x, scale_y = new_width / before[0], new_height / before[1]
        left, top = left * scale_x, top * scale_y
    if image_processor.do_center_crop:
        crop = _sides(image_processor.crop_size)
        # Floor division also where the crop is larger than the picture: this is how the PIL backend pads.
        left += -((new_width - crop["width"]) // 2)
        top += -((new_height - crop["height"]) // 2)
        new_width, new_height = crop["width"], crop["height"]
    return Canvas(new_width, new_height, scale_x, scale_y, left, top)


def _resized(width: int, height: int, size: dict[str, int]) -> tuple[int, int]:
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


def dynamic_canvas(width: int, height: int, image_processor: Any) -> Canvas:
    """Qwen-VL's way: keep the shape, round both sides to whole merged tokens, stay between two numbers of pixels."""
    side = image_processor.patch_size * image_processor.merge_size
    if max(width, height) > 200 * min(width, height):
        raise InputError(
            f"a picture of {width} x {height} pixels",
            "sides that differ by a factor of 200 at most",
            "crop it or put it on a larger ground",
        )
    new_width, new_height = width, height
    if image_processor.do_resize:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        size = _sides(image_processor.size)
        new_height, new_width = smart_resize(height, width, side, size["shortest_edge"], size["longest_edge"])
    elif width % side or height % side:
        raise InputError(
            f"a picture of {width} x {height} pixels with do_resize=False",
            f"whole tokens of {side} x {side} pixels",
            "resize the picture, or set image_processor.do_resize = True",
        )
    return Canvas(new_width, new_height, new_width / width, new_height / height)


_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_VICUNA = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """One architecture's way of writing pictures into a sequence.

    Attributes:
        canvas: ``(width, height, image_processor) -> Canvas``.
        merges: visual tokens are merged squares of patches, and pixel values come as a list of patches with a grid.
        video: how a video is written: ``""`` not at all, ``"block"`` as one run of tokens with the seconds between
            temporal patches beside it, ``"stamped"`` as a time stamp and a run for every temporal patch.
        template: the chat template (jinja) where a checkpoint has none.
    """

    canvas: Callable[[int, int, Any], Canvas]
    merges: bool
    video: str
    template: str


FAMILIES = {
    "llava": Family(fixed_canvas, merges=False, video="", template=_VICUNA),
    "qwen2_vl": Family(dynamic_canvas, merges=True, video="block", template=_CHATML),
    "qwen2_5_vl": Family(dynamic_canvas, merges=True, video="block", template=_CHATML),
    "qwen3_vl": Family(dynamic_canvas, merges=True, video="stamped", template=_CHATML),
}

# How many tokens a vision tower puts before its patches.
_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


@dataclass(frozen=True)
class Geometry:
    """A family's row, filled in from one checkpoint's config.

    Attributes:
        name: the family, ``config.model_type``.
        side: pixels of the canvas along one side of a visual token.
        frames_per_token: frames of a video in one visual token.
        class_tokens: visual tokens in front of the grid that stand for no place (LLaVA with the strategy "full").
        canvas_size: the one (width, height) the vision tower takes, or ``None`` if it takes any.
    """

    name: str
    side: int
    frames_per_token: int = 1
    class_tokens: int = 0
    canvas_size: tuple[int, int] | None = None

    @property
    def family(self) -> Family:
        return FAMILIES[self.name]

    def canvas(self, width: int, height: int, image_processor: Any) -> Canvas:
        """The canvas of one picture; refused when the vision tower could not take it."""
        canvas = self.family.canvas(width, height, image_processor)
        if self.canvas_size not in (None, (canvas.width, canvas.height)):
            raise InputError(
                f"a picture of {width} x {height} pixels becomes {canvas.width} x {canvas.height}",
                "{} x {}, which is all that the vision tower takes".format(*self.canvas_size),
                "set size and crop_size of the image processor to the tower's image_size",
            )
        return canvas

    def video_canvas(self, frames: int, width: int, height: int, size: dict[str, int]) -> Canvas:
        """The canvas of a video's frames where a video has limits of its own (``size``, in pixels)."""
        smallest, largest = size["shortest_edge"], size["longest_edge"]
        if self.family.video == "stamped":
            # Limits of the whole video, not of a frame.
            from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

            depth = self.frames_per_token
            new_height, new_width = smart_resize(max(frames, depth), height, width, depth, self.side, smallest, largest)
        else:
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

            new_height, new_width = smart_resize(height, width, self.side, smallest, largest)
        return Canvas(new_width, new_height, new_width / width, new_height / height)


def geometry_of(config: Any, image_processor: Any) -> Geometry:
    """The geometry of a checkpoint, from its config and its image processor."""
    name = getattr(config, "model_type", None)
    if name not in FAMILIES:
        raise UnsupportedModel(
            f"no geometry is known for model_type={name!r}",
            "one of " + ", ".join(FAMILIES),
            f"{suggestion(str(name), FAMILIES)}, or add a row to FAMILIES in mech/inputs/geometry.py",
        )
    vision = config.vision_config
    if FAMILIES[name].merges:
        theirs = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
        ours = (image_processor.patch_size, image_processor.merge_size, image_processor.temporal_patch_size)
        if ours != theirs:
            raise UnsupportedModel(
                f"the image processor cuts patches of (patch, merge, temporal) {ours}",
                f"{theirs}, as the model's config says",
                "load the image processor that belongs to this checkpoint",
            )
        return Geometry(name, side=ours[0] * ours[1], frames_per_token=ours[2])
    if vision.model_type not in _CLASS_TOKENS:
        raise UnsupportedModel(
            f"a {name} model with the vision tower {vision.model_type!r}",
            "one of " + ", ".join(_CLASS_TOKENS),
            "add the tower to _CLASS_TOKENS in mech/inputs/geometry.py if its tokens form one fixed grid",
        )
    class_tokens = _CLASS_TOKENS[vision.model_type] - (config.vision_feature_select_strategy == "default")
    if class_tokens < 0:
        raise UnsupportedModel(
            f"vision_feature_select_strategy='default' with {vision.model_type!r}, which would drop the first patch",
            "'full' for a tower without a class token",
            "set config.vision_feature_select_strategy = 'full'",
        )
    return Geometry(name, vision.patch_size, class_tokens=class_tokens, canvas_size=(vision.image_size,) * 2)
