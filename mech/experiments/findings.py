"""What a study found, in sentences. Every sentence is computed from the summary, whichever way the numbers fall.

Each rule below reads the numbers of one model on one domain (or of one model, or of all) and says what they show,
with the interval; where that contradicts arXiv 2606.05843 the finding is flagged. A rule that has nothing to say
says nothing. No rule knows which model it reads.
"""

from collections.abc import Iterator, Mapping
from typing import Any

ALPHA = 0.05
MATTERS = 0.05  # a drop in accuracy that is worth a sentence
TOP = 0.05

Finding = dict[str, Any]


def findings(summary: Mapping[str, Any]) -> list[Finding]:
    """All sentences, models in their order, what holds across domains and models last."""
    said = []
    for model, facts in summary["models"].items():
        for domain, numbers in facts["domains"].items():
            n_heads = facts["n_layers"] * facts["n_heads"]
            for rule in (_concentration, _necessity, _redundancy, _halving, _low_ranked, _methods):
                said += [_finding(text, model, domain, against) for text, against in rule(numbers, n_heads)]
        said += [_finding(text, model, None, against) for text, against in _domains(facts)]
    said += [_finding(text, None, None, against) for text, against in _scales(summary)]
    return said


def _finding(text: str, model: str | None, domain: str | None, against: bool) -> Finding:
    return {"text": text, "model": model, "domain": domain, "against_papers": against}


Said = Iterator[tuple[str, bool]]


def _concentration(numbers: Mapping[str, Any], n_heads: int) -> Said:
    layer, head, best = numbers["ranking"][0]
    share, null = numbers["half_mass_share"], numbers["size_null"]
    text = (
        f"{round(share * n_heads)} of {n_heads} heads ({share:.0%}) hold half of all retrieval attention mass; the "
        f"first is L{layer}H{head} with RAM {best:.2f}, where a head that looks everywhere alike would have {null:.2f}."
    )
    # The papers find 4-10% of the heads with half of the mass.
    yield text, share > 0.25


def _necessity(numbers: Mapping[str, Any], n_heads: int) -> Said:
    top, random = _at(numbers, "mean", "top", TOP), _at(numbers, "mean", "random", TOP)
    if top is None or random is None:
        return
    test = next(t for t in numbers["tests"] if t["method"] == "mean" and t["n_heads"] == top["n_heads"])
    needed = test["p_adjusted"] < ALPHA and test["p_sets"] <= max(ALPHA, test["smallest_p_sets"])
    which = f"the {top['n_heads']} heads with the highest RAM ({top['fraction']:.0%})"
    text = (
        f"Mean-ablating {which} costs {_points(top['accuracy_drop'])} of accuracy, as many random heads cost "
        f"{_points(random['accuracy_drop'])}: they are {'' if needed else 'not shown to be '}needed beyond chance "
        f"(permutation test over samples: p {_p(test['p_adjusted'])} after Holm; rank among the random sets: p "
        f"{_p(test['p_sets'])})."
    )
    yield text, not needed
    matched = _at(numbers, "mean", "layer_matched", TOP)
    if needed and matched and matched["accuracy_drop"]["mean"] >= 0.5 * top["accuracy_drop"]["mean"]:
        yield (
            f"Random heads of the same layers cost {_points(matched['accuracy_drop'])}, at least half as much as the "
            "top heads: much of the effect belongs to the layers, not to these heads.",
            True,
        )


def _redundancy(numbers: Mapping[str, Any], n_heads: int) -> Said:
    single = _at(numbers, "mean", "top", 1 / n_heads)
    several = [e for e in numbers["ablation"] if e["method"] == "mean" and e["band"] == "top" and e["n_heads"] > 1]
    if single is None or not several:
        return
    first = next((e for e in several if e["accuracy_drop"]["low"] > MATTERS), None)
    if first and single["accuracy_drop"]["mean"] < 0.25 * first["accuracy_drop"]["mean"]:
        yield (
            f"Heads stand in for one another: without the highest-ranked head alone accuracy falls by "
            f"{_points(single['accuracy_drop'])}, without the first {first['n_heads']} by "
            f"{_points(first['accuracy_drop'])}. Effects of single heads are lower bounds.",
            False,
        )


def _halving(numbers: Mapping[str, Any], n_heads: int) -> Said:
    base = numbers["baseline"]["accuracy"]["mean"]
    ordered = sorted(
        (e for e in numbers["ablation"] if e["method"] == "mean" and e["band"] == "top"), key=lambda e: e["n_heads"]
    )
    enough = next((e for e in ordered if e["accuracy"]["mean"] <= base / 2), None)
    if enough:
        size = f"{enough['n_heads']} of {n_heads} heads"
        yield f"The smallest top set tried that halves accuracy ({base:.0%}) holds {size}.", False
    elif ordered:
        least = ordered[-1]
        text = (
            f"Even without the top {least['fraction']:.0%} of the heads accuracy stays above half of its {base:.0%} "
            f"(at {least['accuracy']['mean']:.0%})."
        )
        yield text, True


def _low_ranked(numbers: Mapping[str, Any], n_heads: int) -> Said:
    costly = [
        e
        for e in numbers["ablation"]
        if e["method"] == "mean" and e["band"] == "bottom" and e["accuracy_drop"]["low"] > 0
        and e["accuracy_drop"]["mean"] >= MATTERS
    ]  # fmt: skip
    if costly:
        first = min(costly, key=lambda e: e["n_heads"])
        yield (
            f"Low-ranked heads matter too: mean-ablating the {first['n_heads']} with the lowest RAM costs "
            f"{_points(first['accuracy_drop'])} of accuracy. RAM does not see what they do; patching can.",
            True,
        )
    worst = _at(numbers, "mean", "random", 0.2)
    if worst and worst["accuracy_drop"]["low"] > MATTERS:
        yield (
            "Random heads are no harmless control: a random fifth of the heads costs "
            f"{_points(worst['accuracy_drop'])}.",
            False,
        )


def _methods(numbers: Mapping[str, Any], n_heads: int) -> Said:
    by_method = {
        e["method"]: e["accuracy_drop"]
        for e in numbers["ablation"]
        if e["band"] == "top" and e is _at(numbers, e["method"], "top", TOP)
    }
    if len(by_method) < 2:
        return
    least = min(by_method, key=lambda method: by_method[method]["mean"])
    most = max(by_method, key=lambda method: by_method[method]["mean"])
    if by_method[least]["high"] < by_method[most]["low"]:
        yield (
            f"The method decides how much the same top heads matter: {most} ablation costs {_points(by_method[most])}, "
            f"{least} ablation {_points(by_method[least])}.",
            True,
        )


def _domains(facts: Mapping[str, Any]) -> Said:
    found = facts.get("agreement")
    if not found or len(found["domains"]) < 2:
        return
    pairs = [(i, j) for i in range(len(found["domains"])) for j in range(i)]
    rank = [found["spearman"][i][j] for i, j in pairs]
    shared = [found["jaccard"][i][j] for i, j in pairs]
    null = sum(found["jaccard_null"][i][j] for i, j in pairs) / len(pairs)
    text = (
        f"Across {len(found['domains'])} domains the whole rankings correlate with Spearman {min(rank):.2f} to "
        f"{max(rank):.2f}, and the top {found['n_top']} heads overlap by Jaccard {min(shared):.2f} to "
        f"{max(shared):.2f} (chance: {null:.2f})."
    )
    # The paper reports 0.79 to 0.92.
    yield text, min(rank) < 0.79


def _scales(summary: Mapping[str, Any]) -> Said:
    by_models: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for pair in summary["scales"]["pairs"]:
        by_models.setdefault((pair["a"], pair["b"]), []).append(pair)
    for (a, b), pairs in by_models.items():
        n = len(pairs)
        centre_a, centre_b = sum(p["centre_a"] for p in pairs) / n, sum(p["centre_b"] for p in pairs) / n
        yield (
            f"Retrieval sits at {centre_a:.0%} of the depth of {a} and at {centre_b:.0%} of that of {b} (mean over {n} "
            f"domain{'s' * (n != 1)}); their depth profiles overlap by {sum(p['overlap'] for p in pairs) / n:.0%}.",
            False,
        )


def _at(numbers: Mapping[str, Any], method: str, band: str, fraction: float) -> Mapping[str, Any] | None:
    """The entry of a band whose size is nearest to ``fraction``, if one is near."""
    entries = [e for e in numbers["ablation"] if e["method"] == method and e["band"] == band]
    nearest = min(entries, key=lambda e: abs(e["fraction"] - fraction), default=None)
    return nearest if nearest and abs(nearest["fraction"] - fraction) <= 0.5 * fraction else None


def _points(drop: Mapping[str, float]) -> str:
    """A drop in accuracy in percentage points: ``62 points [55, 70]``."""
    low, high = sorted((100 * drop["low"], 100 * drop["high"]))
    return f"{100 * drop['mean'] + 0.0:.0f} points [{low + 0.0:.0f}, {high + 0.0:.0f}]"


def _p(value: float) -> str:
    return f"= {value:.3f}" if value >= 0.001 else "< 0.001"
