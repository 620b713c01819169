"""The table: one ``Stack`` for each kind of transformer, one ``Row`` for each multimodal architecture.

To support a new architecture, add a ``Row`` with the roots of its stacks; if its text or vision model (the
``model_type`` of ``text_config`` or ``vision_config``) is new too, add a ``Stack``. The fields are explained in
``stack.py``. Then add a tiny config for it to ``mech/reference/tiny.py`` and run ``mech check``.
"""

from collections.abc import Iterable
from dataclasses import replace

from mech.model.architectures.stack import Row, Stack

_EXPERTS = {"mlp.hook_post": "its feed-forward is a mixture of experts, which has no single hidden layer"}
_PARALLEL = {"hook_resid_mid": "attention and feed-forward read the same stream, so there is no stream between them"}

LLAMA = Stack(
    types=(
        *("llama", "mistral", "qwen2", "qwen3", "gemma"),
        *("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text", "glm4v_moe_text"),
    ),
    post_at="next",
    absent=_EXPERTS,
)
GEMMA = replace(
    LLAMA,
    types=("gemma2", "gemma3_text"),
    attn_out="post_attention_layernorm",
    mid="pre_feedforward_layernorm",
    mlp_out="post_feedforward_layernorm",
)
_PHI3 = replace(
    LLAMA, types=("phi3",), q="qkv_proj", k="qkv_proj", v="qkv_proj", qkv=True,
    up="gate_up_proj", gate="gate_up_proj",
)  # fmt: skip
COHERE = replace(LLAMA, types=("cohere2",), mid="", absent=_PARALLEL)
_GLM4V = replace(
    LLAMA, types=("glm4v_text",), attn_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm",
    up="gate_up_proj", gate="gate_up_proj", absent={},
)  # fmt: skip
_QWEN3_5 = replace(
    LLAMA, types=("qwen3_5_text", "qwen3_5_moe_text"), gated=True, headless={"linear_attn": "linear attention"}
)
_GEMMA4 = replace(
    GEMMA,
    types=("gemma4_text",),
    v="v_norm",
    values="v_proj",  # absent where the key projection makes the values too
    post_at="output",
    absent=dict.fromkeys(
        ("attn.hook_k", "attn.hook_v"),
        "it reads the keys and values of an earlier layer: write them there, or hook_rot_k here",
    ),
)
_LLAMA4 = replace(LLAMA, types=("llama4_text",), mlp="feed_forward")
_LFM2 = replace(
    LLAMA,
    types=("lfm2",),
    norm="embedding_norm",
    headless={"conv": "a short convolution"},
    o="out_proj",
    mid="ffn_norm",
    mlp="feed_forward",
    up="w3",
    gate="w1",
    down="w2",
    absent={},
)
_MLLAMA = Stack(
    types=("mllama_text_model",),
    embed="embed_tokens",
    attn=("self_attn", "cross_attn"),
    cross="cross_attn",
    attn_gain=lambda layer: layer.cross_attn_attn_gate.tanh() if hasattr(layer, "cross_attn") else None,
    mlp_gain=lambda layer: layer.cross_attn_mlp_gate.tanh() if hasattr(layer, "cross_attn") else None,
)
LAYOUTS = (LLAMA, GEMMA, COHERE)  # what a text model without a row is matched against

_CLIP = Stack(
    types=("clip_vision_model", "siglip_vision_model", "siglip2_vision_model", "idefics3_vision", "smolvlm_vision"),
    layers=("encoder.layers",),
    o="out_proj",
    mid="layer_norm2",
    down="fc2",
)
_PIXTRAL = Stack(
    types=("pixtral",), layers=("transformer.layers",), attn=("attention",), mid="ffn_norm", mlp="feed_forward"
)
_INTERNVL = Stack(
    types=("internvl_vision",),
    layers=("encoder.layer",),
    attn=("attention",),
    o="projection_layer",
    attn_gain=lambda layer: layer.lambda_1,
    mid="layernorm_after",
    down="fc2",
    mlp_gain=lambda layer: layer.lambda_2,
)
_LLAMA4_VISION = Stack(types=("llama4_vision_model",), layers=("model.layers",), down="fc2")
_MLLAMA_VISION = Stack(
    types=("mllama_vision_model",),
    layers=("transformer.layers", "global_transformer.layers"),
    attn_gain=lambda layer: layer.gate_attn.tanh() if layer.is_gated else None,
    down="fc2",
    mlp_gain=lambda layer: layer.gate_ffn.tanh() if layer.is_gated else None,
)
_GEMMA4_VISION = replace(
    GEMMA, types=("gemma4_vision",), layers=("encoder.layers",), post_at="output",
    q="q_proj.linear", k="k_proj.linear", v="v_norm", o="o_proj.linear",
)  # fmt: skip
_QWEN_VISION = Stack(
    types=("qwen2_5_vl_vision", "qwen2_5_vl", "glm4v_vision", "glm4v", "glm4v_moe_vision", "glm4v_moe"),
    layers=("blocks",),
    attn=("attn",),
    q="qkv",
    k="qkv",
    v="qkv",
    qkv=True,
    o="proj",
    mid="norm2",
    windows="cu_seqlens",
)


def _by_type(*stacks: Stack) -> dict[str, Stack]:
    return {kind: stack for stack in stacks for kind in stack.types}


TEXT = _by_type(LLAMA, GEMMA, COHERE, _PHI3, _GLM4V, _QWEN3_5, _GEMMA4, _LLAMA4, _LFM2, _MLLAMA)
VISION = _by_type(
    _CLIP,
    _PIXTRAL,
    _INTERNVL,
    _LLAMA4_VISION,
    _MLLAMA_VISION,
    _GEMMA4_VISION,
    _QWEN_VISION,
    replace(_QWEN_VISION, types=("qwen2_vl_vision", "qwen2_vl"), down="fc2"),
    replace(
        _QWEN_VISION,
        types=(
            "qwen3_vl_vision",
            "qwen3_vl",
            "qwen3_vl_moe_vision",
            "qwen3_vl_moe",
            "qwen3_5_vision",
            "qwen3_5",
            "qwen3_5_moe_vision",
            "qwen3_5_moe",
        ),
        down="linear_fc2",
    ),
)

_QWEN_NEEDS = {
    "pixel_values": ("image_grid_thw", "mm_token_type_ids"),
    "pixel_values_videos": ("video_grid_thw", "mm_token_type_ids"),
}
_GEMMA4_NEEDS = {
    "pixel_values": ("image_position_ids", "mm_token_type_ids"),
    "pixel_values_videos": ("video_position_ids", "mm_token_type_ids"),
}
_BOTH_WAYS_NEEDS = {"pixel_values": ("token_type_ids",)}  # without it pictures are read causally
_MLLAMA_NEEDS = {"pixel_values": ("aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask")}


def _rows() -> Iterable[Row]:
    for kind in ("llava", "llava_next", "llava_onevision", "internvl", "mistral3"):
        yield Row(kind, feature_layer="vision_feature_layer")
    for kind in ("gemma3", "paligemma"):
        yield Row(kind, needs=_BOTH_WAYS_NEEDS)
    yield Row("cohere2_vision")
    qwen = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
    for kind in (*qwen, "glm4v", "glm46v", "glm4v_moe"):
        yield Row(kind, vision="model.visual", projector="model.visual", needs=_QWEN_NEEDS)
    for kind in ("idefics3", "smolvlm"):
        yield Row(kind, text="model.text_model", vision="model.vision_model", projector="model.connector")
    yield Row("gemma4", projector="model.embed_vision", needs=_GEMMA4_NEEDS)
    yield Row(
        "llama4",
        text="language_model.model",
        vision="vision_model",
        projector="multi_modal_projector",
        unembed="language_model.lm_head",
    )
    yield Row("lfm2_vl", projector="model", apart=True)
    yield Row("mllama", vision="model.vision_model", needs=_MLLAMA_NEEDS)


ROWS = {row.model_type: row for row in _rows()}
