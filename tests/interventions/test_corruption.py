"""Corruptions change the pixels they say and no others, keep the layout, and take the answer away."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mech.data.haystacks import haystacks
from mech.data.regions import Box, Frames, Mask, Pages
from mech.errors import ExperimentError, InputError, RegionError
from mech.experiments.metrics import LogitDiff
from mech.experiments.patching.activation import activation_patching
from mech.interventions.corruption import WAYS, with_question, without_evidence, without_pictures
from mech.model import HookedMLLM
from mech.reference import tiny, tiny_processors


@pytest.fixture(scope="module")
def sample():
    return haystacks("grounding", 1, seed=2)[0]


def pixels(sample, index=0):
    return np.asarray((sample.images or sample.video)[index].convert("RGB")).astype(int)


@pytest.mark.parametrize("by", WAYS)
def test_only_the_evidence_changes(sample, by):
    box = Box(5, 7, 15, 22)
    changed = without_evidence(replace(sample, evidence=(box,)), by)
    differs = (pixels(changed) != pixels(sample)).any(-1)
    inside = np.zeros_like(differs)
    inside[7:22, 5:15] = True
    assert differs[inside].mean() > 0.5 and not differs[~inside].any()
    mask = without_evidence(replace(sample, evidence=(Mask(inside),)), by)
    assert (pixels(mask) == pixels(changed)).all()


def test_mean_is_that_of_the_picture_and_removed_that_around_the_evidence(sample):
    mean = pixels(without_evidence(sample, "mean"))
    box = sample.evidence[0]
    here = mean[int(box.y0) + 1, int(box.x0) + 1]
    assert abs(here - pixels(sample).reshape(-1, 3).mean(0)).max() <= 0.5
    flat = replace(sample, images=(sample.images[0].point(lambda value: 90),), evidence=(Box(3, 3, 9, 9),))
    assert (pixels(without_evidence(flat, "removed")) == 90).all()


def test_whole_pages_and_frames():
    for domain, region in (("pages", Pages(1)), ("video", Frames(1))):
        shown = replace(haystacks(domain, 1, seed=0)[0], evidence=(region,))
        changed = without_evidence(shown)
        assert np.ptp(pixels(changed, 1).reshape(-1, 3), axis=0).max() == 0
        assert (pixels(changed, 0) == pixels(shown, 0)).all()
        with pytest.raises(RegionError, match="count"):
            without_evidence(replace(shown, evidence=(type(region)(99),)))


def test_without_the_evidence_a_reference_model_does_not_know_and_patching_restores_it(sample):
    model = HookedMLLM.from_pretrained("reference:llava-s")
    metric = LogitDiff(sample.answer, sample.counterfactual.answer)
    for by in WAYS[1:]:
        found = activation_patching(
            model, sample, without_evidence(sample, by), metric, point="hook_resid_pre", over=("layer",)
        )
        assert found.clean.item() > found.corrupted.item() + 1
        np.testing.assert_allclose(found.effect, 1, atol=1e-3)


def test_another_question_of_the_same_length_or_refused(sample):
    model = HookedMLLM.from_pretrained("reference:llava-s")
    metric = LogitDiff(sample.answer, sample.counterfactual.answer)
    length = len(model.inputs_of(sample).layout)
    others = (with_question(sample, other.question, other.answer) for other in haystacks("grounding", 30, seed=3)
              if other.question != sample.question)  # fmt: skip
    other = next(other for other in others if len(model.inputs_of(other).layout) == length)
    found = activation_patching(model, sample, other, metric, point="hook_resid_pre", over=("layer",))
    np.testing.assert_allclose(found.effect, 1, atol=1e-3)
    with pytest.raises(InputError, match="first at position"):
        activation_patching(model, sample, with_question(sample, sample.question + " and why?", "x"), metric)
    with pytest.raises(ExperimentError, match="same question"):
        with_question(sample, sample.question, "1")


def test_what_cannot_be_corrupted_is_refused(sample):
    with pytest.raises(ExperimentError, match="no evidence"):
        without_evidence(replace(sample, evidence=()))
    with pytest.raises(ExperimentError, match="'blur'"):
        without_evidence(sample, "blurr")


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "llama4", "gemma3", "llava_next"])
def test_every_visual_token_is_the_mean_one(name):
    model = HookedMLLM.from_hf(tiny.model(name), tiny_processors.processor(name))
    one, other = (model.inputs("What is shown here?", [tiny_processors.noise(24, 24, seed)]) for seed in (0, 1))
    image, text = one.layout.positions("image"), one.layout.positions("text")

    def embedded(inputs):
        return model.run_with_cache(inputs, names_filter="hook_embed")[1]["hook_embed"][0]

    means = []
    for reference in ([], [other], [one, other]):
        blind = without_pictures(model, one, reference)
        tokens = embedded(blind)
        torch.testing.assert_close(tokens[image], tokens[image[:1]].expand(len(image), -1))
        assert torch.equal(tokens[text], embedded(one)[text])
        assert (model(blind) - model(one)).abs().max() > 1e-4 and "mm_encoder_outputs" in repr(blind)
        means.append(tokens[image[0]])
    torch.testing.assert_close((means[0] + means[1]) / 2, means[2])
    if name in ("llava", "gemma3"):  # their pictures are handed over as they enter the text
        torch.testing.assert_close(means[0], embedded(one)[image].mean(0))
    with pytest.raises(InputError, match="already encoded"):
        model.collate([blind, blind])
    with pytest.raises(ExperimentError, match="without images"):
        without_pictures(model, model.inputs("What?"))


def test_patching_restores_pictures_that_were_averaged(sample):
    model = HookedMLLM.from_pretrained("reference:llava-s")
    clean, metric = model.inputs_of(sample), LogitDiff(sample.answer, sample.counterfactual.answer)
    found = activation_patching(
        model, clean, without_pictures(model, clean), metric, point="hook_embed", over=(), positions="image"
    )
    assert found.clean.item() > found.corrupted.item() + 1
    np.testing.assert_allclose(found.effect, 1, atol=1e-3)
