"""Counterfactuals made by blanking: only where the answer changes, and good enough for the causal report."""

from dataclasses import replace

import numpy as np
import pytest

import mech
from mech.data.haystacks import haystacks
from mech.data.samples import Samples
from mech.errors import ExperimentError
from mech.interventions.counterfactuals import with_counterfactuals


@pytest.fixture(scope="module")
def model():
    return mech.HookedMLLM.from_pretrained("reference:llava-s")


@pytest.fixture(scope="module")
def lone():
    return Samples([replace(sample, counterfactual=None) for sample in haystacks("grounding", 8, seed=9)])


def test_the_counterfactual_is_what_the_model_says_without_the_evidence(model, lone):
    pairs = with_counterfactuals(model, lone)
    assert 2 <= len(pairs) <= len(lone) and {s.id for s in pairs} <= {s.id for s in lone}
    for sample in pairs:
        other = sample.counterfactual
        assert other.answer != sample.answer and other.images[0].size == sample.images[0].size
        box = sample.evidence[0]
        before, after = np.asarray(sample.images[0]), np.asarray(other.images[0])
        changed = np.argwhere((before != after).any(-1))
        assert changed[:, 0].min() >= box.y0 and changed[:, 0].max() < box.y1
        assert changed[:, 1].min() >= box.x0 and changed[:, 1].max() < box.x1
        said = model.generate_text(model.inputs_of(other), max_new_tokens=4)[0]
        assert said == other.answer


def test_heads_can_be_patched_from_it(model, lone):
    pairs = with_counterfactuals(model, lone)
    metric = mech.LogitDiff([s.answer for s in pairs], [s.counterfactual.answer for s in pairs])
    effect = mech.activation_patching(model, list(pairs), None, metric, direction="noise").effect.mean("example")
    assert np.isfinite(effect.values).all() and effect.values.max() > 0.5  # some head is needed


def test_samples_with_a_counterfactual_are_kept_and_those_that_do_not_change_are_dropped(model, lone):
    whole = haystacks("grounding", 2, seed=9)
    assert with_counterfactuals(model, whole).digest() == whole.digest()
    # What the model says of a grey patch is the answer here: nothing changes when the evidence goes.
    pairs = with_counterfactuals(model, lone)[:2]
    deaf = [replace(sample, answer=sample.counterfactual.answer, counterfactual=None) for sample in pairs]
    with pytest.raises(ExperimentError, match="on 0 of 2 samples when their evidence is blanked"):
        with_counterfactuals(model, deaf)


def test_samples_without_evidence_are_refused_before_the_model_is_asked(model, lone, monkeypatch):
    monkeypatch.setattr(mech.HookedMLLM, "generate_text", lambda *_, **__: pytest.fail("the model was asked"))
    with pytest.raises(ExperimentError, match="has no evidence"):
        with_counterfactuals(model, [*lone[:1], replace(lone[1], evidence=())])
