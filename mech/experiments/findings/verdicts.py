"""The claims of the literature compared with a study's numbers: a verdict on each claim in each setting.

    for claim in verdicts(summary): print(claim["claim"], claim["cells"])

A setting is a model on a domain. A cell says ``agrees`` or ``differs`` if the numbers settle it (the rule of the
finding fired), ``cannot tell`` if the claim was tested and the numbers allow both, and is missing if nothing was
tested. "Not shown to be needed" is therefore not a disagreement; only an interval that excludes the claim is. Each
claim names its paper and the models it was made on. The overall verdict is limited to the models of the study.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mech.experiments.effects import points
from mech.experiments.findings.cautions import ALPHA
from mech.experiments.findings.literature import ABLATED, FASTER, in_all, published
from mech.experiments.findings.words import FLOOR, MATTERS

AGREES, DIFFERS, CANNOT_TELL = "agrees", "differs", "cannot tell"
Numbers = Mapping[str, Any]
Setting = tuple[str, str]
Verdict = tuple[str, str]  # one of the three, and its numbers in words


@dataclass(frozen=True)
class Claim:
    """A published statement, the kinds of findings that decide it, and whether it was tested at all.

    Attributes:
        text: the statement, as the literature makes it.
        agrees: kinds of findings that agree with it.
        differs: kinds of findings that disagree with it.
        tested: whether the numbers of a setting bear on it.
        silent: the verdict if no such finding was made.
        whole_model: whether it is about a model rather than one of its domains.
        sparse: whether it is about sparse inference.
        paper: arXiv number of the paper that claims it; "" for a control that no paper made.
        models: the models it was claimed for, if not all models of that paper.
    """

    text: str
    agrees: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()
    tested: Callable[[Numbers], bool] = lambda numbers: True
    silent: Callable[[Numbers], Verdict] = lambda numbers: (CANNOT_TELL, "The intervals allow both.")
    whole_model: bool = False
    sparse: bool = False
    paper: str = "2606.05843"
    models: str = ""


def verdicts(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every claim that was tested somewhere, with its verdicts.

    Args:
        summary: the summary of a study, with its ``findings``.

    Returns:
        ``{"claim", "published": paper and models, "cells": [{"model", "domain", "verdict", "text"}, ...], "in_all"}``
        for each; ``domain`` is None if the verdict is about a whole model.
    """
    rows = []
    for claim in CLAIMS:
        cells = [
            {"model": model, "domain": domain, "verdict": verdict, "text": text}
            for (model, domain), (verdict, text) in _cells(claim, summary)
        ]
        if cells:
            said = [cell["verdict"] for cell in cells]
            unit = "model" if claim.whole_model or claim.sparse else "setting"
            rows.append(
                {
                    "claim": claim.text,
                    "published": published(claim.paper, claim.models),
                    "cells": cells,
                    "in_all": in_all(said, AGREES, DIFFERS, unit),
                }
            )
    return rows


def _cells(claim: Claim, summary: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str | None], Verdict]]:
    if claim.sparse:
        for model, facts in summary.get("acceleration", {}).items():
            if claim.tested(facts):
                yield (model, facts["domain"]), _verdict(claim, summary, model, facts["domain"], facts)
        return
    for model, facts in summary["models"].items():
        if claim.whole_model:
            if claim.tested(facts):
                yield (model, None), _verdict(claim, summary, model, None, facts)
            continue
        for domain, numbers in facts["domains"].items():
            right = numbers["baseline"]["accuracy"]
            if claim.tested(numbers):
                weak = right["low"] is None or right["low"] < FLOOR
                told = f"The model gets only {right['mean']:.0%} of the questions right: there is nothing to lose."
                verdict = _verdict(claim, summary, model, domain, numbers)
                spoke = verdict[0] != CANNOT_TELL
                yield (model, domain), verdict if spoke or not weak else (CANNOT_TELL, told)


def _verdict(claim: Claim, summary: Mapping[str, Any], model: str, domain: str | None, numbers: Numbers) -> Verdict:
    made = [
        found
        for found in summary.get("findings", [])
        if (found["model"], found["domain"]) == (model, domain) and "kind" in found
    ]
    unsure = None
    for found in made:
        if found["kind"] in claim.differs and found["kind"] in claim.agrees:
            return (DIFFERS if found["against_papers"] else AGREES), found["text"]
        if found["kind"] in claim.differs:
            return DIFFERS, found["text"]
        if found["kind"] in claim.agrees:
            unsure = unsure or (AGREES, found["text"])
        if found["kind"] in UNSURE and UNSURE[found["kind"]] == claim.text:
            unsure = (DIFFERS if found["against_papers"] and _excludes(numbers) else CANNOT_TELL), found["text"]
    return unsure or claim.silent(numbers)


def _excludes(numbers: Numbers) -> bool:
    """Whether the interval of the top twentieth excludes any cost that matters."""
    top = _near(numbers, "top", 0.05) if "ablation" in numbers else None
    return top is not None and top["accuracy_drop"]["high"] < MATTERS


def _bands(*bands: str) -> Callable[[Numbers], bool]:
    return lambda numbers: set(bands) <= {e["band"] for e in numbers.get("ablation", ()) if e["method"] == "mean"}


def _causal(numbers: Numbers) -> bool:
    return "quadrants" in (numbers.get("causal") or {})


def _near(numbers: Numbers, band: str, fraction: float) -> Mapping[str, Any] | None:
    entries = [e for e in numbers["ablation"] if e["method"] == "mean" and e["band"] == band]
    return min(entries, key=lambda e: abs(e["fraction"] - fraction), default=None)


def _control(band: str, name: str) -> Callable[[Numbers], Verdict]:
    """A control agrees with "these heads, not just such heads" if it surely costs less than half of the top's mean."""

    def silent(numbers: Numbers) -> Verdict:
        top, control = _near(numbers, "top", 0.05), _near(numbers, band, 0.05)
        if not top or not control or not top["accuracy_drop"] or not control["accuracy_drop"]:
            return CANNOT_TELL, "No such set could be drawn."
        cost, theirs = top["accuracy_drop"], control["accuracy_drop"]
        text = f"Accuracy falls by {points(cost)} without the top heads, by {points(theirs)} without {name}."
        sure = cost["low"] > 0 and theirs["high"] < 0.5 * cost["mean"]
        return (AGREES if sure else CANNOT_TELL), text

    return silent


def _low_ranked(numbers: Numbers) -> Verdict:
    entries = [e for e in numbers["ablation"] if e["method"] == "mean" and e["band"] == "bottom"]
    most = max(entries, key=lambda entry: entry["n_heads"])
    text = f"Accuracy falls by {points(most['accuracy_drop'])} without the {most['n_heads']} heads with the lowest RAM."
    return (AGREES if most["accuracy_drop"]["high"] < MATTERS else CANNOT_TELL), text


def _attending(numbers: Numbers) -> Verdict:
    found = numbers["causal"]["quadrants"]
    both, idle = len(found["attending and causal"]), len(found["attending, not causal"])
    text = f"Of {both + idle} heads that attend to the evidence, {both} change the answer when patched."
    return (AGREES if both >= idle and both else CANNOT_TELL), text


def _no_blind(numbers: Numbers) -> Verdict:
    """Finding none says something only if the tests could have found one."""
    found = numbers["causal"]
    n, heads = found["n_test"], sum(map(len, found["quadrants"].values()))
    text = f"On {n} samples no head that does not attend to the evidence is necessary."
    return (AGREES if n >= math.log2(4 * heads / ALPHA) else CANNOT_TELL), text


def _dense(facts: Numbers) -> Verdict:
    """The largest share of dense heads tried: does it surely lose too much, or just not surely keep enough?"""
    tried = [entry for entry in facts["curve"] if entry["choice"] == "ram"]
    if not tried:
        return CANNOT_TELL, "No set of dense heads was chosen by RAM."
    most = max(tried, key=lambda entry: entry["share"])
    text = (
        f"With {most['n_kv_heads']} of {facts['n_kv_heads']} KV heads dense, chosen by RAM, "
        f"accuracy falls by {points(most['loss'])}."
    )
    return (DIFFERS if most["loss"]["low"] > facts["margin"] else CANNOT_TELL), text


NEEDED = "Ablating the heads with the highest RAM costs more than ablating random heads"
RANKED = "RAM chooses dense heads better than chance"
UNSURE = {"not needed": NEEDED, "dense draws": RANKED}  # not shown does not mean refuted
CLAIMS = (
    Claim("A few heads hold half of the retrieval attention", ("concentrated",), ("spread",)),
    Claim(NEEDED, ("needed",), tested=_bands("top", "random"), models=ABLATED),
    Claim(
        "It is these heads, not the layers they are in", differs=("layers",), tested=_bands("top", "layer_matched"),
        silent=_control("layer_matched", "random heads of the same layers"), paper="",
    ),
    Claim(
        "It is the evidence they attend to, not just any visual token", differs=("vision",),
        tested=_bands("top", "by vision_mass"), silent=_control("by vision_mass", "vision heads"), paper="",
    ),
    Claim("A small top set halves accuracy", ("halving",), ("not halving",), tested=_bands("top"), models=ABLATED),
    Claim(
        "Low-ranked heads hardly matter", differs=("low",), tested=_bands("bottom"), silent=_low_ranked, models=ABLATED
    ),
    Claim("Heads that attend to the evidence change the answer", differs=("idle",), tested=_causal, silent=_attending),
    Claim("Heads that do not attend to it are not necessary", differs=("blind",), tested=_causal, silent=_no_blind),
    Claim("RAM orders heads by their causal effect", ("ordered",), ("order",), tested=_causal),
    Claim(
        "Published scores select the same heads as RAM", differs=("scores",), paper="",
        tested=lambda numbers: "ram" in numbers.get("scores", {}).get("names", ()),
    ),
    Claim(
        "The ranking is the same in every domain", ("domains",), ("domains",), whole_model=True,
        tested=lambda facts: len(facts.get("agreement", {}).get("domains", ())) > 1,
    ),
    Claim(
        "Heads that retrieve from pictures are those that retrieved from text", ("shared heads",), ("other heads",),
        tested=lambda facts: "forms" in facts, whole_model=True, paper="2411.10950",
    ),
    Claim(
        "Heads found on text are as necessary for pictures", ("one for both",), ("one for each",),
        tested=lambda facts: "forms" in facts, whole_model=True, paper="2411.10950",
    ),
    Claim("A few dense heads keep the answers", ("sparse",), ("window",), sparse=True, silent=_dense, models=FASTER),
    Claim(RANKED, ("dense wins",), sparse=True, tested=lambda facts: bool(facts["against_random"]), paper=""),
    Claim("Sparse inference is faster", ("faster",), ("slower",), sparse=True, models=FASTER,
          tested=lambda facts: bool((facts["recommended"] or {}).get("speed"))),
)  # fmt: skip
