"""Circuits as MIB's JSON: out and in again they are what they were; another model's, or no circuit, is refused."""

import json

import numpy as np
import pytest

from mech.errors import ExperimentError, OutputError
from mech.experiments.circuit_tasks.graph import CircuitGraph, Shape
from mech.model import HookedMLLM
from mech.reference import planted


@pytest.fixture(scope="module")
def model():
    key = planted.circuit("gqa")  # two key/value heads for four query heads
    return HookedMLLM.from_hf(key.model, key.processor)


@pytest.fixture(scope="module")
def graph(model):
    scores = np.random.default_rng(0).normal(size=Shape.of(model).exists.shape)
    return CircuitGraph.of(model, scores).largest(9)


def test_a_circuit_goes_out_and_comes_back(graph, model, tmp_path):
    graph.to_mib(tmp_path / "circuit.json")
    again = CircuitGraph.from_mib(tmp_path / "circuit.json", model)
    assert (again.inside == graph.inside).all() and np.allclose(again.scores, graph.scores)
    assert again.edges() == graph.edges() and len(graph.edges()) == 9


def test_the_file_is_in_the_words_of_mib(graph, model):
    value = json.loads(json.dumps(graph.to_mib()))
    assert set(value) == {"cfg", "nodes", "edges"} and value["cfg"]["n_heads"] == 4
    assert {"input", "a0.h0", "a1.h3", "m1", "logits"} <= set(value["nodes"])
    # Every edge a query head could have: keys and values once for each, as TransformerLens has them ungrouped.
    before = {0: 1, 1: 6}
    expected = sum(before[layer] * 4 * 3 + before[layer] + 4 for layer in (0, 1)) + 11
    assert len(value["edges"]) == expected
    shared = [value["edges"][f"m0->a1.h{head}<k>"] for head in (0, 1)]
    assert shared[0] == shared[1]
    inside = {name for name, edge in value["edges"].items() if edge["in_graph"]}
    ends = {end.split("<")[0] for name in inside for end in name.split("->")}
    assert {name for name, node in value["nodes"].items() if node["in_graph"]} == ends


def test_edges_of_a_shared_key_are_one(model):
    edges = {"m0->a1.h0<k>": {"score": 1.0, "in_graph": False}, "m0->a1.h1<k>": {"score": 3.0, "in_graph": True}}
    cfg = {"n_layers": 2, "n_heads": 4, "d_model": model.cfg.d_model}
    read = CircuitGraph.from_mib({"cfg": cfg, "edges": edges}, model)
    assert read.edges() == [("mlp.0", "L1K0.k", 2.0)] and read.n_edges == 82


def test_largest_is_by_size_or_as_they_are(graph):
    scores = np.sort(graph.scores[graph.shape.exists])
    assert [score for *_, score in graph.largest(3, signed=True).edges()] == scores[::-1][:3].tolist()
    by_size = sorted(scores, key=abs, reverse=True)
    assert [score for *_, score in graph.largest(5).edges()] == by_size[:5]
    assert len(graph.largest(10**6).edges()) == graph.n_edges and not graph.largest(0).inside.any()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda value: value["cfg"].update(n_layers=12), "'n_layers': 12"),
        (lambda value: value["cfg"].update(parallel_attn_mlp=True), "open that model"),
        (lambda value: value["edges"].update({"m1->a0.h0<q>": {"score": 1.0, "in_graph": True}}), "m1->a0.h0<q>"),
        (lambda value: value["edges"].update({"a9.h0->logits": {"score": 1.0, "in_graph": True}}), "a9.h0->logits"),
        (lambda value: value["edges"].update({"m0->a1.h0": {"score": 1.0, "in_graph": True}}), "m0->a1.h0"),
        (lambda value: value["edges"]["m0->logits"].update(score=float("nan")), "finite scores"),
        (lambda value: value.pop("edges"), "not a circuit of edges"),
        (lambda value: value["edges"].update({"m0->m1": 3}), "not a circuit of edges"),
    ],
)
def test_other_files_are_refused(graph, model, change, says):
    value = graph.to_mib()
    change(value)
    with pytest.raises(OutputError, match=says.replace("(", r"\(")):
        CircuitGraph.from_mib(value, model)


def test_scores_must_fit_the_model(model, tmp_path):
    with pytest.raises(ExperimentError, match="11 senders and 19 receivers"):
        CircuitGraph.of(model, np.zeros((3, 3)))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(OutputError, match="not a circuit of edges"):
        CircuitGraph.from_mib(tmp_path / "broken.json", model)
