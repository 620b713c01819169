"""The classes that describe an architecture: module paths of a transformer, of a whole model, and both together.

A ``Stack`` says where one kind of transformer has its activation points, a ``Row`` where a multimodal architecture has
its stacks, and a ``Family`` is a row with its stacks. The tables are in ``rows``; ``families`` finds a model's family.
This file names no architecture and touches no model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Stack:
    """Module paths of one kind of transformer.

    ``layers`` and ``norm`` are relative to ``root``; ``q``, ``k``, ``v``, ``o`` to a layer's attention module;
    ``up``, ``gate`` and ``down`` to its feed-forward; the others to the layer. Where ``up`` and ``gate`` are one
    projection, both are the same path, and the gate comes first.

    Attributes:
        types: the ``model_type`` of the configs this describes.
        root: path of the transformer in the whole model, set from the row.
        layers: the module lists that hold the layers, one after the other.
        embed: the embedding module, if embeddings do not enter ``root`` as ``inputs_embeds``.
        attn: names of the attention module; a layer has one of them.
        cross: which of these names attends to a memory of visual tokens outside the sequence.
        headless: names of modules that replace attention and have no heads -> what they are.
        values: the value projection, if ``v`` is a module after it.
        qkv: whether ``q``, ``k`` and ``v`` are one projection: all query heads, then key heads, then value heads.
        gated: whether ``q`` computes each head's query followed by a gate of the same size.
        attn_out: module whose output is added to the stream, if it is not the attention module (a post-norm).
        mlp_out: the same for the feed-forward.
        attn_gain: function of a layer: what attention's output is multiplied by before it is added (layer scale, gate).
        mlp_gain: the same for the feed-forward.
        mid: the norm that reads the stream between attention and feed-forward.
        post_at: where ``hook_resid_post`` is taken: at the layer's "output", or at the "next" module's input, so that
            what a model adds between layers is included.
        windows: keyword with the boundaries of attention windows, if a layer calls attention once per window.
        absent: point -> why a layer may lack it. A module missing without a reason is an error in the row.
    """

    types: tuple[str, ...]
    root: str = ""
    layers: tuple[str, ...] = ("layers",)
    norm: str = "norm"
    embed: str = ""
    attn: tuple[str, ...] = ("self_attn",)
    cross: str = ""
    headless: Mapping[str, str] = field(default_factory=dict)
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    values: str = ""
    qkv: bool = False
    gated: bool = False
    attn_out: str = ""
    attn_gain: Callable[[Any], Tensor | None] | None = None
    mid: str = "post_attention_layernorm"
    mlp: str = "mlp"
    up: str = "up_proj"
    gate: str = "gate_proj"
    down: str = "down_proj"
    mlp_out: str = ""
    mlp_gain: Callable[[Any], Tensor | None] | None = None
    post_at: str = "output"
    windows: str = ""
    absent: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One architecture: ``config.model_type``, the roots of its two stacks and what joins them."""

    model_type: str
    text: str = "model.language_model"
    vision: str = "model.vision_tower"
    projector: str = "model.multi_modal_projector"
    apart: bool = False  # the projector sees one image at a time; ``projector`` then has ``get_image_features``
    unembed: str = "lm_head"
    feature_layer: str = ""  # config field that selects the vision layer whose output is used
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # tensor -> tensors it needs


@dataclass(frozen=True)
class Family:
    """A row with its stacks: what is known about one model."""

    model_type: str
    text: Stack
    vision: Stack | None
    projector: str
    apart: bool = False
    feature_layer: str = ""
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unembed: str = "lm_head"

    @property
    def final_norm(self) -> str:
        return f"{self.text.root}.{self.text.norm}"
