"""Circuit tasks: running with some edges agrees with path patching; planted circuits are found; refusals come first."""

import functools

import numpy as np
import pytest
from pages import Page

import mech
from mech.errors import ExperimentError
from mech.experiments.circuit_tasks.curves import SHARES, area, auroc, circuit_table
from mech.experiments.circuit_tasks.graph import CircuitGraph, Shape
from mech.experiments.circuit_tasks.runs import CircuitRuns
from mech.experiments.circuit_tasks.scoring import ENTRIES, circuit_scores
from mech.experiments.circuit_tasks.tasks import CircuitTask, circuit_task
from mech.experiments.paths.path_patching import path_patching
from mech.model import HookedMLLM
from mech.reference import planted, tiny, tiny_processors
from mech.views import view


@functools.cache
def scored(name, family="llava"):
    task = circuit_task(name, family=family, n=4)
    return task, circuit_scores(task, n_boot=50)


@pytest.fixture(scope="module")
def small():
    model = HookedMLLM.from_pretrained("reference:qwen-s")
    find, test = mech.haystacks("grounding", n=6, seed=0).split(0.5)
    return CircuitTask("digits", model, find, test)


def test_without_one_edge_is_path_patching(small):
    """Every receiver reads its own stream: cutting an edge is switching it alone, whatever kind it is."""
    model, metric = small.model, small.metric(small.test)
    runs, shape = CircuitRuns.of(model, list(small.test), metric, batch_size=2), Shape.of(model)
    np.testing.assert_allclose(runs.metric(shape.exists), runs.clean, atol=1e-5)
    np.testing.assert_allclose(runs.metric(~shape.exists & False), runs.corrupted, atol=1e-4)
    senders, receivers = [str(node) for node in shape.senders], [str(node) for node in shape.receivers]
    for sender, receiver in (("embed", "L0K1.v"), ("L0H3", "L1H2.q"), ("mlp.0", "mlp.2"), ("L4H1", "logits")):
        inside = shape.exists.copy()
        inside[senders.index(sender), receivers.index(receiver)] = False
        patched = path_patching(
            model, list(small.test), None, metric, senders=[sender], receivers=[receiver], direction="noise",
            freeze=("attention", "mlp"),
        )  # fmt: skip
        np.testing.assert_allclose(runs.metric(inside), patched["metric"].squeeze().values, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3_vl", "smolvlm", "mistral3"])
def test_no_edges_is_the_corrupted_run_in_other_families(name):
    """With features that enter later (DeepStack), too: they are the pictures', as the embeddings are."""
    model = HookedMLLM.from_hf(tiny.model(name), tiny_processors.processor(name))
    box = mech.Box(2, 2, 14, 14)
    samples = [
        mech.Sample("What is it?", answer, (tiny_processors.noise(24, 24, seed),), evidence=(box,), id=answer)
        for seed, answer in enumerate("ab")
    ]
    pairs = [
        mech.Sample(s.question, s.answer, s.images, evidence=s.evidence, id=s.id, counterfactual=mech.Sample(
            s.question, "c", (tiny_processors.noise(24, 24, seed + 7),), evidence=s.evidence))
        for seed, s in enumerate(samples)
    ]  # fmt: skip
    runs = CircuitRuns.of(model, pairs, mech.LogitDiff([5, 6], [7, 7]))
    none = Shape.of(model).exists & False
    assert np.abs(runs.clean - runs.corrupted).max() > 1e-4
    np.testing.assert_allclose(runs.metric(none), runs.corrupted, atol=1e-5)
    np.testing.assert_allclose(runs.metric(~none), runs.clean, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "family"), [("mover", "llava"), ("mover", "qwen2_5_vl"), ("gqa", "llava"), ("or", "llava")]
)
def test_exact_patching_finds_planted_edges(name, family):
    task, found = scored(name, family)
    rows = {row["entry"]: row for row in circuit_table(found)}
    assert set(rows) == set(ENTRIES) and rows["exact"]["auroc"] == 1
    assert rows["exact"]["cpr"] > rows["random"]["cpr"] and rows["exact"]["cmd"] < rows["random"]["cmd"]
    assert found["faithfulness"].sel(share=1.0).values == pytest.approx(1, abs=1e-4)
    named = CircuitGraph.of(task.model, np.nan_to_num(task.truth)).largest(int(np.nansum(task.truth))).edges()
    labels = {
        "mover": {("L0H0", "L1K0.v"), ("L1H0", "logits")},
        "gqa": {("L1H0", "logits")},
        "or": {("L0H0", "logits"), ("L0H1", "logits"), ("L0H0", "mlp.1"), ("L0H1", "mlp.1")},
    }
    assert {(sender, receiver) for sender, receiver, _ in named} == labels[name]


def test_a_saturated_query_hides_its_edges_from_the_plain_slope():
    """The answer goes through a query: the slope there is all but zero, and its sign is noise (see ``planted``)."""
    _, found = scored("q_composition")
    rows = {row["entry"]: row for row in circuit_table(found)}
    assert rows["exact"]["auroc"] == 1 and rows["exact"]["cpr"] > 0.9
    assert rows["eap"]["cpr"] < rows["eap_ig"]["cpr"] - 0.5


def test_areas_and_ranks_are_what_they_say():
    whole = np.ones((2, len(SHARES)))
    assert area(whole) == pytest.approx(0.999) and area(np.abs(1 - whole)).max() == 0
    assert area(np.array(SHARES)) == pytest.approx((1 - 0.001**2) / 2)
    truth = np.array([True, False, True, False])
    assert auroc(np.array([4.0, 1, 3, 2]), truth) == 1 and auroc(np.array([1.0, 1, 1, 1]), truth) == 0.5
    assert auroc(np.array([1.0, 2, 4, 3]), truth) == 0.5 and np.isnan(auroc(np.ones(2), np.array([True, True])))


def test_graphs_of_others_are_entries_and_have_a_picture(tmp_path):
    task, found = scored("mover")
    graph = CircuitGraph.of(task.model, found["score"].sel(entry="exact").values)
    graph.largest(3).to_mib(tmp_path / "mine.json")
    mine = circuit_scores(task, {"<b>mine": CircuitGraph.from_mib(tmp_path / "mine.json", task.model)}, n_boot=50)
    np.testing.assert_allclose(mine["cpr"].values[0], found["cpr"].sel(entry="exact").item(), atol=1e-6)
    written = Page(view(mine).save(tmp_path / "scores.html").read_text())
    assert not written.unclosed and len(written.charts) == 2 and "<b>mine" in written.text
    assert "AUROC" in written.text


def test_refused_before_any_forward(small, monkeypatch):
    key = planted.circuit("mover")
    model = HookedMLLM.from_hf(key.model, key.processor)
    gemma = HookedMLLM.from_hf(tiny.model("gemma3"), tiny_processors.processor("gemma3"))
    other = CircuitGraph.of(model, np.zeros(Shape.of(model).exists.shape))
    monkeypatch.setattr(HookedMLLM, "forward", lambda *_, **__: pytest.fail("a forward was run"))
    with pytest.raises(ExperimentError, match="use 'eap_ig'"):
        circuit_scores(small, ["eap_igg"])
    with pytest.raises(ExperimentError, match="'mine' with edges of"):
        circuit_scores(small, {"mine": other})
    with pytest.raises(ExperimentError, match="a norm lies between"):
        circuit_scores(CircuitTask("one", gemma, small.find, small.test), ["eap"])
    with pytest.raises(ExperimentError, match="score the edges"):
        CircuitTask("same", model, small.find, small.find)
    lone = [sample.counterfactual for sample in small.find]
    with pytest.raises(ExperimentError, match="without a counterfactual"):
        CircuitTask("lone", model, lone, small.test)
    with pytest.raises(ExperimentError, match="truth of shape"):
        CircuitTask("truth", model, small.find, small.test, np.zeros((2, 2)))
