"""Pictures against text in a study: the heads they share, the heads recruited, and what each is worth for the other.

    facts = summarise(forms_in(results, key, model, base, Scenes(domain, n, ...), say))
    for kind, text, against in sentences(facts): print(text)

The claim tested: visual questions are answered like textual questions about a context (arXiv 2411.10950).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import xarray as xr

from mech.experiments.effects import p_is, points
from mech.experiments.findings.words import MATTERS
from mech.experiments.power import ALPHA
from mech.experiments.scores.modality import KEPT, RECRUITED, modality_table

Facts = dict[str, Any]
PAIRS = (("pictures", "text"), ("pictures", "base text"), ("text", "base text"), ("pictures", "base pictures"))
BASE_TEXT = "text before tuning"
KINDS = {
    "shared heads": "Heads that retrieve from pictures are those that retrieve from text, beyond their layers",
    "other heads": "Heads that retrieve from pictures are not shown to be those that retrieve from text",
    "recruited": "Tuning recruited heads for pictures that did not retrieve from text before",
    "one for both": "Heads found on text before tuning are as necessary for pictures as those found on pictures",
    "one for each": "Heads found on text before tuning are less necessary for pictures than those found on pictures",
}


def summarise(found: Mapping[str, xr.Dataset]) -> Facts:
    """The numbers of ``forms_in``, as plain values.

    {"domain", "n_find", "n_test", "n_top", "n_heads",
     "rows": {"question" | "answer": {"score": what was scored,
        "pairs": [{"reading", "other", "shared", "shared_low", "shared_high", "expected", "p", "within"}, ...],
        "origin": {origin: heads}, "heads": ``modality_table``}},
     "accuracy": {form: share}, "random_lost": {form: I}, "draws",
     "lost": [{"found_on", "tested_on", "lost": I, "p", "p_samples", "p_sets"}, ...]}     I = mean, low, high
    """
    ablated, answer = found["transfer"], found["answer"]
    right = ablated["accuracy"].isel(condition=0)
    return {
        "domain": answer.attrs["domain"],
        "n_find": answer.sizes["example"],
        "n_test": ablated.sizes["example"],
        "n_top": int(answer.attrs["n_top"]),
        "n_heads": answer["origin"].size,
        "rows": {name: _shared(one) for name, one in found.items() if name != "transfer"},
        "accuracy": {str(form): float(right.sel(tested_on=form).mean()) for form in ablated["tested_on"].values},
        "random_lost": {str(form): _bounds(ablated.sel(tested_on=form), "random_lost")
                        for form in ablated["tested_on"].values},
        "draws": int((ablated["band"] == "random").sum()),
        "lost": [
            {"found_on": str(on), "tested_on": str(form), "lost": _bounds(cell, "lost"),
             **{name: float(cell[name]) for name in ("p", "p_samples", "p_sets")}}
            for on in ablated["found_on"].values for form in ablated["tested_on"].values
            for cell in [ablated.sel(found_on=on, tested_on=form)]
        ],
    }  # fmt: skip


def sentences(facts: Facts) -> Iterator[tuple[str, str, bool]]:
    """What the numbers show, as (kind, text, whether it differs from arXiv 2411.10950)."""
    yield from _same(facts)
    yield from _recruited(facts)
    yield from _worth(facts)


def pair(facts: Facts, rows: str, reading: str, other: str) -> Mapping[str, Any]:
    """The comparison of two readings."""
    return next(p for p in facts["rows"][rows]["pairs"] if (p["reading"], p["other"]) == (reading, other))


def cell(facts: Facts, found_on: str, tested_on: str) -> Mapping[str, Any]:
    """What the heads of one reading are worth for a form."""
    return next(c for c in facts["lost"] if (c["found_on"], c["tested_on"]) == (found_on, tested_on))


def _same(facts: Facts) -> Iterator[tuple[str, str, bool]]:
    there = pair(facts, "answer", "pictures", "base text")
    asked = pair(facts, "question", "pictures", "base text")
    beyond = there["p"] < ALPHA and there["shared_low"] > there["expected"]
    text = (
        f"Of the {facts['n_top']} heads that attend most to the digits of pictures while they are written, "
        f"{_count(there)} were among the top {facts['n_top']} on text before the model saw any picture; sets with "
        f"the same number of heads in each layer share {there['expected']:.1f} (p {p_is(there['p'])}). By the rows of "
        f"the question (RAM) it is {_count(asked)} (layers alone: {asked['expected']:.1f}). n = "
        f"{facts['n_find']} scenes."
    )
    yield "shared heads" if beyond else "other heads", text, there["shared_high"] < facts["n_top"] / 2


def _recruited(facts: Facts) -> Iterator[tuple[str, str, bool]]:
    origin = facts["rows"]["question"]["origin"]
    new = [row["head"] for row in facts["rows"]["question"]["heads"] if row["origin"] == RECRUITED]
    if len(new) > facts["n_top"] / 4:
        text = (
            f"By the rows of the question {origin.get(KEPT, 0)} of the {facts['n_top']} heads with the highest RAM on "
            f"pictures had it on text before tuning; {len(new)} were recruited ({', '.join(new[:6])}"
            f"{f' and {len(new) - 6} more' if len(new) > 6 else ''})."
        )
        yield "recruited", text, False


def _worth(facts: Facts) -> Iterator[tuple[str, str, bool]]:
    own, other = (cell(facts, found_on, "pictures") for found_on in ("pictures", BASE_TEXT))
    if own["lost"]["low"] <= MATTERS:  # no loss to share
        return
    as_much = other["lost"]["low"] > 0.5 * own["lost"]["mean"]
    text = (
        f"On pictures, accuracy falls by {points(own['lost'])} without the {facts['n_top']} heads found on pictures, "
        f"by {points(other['lost'])} without those found on text before tuning, and without random ones by "
        f"{points(facts['random_lost']['pictures'])} ({facts['draws']} sets; p {p_is(other['p'])} over samples and "
        f"sets). On text the heads found on pictures cost {points(cell(facts, 'pictures', 'text')['lost'])}."
    )
    yield "one for both" if as_much else "one for each", text, not as_much


def _count(there: Mapping[str, Any]) -> str:
    return f"{there['shared']:.0f} [{there['shared_low']:.0f}, {there['shared_high']:.0f}]"


def _bounds(cell: xr.Dataset, name: str) -> dict[str, float]:
    return {end: float(cell[f"{name}{'' if end == 'mean' else f'_{end}'}"]) for end in ("mean", "low", "high")}


def _shared(found: xr.Dataset) -> Facts:
    names = ("shared", "shared_low", "shared_high", "expected", "p", "within")
    pairs = [
        {"reading": a, "other": b, **{name: float(found[name].sel(reading=a, other=b)) for name in names}}
        for a, b in PAIRS
    ]
    kinds, counts = np.unique(found["origin"].values.astype(str), return_counts=True)
    return {
        "score": str(found.attrs["score"]),
        "pairs": pairs,
        "origin": dict(zip(kinds.tolist(), counts.tolist(), strict=True)),
        "heads": modality_table(found),
    }
