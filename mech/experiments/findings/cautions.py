"""Warnings to give before any finding: top sets that other samples would not name, too few samples or random sets.

    for kind, text in cautions(numbers): print(text)        # of ``summarise_domain`` or ``summarise_effects``

Commands print these lines first, and a study's headlines and report start with them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mech.experiments.effects import points
from mech.experiments.power import ALPHA, POWER, detectable_loss

STABLE = 0.8  # share of bootstrap resamples in which a head of the top set must stay in it
KINDS = {
    "unstable": "The top set is not stable: a new draw of samples would select other heads",
    "few samples": "The test samples are too few to detect a loss as small as the measured one",
    "few sets": "The random sets are too few for any claim against chance",
}


def cautions(numbers: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(kind, text) of everything that limits what these numbers can say; empty if nothing does."""
    if numbers.get("stability"):
        yield from unstable(numbers["stability"])
    test = next((test for test in numbers.get("tests", ()) if test.get("primary")), None)
    if test is None:
        return
    top = next(e for e in numbers["ablation"] if e["band"] == "top"
               and (e["method"], e["n_heads"]) == (test["method"], test["n_heads"]))  # fmt: skip
    yield from few_samples(numbers["n_test"], top["accuracy_drop"])
    yield from few_sets(test["draws"])


def unstable(stability: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Heads of the top set that stay in it in too few resamples of the samples that found it."""
    loose = [(share, f"L{layer}H{head} {share:.0%}") for layer, head, share in stability["inclusion"] if share < STABLE]
    if loose:
        named = ", ".join(name for _, name in sorted(loose)[:6])
        yield (
            "unstable",
            f"Unstable top set: {len(loose)} of its {stability['n_top']} heads stay in it in less than {STABLE:.0%} of "
            f"bootstrap resamples of the {stability['n_find']} samples that found it ({named}). Other samples would "
            "select other heads; use more samples.",
        )


def few_samples(n: int, loss: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Too few samples to detect a loss of this size."""
    least = detectable_loss(n)
    if least != least:
        yield "few samples", f"Too few samples: with {n} no loss of accuracy can be significant; it takes at least 5."
    elif loss["mean"] < least:
        yield (
            "few samples",
            f"Few samples: {n} detect a loss of {100 * least:.0f} points or more (power {POWER:.0%}, one-sided "
            f"{ALPHA:.0%}); that of the top heads is {points(loss)}. A smaller loss would often be missed.",
        )


def few_sets(draws: int) -> Iterator[tuple[str, str]]:
    """Too few random sets for the p-value over sets to fall below 0.05."""
    if 1 / (1 + draws) >= ALPHA:
        yield (
            "few sets",
            f"Few random sets: with {draws} the p-value over sets cannot fall below {1 / (1 + draws):.2f}; a claim "
            "against random heads needs 20 or more.",
        )
