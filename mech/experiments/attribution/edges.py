"""Edge attribution: an estimate of what every single edge from one part of the model to another carries.

    found = edge_attribution(model, clean, corrupted, metric)
    found.effect.sel(sender="L1H3", receiver="L4H0.q")
    for edge in top_edges(found, 20): print(edge)

Senders write to the residual stream: ``embed``, ``L2H5`` (a head), ``mlp.2``. Receivers read it: ``L4H0.q``,
``L4K0.k``, ``L4K0.v`` (queries by head, keys and values by key/value head), ``mlp.4`` and ``logits``. An edge is
direct: everything between its ends keeps its value, everything after the receiver is recomputed.

It does not give exact effects of paths (see ``mech.path_patching``), and does not support layers whose attention and
feed-forward read the same stream, or that have no heads.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from mech.arguments import NOT_EMPTY, Count, Seed, Whole, checked, given_by, one_of
from mech.axes import EXAMPLE
from mech.data.samples import Samples
from mech.errors import ExperimentError, suggestion
from mech.experiments.attribution.nodes import DIRECTIONS, agreement_of, compared
from mech.experiments.gradients import Slopes, between, check_smooth, differentiate, midpoints, still
from mech.experiments.metrics import AnyMetric
from mech.experiments.patching.plan import Given, Plan, Sweep
from mech.experiments.paths.ends import Node
from mech.inputs import Inputs
from mech.model import HookedMLLM
from mech.model.architectures.families import layers_of, module_at
from mech.model.eager import uncompiled
from mech.model.named.norms import frozen_norm
from mech.model.named.projections import linear_map
from mech.model.points import point_name
from mech.model.turns import alone
from mech.results import provenance

LETTERS = ("q", "k", "v")
NORMS = ("live", "frozen")
SHARE = {"unit": "share of the gap between the runs", "sign": "positive: carries what makes the clean answer"}


@checked
@alone
def edge_attribution(
    model: HookedMLLM,
    clean: Given,
    corrupted: Given | None,
    metric: AnyMetric,
    *,
    senders: Annotated[Sequence[str], NOT_EMPTY] | None = None,
    receivers: Annotated[Sequence[str], NOT_EMPTY] | None = None,
    ig_steps: Whole = 5,
    norm: one_of(NORMS) = "live",
    direction: one_of(DIRECTIONS) = "denoise",
    check: Whole = 8,
    seed: Seed = 0,
) -> xr.Dataset:
    """The estimated effect of switching each edge alone to the other run, checked against exact effects of some edges.

    ``change = sum over positions of (sender in the source - in the base) . d metric / d (stream as the receiver reads
    it)``, over the gap between the runs.

    Sign: positive edges carry what makes the clean answer, in both directions. Unit: share of the gap; 0 is no effect.

    Args:
        model, clean, corrupted, metric: as in ``activation_patching``.
        senders, receivers: labels; all by default.
        ig_steps: number of midpoints on the path of the embeddings over which slopes are averaged; 0: the slope at the
            base.
        norm: ``"live"``: the receiver's norm is differentiated, so that all edges out of a sender sum to its own
            attribution; ``"frozen"``: its scale is a constant. Norms elsewhere are always live.
        direction: ``"denoise"`` (clean into corrupted) or ``"noise"``.
        check, seed: how many edges are also switched exactly: half of them those with the largest estimates, half drawn
            at random by ``seed``.

    Returns:
        ``effect`` over (example, sender, receiver), nan where the receiver does not come after the sender; ``clean``
        and ``corrupted``; ``exact`` and ``estimate`` over (example, check), with the coordinate ``cell``. Attributes:
        ``rank_correlation``, ``worst``, ``forwards``, ``backwards``.

    Raises:
        ExperimentError: a label that does not exist, a metric without a gradient, or layers that are not supported;
            raised before any forward.

    Cost: for each pair two forwards, a forward and a backward for each step, and a forward for each checked edge;
    ``L^2 H^2 positions d_model`` operations a step in addition. Memory: the activations of the text stack.

    References: arXiv 2310.10348 (edge attribution patching), 2403.17806 (with integrated gradients; we take midpoints
    of the path instead of right endpoints, and keep keys and values grouped).
    """
    graph = _Graph.of(model, senders, receivers)
    runs = []
    for plan in Sweep().plans(model, clean, corrupted, metric):
        check_smooth(model, plan.readings, metric)
        runs.append(_Run(model, graph, plan, direction, norm == "frozen"))
    parts = [run.estimated(ig_steps) for run in runs]
    change, ours, theirs = (torch.cat(v).double().cpu().numpy() for v in zip(*parts, strict=True))
    gap = np.where(theirs == ours, np.nan, theirs - ours)[:, None]  # what switching everything does
    effect = change / gap[..., None]
    rows, columns = list(graph.senders), list(graph.receivers)
    known = _sample(abs(change).mean(0), check, seed)
    sample = [(rows[s], columns[r]) for s, r in known]
    exact = torch.cat([run.exact(sample) for run in runs]).double().cpu().numpy() / gap
    estimate = np.stack([effect[:, s, r] for s, r in known], 1) if known else exact
    labels = [f"{s} -> {r}" for s, r in sample]
    clean_scores, corrupted_scores = (theirs, ours) if direction == "denoise" else (ours, theirs)
    unit = {"unit": metric.unit}
    settings = {"direction": direction, "zero": "no effect", "norm": norm, "ig_steps": ig_steps}
    samples = clean if isinstance(clean, Samples) else None
    return xr.Dataset(
        {
            "effect": ((EXAMPLE, "sender", "receiver"), effect, SHARE),
            "clean": (EXAMPLE, clean_scores, unit),
            "corrupted": (EXAMPLE, corrupted_scores, unit),
            **compared(estimate, exact),
        },
        {EXAMPLE: np.arange(len(effect)), "sender": rows, "receiver": columns, "cell": ("check", labels)},
        {"model": model.name, **settings, "measure": repr(metric), **agreement_of(estimate, exact, labels)},
    ).assign_attrs(
        forwards=(2 + (ig_steps or 1) + len(sample)) * len(runs), backwards=(ig_steps or 1) * len(runs),
        provenance=provenance(model, samples, metric=metric, seed=seed, **settings),
    )  # fmt: skip


def _sample(size: np.ndarray, count: int, seed: int) -> list[tuple[int, int]]:
    """Half of the places are those with the largest values, half random ones; nan where there is no edge."""
    order = np.argsort(-np.nan_to_num(size, nan=-1.0), axis=None)[: int((~np.isnan(size)).sum())]
    first, rest = order[: (count + 1) // 2], order[(count + 1) // 2 :]
    chosen = [*first, *np.random.default_rng(seed).permutation(rest)[: count // 2]]
    return [(int(s), int(r)) for s, r in zip(*np.unravel_index(np.array(chosen, int), size.shape), strict=True)]


@checked
def top_edges(
    result: given_by("edge_attribution", "effect", "sender", "receiver"), n: Count = 20
) -> list[tuple[str, str, float]]:
    """The edges with the largest mean effect of either sign: (sender, receiver, effect)."""
    mean = result.effect.mean("example").values
    order = np.argsort(-np.nan_to_num(abs(mean), nan=-1.0), axis=None)[:n]
    rows = zip(*np.unravel_index(order, mean.shape), strict=True)
    return [(str(result.sender.values[s]), str(result.receiver.values[r]), float(mean[s, r]))
            for s, r in rows if not np.isnan(mean[s, r])]  # fmt: skip


@dataclass(frozen=True)
class _Node:
    """A sender or receiver. ``stage`` is its place in the stream: a receiver reads what earlier stages wrote."""

    label: str
    kind: str
    layer: int
    index: int
    stage: int


@dataclass(frozen=True)
class _Graph:
    """The chosen senders and receivers of a model, by label."""

    senders: dict[str, _Node]
    receivers: dict[str, _Node]

    @classmethod
    def of(cls, model: HookedMLLM, senders: Sequence[str] | None, receivers: Sequence[str] | None) -> "_Graph":
        cfg = model.cfg
        check_layers(model)
        writing, reading = [_Node("embed", "embed", -1, 0, -1)], []
        for layer in range(cfg.n_layers):
            writing += [_Node(f"L{layer}H{h}", "head", layer, h, 2 * layer) for h in range(cfg.n_heads)]
            writing.append(_Node(f"mlp.{layer}", "mlp", layer, 0, 2 * layer + 1))
            reading += [_Node(f"L{layer}H{h}.q", "q", layer, h, 2 * layer) for h in range(cfg.n_heads)]
            for letter in "kv":
                heads = range(cfg.kv_heads[layer])
                reading += [_Node(f"L{layer}K{h}.{letter}", letter, layer, h, 2 * layer) for h in heads]
            reading.append(_Node(f"mlp.{layer}", "mlp", layer, 0, 2 * layer + 1))
        reading.append(_Node("logits", "logits", cfg.n_layers, 0, 2 * cfg.n_layers))
        return cls(_chosen("sender", writing, senders), _chosen("receiver", reading, receivers))


def _chosen(what: str, nodes: Sequence[_Node], labels: Sequence[str] | None) -> dict[str, _Node]:
    known = {node.label: node for node in nodes}
    for label in labels or ():
        if label not in known:
            raise ExperimentError(f"no {what} is called {label!r}", "a label of this model", suggestion(label, known))
    return known if labels is None else {label: known[label] for label in labels}


def check_layers(model: HookedMLLM) -> None:
    """Refuse layers whose stream is not simply the sum of what was written to it."""
    cfg, live = model.cfg, set(model.points())
    needed = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "hook_resid_mid", "hook_mlp_out")
    for layer, block in enumerate(layers_of(model.hf_model, model.family.text)):
        missing = [point for point in needed if point_name(point, layer) not in live]
        scaled = hasattr(block, "layer_scalar") or model.family.text.attn_gain is not None
        if missing or scaled or layer in cfg.cross_layers or model.blocks[layer].attn.W_O is None:
            why = f"no {missing[0]}" if missing else "a stream that is scaled, crossed or quantized"
            raise ExperimentError(
                f"layer {layer} of {model.name} has {why}", "layers of attention and then feed-forward on one stream",
                "use attribution, which takes every point",
            )  # fmt: skip
        model.norm(layer)


@dataclass(eq=False)
class _Run:
    """One pair of runs: what senders write differently, and how the metric depends on what receivers read."""

    model: HookedMLLM
    graph: _Graph
    plan: Plan
    direction: str
    frozen: bool
    _switched: Callable[[str, str], Tensor] = field(init=False, repr=False)

    def estimated(self, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Change of the metric by every edge, and the metric of the base and the source."""
        model, plan, every = self.model, self.plan, range(self.model.cfg.n_layers)
        denoise = self.direction == "denoise"
        base, source = (plan.corrupted, plan.clean) if denoise else (plan.clean, plan.corrupted)
        at = torch.as_tensor(plan.reads, device=model.device)
        sent = ["hook_embed", *(point_name(p, layer) for layer in every for p in ("attn.hook_z", "hook_mlp_out"))]
        streams = [point_name("hook_resid_pre", layer) for layer in every]
        inner: dict[int, Tensor] = {}  # attention's output before the norm that follows it, if any
        with torch.no_grad():
            theirs, other = model.run_with_cache(source, names_filter=sent, logits_to_keep=at)
            with self._watched(inner):
                ours, here = model.run_with_cache(base, names_filter=[*sent, *streams], logits_to_keep=at)
        clean_logits = theirs if denoise else ours
        written = _Written(model, {name: other[name] - here[name] for name in sent}, inner)

        def score(run: Inputs) -> Tensor:
            return plan.scores(model(run, logits_to_keep=at), clean_logits)

        read = [*streams, *(point_name(f"attn.hook_{x}", layer) for layer in every for x in LETTERS)]
        effects = 0.0
        for share in midpoints(steps) if steps else [0.0]:
            edits = [between("hook_embed", here["hook_embed"], other["hook_embed"], share)] if steps else []
            slopes = differentiate(model, base, read, score, edits=edits, modules=self._norms())
            effects = effects + self._edges(slopes, written) / (steps or 1)
        before, behind = plan.scores(ours, clean_logits), plan.scores(theirs, clean_logits)
        streams_here = {layer: here[name] for layer, name in zip(every, streams, strict=True)}
        self._switched = lambda s, r: self._exact(base, s, r, written, streams_here, score) - before
        return torch.as_tensor(effects), before, behind

    @torch.no_grad()
    def exact(self, sample: Sequence[tuple[str, str]]) -> Float[Tensor, "batch edge"]:
        """Exact change of the metric by some edges; ``estimated`` must have run first."""
        if not sample:
            return torch.zeros(len(self.plan.clean), 0)
        return torch.stack([self._switched(sender, receiver) for sender, receiver in sample], 1)

    def _norms(self) -> dict[str, nn.Module]:
        """The norms whose outputs the feed-forwards and the unembedding read."""
        wanted = {node.label: node for node in self.graph.receivers.values() if node.kind in ("mlp", "logits")}
        return {label: self.model.norm(node.layer, node.kind == "mlp") for label, node in wanted.items()}

    @contextmanager
    def _watched(self, inner: dict[int, Tensor]) -> Iterator[None]:
        path, handles = self.model.family.text.attn_out, []
        for layer, block in enumerate(layers_of(self.model.hf_model, self.model.family.text) if path else ()):
            keep = partial(lambda at, module, args: inner.update({at: args[0].detach().clone()}), layer)
            handles.append(module_at(block, path).register_forward_pre_hook(keep))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _edges(self, slopes: Slopes, written: "_Written") -> Float[Tensor, "batch sender receiver"]:
        """Every sender's change times every receiver's slope, one stage of receivers at a time."""
        senders, receivers = list(self.graph.senders.values()), list(self.graph.receivers.values())
        effects = torch.full((len(slopes.scores), len(senders), len(receivers)), float("nan"),
                           dtype=slopes.scores.dtype, device=slopes.scores.device)  # fmt: skip
        for stage in sorted({node.stage for node in receivers}):
            group = [i for i, node in enumerate(receivers) if node.stage == stage]
            slope = self._slope([receivers[i] for i in group], slopes)
            for origin in sorted({node.stage for node in senders if node.stage < stage}):
                from_here = [i for i, node in enumerate(senders) if node.stage == origin]
                change = written.by([senders[i] for i in from_here])
                effects[:, torch.tensor(from_here)[:, None], torch.tensor(group)] = torch.einsum(
                    "sbpm,rbpm->bsr", change.to(slope), slope
                ).to(effects)
        return effects

    def _slope(self, nodes: Sequence[_Node], slopes: Slopes) -> Float[Tensor, "receiver batch pos d_model"]:
        """The metric's slope at the stream as each of these receivers, all of one stage, reads it."""
        kind, layer = nodes[0].kind, nodes[0].layer
        if kind in ("mlp", "logits"):
            label = nodes[0].label
            norm, stream, behind = self._norms()[label], slopes.values[label], slopes.slopes[label][None]
        else:
            norm, stream = self.model.norm(layer), slopes.values[point_name("hook_resid_pre", layer)]
            behind = torch.stack([
                slopes.slopes[point_name(f"attn.hook_{node.kind}", layer)][:, :, node.index]
                @ rows_of(self.model, node)
                for node in nodes
            ])  # fmt: skip
        through = frozen_norm(norm, stream) if self.frozen else norm
        with still(self.model):
            read = stream.expand(len(behind), *stream.shape).clone().requires_grad_()
            return torch.autograd.grad(through(read), read, behind)[0]

    def _exact(
        self, base: Inputs, sender: str, receiver: str, written: "_Written", streams: dict[int, Tensor],
        score: Callable[[Inputs], Tensor],
    ) -> Float[Tensor, " batch"]:  # fmt: skip
        """The metric when this edge alone is switched: the receiver reads the stream with the sender's change added."""
        model, node = self.model, self.graph.receivers[receiver]
        change = written.by([self.graph.senders[sender]])[0]
        if node.kind in ("mlp", "logits"):
            norm = model.norm(node.layer, node.kind == "mlp")
            handle = norm.register_forward_pre_hook(lambda module, args: (args[0] + change.to(args[0]), *args[1:]))
            try:
                with uncompiled():
                    return score(base)
            finally:
                handle.remove()
        site = _seam(model, node)
        stream = streams[node.layer]
        other = site.view(site.module(model.norm(node.layer)(stream + change.to(stream))))[:, :, node.index]

        def write(value: Tensor, hook: HookPoint) -> Tensor:
            value = value.clone()
            value[:, :, node.index] = other.to(value)
            return value

        with model.hooks([(site.point, write)]):
            return score(base)


@dataclass(eq=False)
class _Written:
    """What senders write into the stream, the source's minus the base's."""

    model: HookedMLLM
    change: dict[str, Tensor]
    inner: dict[int, Tensor]

    def by(self, nodes: Sequence[_Node]) -> Float[Tensor, "sender batch pos d_model"]:
        """What some senders of one layer and kind write."""
        kind, layer = nodes[0].kind, nodes[0].layer
        if kind != "head":
            return self.change["hook_embed" if kind == "embed" else point_name("hook_mlp_out", layer)][None]
        heads = [node.index for node in nodes]
        weights = self.model.blocks[layer].attn.W_O.detach()[heads]
        written = torch.einsum("bphd,hdm->hbpm", self.change[point_name("attn.hook_z", layer)][:, :, heads], weights)
        if layer not in self.inner:
            return written
        block = layers_of(self.model.hf_model, self.model.family.text)[layer]
        norm = module_at(block, self.model.family.text.attn_out)
        # Forward mode by two backwards: torch's own needs the deprecated torch.jit.script.
        with still(self.model):
            there = self.inner[layer].expand(written.shape).clone().requires_grad_()
            behind = norm(there)
            onto = torch.zeros_like(behind, requires_grad=True)
            (pulled,) = torch.autograd.grad(behind, there, onto, create_graph=True)
            return torch.autograd.grad(pulled, onto, written)[0]


def _seam(model: HookedMLLM, node: "_Node | Node") -> Any:
    name = point_name(f"attn.hook_{node.kind}", node.layer)
    return next(site for site in model._sites if site.point == name)


def rows_of(model: HookedMLLM, node: "_Node | Node") -> Float[Tensor, "d_head d_model"]:
    """The part of the projection that makes this head's query, key or value."""
    site = _seam(model, node)
    rows = site._own(linear_map(site.module).weight.detach().T.unflatten(-1, (site.heads, -1)))
    return rows[:, node.index].T
