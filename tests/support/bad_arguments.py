"""A right call of every public name,
            and for each of its arguments what is wrong there: the material of the fuzz test.

``calls(model)`` maps a name to a ``Call``: the function, arguments that fit,
            and the kind of every argument. ``WRONG``
maps a kind to a strategy of values that no argument of this kind may be. Kinds are written by hand, not read off the
signatures: what is checked must not be checked against itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from hypothesis import strategies as st

import mech

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Call:
    """``function(**right)`` would run; ``kinds`` says what each argument is."""

    function: Callable[..., Any]
    right: Mapping[str, Any]
    kinds: Mapping[str, str]


def values(*wrong: Any) -> st.SearchStrategy:
    """Some values as they are: hypothesis would show them by their repr, and copy none."""
    return st.sampled_from([lambda value=value: value for value in wrong]).map(lambda made: made())


WORDLIKE = values(None, 3, True, NAN, b"top", ["top", 3], {"top": 1}, object(), "", "<script>alert(1)</script>")
NO_NUMBER = values(None, "3", "", b"3", [], {}, object(), NAN, INF, -INF, True, False, 1j, np.array([1, 2]))
FRACTION = st.floats(allow_nan=True, allow_infinity=True).filter(lambda x: not x.is_integer())
OBJECTS = values(None, 3, 0.5, True, NAN, "", "a text", b"bytes", [], {}, object(), type, print, (1, 2))
WRONG: dict[str, st.SearchStrategy] = {
    "count": NO_NUMBER | FRACTION | st.integers(max_value=0) | values((1, 2), 1.0),
    "whole": NO_NUMBER | FRACTION | st.integers(max_value=-1) | values((1, 2), 1.0),
    "seed": NO_NUMBER | FRACTION | st.integers(max_value=-1) | values((0, 1), [0], 0.0),
    "positive": NO_NUMBER | st.floats(max_value=0, allow_nan=False) | values((1,), "0.5"),
    "int": NO_NUMBER | FRACTION | values((1, 2), 1.0),
    "number": NO_NUMBER | values((1,), "0.5"),
    "share": NO_NUMBER | st.floats(max_value=0) | st.floats(min_value=1) | values(0, 1, (0.5,)),
    "amount": NO_NUMBER | st.floats(max_value=0) | st.floats(min_value=1) | st.integers(max_value=0) | values((1,)),
    "flag": values(None, 1, 0, "True", "", [], NAN, object()),
    "word": WORDLIKE | st.text(max_size=8).map(lambda text: "no " + text),
    "words": WORDLIKE | values([], ["no such word"], "top", 3, [3], [None], {}, [["top"]]),
    "text": values(None, 3, True, NAN, b"text", ["text"], {}, object()),
    "function": values(3, "print", [], {}, True, NAN, object()),
    "model": OBJECTS,
    "sample": OBJECTS,
    "samples": OBJECTS | values([None], [3], ["a text"], [[]], object()),
    "inputs": OBJECTS,
    "several inputs": OBJECTS | values([None], [3], ["a text"]),
    "given": OBJECTS | values([None], [3], ["a text"], [[]]),
    "metric": OBJECTS | values("logit_diff", mech.LogitDiff, ["a"]),
    "ranking": OBJECTS | values([(1, 2)], {"heads": [[0, 0, 1.0]]}, "ranking.json", xr.Dataset()),
    "rankings": OBJECTS | values({"a": 3}, {"a": None}, [3], {3: 4}),
    "tasks": OBJECTS | values({"a": 3}, {"a": [3]}, {"a": None}, {3: []}),
    "sets": values(3, "image", NAN, {}, {"a": 3}, {"a": [(0.5, 1)]}, {"a": [(99, 0)]}, {"a": []}, {3: [(0, 1)]}),
    "places": values(3, NAN, {}, {"a": 0.5}, {"a": [True, 2]}, {"a": "nowhere"}, {"a": []}, {"a": None}),
    "where": values(1.5, NAN, None, {}, [], "", "nowhere", [1.5], [True, 2], ["0"], [10**6], [-(10**6)], b"",
            object(),
                    [True, False], np.zeros(3, dtype=bool), torch.tensor([0.5]), [None], [[0]], mech.Box),
    "heads": values(None, 3, NAN, "L1H2", [3], [(0.5, 1)], [(99, 0)], [(-1, 0)], [("a", "b")], {1: 2}, [(1, 2, 3)],
            [],
                    [(True, 2)], [None], np.ones((2, 2)), np.ones((1, 1), dtype=bool), object()),
    "layers": values(3, NAN, "01", [1.5], ["0"], [99], [-1], [], [True, 2], {1: 2}, [None], [True], object(), [[0]]),
    "path": values(3, NAN, [], {}, True, 1.5, object()),
    "dataset": OBJECTS | values(xr.Dataset(), xr.DataArray(np.zeros(2)), xr.Dataset({"a": 1}), {"effect": 1}),
    "numbers": values([], "12", None, 3, ["1"], [NAN], [INF], [None], [True], {}, [[]], object()),
    "amounts": values([], "12", None, 3, ["1"], [NAN], [INF], [0], [-1], [1.5], [True], [None], {}, object()),
    "grid": values((4,), (4, 4, 4), (0, 4), (4, -1), (1.5, 4), 4, "44", (10**5, 10**5), (NAN, 4), (True, 4), [],
            None),
    "regions": values(3, NAN, {}, [], {"a": 0.5}, ["nowhere"], [None], [1.5], object(), {"a": [True, 2]}),
    "evidence": OBJECTS.filter(lambda value: str(value) not in ("[]", "None")) | values([3], ["box"], [(0, 0, 1, 1)]),
    "pictures": values(3, NAN, "picture.png", [3], ["picture.png"], {}, [None], object(), True, [np.zeros((4, 4))]),
    "answers": values(None, 1.5, NAN, {}, [1.5], [None], b"yes", object(), True, [True]),
    "dtype": values(3, NAN, [], object(), "no dtype", 0.5),
    "device": values(3.5, NAN, [], object(), "no device"),
    "mask": values(None, 3, "mask", [[True]], np.zeros((2, 2)), np.zeros(4, dtype=bool), object(), NAN),
    "tensors": values(None, 3, [], {}, "ids", {"input_ids": 3}, {"input_ids": torch.zeros(3)}, object()),
    "array": values(None, 3, "scores", [[0.0]], {}, np.zeros(3), np.full((2, 2), NAN), object(), np.zeros((0, 0))),
    "columns": values(None, 3, "kind", [0], {}, object(), NAN),
    "settings": values(3, "settings", [], [1], object(), True),
    "hooks": values(3, "blocks.0.hook_mlp_out", [3], [("blocks.0.hook_mlp_out",)], [("blocks.0.hook_mlp_out", 3)],
                    [("blocks.0.hook_nothing", print)], [(None, print)], {}, None, object()),
    "points": values(3, "blocks.0.hook_nothing", ["blocks.0.hook_nothing"], [3], NAN, {}, object(), b"blocks", True),
    "specs": OBJECTS | values(mech.Ablate, "ablate", [], mech.Ablate(heads=[(99, 0)], to="zero")),
    "source": values(3, "run", [], {}, object(), NAN, True),
    "rows": values(None, 3, "image", [1.5], [None], [["a"]], object()),
    "pair of texts": values(None, 3, "ab", ("a",), ("a", 3), ("a", "b", "c"), {}, object()),
    "scores": values(None, 3, [], ["nonsense"], "nonsense", [3], {}, {"a": 3}, {"a": "ram"}, object(), True),
    "ends": values(None, 3, [], {}, ["L99H0"], ["nonsense"], "nonsense", [(99, 0)], [(0.5, 1)], [3], object(), NAN),
    "records": values(3, NAN, True, object(), [3], [None]),
    "layouts": values(None, 3, "layout", [], [3], object()),
}  # fmt: skip
WRONG["dims"] = WRONG["layers"].filter(lambda value: str(value) != "[99]")  # as many as the stream is wide
WRONG["head list"] = WRONG["heads"].filter(lambda value: str(value) not in ("[(99, 0)]", "[(-1, 0)]", "[(1, 2, 3)]"))
# May be left out with None, or with nothing in it.
OPTIONAL = {"?" + kind: strategy.filter(lambda value: value is not None) for kind, strategy in WRONG.items()}
EMPTY = {"*" + kind: strategy.filter(lambda value: value is not None and not _empty(value))
         for kind, strategy in WRONG.items()}  # fmt: skip


def _empty(value: Any) -> bool:
    return hasattr(value, "__len__") and len(value) == 0


def wrong(kind: str) -> st.SearchStrategy:
    """Values that an argument of this kind may not have; "?": None may be given, "*": and nothing, too."""
    return (WRONG | OPTIONAL | EMPTY)[kind]


def _opened(function: Callable[..., Any]) -> Callable[..., Any]:
    """A context manager that is entered, and left again if it could be."""

    def call(*args: Any, **kwargs: Any) -> None:
        with function(*args, **kwargs):
            pass

    return call


def _intervened(model: Any, specs: Any) -> None:
    with mech.intervene(model, specs):
        pass


def calls(model: Any, folder: Any) -> dict[str, Call]:
    """Every public name, called rightly."""
    samples = mech.haystacks("grounding", n=12, seed=0)
    find, test = samples[:4], samples[6:10]
    one, inputs = test[0], model.inputs_of(test[0])
    scores = np.random.default_rng(0).random((4, model.cfg.n_layers, model.cfg.n_heads))
    ram = xr.DataArray(scores, dims=("example", "layer", "head"), name="ram")
    ranking = mech.rank_heads(ram)
    metric = mech.LogitDiff(one.answer, one.counterfactual.answer)
    run = {"model": "model", "samples": "samples"}
    usual = {"seed": "seed", "batch_size": "count"}
    told = {"progress": "?function"}
    other = {"allow_other_model": "flag"}
    pair = {"model": "model", "clean": "given", "corrupted": "?given", "metric": "metric"}
    right_pair = {"model": model, "clean": one, "corrupted": None, "metric": metric}
    tested = {"model": model, "samples": test}
    layout = inputs.layout
    task = mech.CircuitTask("a task", model, find, test)
    graph = mech.CircuitGraph.of(model, np.zeros((1 + model.cfg.n_layers * (model.cfg.n_heads + 1),
                                                  model.cfg.n_layers * (3 * model.cfg.n_heads + 1) + 1)))  # fmt: skip
    columns = {name: getattr(layout, name) for name in ("kind", "image", "frame", "row", "col", "view", "rect")}
    picture = one.images[0]
    found = {
        "ablation": Call(mech.ablation, {**tested, "ranking": ranking, "to": "zero"}, {
            **run, "ranking": "ranking", "reference": "*samples", "to": "words", "bands": "words",
            "fractions": "amounts",
            "n_random": "count", "positions": "where", "phase": "word", **usual, **told, **other}),
        "acceleration": Call(mech.acceleration, {**tested, "find": find}, {
            **run, "find": "samples", "window": "?count", "sinks": "whole", "choices": "words", "shares": "amounts",
            "n_random": "count", "rankings": "*rankings", "turns": "whole", **usual, **told, **other}),
        "activation_patching": Call(mech.activation_patching, right_pair, {
            **pair, "point": "word", "over": "*words", "positions": "where", "regions": "?regions", "layers": "layers",
            "direction": "word", "method": "word", "confirm": "amount", **told}),
        "agreement": Call(mech.agreement, {"rankings": {"a": ranking}}, {
            "rankings": "rankings", "k": "amount", "n_resamples": "whole", "seed": "seed"}),
        "with_question": Call(mech.with_question, {"sample": one, "question": "What?", "answer": "3"}, {
            "sample": "sample", "question": "text", "answer": "text"}),
        "attention_from": Call(mech.attention_from, {"model": model, "inputs": inputs}, {
            "model": "model", "inputs": "inputs", "queries": "word"}),
        "attention_mass": Call(mech.attention_mass, {"model": model, "inputs": inputs, "sets": {"a": "image"}}, {
            "model": "model", "inputs": "inputs", "sets": "places", "queries": "word"}),
        "attention_sinks": Call(mech.attention_sinks, tested, {
            **run, "by": "word", "tau": "positive", "dims": "dims", "share": "share", "batch_size": "count", **told}),
        "attribution": Call(mech.attribution, right_pair, {
            **pair, "point": "word", "over": "*words", "positions": "where", "regions": "?regions", "layers": "layers",
            "ig_steps": "whole", "path": "word", "qk_fix": "flag", "direction": "word", "check": "whole",
            "seed": "seed"}),
        "causal_report": Call(mech.causal_report, {**tested, "ranking": ranking, "find": find}, {
            **run, "ranking": "?ranking", "find": "?samples", "reference": "*samples", "method": "?word",
            "threshold": "positive", "alpha": "share", "n_random": "count", "n_boot": "count", "n_paths": "whole",
            "top": "amount", "bias": "*numbers", **usual, **told, **other}),
        "circuit_scores": Call(mech.circuit_scores, {"task": task}, {
            "task": "ranking", "entries": "words", "n_boot": "count", **usual, **told}),
        "circuit_task": Call(mech.circuit_task, {}, {
            "name": "word", "family": "word", "n": "count", "seed": "seed"}),
        "circuit_table": Call(mech.circuit_table, {}, {"found": "dataset"}),
        "CircuitTask": Call(mech.CircuitTask, {"name": "a", "model": model, "find": find, "test": test}, {
            "name": "text", "model": "model", "find": "samples", "test": "samples", "truth": "?array"}),
        "CircuitGraph": Call(mech.CircuitGraph, dict(shape=graph.shape, scores=graph.scores, inside=graph.inside), {
            "shape": "ranking", "scores": "array", "inside": "array"}),
        "edge_attribution": Call(mech.edge_attribution, right_pair, {
            **pair, "senders": "?ends", "receivers": "?ends", "ig_steps": "whole", "norm": "word",
            "direction": "word",
            "check": "whole", "seed": "seed"}),
        "evidence_retrieval": Call(mech.evidence_retrieval, {**tested, "ranking": ranking}, {
            **run, "ranking": "ranking", "over": "?word", "grid": "grid", "heads": "amount", "ks": "numbers",
            "reduce": "word", "n_random": "count", **usual, **told, **other}),
        "explore": Call(mech.explore, tested, {**run, "reference": "?samples", "link": "text"}),
        "haystacks": Call(mech.haystacks, {"domain": "grounding", "n": 1}, {
            "domain": "word", "n": "count", "seed": "seed", "n_items": "?count", "n_pictures": "?count",
            "split": "word",
            **({"answer": "word", "form": "word"} if hasattr(mech, "Passage") else {})}),
        "head_scores": Call(mech.head_scores, tested, {
            **run, "scores": "scores", **usual, "sink_tau": "positive", "max_new_tokens": "count", **told}),
        "hub_samples": Call(mech.hub_samples, {"name": "textvqa", "records": []}, {
            "name": "word", "n": "count", "seed": "seed", "root": "path", "records": "records", "split": "?text",
            "files": "?text", "most": "?count", "skip_bad": "flag"}),
        "input_attribution": Call(mech.input_attribution, {"model": model, "inputs": inputs, "metric": metric}, {
            "model": "model", "inputs": "inputs", "metric": "metric", "over": "word", "ig_steps": "whole",
            "baseline": "word"}),
        "intervene": Call(_intervened, {"model": model, "specs": mech.Scale([(0, 0)], 2.0)}, {
            "model": "model", "specs": "specs"}),
        "key_coverage": Call(mech.key_coverage, tested, {
            **run, "sets": "sets", "keys": "amount", "batch_size": "count"}),
        "learned_gates": Call(mech.learned_gates, tested, {
            **run, "sinks": "whole", "window": "count", "steps": "count", "rate": "positive", "sparsity": "number",
            **usual, **told}),
        "localize": Call(_opened(mech.localize), {"model": model}, {
            "model": "model", "policy": "?ranking", "dense_heads": "*heads", "sinks": "whole", "window": "count",
            "keep_text": "flag", "phase": "word"}),
        "sparsify": Call(mech.sparsify, tested, {
            **run, "sinks": "whole", "window": "count", "target": "?positive", "strength": "?positive",
            "at_most": "?amount", "rank": "whole", "steps": "count", "rate": "positive", **usual, **told}),
        "localize_dynamic": Call(_opened(mech.localize_dynamic), {"model": model, "n": 2}, {
            "model": "model", "n": "amount", "sinks": "whole", "window": "count", "layers": "?count",
            "keep_text": "flag", "phase": "word"}),
        "logit_attribution": Call(mech.logit_attribution, {"model": model, "clean": one}, {
            "model": "model", "clean": "given", "metric": "?metric", "sources": "places", **told}),
        "logit_lens": Call(mech.logit_lens, {"model": model, "inputs": inputs}, {
            "model": "model", "inputs": "given", "positions": "where", "layers": "layers", "track": "?answers",
            "k": "count"}),
        "deciding_queries": Call(mech.deciding_queries, {"model": model, "sample": one, "heads": [(0, 2)]}, {
            "model": "model", "sample": "sample", "heads": "heads", "threshold": "number"}),
        "attention_maps": Call(mech.attention_maps, {**tested, "ranking": ranking}, {
            **run, "ranking": "ranking", "k": "count", "bands": "sets", "queries": "word", **other}),
        "modality_transfer": Call(getattr(mech, "modality_transfer", None), {
            "model": model, "pictures": test, "text": mech.haystacks("grounding", n=2, form="text")}, {
            "model": "model", "pictures": "samples", "text": "samples", "base": "?model", "score": "scores",
            "k": "amount", "n_resamples": "count", **usual, **told}) if hasattr(mech, "modality_transfer") else None,
        "ov_reading": Call(mech.ov_reading, {"model": model, "heads": [(0, 0)], "of": one}, {
            "model": "model", "heads": "heads", "of": "given", "positions": "where", "track": "?answers",
            "k": "count"}),
        "path_patching": Call(mech.path_patching, {**right_pair, "senders": [(0, 0)]}, {
            **pair, "senders": "ends", "receivers": "ends", "freeze": "*words", "positions": "where",
            "regions": "places",
            "receiver_positions": "where", "receiver_regions": "places", "direction": "word", "method": "word",
            **told}),
        "prune_heads": Call(mech.prune_heads, {"model": model, "heads": [(0, 0)], "to": "zero"}, {
            "model": "model", "heads": "heads", "to": "word", "reference": "*samples", **other}),
        "pruning_report": Call(mech.pruning_report, {**tested, "pruned": None}, {
            **run, "pruned": "ranking", "batch_size": "count", "turns": "whole"}),
        "published_claims": Call(mech.published_claims, tested, {
            **run, "only": "?words", "n_random": "count", **usual, **told}),
        "rank_heads": Call(mech.rank_heads, {"scores": ram}, {
            "scores": "dataset", "score": "text", "model": "?text", "domain": "?text"}),
        "read_heads": Call(mech.read_heads, {"source": [(0, 0)]}, {"source": "head list"}),
        "read_samples": Call(mech.read_samples, {"path": folder / "none.jsonl"}, {
            "path": "path", "root": "path", "n": "?count", "seed": "seed"}),
        "redirection": Call(mech.redirection, {**tested, "ranking": ranking}, {
            **run, "ranking": "ranking", "bias": "numbers", "heads": "amount", "bands": "words", "n_random": "count",
            "query": "where", "phase": "word", **usual, **told, **other}) if hasattr(mech, "redirection") else None,
        "reference_activations": Call(mech.reference_activations, tested, {
            **run, "point": "word", "n_draws": "count", **usual}),
        "report": Call(mech.report, {}, {"study_folder": "path"}),
        "retrieval_attention_mass": Call(mech.retrieval_attention_mass, tested, {
            **run, "queries": "word", "batch_size": "count", **told}),
        "retrieval_test": Call(mech.retrieval_test, tested, {
            **run, "score": "scores", "alpha": "share", "n_permutations": "count", **usual, **told}),
        "sample_curve": Call(mech.sample_curve, {"ranking": ranking}, {
            "ranking": "ranking", "sizes": "?numbers", "k": "amount", "n_splits": "count", "seed": "seed"}),
        "scale_agreement": Call(mech.scale_agreement, {"a": ranking, "b": ranking}, {
            "a": "ranking", "b": "ranking", "n_bins": "?count", "n_permutations": "count", "seed": "seed"}),
        "seed_agreement": Call(mech.seed_agreement, {"a": ranking, "b": ranking}, {
            "a": "ranking", "b": "ranking", "k": "amount", "n_permutations": "count", "seed": "seed"}),
        "steering": Call(mech.steering, {**tested, "ranking": ranking}, {
            **run, "ranking": "ranking", "factors": "numbers", "heads": "amount", "bands": "words",
            "n_random": "count",
            "positions": "where", "phase": "word", **usual, **told, **other}),
        "tag_leak": Call(mech.tag_leak, tested, {**run, "tags": "pair of texts", **usual}),
        "token_attention": Call(mech.token_attention, {"model": model, "inputs": inputs}, {
            "model": "model", "inputs": "inputs", "layers": "layers", "groups": "count"}),
        "trace_circuit": Call(mech.trace_circuit, {"model": model, "clean": [one], "metric": metric, "alpha": None}, {
            **pair, "start": "word", "threshold": "positive", "heads": "?heads", "max_nodes": "count",
            "alpha": "?share",
            "direction": "word", "seed": "seed"}),
        "transfer": Call(mech.transfer, {"model": model, "find": {"a": find}, "test": {"a": test}}, {
            "model": "model", "find": "tasks", "test": "tasks", "rankings": "?rankings", "k": "amount", "to": "word",
            "n_random": "count", **usual, **told, **other}),
        "view": Call(mech.view, {"result": ranking}, {"result": "dataset", "folder": "path"}),
        "with_counterfactuals": Call(mech.with_counterfactuals, tested, {**run, "by": "word"}),
        "without_evidence": Call(mech.without_evidence, {"sample": one}, {"sample": "sample", "by": "word"}),
        "without_pictures": Call(mech.without_pictures, {"model": model, "inputs": inputs}, {
            "model": "model", "inputs": "inputs", "reference": "*several inputs"}),
        "write_samples": Call(mech.write_samples, {"samples": test, "folder": folder}, {
            "samples": "samples", "folder": "path", "name": "text"}),
        # tables of results
        **{name: Call(getattr(mech, name), {}, {"result": "dataset"})
           for name in ("redirection_table", "retrieval_table", "modality_table", "sink_tokens")
           if hasattr(mech, name)},
        "steering_table": Call(mech.steering_table, {}, {"curve": "dataset", "measure": "path"}),
        "top_edges": Call(mech.top_edges, {}, {"result": "dataset", "n": "path"}),
        # values
        "Ablate": Call(mech.Ablate, {"heads": [(0, 0)], "to": "zero"}, {
            "point": "word", "to": "word", "phase": "word", "reference": "*samples", "seed": "seed", **other}),
        "Box": Call(mech.Box, {"x0": 0, "y0": 0, "x1": 1, "y1": 1}, {
            "x0": "number", "y0": "number", "x1": "number", "y1": "number", "image": "int", "frame": "?int"}),
        "CausalReport": Call(mech.CausalReport, {}, {"dataset": "dataset"}),
        "Circuit": Call(mech.Circuit, {"model": "m", "start": "logits", "direction": "noise", "n_examples": 1,
                                       "groups": (1,), "found": ()}, {
            "model": "text", "start": "text", "direction": "text", "groups": "*path", "found": "*path",
            "unfollowed": "*path", "provenance": "settings"}),
        "Custom": Call(mech.Custom, {"point": "hook_embed", "fn": print}, {"point": "path", "fn": "function"}),
        "Head": Call(mech.Head, {"layer": 0, "head": 0}, {"layer": "int", "head": "int"}),
        "Inputs": Call(mech.Inputs, {"tensors": inputs.tensors, "layouts": inputs.layouts}, {
            "tensors": "tensors", "layouts": "layouts", **({"made_by": "text"} if hasattr(mech, "Passage") else {})}),
        "Knockout": Call(mech.Knockout, {}, {"phase": "word"}),
        "LogProb": Call(mech.LogProb, {"answer": "a"}, {"answer": "answers"}),
        "LogitDiff": Call(mech.LogitDiff, {"answer": "a", "wrong": "b"}, {"answer": "answers", "wrong": "answers"}),
        "Mask": Call(mech.Mask, {"pixels": np.ones((2, 2), dtype=bool)}, {
            "pixels": "mask", "image": "int", "frame": "?int"}),
        "Patch": Call(mech.Patch, {"source": inputs, "heads": [(0, 0)]}, {"point": "word", "source": "*source"}),
        "Policy": Call(mech.Policy, {}, {
            "sinks": "whole", "window": "count", "keep_text": "flag", "phase": "word"}),
        "Probability": Call(mech.Probability, {"answer": "a"}, {"answer": "answers"}),
        "Rank": Call(mech.Rank, {"answer": "a"}, {"answer": "answers"}),
        "Ranking": Call(mech.Ranking, {"mean": np.zeros((2, 2))}, {
            "mean": "array", "score": "text", "model": "text", "domain": "text", "examples": "*path"}),
        "Sample": Call(mech.Sample, {"question": "a", "answer": "b", "images": (picture,)}, {
            "question": "text", "answer": "text", "images": "pictures", "video": "pictures", "fps": "positive",
            "evidence": "evidence", "domain": "text", "id": "text", "counterfactual": "?sample",
            **({"context": "text", "spans": "evidence"} if hasattr(mech, "Passage") else {})}),
        "Samples": Call(mech.Samples, {"samples": [one]}, {"samples": "*samples"}),
        "Scale": Call(mech.Scale, {"heads": [(0, 0)], "factor": 2.0}, {"factor": "number", "phase": "word"}),
        "Score": Call(mech.Score, {}, {
            "queries": "word", "reduce": "word", "aggregate": "word", "calibrate": "word", "on": "word",
            "top": "amount",
            "source": "text"}),
        "Study": Call(mech.Study, {"path": folder / "study"}, {"path": "path", "settings": "?settings"}),
        "TokenLayout": Call(mech.TokenLayout, {**columns, "tokens": layout.tokens, "spans": layout.spans}, {
            **dict.fromkeys(columns, "columns"), "frames_per_token": "count", "memory": "?source"}),
        # methods
        "Samples.split": Call(samples.split, {}, {"fraction": "share", "seed": "seed"}),
        "Samples.draw": Call(samples.draw, {"n": 1}, {"n": "count", "seed": "seed"}),
        "Ranking.top": Call(ranking.top, {}, {"k": "amount"}),
        "Ranking.random": Call(ranking.random, {"k": 2}, {
            "k": "amount", "n_draws": "count", "seed": "seed", "exclude": "*heads"}),
        "Ranking.stability": Call(ranking.stability, {}, {"n_resamples": "count", "k": "amount", "seed": "seed"}),
        "Ranking.interval": Call(ranking.interval, {}, {"level": "share", "n_resamples": "count", "seed": "seed"}),
        "TokenLayout.positions": Call(layout.positions, {}, {"where": "where"}),
        "TokenLayout.cells": Call(layout.cells, {"rows": 2, "cols": 2}, {
            "rows": "count", "cols": "count", "image": "whole", "frame": "?whole"}),
        "TokenLayout.rectangle": Call(layout.rectangle, {}, {"position": "int"}),
        "HookedMLLM.from_pretrained": Call(mech.HookedMLLM.from_pretrained, {"name": "reference:llava-s"}, {
            "name": "path", "dtype": "dtype", "device": "device", "revision": "?text", "quantization": "?word"}),
        "HookedMLLM.generate": Call(model.generate, {"inputs": inputs}, {"inputs": "source",
            "max_new_tokens": "count"}),
        "HookedMLLM.generate_text": Call(model.generate_text, {"inputs": inputs}, {
            "inputs": "source", "max_new_tokens": "count"}),
        "HookedMLLM.forward": Call(model.forward, {"inputs": inputs}, {"inputs": "source"}),
        "HookedMLLM.run_with_cache": Call(model.run_with_cache, {"inputs": inputs}, {
            "inputs": "source", "names_filter": "points", "remove_batch_dim": "flag"}),
        "HookedMLLM.encode_pictures": Call(model.encode_pictures, {}, {"inputs": "source"}),
        "HookedMLLM.hooks": Call(_opened(model.hooks), {}, {"fwd_hooks": "hooks", "bwd_hooks": "hooks"}),
        "HookedMLLM.add_hook": Call(model.add_hook, {"name": "hook_embed", "hook": print}, {
            "name": "points", "hook": "function"}),
        "HookedMLLM.attending": Call(_opened(model.attending), {"fn": print}, {"fn": "function", "stack": "word"}),
        "HookedMLLM.inputs": Call(model.inputs, {"question": "What?", "images": [picture]}, {
            "question": "text", "images": "pictures", "video": "pictures", "fps": "positive", "answer": "text"}),
        "HookedMLLM.inputs_of": Call(model.inputs_of, {"sample": one}, {"sample": "sample", "answer": "flag"}),
        "HookedMLLM.collate": Call(model.collate, {}, {"rows": "several inputs"}),
        "HookedMLLM.select": Call(model.select, {}, {"names": "points"}),
    }  # fmt: skip
    for name, spec in {"Ablate": mech.Ablate, "Scale": partial(mech.Scale, factor=2.0), "Patch": mech.Patch}.items():
        right = {"to": "zero"} if name == "Ablate" else {"source": inputs} if name == "Patch" else {}
        found[f"{name}, run"] = Call(
            partial(_run_with, model, inputs, spec),
            {"heads": [(0, 0)], **right},
            {"heads": "heads", "positions": "where"},
        )
    found["Knockout, run"] = Call(
        partial(_run_with, model, inputs, mech.Knockout), {}, {"query": "where", "key": "where", "layers": "*layers"}
    )
    if hasattr(mech, "PerRow"):
        found["PerRow"] = Call(mech.PerRow, {}, {"rows": "rows"})
        found["Redirect, run"] = Call(
            partial(_run_with, model, inputs, mech.Redirect), {"heads": [(0, 0)], "to": "image", "bias": 1.0},
            {"heads": "heads", "to": "where", "bias": "number", "query": "where", "phase": "word"},
        )  # fmt: skip
        box = mech.Box(0, 0, 1, 1)
        found["Passage"] = Call(mech.Passage, {"start": 0, "stop": 1}, {"start": "whole", "stop": "count"})
        found["Distractor"] = Call(
            mech.Distractor, {"region": box, "answer": "a"}, {"region": "ranking", "answer": "text"}
        )
    found["Frames"], found["Pages"] = (
        Call(lambda index, kind=kind: kind(index), {}, {"index": "int"}) for kind in (mech.Frames, mech.Pages)
    )
    return {name: call for name, call in found.items() if call is not None}


def _run_with(model: Any, inputs: Any, spec: Callable[..., Any], **options: Any) -> None:
    with mech.intervene(model, spec(**options)) as changed:
        changed(inputs)
