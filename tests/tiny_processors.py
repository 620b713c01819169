"""A small byte-level tokenizer, image processors and random models of every family, made on the spot."""

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from mech.inputs import Processor

SPECIAL = [
    "<pad>",
    "<s>",
    "<image>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl")
CORPUS = [
    "Which digit is in the red frame? user assistant USER: ASSISTANT: seconds What is shown here",
    "0123456789 <0.5>",
]


def tokenizer(**options) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be written, and spaces belong to the word behind them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS * 4, trainer)
    names = {"pad_token": "<pad>", "eos_token": "<|im_end|>", "additional_special_tokens": SPECIAL[1:], **options}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def clip_images(side: int = 24, **options) -> CLIPImageProcessorPil:
    settings = {"size": {"height": side, "width": side}, "crop_size": {"height": side, "width": side}}
    return CLIPImageProcessorPil(**{**settings, "do_center_crop": False, **options})


def qwen_images(patch: int, **options) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        **{"patch_size": patch, "size": {"shortest_edge": 4 * patch**2, "longest_edge": 400 * patch**2}, **options}
    )


def config(family: str, **options):
    """A model of some thousand parameters; patches of 4 pixels, Qwen's merged to 8."""
    ids = {name: SPECIAL.index(token) for name, token in _TOKENS[family].items()}
    text = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
    }
    if family == "llava":
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=24,
            patch_size=4,
        )
        return LlavaConfig(vision_config=vision, text_config=LlamaConfig(**text), **ids, **options)
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1]}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4}
    vision["out_hidden_size"] = 32
    if family == "qwen2_5_vl":
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
        return Qwen2_5_VLConfig(vision_config=vision, text_config={**text, "rope_parameters": rope}, **ids, **options)
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    return Qwen3VLConfig(vision_config=vision, text_config={**text, "rope_parameters": rope}, **ids, **options)


_QWEN_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
_TOKENS = {"llava": {"image_token_index": "<image>"}, "qwen2_5_vl": _QWEN_TOKENS, "qwen3_vl": _QWEN_TOKENS}


def processor(family: str, image_processor=None, **options) -> Processor:
    made = image_processor or (clip_images() if family == "llava" else qwen_images(4))
    return Processor.from_hf(
        config=config(family, **options.pop("config", {})), tokenizer=tokenizer(), image_processor=made, **options
    )


def model(family: str, **options):
    torch.manual_seed(0)
    classes = {
        "llava": LlavaForConditionalGeneration,
        "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
        "qwen3_vl": Qwen3VLForConditionalGeneration,
    }
    return classes[family](config(family, **options)).eval()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
