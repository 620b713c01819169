"""What is measured of a model that was trained for sparsity: by the library's own measurements, on held-out scenes.

    facts = measured(model, size, gates)       # plain numbers, with intervals over samples

Efficiency is asked without favour: heads are ranked by RAM, by causal effect and by learned gates, and the ranking that
needs fewest dense key/value heads counts, for the control as for the sparse models.
"""

from typing import Any

import numpy as np
import torch

from mech import (
    CircuitTask,
    HookedMLLM,
    Ranking,
    causal_report,
    circuit_scores,
    haystacks,
    learned_gates,
    localize,
    rank_heads,
    retrieval_attention_mass,
)
from mech.data.samples import Samples
from mech.experiments.causal.report import QUADRANTS
from mech.experiments.metrics import Quiz, ask, quiz
from mech.experiments.statistics import accuracy_interval, bootstrap_means, proportion_interval, spearman
from mech.sparse.groups import expanded, grouped
from mech.sparse.policy import Policy
from mech.sparse.training.mixture import far_mass

N_FIND, N_TEST, N_CAUSAL, N_CIRCUIT = 16, 32, 16, 8
COUNTS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 48)
LENGTHS = (2048, 8192, 16384)
MARGIN = 0.01  # the loss of accuracy that is let pass: one point
FAITHFUL = 0.8


def measured(model: HookedMLLM, size: Any, gates: Ranking | None) -> dict[str, Any]:
    """Everything that is asked of one model.

    Args:
        model: the trained one.
        size: how long its scenes are, and what local heads see.
        gates: what its own training ranked, if it did.
    """
    find, test = samples_of(size)
    facts, rankings = interpretability(model, size, find, test)
    if gates is None:
        gates = learned_gates(model, find[size.main][:16], sinks=size.sinks, window=size.window, steps=24)
    questions = {name: quiz(model, some) for name, some in test.items()}
    dense = {name: ask(model, asked)["accuracy"] for name, asked in questions.items()}
    trained = {domain: questions[domain] for domain in size.domains}
    needed = {
        name: fewest(model, size, ranking, trained, dense) for name, ranking in (*rankings.items(), ("gates", gates))
    }
    return facts | {
        "samples": {"find": N_FIND, "test": N_TEST, "causal": N_CAUSAL, "circuit": N_CIRCUIT},
        "accuracy": {name: interval(values) for name, values in dense.items()},
        "needed": needed,
        "efficiency": efficiency(model, size, smallest(needed), questions, dense),
    }


def smallest(needed: dict[str, Any]) -> list[list[int]]:
    """The fewest dense heads that a model needs, by the ranking that needs fewest."""
    return min((one for one in needed.values() if one["n"] is not None), key=lambda one: one["n"])["heads"]


def samples_of(size: Any) -> tuple[dict[str, Samples], dict[str, Samples]]:
    """Scenes that find heads, by domain, and scenes that test: of the trained domains, a new one, and longer ones."""
    find = {domain: drawn(size, domain, N_FIND, 50) for domain in size.domains}
    test = {domain: drawn(size, domain, N_TEST, 51) for domain in size.domains}
    test["new"] = haystacks(size.new, N_TEST, 51)
    test["longer"] = haystacks("pages", N_TEST // 2, 51, n_pictures=size.longer)
    return find, test


def interpretability(
    model: HookedMLLM, size: Any, find: dict[str, Samples], test: dict[str, Samples]
) -> tuple[dict[str, Any], dict[str, Ranking]]:
    """What is measured of heads, and the rankings by RAM and by causal effect that came of it."""
    main = size.main
    ram = {domain: rank_heads(retrieval_attention_mass(model, some)) for domain, some in find.items()}
    report = causal_report(
        model, test[main][:N_CAUSAL], ram[main], find=find[main][:N_CAUSAL], method=None, n_random=1, n_paths=0
    )
    causal = Ranking(report.heads["lost_find"].values, None, "lost", layers=model.cfg.attention_layers)
    facts = {
        "far_mass": far(model, size, find[main]),
        "ram": {domain: sparseness(ranking) for domain, ranking in ram.items()},
        "stability": stability(*ram.values()) if len(ram) > 1 else None,
        "causal": causal_facts(report),
        "circuit": circuit(model, find[main][:N_CIRCUIT], test[main][:N_CIRCUIT]),
    }
    return facts, {"ram": ram[main], "causal": causal}


def drawn(size: Any, domain: str, n: int, seed: int) -> Samples:
    """Scenes of the length that was trained on."""
    return haystacks(domain, n, seed, n_pictures=size.pictures.get(domain))


def interval(values: np.ndarray) -> dict[str, float]:
    """Mean, low and high of a share of right answers."""
    return {name: round(value, 4) for name, value in proportion_interval(values).as_dict().items()}


def sparseness(ranking: Ranking) -> dict[str, dict[str, float]]:
    """The share of heads that hold half of RAM and the Gini index, with intervals over samples."""
    assert ranking.per_example is not None
    means = bootstrap_means(ranking.per_example, 500, 0).reshape(500, *ranking.mean.shape)
    found = {}
    for name in ("half_mass_share", "gini"):
        draws = [getattr(Ranking(mean), name)() for mean in means]
        low, high = np.quantile(draws, [0.025, 0.975])
        found[name] = {"mean": getattr(ranking, name)(), "low": float(low), "high": float(high)}
    return found


def stability(one: Ranking, other: Ranking) -> dict[str, float]:
    """Spearman correlation of the RAM maps of two domains, with its interval over samples."""
    assert one.per_example is not None and other.per_example is not None
    draws = [
        spearman(a, b)
        for a, b in zip(
            bootstrap_means(one.per_example, 300, 0), bootstrap_means(other.per_example, 300, 1), strict=True
        )
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"mean": spearman(one.mean, other.mean), "low": float(low), "high": float(high)}


def causal_facts(report: Any) -> dict[str, Any]:
    """Quadrants, smallest sets, and whether RAM orders heads as their effects do."""
    heads = report.heads
    return {
        "agreement": report.agreement,
        "quadrants": {name: len(report.quadrant(name)) for name in QUADRANTS},
        "blind": [list(head) for head in report.quadrant(QUADRANTS[2])],
        "smallest": report.smallest,
        "largest": float(heads["lost"].max()),
        "lost": np.round(heads["lost"].values, 4).tolist(),
        "ram": np.round(heads["ram"].values, 4).tolist(),
    }


def circuit(model: HookedMLLM, find: Samples, test: Samples) -> dict[str, Any]:
    """How faithful circuits of few edges are: CMD, and the share of all edges from which on 80% of the gap is kept."""
    found = circuit_scores(CircuitTask("pages", model, find, test), ["eap_ig"]).sel(entry="eap_ig")
    curve = found["faithfulness"].sel(order="size").mean("example")
    enough = curve["share"].values[curve.values >= FAITHFUL]
    return {
        "cmd": {"mean": float(found["cmd"]), "low": float(found["cmd_low"]), "high": float(found["cmd_high"])},
        "edges": int(found.attrs["n_edges"]),
        "share": float(enough[0]) if len(enough) else None,
        "faithfulness": {f"{share:g}": round(float(curve.sel(share=share)), 3) for share in curve["share"].values},
    }


@torch.no_grad()
def far(model: HookedMLLM, size: Any, samples: Samples) -> float:
    """Attention mass outside of sinks and window, averaged over heads and rows."""
    masses = []
    for sample in samples[:8]:
        with far_mass(model, inputs := model.inputs_of(sample), Policy((), size.sinks, size.window)) as found:
            model(inputs, logits_to_keep=1)
        masses.append(float(torch.stack(found).mean()))
    return float(np.mean(masses))


def longest(questions: Quiz) -> int:
    """Tokens of the longest question, answer included."""
    return max(int(batch.tensors["attention_mask"].sum(1).max()) for batch in questions.batches)


def fewest(
    model: HookedMLLM, size: Any, ranking: Ranking, questions: dict[str, Quiz], dense: dict[str, np.ndarray]
) -> dict[str, Any]:
    """The smallest number of dense key/value heads, by a ranking, that loses a point or less over the trained domains.

    None tried holds if ``n`` is None. ``curve``: every number that was tried, with accuracy and the interval of what is
    lost.
    """
    groups, curve = grouped(ranking, model.cfg), []
    whole = np.concatenate([dense[domain] for domain in questions])
    for n in (count for count in COUNTS if count <= len(groups.heads)):
        heads = expanded(groups.heads[:n], model.cfg)
        with localize(model, Policy(heads, size.sinks, size.window)) as fast:
            right = np.concatenate([ask(fast, asked)["accuracy"] for asked in questions.values()])
        lost = accuracy_interval((whole - right)[None])
        curve.append({"n": n, "accuracy": float(right.mean()), "lost": lost.as_dict()})
        if float(lost.mean) <= MARGIN:
            return {"n": n, "heads": [list(head) for head in heads], "curve": curve}
    return {"n": None, "heads": [], "curve": curve}


def efficiency(
    model: HookedMLLM,
    size: Any,
    heads: list[list[int]],
    questions: dict[str, Quiz],
    dense: dict[str, np.ndarray],
) -> dict[str, Any]:
    """What the smallest set costs at several lengths, and how it does on a new domain and on longer scenes.

    Scenes that lie within sinks and window are left out: there the served model is the dense one.
    """
    policy = Policy([tuple(head) for head in heads], size.sinks, size.window)
    costs = {length: policy.budgets(model.cfg, length) for length in LENGTHS}
    with localize(model, policy) as fast:
        served = {
            name: ask(fast, questions[name])["accuracy"]
            for name in ("new", "longer")
            if longest(questions[name]) > size.sinks + size.window
        }
    return {
        "kv_bytes": {str(length): cost.kv_bytes for length, cost in costs.items()},
        "flops": {str(length): cost.flops for length, cost in costs.items()},
        "served": {name: interval(values) for name, values in served.items()},
        "lost": {name: accuracy_interval((dense[name] - values)[None]).as_dict() for name, values in served.items()},
    }
