"""Generation with every option of Hugging Face's: what a wrapped model gives is what the plain one gives."""

import functools

import pytest
import torch
from tensors import FEW
from transformers.generation.streamers import BaseStreamer

from mech import Ablate, intervene
from mech.errors import InputError
from mech.model import HookedMLLM
from mech.reference import tiny, tiny_processors

PICTURE = tiny_processors.noise(16, 16)
ALL = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


@functools.cache
def opened(name):
    """A wrapped model, a batch of two rows of different lengths, and the same model unwrapped."""
    model = HookedMLLM.from_hf(tiny.model(name), tiny_processors.processor(name))
    rows = [model.inputs(question, images=[PICTURE]) for question in ("Which digit is in the frame?", "What?")]
    return model, model.collate(rows), tiny.model(name)


def plain(name, **options):
    _, batch, stock = opened(name)
    pad = tiny_processors.processor(name).tokenizer.pad_token_id
    stock.generation_config.pad_token_id = pad
    return stock.generate(**batch.tensors, max_new_tokens=3, **{"do_sample": False, **options})


def close(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_scores_and_logits_are_those_of_plain_transformers(name):
    model, batch, _ = opened(name)
    ours, theirs = model.generate(batch, max_new_tokens=3, **ALL), plain(name, **ALL)
    assert type(ours) is type(theirs) and torch.equal(ours.sequences, theirs.sequences)
    close(ours.scores, theirs.scores)
    close(ours.logits, theirs.logits)
    assert torch.equal(model.generate(batch, max_new_tokens=3), ours.sequences[:, batch.shape[1] :])


@pytest.mark.parametrize("name", FEW)
def test_beams_are_those_of_plain_transformers(name):
    model, batch, _ = opened(name)
    options = {"num_beams": 3, "num_return_sequences": 2}
    ours, theirs = model.generate(batch, max_new_tokens=3, **options, **ALL), plain(name, **options, **ALL)
    assert torch.equal(ours.sequences, theirs.sequences) and torch.equal(ours.beam_indices, theirs.beam_indices)
    close([ours.sequences_scores], [theirs.sequences_scores])
    close(ours.scores, theirs.scores)
    texts = model.generate_text(batch, max_new_tokens=3, **options)
    assert len(texts) == 4 and all(isinstance(text, str) for text in texts)


def test_beams_and_scores_under_an_intervention_are_those_of_a_hook_that_does_the_same():
    model, batch, _ = opened("llava")

    def zero(z, hook):
        z[:, :, 2] = 0
        return z

    options = {"num_beams": 2, "max_new_tokens": 3, **ALL}
    with intervene(model, Ablate(heads=[(1, 2)], to="zero")) as ablated:
        ours = ablated.generate(batch, **options)
    with model.hooks([("blocks.1.attn.hook_z", zero)]):
        theirs = model.generate(batch, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    close(ours.scores, theirs.scores)
    assert (ours.scores[0] - model.generate(batch, **options).scores[0]).abs().max() > 1e-3


class Words(BaseStreamer):
    def __init__(self):
        self.put_in, self.ended = [], False

    def put(self, value):
        self.put_in.append(value)

    def end(self):
        self.ended = True


@pytest.mark.parametrize("name", FEW)
def test_a_streamer_gets_the_prompt_and_every_token(name):
    model = opened(name)[0]
    one, words = model.inputs("What?", images=[PICTURE]), Words()
    made = model.generate(one, max_new_tokens=3, streamer=words)
    assert torch.equal(words.put_in[0], one.tensors["input_ids"]) and words.ended
    assert torch.stack(words.put_in[1:], dim=1).tolist() == made.tolist()


def test_sampling_and_stop_strings_are_passed_on():
    model, batch, _ = opened("llava")
    torch.manual_seed(0)
    ours = model.generate(batch, max_new_tokens=3, do_sample=True, temperature=2.0, num_return_sequences=2)
    torch.manual_seed(0)
    theirs = plain("llava", do_sample=True, temperature=2.0, num_return_sequences=2)
    assert torch.equal(ours, theirs[:, batch.shape[1] :]) and len(ours) == 4
    one = model.inputs("What?", images=[PICTURE])
    ids = model.generate(one, max_new_tokens=6, verbose=False, output_attentions=False)
    first = model.tokenizer.decode(ids[0, :1])
    assert model.generate(one, max_new_tokens=6, stop_strings=[first]).shape[1] == 1


def test_options_without_effect_or_of_others_are_refused_before_any_forward(monkeypatch):
    model, batch, _ = opened("llava")
    monkeypatch.setattr(model.hf_model, "forward", None)
    for options, do in (
        ({"max_new_token": 2}, "use 'max_new_tokens'"),
        ({"stremer": Words()}, "use 'streamer'"),
        ({"atention_mask": None}, "use 'attention_mask'"),
        ({"output_scores": True}, "add return_dict_in_generate=True"),
        ({"output_logits": True}, "add return_dict_in_generate=True"),
        ({"output_attentions": True}, "hook_pattern"),
        ({"max_length": 400}, "use max_new_tokens"),
        ({"generation_config": model.hf_model.generation_config}, "by name"),
        ({"num_return_sequences": 2}, "use num_beams=2"),
        ({"num_beams": 2, "num_return_sequences": 3}, "use num_beams=3"),
        ({"num_beams": 2, "streamer": Words()}, "use num_beams=1"),
        ({"use_past_kv_cache": True}, "use use_cache"),
        ({"stop_at_eos": True}, "eos_token_id"),
        ({"stop_at_eos": False}, "eos_token_id"),
        ({"use_past_kv_cache": False}, "use use_cache"),
        ({"freq_penalty": 0.1}, "repetition_penalty"),
        ({"verbose": True}, "nothing is printed"),
        ({"custom_generate": "owner/repo"}, "write the loop yourself"),
        ({"prepend_bos": True}, "mech.inputs.encode"),
        ({"cache_implementation": "no such cache"}, "change them"),
    ):
        with pytest.raises(InputError) as error:
            model.generate(batch, **options)
        assert do in str(error.value) and str(error.value).count("\n") == 2
    with pytest.raises(InputError, match=r"use model\.generate"):
        model.generate_text(batch, return_dict_in_generate=True)


def test_an_answer_is_the_text_of_one_row(monkeypatch):
    model, batch, _ = opened("llava")
    one = model.inputs("What?", images=[PICTURE])
    assert [model.answer(one, max_new_tokens=3)] == model.generate_text(one, max_new_tokens=3)
    assert model.answer(one.tensors, max_new_tokens=3) == model.answer(one, max_new_tokens=3)
    with intervene(model, Ablate(heads=[(1, 2)], to="zero")) as ablated:
        assert [ablated.answer(one, max_new_tokens=3)] == ablated.generate_text(one, max_new_tokens=3)
    monkeypatch.setattr(model.hf_model, "forward", None)
    for given, options in ((batch, {}), (one, {"num_beams": 2, "num_return_sequences": 2})):
        with pytest.raises(InputError, match="generate_text"):
            model.answer(given, **options)
