"""Pictures and frames -> the vision tower's tensors, and for every placeholder the visual tokens it stands for.

Pixels come from the Hugging Face image processors. A video goes through them frame by frame, and the patches are put
together in time afterwards: frames ``2t`` and ``2t + 1`` make one temporal patch, and an odd last frame is repeated.
The grids that the processor made must be those of ``mech.inputs.geometry``; otherwise nothing is returned.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from mech.errors import InputError
from mech.inputs.geometry import Canvas
from mech.inputs.layout import IMAGE, VIDEO
from mech.inputs.processor import Processor


@dataclass(frozen=True, eq=False)
class Block:
    """The visual tokens of one placeholder, in their order."""

    kind: int
    image: int
    frame: Int[np.ndarray, " token"]
    row: Int[np.ndarray, " token"]
    col: Int[np.ndarray, " token"]
    rect: Float[np.ndarray, "token 4"]

    def __len__(self) -> int:
        return len(self.frame)


def _block(
    kind: int, image: int, frames: list[int], canvas: Canvas, side: int, size: tuple[int, int], class_tokens: int = 0
) -> Block:
    rows, columns = canvas.grid(side)
    row, col = np.divmod(np.arange(rows * columns), columns)
    nowhere = np.full(class_tokens, -1)
    return Block(
        kind,
        image,
        frame=np.concatenate([nowhere, np.repeat(frames, rows * columns)]),
        row=np.concatenate([nowhere, np.tile(row, len(frames))]),
        col=np.concatenate([nowhere, np.tile(col, len(frames))]),
        rect=np.concatenate([np.full((class_tokens, 4), np.nan), *[canvas.rectangles(side, size)] * len(frames)]),
    )


def image_blocks(processor: Processor, shown: list[Image.Image]) -> tuple[dict[str, Tensor], list[Block]]:
    """Tensors for some images, and a block for each."""
    if not shown:
        return {}, []
    geometry = processor.geometry
    canvases = [geometry.canvas(*one.size, processor.image_processor) for one in shown]
    made = processor.image_processor(images=shown, return_tensors="pt")
    if geometry.family.merges:
        tensors = {name: made[name] for name in ("pixel_values", "image_grid_thw")}
        patch = processor.image_processor.patch_size
        sizes = [(wide * patch, high * patch) for _, high, wide in made["image_grid_thw"].tolist()]
    else:
        tensors = {"pixel_values": made["pixel_values"]}
        sizes = [(one.shape[-1], one.shape[-2]) for one in made["pixel_values"]]
    _agree(canvases, sizes)
    return tensors, [
        _block(IMAGE, k, [-1], canvas, geometry.side, one.size, geometry.class_tokens)
        for k, (canvas, one) in enumerate(zip(canvases, shown, strict=True))
    ]


def video_blocks(processor: Processor, frames: list[Image.Image], fps: float) -> tuple[dict[str, Tensor], list[Block]]:
    """Tensors for the frames of one video, and a block for the whole or for each temporal patch, as the family has it.

    The seconds between temporal patches go beside a video of one block: the rotary positions of Qwen2.5-VL need them.
    """
    sizes = sorted({frame.size for frame in frames})
    if len(sizes) > 1:
        raise InputError(f"frames of sizes {sizes}", "frames of one size", "resize them")
    if not fps > 0:
        raise InputError(f"fps={fps}", "more than 0", "say how many of these frames make a second")
    geometry, image_processor = processor.geometry, processor.image_processor
    canvas = geometry.canvas(*sizes[0], image_processor)
    options = {}
    if processor.video_size is not None and image_processor.do_resize:
        canvas = geometry.video_canvas(len(frames), *sizes[0], processor.video_size)
        resample = Image.Resampling(image_processor.resample)
        frames = [frame.resize((canvas.width, canvas.height), resample) for frame in frames]
        options = {"do_resize": False}
    made = image_processor(images=frames, return_tensors="pt", **options)
    high, wide = made["image_grid_thw"][0, 1:].tolist()
    _agree([canvas], [(wide * image_processor.patch_size, high * image_processor.patch_size)])
    depth, patches = geometry.frames_per_token, high * wide
    # A single picture fills its temporal patch with copies of itself: the first slice is the frame.
    pixels = made["pixel_values"].unflatten(1, (-1, depth, image_processor.patch_size**2))[:, :, 0]
    pixels = pixels.unflatten(0, (len(frames), patches))
    pixels = torch.cat([pixels, pixels[-1:].expand(-len(frames) % depth, -1, -1, -1)])
    steps = len(pixels) // depth
    # (steps, depth, patches, channels, pixels) -> one row for each patch: channels, then depth, then pixels.
    pixels = pixels.unflatten(0, (steps, depth)).permute(0, 2, 3, 1, 4).reshape(steps * patches, -1)
    tensors = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[steps, high, wide]])}
    firsts = [step * depth for step in range(steps)]
    runs = [[first] for first in firsts]
    if geometry.family.video == "block":
        tensors["second_per_grid_ts"] = torch.tensor([depth / fps])
        runs = [firsts]
    return tensors, [_block(VIDEO, -1, run, canvas, geometry.side, sizes[0]) for run in runs]


def _agree(canvases: list[Canvas], sizes: list[tuple[int, int]]) -> None:
    """The map of the picture must be the processor's own, or every box would be elsewhere."""
    for canvas, size in zip(canvases, sizes, strict=True):
        if (canvas.width, canvas.height) != size:
            raise InputError(
                f"the image processor made {size[0]} x {size[1]} pixels",
                f"{canvas.width} x {canvas.height}, by its settings",
                "report the image processor's settings: mech/inputs/geometry.py does not know them",
            )
