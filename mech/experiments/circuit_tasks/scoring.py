"""Entries compared on a task: whose scores make a faithful circuit with few edges?

    found = circuit_scores(circuit_task("mover"))                       # or entries={"mine": CircuitGraph, ...}
    circuit_table(found)                                                # CPR, CMD, AUROC of every entry
    CircuitGraph.of(task.model, found.score.sel(entry="exact").values).largest(20).to_mib("circuit.json")

An entry gives every edge a score, on the samples that find. Its circuits are the largest 0.1% to 100% of all edges; on
the samples that test, each is run with all other edges as in the corrupted run (``runs``). CPR rewards much of the
clean metric from few edges (by signed score), CMD the clean metric itself (by absolute score): a circuit that
overshoots is no better than one that falls short.

It does not search for circuits (``mech.trace_circuit``), and it does not prune: a part of a circuit that leads nowhere
changes nothing.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import xarray as xr
from jaxtyping import Float
from scipy.stats import rankdata

from mech.arguments import Count, Progress, Seed, checked
from mech.errors import ExperimentError
from mech.experiments.attribution.edges import edge_attribution
from mech.experiments.circuit_tasks.curves import SHARES, area, auroc
from mech.experiments.circuit_tasks.graph import CircuitGraph, Shape
from mech.experiments.circuit_tasks.runs import CircuitRuns, check_additive
from mech.experiments.circuit_tasks.tasks import CircuitTask
from mech.experiments.paths.path_patching import path_patching
from mech.experiments.statistics import bootstrap_interval, bootstrap_means
from mech.results import provenance

Scores = Float[np.ndarray, "sender receiver"]
ORDERS = ("signed", "size")
ENSEMBLED = ("eap", "eap_ig")  # "ensemble" takes their mean rank
GAP = {"unit": "share of the gap between all edges and none", "sign": "1: as good as the whole model"}


def _eap(task: CircuitTask, seed: int) -> Scores:
    return _attributed(task, 0)


def _eap_ig(task: CircuitTask, seed: int) -> Scores:
    return _attributed(task, 5)


def _attributed(task: CircuitTask, ig_steps: int) -> Scores:
    found = edge_attribution(
        task.model, task.find, None, task.metric(task.find), ig_steps=ig_steps, direction="noise", check=0
    )
    return np.nan_to_num(found.effect.mean("example").values)


def _exact(task: CircuitTask, seed: int) -> Scores:
    """Every edge switched by itself: what attribution estimates."""
    shape = Shape.of(task.model)
    found = path_patching(
        task.model, task.find, None, task.metric(task.find), senders=[str(node) for node in shape.senders],
        receivers=[str(node) for node in shape.receivers], freeze=("attention", "mlp"), direction="noise",
    )  # fmt: skip
    return np.nan_to_num(found.effect.mean("example").values)


def _ensemble(task: CircuitTask, seed: int) -> Scores:
    """The mean rank of the absolute scores of ``ENSEMBLED``, with the sign of their sum, between -1 and 1."""
    parts = [METHODS[name](task, seed) for name in ENSEMBLED]
    ranks = np.mean([rankdata(np.abs(part)).reshape(part.shape) for part in parts], axis=0)
    return np.sign(np.sum(parts, axis=0)) * ranks / ranks.size


def _random(task: CircuitTask, seed: int) -> Scores:
    return np.random.default_rng(seed).uniform(-1, 1, Shape.of(task.model).exists.shape)


METHODS: dict[str, Callable[[CircuitTask, int], Scores]] = {
    "eap": _eap, "eap_ig": _eap_ig, "exact": _exact, "ensemble": _ensemble, "random": _random,
}  # fmt: skip
ENTRIES = tuple(METHODS)


@checked
def circuit_scores(
    task: CircuitTask,
    entries: Sequence[str] | Mapping[str, CircuitGraph] = ENTRIES,
    *,
    n_boot: Count = 1000,
    batch_size: Count = 16,
    seed: Seed = 0,
    progress: Progress | None = None,
) -> xr.Dataset:
    """How faithful each entry's circuits are, how large they must be, and whether they contain the true edges.

    ``faithfulness(k) = (metric of the k largest edges - metric of none) / (metric of all - metric of none)``, means
    over examples; ``CPR = integral of faithfulness`` over k as a share of all edges, ``CMD = integral of
    |1 - faithfulness|``, by trapezoids over 0.1% to 100%. ``auroc``: the probability that a true edge has a higher
    absolute score than another.

    Sign: higher CPR and AUROC are better, lower CMD is better. Unit: areas of shares; a circuit that is whole from the
    start has CPR 0.999 and CMD 0. AUROC at chance is 0.5.

    Args:
        task: see ``circuit_task``.
        entries: names of ``ENTRIES`` (``"eap"``, ``"eap_ig"``, ``"exact"``, ``"ensemble"``, ``"random"``), or your own
            scores by name: graphs whose scores are used.
        n_boot: resamples for the intervals.
        batch_size: samples per forward when circuits are run.
        seed: for the random entry and for resampling.
        progress: called with (entries done, entries in all).

    Returns:
        ``score`` (entry, sender, receiver), ``faithfulness`` (entry, order, share, example), for edges by signed score
        and by size (absolute score); ``cpr``, ``cmd`` with ``_low`` and ``_high`` and ``auroc`` over entry; ``truth``.

    Raises:
        ExperimentError: an unknown entry, a graph of another model, layers whose stream is not a sum, or a model that
            does not tell samples from counterfactuals.

    Cost: twenty forwards for each test sample and entry (fewer if circuits are alike), and what the entries cost on the
    samples that find: three forwards and a backward each for ``"eap"``, seven and five for ``"eap_ig"``, path patching
    of every edge for ``"exact"``.

    References: MIB, arXiv 2504.13151 (tasks for text models); EAP 2310.10348; EAP-IG 2403.17806; ensembles 2510.06811.
    Unlike there: midpoints in integrated gradients, keys and values by key/value head, samples in place of strings.
    """
    check_additive(task.model)
    scored = _entries(task, entries)
    test = task.test
    runs = CircuitRuns.of(task.model, list(test), task.metric(test), batch_size)
    none, whole = runs.corrupted.mean(), runs.clean.mean()
    if not whole > none:
        raise ExperimentError(
            f"{task.model.name}, which prefers the right answer by {whole - none:.2g} logits more in the clean runs",
            "a model that tells samples from counterfactuals", "use samples it can answer",
        )  # fmt: skip
    known: dict[bytes, np.ndarray] = {}
    scores, curves = {}, {}
    for done, (name, score) in enumerate(scored.items(), start=1):
        graph = CircuitGraph.of(task.model, score(task, seed))
        scores[name] = graph.scores
        curves[name] = [[(_metric(runs, graph.largest(int(share * graph.n_edges), order == "signed"), known) - none)
                         / (whole - none) for share in SHARES] for order in ORDERS]  # fmt: skip
        if progress:
            progress(done, len(scored))
    return _dataset(task, scores, curves, n_boot, seed)


def _entries(
    task: CircuitTask, entries: Sequence[str] | Mapping[str, CircuitGraph]
) -> dict[str, Callable[[CircuitTask, int], Scores]]:
    if not isinstance(entries, Mapping):
        if isinstance(entries, str) or not len(entries):
            raise ExperimentError(f"entries={entries!r}", "a list of names, at least one", 'use entries=["eap_ig"]')
        for name in entries:
            if name not in METHODS:
                raise ExperimentError.unknown("entry", name, ENTRIES)
        return {name: METHODS[name] for name in entries}
    shape = Shape.of(task.model)
    for name, graph in entries.items():
        if graph.shape != shape:
            raise ExperimentError(f"the entry {name!r} with edges of {graph.shape}", f"{shape}", "score this model")
    if not entries:
        raise ExperimentError("no entries", "at least one graph", "leave entries out")
    return {name: lambda task, seed, graph=graph: graph.scores for name, graph in entries.items()}


def _metric(runs: CircuitRuns, graph: CircuitGraph, known: dict[bytes, np.ndarray]) -> Float[np.ndarray, " example"]:
    """The metric of a circuit, kept in ``known``: small models have few different circuits."""
    key = np.packbits(graph.inside).tobytes()
    if key not in known:
        known[key] = runs.metric(graph.inside)
    return known[key]


def _dataset(
    task: CircuitTask, scores: Mapping[str, Scores], curves: Mapping[str, list], n_boot: int, seed: int
) -> xr.Dataset:
    shape, test = Shape.of(task.model), task.test
    faithfulness = np.array(list(curves.values()))  # entry, order, share, example
    each = np.moveaxis(faithfulness, -1, 0)
    cpr = bootstrap_interval(area(each[:, :, 0]), n_resamples=n_boot, seed=seed)
    drawn = area(np.abs(1 - bootstrap_means(each[:, :, 1], n_boot, seed)))  # area of the mean, not mean of areas
    cmd = area(np.abs(1 - each[:, :, 1].mean(0)))
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    truth = np.full(shape.exists.shape, np.nan) if task.truth is None else np.asarray(task.truth, dtype=np.float64)
    told = np.isfinite(truth)
    aucs = [auroc(np.abs(score[told]), truth[told] == 1) for score in scores.values()]
    areas = {"cpr": cpr.mean, "cpr_low": cpr.low, "cpr_high": cpr.high, "cmd": cmd, "cmd_low": np.minimum(low, cmd),
             "cmd_high": np.maximum(high, cmd), "auroc": np.array(aucs)}  # fmt: skip
    return xr.Dataset(
        {
            "score": (("entry", "sender", "receiver"), np.array(list(scores.values()))),
            "faithfulness": (("entry", "order", "share", "example"), faithfulness, GAP),
            "truth": (("sender", "receiver"), truth),
            **{name: ("entry", np.asarray(value)) for name, value in areas.items()},
        },
        {
            "entry": list(scores), "order": list(ORDERS), "share": list(SHARES),
            "example": [sample.id or str(i) for i, sample in enumerate(test)],
            "sender": [str(node) for node in shape.senders], "receiver": [str(node) for node in shape.receivers],
        },
        {
            "kind": "circuit_scores", "task": task.name, "model": task.model.name, "n_find": len(task.find),
            "n_edges": int(shape.exists.sum()),
            "provenance": provenance(task.model, {"find": task.find, "test": test}, seed=seed),
        },
    )  # fmt: skip
