"""A text before the question, beside pictures or in their place: where its passages are, and that it is only text."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mech import HookedMLLM, retrieval_attention_mass
from mech.data.haystacks import haystacks
from mech.data.regions import Passage
from mech.errors import InputError, RegionError
from mech.experiments.scores.measure import head_scores


@pytest.fixture(scope="module", params=["llava-s", "qwen-s"])
def model(request):
    return HookedMLLM.from_pretrained(f"reference:{request.param}")


def words(layout, where):
    return "".join(layout.tokens[position] for position in layout.positions(where))


@pytest.mark.parametrize("beside", [False, True])
def test_evidence_in_a_text_is_found_and_the_question_is_not_the_text(model, beside):
    (text,), (shown,) = (haystacks("documents", 1, seed=1, answer="number", form=form) for form in ("text", "pictures"))
    sample = replace(text, images=shown.images) if beside else text
    inputs = model.inputs_of(sample, answer=True)
    layout = inputs.layout
    (line,) = sample.evidence
    assert words(layout, sample.evidence) == sample.context[line.start : line.stop]
    assert words(layout, "question") == sample.question and words(layout, "answer") == sample.answer
    # What the model reads is the same as if the text were a part of the question.
    joined = model.inputs(sample.context + sample.question, sample.images, answer=sample.answer)
    assert torch.equal(inputs.tensors["input_ids"], joined.tensors["input_ids"])
    assert bool(len(layout.pictured)) == beside
    moved = layout.shifted(3, len(layout) + 3)
    assert np.array_equal(moved.positions(sample.evidence), layout.positions(sample.evidence) + 3)


def test_a_template_that_strips_does_not_move_the_passages(model):
    inputs = model.inputs("Who is it?\n", context="  Anna: 417\n", passages=[Passage(8, 11)])
    assert words(inputs.layout, Passage(8, 11)) == "417" and words(inputs.layout, "question").strip() == "Who is it?"


def test_mass_on_a_passage_is_that_of_its_tokens(model):
    """Against the pattern itself; the mass on pictures is zero where there are none."""
    samples = haystacks("documents", 3, seed=2, form="text")
    found = retrieval_attention_mass(model, samples, batch_size=2)
    assert not found["vision_mass"].values.any()
    for i, sample in enumerate(samples):
        inputs = model.inputs_of(sample)
        _, cache = model.run_with_cache(inputs, names_filter=lambda name: name.endswith("attn.hook_pattern"))
        evidence, asked = (inputs.layout.positions(where) for where in (sample.evidence, "question"))
        for layer in range(model.cfg.n_layers):
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0]
            mass = pattern[:, asked][:, :, evidence].sum(-1).mean(-1)
            assert np.allclose(found["ram"].values[i, layer], mass.detach(), atol=1e-5)
    scores = head_scores(model, samples, ("visual_retrieval", "vision_mass"))
    assert scores["visual_retrieval"].values.any() and not scores["vision_mass"].values.any()


def test_what_cannot_be_asked_of_a_text_is_refused(model):
    with pytest.raises(RegionError, match="does not record where it is"):
        model.inputs("Who?", context="Anna: 417\n").layout.positions(Passage(0, 4))
    with pytest.raises(InputError, match="the context holds the special token"):
        model.inputs("Who?", context=model.processor.special_tokens[0])
