"""``to_tokens`` and its like, as TransformerLens has them."""

import pytest
import torch

from mech.errors import InputError
from mech.model import HookedMLLM
from mech.reference import tiny, tiny_processors

TEXT = "What is here?"


@pytest.fixture(scope="module")
def model():
    return HookedMLLM.from_hf(tiny.model("llava"), tiny_processors.processor("llava"))


def test_texts_become_tokens_and_come_back(model):
    ids = model.to_tokens(TEXT)
    assert ids.tolist() == [model.tokenizer.encode(TEXT)] and ids.dtype == torch.long
    assert model.to_string(ids) == model.to_string(ids[0]) == model.to_string(ids[0].tolist()) == TEXT
    pieces = model.to_str_tokens(TEXT)
    assert "".join(pieces) == TEXT and len(pieces) == ids.shape[1] and pieces == model.to_str_tokens(ids)
    assert model.to_str_tokens([TEXT, "What"]) == [pieces, model.to_str_tokens("What")]
    assert model.to_single_str_token(model.to_single_token(pieces[0])) == pieces[0]


def test_several_texts_are_padded_to_the_longest(model):
    alone = [model.to_tokens(text)[0].tolist() for text in (TEXT, "What")]
    filler = [model.tokenizer.pad_token_id] * (len(alone[0]) - len(alone[1]))
    assert filler
    assert model.to_tokens([TEXT, "What"]).tolist() == [alone[0], alone[1] + filler]
    assert model.to_tokens([TEXT, "What"], padding_side="left").tolist() == [alone[0], filler + alone[1]]
    assert len(model.to_string(model.to_tokens([TEXT, TEXT]))) == 2


def test_a_beginning_is_put_once_or_refused(model):
    plain = model.to_tokens(TEXT, prepend_bos=False)
    with pytest.raises(InputError, match="a tokenizer that has no BOS token"):
        model.to_tokens(TEXT, prepend_bos=True)
    model = HookedMLLM.from_hf(tiny.model("llava"), tiny_processors.processor("llava"))  # a tokenizer of its own
    model.tokenizer.bos_token = "<pad>"
    marked = model.to_tokens(TEXT, prepend_bos=True)
    assert marked[0].tolist() == [model.tokenizer.pad_token_id, *plain[0].tolist()]
    assert model.to_str_tokens(TEXT, prepend_bos=True)[1:] == model.to_str_tokens(TEXT, prepend_bos=False)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.to_tokens(None), lambda model: model.to_tokens([]), lambda model: model.to_tokens([3]),
        lambda model: model.to_tokens(TEXT, padding_side="up"), lambda model: model.to_str_tokens(None),
        lambda model: model.to_str_tokens([]), lambda model: model.to_string("text"),
        lambda model: model.to_string(1.5), lambda model: model.to_string([-1]),
        lambda model: model.to_string(True), lambda model: model.to_string({}),
        lambda model: model.to_single_token(3), lambda model: model.to_single_token(TEXT),
        lambda model: model.to_single_str_token([1, 2]), lambda model: model.to_single_str_token("a"),
    ],
)  # fmt: skip
def test_what_is_no_text_or_token_is_refused(model, call):
    with pytest.raises(InputError):
        call(model)
