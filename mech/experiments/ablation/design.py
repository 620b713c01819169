"""The conditions of a study: many random sets where a claim is made, few everywhere else.

    todo = design(ranking, vision, necessary, methods=("mean", "zero"), n_random=100)

The claim is made at one size and by one method, both fixed before anything is measured: a twentieth of the heads, by
the first method. Only there are random sets drawn in a number that lets the p-value over sets be small.
"""

from collections.abc import Sequence
from typing import Any

from mech.experiments.ablation.ablation import BASELINE, FRACTIONS, Condition, conditions
from mech.experiments.ranking.ranking import Ranking
from mech.interventions import METHODS

CLAIM = 0.05  # of the heads: the size at which the top is compared with many random sets


def design(
    ranking: Ranking,
    vision: Ranking,
    necessary: Sequence[tuple[int, int]] = (),
    *,
    methods: Sequence[str] = METHODS,
    fractions: Sequence[int | float] = FRACTIONS,
    other_fractions: Sequence[int | float] = (0.05, 0.2),
    n_random: int = 100,
    n_control: int = 10,
    seed: int = 0,
) -> list[Condition]:
    """The conditions, the baseline first: all bands and sizes by the first method, fewer by the others.

    Args:
        ranking: which heads are at the top.
        vision: heads by their attention on all visual tokens; its top is one more control.
        necessary: heads that the control ``unneeded`` spares; it is left out without any.
        methods: the first one makes the claim.
        fractions, other_fractions: sizes under the first method and under the others.
        n_random: random sets where the claim is made.
        n_control: random sets of every other size, method and control, at most.
        seed: of the random sets.
    """
    first, *others = methods
    options: dict[str, Any] = dict(n_random=min(n_control, n_random), seed=seed)
    todo = conditions(ranking, to=first, bands=["top", "bottom", "middle"], fractions=fractions, **options)
    todo += conditions(ranking, to=first, bands=["random"], fractions=[CLAIM], n_random=n_random, seed=seed)
    todo += conditions(ranking, to=first, bands=["random"], fractions=fractions, **options)
    todo += conditions(ranking, to=first, bands=["layer_matched", vision], fractions=[CLAIM], **options)
    if necessary:
        todo += conditions(ranking, to=first, bands=["unneeded"], fractions=[CLAIM], necessary=necessary, **options)
    todo += conditions(ranking, to=others, bands=["top", "bottom"], fractions=other_fractions, **options)
    todo += conditions(ranking, to=others, bands=["random"], fractions=other_fractions[:1], **options)
    return [BASELINE, *dict.fromkeys(todo)]
