"""Weights written by hand into real architectures: what ``planted`` is made with.

A model here computes with *named subspaces* of the residual stream (``SPACES``) and *slots* of a head's dimensions
(``SLOTS``), both one-hot. A ``Wire`` joins one to the other with a gain, a ``Head`` is four lists of wires, and the MLP
of layer 1 can add the product ``left * right`` to ``answer``. ``grow`` builds the Hugging Face model around them:

    grow("llava", [Head(0, 0, query=(Wire("ask", "match", HARD),), key=(Wire("cell", "match"),), ...)])

Why the numbers come out analytically despite everything in an architecture:

* Norms. The dimension ``constant`` of every token is ``LOUD`` = 4096, so that the root mean square of a token is that
  constant to ``|content|^2 / (2 LOUD^2)``, below 1e-6. The norms' weights undo it: after a norm ``constant`` reads
  1, and content is unchanged. The ``LayerNorm`` of CLIP is neutralised in the same way.
* Rotary positions. Frequencies are 1, 0.1, 0.01, ...: pairs from the sixth on turn by less than 3e-4 within 30
  positions and carry content; the second pair (0.1 per position) encodes distance on purpose.
* Softmax. ``HARD`` = 40 between what matches and what does not; every head falls back to the first token at 20.
* Pixels. A cell of the picture is two colours, corners of the RGB cube; the projector's GELU, driven with gain
  ``STEEP``, turns each into one exact 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, sin, sqrt
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
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
)

from mech.inputs import Processor

COLOURS: tuple[str, ...] = ("black", "blue", "green", "cyan", "red", "magenta", "yellow", "white")
SIDE, CELL = 4, 8  # cells per side of the picture, pixels per side of a cell
LAYERS, HEADS, D_MODEL, D_HEAD = 2, 4, 128, 32
LOUD, HARD, LOGIT, STEEP = 4096.0, 40.0, 10.0, 100.0
PACE = 0.1  # radians per position of the rotary pair that encodes distance

# One-hot subspaces of the residual stream; those of colours have a dimension for each.
_SIZES = {
    "constant": 1,  # LOUD at every token
    "first": 1,  # the first token: heads that find nothing attend to it
    "word": 1,  # a colour's word
    "ask": 8,  # the colour a word names
    "cell": 8,  # the left colour of a cell: its name
    "fill": 8,  # the right colour of a cell: what is asked for
    "asked": 8,  # the rest are written by heads
    "before": 8,
    "left": 8,
    "right": 8,
    "answer": 8,
    "unread": 8,
    "seen": 1,
}
SPACES: dict[str, slice] = {}
for _name, _size in _SIZES.items():
    _start = max((space.stop for space in SPACES.values()), default=0)
    SPACES[_name] = slice(_start, _start + _size)

_SLOW = [*range(5, 16), *range(21, 32)]  # a pair is (i, i + d_head / 2)
SLOTS: dict[str, list[int]] = {
    "match": _SLOW[:8],
    "sink": _SLOW[8:9],
    "near": [1],
    "far": [1 + D_HEAD // 2],
    "colour": list(range(8)),  # values are not rotated
    "flag": [8],
}
SPECIAL = ("<pad>", "<s>", "<image>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<end>")
WORDS = (*SPECIAL, "<answer>", "none", "which", "colour", "?", *COLOURS)


class Wire(NamedTuple):
    """From a subspace to a slot (or back, in ``write``); onto a single dimension it is the sum of the subspace."""

    space: str
    slot: str
    gain: float = 1.0


@dataclass(frozen=True)
class Head:
    """One hand-set attention head; scores are ``query . key``, the division by ``sqrt(d_head)`` undone."""

    layer: int
    head: int
    query: tuple[Wire, ...] = ()
    key: tuple[Wire, ...] = ()
    value: tuple[Wire, ...] = ()
    write: tuple[Wire, ...] = ()


# A head that finds nothing attends to the first token, which holds no colour.
FALLBACK_QUERY, FALLBACK_KEY = Wire("constant", "sink", HARD / 2), Wire("first", "sink")


def distance(gain: float, shift: int = 0) -> tuple[Wire, Wire]:
    """A query that scores ``gain * cos(PACE * (distance - shift))`` against ``Wire("constant", "near")``."""
    return (
        Wire("constant", "near", gain * cos(PACE * shift)),
        Wire("constant", "far", -gain * sin(PACE * shift)),
    )


def processor(family: str, config: Any, answer_mark: bool) -> Processor:
    """Whole words as tokens, cells of ``CELL`` pixels; ``answer_mark`` puts ``<answer>`` after the question."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", additional_special_tokens=list(WORDS[1:9])
    )
    # Grey (128) becomes 0, the levels 1 and 255 become -1 and 1.
    pixels: dict[str, Any] = {"image_mean": [128 / 255] * 3, "image_std": [127 / 255] * 3}
    side = SIDE * CELL
    if family == "llava":
        shown = "<image>"
        images = CLIPImageProcessorPil(size={"height": side, "width": side}, do_center_crop=False, **pixels)
    else:
        shown = "<|vision_start|><|image_pad|><|vision_end|>"
        edges = {"shortest_edge": side * side, "longest_edge": side * side}
        images = Qwen2VLImageProcessorPil(patch_size=CELL // 2, size=edges, **pixels)
    template = (
        "<s>{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}" + shown + "{% else %}"
        "{{ part['text'] }}{% endif %}{% endfor %}" + (" <answer>" if answer_mark else "")
    )
    return Processor.from_hf(config=config, tokenizer=tokenizer, image_processor=images, chat_template=template)


def grow(
    family: str, heads: Sequence[Head], gate: float = 0.0, kv_heads: int = HEADS, dtype: torch.dtype = torch.float32
) -> Any:
    """A Hugging Face model (``"llava"`` or ``"qwen2_5_vl"``) with these heads; everything else in it is silent.

    ``gate`` is the gain of the product ``left * right`` in the MLP of layer 1.
    """
    model = _blank(family, kv_heads)
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    text = model.model.language_model
    norms = [
        text.norm,
        *(norm for layer in text.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)),
    ]
    for norm in norms:
        norm.weight.fill_(LOUD / sqrt(D_MODEL))
        norm.weight[SPACES["constant"]] = 1 / sqrt(D_MODEL)
    _words(text.embed_tokens.weight, model.lm_head.weight)
    for head in heads:
        _attend(text.layers[head.layer].self_attn, head, HEADS // kv_heads)
    mlp = text.layers[1].mlp
    # silu(x) is x where x is large and 0 at 0: with ones and zeros the gated unit is the product.
    mlp.gate_proj.weight[:8, SPACES["left"]] = HARD * torch.eye(8)
    mlp.up_proj.weight[:8, SPACES["right"]] = torch.eye(8) / HARD
    mlp.down_proj.weight[SPACES["answer"], :8] = gate * torch.eye(8)
    (_see_llava if family == "llava" else _see_qwen)(model.model)
    return model.to(dtype).eval().requires_grad_(True)


def _blank(family: str, kv_heads: int) -> Any:
    ids = {word: index for index, word in enumerate(WORDS)}
    rope = {"rope_type": "default", "rope_theta": PACE ** -(D_HEAD / 2)}
    text: dict[str, Any] = dict(
        vocab_size=len(WORDS), hidden_size=D_MODEL, intermediate_size=16, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=kv_heads, max_position_embeddings=512,
        pad_token_id=ids["<pad>"], bos_token_id=None, eos_token_id=ids["<end>"], tie_word_embeddings=False,
    )  # fmt: skip
    if family == "llava":
        vision = CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=SIDE * CELL,
            patch_size=CELL,
        )  # fmt: skip
        return LlavaForConditionalGeneration(
            LlavaConfig(
                text_config=LlamaConfig(**text, rope_parameters=rope),
                vision_config=vision,
                image_token_index=ids["<image>"],
                image_seq_length=SIDE**2,
                vision_feature_layer=-1,
                tie_word_embeddings=False,
            )
        )
    merged = dict(
        depth=1, hidden_size=8, intermediate_size=16, num_heads=1, patch_size=CELL // 2, spatial_merge_size=2,
        temporal_patch_size=2, window_size=SIDE * CELL, fullatt_block_indexes=[0], out_hidden_size=D_MODEL,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": {**rope, "mrope_section": [6, 5, 5]}},
            vision_config=merged,
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=False,
        )
    )


def _words(embed: Tensor, unembed: Tensor) -> None:
    ids = {word: index for index, word in enumerate(WORDS)}
    named = [ids[colour] for colour in COLOURS]
    embed[:, SPACES["constant"]] = LOUD
    embed[ids["<s>"], SPACES["first"]] = 1
    embed[named, SPACES["word"]] = 1
    embed[named, SPACES["ask"]] = torch.eye(8)
    unembed[named, SPACES["answer"]] = LOGIT * torch.eye(8)
    # Said where no colour is found: halfway between a colour's logit with and without evidence.
    unembed[ids["none"], SPACES["constant"]] = LOGIT / 2


def _attend(attention: Any, head: Head, group: int) -> None:
    query, kv = head.head * D_HEAD, head.head // group * D_HEAD
    reads = (
        (attention.q_proj, query, head.query),
        (attention.k_proj, kv, head.key),
        (attention.v_proj, kv, head.value),
    )
    for projection, start, wires in reads:
        gain = sqrt(D_HEAD) if projection is attention.q_proj else 1.0
        for wire in wires:
            rows, space = [start + slot for slot in SLOTS[wire.slot]], SPACES[wire.space]
            projection.weight[rows, space] = gain * wire.gain * _joint(len(rows), space)
    for wire in head.write:
        columns, space = [query + slot for slot in SLOTS[wire.slot]], SPACES[wire.space]
        attention.o_proj.weight[space, columns] = wire.gain * _joint(len(columns), space).T


def _joint(slots: int, space: slice) -> Tensor:
    size = space.stop - space.start
    return torch.eye(size) if slots == size else torch.ones(slots, size)


def _corners() -> Tensor:
    """The RGB signs of the colours, in the order of their names."""
    return torch.tensor([[1.0 if index >> bit & 1 else -1.0 for bit in (2, 1, 0)] for index in range(8)])


def _colours(linear_in: Any, linear_out: Any, left: list[int], right: list[int]) -> None:
    """RGB to one-hot: the product with a corner's signs is 3 there, at most 1 elsewhere and 0 in grey.

    Two units for each colour, one active above 2 and one above 2.5: their difference is 0 or 1 and nothing in between,
    so that rounding in the vision tower's norms does not come through.
    """
    for first, columns, space in ((0, left, "cell"), (8, right, "fill")):
        for units, threshold, sign in ((first, 2.0, 1), (first + 16, 2.5, -1)):
            here = slice(units, units + 8)
            linear_in.weight[here, columns] = STEEP * _corners()
            linear_in.bias[here] = -STEEP * threshold
            linear_out.weight[SPACES[space], here] = sign / (0.5 * STEEP) * torch.eye(8)
    linear_out.bias[SPACES["constant"]] = LOUD


def _see_llava(inner: Any) -> None:
    tower, projector = inner.vision_tower, inner.multi_modal_projector
    kernel = tower.embeddings.patch_embedding.weight  # [out, rgb, y, x]
    half = CELL // 2
    for colour in range(3):
        for at, columns in ((0, slice(0, half)), (3, slice(half, CELL))):
            kernel[at + colour, colour, :, columns] = 1 / (CELL * half)
            # The negative as well, so that LayerNorm has no mean to subtract.
            kernel[6 + at + colour, colour, :, columns] = -1 / (CELL * half)
    tower.embeddings.position_embedding.weight[:, 14] = LOUD
    tower.embeddings.position_embedding.weight[:, 15] = -LOUD
    tower.pre_layrnorm.weight.fill_(LOUD / sqrt(8))
    _colours(projector.linear_1, projector.linear_2, [0, 1, 2], [3, 4, 5])


def _see_qwen(inner: Any) -> None:
    kernel, merger = inner.visual.patch_embed.proj.weight, inner.visual.merger  # [out, rgb, frame, y, x]
    width = len(kernel)
    for colour in range(3):
        kernel[colour, colour] = 1 / kernel[0, 0].numel()
    # A patch of one colour has a root mean square of sqrt(3 / width), a grey one is zero and stays so.
    merger.ln_q.weight.fill_(sqrt(3 / width))
    # Patches of a cell come as upper left, upper right, lower left, lower right.
    _colours(merger.mlp[0], merger.mlp[2], [0, 1, 2], [width, width + 1, width + 2])
