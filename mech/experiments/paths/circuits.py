"""From the logits back to the picture: the heads, MLPs and inputs that produce an answer.

    circuit = trace_circuit(model, samples, LogitDiff(answers, wrong), threshold=0.02)
    circuit.heads                                   # (L1H0, L0H3)
    print(circuit.describe(ranking))                # "L1H0 does not attend to the evidence (RAM 0.00) but ..."
    circuit.faithfulness(model, samples, metric)    # what is kept when everything else is switched off
    circuit.graph                                   # a networkx.DiGraph: embed:evidence -> L0H3 -> L1H0 -> logits

Which parts write what the logits read? Parts whose direct path carries enough, and not by chance over examples, become
receivers in turn: what feeds their queries, keys and values? The walk ends at the embeddings of the evidence, the rest
of the picture, the question and the template.

It does not find paths that matter only as a set: two heads that do the same work, each dispensable, are missed when
noising and found when denoising. It does not draw.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mech.arguments import Count, Positive, Seed, Share, checked, one_of
from mech.axes import EXAMPLE
from mech.data.samples import Sample, Samples
from mech.errors import ExperimentError, OutputError
from mech.experiments.metrics import AnyMetric
from mech.experiments.patching.plan import Given, pairs_of
from mech.experiments.paths.ends import LETTERS, Node, Part, ends_of, mask_of
from mech.experiments.paths.path_patching import DIRECTIONS, Pair, heads_and_mlps
from mech.experiments.ranking.ranking import Head, Ranking
from mech.experiments.statistics import benjamini_hochberg, bootstrap_interval, permutation_test
from mech.indices import Pairs
from mech.inputs import Inputs
from mech.inputs.layout import IMAGE, PADDING, VIDEO
from mech.model import HookedMLLM
from mech.notebook import Shown
from mech.results import provenance
from mech.results.provenance import jsonable
from mech.results.store import read_json, write_json

LEAVES = ("evidence", "picture", "question", "template")
DIRECT = frozenset(("attention", "mlp"))
ATTENDING = 0.05  # below this RAM a head counts as not attending to the evidence
_READS = {"q": "queries come", "k": "keys come", "v": "values come", "": "input comes"}


@dataclass(frozen=True)
class Edge:
    """A direct path that matters.

    Attributes:
        sender: ``"L0H3"``, ``"mlp.1"`` or ``"embed:evidence"``.
        receiver: ``"logits"``, ``"L4H0.q"``, ``"L4K0.v"`` or ``"mlp.1"``.
        effect: mean share of the gap between the runs that patching this path alone moves; positive: the path carries
            what produces the clean answer.
        low, high: 95% interval of the effect; with a single example, both equal the effect.
        p_value: two-sided, corrected for all senders tried; nan with ``alpha=None``.
        at: the region where the sender's output matters most; "" if the receiver is the logits or the sender "embed".
    """

    sender: str
    receiver: str
    effect: float
    low: float
    high: float
    p_value: float = float("nan")
    at: str = ""

    @property
    def through(self) -> str:
        """``"q"``, ``"k"`` or ``"v"``; ``""`` for an MLP and the logits."""
        return self.receiver.split(".")[1] if self.receiver.startswith("L") else ""


@checked
@dataclass(frozen=True)
class Circuit(Shown):
    """The result of ``trace_circuit``. ``groups`` is the number of query heads per key/value head in each layer."""

    model: str
    start: str
    direction: str
    n_examples: int
    groups: tuple[int, ...]
    found: tuple[Edge, ...] = field(repr=False)
    unfollowed: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def edges(self, receiver: str | None = None) -> tuple[Edge, ...]:
        """All edges, strongest first, or only those into one part such as ``"L4H0"`` or ``"logits"``."""
        chosen = [e for e in self.found if receiver is None or receiver in self._targets(e)]
        return tuple(sorted(chosen, key=lambda edge: -abs(edge.effect)))

    @cached_property
    def graph(self) -> nx.DiGraph:
        """Nodes with ``kind`` and ``layer`` (where to draw them), edges with ``effect`` and ``through`` (by letter)."""
        graph = nx.DiGraph()
        for edge in self.edges():
            for target in self._targets(edge):
                for name in (edge.sender, target):
                    graph.add_node(name, **_drawn(name))
                if not graph.has_edge(edge.sender, target):
                    graph.add_edge(edge.sender, target, effect=edge.effect, through={})
                graph.edges[edge.sender, target]["through"][edge.through] = edge.effect
        if "logits" in graph:
            graph.nodes["logits"]["layer"] = 1 + max(drawn["layer"] for drawn in graph.nodes.values())
        return graph

    @property
    def heads(self) -> tuple[Head, ...]:
        """The heads of the circuit, by layer."""
        return tuple(sorted(_head(name) for name in {edge.sender for edge in self.found} if name.startswith("L")))

    @property
    def nodes(self) -> tuple[str, ...]:
        """All senders, strongest first."""
        return tuple(dict.fromkeys(edge.sender for edge in self.edges()))

    def _targets(self, edge: Edge) -> tuple[str, ...]:
        """The parts that read what an edge carries; for keys and values, all of the circuit's heads in the KV group."""
        name = edge.receiver.split(".")[0] if edge.receiver.startswith("L") else edge.receiver
        if "K" not in name:
            return (name,)
        layer, kv = map(int, name[1:].split("K"))
        return tuple(str(head) for head in self.heads if head.layer == layer and head.head // self.groups[layer] == kv)

    def describe(self, ranking: Ranking | None = None) -> str:
        """One sentence per head or MLP, last layer first; with a ranking, also the RAM of each head."""
        lines = []
        parts = [name for name in self.nodes if not name.startswith("embed")]
        for name in sorted(parts, key=lambda name: -_drawn(name)["layer"]):
            out = [edge for edge in self.edges() if edge.sender == name]
            inside = [edge for edge in self.edges(name)]
            said = f"{name}{_looks(name, ranking)} writes to " + ", ".join(
                f"{_reader(e)} ({e.effect:+.2f}{f', at the {e.at}' if e.at else ''})" for e in out
            )
            for letter in ("q", "k", "v", ""):
                if feeding := [e for e in inside if e.through == letter]:
                    sources = ", ".join(f"{e.sender.replace('embed:', 'the ')} ({e.effect:+.2f})" for e in feeding)
                    said += f"; its {_READS[letter]} from {sources}"
            lines.append(said + ".")
        return "\n".join(lines) or f"Nothing carries enough to {self.start}."

    @checked
    @torch.no_grad()
    def faithfulness(
        self, model: HookedMLLM, clean: Given, metric: AnyMetric, *, corrupted: Given | None = None
    ) -> Float[xr.DataArray, " example"]:
        """The share of the gap that the circuit keeps when all other heads and MLPs take their corrupted outputs.

        ``(metric - corrupted) / (clean - corrupted)``: 1 means that the circuit does all the work, 0 none of it.
        Unit: share of the gap. Cost: three forwards per pair.
        """
        kept = {node: str(node) in self.nodes for node in heads_and_mlps(model)}
        values, example = [], 0
        for one, other in pairs_of(model, clean, corrupted):
            pair = Pair.of(model, one, other, metric, "noise", example)
            pair.run([node for node in kept], "literal")
            values.append(pair.without([node for node, inside in kept.items() if not inside]))
            example += len(one)
        share = torch.cat(values).double().cpu().numpy()
        return xr.DataArray(share, dims=(EXAMPLE,), attrs={"unit": "share of the gap between the runs"})

    def to_json(self, path: str | Path | None = None) -> dict[str, Any]:
        """Everything as plain values; if ``path`` is given, also written there."""
        value = {**asdict(self), "found": [asdict(edge) for edge in self.found]}
        value = {key: jsonable(part) for key, part in value.items()}
        if path is not None:
            write_json(value, path)
        return value

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, Any]) -> "Circuit":
        """A circuit from the output of ``to_json``, as a path or a dict."""
        try:
            given = source if isinstance(source, Mapping) else read_json(source)
            numbers = ("effect", "low", "high", "p_value")  # JSON has no nan
            found = tuple(Edge(**{**edge, **{key: _number(edge[key]) for key in numbers}}) for edge in given["found"])
            return cls(
                **{**given, "found": found, "unfollowed": tuple(given["unfollowed"]), "groups": tuple(given["groups"])}
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"the circuit cannot be read ({error!r})", "the output of Circuit.to_json") from error


@checked
def trace_circuit(
    model: HookedMLLM,
    clean: Given,
    metric: AnyMetric,
    *,
    corrupted: Given | None = None,
    start: str = "logits",
    threshold: Positive = 0.02,
    heads: Pairs | None = None,
    max_nodes: Count = 24,
    alpha: Share | None = 0.05,
    direction: one_of(DIRECTIONS) = "noise",
    seed: Seed = 0,
) -> Circuit:
    """Walk back from what the metric reads to the inputs, along the direct paths that carry enough.

    Direct: attention and MLPs between the ends are frozen; everything after the receiver is recomputed. An edge is kept
    if its mean effect is at least ``threshold`` (either sign) and differs from zero over examples: two-sided sign-flip
    permutation test, corrected over all senders into this receiver (Benjamini-Hochberg).

    Sign: positive edges carry what produces the clean answer, in both directions. Unit: share of the gap.

    Args:
        model: a hooked model.
        clean: ``Samples`` (their counterfactuals are the corrupted runs, their evidence is a separate leaf), inputs, or
            a list of them.
        metric: see ``mech.experiments.metrics``.
        corrupted: as in ``path_patching``.
        start: the first receiver.
        threshold: the smallest share of the gap that counts.
        heads: the heads that may be in the circuit; all by default. MLPs are always allowed.
        max_nodes: how many heads and MLPs are followed, strongest first; the others are listed in ``unfollowed``.
        alpha: level for the corrected p-values; None to use the threshold alone.
        direction: ``"noise"`` (what the clean run needs) or ``"denoise"`` (what the corrupted run lacks).
        seed: seed of the permutations and the intervals.

    Raises:
        ExperimentError: before any forward: too few examples for ``alpha`` (the message says how many are needed), a
            start that does not exist, or anything that ``path_patching`` refuses. Later: an example whose runs score
            the same.

    Cost: two forwards per pair, plus ``path_patching`` from all heads to each receiver; keys and values at every
    position are the expensive ones. Memory: the cached runs of all pairs (a KV cache and some streams each).

    References: Wang et al. 2022, arXiv 2211.00593 (by hand); Conmy et al. 2023, arXiv 2304.14997 (automatic, by
    removing edges from the whole graph; here edges are added, and tested over examples).
    """
    (first,) = ends_of(model, "receivers", [start])[start]
    every = heads_and_mlps(model)
    if heads is not None:
        asked = {node for group in ends_of(model, "senders", list(heads)).values() for node in group}
        every = [node for node in every if node.kind == "mlp" or node in asked]
    runs, example = [], 0
    given = [clean] if isinstance(clean, Inputs | Sample) else list(clean)
    for one, (mine, other) in zip(given, pairs_of(model, clean, corrupted), strict=True):
        pair = Pair.of(model, mine, other, metric, direction, example)
        runs.append(_Run(pair, _leaves(mine, one if isinstance(one, Sample) else None)))
        example += len(mine)
    _check_power(example, len(every) + len(LEAVES), alpha)
    for run in runs:
        run.pair.run([*every, Node("embed")])
    if any(bool((run.pair.gap == 0).any()) for run in runs):
        raise ExperimentError("an example whose two runs score the same", "a gap to take a share of", "drop it")
    found, unfollowed = _walked(first, every, runs, _Rule(threshold, alpha, seed), max_nodes)
    record = provenance(
        model, clean if isinstance(clean, Samples) else None, metric=metric, seed=seed, start=start,
        threshold=threshold, alpha=alpha, direction=direction, max_nodes=max_nodes,
    )  # fmt: skip
    return Circuit(str(model.name), start, direction, example, _groups(model), found, unfollowed, record)


@dataclass(frozen=True)
class _Rule:
    """Which edges belong to a circuit: the smallest share of the gap, and the level of the test over examples."""

    threshold: float
    alpha: float | None
    seed: int


def _walked(
    first: Node, every: Sequence[Node], runs: "Sequence[_Run]", rule: _Rule, max_nodes: int
) -> tuple[tuple[Edge, ...], tuple[str, ...]]:
    """The edges from the first receiver back to the inputs, and the nodes beyond ``max_nodes``."""
    model = runs[0].pair.model
    edges: list[Edge] = []
    queue, seen, followed, unfollowed = [(first, 1.0)], {first}, set(), []
    while queue:
        receiver, _ = queue.pop(0)
        for edge, node in _into(receiver, every, runs, rule):
            edges.append(edge)
            if node is None or node in followed:
                continue
            if len(followed) == max_nodes:
                unfollowed.append(str(node))
                continue
            followed.add(node)
            for reading in _readers(model, node):
                if reading not in seen:
                    seen.add(reading)
                    queue.append((reading, abs(edge.effect)))
        queue.sort(key=lambda entry: (-entry[0].layer, -entry[1]))
    return tuple(edges), tuple(dict.fromkeys(unfollowed))


@dataclass(frozen=True, eq=False)
class _Run:
    """A pair of runs, and the circuit's leaves in it."""

    pair: Pair
    leaves: Mapping[str, Tensor]

    def shares(self, senders: Sequence[Part], receiver: Part) -> Float[np.ndarray, "batch sender"]:
        """The share of the gap that each sender's direct path into the receiver carries."""
        pair = self.pair
        moved = pair.metric(senders, [receiver], DIRECT)[:, :, 0]
        start = pair.corrupted if pair.direction == "denoise" else pair.clean
        assert start is not None
        share = (moved - start[:, None]) / pair.gap[:, None]
        return (share if pair.direction == "denoise" else -share).double().cpu().numpy()

    @property
    def everywhere(self) -> Tensor:
        return mask_of(self.pair.plan.clean, "all")


def _into(receiver: Node, every: Sequence[Node], runs: Sequence[_Run], rule: _Rule) -> list[tuple[Edge, Node | None]]:
    """The edges kept into a receiver, strongest first, each with its sender."""
    alpha, seed = rule.alpha, rule.seed
    nodes = [node for node in every if node.stage < receiver.stage]
    leaves = [name for name in LEAVES if any(name in run.leaves for run in runs)]
    rows = []
    for run in runs:
        nothing = torch.zeros_like(run.everywhere)
        senders = [Part((node,), run.everywhere) for node in nodes]
        senders += [Part((Node("embed"),), run.leaves.get(name, nothing)) for name in leaves]
        rows.append(run.shares(senders, Part((receiver,), run.everywhere)))
    effects = np.concatenate(rows)
    mean = effects.mean(0)
    large = [int(i) for i in np.argsort(-abs(mean)) if abs(mean[i]) >= rule.threshold]
    p_values = np.ones(len(mean))  # small effects count as tests in the correction too
    if alpha is not None:
        for i in large:
            p_values[i] = _p_value(effects[:, i], len(mean), alpha, seed)
        p_values = benjamini_hochberg(p_values)
    kept = []
    for i in large:
        if alpha is not None and p_values[i] > alpha:
            continue
        node = nodes[i] if i < len(nodes) else None
        low = high = float(mean[i])
        if len(effects) > 1:
            interval = bootstrap_interval(effects[:, i], seed=seed)
            low, high = float(interval.low), float(interval.high)
        name = str(node) if node is not None else f"embed:{leaves[i - len(nodes)]}"
        at = _at(node, receiver, runs) if node is not None else ""
        p_value = float(p_values[i]) if alpha is not None else float("nan")
        kept.append((Edge(name, str(receiver), float(mean[i]), low, high, p_value, at), node))
    return kept


def _at(node: Node, receiver: Node, runs: Sequence[_Run]) -> str:
    """The region where the sender writes most of what the edge carries."""
    if receiver.kind == "logits":
        return ""
    names = [name for name in LEAVES if any(name in run.leaves for run in runs)]
    rows = []
    for run in runs:
        nothing = torch.zeros_like(run.everywhere)
        senders = [Part((node,), run.leaves.get(name, nothing)) for name in names]
        rows.append(run.shares(senders, Part((receiver,), run.everywhere)))
    return names[int(np.argmax(abs(np.concatenate(rows).mean(0))))]


def _leaves(inputs: Inputs, sample: Sample | None) -> dict[str, Tensor]:
    """The disjoint parts of the prompt: evidence, rest of the picture, question, template."""
    kinds = torch.stack([torch.as_tensor(layout.kind) for layout in inputs.layouts])
    picture = (kinds == IMAGE) | (kinds == VIDEO)
    question = torch.zeros_like(picture)
    for row, layout in enumerate(inputs.layouts):
        question[row, list(layout.spans.get("question", ()))] = True
    evidence = torch.zeros_like(picture)
    if sample is not None and sample.evidence:
        evidence = mask_of(inputs, sample.evidence) & picture
    template = (kinds != PADDING) & ~picture & ~question
    parts = dict(zip(LEAVES, (evidence, picture & ~evidence, question & ~picture, template), strict=True))
    return {name: mask for name, mask in parts.items() if mask.any()}


def _readers(model: HookedMLLM, node: Node) -> list[Node]:
    """The receivers through which a part of the circuit reads."""
    if node.kind == "mlp":
        return [node]
    kv, live = node.index // _groups(model)[node.layer], set(model.points())
    readers = [Node(letter, node.layer, node.index if letter == "q" else kv) for letter in LETTERS]
    return [reader for reader in readers if reader.point in live]  # a layer may use another layer's keys


def _groups(model: HookedMLLM) -> tuple[int, ...]:
    return tuple(model.cfg.n_heads // max(1, kv_heads) for kv_heads in model.cfg.kv_heads)


def _p_value(values: Float[np.ndarray, " example"], tests: int, alpha: float, seed: int) -> float:
    """Two-sided, by sign flips, with enough of them for the correction over ``tests``."""
    flips = max(10_000, int(4 * tests / alpha))
    nothing = np.zeros((1, len(values)))
    sides = [permutation_test(side, nothing, n_permutations=flips, seed=seed).p_value for side in (values, -values)]
    return min(1.0, 2 * min(sides))


def _check_power(examples: int, tests: int, alpha: float | None) -> None:
    """Refuse a test that could not find a single edge: flipping n signs gives no p-value below 2 / 2^n."""
    if alpha is None:
        return
    needed = int(np.ceil(1 + np.log2(tests / alpha)))
    if examples < needed:
        raise ExperimentError(
            f"{examples} examples, and {tests} senders to test at alpha={alpha}", f"at least {needed} examples",
            "give more samples, or alpha=None for the threshold alone",
        )  # fmt: skip


def _head(name: str) -> Head:
    layer, head = name[1:].split("H")
    return Head(int(layer), int(head))


def _drawn(name: str) -> dict[str, Any]:
    kind = name.split(":")[0].split(".")[0]
    if kind in ("embed", "logits"):
        return {"kind": kind, "layer": -1}
    return {"kind": "mlp", "layer": int(name[4:])} if kind == "mlp" else {"kind": "head", "layer": _head(name).layer}


def _reader(edge: Edge) -> str:
    if not edge.through:
        return edge.receiver
    return f"the {_READS[edge.through].split()[0]} of {edge.receiver.split('.')[0]}"


def _looks(name: str, ranking: Ranking | None) -> str:
    if ranking is None or not name.startswith("L"):
        return ""
    mass = float(ranking.scores().sel(layer=_head(name).layer, head=_head(name).head))
    if mass < ATTENDING:
        return f" does not attend to the evidence (RAM {mass:.2f}) but matters: it"
    return f" attends to the evidence (RAM {mass:.2f}) and matters: it"


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
