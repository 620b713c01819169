"""Accuracy, speed and memory of sparse inference, for several ways to choose the dense heads, at equal budget.

    found = mech.acceleration(model, test, find=find, window=64)
    mech.view(found)                                       # accuracy, cache and speed against the heads that are kept
    mech.experiments.findings.acceleration.summarise(found)         # numbers, tests, the recommended setting

The dense heads are whole KV groups, so at one *share* every ranking costs the same attention FLOPs and the same cache
bytes. The choices differ only in *which* groups stay dense:

=============  =====================================================================================================
``ram``        those that attend to the evidence (CoRe heads)
``bottom``     those with the lowest RAM
``random``     several random sets
``vision``     those that attend to visual tokens of any kind
``causal``     those whose noising (patching from the counterfactual) costs the answer most
``gates``      those whose learned gate stays open (DuoAttention)
``reach``      those whose output at the question depends most on distant keys, on average; needs no evidence
``dynamic``    the same score, with the heads chosen anew for every input; their number stays the same
``layers``     whole layers, those with the highest RAM, as far as the budget goes: what stock engines can run
=============  =====================================================================================================

``window`` keeps no head dense, ``dense`` keeps all. Samples that rank the heads never test them. What a share saves is
counted (``flops``, ``kv_bytes``: shares of the dense model) and, separately, measured (``speed``).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import xarray as xr

from mech.arguments import NOT_EMPTY, Amount, Count, NamedProgress, Progress, Seed, Whole, checked, some_of
from mech.axes import CONDITION, EXAMPLE, HEAD, LAYER
from mech.data.samples import Samples, SomeSamples
from mech.errors import ExperimentError
from mech.experiments.metrics import LogitDiff, Quiz, ask, quiz
from mech.experiments.patching.activation import activation_patching
from mech.experiments.ranking.checks import other_model_attrs, refuse_overlap, refuse_ranking
from mech.experiments.ranking.ranking import Head, Heads, Ranking, rank_heads
from mech.experiments.scores.ram import retrieval_attention_mass
from mech.identity import weight_digest
from mech.model import HookedMLLM
from mech.results import heads_text, provenance
from mech.scale.measures import in_one_piece, per_sample, running
from mech.sparse.dynamic import chosen, reach
from mech.sparse.frontier.speed import speed_dataset
from mech.sparse.gates import learned_gates
from mech.sparse.groups import expanded, grouped
from mech.sparse.localize import check_question, localize
from mech.sparse.policy import Policy

CHOICES = ("ram", "bottom", "random", "vision", "causal", "gates", "reach", "dynamic", "layers")
SHARES = (0.05, 0.1, 0.25, 0.5)


@dataclass(frozen=True)
class Setting:
    """One set of dense KV groups; ``draw`` numbers the random sets. ``dynamic`` sets are chosen when they are run."""

    choice: str
    share: float
    n_kv_heads: int
    heads: Heads = ()
    draw: int = 0


@dataclass(frozen=True)
class Local:
    """What local heads see, and how heads are ranked.

    Attributes:
        sinks, window: as in ``Policy``.
        n_causal: samples of ``find`` that are patched for ``causal``.
        gate_steps: optimiser steps for ``gates``.
        layers: how many layers ``dynamic`` and ``reach`` read; all if None.
    """

    sinks: int = 4
    window: int = 256
    n_causal: int = 6
    gate_steps: int = 40
    layers: int | None = None

    @property
    def policy(self) -> Policy:
        """The policy that keeps no head dense."""
        return Policy((), self.sinks, self.window)


@dataclass(frozen=True)
class Grid:
    """Which sets of dense heads are compared: choices by shares.

    Attributes:
        choices: which of ``CHOICES``.
        shares: shares of the KV groups to keep dense; an int is a number of groups.
        n_random: random sets at every share.
        seed: seed of the random sets and the gates.
        batch_size: samples per forward.
    """

    choices: Sequence[str] = CHOICES
    shares: Sequence[int | float] = SHARES
    n_random: int = 4
    seed: int = 0
    batch_size: int = 4


@checked
def acceleration(
    model: HookedMLLM,
    samples: SomeSamples,
    *,
    find: SomeSamples,
    window: Count | None = None,
    sinks: Whole = 4,
    choices: some_of(CHOICES) = CHOICES,
    shares: Annotated[Sequence[Amount], NOT_EMPTY] = SHARES,
    n_random: Count = 4,
    rankings: Mapping[str, Ranking] | None = None,
    batch_size: Count = 4,
    turns: Whole = 3,
    seed: Seed = 0,
    progress: NamedProgress | None = None,
    allow_other_model: bool = False,
) -> xr.Dataset:
    """Accuracy of every sample under every way to choose dense heads, at equal budgets, with speed and cache size.

    Sign: higher is better. Unit: accuracy is 0 or 1 per sample, the logit difference is in logits; speeds are how many
    times faster than dense on this machine.

    Args:
        model: a hooked model.
        samples: held-out samples, which test the heads.
        find: other samples, with evidence and counterfactuals, which rank the heads.
        window, sinks: what local heads see; by default the window that ``local_for`` chooses.
        choices: which of ``CHOICES``.
        shares: shares of the KV groups to keep dense; an int is a number of groups.
        n_random: random sets at every share, drawn from groups outside the RAM set where there are enough.
        rankings: existing rankings by their name in ``CHOICES``; the others are computed on ``find``.
        batch_size: samples per forward.
        turns: how often everything is timed; 0 skips the timing.
        seed, allow_other_model: as in ``ablation``; the seed is also used for the gates.
        progress: called with (what, done, in all).

    Raises:
        ExperimentError: a sample that both ranks and tests, a ranking of another model, or a window that covers a
            sample.

    Cost: one (sparse) forward per test sample and setting. The rankings on ``find`` take one forward per sample for RAM
    and one for reach; ``causal`` costs what ``activation_patching`` costs, ``gates`` about 160 forwards and 80 backward
    passes.

    References: arXiv 2606.05843 (dense heads from RAM), 2410.10819 (gates; sinks and window by KV head).
    """
    say = progress or (lambda what, done, total: None)
    samples, find = Samples(samples), Samples(find)
    refuse_overlap(samples, [sample.id for sample in find], "rank the heads")
    others = [refuse_ranking(given, model, samples, allow_other_model) for given in (rankings or {}).values()]
    local = local_for(model, samples, sinks=sinks, window=window)
    made = dict(rankings or {})
    grid = Grid(choices, shares, n_random, seed, batch_size)
    for name, ranking in ranked(model, find, grid, local, set(made), say):
        made[name] = ranking
    todo = settings(model, made, grid)
    parts: list[xr.Dataset] = []
    for part in measured(model, samples, todo, local, batch_size):
        parts.append(part)
        say("settings", len(parts), len(todo))
    joined = xr.concat(parts, dim=CONDITION)
    if turns:
        speeds = speed_dataset(model, next(iter(samples)), timed(todo), local.policy, turns=turns)
        joined = xr.merge([joined, speeds], combine_attrs="no_conflicts")
    return joined.assign_attrs(about(model, samples, find, local, seed), **other_model_attrs(others))


def local_for(
    model: HookedMLLM, samples: Samples, *, sinks: int = 4, window: int | None = None, **options: Any
) -> Local:
    """What local heads see of these samples.

    Args:
        window: by default the smallest multiple of 8 that covers the question and everything after it, and also a
            sixteenth of the longest sample.
        options: the other attributes of ``Local``.

    Raises:
        ExperimentError: a sample that fits within sinks and window, so that nothing would be left out; a question
            longer than the window.
    """
    layouts = [model.inputs_of(sample, answer=True).layout for sample in samples]
    if window is None:
        tail = max(len(layout) - int(layout.positions("question")[0]) for layout in layouts)
        window = -(-max(tail, max(map(len, layouts)) // 16) // 8) * 8
    if min(map(len, layouts)) <= sinks + window + 1:
        raise ExperimentError(
            f"a window of {window} and {sinks} sinks for a sample of {min(map(len, layouts))} tokens",
            "longer samples: here every head attends to everything, and the model is dense", "make the window smaller",
        )  # fmt: skip
    check_question(Policy((), sinks, window), layouts)
    return Local(sinks, window, **options)


def ranked(
    model: HookedMLLM,
    find: Samples,
    grid: Grid,
    local: Local,
    known: set[str],
    say: NamedProgress,
) -> Iterator[tuple[str, Ranking]]:
    """The rankings that the choices need and that are not ``known``, each as soon as it is computed."""
    wanted = set(grid.choices) - known
    if wanted & {"ram", "bottom", "vision", "random", "layers"} and not {"ram", "vision"} <= known:
        masses = retrieval_attention_mass(
            model, find, batch_size=grid.batch_size, progress=lambda i, n: say("RAM", i, n)
        )
        for name, score in (("ram", "ram"), ("vision", "vision_mass")):
            if name not in known:
                yield name, rank_heads(masses, score)
    if "reach" in wanted:
        options: dict[str, Any] = {"sinks": local.sinks, "window": local.window, "layers": local.layers}
        yield "reach", rank_heads(reach(model, find, progress=lambda i, n: say("reach", i, n), **options), "reach")
    if "causal" in wanted:
        yield "causal", causal_ranking(model, find[: local.n_causal], say)
    if "gates" in wanted:
        found = gates_of(model, find, local=local, seed=grid.seed, progress=lambda i, n: say("gates", i, n))
        named = tuple(sample.id for sample in find if sample.id)
        labels = str(model.name), ", ".join(find.domains), named, model.cfg.attention_layers, weight_digest(model) or ""
        yield "gates", Ranking(found["gate"].values, None, "gate", *labels)


def causal_ranking(model: HookedMLLM, samples: Samples, say: NamedProgress = lambda *_: None) -> Ranking:
    """Heads ranked by what the answer loses when one head is noised from the question on."""
    if lacking := [sample.id for sample in samples if sample.counterfactual is None]:
        raise ExperimentError(f"sample {lacking[0]!r} without a counterfactual", "one for each", "leave out 'causal'")
    found = per_sample_lost(model, samples, batch_size=1, progress=lambda i, n: say("causal", i, n))
    ids, values = tuple(sample.id for sample in samples), found["lost"].values
    return Ranking(
        values.mean(0),
        values,
        "lost",
        str(model.name),
        ", ".join(samples.domains),
        ids,
        model.cfg.attention_layers,
        weight_digest(model) or "",
    )


@per_sample("patching from the question on")
def per_sample_lost(
    model: HookedMLLM, samples: Samples, *, batch_size: int = 1, progress: Progress | None = None
) -> xr.Dataset:
    """The values behind ``causal_ranking``, sample by sample."""
    lost = []
    for i, sample in enumerate(samples, start=1):
        layout = model.inputs_of(sample).layout
        metric = LogitDiff([sample.answer], [sample.counterfactual.answer if sample.counterfactual else ""])
        behind = range(int(layout.positions("question")[0]), len(layout))
        found = activation_patching(model, [sample], None, metric, direction="noise", positions=list(behind))
        lost.append(found["effect"].values[0])
        if progress:
            progress(i, len(samples))
    return xr.Dataset({"lost": ((EXAMPLE, LAYER, HEAD), np.stack(lost))}, {EXAMPLE: samples.names})


@in_one_piece("gates", classes=(Local,))
def gates_of(
    model: HookedMLLM, samples: Samples, *, local: Local, seed: int, progress: Progress | None = None
) -> xr.Dataset:
    """The scores of ``learned_gates``."""
    options: dict[str, Any] = {"sinks": local.sinks, "window": local.window, "steps": local.gate_steps, "seed": seed}
    ranking = learned_gates(model, samples, progress=progress, **options)
    return xr.Dataset({"gate": ((LAYER, HEAD), ranking.mean)}, {LAYER: list(ranking.layers)})


def settings(model: HookedMLLM, rankings: dict[str, Ranking], grid: Grid) -> list[Setting]:
    """Every choice at every share, after the dense model and the window alone."""
    cfg = model.cfg
    groups = {name: grouped(ranking, cfg) for name, ranking in rankings.items()}
    total = len(cfg.attention_layers) * cfg.n_kv_heads
    every = expanded([(layer, g) for layer in cfg.attention_layers for g in range(cfg.n_kv_heads)], cfg)
    todo = [Setting("dense", 1.0, total, every), Setting("window", 0.0, 0)]
    any_of_them = next(iter(groups.values()))
    for n in dict.fromkeys(any_of_them.count(share) for share in grid.shares):
        for choice in grid.choices:
            sets: Sequence[Heads] = [()]
            if choice == "random":
                tested = groups["ram"].top(n) if "ram" in groups and 2 * n <= total else ()
                sets = any_of_them.random(n, grid.n_random, grid.seed, exclude=tested)
            elif choice == "layers":
                sets = [layers_first(groups["ram"], n)]
            elif choice != "dynamic":
                of = groups["ram" if choice == "bottom" else choice]
                sets = [of.bottom(n) if choice == "bottom" else of.top(n)]
            for draw, some in enumerate(sets):
                todo.append(Setting(choice, n / total, n, expanded(some, cfg), draw))
    return todo


def layers_first(groups: Ranking, n: int) -> Heads:
    """``n`` KV groups, layer by layer from the highest mean down; of the last layer, the best groups."""
    layers = [groups.layers[i] for i in np.argsort(-groups.mean.mean(1), kind="stable")]
    return tuple(group for layer in layers for group in groups.heads if group.layer == layer)[:n]


def timed(todo: Sequence[Setting]) -> dict[float, Heads]:
    """One set per share, whose speed stands for all sets of that share: the RAM set where there is one."""
    static = [setting for setting in todo if setting.choice not in ("dense", "dynamic")]
    static.sort(key=lambda setting: setting.choice != "ram")
    shares = sorted({setting.share for setting in static})
    return {share: next(setting.heads for setting in static if setting.share == share) for share in shares}


@per_sample("sparse inference", over="todo", classes=(Setting, Local, Head))
def asked_sparsely(
    model: HookedMLLM,
    samples: Samples,
    *,
    todo: Sequence[Setting],
    local: Local,
    length: int,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> xr.Dataset:
    """The per-sample values of ``acceleration``; ``length``, which depends on all samples, is given."""
    return xr.concat(list(measured(model, samples, todo, local, batch_size, length)), dim=CONDITION)


def measured(
    model: HookedMLLM,
    samples: Samples,
    todo: Sequence[Setting],
    local: Local,
    batch_size: int = 4,
    length: int | None = None,
) -> Iterator[xr.Dataset]:
    """The settings one by one, each as its own dataset, which a study saves as it goes.

    Budgets are counted at ``length`` tokens; the median length of the samples if None.
    """
    if running() is not None:  # on workers, all at once
        length = int(np.median([len(model.inputs_of(sample, answer=True).layout) for sample in samples]))
        whole = asked_sparsely(model, samples, todo=list(todo), local=local, length=length, batch_size=batch_size)
        yield from (whole.isel({CONDITION: [i]}) for i in range(len(todo)))
        return
    questions = quiz(model, samples, batch_size)
    lengths = [row for batch in questions.batches for row in batch.tensors["attention_mask"].sum(1).tolist()]
    length, maps = length or int(np.median(lengths)), None
    for setting in todo:
        policy = Policy(setting.heads, local.sinks, local.window)
        if setting.choice == "dense":
            scores = ask(model, questions)
        elif setting.choice == "dynamic":
            if maps is None:  # once for all shares
                options: dict[str, Any] = {"sinks": local.sinks, "window": local.window, "layers": local.layers}
                maps = reach(model, samples, **options)["reach"].values
                singles = quiz(model, samples, 1)
            policies = [chosen(model, scored, setting.n_kv_heads, local.policy) for scored in maps]
            scores = _one_by_one(model, singles, policies)
            policy = policies[0]  # all have the same number of groups
        else:
            with localize(model, policy) as fast:
                scores = ask(fast, questions)
        budget = policy.budgets(model.cfg, length)
        yield _dataset(setting, scores, budget.flops, budget.kv_bytes, questions.examples, length)


def _one_by_one(model: HookedMLLM, questions: Quiz, policies: Sequence[Policy]) -> dict[str, np.ndarray]:
    """Every sample under its own policy."""
    found = []
    for i, policy in enumerate(policies):
        with localize(model, policy) as fast:
            found.append(ask(fast, questions.batch(i)))
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def _dataset(
    setting: Setting, scores: dict[str, np.ndarray], flops: float, kv_bytes: float, ids: Sequence[str], length: int
) -> xr.Dataset:
    coords: dict[str, Any] = {EXAMPLE: (EXAMPLE, np.asarray(ids, dtype=str))}
    facts = {"choice": setting.choice, "share": setting.share, "n_kv_heads": setting.n_kv_heads, "draw": setting.draw,
             "flops": flops, "kv_bytes": kv_bytes, "heads": heads_text(setting.heads)}  # fmt: skip
    coords |= {name: (CONDITION, np.array([value])) for name, value in facts.items()}
    data = xr.Dataset({name: ((CONDITION, EXAMPLE), values[None]) for name, values in scores.items()}, coords)
    data["accuracy"].attrs.update(unit="share of answers, 0 or 1 per example", sign="more: better")
    data["logit_diff"].attrs.update(unit="logits, right minus wrong answer", sign="more: better")
    data["flops"].attrs.update(unit="share of the dense model's attention FLOPs of prefill", sign="less: cheaper")
    data["kv_bytes"].attrs.update(unit="share of the dense model's KV bytes", sign="less: smaller")
    return data.assign_attrs(kind="acceleration", length=length)


def about(model: HookedMLLM, samples: Samples, find: Samples, local: Local, seed: int) -> dict[str, Any]:
    """The attributes of a whole result."""
    cfg = model.cfg
    return {
        "kind": "acceleration", "model": model.name, "domain": ", ".join(samples.domains), "sinks": local.sinks,
        "window": local.window, "n_find": len(find), "n_heads": len(cfg.attention_layers) * cfg.n_heads,
        "n_kv_heads": len(cfg.attention_layers) * cfg.n_kv_heads,
        "provenance": provenance(model, {"find": find, "test": samples}, seed=seed, local=local),
    }  # fmt: skip
