"""What every point on the papers is measured with: one model, samples that find heads, others that test them.

    bench = Bench.of(model, mech.haystacks("grounding", 64))
    bench.cost(bench.ranking.top(5))                # drop of accuracy, sample by sample; mean ablation
    bench.band("random", 5, to="zero")              # of several random sets

Each set of heads is ablated once, however many points ask for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from mech.data.samples import Samples
from mech.errors import ExperimentError
from mech.experiments.metrics import Quiz, ask, quiz
from mech.experiments.ranking.checks import refuse_overlap
from mech.experiments.ranking.ranking import Heads, Ranking, rank_heads
from mech.experiments.scores.ram import retrieval_attention_mass
from mech.experiments.statistics import (
    Interval,
    bootstrap_interval,
    permutation_test,
    proportion_interval,
    two_way_bootstrap,
)
from mech.interventions import Ablate, Reference, intervene, reference_activations
from mech.model import HookedMLLM

ALPHA = 0.05
MATTERS = 0.05  # a drop in accuracy that is worth a word


@dataclass(frozen=True)
class Point:
    """One published statement, what was measured about it, and a sentence made from the numbers.

    Attributes:
        key: its name.
        claim: what was published, in our words, with the paper.
        text: what this model says, computed from ``numbers``.
        numbers: plain data; intervals are ``{"mean", "low", "high"}``, drops are baseline minus ablated.
        holds: whether the statement holds here; None where it is no matter of yes and no.
    """

    key: str
    claim: str
    text: str
    numbers: Mapping[str, Any] = field(repr=False)
    holds: bool | None = None


@dataclass(frozen=True, eq=False)
class Bench:
    """What the points share: measured once, on samples that find heads and on others that test them."""

    model: HookedMLLM
    find: Samples
    test: Samples
    ram: xr.Dataset
    ranking: Ranking
    reference: Reference
    questions: Quiz
    n_random: int = 8
    seed: int = 0
    _known: dict[Any, dict[str, np.ndarray]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, model: HookedMLLM, samples: Samples, *, n_random: int = 8, seed: int = 0, batch_size: int = 16
    ) -> "Bench":
        """Half of the samples find the heads by RAM and are the reference of mean ablation, the others test them.

        Raises:
            ExperimentError: fewer than eight samples, samples without evidence, two of one id across the halves.

        Cost: two forwards for each sample that finds, and the pictures of the others.
        """
        samples = Samples(samples)
        if len(samples) < 8 or n_random < 2:
            raise ExperimentError(f"{len(samples)} samples, {n_random} random sets", "at least 8 and 2", "give more")
        find, test = samples.split(0.5, seed)
        refuse_overlap(test, [sample.id for sample in find], "found the heads")
        ram = retrieval_attention_mass(model, find, batch_size=batch_size)
        reference = reference_activations(model, find, batch_size=batch_size, seed=seed)
        return cls(model, find, test, ram, rank_heads(ram), reference, quiz(model, test, batch_size), n_random, seed)

    def right(self, heads: Heads = (), **options: Any) -> np.ndarray:
        """Which answers are right without some heads (``options`` of ``Ablate``; mean ablation), [example]."""
        return self.measured(heads, **options)["accuracy"]

    def measured(self, heads: Heads = (), *, to: str = "mean", **options: Any) -> dict[str, np.ndarray]:
        """Accuracy and logit difference of the test samples without some heads; each set is measured once."""
        key = (frozenset(heads), to if heads else "", *sorted(options.items()))
        if key not in self._known:
            if heads:
                spec = Ablate(heads=heads, to=to, reference=self.reference, seed=self.seed, **options)
                with intervene(self.model, spec) as without:
                    self._known[key] = ask(without, self.questions)
            else:
                self._known[key] = ask(self.model, self.questions)
        return self._known[key]

    def cost(self, heads: Heads, **options: Any) -> np.ndarray:
        """The drop of accuracy of every test sample, [example]."""
        return self.right() - self.right(heads, **options)

    def band(self, name: str, k: int | float, **options: Any) -> np.ndarray:
        """The drops of a band of the ranking, [draw, example]: several sets where they are ``"random"``."""
        sets = (
            self.ranking.random(k, self.n_random, self.seed) if name == "random" else [getattr(self.ranking, name)(k)]
        )
        return np.stack([self.cost(heads, **options) for heads in sets])


def interval(values: np.ndarray) -> Interval:
    """The mean with its interval, over samples and, where there are several, over draws: [example], [draw, example]."""
    values = np.atleast_2d(values)
    return two_way_bootstrap(values) if len(values) > 1 else bootstrap_interval(values[0])


def drop(values: np.ndarray) -> Interval:
    """``interval`` of drops of accuracy: that none of n answers changed does not mean that none ever would (Wilson)."""
    found = interval(values)
    if found.low < found.high:
        return found
    slack = proportion_interval(np.zeros(np.atleast_2d(values).shape[1])).high
    return Interval(found.mean, max(-1.0, found.mean - slack), min(1.0, found.mean + slack))


def beyond_random(top: np.ndarray, random: np.ndarray) -> float:
    """p: do these heads cost more than random ones, on new samples? Sign flips over samples."""
    return permutation_test(np.atleast_2d(top)[0], random).p_value


def points(found: Interval | Mapping[str, Any]) -> str:
    """A drop of accuracy in words: ``62 points [55, 70]``."""
    mean, low, high = (float(found[name] if isinstance(found, Mapping) else getattr(found, name))
                       for name in ("mean", "low", "high"))  # fmt: skip
    return f"{100 * mean + 0.0:.0f} points [{100 * low + 0.0:.0f}, {100 * high + 0.0:.0f}]"


def p(value: float) -> str:
    return f"p = {value:.3f}" if value >= 0.001 else "p < 0.001"


def heads_in(n: int) -> str:
    return f"{n} head{'s' * (n != 1)}"
