"""The law of geometry: which pixels a visual token shows."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mech.data.regions import Box
from mech.model.check.trial import (
    QUESTION,
    SIZES,
    Batches,
    Finding,
    image_token,
    picture,
)

LEAK = 0.05  # how much of an impulse resizing may spread further than a token; a wrong rectangle gives about 1


def geometry(model: Any, batches: Batches) -> Iterator[Finding]:
    """The layout lists the visual tokens the model has, and the pixels each of them shows.

    * there are as many visual tokens as placeholders in the sequence;
    * a box inside a token's rectangle covers that token, for every token;
    * with the mixing of the vision stack switched off (z = 0), repainting a token's pixels changes that token's
      embedding, and hardly any embedding further away than a token's width (resizing mixes neighbours).

    Forwards: up to 5 for each of three pictures.
    """
    if batches.blind:
        yield Finding("layout", None, says=batches.blind)
        return
    for seed, size in enumerate(SIZES):
        where, shot = "{} x {}".format(*size), picture(*size, seed)
        row = model.inputs(QUESTION, images=[shot]).layout
        layout = row.visual
        visual = layout.positions("image")
        # A memory also holds empty tiles, which the model computes too.
        slots = visual if row is layout else np.arange(len(layout))
        count = len(_features(model, shot, []))
        yield Finding(
            f"tokens of {where}", count == len(slots), abs(count - len(slots)),
            "" if count == len(slots) else f"the layout has {len(slots)} visual tokens, the model {count}",
        )  # fmt: skip
        placed = [int(position) for position in visual if not np.isnan(layout.rect[position]).any()]
        lost = [position for position in placed if position not in layout.positions(_core(layout, position))]
        yield Finding(
            f"boxes of {where}", bool(placed) and not lost, len(lost),
            f"a box inside the rectangle of position {lost[0]} does not cover it" if lost else "",
        )  # fmt: skip
        if count == len(slots):
            yield from _impulses(model, layout.rect[slots], slots, shot, placed, where)


def _features(model: Any, shot: Image.Image, hooks: list[Any]) -> Tensor:
    """What the text stack receives for each visual token of a picture, in the order of their positions."""
    inputs, seen = model.inputs(QUESTION, images=[shot]), {}
    points = ("hook_embed", "projector.hook_out")
    keep = [(name, lambda value, hook: seen.update({hook.name: value.detach().float()})) for name in points]
    model.run_with_hooks(inputs, fwd_hooks=[*hooks, *keep])
    if model.cfg.cross_layers:
        return seen["projector.hook_out"]
    return seen["hook_embed"][0][(inputs.tensors["input_ids"][0] == image_token(model)).to(model.device)]


def _impulses(
    model: Any, rects: np.ndarray, slots: np.ndarray, shot: Image.Image, placed: list[int], where: str
) -> Iterator[Finding]:
    still = [name for name in model.points() if name.startswith("vision.") and name.endswith("attn.hook_z")]
    hooks = [(name, lambda z, hook: torch.zeros_like(z)) for name in still]
    clean = _features(model, shot, hooks)
    for position in sorted({placed[0], placed[len(placed) // 2], placed[-1]}):
        own, pixels = int(np.searchsorted(slots, position)), np.array(shot)
        (x0, y0), (x1, y1) = np.floor(rects[own][:2]).astype(int), np.ceil(rects[own][2:]).astype(int)
        pixels[y0:y1, x0:x1] = 255 - pixels[y0:y1, x0:x1]
        moved = (_features(model, Image.fromarray(pixels), hooks) - clean).abs().amax(-1).cpu().numpy()
        # Resizing mixes neighbours within the width of the larger token; a slot without a rectangle is never far.
        wide = np.maximum(rects[:, 2] - rects[:, 0], x1 - x0)
        high = np.maximum(rects[:, 3] - rects[:, 1], y1 - y0)
        far = (rects[:, 0] >= x1 + wide) | (rects[:, 2] <= x0 - wide)
        far |= (rects[:, 1] >= y1 + high) | (rects[:, 3] <= y0 - high)
        worst = int(np.argmax(np.where(far, moved, -1)))
        leaked = float(moved[worst] / max(moved[own], 1e-30)) if far.any() else 0.0
        ok = bool(moved[own] > 0 and leaked <= LEAK)
        says = f"repainting the pixels of position {position} moves it by {moved[own]:.1e}"
        says += f" and position {slots[worst]}, which shows other pixels, {leaked:.1e} times as much"
        yield Finding(f"impulse at position {position} of {where}", ok, 0.0 if ok else leaked, "" if ok else says)


def _core(layout: Any, position: int) -> Box:
    """A box well inside a token's rectangle."""
    x0, y0, x1, y1 = layout.rect[position]
    wide, high = (x1 - x0) / 4, (y1 - y0) / 4
    return Box(x0 + wide, y0 + high, x1 - wide, y1 - high, image=int(layout.image[position]))
