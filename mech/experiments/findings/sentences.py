"""What a study found, in sentences. Every sentence is computed from the summary, whichever way the numbers fall.

Each rule below reads the numbers of one model on one domain (a *setting*), of one model, or of all models, and says
what they show, with the interval. If that differs from what arXiv 2606.05843 reports, the finding is flagged. A small
model cannot contradict an 8B one: a flag means that a claim is not universal, within the ``scope`` of the study. A rule
may yield nothing. No rule knows which model it reads. What limits the findings (``cautions``) comes first.
``headlines`` counts the settings in which each kind of finding was made.
"""

from collections.abc import Mapping
from typing import Any

from mech.experiments.effects import both_units
from mech.experiments.effects import points as _points
from mech.experiments.findings import acceleration, causal, forms
from mech.experiments.findings.cautions import ALPHA, cautions
from mech.experiments.findings.cautions import KINDS as CAUTIONS
from mech.experiments.findings.words import MATTERS, TOP, Said, are, too_weak

CONTROLS = ("vision_mass", "localization")  # scores that need no evidence
SIGNS = ("facilitating", "interfering")  # from causal head gating: scores of effect, not of attention

Finding = dict[str, Any]


def findings(summary: Mapping[str, Any]) -> list[Finding]:
    """All sentences, model by model; those across domains come after each model's, those across models last."""
    said = []
    for model, facts in summary["models"].items():
        for domain, numbers in facts["domains"].items():
            n_heads = facts["n_layers"] * facts["n_heads"]
            said += [_finding(model, domain, *one, False) for one in cautions(numbers)]
            for rule in (
                _concentration,
                _weak,
                _necessity,
                _vision,
                _redundancy,
                _halving,
                _low_ranked,
                _methods,
                _scores,
                *causal.CAUSAL,
            ):
                said += [_finding(model, domain, *one) for one in rule(numbers, n_heads)]
        said += [_finding(model, None, *one) for one in _domains(facts)]
        said += [_finding(model, None, *one) for one in forms.sentences(facts["forms"])] if "forms" in facts else []
    for model, facts in summary.get("acceleration", {}).items():
        said += [_finding(model, facts["domain"], *one) for one in acceleration.sentences(facts)]
    said += [_finding(None, None, *one) for one in _scales(summary)]
    return said


def headlines(found: list[Finding]) -> list[Finding]:
    """One sentence per kind of finding, saying in how many settings (a model on a domain) it was made, and where.

    What limits the findings comes first. Findings about a whole model or all models are kept unchanged.
    """
    said = []
    for kind, phrase in KINDS.items():
        made = [f for f in found if f["kind"] == kind]
        # Sparse inference and patching are tried in a few settings only.
        tried = [f for f in found if all((f["kind"] in some) == (kind in some) for some in FEW)]
        settings = list(dict.fromkeys((f["model"], f["domain"]) for f in tried if f["domain"]))
        if made and made[0]["domain"]:
            here = list(dict.fromkeys((f["model"], f["domain"]) for f in made))
            of = f"{len(settings)} setting{'s' * (len(settings) != 1)}"
            text = f"{phrase}: in {len(here)} of {of} ({_listed(here, settings)})."
            said.append(_finding(None, None, kind, text, any(f["against_papers"] for f in made)))
        else:
            said += made
    return said


def scope(models: Mapping[str, Mapping[str, Any]]) -> str:
    """The basis of the findings in words: how many models, of which sizes, and the domains."""
    heads = sorted({facts["n_layers"] * facts["n_heads"] for facts in models.values()})
    sizes = f"{heads[0]} to {heads[-1]}" if len(heads) > 1 else str(heads[0])
    domains = dict.fromkeys(domain for facts in models.values() for domain in facts["domains"])
    return f"{len(models)} model{'s' * (len(models) != 1)} of {sizes} heads; {', '.join(domains)}"


def _listed(here: list[tuple[str, str]], settings: list[tuple[str, str]]) -> str:
    """``llava-s on all domains; llava-m on grounding, documents``."""
    words = []
    for model in dict.fromkeys(model for model, _ in here):
        domains = [domain for name, domain in here if name == model]
        everywhere = len(domains) == sum(name == model for name, _ in settings) > 1
        words.append(f"{model} on {'all domains' if everywhere else ', '.join(domains)}")
    return "; ".join(words)


def _finding(model: str | None, domain: str | None, kind: str, text: str, against: bool) -> Finding:
    return {"kind": kind, "text": text, "model": model, "domain": domain, "against_papers": against}


# What each kind of finding says, without numbers, in the order of the headlines.
KINDS = {
    **CAUTIONS,
    "needed": "The heads with the highest RAM are needed more than random other heads (over samples and over sets)",
    "not needed": "The heads with the highest RAM are not shown to be needed more than random other heads",
    "layers": "Random heads of the same layers cost at least half as much as the heads with the highest RAM",
    "vision": "Heads that attend to visual tokens of any kind cost at least half as much as those with the highest RAM",
    "redundant": "Heads are redundant: a set costs more than its size times the cost of its first head",
    "halving": "One of the top sets tried halves accuracy",
    "not halving": "Accuracy stays above half without the largest top set",
    "low": "Low-ranked heads matter too",
    "random": "Random heads are not a harmless control, even if none has the highest RAM",
    "methods": "The method of ablation decides how much the same heads matter",
    "scores": "Other published scores select different heads than RAM",
    **causal.KINDS,
    "concentrated": "A quarter of the heads or less holds half of all retrieval attention mass",
    "spread": "Half of all retrieval attention mass is spread over more than a quarter of the heads",
    "weak": "The model is too weak for ablation to show anything",
    **acceleration.KINDS,
    **forms.KINDS,
    "domains": "",
    "scales": "",
}
FEW = (acceleration.KINDS, causal.KINDS)  # kinds that are not tested in every setting


def _concentration(numbers: Mapping[str, Any], n_heads: int) -> Said:
    layer, head, best = numbers["ranking"][0]
    share, null = numbers["half_mass_share"], numbers["size_null"]
    if not 0 < share <= 1:  # no head has any mass
        return
    half = round(share * n_heads)
    text = (
        f"{half} of {n_heads} heads ({share:.0%}) hold half of all retrieval attention mass; the first is "
        f"L{layer}H{head} with RAM {best:.2g}; a head that attends evenly would have {null:.2g}."
    )
    # The papers find half of the mass in 4-10% of the heads.
    spread = share > 0.25
    yield "spread" if spread else "concentrated", text, spread


def _weak(numbers: Mapping[str, Any], n_heads: int) -> Said:
    right = numbers["baseline"]["accuracy"]
    if too_weak(numbers):
        yield (
            "weak",
            f"The model gets only {right['mean']:.0%} right here: ablation cannot show what its heads are needed for.",
            False,
        )


def _necessity(numbers: Mapping[str, Any], n_heads: int) -> Said:
    top, random = _at(numbers, "mean", "top", TOP), _at(numbers, "mean", "random", TOP)
    if top is None or random is None or too_weak(numbers):
        return
    test = next((t for t in numbers["tests"] if t["method"] == "mean" and t["n_heads"] == top["n_heads"]), None)
    if test is None:
        return
    needed, cost = test["p_adjusted"] < ALPHA, top["accuracy_drop"]
    text = (
        f"Mean-ablating {_heads(top, 'highest')} costs {_points(cost)} of accuracy, the same number of random other "
        f"heads {_points(random['accuracy_drop'])} ({random['draws']} sets)"
    )
    spared = _at(numbers, "mean", "unneeded", TOP)
    if spared is not None and spared["n_heads"] == top["n_heads"]:
        text += f", random heads not known to be necessary {_points(spared['accuracy_drop'])}"
    if cost["mean"] <= 0:
        text += ". No loss is shown, so there is nothing to compare."
    else:
        verdict = "they are needed more than random heads" if needed else "they are not shown to be needed more"
        text += f": {verdict} ({both_units(test)}; a claim needs both below {ALPHA:g})."
    yield "needed" if needed else "not needed", text, cost["high"] < MATTERS
    matched = _at(numbers, "mean", "layer_matched", TOP)
    if needed and matched and matched["accuracy_drop"]["mean"] >= 0.5 * top["accuracy_drop"]["mean"]:
        yield (
            "layers",
            f"Random heads of the same layers cost {_points(matched['accuracy_drop'])}, at least half as much as the "
            "top heads: much of the effect belongs to the layers, not to these heads.",
            True,
        )


def _vision(numbers: Mapping[str, Any], n_heads: int) -> Said:
    """Is it the evidence, or do heads that attend to anything visual matter as much?"""
    top = _at(numbers, "mean", "top", TOP)
    vision = _at(numbers, "mean", "by vision_mass", TOP)
    if top is None or vision is None or vision["n_heads"] != top["n_heads"] or too_weak(numbers):
        return
    cost, theirs = top["accuracy_drop"], vision["accuracy_drop"]
    if cost["low"] > 0 and cost["mean"] >= MATTERS and theirs["mean"] >= 0.5 * cost["mean"]:
        shared = _shared(numbers, "ram", "vision_mass")
        same = "" if shared is None else f"; the two sets share {shared} of {top['n_heads']}"
        yield (
            "vision",
            f"Mean-ablating the {are(vision['n_heads'], 'head', 'that attends', 'that attend')} most to visual tokens "
            f"of any kind costs {_points(theirs)}, at least half as much as those with the highest RAM "
            f"({_points(cost)}){same}.",
            False,
        )


def _shared(numbers: Mapping[str, Any], one: str, other: str) -> int | None:
    """How many heads the tops by two scores share, from their Jaccard index ``s / (2 n - s)``."""
    found = numbers.get("scores")
    if not found or not {one, other} <= set(found["names"]):
        return None
    jaccard = found["jaccard"][found["names"].index(one)][found["names"].index(other)]
    return round(2 * found["n_top"] * jaccard / (1 + jaccard))


def _redundancy(numbers: Mapping[str, Any], n_heads: int) -> Said:
    """The set costs more than k times its first head: single effects do not add up to the effect of the set."""
    tops = _sizes(numbers, "mean", "top")
    if not tops or tops[0]["n_heads"] != 1 or too_weak(numbers):
        return
    single = tops[0]
    for several in tops[1:]:
        if several["n_heads"] * max(0.0, single["accuracy_drop"]["high"]) < several["accuracy_drop"]["low"]:
            yield (
                "redundant",
                f"Heads are redundant: without the highest-ranked head alone accuracy falls by "
                f"{_points(single['accuracy_drop'])}, without the first {several['n_heads']} by "
                f"{_points(several['accuracy_drop'])}, more than {several['n_heads']} times as much. The effect of a "
                "single head says little about its role.",
                False,
            )
            return


def _halving(numbers: Mapping[str, Any], n_heads: int) -> Said:
    base, tops = numbers["baseline"]["accuracy"]["mean"], _sizes(numbers, "mean", "top")
    if not tops or too_weak(numbers):
        return
    enough = next((e for e in tops if e["accuracy"]["mean"] <= base / 2), None)
    if enough:
        size = f"{enough['n_heads']} of {n_heads} heads"
        yield "halving", f"The smallest top set tried that halves accuracy ({base:.0%}) holds {size}.", False
    else:
        most = tops[-1]
        text = (
            f"Even without the top {most['fraction']:.0%} of the heads accuracy stays above half of its {base:.0%} "
            f"(at {most['accuracy']['mean']:.0%})."
        )
        yield "not halving", text, True


def _low_ranked(numbers: Mapping[str, Any], n_heads: int) -> Said:
    if too_weak(numbers):
        return
    for entry in _sizes(numbers, "mean", "bottom"):
        drop = entry["accuracy_drop"]
        if drop["low"] > 0 and drop["mean"] >= MATTERS:
            yield (
                "low",
                f"Low-ranked heads matter too: mean-ablating {_heads(entry, 'lowest')} costs {_points(drop)} of "
                "accuracy. RAM misses what they do; patching can find it.",
                True,
            )
            break
    random = _sizes(numbers, "mean", "random")
    if random and random[-1]["accuracy_drop"]["low"] > MATTERS:
        worst = random[-1]
        yield (
            "random",
            f"Random heads are not a harmless control: {worst['n_heads']} of them ({worst['fraction']:.0%}) cost "
            f"{_points(worst['accuracy_drop'])} on average.",
            False,
        )


def _methods(numbers: Mapping[str, Any], n_heads: int) -> Said:
    methods = dict.fromkeys(e["method"] for e in numbers["ablation"])
    found = {method: _at(numbers, method, "top", TOP) for method in methods}
    drops = {method: entry["accuracy_drop"] for method, entry in found.items() if entry}
    if len(drops) < 2 or too_weak(numbers):
        return
    least = min(drops, key=lambda method: drops[method]["mean"])
    most = max(drops, key=lambda method: drops[method]["mean"])
    if drops[least]["high"] < drops[most]["low"]:
        text = (
            f"The method decides how much the same top heads matter: {most} ablation costs {_points(drops[most])}, "
            f"{least} ablation {_points(drops[least])}."
        )
        yield "methods", text, False


def _scores(numbers: Mapping[str, Any], n_heads: int) -> Said:
    """Published scores whose top set surely overlaps with RAM's by less than half; controls are left out."""
    found = numbers.get("scores")
    if not found or "ram" not in found["names"]:
        return
    at, others = found["names"].index("ram"), [n for n in found["names"] if n not in ("ram", *CONTROLS, *SIGNS)]
    shared = {name: found["jaccard"][at][found["names"].index(name)] for name in others}
    apart = [name for name in others if found["jaccard_high"][at][found["names"].index(name)] < 0.5]
    if apart:
        listed = ", ".join(f"{name} {shared[name]:.2f}" for name in apart)
        yield (
            "scores",
            f"{len(apart)} of {len(others)} other published scores select different heads: their top "
            f"{found['n_top']} overlap with those of RAM by less than half (Jaccard; {listed}; chance "
            f"{found['jaccard_null'][0][0]:.2f}; n = {numbers['n_find']}).",
            False,
        )


def _domains(facts: Mapping[str, Any]) -> Said:
    found = facts.get("agreement")
    if not found or len(found["domains"]) < 2:
        return
    pairs = [(i, j) for i in range(len(found["domains"])) for j in range(i)]
    rank = [found["spearman"][i][j] for i, j in pairs]
    if any(value is None or value != value for value in rank):  # a ranking with no order
        return
    shared = [found["jaccard"][i][j] for i, j in pairs]
    null = sum(found["jaccard_null"][i][j] for i, j in pairs) / len(pairs)
    text = (
        f"Across {len(found['domains'])} domains the whole rankings correlate with Spearman {_range(rank)}, and the "
        f"top {found['n_top']} heads overlap by Jaccard {_range(shared)} (chance: {null:.2f})."
    )
    # The paper reports 0.79 to 0.92.
    yield "domains", text, min(rank) < 0.79


def _range(values: list[float]) -> str:
    """``0.33`` for one value, ``0.33 to 0.52`` for several."""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _scales(summary: Mapping[str, Any]) -> Said:
    by_models: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for pair in summary["scales"]["pairs"]:
        by_models.setdefault((pair["a"], pair["b"]), []).append(pair)
    for (a, b), pairs in by_models.items():
        n = len(pairs)
        centre_a, centre_b = sum(p["centre_a"] for p in pairs) / n, sum(p["centre_b"] for p in pairs) / n
        yield (
            "scales",
            f"Retrieval (RAM beyond what even attention gives) sits at {centre_a:.0%} of the depth of {a} and at "
            f"{centre_b:.0%} of that of {b} (mean over {n} domain{'s' * (n != 1)}); their depth profiles overlap by "
            f"{sum(p['overlap'] for p in pairs) / n:.0%} (heads permuted across layers: "
            f"{sum(p['overlap_null'] for p in pairs) / n:.0%}).",
            False,
        )


def _sizes(numbers: Mapping[str, Any], method: str, band: str) -> list[Mapping[str, Any]]:
    """The entries of a band, smallest set first."""
    entries = [e for e in numbers["ablation"] if e["method"] == method and e["band"] == band]
    return sorted(entries, key=lambda e: e["n_heads"])


def _at(numbers: Mapping[str, Any], method: str, band: str, fraction: float) -> Mapping[str, Any] | None:
    """The entry of a band whose size is nearest to ``fraction``; sentences state the actual size."""
    return min(_sizes(numbers, method, band), key=lambda e: abs(e["fraction"] - fraction), default=None)


def _heads(entry: Mapping[str, Any], which: str) -> str:
    n = entry["n_heads"]
    return f"the {f'{n} heads' if n > 1 else 'head'} with the {which} RAM ({entry['fraction']:.0%})"
