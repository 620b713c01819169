"""Tracing a circuit back from the logits: planted circuits are found whole, with the paths that they have."""

import json

import networkx as nx
import numpy as np
import pytest

import mech
from mech.errors import ExperimentError, OutputError
from mech.experiments.metrics import LogitDiff
from mech.experiments.paths.circuits import Circuit, trace_circuit
from mech.experiments.ranking.ranking import Ranking
from mech.reference import planted, tiny, tiny_processors

SAMPLES = 10


def asked(name, n=SAMPLES):
    known = planted.circuit(name)
    model = mech.HookedMLLM.from_hf(known.model, known.processor)
    samples = known.samples(n)
    pairs = [(s.answer, s.counterfactual.answer) for s in samples]
    if any(right == wrong for right, wrong in pairs):
        pairs = [(s.answer, "none") for s in samples]
    return known, model, samples, LogitDiff(*map(list, zip(*pairs, strict=True)))


@pytest.fixture(scope="module")
def mover():
    known, model, samples, metric = asked("mover")
    return known, model, samples, metric, trace_circuit(model, samples, metric)


def label(known, role):
    layer, head = known.truth.heads[role]
    return f"L{layer}H{head}"


@pytest.mark.parametrize("name", ["q_composition", "k_composition"])
def test_planted_circuits_are_found_whole(name):
    known, model, samples, metric = asked(name)
    circuit = trace_circuit(model, samples, metric)
    early = "carry" if name == "q_composition" else "previous"
    assert set(circuit.heads) == set(known.truth.heads.values())
    assert set(circuit.graph.predecessors("logits")) == {label(known, "retrieval")}
    letter = name[0]
    (edge,) = [e for e in circuit.edges(label(known, "retrieval")) if e.sender == label(known, early)]
    assert edge.through == letter and edge.effect == pytest.approx(1, abs=1e-3) and edge.p_value <= 0.05
    assert "embed:question" in circuit.nodes if letter == "q" else "embed:picture" in circuit.nodes


def test_a_mover_is_traced_to_the_picture(mover):
    known, _, _, _, circuit = mover
    last, first = label(known, "mover"), label(known, "retrieval")
    assert nx.has_path(circuit.graph, "embed:evidence", "logits")
    assert circuit.graph.edges[first, last]["through"] == {"v": pytest.approx(1, abs=1e-3)}
    assert [edge.receiver for edge in circuit.edges("logits")] == ["logits"]
    (edge,) = [e for e in circuit.edges(last) if e.sender == first]
    assert edge.at == "question" and edge.low <= edge.effect <= edge.high
    layers = dict(circuit.graph.nodes(data="layer"))
    assert layers["embed:evidence"] < layers[first] < layers[last] < layers["logits"]


def test_its_sentences_say_who_does_not_look_and_matters(mover):
    known, _, _, _, circuit = mover
    ranking = Ranking(known.truth.ram)
    text = circuit.describe(ranking)
    mover = f"{label(known, 'mover')} does not attend to the evidence (RAM 0.00) but matters"
    assert f"{mover}: it writes to logits (+1.00)" in text
    assert f"{label(known, 'retrieval')} attends to the evidence (RAM 1.00)" in text
    assert f"its values come from {label(known, 'retrieval')} (+1.00)" in text
    assert "RAM" not in circuit.describe()


def test_a_circuit_is_faithful_and_half_of_it_is_not(mover):
    _, model, samples, metric, circuit = mover
    np.testing.assert_allclose(circuit.faithfulness(model, samples, metric), 1, atol=1e-3)
    half = Circuit(
        "m", "logits", "noise", SAMPLES, circuit.groups, tuple(e for e in circuit.found if e.receiver == "logits")
    )
    np.testing.assert_allclose(half.faithfulness(model, samples, metric), 0, atol=1e-3)


def test_through_json_and_back(mover, tmp_path):
    circuit = mover[-1]
    value = circuit.to_json(tmp_path / "circuit.json")
    assert Circuit.from_json(json.loads(json.dumps(value))) == circuit
    again = Circuit.from_json(tmp_path / "circuit.json")
    assert again.graph.edges == circuit.graph.edges and again.describe() == circuit.describe()
    with pytest.raises(OutputError, match="to_json"):
        Circuit.from_json({"found": []})


def test_under_shared_keys_a_path_leads_to_the_heads_that_are_in_it():
    known, model, samples, metric = asked("gqa", 2)
    circuit = trace_circuit(model, samples, metric, alpha=None, threshold=0.2)
    head = known.truth.heads["retrieval"]
    (edge,) = [e for e in circuit.edges(label(known, "retrieval")) if e.through == "v"]
    assert edge.sender == "embed:evidence" and edge.receiver == f"L{head[0]}K{head[1] // 2}.v"
    assert circuit.heads == (head,)


def test_where_it_cannot_walk_it_is_traced_all_the_same():
    model = mech.HookedMLLM.from_hf(tiny.model("gemma4").double(), tiny_processors.processor("gemma4"))
    clean, corrupted = (model.inputs("What is shown?", [tiny_processors.noise(24, 24, seed)]) for seed in (0, 50))
    options = {"corrupted": corrupted, "alpha": None, "threshold": 0.1, "max_nodes": 2}
    circuit = trace_circuit(model, clean, LogitDiff(300, 301), **options)
    assert circuit.edges("logits") and len(circuit.groups) == model.cfg.n_layers
    assert all(np.isnan(edge.p_value) and edge.low == edge.effect for edge in circuit.found)
    assert Circuit.from_json(circuit.to_json()).nodes == circuit.nodes


def test_what_is_left_out_is_named(mover):
    _, model, samples, metric, circuit = mover
    few, options = samples[:2], {"alpha": None}
    short = trace_circuit(model, few, metric, max_nodes=1, **options)
    assert short.unfollowed == (str(circuit.heads[0]),)
    none = trace_circuit(model, few, metric, threshold=5.0, **options)
    assert not none.found and "Nothing" in none.describe()
    only = trace_circuit(model, few, metric, heads=[circuit.heads[1]], **options)
    assert only.heads == circuit.heads[1:]


def test_denoising_finds_either_of_two():
    known, model, samples, metric = asked("or", 2)
    found = trace_circuit(model, samples, metric, alpha=None, direction="denoise")
    assert set(found.heads) == set(known.truth.heads.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.05}, "at least 10 examples"),
        ({"start": "L1K9.v"}, "key/value heads"),
        ({"threshold": 0.0}, "a finite number above 0"),
        ({"direction": "up"}, "direction"),
        ({"alpha": 2.0}, "between 0 and 1"),
    ],
)
def test_refusals(mover, options, message):
    _, model, samples, metric, _ = mover
    with pytest.raises(ExperimentError, match=message):
        trace_circuit(model, samples[:2], metric, **options)
