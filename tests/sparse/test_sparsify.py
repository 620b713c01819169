"""Gates and an adapter for a frozen model: planted heads are found, what is saved is what is served, errors."""

import json

import pytest
import torch

import mech
from mech.cli import app
from mech.cli.accelerate import Local
from mech.cli.options import Run
from mech.errors import ExperimentError, UnsupportedModel
from mech.experiments.metrics import ask, quiz
from mech.model import HookedMLLM
from mech.reference import tiny, tiny_processors
from mech.reference.planted import circuit
from mech.sparse.training.lora import Lora
from mech.sparse.training.sparsify import _fewest, by_length, load_sparsified

SHORT = {"sinks": 1, "window": 8, "steps": 60, "batch_size": 4}


@pytest.fixture(scope="module")
def planted():
    found = circuit("gqa")  # two key/value heads for four query heads
    model = HookedMLLM.from_hf(found.model, found.processor)
    return model, found.samples(8), found.truth.heads["retrieval"]


@pytest.mark.parametrize("rank", [0, 2])
def test_the_group_of_the_planted_retrieval_head_is_all_that_stays_dense(planted, rank):
    model, samples, (layer, head) = planted
    before = {name: value.clone() for name, value in model.hf_model.state_dict().items()}
    found = mech.sparsify(model, samples, target=0.05, rank=rank, **SHORT)
    group = head // 2
    assert set(found.policy.dense_heads) == {(layer, 2 * group), (layer, 2 * group + 1)}
    assert found.n_kv_heads == (1, 4) and found.loss <= 0.05 and found.agreement == 1
    assert found.ranking.top(2) == tuple(sorted(found.policy.dense_heads)) and (found.adapter is None) == (rank == 0)
    assert all(torch.equal(value, before[name]) for name, value in model.hf_model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.hf_model.parameters())
    assert "1 of 4 KV heads stay dense" in repr(found)


def test_what_is_saved_is_what_is_served(planted, tmp_path):
    model, samples, _ = planted
    found = mech.sparsify(model, samples, target=0.05, rank=2, **SHORT)
    questions = quiz(model, samples)
    with found.serve(model) as fast:
        served = ask(fast, questions)
    assert model.localized is None and served["accuracy"].all()
    policy, adapter = load_sparsified(found.save(tmp_path / "sparse"))
    assert policy == found.policy and isinstance(adapter, Lora)
    with adapter.merged(model), mech.localize(model, policy) as fast:
        assert (ask(fast, questions)["logit_diff"] == served["logit_diff"]).all()


def test_a_constant_strength_closes_all_but_what_it_needs(planted):
    model, samples, head = planted
    found = mech.sparsify(model, samples, target=None, strength=0.5, rank=0, **SHORT)
    assert found.n_kv_heads[0] == 1 and head in found.policy.dense_heads


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("n_few", [64, 0])
def test_no_more_heads_stay_dense_than_may_whatever_the_gates_say(planted, monkeypatch, rank, n_few):
    monkeypatch.setattr("mech.sparse.training.loop.ALONE", n_few)
    model, samples, head = planted
    found = mech.sparsify(model, samples, target=None, strength=1e-6, at_most=1, rank=rank, **SHORT | {"steps": 4})
    assert found.n_kv_heads == (1, 4) and (n_few == 0 or head in found.policy.dense_heads)


@pytest.mark.parametrize(("n", "limit", "target", "wanted"), [
    (9, 24, 0.1, 3), (3, 24, 0.1, 3), (0, 24, 0.1, 3), (24, 24, 5.0, 0), (1, 2, 0.1, 2), (7, 24, None, 7),
    (0, 0, 0.1, 0),
])  # fmt: skip
def test_the_fewest_heads_that_meet_the_target_are_kept(n, limit, target, wanted):
    """Three heads are enough; up to there each one helps."""
    tried = []

    def served(count):
        tried.append(count)
        return count, max(0.01, 1 - 0.33 * count), 1.0

    assert _fewest(served, n, limit, target)[0] == wanted
    assert max(tried) <= max(n, limit) and len(tried) == len(set(tried)) <= 9


def test_a_target_that_cannot_be_met_says_what_was_reached(planted):
    model, samples, _ = planted
    short = SHORT | {"steps": 4}
    with pytest.raises(ExperimentError, match=r"target=1e-12 nats with at most 4 of 4 dense KV heads\n.*the best that"):
        mech.sparsify(model, samples, target=1e-12, rank=2, **short)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"target": None}, "one of the two"),
        ({"strength": 0.1}, "one of the two"),
        ({"target": -1.0}, "above 0"),
        ({"at_most": 5}, "at_most=5 of 4 heads\nExpected: an int from 1 to 4"),
        ({"rank": -1}, "at least 0"),
        ({"window": 64}, "lies within 1 sinks and a window of 64"),
        ({"window": 1}, "a window of 1 with a question of"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(planted, monkeypatch, given, says):
    model, samples, _ = planted
    monkeypatch.setattr(model.hf_model, "forward", None)
    with pytest.raises(ExperimentError, match=says):
        mech.sparsify(model, samples, **SHORT | given)


def test_samples_of_several_lengths_are_taken_by_length_and_stay_a_sample_each():
    model = HookedMLLM.from_pretrained("reference:qwen-long")
    samples, called = Local(pictures=[8, 3]).samples(Run(), 5)
    assert [len(sample.images) for sample in samples] == [8, 3, 8, 3, 8] and called == "pages of 8 and 3 pictures"
    assert len({sample.id for sample in samples}) == 5
    ordered = by_length(model, samples, sinks=4, window=64)
    assert [len(sample.images) for sample in ordered] == [3, 3, 8, 8, 8]
    assert {sample.id for sample in ordered} == {sample.id for sample in samples}
    with pytest.raises(ExperimentError, match=r"a sample of \d+ tokens, which lies within 4 sinks"):
        by_length(model, samples, sinks=4, window=200)


def test_layers_that_share_keys_and_values_are_refused():
    model = HookedMLLM.from_hf(tiny.model("gemma4"), tiny_processors.processor("gemma4"), name="gemma4")
    with pytest.raises(UnsupportedModel, match=r"share keys and values|key/value heads"):
        mech.sparsify(model, mech.haystacks("grounding", 2), sinks=1, window=2)


def test_the_command_trains_tests_on_other_samples_and_writes_a_policy(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    line = ["sparsify", "-m", "reference:llava-s", "-d", "documents", "--samples", "12", "--steps", "16", "--target",
            "2", "--rank", "2", "--out", "sparse", "--json"]  # fmt: skip
    ran = CliRunner().invoke(app, line)
    assert ran.exit_code == 0, ran.output
    facts = json.loads(ran.stdout)
    assert facts["n_test"] == 6 and facts["nats"] <= 2 and 0 < facts["kv_bytes"] <= 1
    policy, adapter = load_sparsified(tmp_path / "sparse")
    assert policy.to_json() == facts["policy"] and adapter.rank == 2
    assert len(policy.dense_heads) == facts["n_kv_heads"][0]
