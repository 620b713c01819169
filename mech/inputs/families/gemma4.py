"""Gemma 4: any shape within a budget of tokens, each the mean of a square of patches; the time before every frame.

A picture is enlarged or shrunk to the most whole tokens that its shape and ``max_soft_tokens`` allow. A frame of a
video has a smaller budget, and its own tokens: nothing is merged in time.
"""

from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from mech.errors import InputError, UnsupportedModel
from mech.inputs.canvas import Canvas, Piece, Shown, Size
from mech.inputs.families import templates
from mech.inputs.families.dynamic import unresized
from mech.inputs.families.family import FAMILIES, Family, Geometry, kinds

if TYPE_CHECKING:
    from mech.inputs.processor import Processor

_BEFORE, _AFTER = "<|image>", "<image|>"
_FRAME_TOKENS = 70  # the video processor's default


def measure_soft(name: str, config: Any, image_processor: Any) -> dict[str, Any]:
    """Sizes of a tower that takes lists of patches with positions; the image processor must cut the same ones."""
    vision = config.vision_config
    theirs = (vision.patch_size, vision.pooling_kernel_size)
    ours = (image_processor.patch_size, image_processor.pooling_kernel_size)
    if ours != theirs:
        raise UnsupportedModel(
            f"the image processor cuts patches of (patch, pooling) {ours}",
            f"{theirs}, as the model's config says",
            "load the image processor that belongs to this checkpoint",
        )
    return {"side": ours[0] * ours[1]}


def show_soft(size: Size, image_processor: Any, geometry: Geometry, alone: bool) -> Shown:
    """One run of tokens between its two marks."""
    canvas = _canvas(size, image_processor, geometry, image_processor.max_soft_tokens)
    return Shown((_BEFORE, canvas.tokens(geometry.side, size), _AFTER), (canvas.width, canvas.height))


def soft_sizes(made: Any, image_processor: Any) -> list[tuple[int, Size]]:
    """The size of each picture, from the positions (x, y) of its patches; -1 is padding."""
    most = (made["image_position_ids"].amax(dim=1) + 1) * image_processor.patch_size
    return [(1, (width, height)) for width, height in most.tolist()]


def video_soft(processor: "Processor", frames: list[Image.Image], fps: float) -> tuple[dict[str, Tensor], list[Piece]]:
    """The minute and second of each frame, and its tokens between two marks."""
    geometry, image_processor = processor.geometry, processor.image_processor
    most = (processor.video_size or {}).get("max_soft_tokens", _FRAME_TOKENS)
    size = frames[0].size
    canvas = _canvas(size, image_processor, geometry, most)
    made = image_processor(images=frames, return_tensors="pt", max_soft_tokens=most)
    geometry.agree([(1, (canvas.width, canvas.height))] * len(frames), soft_sizes(made, image_processor))
    tensors = {
        "pixel_values_videos": made["pixel_values"],
        "video_position_ids": made["image_position_ids"],
        "num_frames_per_video": torch.tensor([len(frames)]),
    }
    tokens, pieces = canvas.tokens(geometry.side, size), []
    for frame in range(len(frames)):
        second = frame / fps
        gap = f"{_AFTER} " if frame else ""
        pieces += [f"{gap}{int(second // 60):02d}:{int(second % 60):02d} {_BEFORE}", tokens.at(frame=frame)]
    return tensors, [*pieces, _AFTER]


def _canvas(size: Size, image_processor: Any, geometry: Geometry, most: int) -> Canvas:
    """The canvas of a picture that may have ``most`` tokens."""
    width, height, side = *size, geometry.side
    if not image_processor.do_resize:
        if width * height > most * side**2:
            raise InputError(
                f"a picture of {width} x {height} pixels with do_resize=False",
                f"at most {most} tokens of {side} x {side} pixels",
                "resize the picture, or set image_processor.do_resize = True",
            )
        return unresized(size, side)
    from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

    pooling = image_processor.pooling_kernel_size
    new_height, new_width = get_aspect_ratio_preserving_size(
        height, width, image_processor.patch_size, most * pooling**2, pooling
    )
    return Canvas.stretched(size, new_width, new_height)


FAMILIES["gemma4"] = Family(
    show_soft,
    measure_soft,
    templates.GEMMA4,
    tensors=("pixel_values", "image_position_ids"),
    reads=("patch_size", "pooling_kernel_size", "max_soft_tokens"),
    sizes=soft_sizes,
    types=("mm_token_type_ids", kinds),
    video=video_soft,
    late="<|video|>",
)
