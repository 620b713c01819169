"""Steering: factor 0 is zero ablation, factor 1 the model; a planted head's lead grows with its factor."""

import numpy as np
import pytest

import mech
from mech.errors import ExperimentError
from mech.experiments.ablation.ablation import ablation
from mech.experiments.ablation.steering import steering, steering_table
from mech.model import HookedMLLM
from mech.reference import planted


@pytest.fixture(scope="module")
def mover():
    key = planted.circuit("mover")
    return key, HookedMLLM.from_hf(key.model, key.processor)


@pytest.fixture(scope="module")
def trained():
    model = HookedMLLM.from_pretrained("reference:llava-s")
    find, test = mech.haystacks("grounding", 16, seed=0).split(0.5)
    return model, test, mech.rank_heads(mech.retrieval_attention_mass(model, find))


def test_the_lead_of_a_planted_answer_is_linear_in_the_head_that_writes_it(mover):
    key, model = mover
    mean = np.zeros((2, 4))
    mean[key.truth.heads["mover"]], mean[key.truth.heads["retrieval"]] = 2, 1
    ranking = mech.Ranking(mean, model=model.name)
    factors = (-1.0, 0.0, 0.5, 1.0, 3.0)
    curve = steering(model, key.samples(4), ranking, factors=factors, heads=1, n_random=3)
    top = curve.isel(set=0)
    assert top["heads"].item() == "L1H0"
    np.testing.assert_allclose(top["logit_diff"], np.outer(factors, [key.truth.logit_diff[0]] * 4), atol=1e-2)
    bottom = curve.isel(set=1)
    np.testing.assert_allclose(bottom["logit_diff"], key.truth.logit_diff[0], atol=1e-2)
    assert top["accuracy"].sel(factor=3).all() and not top["accuracy"].sel(factor=-1).any()
    table = {(row["band"], row["factor"]): row for row in steering_table(curve)}
    assert table["top", 3.0]["mean"] == pytest.approx(30, abs=1e-2)
    assert table["random", 0.0]["low"] <= table["random", 0.0]["mean"] <= table["random", 0.0]["high"]


def test_nought_is_zero_ablation_and_one_is_the_model(trained):
    model, test, ranking = trained
    curve = steering(model, test, ranking, factors=(0, 1, 2), bands=("top", "random"), n_random=2, seed=3)
    effects = ablation(model, test, ranking, to="zero", bands=("top", "random"), fractions=(0.05,), n_random=2, seed=3)
    for measure in ("accuracy", "logit_diff"):
        np.testing.assert_allclose(curve[measure].sel(factor=0), effects[measure][1:], atol=1e-5)
        np.testing.assert_array_equal(curve[measure].sel(factor=1), np.repeat(effects[measure].values[:1], 3, axis=0))
    assert not np.allclose(curve["logit_diff"].sel(factor=2), curve["logit_diff"].sel(factor=1), atol=0.1)
    assert curve.attrs["n_heads"] == ranking.count(0.05) and list(curve["band"].values) == ["top", "random", "random"]


def test_only_the_positions_that_are_named_are_scaled(trained):
    model, test, ranking = trained
    everywhere, last = (
        steering(model, test, ranking, factors=(0,), heads=4, bands=("top",), positions=positions)["logit_diff"]
        for positions in ("all", "last")
    )
    assert not np.allclose(everywhere, last, atol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bands": ("topp",)}, "use 'top'"),
        ({"bands": ()}, "at least one"),
        ({"factors": (1, 1)}, "different numbers"),
        ({"factors": (float("nan"),)}, "a finite number"),
        ({"positions": "questions"}, "use 'question'"),
        ({"heads": 1.0}, "heads=1.0"),
    ],
)
def test_what_cannot_be_steered_is_refused_before_any_forward(trained, monkeypatch, change, message):
    model, test, ranking = trained
    monkeypatch.setattr(HookedMLLM, "forward", lambda *_, **__: pytest.fail("a forward was run"))
    with pytest.raises(ExperimentError, match=message):
        steering(model, test, ranking, **change)
    with pytest.raises(ExperimentError, match="at least one"):
        steering(model, [], ranking)


def test_the_curve_shows_itself(trained):
    model, test, ranking = trained
    curve = steering(model, test[:3], ranking, factors=(0, 1), n_random=2)
    page = mech.view(curve).html()
    for word in ("Heads scaled down and up", "logit difference", "top", "bottom", "random", "Sets of 2 heads"):
        assert word in page
    one = steering(model, test[:1], ranking, factors=(0, 1), bands=("top",))
    assert "Sets of 2 heads" in mech.view(one).html(), "one sample has no interval, and a curve all the same"
    with pytest.raises(ExperimentError, match="accuracy or logit_diff"):
        steering_table(curve, "accurcy")
