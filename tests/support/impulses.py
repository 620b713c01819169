"""Change a block of pixels and see which positions move where the text stack receives them.

An independent oracle of the whole way from a pixel to a token, for models whose vision tower carries nothing from one
token to another: what moves is what the token really shows.
"""

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from mech.data.regions import Box
from mech.inputs import Inputs, TokenLayout
from mech.reference import tiny

_OUT = ("out_proj", "attention.projection_layer", "attn.proj", "o_proj", "o_proj.linear")


def unmixed(name: str):
    """A tiny model whose vision tower's attention adds nothing."""
    model = tiny.model(name)
    for path, module in model.named_modules():
        if any(part in path for part in ("vision_tower", "vision_model", "visual")) and path.endswith(_OUT):
            for parameter in module.parameters(recurse=False):
                torch.nn.init.zeros_(parameter)
    return model


def embedded(model, inputs: Inputs) -> torch.Tensor:
    """What the text stack receives at each position."""
    seen = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs.tensors)
    hook.remove()
    return seen[0][0]


def changed(model, before: Inputs, after: Inputs) -> set[int]:
    """Positions that differ."""
    difference = (embedded(model, before) - embedded(model, after)).abs().amax(dim=1)
    return set(torch.nonzero(difference > 1e-6).flatten().tolist())


def poked(picture: Image.Image, box: Box) -> Image.Image:
    """The picture with the pixels of a box inverted."""
    pixels = np.array(picture)
    pixels[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)] ^= 255
    return Image.fromarray(pixels)


def boxes(size: tuple[int, int], count: int, seed: int = 0, image: int = 0) -> Iterator[Box]:
    """Random boxes in a picture of this size."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        x0, y0 = rng.integers(0, size[0]), rng.integers(0, size[1])
        yield Box(x0, y0, rng.integers(x0 + 1, size[0] + 1), rng.integers(y0 + 1, size[1] + 1), image)


def surely(layout: TokenLayout, box: Box, side: int, keeps_shape: bool = False) -> set[int]:
    """Tokens that share more than a canvas pixel with a box in both directions: resizing cannot step over it."""
    found = set()
    for position in np.flatnonzero(layout.image == box.image):
        x0, y0, x1, y1 = layout.rect[position]
        view = (layout.image == box.image) & (layout.view == layout.view[position])
        width, height = np.nanmax(layout.rect[view][:, 2:] - layout.rect[view][:, :2], axis=0) / side
        if keeps_shape:  # a picture lower than one token shows too small a height
            width = height = max(width, height)
        if min(x1, box.x1) - max(x0, box.x0) > width and min(y1, box.y1) - max(y0, box.y0) > height:
            found.add(int(position))
    return found
