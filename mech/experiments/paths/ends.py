"""The ends of paths by label, and their positions: the request to ``path_patching``, checked before any forward.

Senders write to the residual stream: ``embed``, ``L2H5`` (a head), ``mlp.2``. Receivers read it: ``L4H0.q``,
``L4K0.k``, ``L4K0.v`` (queries by head, keys and values by key/value head), ``mlp.4`` and ``logits``.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from mech.errors import ExperimentError
from mech.inputs import Inputs
from mech.inputs.layout import Where
from mech.model import HookedMLLM
from mech.model.points import point_name

FREEZE = ("attention", "mlp", "norm")
LETTERS = ("q", "k", "v")
_LABEL = re.compile(r"(embed|logits)|mlp\.(\d+)|L(\d+)H(\d+)(\.q)?|L(\d+)K(\d+)\.([kv])")

End = str | tuple[int, int]
Ends = Sequence[End] | Mapping[str, End | Sequence[End]]


@dataclass(frozen=True)
class Node:
    """A part of the model that writes to the residual stream or reads it.

    ``kind`` is "embed", "head", "mlp", "q", "k", "v" or "logits"; ``index`` is the head or key/value head.
    """

    kind: str
    layer: int = 0
    index: int = 0

    def __str__(self) -> str:
        if self.kind in ("embed", "logits"):
            return self.kind
        if self.kind == "mlp":
            return f"mlp.{self.layer}"
        letter = "K" if self.kind in ("k", "v") else "H"
        return f"L{self.layer}{letter}{self.index}{'' if self.kind == 'head' else f'.{self.kind}'}"

    @property
    def stage(self) -> int:
        """Its place along the residual stream: a receiver reads what is written at earlier stages."""
        return -1 if self.kind == "embed" else 2 * self.layer + (self.kind == "mlp")

    @property
    def point(self) -> str:
        """The activation point at which it is patched, "" for the logits."""
        points = {"embed": "hook_resid_pre", "head": "attn.hook_z", "mlp": "hook_mlp_out", "logits": ""}
        point = points.get(self.kind, f"attn.hook_{self.kind}")
        return point and point_name(point, self.layer)


@dataclass(frozen=True, eq=False)
class Part:
    """Nodes that are patched together, at some positions of every example."""

    nodes: tuple[Node, ...]
    where: Bool[Tensor, "batch pos"]

    @property
    def layer(self) -> int:
        """The first layer of its nodes."""
        return min(node.layer for node in self.nodes)

    def reaches(self, receiver: "Part") -> bool:
        """Whether there is a path from here to the receiver."""
        return min(node.stage for node in self.nodes) < max(node.stage for node in receiver.nodes)


def ends_of(model: HookedMLLM, what: str, given: Ends) -> dict[str, tuple[Node, ...]]:
    """Senders or receivers by name: each one alone, or the groups of a mapping.

    Raises:
        ExperimentError: no such part, or the logits grouped with others.
        PointError: its activation point is not live in this model.
    """
    if isinstance(given, Mapping):
        named: dict[str, Any] = {
            name: [end] if isinstance(end, str) or _is_head(end) else list(end) for name, end in given.items()
        }
    else:
        named = {str(_node(model, what, end)): [end] for end in given}
    if not named or not all(named.values()):
        raise ExperimentError(f"{what}={given!r}", "at least one", f"name a {what.removesuffix('s')}")
    found = {name: tuple(_node(model, what, end) for end in ends) for name, ends in named.items()}
    if points := [node.point for nodes in found.values() for node in nodes if node.point]:
        model.select(points)
    if mixed := [
        name for name, nodes in found.items() if len(nodes) > 1 and Node("logits", model.cfg.n_layers) in nodes
    ]:
        raise ExperimentError(
            f"receiver {mixed[0]!r} joins the logits with other ends", "one of the two", "make them two receivers"
        )
    return found


def _is_head(end: object) -> bool:
    return isinstance(end, tuple) and len(end) == 2 and all(isinstance(number, int) for number in end)


def _node(model: HookedMLLM, what: str, end: End) -> Node:
    if what == "senders" and isinstance(end, tuple) and _is_head(end):
        end = f"L{end[0]}H{end[1]}"
    forms = "'embed', 'L2H5', 'mlp.2'" if what == "senders" else "'L4H0.q', 'L4K0.k', 'L4K0.v', 'mlp.4', 'logits'"
    found = _LABEL.fullmatch(end) if isinstance(end, str) else None
    if found is None:
        shared = isinstance(end, str) and re.fullmatch(r"L\d+H\d+\.[kv]", end)
        do = f"use {str(end).replace('H', 'K')!r}: keys and values are counted by key/value head" if shared else ""
        raise ExperimentError(f"{what}: {end!r}", f"labels such as {forms}", do or "write it so")
    cfg = model.cfg
    whole, mlp, layer, head, query, kv_layer, kv_head, letter = found.groups()
    if whole:
        node = Node(whole, cfg.n_layers if whole == "logits" else 0)
    elif mlp:
        node = Node("mlp", int(mlp))
    elif letter:
        node = Node(letter, int(kv_layer), int(kv_head))
    else:
        node = Node("q" if query else "head", int(layer), int(head))
    if node.kind not in (("embed", "head", "mlp") if what == "senders" else ("q", "k", "v", "mlp", "logits")):
        raise ExperimentError(f"{what}: {end!r}", f"labels such as {forms}", "check which end it is")
    in_range = node.kind == "logits" or node.layer < cfg.n_layers
    heads = cfg.kv_heads[node.layer] if node.kind in ("k", "v") and in_range else cfg.n_heads
    if not in_range or node.index >= heads:
        raise ExperimentError(
            f"{what}: {end!r}",
            f"layers below {cfg.n_layers} of {cfg.n_heads} heads and {cfg.n_kv_heads} key/value heads",
            "count from 0",
        )  # fmt: skip
    return node


def mask_of(inputs: Inputs, where: Where) -> Bool[Tensor, "batch pos"]:
    """A mask of the given positions in every row."""
    chosen = torch.zeros(len(inputs), len(inputs.layouts[0]), dtype=torch.bool)
    for row, layout in enumerate(inputs.layouts):
        chosen[row, torch.as_tensor(layout.positions(where))] = True
    return chosen


def frozen_of(freeze: Sequence[str]) -> frozenset[str]:
    """The frozen parts, checked."""
    listed = [freeze] if isinstance(freeze, str) else list(freeze)
    if wrong := [name for name in listed if name not in FREEZE]:
        raise ExperimentError(f"freeze names {wrong[0]!r}", f"any of {', '.join(FREEZE)}", "use freeze=('attention',)")
    return frozenset(listed)
