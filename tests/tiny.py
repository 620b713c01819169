"""Tiny random models of every family, and plain tensors for them: float32, seeded, a few thousand parameters.

``FAMILIES`` maps a family name to its factory; ``tensors(name, ...)`` gives what the Hugging Face model's forward
takes. Weights are scaled up, so that attention is far from uniform and an edit anywhere moves the logits.
"""

import functools

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

VOCAB, IMAGE, VIDEO, VISION_START, VISION_END, PAD = 100, 90, 91, 92, 93, 0
LAYERS, HEADS, KV_HEADS, D_MODEL, D_HEAD = 3, 4, 2, 32, 8
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _seeded(model, seed=0):
    """Give every weight matrix the same generous scale: default initialisation is too quiet to notice an edit."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (0.25 if parameter.ndim > 1 else 0.1) + (1.0 if parameter.ndim == 1 else 0.0))
    return model.eval()


def llava(text="llama", feature_layer=-2, **options):
    """LLaVA-1.5 with a CLIP tower: 28 x 28 pixels, 4 visual tokens an image."""
    kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config, "mistral": MistralConfig}
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=LAYERS, num_attention_heads=3, image_size=28,
        patch_size=14, projection_dim=24,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=kinds[text](**_TEXT, **options),
        vision_config=vision,
        image_token_id=IMAGE,
        vision_feature_layer=feature_layer,
        image_seq_length=4,
    )
    return _seeded(LlavaForConditionalGeneration(config))


def _qwen_text():
    return {**_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}


_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "tie_word_embeddings": False,
}


def qwen2_5_vl():
    """Qwen2.5-VL: window attention in the first and last of three vision layers, patches of 14 pixels."""
    vision = {
        "depth": LAYERS, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 56, "out_hidden_size": D_MODEL,
        "fullatt_block_indexes": [1], "tokens_per_second": 2,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=_qwen_text(), vision_config=vision, **_QWEN_TOKENS)
    return _seeded(Qwen2_5_VLForConditionalGeneration(config))


def qwen3_vl():
    """Qwen3-VL with DeepStack after the first two text layers, patches of 14 pixels."""
    vision = {
        "depth": LAYERS, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": D_MODEL,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2],
    }  # fmt: skip
    config = Qwen3VLConfig(text_config={**_qwen_text(), "head_dim": D_HEAD}, vision_config=vision, **_QWEN_TOKENS)
    return _seeded(Qwen3VLForConditionalGeneration(config))


FAMILIES = {"llava": llava, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}
_GRIDS = ((4, 4), (6, 4), (8, 8))  # patches (rows, columns) of the first, second, third image of a Qwen row


def tensors(family, rows=((1, 5),), seed=0):
    """Plain tensors for a batch, padded on the left.

    Args:
        rows: for each row, (number of images, number of text tokens after them).
    """
    generator = torch.Generator().manual_seed(seed)
    randint = functools.partial(torch.randint, generator=generator)
    ids, types, pixels, grids = [], [], [], []
    for images, length in rows:
        row, kind = randint(1, IMAGE, (3,)).tolist(), [0, 0, 0]
        for image in range(images):
            if family == "llava":
                pixels.append(torch.randn(1, 3, 28, 28, generator=generator))
                row, kind = row + [IMAGE] * 4, kind + [1] * 4
                continue
            height, width = _GRIDS[image]
            count = height * width // 4
            grids.append([1, height, width])
            pixels.append(torch.randn(height * width, 3 * 2 * 14 * 14, generator=generator))
            row += [VISION_START] + [IMAGE] * count + [VISION_END]
            kind += [0] + [1] * count + [0]
        ids.append(row + randint(1, IMAGE, (length,)).tolist())
        types.append(kind + [0] * length)
    longest = max(map(len, ids))
    pads = [longest - len(row) for row in ids]
    batch = {
        "input_ids": torch.tensor([[PAD] * pad + row for pad, row in zip(pads, ids, strict=True)]),
        "attention_mask": torch.tensor([[0] * pad + [1] * len(row) for pad, row in zip(pads, ids, strict=True)]),
    }
    if pixels:
        batch["pixel_values"] = torch.cat(pixels)
    if family != "llava":
        batch["mm_token_type_ids"] = torch.tensor([[0] * pad + row for pad, row in zip(pads, types, strict=True)])
        if grids:
            batch["image_grid_thw"] = torch.tensor(grids)
    return batch
