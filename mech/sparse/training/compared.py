"""The effect of training for sparsity: every measure of every run, compared with the control of the same seed.

    runs = mech.reference.sparsity_runs()              # plain numbers, made by ``benchmarks/sparsity.py``
    rows = compared(runs)
    print(*sentences(rows), sep="\\n")                  # the result in words

A run and its control start from the same weights and see the same batches, so their difference is the effect of the
objective. Its interval is over seeds (Student's t, wide with three seeds); the numbers of a single run come with
intervals over samples. A difference is called better or worse only if its interval excludes zero.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

Run = Mapping[str, Any]
TESTABLE = 10  # samples a causal report needs to judge single heads: the least p of a sign-flip test is 2 / 2**n
ACCURACY, TRAINED, EFFICIENCY, INTERPRETABILITY = "accuracy", "what was trained", "efficiency", "interpretability"


@dataclass(frozen=True)
class Measure:
    """One number of a run.

    Attributes:
        name: its label in a table.
        side: accuracy, efficiency or interpretability, or what the objective itself trains.
        better: 1 if higher is better, -1 if lower is.
        of: reads it from a run; None if the run lacks it.
    """

    name: str
    side: str
    better: int
    of: Callable[[Run], float | None]


def needed(run: Run, ranking: str | None = None) -> float | None:
    """Key/value heads that must stay dense to lose at most a point, by one ranking or by the best of them."""
    found = [one["n"] for name, one in run["needed"].items() if ranking in (None, name) and one["n"] is not None]
    return min(found, default=None)


def _ram(run: Run, name: str) -> float:
    return float(np.mean([domain[name]["mean"] for domain in run["ram"].values()]))


def _accuracy(run: Run, *tests: str) -> float:
    return float(np.mean([run["accuracy"][test]["mean"] for test in tests]))


def _blind(run: Run) -> float | None:
    """Heads that are causal but do not attend; None if the report has too few samples to judge single heads."""
    return len(run["causal"]["blind"]) if run["samples"]["causal"] >= TESTABLE else None


def _served(run: Run, test: str) -> float | None:
    """Accuracy lost on a test under the smallest policy; None if its samples lie within the window."""
    lost = run["efficiency"]["lost"].get(test)
    return None if lost is None else lost["mean"]


def _smallest(run: Run, what: str, order: str) -> float | None:
    return run["causal"]["smallest"][what].get(order)


MEASURES = (
    Measure("accuracy, trained domains", ACCURACY, 1, lambda run: _accuracy(run, *run["ram"])),
    Measure("accuracy, new domain", ACCURACY, 1, lambda run: _accuracy(run, "new")),
    Measure("accuracy, longer scenes", ACCURACY, 1, lambda run: _accuracy(run, "longer")),
    Measure("attention outside sinks and window", TRAINED, -1, lambda run: run["far_mass"]),
    Measure("KV heads needed, best ranking", EFFICIENCY, -1, needed),
    Measure("KV heads needed, by RAM", EFFICIENCY, -1, lambda run: needed(run, "ram")),
    Measure("KV bytes at 8,192 tokens", EFFICIENCY, -1, lambda run: run["efficiency"]["kv_bytes"]["8192"]),
    Measure("accuracy lost when served, new domain", EFFICIENCY, -1, lambda run: _served(run, "new")),
    Measure("accuracy lost when served, longer scenes", EFFICIENCY, -1, lambda run: _served(run, "longer")),
    Measure("share of heads holding half of RAM", INTERPRETABILITY, -1, lambda run: _ram(run, "half_mass_share")),
    Measure("Gini index of RAM", INTERPRETABILITY, 1, lambda run: _ram(run, "gini")),
    Measure("RAM vs effect (Spearman)", INTERPRETABILITY, 1, lambda run: run["causal"]["agreement"]["mean"]),
    Measure("heads that are causal but do not attend", INTERPRETABILITY, -1, _blind),
    Measure("smallest necessary set", INTERPRETABILITY, -1, lambda run: _smallest(run, "lost", "effect")),
    Measure("smallest sufficient set", INTERPRETABILITY, -1, lambda run: _smallest(run, "recovered", "restoring")),
    Measure("smallest necessary set by RAM", INTERPRETABILITY, -1, lambda run: _smallest(run, "lost", "ram")),
    Measure("unfaithfulness of small circuits (CMD)", INTERPRETABILITY, -1, lambda run: run["circuit"]["cmd"]["mean"]),
    Measure("share of edges for 80% faithfulness", INTERPRETABILITY, -1, lambda run: run["circuit"]["share"]),
    Measure("RAM across domains (Spearman)", INTERPRETABILITY, 1, lambda run: run["stability"]["mean"]),
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """One measure of one arm compared with the control.

    Attributes:
        size, arm, measure: what is compared.
        control, values: the measure by seed, for seeds that have both.
        difference, low, high: arm minus control, mean over seeds with its 95% interval (nan for a single seed).
    """

    size: str
    arm: str
    measure: Measure
    control: tuple[float, ...]
    values: tuple[float, ...]
    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, ``no clear difference``; ``one seed``, without an interval, or ``not measured``."""
        if not self.values:
            return "not measured"
        if len(self.values) < 2:
            return "one seed"
        if self.low <= 0 <= self.high:
            return "no clear difference"
        return "better" if (self.difference > 0) == (self.measure.better > 0) else "worse"


def compared(runs: Mapping[str, Run]) -> list[Comparison]:
    """Every arm and measure compared with the control, in the order of the runs."""
    found = []
    for size in dict.fromkeys(run["size"] for run in runs.values()):
        mine = [run for run in runs.values() if run["size"] == size]
        control = {run["seed"]: run for run in mine if run["arm"] == "control"}
        for arm in dict.fromkeys(run["arm"] for run in mine if run["arm"] != "control"):
            pairs = [(control[run["seed"]], run) for run in mine if run["arm"] == arm and run["seed"] in control]
            found += [_compared(size, arm, measure, pairs) for measure in MEASURES if pairs]
    return found


def _compared(size: str, arm: str, measure: Measure, pairs: Sequence[tuple[Run, Run]]) -> Comparison:
    both = [(measure.of(one), measure.of(other)) for one, other in pairs]
    known = [(one, other) for one, other in both if one is not None and other is not None]
    control, values = tuple(one for one, _ in known), tuple(other for _, other in known)
    change = np.array(values) - np.array(control)
    mean = float(change.mean()) if len(change) else float("nan")
    reach = float("nan")
    if len(change) > 1:
        reach = float(stats.t.ppf(0.975, len(change) - 1) * change.std(ddof=1) / len(change) ** 0.5)
    return Comparison(size, arm, measure, control, values, mean, mean - reach, mean + reach)


def verdicts(rows: Sequence[Comparison], size: str, arm: str) -> dict[str, dict[str, int]]:
    """For each side, how many measures of an arm have which verdict."""
    mine = [row for row in rows if (row.size, row.arm) == (size, arm)]
    return {
        side: {word: sum(row.verdict == word for row in mine if row.measure.side == side)
               for word in ("better", "worse", "no clear difference", "one seed")}
        for side in (ACCURACY, TRAINED, EFFICIENCY, INTERPRETABILITY)
    }  # fmt: skip


def improves(rows: Sequence[Comparison], size: str, arm: str) -> dict[str, bool | None]:
    """Whether an arm improves efficiency, and interpretability: more measures better than worse.

    None if there is a single seed, and so no interval.
    """
    counts, found = verdicts(rows, size, arm), {}
    for side in (EFFICIENCY, INTERPRETABILITY):
        better, worse, undecided = (counts[side][word] for word in ("better", "worse", "no clear difference"))
        found[side] = better > worse if better + worse + undecided else None
    return found


def sentences(rows: Sequence[Comparison]) -> list[str]:
    """The result in words: a sentence for each arm, then one for each size."""
    return list(_sentences(rows))


def _sentences(rows: Sequence[Comparison]) -> Iterator[str]:
    for size, arm in dict.fromkeys((row.size, row.arm) for row in rows):
        answer, counts = improves(rows, size, arm), verdicts(rows, size, arm)
        mine = [row for row in rows if (row.size, row.arm) == (size, arm)]
        accuracy = next(row for row in mine if row.measure.side == ACCURACY)
        change = f"accuracy {100 * accuracy.difference:+.1f} points"
        if None in answer.values():
            yield f"{size}, {arm} (one seed, so no interval): {change}."
            continue
        parts = [
            f"{side} {'improves' if better else 'does not improve'} ({counts[side]['better']} of "
            f"{sum(counts[side].values())} measures better, {counts[side]['worse']} worse)"
            for side, better in answer.items()
        ]
        yield f"{size}, {arm} ({max(len(row.values) for row in mine)} seeds): {change}; {'; '.join(parts)}."
    for size in dict.fromkeys(row.size for row in rows):
        arms = dict.fromkeys(row.arm for row in rows if row.size == size)
        both = [arm for arm in arms if all(improves(rows, size, arm).values())]
        yield f"{size}: {', '.join(both) or 'no objective'} improves both efficiency and interpretability."
