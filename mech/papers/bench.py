"""What every point on the papers is measured with: one model, samples that find heads, others that test them.

    bench = Bench.of(model, mech.haystacks("grounding", 64))
    bench.cost(bench.ranking.top(5))                # drop in accuracy, sample by sample; mean ablation
    bench.band("random", 5, to="zero")              # the same for several random sets; zero ablation

Each set of heads is ablated once, however many points use it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from mech.data.samples import Samples
from mech.errors import ExperimentError
from mech.experiments.effects import against_random
from mech.experiments.findings.literature import published
from mech.experiments.metrics import Quiz, ask, later_tokens, quiz
from mech.experiments.ranking.checks import refuse_overlap
from mech.experiments.ranking.ranking import Heads, Ranking, rank_heads
from mech.experiments.scores.ram import retrieval_attention_mass
from mech.experiments.statistics import Interval, accuracy_interval
from mech.interventions import Ablate, Reference, intervene, reference_activations
from mech.model import HookedMLLM


@dataclass(frozen=True)
class Point:
    """One published statement, what was measured about it, and a sentence made from the numbers.

    Attributes:
        key: its name.
        claim: what was published, in our words.
        text: what this model says, computed from ``numbers``.
        numbers: plain data; intervals are ``{"mean", "low", "high"}``, drops are baseline minus ablated.
        holds: whether this model and these samples agree with the statement; None if they cannot tell.
        decides: whether numbers could decide it; False if it is not a yes-or-no matter, or was not measured.
        published: the paper, and the models that it studied.
    """

    key: str
    claim: str
    text: str
    numbers: Mapping[str, Any] = field(repr=False)
    holds: bool | None = None
    decides: bool = True
    published: str = published("2606.05843")

    @property
    def verdict(self) -> str:
        """``agrees``, ``differs``, ``cannot tell``; ``measured`` where there is nothing to decide, only numbers."""
        if self.holds is None:
            return "cannot tell" if self.decides else "measured"
        return "agrees" if self.holds else "differs"


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
    n_random: int = 20
    seed: int = 0
    _known: dict[Any, dict[str, np.ndarray]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, model: HookedMLLM, samples: Samples, *, n_random: int = 20, seed: int = 0, batch_size: int = 16
    ) -> "Bench":
        """Half of the samples find the heads by RAM and are the reference of mean ablation, the others test them.

        Raises:
            ExperimentError: fewer than eight samples, samples without evidence, or the same id in both halves.

        Cost: two forwards for each sample that finds heads, and the vision stack for the others.
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

    def later_tokens(self, heads: Heads = (), *, phase: str = "both") -> np.ndarray:
        """The share of right tokens after the answer's first, [example]; nan for answers of one token."""
        if not heads:
            return later_tokens(self.model, self.questions)
        with intervene(self.model, Ablate(heads=heads, phase=phase, reference=self.reference)) as without:
            return later_tokens(without, self.questions)

    def cost(self, heads: Heads, **options: Any) -> np.ndarray:
        """The drop in accuracy of every test sample, [example]."""
        return self.right() - self.right(heads, **options)

    def band(self, name: str, k: int | float, **options: Any) -> np.ndarray:
        """The drops of a band of the ranking, [draw, example]: several sets, none with a top head, for ``"random"``."""
        ranking = self.ranking
        draws = (
            [getattr(ranking, name)(k)]
            if name != "random"
            else ranking.random(k, self.n_random, self.seed, exclude=ranking.top(k))
        )
        return np.stack([self.cost(heads, **options) for heads in draws])


def drop(values: np.ndarray) -> Interval:
    """The accuracy lost, over [example] or [draw, example], with the same interval as everywhere else."""
    return accuracy_interval(np.atleast_2d(values))


def beyond_random(top: np.ndarray, random: np.ndarray) -> dict[str, Any]:
    """Do these heads cost more than random ones, on new samples and against new sets? See ``against_random``."""
    return against_random(np.atleast_2d(top)[0], random)


def heads_in(n: int) -> str:
    return f"{n} head{'s' * (n != 1)}"
