"""Plain Hugging Face tensors for the tiny models: what a family's forward takes, made without any processor.

``tensors(name, rows)`` is a batch padded on the left; each row has some images, one piece of noise each, and some text.
How many visual tokens an image has is asked of the Hugging Face model itself, so this knows no geometry.
"""

import functools

import torch

from mech.reference import tiny
from mech.reference.tiny_tokenizer import SPECIAL, VOCAB

SIDE = tiny.SIDE
QWEN_GRIDS = ((4, 4), (6, 4), (8, 8))  # patches (rows, columns) of the first, second, third image of a row
# One of each kind: stock, fused projections, windows, DeepStack, experts, layer scale, post-norms, parallel layers.
FEW = ("llava", "llava_phi3", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "internvl", "gemma3", "cohere2_vision")


def _picture(name, index, noise):
    """The visual tensors of one image."""
    if name.startswith("qwen"):
        height, width = QWEN_GRIDS[index]
        pixels = noise(height * width, 3 * 2 * tiny.PATCH**2)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]])}
    return {"pixel_values": noise(1, 3, SIDE, SIDE)}


@functools.cache
def _count(name, index):
    """How many visual tokens the Hugging Face model makes of an image."""
    with torch.no_grad():
        features = tiny.model(name).model.get_image_features(**_picture(name, index, torch.randn), return_dict=True)
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
        batch[key] = torch.cat([picture[key] for row in pictures for picture in row])
    return batch
