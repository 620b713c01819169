"""What all sentence rules share: thresholds, wording helpers, and whether a model is too weak to say anything about."""

from collections.abc import Iterator, Mapping
from typing import Any

MATTERS = 0.05  # a drop in accuracy that is worth reporting
FLOOR = 0.2  # below this accuracy there is nothing to lose
TOP = 0.05  # the share of heads that the literature calls CoRe
Said = Iterator[tuple[str, str, bool]]  # kind, text, whether it differs from arXiv 2606.05843


def too_weak(numbers: Mapping[str, Any]) -> bool:
    """Whether accuracy without ablation may lie below ``FLOOR``."""
    return numbers["baseline"]["accuracy"]["low"] < FLOOR


def names_of(heads: list[list[int]]) -> str:
    """``L0H2, L3H1``, at most six heads."""
    shown = [f"L{layer}H{head}" for layer, head in heads[:6]]
    return ", ".join(shown) + (f" and {len(heads) - 6} more" if len(heads) > 6 else "")


def are(n: int, noun: str, one: str = "is", many: str = "are") -> str:
    """``1 head is``, ``2 heads are``."""
    return f"{n} {noun}{'s' * (n != 1)} {one if n == 1 else many}"
