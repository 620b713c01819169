"""Path patching: not whether a head matters, but through which paths.

    clean, corrupted = model.inputs_of(sample), model.inputs_of(sample.counterfactual)
    metric = LogitDiff(sample.answer, sample.counterfactual.answer)
    direct  = path_patching(model, clean, corrupted, metric, senders=ranking.top(0.05))          # to the logits
    queries = path_patching(model, clean, corrupted, metric, senders=["L1H3", "mlp.1", "embed"], receivers=["L4H0.q"],
                            regions={"picture": "image", "question": "question"})
    queries.effect.mean("example")                                   # sender, receiver, region

A path leads from what a sender writes to what a receiver reads. Its effect is measured in two forwards (arXiv
2211.00593, 2304.05969). In the first, the sender outputs its value from the other run, frozen parts keep their values,
everything else is recomputed, and the receiver's input is recorded. In the second, the receiver gets that input, and
nothing else before it changes. What is frozen is an argument, because the result depends on it:

* ``("attention", "mlp")``: only the *direct* edge. Nothing between the ends reacts.
* ``("attention",)``: paths through MLPs count, paths through other heads do not.
* ``()``: all paths count; with the logits as receiver this is activation patching.
* With ``"norm"``, the scales of all norms on the way are frozen too, which makes contributions additive.

To find the paths that matter see ``circuits.trace_circuit``; to estimate effects see
``mech.experiments.attribution.edges.edge_attribution``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mech.arguments import Progress, checked, one_of
from mech.axes import EXAMPLE
from mech.data.regions import where_in_words
from mech.data.samples import Samples
from mech.errors import ExperimentError
from mech.experiments.metrics import AnyMetric, Metric
from mech.experiments.patching.plan import EFFECT, Given, Plan, Sweep, effect_of, pairs_of
from mech.experiments.paths.ends import FREEZE, Ends, Node, Part, ends_of, frozen_of, mask_of
from mech.experiments.paths.walk import Walk, literal, norms_of, put
from mech.inputs import Inputs
from mech.inputs.layout import Where
from mech.model import HookedMLLM
from mech.model.partial.cached_run import BufferPool, NotResumable, cached_run, last_mlp_at
from mech.model.partial.continuation import Continuation
from mech.model.points import point_name
from mech.model.turns import alone
from mech.results import provenance

METHODS = ("auto", "walk", "literal")
DIRECTIONS = ("denoise", "noise")


@checked
@alone
def path_patching(
    model: HookedMLLM,
    clean: Given,
    corrupted: Given | None,
    metric: AnyMetric,
    *,
    senders: Ends,
    receivers: str | Ends = "logits",
    freeze: Sequence[one_of(FREEZE)] = ("attention",),
    positions: Where = "all",
    regions: Mapping[str, Where] | None = None,
    receiver_positions: Where = "all",
    receiver_regions: Mapping[str, Where] | None = None,
    direction: one_of(DIRECTIONS) = "denoise",
    method: one_of(METHODS) = "auto",
    progress: Progress | None = None,
) -> xr.Dataset:
    """The metric after each path is patched, and how far that moves it from the run patched into (0) to the other (1).

    ``effect = (metric - corrupted) / (clean - corrupted)`` when denoising, ``(clean - metric) / (clean - corrupted)``
    when noising; nan where both runs score the same or the receiver does not come after the sender.

    Sign: more is more sufficient (denoising), more necessary (noising); 0 is no effect. Unit: share of the gap.

    Args:
        model, clean, corrupted, metric: as in ``activation_patching``.
        senders: heads (pairs, or ``"L2H5"``), ``"mlp.2"``, ``"embed"`` (the stream that enters the first layer). A
            mapping names groups that are patched together: ``{"movers": [(4, 0), (4, 3)]}``.
        receivers: ``"logits"``, or any of ``"L4H0.q"``, ``"L4K0.k"``, ``"L4K0.v"`` (by key/value head: all query
            heads of the group see the change), ``"mlp.4"``; groups as for senders.
        freeze: what keeps its value between the ends: any of ``"attention"``, ``"mlp"`` (their outputs) and ``"norm"``
            (the scales of norms at the residual stream). Nothing is frozen after the receiver.
        positions, receiver_positions: where sender and receiver are patched, as ``TokenLayout.positions`` takes it.
        regions, receiver_regions: several such places by name: dimensions ``region`` and ``receiver_region``.
        direction: ``"denoise"`` (clean into corrupted) or ``"noise"``.
        method: ``"walk"`` and ``"literal"`` force an algorithm; both give the same result.
        progress: called with (pairs of runs done, pairs in total).

    Returns:
        ``effect`` and ``metric`` over (example, sender, receiver) and any named regions; ``clean`` and ``corrupted``
        over example. Attributes: what was frozen, the algorithm and why, the cost in forwards.

    Raises:
        ExperimentError: an end that does not exist, layouts that differ, or an answer that cannot be read off the
            inputs. Raised before any forward.
        PointError: a point that an end needs is not live in this model.

    Cost: two forwards plus the paths. For the walk see ``attrs["forwards"]``: with attention frozen, the logits and
    queries at few positions cost next to nothing. Literally, one forward per sender and one per pair of a sender and a
    receiver other than the logits.

    References: Wang et al. 2022, arXiv 2211.00593; Goldowsky-Dill et al. 2023, arXiv 2304.05969. Wang et al. freeze
    attention and let MLPs react, which is the default here.
    """
    held = frozen_of(freeze)
    if "norm" in held:
        norms_of(model)  # refuses a model whose norms are not known
    sending = ends_of(model, "senders", senders)
    receiving = ends_of(model, "receivers", [receivers] if isinstance(receivers, str) else receivers)
    places: Any = {"": positions} if regions is None else dict(regions)
    ends: Any = {"": receiver_positions} if receiver_regions is None else dict(receiver_regions)
    for name, given in (("regions", places), ("receiver_regions", ends)):
        if not given:
            raise ExperimentError(f"{name}={{}}", "at least one region", f"leave {name} out")
    nodes = [node for group in sending.values() for node in group]
    pairs, switched, parts, example = pairs_of(model, clean, corrupted), [], [], 0
    for one, other in pairs:
        switched.append(Pair.of(model, one, other, metric, direction, example))
        parts.append((_parts(one, sending, places), _parts(one, receiving, ends)))
        example += len(one)
    values = []
    for pair, (froms, tos) in zip(switched, parts, strict=True):
        pair.run(nodes, method)
        values.append(pair.metric(froms, tos, held))
        if progress:
            progress(len(values), len(pairs))
    axes = {"sender": list(sending), "region": list(places), "receiver": list(receiving), "receiver_region": list(ends)}
    alone = [name for name, given in (("region", regions), ("receiver_region", receiver_regions)) if given is None]
    settings = {"freeze": sorted(held), "direction": direction, "positions": where_in_words(positions)}
    settings |= {"zero": "no effect", "receiver_positions": where_in_words(receiver_positions)}
    settings |= {"algorithm": switched[0].algorithm, "reason": switched[0].reason}
    record = provenance(
        model, clean if isinstance(clean, Samples) else None, metric=metric,
        senders={name: [str(node) for node in group] for name, group in sending.items()},
        receivers={name: [str(node) for node in group] for name, group in receiving.items()},
        regions={name: where_in_words(where) for name, where in places.items()}, **settings,
    )  # fmt: skip
    found = _dataset(switched, torch.cat(values), parts[0], axes, alone, metric, direction)
    forwards = float(sum(pair.forwards for pair in switched))
    return found.assign_attrs(model=model.name, **settings, measure=repr(metric), forwards=forwards, provenance=record)


def _parts(inputs: Inputs, groups: Mapping[str, tuple[Node, ...]], regions: Mapping[str, Where]) -> list[Part]:
    """Each group in each region of these inputs."""
    masks = [mask_of(inputs, where) for where in regions.values()]
    return [Part(group, mask) for group in groups.values() for mask in masks]


def _dataset(
    switched: "Sequence[Pair]",
    metrics: Float[Tensor, "example sender receiver"],
    ends: tuple[Sequence[Part], Sequence[Part]],
    axes: Mapping[str, Sequence[str]],
    alone: Sequence[str],
    metric: Metric,
    direction: str,
) -> xr.Dataset:
    """Labelled metrics and effects: nan where no path exists; axes of a single region are dropped."""
    raw = metrics.double().cpu().numpy()
    exists = np.array([[sender.reaches(receiver) for receiver in ends[1]] for sender in ends[0]])
    raw = np.where(exists, raw, np.nan).reshape(-1, *map(len, axes.values()))
    clean, corrupted = (
        torch.cat([getattr(pair, name) for pair in switched]).double().cpu().numpy() for name in ("clean", "corrupted")
    )
    unit = {"unit": metric.unit}
    found = xr.Dataset(
        {
            "effect": ((EXAMPLE, *axes), effect_of(raw, clean, corrupted, direction), dict(EFFECT)),
            "metric": ((EXAMPLE, *axes), raw, unit),
            "clean": (EXAMPLE, clean, unit),
            "corrupted": (EXAMPLE, corrupted, unit),
        },
        {EXAMPLE: np.arange(len(raw)), **axes},
    )
    return found.squeeze(alone, drop=True).transpose(EXAMPLE, "sender", "receiver", ...)


@dataclass(eq=False)
class Pair:
    """A clean and a corrupted run of the same layout, between which paths are patched.

    ``of`` makes a pair without running anything. ``run`` runs and keeps both; ``metric`` can then be called repeatedly.
    """

    model: HookedMLLM
    plan: Plan
    direction: str
    forwards: float = 0.0
    algorithm: str = ""
    reason: str = ""
    clean: Tensor | None = None
    corrupted: Tensor | None = None

    @classmethod
    def of(
        cls, model: HookedMLLM, clean: Inputs, corrupted: Inputs, metric: Metric, direction: str, example: int
    ) -> "Pair":
        """A pair whose metric can be read; ``example`` is the number of rows before it."""
        plan = Plan.of(model, clean, corrupted, metric, Sweep("hook_resid_pre", (), layers=[0]), example)
        return cls(model, plan, direction)

    @torch.no_grad()
    def run(self, senders: Sequence[Node], method: str = "auto") -> None:
        """Run both, and keep the outputs of these senders in the source run.

        Raises:
            ExperimentError: ``method="walk"``, but the model cannot be run from the middle.
        """
        model, plan = self.model, self.plan
        base, source = plan.corrupted, plan.clean
        if self.direction == "noise":
            base, source = source, base
        self._base, self._source = base, {}
        at = torch.as_tensor(plan.reads, device=model.device)
        names = sorted({node.point for node in senders})
        pool = BufferPool(len(names))
        keep = [(name, lambda value, hook: self._source.update({hook.name: pool.put(value)})) for name in names]
        with model.hooks(keep), last_mlp_at(model, plan.reads):
            source_logits = model(source, logits_to_keep=at)
        self._walks: dict[tuple[int, frozenset[str]], Walk] = {}
        self._rows, self.algorithm, self.reason, kept = [], "literal", "asked for", None
        if method != "literal":
            try:
                kept = cached_run(model, base, plan.reads)
                self._rows = [Continuation(model, kept, i, torch.tensor(reading.positions))
                              for i, reading in enumerate(plan.readings)]  # fmt: skip
                self._rows[0].faithful()
                self.algorithm, self.reason = "walk", ""
            except NotResumable as error:
                kept, self._rows, self.reason = None, [], str(error)
                if method == "walk":
                    raise ExperimentError(f"method='walk': {error}", "a model for which it is exact",
                                          "use method='auto'") from None  # fmt: skip
        base_logits = model(base, logits_to_keep=at) if kept is None else kept.logits
        self._clean_logits = source_logits if self.direction == "denoise" else base_logits
        self._before, there = (plan.scores(logits, self._clean_logits) for logits in (base_logits, source_logits))
        self.corrupted, self.clean = (self._before, there) if self.direction == "denoise" else (there, self._before)
        self.forwards += 2

    def metric(
        self, senders: Sequence[Part], receivers: Sequence[Part], freeze: frozenset[str]
    ) -> Float[Tensor, "batch sender receiver"]:
        """The metric with each path patched; the base run's metric where there is no path."""
        model, plan = self.model, self.plan
        if not self._rows:
            at = torch.as_tensor(plan.reads, device=model.device)

            def score(run: Inputs) -> Tensor:
                return plan.scores(model(run, logits_to_keep=at), self._clean_logits)

            found, forwards = literal(model, self._base, self._source, freeze, senders, receivers, score)
            self.forwards += forwards
            return found
        found, before = [], sum(row.row_layers for row in self._rows)
        for i, (row, reading) in enumerate(zip(self._rows, plan.readings, strict=True)):
            if (i, freeze) not in self._walks:
                mine = {name: value[i : i + 1] for name, value in self._source.items()}
                clean = self._clean_logits[i, plan.places[i]]
                walk = Walk(row, mine, i, freeze, lambda x, r=reading, c=clean: r.score(x, c), self._before[i])
                self._walks[i, freeze] = walk
            found.append(self._walks[i, freeze].scores(senders, receivers))
        whole = len(self._rows[0]) * self._rows[0].kept.last.shape[0] * self._rows[0].kept.last.shape[1]
        self.forwards += (sum(row.row_layers for row in self._rows) - before) / whole
        return torch.stack(found)

    @torch.no_grad()
    def without(self, nodes: Sequence[Node]) -> Float[Tensor, " batch"]:
        """``(metric - corrupted) / gap`` when all of these nodes output their values from the other run."""
        everywhere = torch.ones(len(self._base), len(self._base.layouts[0]), dtype=torch.bool)
        hooks = []
        for node in nodes:
            values = self._source[node.point]
            hooks.append(put(node, everywhere, values[:, :, node.index] if node.kind == "head" else values))
        at = torch.as_tensor(self.plan.reads, device=self.model.device)
        with self.model.hooks(hooks):
            found = self.plan.scores(self.model(self._base, logits_to_keep=at), self._clean_logits)
        self.forwards += 1
        assert self.corrupted is not None
        return (found - self.corrupted) / self.gap

    @property
    def gap(self) -> Float[Tensor, " batch"]:
        """The clean run's metric minus the corrupted run's."""
        assert self.clean is not None and self.corrupted is not None
        return self.clean - self.corrupted


def heads_and_mlps(model: HookedMLLM) -> list[Node]:
    """All heads and MLPs of the text stack that can be senders."""
    live, found = set(model.points()), []
    for layer in range(model.cfg.n_layers):
        if point_name("attn.hook_z", layer) in live:
            found += [Node("head", layer, head) for head in range(model.cfg.n_heads)]
        if point_name("hook_mlp_out", layer) in live:
            found.append(Node("mlp", layer))
    return found
