"""A model in which only some edges carry the clean run: the basis of faithfulness.

    runs = CircuitRuns.of(model, samples, metric)
    runs.metric(graph.inside)            # one per example; edges outside carry what they do in the corrupted run

Every receiver reads the stream of *this* run, in which the output of every sender without an edge to it is replaced by
that sender's output in the corrupted run. With no edges this is the corrupted run, with all of them the clean one.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mech.data.samples import Sample
from mech.errors import ExperimentError
from mech.experiments.attribution.edges import check_layers, rows_of
from mech.experiments.circuit_tasks.graph import Shape
from mech.experiments.metrics import Metric
from mech.experiments.patching.plan import Plan, Sweep, pairs_of
from mech.experiments.paths.ends import Node
from mech.model import HookedMLLM
from mech.model.eager import uncompiled
from mech.model.points import point_name

WRITING = ("attn.hook_z", "hook_mlp_out", "hook_resid_pre", "hook_resid_post")


@dataclass(frozen=True, eq=False)
class _Batch:
    """A pair of runs: what the corrupted one writes, and both metrics."""

    plan: Plan
    written: dict[str, Tensor]
    clean_logits: Tensor
    clean: Tensor
    corrupted: Tensor


@dataclass(frozen=True, eq=False)
class CircuitRuns:
    """Clean and corrupted runs of some samples between which edges are exchanged. Made by ``of``."""

    model: HookedMLLM
    shape: Shape
    batches: tuple[_Batch, ...]

    @classmethod
    def of(cls, model: HookedMLLM, samples: Sequence[Sample], metric: Metric, batch_size: int = 16) -> "CircuitRuns":
        """Run both sides of every sample once.

        Raises:
            ExperimentError: a sample without a counterfactual of the same layout; layers whose stream is not the sum of
                what heads and MLPs write. Raised before any forward.

        Cost: two forwards for each sample. Memory: what heads and MLPs of one batch write in the corrupted run.
        """
        check_additive(model)
        pairs, plans = pairs_of(model, list(samples), None), []
        for start in range(0, len(pairs), batch_size):
            some = pairs[start : start + batch_size]
            clean, corrupted = (model.collate([pair[side] for pair in some]) for side in (0, 1))
            plans.append(Plan.of(model, clean, corrupted, metric, Sweep(), start))
        return cls(model, Shape.of(model), tuple(_run_both(model, plan) for plan in plans))

    @property
    def clean(self) -> Float[np.ndarray, " example"]:
        return torch.cat([batch.clean for batch in self.batches]).double().cpu().numpy()

    @property
    def corrupted(self) -> Float[np.ndarray, " example"]:
        return torch.cat([batch.corrupted for batch in self.batches]).double().cpu().numpy()

    @torch.no_grad()
    def metric(self, inside: Bool[np.ndarray, "sender receiver"]) -> Float[np.ndarray, " example"]:
        """The metric of every example with only these edges as in the clean run. Cost: a forward for each sample."""
        return torch.cat([_Circuit(self, batch, inside).metric() for batch in self.batches]).double().cpu().numpy()


def check_additive(model: HookedMLLM) -> None:
    """Refuse a stream that is not the sum of what embeddings, heads and MLPs write.

    Raises:
        ExperimentError: such a model.
    """
    check_layers(model)
    if model.family.text.attn_out:
        raise ExperimentError(
            f"{model.name}, in which a norm lies between heads and the stream", "heads that write to it directly",
            "use path_patching, which runs the norm",
        )  # fmt: skip


@torch.no_grad()
def _run_both(model: HookedMLLM, plan: Plan) -> _Batch:
    at = torch.as_tensor(plan.reads, device=model.device)
    names = ["hook_embed", *(point_name(point, layer) for layer in range(model.cfg.n_layers) for point in WRITING)]
    logits, cache = model.run_with_cache(plan.corrupted, names_filter=names, logits_to_keep=at)
    clean_logits = model(plan.clean, logits_to_keep=at)
    written = {name: cache[name] for name in names if not name.endswith(("resid_pre", "resid_post"))}
    written |= {f"added.{layer}": added for layer, added in _added(cache, model.cfg.n_layers)}
    scores = (plan.scores(read, clean_logits) for read in (clean_logits, logits))
    return _Batch(plan, written, clean_logits, *scores)


def _added(cache: dict[str, Tensor], n_layers: int) -> Iterator[tuple[int, Tensor]]:
    """What a model adds to the stream before a layer (DeepStack): it comes from the pictures, as the embeddings do."""
    for layer in range(1, n_layers):
        added = cache[point_name("hook_resid_pre", layer)] - cache[point_name("hook_resid_post", layer - 1)]
        if bool(added.any()):
            yield layer, added


class _Circuit:
    """One run of one batch with some edges. ``changes``: what senders write in the corrupted run minus here."""

    def __init__(self, runs: CircuitRuns, batch: _Batch, inside: Bool[np.ndarray, "sender receiver"]):
        self.model, self.batch = runs.model, batch
        self.receivers = {node: i for i, node in enumerate(runs.shape.receivers)}
        self.outside = torch.as_tensor(~inside & runs.shape.exists, device=runs.model.device)
        self.shape, self.changes, self.last = runs.shape, [], None

    def metric(self) -> Float[Tensor, " batch"]:
        model, plan = self.model, self.batch.plan
        at = torch.as_tensor(plan.reads, device=model.device)
        hooks = [("hook_embed", self._embedded)]
        with ExitStack() as stack:
            for layer in range(model.cfg.n_layers):
                hooks += self._of_layer(layer)
                stack.callback(self._before(model.norm(layer, True), Node("mlp", layer)))
            final = Node("logits", model.cfg.n_layers)
            stack.callback(self._before(model.norm(model.cfg.n_layers, False), final))
            stack.enter_context(uncompiled())
            stack.enter_context(model.hooks(hooks))
            return plan.scores(model(plan.clean, logits_to_keep=at), self.batch.clean_logits)

    def _embedded(self, value: Tensor, hook: object) -> None:
        self.changes = [(self.batch.written["hook_embed"] - value)[None]]

    def _of_layer(self, layer: int) -> list:
        """The hooks of a layer: streams and outputs are read, queries, keys and values written."""
        written, names = self.batch.written, {}

        def before(value: Tensor, hook: object) -> None:
            added = written.get(f"added.{layer}")
            if added is not None and self.last is not None:
                self.changes[0] = self.changes[0] + (added - (value - self.last))[None]
            names["stream"] = value

        def after(value: Tensor, hook: object) -> None:
            self.last = value.clone()

        def heads(value: Tensor, hook: object) -> None:
            weights = self.model.blocks[layer].attn.W_O.detach()
            z = written[point_name("attn.hook_z", layer)] - value
            self.changes.append(torch.einsum("bphd,hdm->hbpm", z, weights))

        def mlp(value: Tensor, hook: object) -> None:
            self.changes.append((written[point_name("hook_mlp_out", layer)] - value)[None])

        def projected(letter: str):
            def write(value: Tensor, hook: object) -> Tensor:
                return self._projected(Node(letter, layer), value, names["stream"])

            return write

        found = [("hook_resid_pre", before), *((f"attn.hook_{letter}", projected(letter)) for letter in "qkv")]
        found += [("attn.hook_z", heads), ("hook_mlp_out", mlp), ("hook_resid_post", after)]
        return [(point_name(point, layer), hook) for point, hook in found]

    def _projected(self, kind: Node, value: Tensor, stream: Tensor) -> Tensor:
        """Queries, keys or values of a layer, each read from its own stream."""
        value, norm = value.clone(), self.model.norm(kind.layer)
        plain = norm.forward(stream)  # not the module, whose hooks are those of the run
        for index in range(value.shape[2]):
            node = Node(kind.kind, kind.layer, index)
            change = self._change(node)
            if change is not None:
                moved = norm.forward(stream + change) - plain
                value[:, :, index] += moved @ rows_of(self.model, node).T.to(moved)
        return value

    def _before(self, norm, node: Node):
        def write(module: object, args: tuple) -> tuple | None:
            change = self._change(node)
            return None if change is None else (args[0] + change, *args[1:])

        return norm.register_forward_pre_hook(write).remove

    def _change(self, node: Node) -> Tensor | None:
        """What edges outside the circuit change in the stream that a receiver reads; None if nothing."""
        cut = self.outside[:, self.receivers[node]]
        if not bool(cut.any()):
            return None
        start, total = 0, None
        for part in self.changes:
            chosen = cut[start : start + len(part)]
            start += len(part)
            if bool(chosen.any()):
                some = part[chosen].sum(0)
                total = some if total is None else total + some
        return total
