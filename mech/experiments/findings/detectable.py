"""Which loss of accuracy each setting of a study could have detected; stated before its findings.

    found = detectable(summary)
    print(found["text"])

The loss follows from the number of test samples alone. It is also given for the case that answers are gained as often
as here without the top heads. Not finding a smaller effect says nothing about it.
"""

from collections.abc import Mapping
from typing import Any

from mech.experiments.power import ALPHA, POWER, detectable_loss


def detectable(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The smallest loss that each setting detects with 80% power, and one sentence for all of them.

    Returns:
        ``{"power", "alpha", "settings": [{"model", "domain", "n_test", "loss", "gained", "loss_with_gains", "draws",
        "smallest_p_sets"}, ...], "text"}``; losses are shares of answers, None if no loss can be detected. ``gained``
        is the share of answers that are right only without the top heads.
    """
    rows = [
        {"model": model, "domain": domain, **_of(numbers)}
        for model, facts in summary["models"].items()
        for domain, numbers in facts["domains"].items()
        if any(test.get("primary") for test in numbers.get("tests", ()))
    ]
    return {"power": POWER, "alpha": ALPHA, "settings": rows, "text": _text(rows)}


def _of(numbers: Mapping[str, Any]) -> dict[str, Any]:
    test = next(test for test in numbers["tests"] if test.get("primary"))
    top = next(e for e in numbers["ablation"] if e["band"] == "top"
               and (e["method"], e["n_heads"]) == (test["method"], test["n_heads"]))  # fmt: skip
    n, gained = numbers["n_test"], top.get("gained", 0.0)
    return {
        "n_test": n, "loss": _known(detectable_loss(n)), "gained": gained,
        "loss_with_gains": _known(detectable_loss(n, min(gained, 0.5))),
        "draws": test.get("draws"), "smallest_p_sets": test.get("smallest_p_sets"),  # older summaries have neither
    }  # fmt: skip


def _known(value: float) -> float | None:
    return None if value != value else value


def _text(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    losses = [row["loss"] for row in rows]
    if any(loss is None for loss in losses):
        return f"With {min(row['n_test'] for row in rows)} test samples no loss of accuracy could have been detected."
    most = max(rows, key=lambda row: row["gained"])
    samples, points = _span([row["n_test"] for row in rows]), _span([round(100 * loss) for loss in losses])
    text = (
        f"With {samples} test samples per setting, this study detects losses of accuracy of {points} points or more "
        f"({POWER:.0%} power); smaller ones would often go unnoticed. The test flips the signs of "
        f"paired differences, one-sided at {ALPHA:.0%}, and assumes that ablation turns no wrong answer right"
    )
    if most["gained"] > 0:
        larger = most["loss_with_gains"]
        reach = "no loss is detected" if larger is None else f"the loss must reach {100 * larger:.0f} points"
        text += f"; where it does for {most['gained']:.0%} of the answers, the most observed, {reach}"
    draws = [row["draws"] for row in rows if row["draws"]]
    sets = f" Against {min(draws)} random sets no p falls below {1 / (1 + min(draws)):.2g}." if draws else ""
    return f"{text}.{sets}"


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
