"""A circuit as a graph: every edge of the text stack with its score, and which edges are in it; to and from MIB's JSON.

    graph = CircuitGraph.of(model, scores)          # over (sender, receiver), as ``edge_attribution`` labels them
    graph.largest(50).to_mib("circuit.json")        # {"cfg": ..., "nodes": ..., "edges": {"input->a1.h0<q>": ...}}
    CircuitGraph.from_mib("circuit.json", model)    # refused for a model of another shape

Nodes are ``embed``, heads, MLPs and ``logits``; a head reads through its query, and through the key and value of its
key/value head. MIB's file has keys and values for each *query* head. Those of one group are written alike; when read,
they become one edge with the mean of their scores, in the circuit if one of them is: under grouped queries they cannot
be separated.

Only ``cfg`` (its sizes must be the model's) and ``edges`` are read from a file. Edges that are not listed are outside
the circuit and score 0; ``nodes`` follows from the edges. Circuits of nodes or neurons, and ``.pt`` files, are not
read.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from mech.arguments import Whole, checked
from mech.errors import ExperimentError, OutputError, suggestion
from mech.experiments.paths.ends import Node
from mech.model import HookedMLLM
from mech.results.store import read_json, write_json

_EDGE = re.compile(r"(input|m(\d+)|a(\d+)\.h(\d+))->(logits|m(\d+)|a(\d+)\.h(\d+)<([qkv])>)")


@dataclass(frozen=True)
class Shape:
    """What determines the edges of a model: layers, query heads, and key/value heads of each layer."""

    n_layers: int
    n_heads: int
    kv_heads: tuple[int, ...]
    d_model: int

    @classmethod
    def of(cls, model: HookedMLLM) -> "Shape":
        cfg = model.cfg
        return cls(cfg.n_layers, cfg.n_heads, tuple(cfg.kv_heads[layer] for layer in range(cfg.n_layers)), cfg.d_model)

    @cached_property
    def senders(self) -> tuple[Node, ...]:
        """Embeddings, then heads and MLP of each layer."""
        found = [Node("embed")]
        for layer in range(self.n_layers):
            found += [Node("head", layer, head) for head in range(self.n_heads)]
            found.append(Node("mlp", layer))
        return tuple(found)

    @cached_property
    def receivers(self) -> tuple[Node, ...]:
        """Queries, keys, values and MLP of each layer, then the logits."""
        found = []
        for layer in range(self.n_layers):
            found += [Node("q", layer, head) for head in range(self.n_heads)]
            found += [Node(letter, layer, head) for letter in "kv" for head in range(self.kv_heads[layer])]
            found.append(Node("mlp", layer))
        return (*found, Node("logits", self.n_layers))

    @cached_property
    def exists(self) -> Bool[np.ndarray, "sender receiver"]:
        """Where there is an edge: the receiver reads what was written before it."""
        return np.array([[s.stage < r.stage for r in self.receivers] for s in self.senders])


@checked
@dataclass(frozen=True, eq=False)
class CircuitGraph:
    """Every edge of a model with a score. Made by ``of`` or ``from_mib``.

    Attributes:
        shape: of the model.
        scores: over (sender, receiver); 0 where there is no edge.
        inside: which edges are in the circuit; none in a graph that only has scores.
    """

    shape: Shape
    scores: Float[np.ndarray, "sender receiver"] = field(repr=False)
    inside: Bool[np.ndarray, "sender receiver"] = field(repr=False)

    @classmethod
    def of(cls, model: HookedMLLM, scores: Float[np.ndarray, "sender receiver"]) -> "CircuitGraph":
        """A graph of a model's edges; scores where there is no edge are ignored.

        Raises:
            ExperimentError: scores of another shape, or an edge with nan.
        """
        shape = Shape.of(model)
        exists, given = shape.exists, np.asarray(scores, dtype=np.float64)
        if given.shape != exists.shape or not np.isfinite(given[exists]).all():
            raise ExperimentError(
                f"scores of shape {given.shape}",
                f"a finite number for every edge, over {exists.shape[0]} senders and {exists.shape[1]} receivers",
                "use edge_attribution(...).effect.mean('example').values",
            )
        return cls(shape, np.where(exists, given, 0.0), np.zeros(exists.shape, dtype=bool))

    @property
    def n_edges(self) -> int:
        """Edges of the model, in the circuit or not."""
        return int(self.shape.exists.sum())

    def largest(self, n: Whole, signed: bool = False) -> "CircuitGraph":
        """The circuit of the ``n`` edges with the largest absolute scores, or largest scores if ``signed``."""
        size = self.scores if signed else np.abs(self.scores)
        order = np.argsort(-np.where(self.shape.exists, size, -np.inf), axis=None, kind="stable")
        inside = np.zeros(self.scores.size, dtype=bool)
        inside[order[: min(n, self.n_edges)]] = True
        return replace(self, inside=inside.reshape(self.scores.shape))

    def edges(self) -> list[tuple[str, str, float]]:
        """The edges of the circuit, (sender, receiver, score), the largest first."""
        at = sorted(map(tuple, np.argwhere(self.inside).tolist()), key=lambda one: -abs(self.scores[one]))
        names = [str(node) for node in self.shape.senders], [str(node) for node in self.shape.receivers]
        return [(names[0][s], names[1][r], float(self.scores[s, r])) for s, r in at]

    def to_mib(self, path: str | Path | None = None) -> dict[str, Any]:
        """The graph in MIB's format, as plain values; with ``path`` it is written as well."""
        shape, edges, used = self.shape, {}, set()
        for (s, sender), (r, receiver) in (
            (one, other)
            for one in enumerate(shape.senders)
            for other in enumerate(shape.receivers)
            if shape.exists[one[0], other[0]]
        ):
            group = shape.n_heads // shape.kv_heads[receiver.layer] if receiver.kind in ("k", "v") else 1
            for head in range(receiver.index * group, (receiver.index + 1) * group):
                name = f"{_called(sender)}->{_called(replace(receiver, index=head))}"
                edges[name] = {"score": float(self.scores[s, r]), "in_graph": bool(self.inside[s, r])}
                if self.inside[s, r]:
                    used |= {_called(sender), _called(replace(receiver, index=head)).split("<")[0]}
        names = [_called(node) for node in (*shape.senders, shape.receivers[-1])]
        cfg = {"n_layers": shape.n_layers, "n_heads": shape.n_heads, "d_model": shape.d_model,
               "parallel_attn_mlp": False}  # fmt: skip
        value = {"cfg": cfg, "nodes": {name: {"in_graph": name in used} for name in names}, "edges": edges}
        if path is not None:
            write_json(value, path)
        return value

    @classmethod
    def from_mib(cls, source: str | Path | Mapping[str, Any], model: HookedMLLM) -> "CircuitGraph":
        """A circuit from MIB's JSON, given as a mapping or as a file.

        Raises:
            OutputError: it cannot be read, has no edges, is for a model of another shape, names an edge that this model
                does not have, or has a score that is not finite.
        """
        where = "this circuit" if isinstance(source, Mapping) else str(source)
        try:
            value = source if isinstance(source, Mapping) else read_json(source)
            cfg, listed = value["cfg"], value["edges"]
            entries = {str(name): (float(edge["score"]), bool(edge["in_graph"])) for name, edge in listed.items()}
            sizes = {name: int(cfg[name]) for name in ("n_layers", "n_heads", "d_model")}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(
                f"{where} is not a circuit of edges ({error!r})", '{"cfg": ..., "edges": {"input->m0": {"score": ...}}}'
            ) from error
        shape = Shape.of(model)
        own = {name: getattr(shape, name) for name in sizes}
        if sizes != own or cfg.get("parallel_attn_mlp"):
            raise OutputError(f"{where} of a model with {sizes}", f"{own}, as {model.name} has", "open that model")
        return cls._read(shape, entries, where)

    @classmethod
    def _read(cls, shape: Shape, entries: Mapping[str, tuple[float, bool]], where: str) -> "CircuitGraph":
        places = {node: i for i, node in enumerate(shape.senders)}, {node: i for i, node in enumerate(shape.receivers)}
        exists = shape.exists
        total, count, inside = np.zeros(exists.shape), np.zeros(exists.shape, dtype=int), np.zeros(exists.shape, bool)
        for name, (score, chosen) in entries.items():
            ends = _ends(name, shape)
            at = None if ends is None else (places[0].get(ends[0]), places[1].get(ends[1]))
            if at is None or None in at or not exists[at] or not math.isfinite(score):
                raise OutputError(
                    f"{where} has an edge {name!r} with score {score}", "edges of this model, with finite scores",
                    suggestion(name, [f"{_called(s)}->{_called(r)}" for s in shape.senders for r in shape.receivers]),
                )  # fmt: skip
            total[at] += score
            count[at] += 1
            inside[at] |= chosen
        return cls(shape, total / np.maximum(count, 1), inside)


def _called(node: Node) -> str:
    """A node in MIB's notation; for a key or value, ``index`` is that of a query head."""
    if node.kind in ("embed", "logits"):
        return {"embed": "input"}.get(node.kind, node.kind)
    if node.kind == "mlp":
        return f"m{node.layer}"
    return f"a{node.layer}.h{node.index}" + ("" if node.kind == "head" else f"<{node.kind}>")


def _ends(name: str, shape: Shape) -> tuple[Node, Node] | None:
    """The nodes of an edge in MIB's notation; None if it is not MIB's notation, or there is no such layer."""
    found = _EDGE.fullmatch(name)
    if found is None:
        return None
    _, mlp, layer, head, _, to_mlp, to_layer, to_head, letter = found.groups()
    sender = Node("mlp", int(mlp)) if mlp else Node("head", int(layer), int(head)) if layer else Node("embed")
    if to_mlp:
        return sender, Node("mlp", int(to_mlp))
    if not to_layer:
        return sender, Node("logits", shape.n_layers)
    if int(to_layer) >= shape.n_layers:
        return None
    group = 1 if letter == "q" else shape.n_heads // shape.kv_heads[int(to_layer)]
    return sender, Node(letter, int(to_layer), int(to_head) // group)
