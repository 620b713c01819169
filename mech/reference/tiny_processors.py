"""The processors of the tiny models: every family's own image processor at a tiny size, and their one tokenizer.

processor("internvl")        # goes with mech.reference.tiny.model("internvl")
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import transformers
from PIL import Image

from mech.inputs import Processor
from mech.inputs.families.lfm2 import Lfm2VlImageProcessorPil
from mech.inputs.families.pil import Cohere2VisionImageProcessorPil, Llama4ImageProcessorPil
from mech.reference.tiny import MODELS
from mech.reference.tiny_tokenizer import tokenizer

SIDE, PATCH = 16, 4  # pixels of a tile and of a patch in the tiny towers; mech.reference.tiny has the same
_SQUARE = {"height": SIDE, "width": SIDE}
_PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE], [SIDE, 3 * SIDE]]
_ANYRES = {"size": _SQUARE, "crop_size": _SQUARE, "do_center_crop": False, "image_grid_pinpoints": _PINPOINTS}
_SPLIT = {"size": {"longest_edge": 3 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
_PATCHES = {"patch_size": PATCH, "size": {"shortest_edge": 4 * PATCH**2, "longest_edge": 400 * PATCH**2}}
# GLM counts pixels of both frames of a temporal patch.
_DEEP_PATCHES = {"patch_size": PATCH, "size": {"shortest_edge": 8 * PATCH**2, "longest_edge": 800 * PATCH**2}}
_CLIP = (transformers.CLIPImageProcessorPil, {"size": _SQUARE, "crop_size": _SQUARE, "do_center_crop": False})
_SIGLIP = (transformers.SiglipImageProcessorPil, {"size": _SQUARE})
_QWEN = (transformers.Qwen2VLImageProcessorPil, _PATCHES)
_PIXTRAL = (transformers.PixtralImageProcessorPil, {"patch_size": PATCH, "size": {"longest_edge": 8 * PATCH}})
_GEMMA4 = (
    transformers.Gemma4ImageProcessorPil,
    {"patch_size": PATCH, "pooling_kernel_size": 2, "max_soft_tokens": 70},  # the least it allows
)

# The image processor of each variant of mech.reference.tiny, and its settings.
IMAGE_PROCESSORS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "llava": _CLIP,
    "llava_siglip": _SIGLIP,
    "llava_qwen3": (
        transformers.LlavaImageProcessorPil,
        {"size": _SQUARE, "crop_size": _SQUARE, "do_center_crop": False, "do_pad": True},
    ),
    "llava_mistral": _CLIP,
    "llava_phi3": _CLIP,
    "llava_next": (transformers.LlavaNextImageProcessorPil, _ANYRES),
    "llava_onevision": (transformers.LlavaOnevisionImageProcessorPil, _ANYRES),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    "glm4v": (transformers.Glm4vImageProcessorPil, _DEEP_PATCHES),
    "glm46v": (transformers.Glm46VImageProcessorPil, _DEEP_PATCHES),
    "glm4v_moe": (transformers.Glm4vImageProcessorPil, _DEEP_PATCHES),
    "llava_pixtral": _PIXTRAL,
    "mistral3": _PIXTRAL,
    "gemma4": _GEMMA4,
    "gemma4_large": _GEMMA4,
    "lfm2_vl": (
        Lfm2VlImageProcessorPil,
        {"encoder_patch_size": PATCH, "tile_size": SIDE, "max_tiles": 4, "min_image_tokens": 4, "max_image_tokens": 16},
    ),
    "internvl": (transformers.GotOcr2ImageProcessorPil, {"size": _SQUARE, "max_patches": 6}),
    "gemma3": (transformers.Gemma3ImageProcessorPil, {"size": _SQUARE}),
    "paligemma": _SIGLIP,
    "paligemma2": _SIGLIP,
    "idefics3": (transformers.Idefics3ImageProcessorPil, _SPLIT),
    "smolvlm": (transformers.SmolVLMImageProcessorPil, _SPLIT),
    "cohere2_vision": (Cohere2VisionImageProcessorPil, {"size": _SQUARE, "max_patches": 6, "patch_size": 4}),
    "mllama": (transformers.MllamaImageProcessorPil, {"size": _SQUARE}),
    "llama4": (Llama4ImageProcessorPil, {"size": _SQUARE, "max_patches": 4}),
}
_BEGINNINGS = {
    "gemma3": "<bos>",
    "paligemma": "<bos>",
    "llama4": "<|begin_of_text|>",
    "mllama": "<|begin_of_text|>",
    "cohere2_vision": "<bos>",
}


def image_processor(name: str, **settings: Any) -> Any:
    """The image processor of a variant; ``settings`` override its own."""
    kind, own = IMAGE_PROCESSORS[name]
    return kind(**{**own, **settings})


def processor(name: str, images: Any = None, config: Any = None, **options: Any) -> Processor:
    """The processor of a variant.

    Args:
        name: one of ``mech.reference.tiny.NAMES``.
        images: an image processor in place of the variant's own.
        config: the model's config, in place of the variant's own.
        options: for ``Processor.from_hf``.
    """
    config = config or MODELS[name]()
    first = _BEGINNINGS.get(config.model_type)
    named = {"bos_token": first} if first else {}
    made = images or image_processor(name)
    return Processor.from_hf(config=config, tokenizer=tokenizer(**named), image_processor=made, **options)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of random pixels, the same for the same seed."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
