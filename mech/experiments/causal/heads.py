"""What the causal report measures for single heads: both sweeps, orders of sets, ablation, tests and quadrants."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from mech.arguments import NamedProgress
from mech.data.samples import Samples
from mech.experiments.causal.runs import Runs, both_given, refuse_gap
from mech.experiments.causal.sets import greedy
from mech.experiments.metrics import ask, quiz
from mech.experiments.patching.activation import activation_patching
from mech.experiments.patching.paired import patched_pairs
from mech.experiments.ranking.ranking import Head, Ranking
from mech.experiments.statistics import (
    benjamini_hochberg,
    bootstrap_interval,
    bootstrap_means,
    holm,
    sign_flip_test,
    spearman,
)
from mech.interventions import Ablate, Reference, intervene
from mech.model import HookedMLLM
from mech.model.partial.cached_run import NotResumable

QUADRANTS = ("attending and causal", "attending, not causal", "causal, not attending", "neither")
ATTENDING = 0.05  # how far RAM must exceed that of even attention, as a share of the rest, for a head to attend
HALF, BACK = 0.5, 0.9  # of the gap: what the smallest set loses, and what it recovers
DOING = {"noise": "noising", "denoise": "denoising"}
Sweeps = Mapping[str, np.ndarray]  # direction -> [example, layer, head], in logits
CANDIDATES = 16  # heads among which the greedy search chooses


def cut_sweeps(model: HookedMLLM, samples: Samples, say: NamedProgress) -> Sweeps:
    """Both sweeps over all heads in blocks: the part of the report that grows with samples times heads.

    Raises:
        ExperimentError: as ``Runs.of``.
    """
    forced, found = both_given(model, samples), {}
    for direction, doing in DOING.items():
        effects = patched_pairs(
            model, samples, forced=forced, direction=direction, progress=lambda i, n, doing=doing: say(doing, i, n)
        )
        refuse_gap(model, float((effects["clean"] - effects["corrupted"]).mean()))
        found[direction] = _differences(effects, direction)
    return found


def swept(runs: Runs, direction: str, say: NamedProgress, known: Sweeps | None = None) -> np.ndarray:
    """Every head's effect in one direction, [example, layer, head]: a share of the mean gap."""
    if known:
        return known[direction] / runs.gap
    clean, corrupted = ([pair[side] for pair in runs.pairs] for side in (0, 1))
    effects = activation_patching(
        runs.model, clean, corrupted, runs.metric, direction=direction,
        progress=lambda done, total: say(DOING[direction], done, total),
    )  # fmt: skip
    return _differences(effects, direction) / runs.gap  # of the *mean* gap, unlike effects["effect"]


def _differences(effects: xr.Dataset, direction: str) -> np.ndarray:
    whole, part = ("clean", "metric") if direction == "noise" else ("metric", "corrupted")
    return (effects[whole] - effects[part]).values


def single_effects(runs: Runs, say: NamedProgress, known: Sweeps | None = None) -> tuple[dict[str, np.ndarray], str]:
    """Every head's ``lost`` and ``recovered``, ``direct`` and ``mediated``; or why paths cannot be followed.

    Each [example, layer, head].
    """
    each = {"lost": swept(runs, "noise", say, known), "recovered": swept(runs, "denoise", say, known)}
    try:
        each["direct"] = runs.direct()
    except NotResumable as error:
        return each, str(error)
    each["mediated"] = each["lost"] - each["direct"]
    return each, ""


def ordered(
    runs: Runs, ranking: Ranking, say: NamedProgress, known: Sweeps | None = None
) -> tuple[dict[str, list[Head]], np.ndarray]:
    """All heads in two orders, from the samples that find heads: first by greedy search, then by single effects.

    Also what is lost without each head on these samples, [layer, head].
    """
    try:
        direct = np.abs(runs.direct().mean(0))
    except NotResumable:
        direct = np.zeros((len(ranking.layers), ranking.n_heads))

    def at(values: np.ndarray, head: Head) -> float:
        return float(values[ranking.layers.index(head.layer), head.head])

    orders, singles = {}, {}
    for name, direction, effect, share in (
        ("effect", "noise", runs.lost, HALF),
        ("restoring", "denoise", runs.recovered, BACK),
    ):
        effects = swept(runs, direction, lambda what, done, total: say("finding", done, total), known)
        single = singles[name] = effects.mean(0)
        by_effect = sorted(ranking.heads, key=lambda head, single=single: -at(np.abs(single) + direct, head))
        found = greedy(effect, by_effect[:CANDIDATES], share, tie=lambda head: at(direct, head))
        orders[name] = found + [head for head in by_effect if head not in found]
    return orders, singles["effect"]


def ablated(
    runs: Runs, method: str, bank: Reference | Samples, batch_size: int, say: NamedProgress, **options: Any
) -> np.ndarray:
    """The loss when one head is ablated, head by head."""
    model = runs.model
    questions = quiz(model, runs.samples, batch_size)
    base, found = ask(model, questions)["logit_diff"], []
    for layer in model.cfg.attention_layers:
        for head in range(model.cfg.n_heads):
            with intervene(model, Ablate(heads=[(layer, head)], to=method, reference=bank, **options)) as without:
                found.append((base - ask(without, questions)["logit_diff"]) / runs.gap)
        say("ablating", len(found), len(model.cfg.attention_layers) * model.cfg.n_heads)
    return np.array(found).T.reshape(len(base), len(model.cfg.attention_layers), model.cfg.n_heads)


@dataclass(frozen=True)
class Criteria:
    """When an effect counts: its smallest size, the level of the tests, and the resamples of intervals."""

    threshold: float
    alpha: float
    n_boot: int
    seed: int


def heads_of(runs: Runs, ranking: Ranking, each: dict[str, np.ndarray], criteria: Criteria) -> xr.Dataset:
    """Every head's numbers, tests and quadrant."""
    seed = criteria.seed
    rank = np.empty(ranking.mean.shape, dtype=int)
    for place, head in enumerate(ranking.heads, start=1):
        rank[ranking.layers.index(head.layer), head.head] = place
    found: dict[str, np.ndarray] = {"ram": ranking.mean, "ram_rank": rank}
    for name, values in each.items():
        interval = bootstrap_interval(values, n_resamples=criteria.n_boot, seed=seed)
        found |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    p = np.stack([sign_flip_test(each[name], seed=seed) for name in ("lost", "recovered")])
    for name, raw, strict, loose in zip(("lost", "recovered"), p, holm(p), benjamini_hochberg(p), strict=True):
        found |= {f"{name}_p": raw, f"{name}_p_holm": strict, f"{name}_p_bh": loose}
    shown = {
        n: (np.abs(found[n]) >= criteria.threshold) & (found[f"{n}_p_bh"] < criteria.alpha)
        for n in ("lost", "recovered")
    }
    found["necessary"] = shown["lost"] & (found["lost"] > 0)
    found["sufficient"] = shown["recovered"] & (found["recovered"] > 0)
    found["hinders"] = (shown["lost"] & (found["lost"] < 0)) | (shown["recovered"] & (found["recovered"] < 0))
    null = _even(runs)
    low = ranking.mean if ranking.per_example is None else bootstrap_interval(ranking.per_example, seed=seed).low
    attends, causal = (ranking.mean - null >= ATTENDING * (1 - null)) & (low > null), shown["lost"] | shown["recovered"]
    found["quadrant"] = np.select([attends & causal, attends, causal], QUADRANTS[:3], QUADRANTS[3])
    coords = {"layer": list(ranking.layers), "head": np.arange(ranking.n_heads)}
    data = {name: (("layer", "head"), values) for name, values in found.items()}
    return xr.Dataset({**data, "even": null}, coords)


def singles_of(heads: xr.Dataset, ranking: Ranking) -> dict[Head, float]:
    """What is lost without each head alone."""
    lost = heads["lost"].values
    return {head: float(lost[ranking.layers.index(head.layer), head.head]) for head in ranking.heads}


def _even(runs: Runs) -> float:
    """The RAM of a head that attends evenly: evidence over visible keys, averaged over the question."""
    shares = []
    for batch in runs.batches:
        real = sum(mask.int() for mask in batch.regions.values()).cumsum(1)  # type: ignore[union-attr]
        share = batch.regions["evidence"].cumsum(1) / real.clamp(min=1)
        for row, layout in enumerate(batch.inputs[0].layouts):
            shares.append(float(share[row, layout.positions("question")].mean()))
    return float(np.mean(shares))


def followed(heads: xr.Dataset, n: int) -> list[Head]:
    """Heads that matter: at most ``n``, those that do not attend to the evidence first, then by their effect."""
    size = np.maximum(np.abs(heads["lost"].values), np.abs(heads["recovered"].values))
    matters = np.isin(heads["quadrant"].values, ("attending and causal", "causal, not attending"))
    blind = heads["quadrant"].values == "causal, not attending"
    order = sorted(np.argwhere(matters).tolist(), key=lambda at: (not blind[tuple(at)], -size[tuple(at)]))
    attending = [at for at in order if not blind[tuple(at)]]
    chosen = order[: max(1, n - min(1, len(attending)))]
    chosen += [at for at in attending if at not in chosen][: n - len(chosen)]  # one that attends, to compare with
    return [Head(int(heads["layer"].values[i]), int(j)) for i, j in chosen[:n]]


def agreement_of(ram: np.ndarray, lost: np.ndarray, n_boot: int, seed: int) -> dict[str, float | None]:
    """Spearman correlation of RAM and loss over heads, with its interval over samples; None if undefined."""
    lost = np.round(lost, 4)  # rounding errors must not rank heads that do nothing
    mean = spearman(ram, lost.mean(0))
    if np.isnan(mean):
        return {"mean": None, "low": None, "high": None}
    draws = [spearman(ram, resampled) for resampled in bootstrap_means(lost, min(n_boot, 1000), seed).round(4)]
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return {"mean": mean, "low": float(low), "high": float(high)}
