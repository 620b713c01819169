"""Causal head gating on planted circuits, and the record of heads: out, in, and refused for another model."""

from dataclasses import replace

import numpy as np
import pytest

import mech
from mech.errors import ExperimentError, OutputError
from mech.experiments.ranking.ranking import Ranking, rank_heads
from mech.experiments.scores.gating import causal_head_gating
from mech.experiments.scores.record import HeadRecord, head_record
from mech.model import HookedMLLM
from mech.reference import planted
from mech.results.store import read_json


def opened(name):
    key = planted.circuit(name)
    return key, HookedMLLM.from_hf(key.model, key.processor)


@pytest.fixture(scope="module")
def mover():
    return opened("mover")


@pytest.fixture(scope="module")
def record(mover):
    key, model = mover
    return head_record(model, key.samples(6), ("ram", "contrastive", "gating"), top=2)


@pytest.mark.parametrize(("name", "roles"), [("gqa", ("carry", "retrieval")), ("mover", ("retrieval", "mover"))])
def test_gates_stay_open_where_the_answer_is_made(name, roles):
    """Also of heads that attend to no evidence; a head that writes where nobody reads is irrelevant."""
    key, model = opened(name)
    before = [parameter.requires_grad for parameter in model.hf_model.parameters()]
    found = causal_head_gating(model, key.samples(6), n_fits=2)
    needed = {key.truth.heads[role] for role in roles}
    mean = found.mean("example")
    for layer in range(2):
        for head in range(4):
            helps = float(mean["facilitating"][layer, head])
            idle = float(mean["irrelevant"][layer, head])
            assert (helps > 0.6 and idle < 0.4) if (layer, head) in needed else (helps < 0.1 and idle > 0.9)
    assert set(rank_heads(found, "gating").top(2)) == needed
    assert [parameter.requires_grad for parameter in model.hf_model.parameters()] == before
    assert all(parameter.grad is None for parameter in model.hf_model.parameters())


def test_gates_close_where_the_answer_is_hindered(mover):
    """Asked for an answer that the circuit contradicts, its heads interfere: both signs are told apart."""
    key, model = mover
    wrong = [replace(sample, answer=sample.counterfactual.answer) for sample in key.samples(6)]
    mean = causal_head_gating(model, wrong, n_fits=1).mean("example")
    heads = [tuple(at) for at in np.argwhere(mean["interfering"].values > 0.6)]
    assert set(heads) == set(key.truth.heads.values()) and float(mean["gating"].max()) < 0.1


def test_fits_are_of_disjoint_samples_and_their_ids_are_kept(mover):
    key, model = mover
    samples = key.samples(5)
    found = causal_head_gating(model, samples, steps=2, n_fits=9)
    assert found.sizes["example"] == 5  # no more fits than samples
    ranking = rank_heads(found, "gating")
    assert ranking.examples == tuple(sample.id for sample in samples) and ranking.n_examples == 5
    with pytest.raises(ExperimentError, match="found the heads"):
        mech.ablation(model, samples, ranking, to="zero")


def test_every_score_stands_beside_its_null_and_interval(record, mover):
    key, _ = mover
    ram, gating = record.scores["ram"], record.scores["gating"]
    assert set(ram.null) == {"even", "elsewhere"} and set(gating.null) == {"exchanged"}
    assert not record.scores["contrastive"].null  # a difference to distractors already
    np.testing.assert_allclose(ram.ranking.mean, ram.ranking.per_example.mean(0))
    assert (ram.low <= ram.ranking.mean).all() and (ram.ranking.mean <= ram.high).all()
    head = key.truth.heads["mover"]
    assert gating.ranking.mean[head] > 0.6 and gating.null["exchanged"][head] < gating.ranking.mean[head]
    assert gating.about["unit"] == "gate, 0 to 1" and "2505.13737" in gating.about["source"]


def test_scores_of_all_kinds_agree_in_one_matrix(record):
    names = list(record.scores)
    agreed = mech.agreement({name: record.ranking(name) for name in names}, k=2, n_resamples=50)
    assert list(agreed["ranking"].values) == names
    low, value, high = (agreed[f"spearman{end}"].values for end in ("_low", "", "_high"))
    assert (low <= value).all() and (value <= high).all()


def test_a_record_is_a_ranking_for_its_own_model_alone(record, mover, tmp_path):
    key, model = mover
    record.to_json(tmp_path / "heads.json")
    again = HeadRecord.from_json(tmp_path / "heads.json")
    assert again.to_json() == read_json(tmp_path / "heads.json") == record.to_json()
    ranking = again.ranking("gating")
    assert ranking.top(2) == record.ranking("gating").top(2) and ranking.score == "gating"
    assert Ranking.from_json(tmp_path / "heads.json", "gating").heads == ranking.heads
    assert Ranking.from_json(tmp_path / "heads.json").score == "ram"  # what is meant where none is named
    fresh = key.samples(4, seed=9)
    assert mech.ablation(model, fresh, ranking, to="zero", n_random=1, fractions=(1,)).sizes["example"] == 4
    with pytest.raises(ExperimentError, match="found the heads"):
        mech.ablation(model, key.samples(6), ranking, to="zero")
    with pytest.raises(ExperimentError, match="allow_other_model=True"):
        mech.ablation(opened("and")[1], fresh, ranking, to="zero")
    page = mech.view(again.dataset).save(tmp_path / "heads.html").read_text()
    assert "gating" in page


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda value: value.update(kind="ranking"), "of kind 'ranking'"),
        (lambda value: value.update(schema=2), "schema 2"),
        (lambda value: value["scores"]["ram"].update(mean=[[0.0]]), "mean of ram over"),
        (lambda value: value["scores"]["ram"]["null"].update(even=[["a"] * 4] * 2), "not a record of heads"),
        (lambda value: value["scores"]["ram"]["low"][0].__setitem__(0, float("inf")), "finite numbers"),
        (lambda value: value["scores"].clear(), "not a record of heads"),
        (lambda value: value.pop("model"), "not a record of heads"),
    ],
)
def test_other_files_are_refused(record, change, expected):
    value = record.to_json()
    change(value)
    with pytest.raises(OutputError, match=expected):
        HeadRecord.from_json(value)


def test_a_score_that_is_not_there_is_refused(record, mover, monkeypatch):
    key, model = mover
    with pytest.raises(ExperimentError, match="use 'gating'"):
        record.ranking("gatings")
    with pytest.raises(OutputError, match="without the score 'vera'"):
        Ranking.from_json(record.to_json(), "vera")
    monkeypatch.setattr(HookedMLLM, "forward", lambda *_, **__: pytest.fail("a forward was run"))
    with pytest.raises(ExperimentError, match="use 'gaze'"):
        head_record(model, key.samples(2), ("ram", "gaz"))
    with pytest.raises(ExperimentError, match="at least one"):
        head_record(model, key.samples(2), ())
    with pytest.raises(ExperimentError, match="have no distractors"):
        head_record(model, [replace(sample, distractors=()) for sample in key.samples(2)], ("gating", "contrastive"))
