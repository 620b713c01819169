"""A byte-level tokenizer of 512 entries that serves every tiny model, made on the spot: no file, no hub.

    token_id("<image>")          # the id every tiny config uses
    tokenizer(bos_token="<s>")

``SPECIAL`` holds the placeholders and marks of all families, and a special token's id is its index there. It is not a
good tokenizer: any text can be written, but mostly byte by byte.
"""

import functools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB = 512
# New ones go to the end: tiny models know tokens by their index.
SPECIAL = (
    *("<pad>", "<s>", "<image>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    *("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
    *("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
    *("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"),
    *("<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    *("<|image|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|header_start|>", "<|header_end|>", "<|eot|>"),
    *("<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>"),
    *("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>"),
    *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    *("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|video|>"),
    *("<|user|>", "<|assistant|>", "<|img_thumbnail|>", "<|image>", "<image|>", "<|turn>", "<turn|>"),
    *(f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5)),
    *(f"<|img_row_{row}_col_{col}|>" for row in range(1, 4) for col in range(1, 4)),
)
_CORPUS = ("Which digit is in the red frame? user assistant USER: ASSISTANT: seconds What is shown", "0123456789 <0.5>")


def token_id(token: str) -> int:
    """The id of a special token."""
    return SPECIAL.index(token)


@functools.cache
def _trained() -> str:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(_CORPUS * 4, trainer)
    return made.to_str()


def tokenizer(**names: str) -> PreTrainedTokenizerFast:
    """The tokenizer; ``names`` are named special tokens such as ``bos_token`` or a family's ``boi_token``."""
    made = Tokenizer.from_str(_trained())
    given = {"pad_token": "<pad>", "eos_token": "<|im_end|>", **names}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, additional_special_tokens=list(SPECIAL[1:]), clean_up_tokenization_spaces=False, **given
    )
