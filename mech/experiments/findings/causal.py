"""What the causal report of a study says about heads that matter without attending, the reverse, and self-repair.

Each rule reads the numbers of one model on one domain and yields (kind, text, whether it differs from the paper).
"""

from collections.abc import Mapping
from typing import Any

from mech.experiments.findings.words import MATTERS, TOP, Said, are, names_of, too_weak

KINDS = {
    "blind": "Heads that do not attend to the evidence are necessary",
    "idle": "Most heads that attend to the evidence do not matter",
    "order": "RAM does not order heads by their causal effect",
    "ordered": "RAM orders heads by their causal effect",
    "repair": "Heads compensate for each other: a set costs more than its heads cost one by one",
    "stand-in": "A head stands in for another that is noised",
    "chooses": "The heads with the highest RAM choose where the answer comes from: it follows them to a distractor",
    "not choosing": "The heads with the highest RAM are not shown to choose where the answer comes from",
    "carried": "Half of the answer depends on a twentieth of the heads or fewer",
}


def _causal(numbers: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What patching found; None if it was not possible or the model is too weak."""
    found = numbers.get("causal")
    return found if found and "quadrants" in found and not too_weak(numbers) else None


def _blind(numbers: Mapping[str, Any], n_heads: int) -> Said:
    found = _causal(numbers)
    if not found or not found["necessary_blind"]:
        return
    blind, worst = found["necessary_blind"], [path["text"] for path in found["paths"]
                                              if path["head"] in found["necessary_blind"]]  # fmt: skip
    text = (
        f"{are(len(blind), 'head')} necessary without attending to the evidence (RAM not clearly above what even "
        f"attention gives): {names_of(blind)}. {' '.join(worst[:2])}"
    )
    yield "blind", text.strip(), True


def _idle(numbers: Mapping[str, Any], n_heads: int) -> Said:
    found = _causal(numbers)
    if not found:
        return
    both, idle = (found["quadrants"][name] for name in ("attending and causal", "attending, not causal"))
    if len(idle) > len(both):
        text = (
            f"Of {len(both) + len(idle)} heads that attend to the evidence, {len(idle)} change the answer by less than "
            f"{found['threshold']:.0%} of the gap, or not significantly, when patched one by one "
            f"(n = {found['n_test']})."
        )
        yield "idle", text, True


def _order(numbers: Mapping[str, Any], n_heads: int) -> Said:
    found = _causal(numbers)
    if not found or found["agreement"]["mean"] is None:
        return
    mean, low, high = (found["agreement"][name] for name in ("mean", "low", "high"))
    against = high < 0.5
    if not against and low < 0.5:
        return
    text = (
        "The rank correlation (Spearman) of RAM and causal effect, the share of the answer lost when a head is patched "
        f"from the counterfactual, is {mean:.2f} [{low:.2f}, {high:.2f}] over all heads (n = {found['n_test']})."
    )
    yield "order" if against else "ordered", text, against


def _repair(numbers: Mapping[str, Any], n_heads: int) -> Said:
    found = _causal(numbers)
    if not found:
        return
    some, worth = found["set"], found["set"]["together"]
    if some["size"] > 1 and worth["low"] > some["alone"] + MATTERS:
        text = (
            f"The single effects of {names_of(some['heads'])} add up to {some['alone']:.0%} of the gap; noised "
            f"together they lose {worth['mean']:.0%} [{worth['low']:.0%}, {worth['high']:.0%}] "
            f"(n = {found['n_test']}): other heads compensate for one of them, not for all."
        )
        yield "repair", text, False
    for head, other in found["stand_ins"]:
        yield (
            "stand-in",
            f"{names_of([head])} compensates for {names_of([other])}: without that head it writes more of the answer.",
            False,
        )


def _carried(numbers: Mapping[str, Any], n_heads: int) -> Said:
    found = _causal(numbers)
    if not found:
        return
    size, by_ram = (found["smallest"]["lost"][order] for order in ("effect", "ram"))
    if size is None or size > max(1, round(TOP * n_heads)):
        return
    back = found["smallest"]["recovered"]["restoring"]
    text = (
        f"Noising {size} head{'s' * (size > 1)} loses half of the answer ({names_of(found['set']['heads'])}, found "
        f"by patching on other samples, n = {found['n_test']}); in the order of RAM it takes "
        f"{'more than were tried' if by_ram is None else by_ram}. "
        f"{'No set tried' if back is None else f'Denoising {back} alone'} recovers nine tenths."
    )
    yield "carried", text, False


def _choice(numbers: Mapping[str, Any], n_heads: int) -> Said:
    found = _causal(numbers)
    if not found or not (pulled := found.get("redirection")):
        return
    yield "chooses" if pulled["sufficient"] else "not choosing", pulled["text"], False


CAUSAL = (_blind, _idle, _order, _repair, _carried, _choice)
