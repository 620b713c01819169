"""The conditions of a study: many random sets where a claim is made, few everywhere else.

    todo = Design(methods=("mean", "zero"), n_random=100).conditions(ranking, vision, necessary)

The claim is made at one size and with one method, both fixed before anything is measured: a twentieth of the heads,
ablated by the first method. Only there are enough random sets drawn for the p-value over sets to be small.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mech.experiments.ablation.ablation import BASELINE, FRACTIONS, Condition, conditions
from mech.experiments.ranking.ranking import Ranking
from mech.interventions import METHODS

CLAIM = 0.05  # of the heads: the size at which the top is compared with many random sets


@dataclass(frozen=True)
class Design:
    """Methods, sizes and numbers of random sets.

    Attributes:
        methods: the first one makes the claim.
        fractions, other_fractions: sizes for the first method and for the others.
        n_random: number of random sets where the claim is made, and of layer-matched sets (at most 20).
        n_control: at most this many random sets for every other size, method and control.
        seed: for the random sets.
    """

    methods: Sequence[str] = METHODS
    fractions: Sequence[int | float] = FRACTIONS
    other_fractions: Sequence[int | float] = (0.05, 0.2)
    n_random: int = 25
    n_control: int = 6
    seed: int = 0

    def conditions(
        self, ranking: Ranking, vision: Ranking, necessary: Sequence[tuple[int, int]] = ()
    ) -> list[Condition]:
        """The conditions, the baseline first: all bands and sizes with the first method, fewer with the others.

        Args:
            ranking: which heads are at the top.
            vision: heads by their attention to all visual tokens; its top is one more control.
            necessary: heads that the control ``unneeded`` excludes; without any, that control is left out.
        """
        first, *others = self.methods
        few: dict[str, Any] = dict(n_random=min(self.n_control, self.n_random), seed=self.seed)

        def some(to: str | list[str], bands: list[Any], fractions: Sequence[int | float], **options: Any) -> list:
            return conditions(ranking, to=to, bands=bands, fractions=fractions, **(few | options))

        todo = some(first, ["top", "bottom", "middle"], self.fractions)
        todo += some(first, ["random"], [CLAIM], n_random=self.n_random)
        todo += some(first, ["random"], self.fractions)
        todo += some(first, ["layer_matched", vision], [CLAIM], n_random=self.n_random)
        if necessary:
            todo += some(first, ["unneeded"], [CLAIM], necessary=necessary)
        todo += some(others, ["top", "bottom"], self.other_fractions)
        todo += some(others, ["random"], self.other_fractions[:1])
        return [BASELINE, *dict.fromkeys(todo)]
