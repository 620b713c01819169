"""Questions in any script: the layout's tokens joined give the question back, whatever kind of tokenizer wrote it."""

import functools
import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mech.inputs import Processor, build
from mech.reference import tiny, tiny_processors
from mech.reference.tiny_tokenizer import SPECIAL

CORPUS = ("Which digit is in the red frame? USER: ASSISTANT: user assistant", "éclair café", "0123456789") * 4
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
QUESTIONS = {
    "chinese": "写真には何がありますか",
    "emoji": "what \U0001f600 is \U0001f468\u200d\U0001f469 it?",
    "accents": "éclair café naïve Größe",
    "combining": "e\u0301clair ﬁne Ⅳ",
    "arabic": "شماره چیست؟",
    "wide space": "写真　何",
    "white space": "tab\tand\nnew  line",
    "around": " leading and trailing ",
}


def byte_level():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def trimmed():
    """Offsets without the spaces, as GPT-2 has them."""
    made = byte_level()
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    return made


def byte_fallback(**parts):
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    for name, part in parts.items():
        setattr(made, name, part)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*SPECIAL, "<unk>", *BYTES], limit_alphabet=40, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def llama():
    made = byte_fallback(
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def mistral():
    return byte_fallback(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False))


def gemma():
    return byte_fallback(
        normalizer=normalizers.Replace(" ", "▁"), pre_tokenizer=pre_tokenizers.Split(" ", "merged_with_previous")
    )


def unigram(fallback=False):
    made = Tokenizer(models.Unigram())
    made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=450, unk_token="<unk>", special_tokens=[*SPECIAL, "<unk>", *BYTES], show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    described = json.loads(made.to_str())
    described["model"]["byte_fallback"] = fallback
    return Tokenizer.from_str(json.dumps(described))


KINDS = {
    "byte-level": byte_level,
    "byte-level, trimmed": trimmed,
    "byte fallback behind a normalizer": llama,
    "byte fallback behind a metaspace": mistral,
    "byte fallback without a prefix": gemma,
    "unigram": unigram,
    "unigram with byte fallback": lambda: unigram(True),
}


@functools.cache
def processor(kind, family):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](), additional_special_tokens=list(SPECIAL[1:]), pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    images = tiny_processors.image_processor(family)
    return Processor.from_hf(config=tiny.MODELS[family](), tokenizer=tokenizer, image_processor=images)


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=list(QUESTIONS))
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_tokens_of_the_question_joined_are_the_question(kind, family, question):
    layout = build(processor(kind, family), question, images=[tiny_processors.noise(16, 16)]).layout
    positions = layout.positions("question").tolist()
    # A token at either end may hold white space of the template.
    assert "".join(layout.tokens[position] for position in positions).strip() == question.strip()
    assert positions == list(range(positions[0], positions[-1] + 1))
    words = layout.words()
    assert sorted(position for word in words.values() for position in word) == positions
    # A token may hold several words; a word is never without a letter, and none is cut.
    assert all(word.strip() for word in words) and " ".join(words).split() == question.split()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "unigram" not in kind])
def test_every_byte_of_a_character_belongs_to_the_question(kind):
    made, question = processor(kind, "llava"), "何 \U0001f600é"
    inputs = build(made, question, images=[tiny_processors.noise(16, 16)])
    positions = inputs.layout.positions("question")
    said = made.tokenizer.decode(inputs.tensors["input_ids"][0, positions])
    assert said.strip() == question


def test_a_part_of_a_character_is_described_as_one():
    picture = tiny_processors.noise(16, 16)
    layout = build(processor("byte-level", "llava"), "何?", images=[picture], answer="é７").layout
    assert "".join(layout.tokens[position] for position in layout.spans["answer"]).strip() == "é７"
    first = layout.positions("question")[0]
    assert layout.tokens[first : first + 4] == ("", "", "何", "?")
    assert layout.describe(first) == "a part of '何'" and layout.describe(first + 2) == "'何'"
