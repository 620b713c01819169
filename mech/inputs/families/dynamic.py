"""Pictures and videos whose canvas follows their own size: the Qwen-VL family.

Two-by-two merging needs no function: the merged square is ``patch_size * merge_size`` wide.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from mech.errors import InputError, UnsupportedModel
from mech.inputs.canvas import Canvas, Piece, Shown, Size, Tokens
from mech.inputs.families import templates
from mech.inputs.families.family import FAMILIES, Family, Geometry, kinds
from mech.inputs.families.fixed import sides

if TYPE_CHECKING:
    from mech.inputs.processor import Processor


def measure_patches(name: str, config: Any, image_processor: Any) -> dict[str, Any]:
    """Sizes of a tower that takes lists of patches with a grid; the image processor must cut the same patches."""
    vision = config.vision_config
    theirs = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    ours = (image_processor.patch_size, image_processor.merge_size, image_processor.temporal_patch_size)
    if ours != theirs:
        raise UnsupportedModel(
            f"the image processor cuts patches of (patch, merge, temporal) {ours}",
            f"{theirs}, as the model's config says",
            "load the image processor that belongs to this checkpoint",
        )
    return {"side": ours[0] * ours[1], "frames_per_token": ours[2]}


def grid_sizes(made: Any, image_processor: Any) -> list[tuple[int, Size]]:
    """The size of each picture, from its grid of patches (before merging)."""
    patch = image_processor.patch_size
    return [(times, (wide * patch, high * patch)) for times, high, wide in made["image_grid_thw"].tolist()]


def unresized(size: Size, side: int) -> Canvas:
    """A picture that is not resized (``do_resize=False``), and must then be whole tokens."""
    if size[0] % side or size[1] % side:
        raise InputError(
            "a picture of {} x {} pixels with do_resize=False".format(*size),
            f"whole tokens of {side} x {side} pixels",
            "resize the picture, or set image_processor.do_resize = True",
        )
    return Canvas(*size)


def refuse_long(size: Size) -> None:
    """Refuse pictures that ``smart_resize`` would refuse in its own words."""
    if max(size) > 200 * min(size):
        raise InputError(
            "a picture of {} x {} pixels".format(*size),
            "sides that differ by a factor of 200 at most",
            "crop it, or pad it to a larger picture",
        )


def dynamic_canvas(width: int, height: int, image_processor: Any) -> Canvas:
    """Qwen-VL's resizing: keep the shape, round both sides to whole merged tokens, stay between two pixel counts."""
    side = image_processor.patch_size * image_processor.merge_size
    refuse_long((width, height))
    if not image_processor.do_resize:
        return unresized((width, height), side)
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    size = sides(image_processor.size)
    new_height, new_width = smart_resize(height, width, side, size["shortest_edge"], size["longest_edge"])
    return Canvas.stretched((width, height), new_width, new_height)


def show_dynamic(size: Size, image_processor: Any, geometry: Geometry, alone: bool) -> Shown:
    """One run of merged tokens."""
    canvas = dynamic_canvas(*size, image_processor)
    return Shown((canvas.tokens(geometry.side, size),), (canvas.width, canvas.height))


def video_block(processor: "Processor", frames: list[Image.Image], fps: float) -> tuple[dict[str, Tensor], list[Piece]]:
    """One run of tokens."""
    canvas = _per_frame(processor, frames, sides(processor.video_size)) if processor.video_size else None
    tensors, steps = patched_frames(processor, frames, canvas)
    return tensors, [Tokens.join(steps)]


def video_timed(processor: "Processor", frames: list[Image.Image], fps: float) -> tuple[dict[str, Tensor], list[Piece]]:
    """One run of tokens, and the seconds between temporal patches for Qwen2.5-VL's rotary positions."""
    tensors, pieces = video_block(processor, frames, fps)
    return {**tensors, "second_per_grid_ts": torch.tensor([processor.geometry.frames_per_token / fps])}, pieces


def video_stamped(
    processor: "Processor", frames: list[Image.Image], fps: float
) -> tuple[dict[str, Tensor], list[Piece]]:
    """A time stamp and a run of tokens for each temporal patch.

    The template's own marks around the placeholder stay. This is what transformers 5 does; transformers 4.57 and vLLM
    drop them.
    """
    canvas = _whole_video(processor, frames, sides(processor.video_size)) if processor.video_size else None
    tensors, steps = patched_frames(processor, frames, canvas)
    depth = processor.geometry.frames_per_token
    pieces: list[Piece] = []
    for first, step in zip(range(0, len(frames), depth), steps, strict=True):
        # The time of a temporal patch is the mean of its first and last frame; the last frame is repeated to fill it.
        second = (first / fps + min(first + depth - 1, len(frames) - 1) / fps) / 2
        before = "<|vision_end|>" if pieces else ""
        pieces += [f"{before}<{second:.1f} seconds><|vision_start|>", step]
    return tensors, [*pieces, "<|vision_end|>"]


def _per_frame(processor: "Processor", frames: list[Image.Image], size: dict[str, int]) -> Canvas:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    width, height = frames[0].size
    limits = size["shortest_edge"], size["longest_edge"]
    new_height, new_width = smart_resize(height, width, processor.geometry.side, *limits)
    return Canvas.stretched((width, height), new_width, new_height)


def _whole_video(processor: "Processor", frames: list[Image.Image], size: dict[str, int]) -> Canvas:
    """Qwen3-VL's limits apply to the whole video, not to a frame."""
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    (width, height), depth = frames[0].size, processor.geometry.frames_per_token
    limits = size["shortest_edge"], size["longest_edge"]
    new_height, new_width = smart_resize(
        max(len(frames), depth), height, width, depth, processor.geometry.side, *limits
    )
    return Canvas.stretched((width, height), new_width, new_height)


def patched_frames(
    processor: "Processor", frames: list[Image.Image], canvas: Canvas | None
) -> tuple[dict[str, Tensor], list[Tokens]]:
    """A video as patches with a grid, and the tokens of each temporal patch.

    The frames go through the image processor one by one, and the patches are joined in time afterwards: frames ``2t``
    and ``2t + 1`` make one temporal patch, and an odd last frame is repeated.

    Args:
        processor: of the model.
        frames: all of one size.
        canvas: of a frame, if videos have their own limits; None for an image's.
    """
    geometry, image_processor = processor.geometry, processor.image_processor
    size, options = frames[0].size, {}
    if canvas is not None and image_processor.do_resize:
        resample = Image.Resampling(image_processor.resample)
        frames = [frame.resize((canvas.width, canvas.height), resample) for frame in frames]
        options = {"do_resize": False}
    else:
        canvas = dynamic_canvas(*size, image_processor)
    made = image_processor(images=frames, return_tensors="pt", **options)
    high, wide = made["image_grid_thw"][0, 1:].tolist()
    geometry.agree(
        (canvas.width, canvas.height), (wide * image_processor.patch_size, high * image_processor.patch_size)
    )
    depth, patches = geometry.frames_per_token, high * wide
    # A single picture fills its temporal patch with copies of itself: the first slice is the frame.
    pixels = made["pixel_values"].unflatten(1, (-1, depth, image_processor.patch_size**2))[:, :, 0]
    pixels = pixels.unflatten(0, (len(frames), patches))
    pixels = torch.cat([pixels, pixels[-1:].expand(-len(frames) % depth, -1, -1, -1)])
    steps = len(pixels) // depth
    # (steps, depth, patches, channels, pixels) -> one row for each patch: channels, then depth, then pixels.
    pixels = pixels.unflatten(0, (steps, depth)).permute(0, 2, 3, 1, 4).reshape(steps * patches, -1)
    tensors = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[steps, high, wide]])}
    tokens = canvas.tokens(geometry.side, size)
    return tensors, [tokens.at(frame=step * depth) for step in range(steps)]


QWEN = Family(
    show_dynamic,
    measure_patches,
    templates.CHATML,
    tensors=("pixel_values", "image_grid_thw"),
    reads=("patch_size", "merge_size", "temporal_patch_size"),
    sizes=grid_sizes,
    types=("mm_token_type_ids", kinds),
)
_STAMPED = replace(QWEN, video=video_stamped)
FAMILIES |= {
    "qwen2_vl": replace(QWEN, video=video_block),
    "qwen2_5_vl": replace(QWEN, video=video_timed),
    "qwen3_vl": _STAMPED,
    "qwen3_vl_moe": _STAMPED,
    "qwen3_5": _STAMPED,
    "qwen3_5_moe": _STAMPED,
}
