"""Tiny random models of every family: the real Hugging Face classes with a few thousand parameters, made on the spot.

    model     = tiny.model("gemma3")                        # a PreTrainedModel: float32, eval, seeded
    processor = tiny_processors.processor("gemma3")         # goes with it: same placeholders, sizes and patches
    wrapped   = mech.HookedMLLM.from_hf(model, processor)

Every variant has three text layers of four heads (two key/value heads where the architecture can), ``d_model`` 32 and
4 to 16 visual tokens per tile; hybrid and sliding-window families really have both kinds of layer. Weights are large,
so that attention is far from uniform and an edit anywhere moves the logits.

These models know nothing. For models that retrieve evidence see ``mech.reference``.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Cohere2Config,
    Cohere2VisionConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma4Config,
    GemmaConfig,
    Glm4vConfig,
    Glm4vMoeConfig,
    Glm46VConfig,
    Idefics3Config,
    InternVLConfig,
    Lfm2VlConfig,
    Llama4Config,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    Mistral3Config,
    MistralConfig,
    MllamaConfig,
    PaliGemmaConfig,
    Phi3Config,
    PixtralVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
)

from mech.reference.tiny_tokenizer import VOCAB, token_id

LAYERS, HEADS, KV_HEADS, D_MODEL, D_HEAD, D_MLP = 3, 4, 2, 32, 8, 48
PATCH = 4  # pixels per side; families that merge or pool 2 x 2 patches and have a fixed image size use 2
SIDE = 16  # pixels per side of an image or tile where it is fixed

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": D_HEAD,
    "max_position_embeddings": 2048,
    "pad_token_id": token_id("<pad>"),
    "bos_token_id": None,
    "eos_token_id": None,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
}
_PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE], [SIDE, 3 * SIDE]]
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


def _clip(patch: int = PATCH) -> CLIPVisionConfig:
    return CLIPVisionConfig(**_TOWER, image_size=SIDE, patch_size=patch, projection_dim=24)


def _siglip(patch: int = PATCH) -> SiglipVisionConfig:
    return SiglipVisionConfig(**_TOWER, image_size=SIDE, patch_size=patch, vision_use_head=False)


def _pixtral() -> PixtralVisionConfig:
    return PixtralVisionConfig(**_TOWER, image_size=8 * PATCH, patch_size=PATCH)


def _llava(
    vision: PreTrainedConfig, text: PreTrainedConfig, placeholder: str = "<image>", **options: Any
) -> LlavaConfig:
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=token_id(placeholder), image_seq_length=16, **options
    )


def _full(**options: Any) -> dict[str, Any]:
    """A tower without class token, of which the last layer is used."""
    return {"vision_feature_select_strategy": "full", "vision_feature_layer": -1, **options}


def _llava_next() -> LlavaNextConfig:
    return LlavaNextConfig(
        vision_config=_clip(),
        text_config=MistralConfig(**_SIZES, sliding_window=None),
        image_token_index=token_id("<image>"),
        image_grid_pinpoints=_PINPOINTS,
        image_seq_length=16,
    )


def _llava_onevision() -> LlavaOnevisionConfig:
    return LlavaOnevisionConfig(
        vision_config=_siglip(),
        text_config=Qwen2Config(**_SIZES),
        image_token_index=token_id("<image>"),
        video_token_index=token_id("<video>"),
        image_grid_pinpoints=_PINPOINTS,
        vision_aspect_ratio="anyres_max_4",
    )


_QWEN_TOKENS = {
    "image_token_id": token_id("<|image_pad|>"),
    "video_token_id": token_id("<|video_pad|>"),
    "vision_start_token_id": token_id("<|vision_start|>"),
    "vision_end_token_id": token_id("<|vision_end|>"),
    "tie_word_embeddings": False,
}
_QWEN_TOWER = {
    "depth": LAYERS, "hidden_size": 24, "num_heads": 3, "patch_size": PATCH, "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}  # fmt: skip


def _qwen_text(**options: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    return {**_SIZES, "rope_parameters": rope, **options}


def _qwen2_vl() -> Qwen2VLConfig:
    vision = {**_QWEN_TOWER, "embed_dim": 24, "hidden_size": D_MODEL, "mlp_ratio": 2}
    return Qwen2VLConfig(text_config=_qwen_text(), vision_config=vision, **_QWEN_TOKENS)


def _qwen2_5_vl() -> Qwen2_5_VLConfig:
    """Window attention in the first and last of three vision layers."""
    vision = {
        **_QWEN_TOWER, "intermediate_size": 40, "window_size": 4 * PATCH, "fullatt_block_indexes": [1],
        "out_hidden_size": D_MODEL, "tokens_per_second": 2,
    }  # fmt: skip
    return Qwen2_5_VLConfig(text_config=_qwen_text(), vision_config=vision, **_QWEN_TOKENS)


_DEEPSTACK = {
    **_QWEN_TOWER, "intermediate_size": 40, "out_hidden_size": D_MODEL, "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 2],
}  # fmt: skip


def _qwen3_vl() -> Qwen3VLConfig:
    """DeepStack features enter after the first two text layers."""
    return Qwen3VLConfig(text_config=_qwen_text(), vision_config=_DEEPSTACK, **_QWEN_TOKENS)


def _qwen3_vl_moe() -> Qwen3VLMoeConfig:
    """A dense feed-forward in the middle layer, experts in the others."""
    text = _qwen_text(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40, mlp_only_layers=[1])
    return Qwen3VLMoeConfig(text_config=text, vision_config=_DEEPSTACK, **_QWEN_TOKENS)


def _internvl() -> InternVLConfig:
    return InternVLConfig(
        vision_config={**_TOWER, "image_size": [SIDE, SIDE], "patch_size": [2, 2], "layer_scale_init_value": 0.5},
        text_config=Qwen2Config(**_SIZES),
        image_token_id=token_id("<IMG_CONTEXT>"),
        image_seq_length=16,
        tie_word_embeddings=False,
    )


def _gemma3() -> Gemma3Config:
    return Gemma3Config(
        vision_config=_siglip(patch=2),
        text_config={**_SIZES, **_SLIDING, "query_pre_attn_scalar": D_HEAD},
        mm_tokens_per_image=16,
        image_token_index=token_id("<image_soft_token>"),
        boi_token_index=token_id("<start_of_image>"),
        eoi_token_index=token_id("<end_of_image>"),
    )


def _paligemma(text: PreTrainedConfig) -> PaliGemmaConfig:
    return PaliGemmaConfig(
        vision_config=_siglip(),
        text_config=text,
        image_token_index=token_id("<image>"),
        projection_dim=D_MODEL,
        hidden_size=D_MODEL,
    )


def _shuffled(kind: Callable[..., PreTrainedConfig]) -> PreTrainedConfig:
    """Idefics3 and its descendant: pixel shuffle of 2 x 2 patches."""
    return kind(
        vision_config={**_TOWER, "image_size": SIDE, "patch_size": 2},
        text_config=LlamaConfig(**_SIZES),
        image_token_id=token_id("<image>"),
        scale_factor=2,
        pad_token_id=token_id("<pad>"),
    )


def _mistral3() -> Mistral3Config:
    return Mistral3Config(
        vision_config=_pixtral(),
        text_config=MistralConfig(**_SIZES, sliding_window=None),
        image_token_index=token_id("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


def _cohere2_vision() -> Cohere2VisionConfig:
    return Cohere2VisionConfig(
        vision_config=_siglip(patch=2),
        text_config=Cohere2Config(**_SIZES, **_SLIDING),
        image_token_id=token_id("<|IMG_PATCH|>"),
        downsample_factor=2,
        alignment_intermediate_size=64,
    )


def _qwen3_5(kind: Callable[..., PreTrainedConfig] = Qwen3_5Config, **experts: int) -> PreTrainedConfig:
    """Gated attention in the middle layer, linear attention in the others."""
    text = _qwen_text(
        **experts,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    text["rope_parameters"]["partial_rotary_factor"] = 1.0  # a quarter of d_head 8 leaves no room for three axes
    vision = {**_QWEN_TOWER, "intermediate_size": 40, "out_hidden_size": D_MODEL, "num_position_embeddings": 16}
    return kind(text_config=text, vision_config=vision, **_QWEN_TOKENS)


def _glm4v(kind: Callable[..., PreTrainedConfig] = Glm4vConfig, **text: Any) -> PreTrainedConfig:
    sizes = _qwen_text(**text)
    sizes["rope_parameters"]["partial_rotary_factor"] = 1.0
    return kind(
        text_config=sizes,
        vision_config={**_QWEN_TOWER, "intermediate_size": 40, "out_hidden_size": D_MODEL, "image_size": SIDE},
        image_token_id=token_id("<|image|>"),
        video_token_id=token_id("<|video|>"),
        image_start_token_id=token_id("<|begin_of_image|>"),
        image_end_token_id=token_id("<|end_of_image|>"),
        video_start_token_id=token_id("<|begin_of_video|>"),
        video_end_token_id=token_id("<|end_of_video|>"),
    )


def _llama4() -> Llama4Config:
    """The middle layer has experts, sees everything and has no RoPE; the others attend in chunks of 8."""
    vision = {
        **_TOWER, "intermediate_size": 96, "image_size": SIDE, "patch_size": 2, "projector_input_dim": 40,
        "projector_output_dim": 40, "vision_output_dim": 40,
    }  # fmt: skip
    text = {
        **_SIZES, "intermediate_size_mlp": D_MLP, "moe_layers": [2], "num_local_experts": 4,
        "no_rope_layers": [1, 0, 1], "attention_chunk_size": 8,
    }  # fmt: skip
    return Llama4Config(
        vision_config=vision,
        text_config=text,
        boi_token_index=token_id("<|image_start|>"),
        eoi_token_index=token_id("<|image_end|>"),
        image_token_index=token_id("<|patch|>"),
    )


def _mllama() -> MllamaConfig:
    """The middle layer attends to the tiles, which are not in the sequence; the tower's last layer sees all tiles."""
    vision = {
        **_TOWER, "num_global_layers": 1, "image_size": SIDE,
        "patch_size": PATCH, "intermediate_layers_indices": [0, 1], "vision_output_dim": 3 * _TOWER["hidden_size"],
    }  # fmt: skip
    text = {**_SIZES, "cross_attention_layers": [1], "bos_token_id": token_id("<|begin_of_text|>")}
    del text["head_dim"]
    return MllamaConfig(vision_config=vision, text_config=text, image_token_index=token_id("<|image|>"))


def _lfm2_vl() -> Lfm2VlConfig:
    """Attention in the middle layer, short convolutions in the others."""
    text = {**_SIZES, "model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv"]}
    text |= {"block_auto_adjust_ff_dim": False, "block_ff_dim": D_MLP}
    del text["head_dim"]
    vision = {"model_type": "siglip2_vision_model", **_TOWER, "patch_size": PATCH, "num_patches": 16}
    return Lfm2VlConfig(
        vision_config={**vision, "vision_use_head": False},
        text_config=text,
        image_token_id=token_id("<image>"),
        projector_hidden_size=40,
        tie_word_embeddings=False,
    )


def _gemma4(**text: Any) -> Gemma4Config:
    """Heads of 16 in layers that see everything, of 8 in those with a window."""
    vision = {
        **_TOWER, "num_key_value_heads": 3, "head_dim": 8, "patch_size": PATCH, "pooling_kernel_size": 2,
        "position_embedding_size": 64,
    }  # fmt: skip
    return Gemma4Config(
        vision_config=vision,
        text_config={**_SIZES, "sliding_window": 8, "global_head_dim": 16, "vocab_size_per_layer_input": VOCAB, **text},
        audio_config=None,
        image_token_id=token_id("<|image|>"),
        video_token_id=token_id("<|video|>"),
        audio_token_id=None,
        boi_token_id=token_id("<|image>"),
        eoi_token_id=token_id("<image|>"),
        boa_token_id=None,
        eoa_token_index=None,
    )


def _gemma4_small() -> Gemma4Config:
    """Per-layer inputs, and a last layer that reads the keys and values of the one before."""
    layers = ["sliding_attention", "full_attention", "full_attention"]
    return _gemma4(layer_types=layers, num_kv_shared_layers=1, hidden_size_per_layer_input=6)


def _gemma4_large() -> Gemma4Config:
    """Experts alongside the feed-forward, values from the keys' projection, bidirectional attention within images."""
    return _gemma4(
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        hidden_size_per_layer_input=0,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        use_bidirectional_attention="vision",
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=24,
    )


MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llava": lambda: _llava(_clip(), LlamaConfig(**_SIZES)),
    "llava_siglip": lambda: _llava(_siglip(), Qwen2Config(**_SIZES), **_full()),
    "llava_qwen3": lambda: _llava(_siglip(), Qwen3Config(**_SIZES), **_full(vision_feature_layer=-2)),
    "llava_mistral": lambda: _llava(_clip(), MistralConfig(**_SIZES, sliding_window=8), vision_feature_layer=[-2, 1]),
    "llava_phi3": lambda: _llava(_clip(), Phi3Config(**_SIZES)),
    "llava_pixtral": lambda: _llava(_pixtral(), MistralConfig(**_SIZES, sliding_window=None), "[IMG]", **_full()),
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "internvl": _internvl,
    "gemma3": _gemma3,
    "paligemma": lambda: _paligemma(GemmaConfig(**_SIZES)),
    "paligemma2": lambda: _paligemma(Gemma2Config(**_SIZES, **_SLIDING, query_pre_attn_scalar=D_HEAD)),
    "idefics3": lambda: _shuffled(Idefics3Config),
    "smolvlm": lambda: _shuffled(SmolVLMConfig),
    "mistral3": _mistral3,
    "cohere2_vision": _cohere2_vision,
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": lambda: _qwen3_5(
        Qwen3_5MoeConfig,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=D_MLP,
        shared_expert_intermediate_size=D_MLP,
    ),
    "glm4v": _glm4v,
    "glm46v": lambda: _glm4v(Glm46VConfig, model_type="glm4v_text"),
    "glm4v_moe": lambda: _glm4v(
        Glm4vMoeConfig, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, first_k_dense_replace=2
    ),
    "gemma4": _gemma4_small,
    "gemma4_large": _gemma4_large,
    "llama4": _llama4,
    "mllama": _mllama,
    "lfm2_vl": _lfm2_vl,
}
NAMES = tuple(MODELS)


def model(name: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model of a variant in ``NAMES``: float32, eval, the same for the same seed."""
    return build(MODELS[name](), seed)


def build(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model of a config (one of ``MODELS``, perhaps changed) with the weights this module gives."""
    made = AutoModelForImageTextToText.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Matrices get one large scale (default initialisation is too small for an edit to show, and Gemma3's
            # projection starts at zero); vectors stay near one, as norms and layer scales are.
            matrix = parameter.ndim > 1
            parameter.copy_(noise * (0.25 if matrix else 0.1) + (0.0 if matrix or path.endswith("bias") else 1.0))
    return made.eval()
