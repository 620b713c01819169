"""The model makes its own inputs: samples, answers and video in, tokens and text out.

That a row gives alone what it gives in a batch, in every family, is for ``test_check.py``.
"""

import pytest
import torch

from mech.data.samples import Sample
from mech.model import HookedMLLM
from mech.reference import tiny, tiny_processors

FAMILIES = ["llava", "gemma3", "qwen2_5_vl"]


def wrapped(family):
    return HookedMLLM.from_hf(tiny.model(family), tiny_processors.processor(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_is_continued_alone_as_in_a_batch(family):
    model = wrapped(family)
    samples = [
        Sample("What is this?", "four", images=(tiny_processors.noise(48, 48),)),
        Sample("And what are these two?", "five", images=tuple(tiny_processors.noise(48, 48, seed) for seed in (1, 2))),
    ]
    rows = [model.inputs_of(sample) for sample in samples]
    batch = model.collate(rows)
    assert len(batch) == 2 and batch.tensors["input_ids"].shape[0] == 2
    tokens = model.generate(batch, max_new_tokens=3)
    assert tokens.shape == (2, 3)
    assert torch.equal(tokens[0], model.generate(rows[0], max_new_tokens=3)[0])  # the shorter row, padded there
    texts = model.generate_text(batch, max_new_tokens=3)
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_follows_the_same_prompt(family):
    model = wrapped(family)
    sample = Sample("What is this?", "four", images=(tiny_processors.noise(48, 48),))
    prompt, taught = (model.inputs_of(sample, answer=answer).tensors["input_ids"] for answer in (False, True))
    assert taught.shape[1] > prompt.shape[1] and torch.equal(taught[:, : prompt.shape[1]], prompt)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_video_passes_the_projector(family):
    model = wrapped(family)
    inputs = model.inputs("What happens?", video=[tiny_processors.noise(56, 56, seed) for seed in range(4)])
    clean = model(inputs).detach()
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=["projector.hook_out", "hook_embed"])
        visual = torch.as_tensor(inputs.layout.positions("image"))
        assert torch.equal(cache["hook_embed"][0, visual], cache["projector.hook_out"])
        edited = model.run_with_hooks(inputs, fwd_hooks=[("projector.hook_out", lambda value, hook: value * 0)])
    assert not torch.equal(edited, clean)


def test_from_pretrained_opens_the_processor_when_it_is_needed(tmp_path):
    model = wrapped("llava")
    model.hf_model.save_pretrained(tmp_path)
    model.processor.tokenizer.save_pretrained(tmp_path)
    model.processor.image_processor.save_pretrained(tmp_path)
    opened = HookedMLLM.from_pretrained(tmp_path, device="cpu")
    given = {"question": "What is this?", "images": [tiny_processors.noise(48, 48)]}
    assert torch.equal(opened(opened.inputs(**given)), model(model.inputs(**given)))
