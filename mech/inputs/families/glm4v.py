"""GLM-4.1V: Qwen-VL's patches and merging with its own limits, and videos as images, each followed by its second.

The image processor counts a picture as one temporal patch of frames, so its limits are on pixels times frames. The
tokens of a video are an image's tokens; ``mm_token_type_ids`` tells them apart.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from mech.inputs.canvas import Canvas, Piece, Shown, Size
from mech.inputs.families import templates
from mech.inputs.families.dynamic import QWEN, patched_frames, refuse_long, unresized
from mech.inputs.families.family import FAMILIES, Geometry
from mech.inputs.families.fixed import sides

if TYPE_CHECKING:
    from mech.inputs.processor import Processor


def show_glm(size: Size, image_processor: Any, geometry: Geometry, alone: bool) -> Shown:
    """One run of merged tokens."""
    canvas = _canvas(size, image_processor, sides(image_processor.size), geometry.frames_per_token)
    return Shown((canvas.tokens(geometry.side, size),), (canvas.width, canvas.height))


def video_glm(processor: "Processor", frames: list[Image.Image], fps: float) -> tuple[dict[str, Tensor], list[Piece]]:
    """For each temporal patch a run of tokens between two marks, and the whole second of its first frame."""
    depth, own = processor.geometry.frames_per_token, processor.video_size
    limits = sides(own or processor.image_processor.size)
    # A video's limits apply to all its frames together.
    canvas = _canvas(frames[0].size, processor.image_processor, limits, max(depth, len(frames)) if own else depth)
    tensors, steps = patched_frames(processor, frames, canvas)
    pieces: list[Piece] = []
    for first, step in zip(range(0, len(frames), depth), steps, strict=True):
        pieces += ["<|begin_of_image|>", step, f"<|end_of_image|>{int(first / fps)}"]
    return tensors, pieces


def _canvas(size: Size, image_processor: Any, limits: dict[str, int], frames: int) -> Canvas:
    (width, height), side = size, image_processor.patch_size * image_processor.merge_size
    refuse_long(size)
    if not image_processor.do_resize:
        return unresized(size, side)
    from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize

    new_height, new_width = smart_resize(
        frames,
        height,
        width,
        image_processor.temporal_patch_size,
        side,
        limits["shortest_edge"],
        limits["longest_edge"],
    )
    return Canvas.stretched(size, new_width, new_height)


_GLM = replace(
    QWEN,
    show=show_glm,
    template=templates.GLM,
    video=video_glm,
    video_placeholder="<|video|>",
    video_as_images=True,
)
FAMILIES |= {
    "glm4v": _GLM,
    "glm46v": replace(_GLM, video=None),  # its timestamps are written in another way
    "glm4v_moe": _GLM,
}
