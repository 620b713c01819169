"""Training objectives as data: the penalty added to the task loss, and its strength or the loss it may cost.

    OBJECTIVES["gates"]                                   # task + 1.0 * expected share of open gates
    Objective("gates", target=0.02)                       # as few open gates as a loss of 0.02 nats allows
    loss = task + strengths.at(step) * penalty

=============  =======================================================================================================
penalty        what is minimised
=============  =======================================================================================================
``none``       nothing: the control, with the same compute
``far``        attention mass outside sinks and window, averaged over rows and heads
``gates``      the expected share of key/value heads whose hard-concrete gate is open (L0); closed means local
``entropy``    the entropy of the far mass over heads: few heads should hold it all. The amount of far mass is not
               penalised, so no head has to become local
=============  =======================================================================================================

With a ``target`` the objective is constrained: minimise the penalty *subject to* ``task <= target``. The strength is
then the inverse of a Lagrange multiplier, which ``Strength`` adapts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mech.arguments import Positive, Rule, Whole, checked, one_of

PENALTIES = ("none", "far", "gates", "entropy")
NotNegative = Annotated[float, Rule("a finite number of at least 0", lambda value: value >= 0)]


@checked
@dataclass(frozen=True)
class Objective:
    """One row of the table above.

    Attributes:
        penalty: one of ``PENALTIES``.
        strength: the weight of the penalty (lambda); with a target, its initial value.
        target: the largest acceptable task loss, in nats; None for a constant strength.
        warm_up: number of steps over which the strength grows from zero.
    """

    penalty: one_of(PENALTIES) = "none"
    strength: NotNegative = 0.0
    target: Positive | None = None
    warm_up: Whole = 20


OBJECTIVES: Mapping[str, Objective] = {
    "control": Objective(),
    "far": Objective("far", strength=3.0),
    "gates": Objective("gates", strength=0.5),
    "constrained": Objective("gates", strength=0.1, target=0.02),
    "entropy": Objective("entropy", strength=0.3),
}


class Strength:
    """The weight of a penalty at each step: constant, or adapted so that the task loss reaches a target.

    Constrained optimisation (GECO, arXiv 1810.00597; for attention edges 2512.05865) minimises ``penalty + mu (task -
    target)``, and the multiplier ``mu`` grows while the constraint is violated. Divided by ``mu`` this is ``task +
    penalty / mu``, so the strength ``1 / mu`` *falls* while ``task > target`` and rises while there is room. Its
    logarithm moves by ``rate`` times the distance of a running mean of the task loss from the target, in units of the
    target and capped at 1.
    """

    LEAST, MOST = 1e-4, 1e3

    def __init__(self, objective: Objective, rate: float = 0.05, memory: float = 0.9):
        self.objective, self.rate, self.memory = objective, rate, memory
        self.value, self.mean = objective.strength or self.LEAST, math.nan

    def at(self, step: int) -> float:
        """The weight of the penalty at a step."""
        if self.objective.penalty == "none":
            return 0.0
        given = self.value if self.objective.target is not None else self.objective.strength
        return given * min(1.0, (step + 1) / max(1, self.objective.warm_up))

    def seen(self, task: float) -> None:
        """Update it with the task loss of a step."""
        self.mean = task if math.isnan(self.mean) else self.memory * self.mean + (1 - self.memory) * task
        if self.objective.target is not None:
            room = 1 - self.mean / self.objective.target
            moved = self.value * math.exp(self.rate * max(-1.0, min(1.0, room)))
            self.value = min(self.MOST, max(self.LEAST, moved))

    def forget(self) -> None:
        """Restart the running mean."""
        self.mean = math.nan

    def state_dict(self) -> dict[str, float]:
        """The state that a checkpoint stores."""
        return {"value": self.value, "mean": self.mean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.value, self.mean = float(state["value"]), float(state["mean"])


def spread(mass: Float[Tensor, "layer head"]) -> Float[Tensor, ""]:
    """Entropy of the far mass over heads, relative to its maximum: 1 if all have the same, 0 if one head has it all."""
    share = mass.flatten() / mass.sum().clamp(min=1e-12)
    return torch.special.entr(share).sum() / math.log(share.numel())
