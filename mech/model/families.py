"""A row of data for each architecture: where in the Hugging Face model every activation is.

A family is the pair of a text stack and a vision stack plus the few modules between them, written as module paths. To
open a new architecture, add one ``Family`` to ``FAMILIES``: nothing else in the engine names an architecture. Two
questions decide whether a row is enough:

* Does every attention layer of both stacks call transformers' ``AttentionInterface``? (All current ones do.)
* Is the tensor that enters the second norm the very tensor that is added back after the MLP? (True for every pre-norm
  layer written as ``residual = hidden_states; hidden_states = norm(hidden_states)``.)

This file does not know how a point is hooked (``seams.py``) nor how pictures become tensors (``mech.inputs``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mech.errors import InputError, UnsupportedModel


@dataclass(frozen=True)
class Stack:
    """Module paths of one transformer. Paths after ``layers`` are relative to a layer.

    ``post_at`` says where ``hook_resid_post`` is taken: at the layer's "output", or at the "next" module's input, so
    that what a model adds between layers is included. ``windows`` is the keyword that carries the boundaries of
    attention windows where a layer calls attention once for each of them.
    """

    types: tuple[str, ...]
    root: str
    layers: str
    attn: str = "self_attn"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str = ""
    o: str = "self_attn.o_proj"
    mid: str = "post_attention_layernorm"
    mlp: str = "mlp"
    down: str = "mlp.down_proj"
    post_at: str = "output"
    windows: str = ""


@dataclass(frozen=True)
class Family:
    """One architecture: ``config.model_type``, its two stacks and what joins them."""

    model_type: str
    text: Stack
    vision: Stack
    projector: str
    final_norm: str
    unembed: str = "lm_head"
    feature_layer: str = ""  # config field that selects the vision layer whose output is used
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # tensor -> tensors it is useless without


_LLAMA_LIKE = Stack(
    types=("llama", "mistral", "qwen2", "qwen3", "qwen2_5_vl_text", "qwen3_vl_text"),
    root="model.language_model",
    layers="model.language_model.layers",
    post_at="next",
)
_CLIP = Stack(
    types=("clip_vision_model",),
    root="model.vision_tower",
    layers="model.vision_tower.encoder.layers",
    o="self_attn.out_proj",
    mid="layer_norm2",
    down="mlp.fc2",
)
_QWEN_VISION: dict[str, Any] = {
    "root": "model.visual",
    "layers": "model.visual.blocks",
    "attn": "attn",
    "q": "attn.qkv",
    "k": "attn.qkv",
    "v": "attn.qkv",
    "qkv": "attn.qkv",
    "o": "attn.proj",
    "mid": "norm2",
    "windows": "cu_seqlens",
}
_QWEN_NEEDS = {
    "pixel_values": ("image_grid_thw", "mm_token_type_ids"),
    "pixel_values_videos": ("video_grid_thw", "mm_token_type_ids"),
}
_FINAL_NORM = "model.language_model.norm"

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llava",
            text=_LLAMA_LIKE,
            vision=_CLIP,
            projector="model.multi_modal_projector",
            final_norm=_FINAL_NORM,
            feature_layer="vision_feature_layer",
        ),
        Family(
            "qwen2_5_vl",
            text=_LLAMA_LIKE,
            vision=Stack(types=("qwen2_5_vl_vision", "qwen2_5_vl"), down="mlp.down_proj", **_QWEN_VISION),
            projector="model.visual",
            final_norm=_FINAL_NORM,
            needs=_QWEN_NEEDS,
        ),
        Family(
            "qwen3_vl",
            text=_LLAMA_LIKE,
            vision=Stack(types=("qwen3_vl_vision", "qwen3_vl"), down="mlp.linear_fc2", **_QWEN_VISION),
            projector="model.visual",
            final_norm=_FINAL_NORM,
            needs=_QWEN_NEEDS,
        ),
    )
}

RECIPE = (
    "add a Family row to FAMILIES in mech/model/families.py: config.model_type, the module paths of the text layers, "
    "the vision layers, the projector and the final norm; then run tests/test_engine_points.py on a tiny model of it"
)


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a model, under the names TransformerLens gives them; ``vision_*`` for the vision stack."""

    family: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    vocab: int
    vision_layers: int
    vision_heads: int
    vision_d_model: int
    vision_d_head: int
    vision_d_mlp: int
    attn_only: bool = False
    normalization_type: str = "RMS"

    @property
    def n_key_value_heads(self) -> int:
        return self.n_kv_heads

    @property
    def d_vocab(self) -> int:
        return self.vocab


def family_of(config: Any) -> Family:
    """The row for a Hugging Face config.

    Raises:
        UnsupportedModel: no row has this architecture, or its text or vision model is not one the row was made for.
    """
    kind = getattr(config, "model_type", None)
    family = FAMILIES.get(kind or "")
    if family is None:
        raise UnsupportedModel(f"no family row for the architecture {kind!r}", f"one of {sorted(FAMILIES)}", RECIPE)
    for stack, sub in ((family.text, "text_config"), (family.vision, "vision_config")):
        inner = getattr(getattr(config, sub, None), "model_type", None)
        if inner not in stack.types:
            raise UnsupportedModel(
                f"the {sub} of this {kind!r} model is {inner!r}", f"one of {sorted(stack.types)}", RECIPE
            )
    return family


def sizes(config: Any, family: Family) -> ModelConfig:
    """Read every size from the Hugging Face config."""
    text, vision = config.text_config, config.vision_config
    heads = text.num_attention_heads
    vision_heads = getattr(vision, "num_attention_heads", None) or vision.num_heads
    return ModelConfig(
        family=family.model_type,
        n_layers=text.num_hidden_layers,
        n_heads=heads,
        n_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        d_model=text.hidden_size,
        d_head=getattr(text, "head_dim", None) or text.hidden_size // heads,
        d_mlp=text.intermediate_size,
        vocab=text.vocab_size,
        vision_layers=getattr(vision, "num_hidden_layers", None) or vision.depth,
        vision_heads=vision_heads,
        vision_d_model=vision.hidden_size,
        vision_d_head=vision.hidden_size // vision_heads,
        vision_d_mlp=vision.intermediate_size,
    )


def live_vision_layers(config: Any, family: Family) -> int:
    """How many vision layers, from the first on, can reach the logits.

    LLaVA-1.5 takes the output of the last layer but one (``vision_feature_layer = -2``): the last layer runs, and
    what it computes is dropped.
    """
    layers = sizes(config, family).vision_layers
    if not family.feature_layer:
        return layers
    chosen = getattr(config, family.feature_layer)
    indices = [chosen] if isinstance(chosen, int) else list(chosen)
    # Index 0 is the input of layer 0, index l + 1 the output of layer l.
    return max(index % (layers + 1) for index in indices)


def module_at(model: nn.Module, path: str, family: Family) -> nn.Module:
    """The module at a row's path.

    Raises:
        UnsupportedModel: this model has no such module, so the row does not describe it.
    """
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise UnsupportedModel(
            f"{type(model).__name__} has no module {path!r}",
            f"the module paths of the row {family.model_type!r}",
            RECIPE,
        ) from None


def check_tensors(given: Mapping[str, Any], family: Family) -> None:
    """Refuse tensors that the model would accept and silently take for something else.

    Raises:
        InputError: no tokens, or visual tensors without the companions that give their tokens 2-D positions.
    """
    if given.get("input_ids") is None:
        raise InputError("no input_ids", "Inputs from model.inputs(...), or input_ids=...")
    for tensor, companions in family.needs.items():
        absent = [name for name in companions if given.get(name) is None]
        if given.get(tensor) is not None and absent and given.get("position_ids") is None:
            raise InputError(
                f"{tensor} without {', '.join(absent)}",
                "both: without them the model falls back to one-dimensional positions and says nothing",
                "build inputs with model.inputs(...)",
            )
