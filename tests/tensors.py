"""Plain Hugging Face tensors for the tiny models: what a family's forward takes, made without any processor.

``tensors(name, rows)`` is a batch padded on the left; each row has some images, one piece of noise each, and some text.
How many visual tokens an image has is asked of the Hugging Face model itself, so this knows no geometry.
"""

import functools

import torch

from mech.reference import tiny
from mech.reference.tiny_processors import SPECIAL, VOCAB

SIDE = tiny.SIDE
QWEN_GRIDS = ((4, 4), (6, 4), (8, 8))  # patches (rows, columns) of the first, second, third image of a row
SIZES = ((16, 16), (24, 16), (32, 20))  # pixels (height, width), where any size goes
NAMES = (
    *(
        "llava",
        "llava_siglip",
        "llava_qwen3",
        "llava_mistral",
        "llava_phi3",
        "llava_pixtral",
        "llava_next",
        "llava_onevision",
    ),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "internvl", "gemma3", "paligemma", "paligemma2"),
    *("idefics3", "smolvlm", "mistral3", "cohere2_vision"),
)
# One of each kind: stock, fused projections, windows, DeepStack, experts, layer scale, post-norms, parallel layers.
FEW = ("llava", "llava_phi3", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "internvl", "gemma3", "cohere2_vision")
ANYRES = ("llava_next", "llava_onevision")
SIZED = ("llava_pixtral", "mistral3")


def _picture(name, index, noise):
    """The visual tensors of one image."""
    if name.startswith("qwen"):
        height, width = QWEN_GRIDS[index]
        pixels = noise(height * width, 3 * 2 * tiny.PATCH**2)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]])}
    if name in SIZED:
        height, width = (side // 8 * 8 for side in SIZES[index])
        return {"pixel_values": noise(1, 3, height, width), "image_sizes": torch.tensor([[height, width]])}
    if name in ANYRES:
        return {"pixel_values": noise(1, 3, 3, SIDE, SIDE), "image_sizes": torch.tensor([[SIDE, 2 * SIDE]])}
    pixels = noise(1, 3, SIDE, SIDE)
    return {"pixel_values": pixels[None]} if name in ("idefics3", "smolvlm") else {"pixel_values": pixels}


@functools.cache
def _count(name, index):
    """How many visual tokens the Hugging Face model makes of an image."""
    given = _picture(name, index, torch.randn)
    if name in ANYRES:
        given["vision_aspect_ratio"] = None
    with torch.no_grad():
        features = tiny.model(name).model.get_image_features(
            **{key: value for key, value in given.items() if value is not None}, return_dict=True
        )
    pooled = features.pooler_output
    parts = pooled if isinstance(pooled, (tuple, list)) else [pooled]
    return sum(part.numel() // part.shape[-1] for part in parts)


def placeholder(name):
    """The id of the image token."""
    return tiny.MODELS[name]().image_token_id


def tensors(name, rows=((1, 5),), seed=0):
    """Plain tensors for a batch, padded on the left.

    Args:
        rows: for each row, (number of images, number of text tokens after them).
    """
    generator = torch.Generator().manual_seed(seed)
    noise, image = functools.partial(torch.randn, generator=generator), placeholder(name)
    randint = functools.partial(torch.randint, len(SPECIAL), VOCAB, generator=generator)
    ids, pictures = [], []
    for images, length in rows:
        row, seen = randint((3,)).tolist(), []
        for index in range(images):
            seen.append(_picture(name, index, noise))
            row += [image] * _count(name, index) + randint((1,)).tolist()
        ids.append(row + randint((length,)).tolist())
        pictures.append(seen)
    longest = max(map(len, ids))
    pads = [longest - len(row) for row in ids]
    batch = {
        "input_ids": torch.tensor([[0] * pad + row for pad, row in zip(pads, ids, strict=True)]),
        "attention_mask": torch.tensor([[0] * pad + [1] * len(row) for pad, row in zip(pads, ids, strict=True)]),
    }
    kind = (batch["input_ids"] == image).long()
    if name.startswith("qwen"):
        batch["mm_token_type_ids"] = kind
    elif name.startswith("gemma"):
        batch["token_type_ids"] = kind
    elif name.startswith("paligemma"):
        batch["token_type_ids"] = torch.zeros_like(kind)
    for key in pictures[0][0] if pictures[0] else ():
        batch[key] = _stacked([[picture[key] for picture in row] for row in pictures], name)
    return batch


def _stacked(values, name):
    if name in ("idefics3", "smolvlm"):  # [row, image, ...], filled up with black images that count for nothing
        most = max(map(len, values))
        rows = [torch.cat([*row, *[torch.zeros_like(values[0][0])] * (most - len(row))], dim=1) for row in values]
        return torch.cat(rows)
    flat = [value for row in values for value in row]
    if flat[0].ndim == 4 and name in SIZED:  # filled up to the largest image of the batch
        height, width = (max(value.shape[axis] for value in flat) for axis in (2, 3))
        flat = [
            torch.nn.functional.pad(value, (0, width - value.shape[3], 0, height - value.shape[2])) for value in flat
        ]
    return torch.cat(flat)
