"""The model and the inputs that are timed: a LLaVA with random weights; only shapes matter.

Heads are those of a real model (d_head 64, four query heads to a key/value head), the rest is small, so that attention
weighs as much as it does in a large model at the same length.
"""

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mech.inputs import IMAGE, TEXT, Inputs, TokenLayout

PATCH, PLACEHOLDER = 14, 999


def llava(
    tokens: int, layers: int = 4, heads: int = 8, kv_heads: int = 2, width: int = 256
) -> LlavaForConditionalGeneration:
    """A LLaVA whose image fills nine in ten of ``tokens`` positions; ``width`` is that of the text model."""
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=LlamaConfig(
            hidden_size=width, intermediate_size=43 * width // 16, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=64,
            vocab_size=1000, max_position_embeddings=2 * tokens,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, patch_size=PATCH,
            image_size=PATCH * _side(tokens),
        ),
        image_token_index=PLACEHOLDER,
        vision_feature_layer=-1,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval()


def question(tokens: int) -> Inputs:
    """One row of ``tokens`` positions: an image, and a question of 24 tokens near the end."""
    side = _side(tokens)
    visual = side * side
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 900, (1, tokens), generator=generator)
    ids[0, 4 : 4 + visual] = PLACEHOLDER
    pixels = torch.randn(1, 3, PATCH * side, PATCH * side, generator=generator)
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return Inputs(tensors, (layout(ids[0] == PLACEHOLDER),))


def layout(visual: torch.Tensor) -> TokenLayout:
    """Visual tokens of one image (without their places), and a question of 24 tokens that ends 6 before the end."""
    here, tokens = visual.numpy(), len(visual)
    nowhere = np.full(tokens, -1)
    return TokenLayout(
        kind=np.where(here, IMAGE, TEXT), image=np.where(here, 0, -1), frame=nowhere, row=nowhere, col=nowhere,
        view=np.where(here, 0, -1), rect=np.full((tokens, 4), np.nan), tokens=("",) * tokens,
        spans={"question": tuple(range(tokens - 30, tokens - 6))}, images=((1, 1),),
    )  # fmt: skip


def evidence(inputs: Inputs) -> np.ndarray:
    """The first four visual tokens."""
    return inputs.layout.positions("image")[:4]


def _side(tokens: int) -> int:
    return round((0.9 * tokens) ** 0.5)
