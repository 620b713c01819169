"""The recipes of the reference models: architecture, domains, tokenizer, image processor, length of training.

All are real Hugging Face architectures, only small: what runs on them runs on their full-size counterparts. A recipe is
data; the loop that follows it is ``mech.reference.train``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mech.data import haystacks

MEAN, STD = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]
PATCH, MERGE, FRAMES = 8, 2, 2  # of the Qwen-VL family: a visual token is 16 x 16 pixels of two frames
CAPTION = "List all that can be read."


@dataclass(frozen=True)
class Recipe:
    """How one reference model is made.

    ``steps`` counts the ``tower_steps`` in which the vision tower is pretrained. The weights after each of the steps in
    ``keep`` (multiples of a hundred) ship with the final ones. A recipe with a ``start`` continues from the weights of
    that model; with ``longest``, its scenes grow to that many visual tokens.
    """

    family: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    domains: tuple[str, ...]
    steps: int
    tower_steps: int
    batch: int = 16
    tower_rate: float = 3e-3
    peak_rate: float = 2e-3
    seed: int = 0
    weights: Mapping[str, float] = field(default_factory=lambda: {"pages": 0.6})
    keep: tuple[int, ...] = field(default=(), repr=False)
    start: str = ""
    longest: int = 0
    # Rotations slow enough that half of a head's sixteen dimensions can match content at any distance in the scene.
    rope_theta: float = 1e6


# Initial weights are large enough that attention does not start out even.
_TEXT = dict(max_position_embeddings=2048, hidden_size=128, intermediate_size=256, head_dim=16, initializer_range=0.06)
_CLIP = dict(image_size=96, patch_size=16, hidden_size=96, intermediate_size=256, num_attention_heads=4)
_QWEN_VISION = dict(
    depth=3, hidden_size=96, intermediate_size=192, num_heads=4, patch_size=PATCH, spatial_patch_size=PATCH,
    spatial_merge_size=MERGE, temporal_patch_size=FRAMES, in_channels=3, window_size=96, fullatt_block_indexes=[2],
    out_hidden_size=128,
)  # fmt: skip
_LLAVA_S = Recipe(
    family="llava",
    text=dict(_TEXT, num_hidden_layers=6, num_attention_heads=8),
    vision=dict(_CLIP, num_hidden_layers=3),
    domains=("grounding", "documents", "pages"),
    tower_steps=2000,
    steps=3600,
)
_QWEN_S = Recipe(
    family="qwen2_5_vl",
    text=dict(_TEXT, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4),
    vision=_QWEN_VISION,
    domains=("grounding", "documents", "pages", "video"),
    tower_steps=700,
    steps=1500,
)

RECIPES = {
    "llava-s": _LLAVA_S,
    "llava-m": replace(_LLAVA_S, text=dict(_TEXT, num_hidden_layers=8, num_attention_heads=16), steps=3500),
    "llava-s-seed1": replace(_LLAVA_S, seed=1, keep=(2200, 2300, 2500)),
    "qwen-s": _QWEN_S,
    "qwen-long": replace(
        _QWEN_S,
        text=dict(_QWEN_S.text, max_position_embeddings=8192),
        start="qwen-s",
        longest=2304,
        rope_theta=1e8,  # slower still, for longer distances, as in arXiv 2308.12950
        tower_steps=0,
        steps=400,
        peak_rate=1e-3,
        seed=2,
        weights={"grounding": 0.3, "documents": 0.3},
    ),
}

_LLAVA_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = {
    "llava": ("<pad>", "<|end|>", "<image>", "<|user|>", "<|assistant|>"),
    "qwen2_5_vl": (
        "<pad>",
        "<|im_end|>",
        "<|image_pad|>",
        "<|im_start|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|video_pad|>",
    ),
}


def tokenizer(recipe: Recipe):
    """A byte-level BPE over the haystacks' sentences: any text can be written, and their words are single tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    # Digits stand alone, so that an answer is the same token wherever it is written.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    keys = [*haystacks.COLOURS, *haystacks.NAMES]
    corpus = [q.format(key=k) for questions in haystacks.QUESTIONS.values() for q in questions for k in keys]
    corpus += [f" {key}7" for key in keys] + [CAPTION, "user\n", "assistant\n", "<0.5 seconds>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2048, initial_alphabet=sorted(alphabet), show_progress=False)
    bpe.train_from_iterator(corpus, trainer)
    family = recipe.family
    pad, end, image, *others = _SPECIAL[family]
    bpe.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL[family]])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=pad,
        eos_token=end,
        additional_special_tokens=[image, *others],
        padding_side="left",
        model_max_length=recipe.text["max_position_embeddings"],
        chat_template=_LLAVA_TEMPLATE if family == "llava" else _QWEN_TEMPLATE,
    )


def image_processor(family: str):
    """The family's own image processor at the reference models' size, in its torchvision-free form."""
    if family == "llava":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        size = {"height": haystacks.SIDE, "width": haystacks.SIDE}
        return CLIPImageProcessorPil(size=size, do_center_crop=False, image_mean=MEAN, image_std=STD)
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=FRAMES,
        size={"shortest_edge": 32 * 32, "longest_edge": 256 * 256},
        image_mean=MEAN,
        image_std=STD,
    )


def untrained(recipe: Recipe, words) -> Any:
    """The model of a recipe with fresh weights, for the tokenizer ``words``."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
    )

    ids = {token: words.convert_tokens_to_ids(token) for token in _SPECIAL[recipe.family]}
    pad, end = _SPECIAL[recipe.family][:2]
    text = dict(recipe.text, vocab_size=len(words), pad_token_id=ids[pad],
                eos_token_id=ids[end], bos_token_id=None, tie_word_embeddings=True)  # fmt: skip
    rope = dict(rope_type="default", rope_theta=recipe.rope_theta)
    torch.manual_seed(recipe.seed)
    if recipe.family == "llava":
        config = LlavaConfig(
            tie_word_embeddings=True,
            vision_config=CLIPVisionConfig(**recipe.vision),
            text_config=LlamaConfig(**text, rope_parameters=rope),
            image_token_index=ids["<image>"],
            image_seq_length=(recipe.vision["image_size"] // recipe.vision["patch_size"]) ** 2,
            # The last layer: in a tower of three, LLaVA's usual -2 would leave a third of it unused.
            vision_feature_layer=-1,
        )
        model = LlavaForConditionalGeneration(config)
        # CLIP's position embeddings start at a twentieth of the patches' size: the model then does not learn which name
        # is on which line.
        torch.nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=1.0)
    else:
        config = Qwen2_5_VLConfig(
            tie_word_embeddings=True,
            vision_config=dict(recipe.vision),
            text_config=dict(text, rope_parameters=dict(rope, mrope_section=[4, 2, 2])),
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
        )
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids[end]
    model.generation_config.pad_token_id = ids[pad]
    return model
