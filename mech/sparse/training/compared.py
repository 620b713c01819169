"""What training for sparsity did: every measure of every run beside the control of the same seed.

    runs = mech.reference.sparsity_runs()              # plain numbers; ``benchmarks/sparsity.py`` made them
    rows = compared(runs)
    print(*sentences(rows), sep="\\n")                  # the answer, whatever it is

A run and its control start from the same weights and see the same batches; the difference between the two is what the
objective did. Its interval is over seeds (t, so it is wide with three); each run's own numbers have intervals over
samples beside. A difference is called better or worse only if its interval leaves out zero.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

Run = Mapping[str, Any]
TESTABLE = 10  # samples a causal report needs to tell single heads: 2 / 2**n is the least p of a sign-flip test
ACCURACY, TRAINED, EFFICIENCY, INTERPRETABILITY = "accuracy", "what was trained", "efficiency", "interpretability"


@dataclass(frozen=True)
class Measure:
    """One number of a run.

    Attributes:
        name: in a table.
        side: what it speaks for.
        better: 1 if more is better, -1 if less is.
        of: reads it; None where the run has none.
    """

    name: str
    side: str
    better: int
    of: Callable[[Run], float | None]


def needed(run: Run, ranking: str | None = None) -> float | None:
    """Key/value heads that have to stay dense for a loss of at most a point: by a ranking, or by the best of them."""
    found = [one["n"] for name, one in run["needed"].items() if ranking in (None, name) and one["n"] is not None]
    return min(found, default=None)


def _ram(run: Run, name: str) -> float:
    return float(np.mean([domain[name]["mean"] for domain in run["ram"].values()]))


def _accuracy(run: Run, *tests: str) -> float:
    return float(np.mean([run["accuracy"][test]["mean"] for test in tests]))


def _blind(run: Run) -> float | None:
    """Heads that matter without looking; None where the report is of too few samples to say of any that it matters."""
    return len(run["causal"]["blind"]) if run["samples"]["causal"] >= TESTABLE else None


def _served(run: Run, test: str) -> float | None:
    """What is lost there with few dense heads; None where all of it lies within the window."""
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
    Measure("KV heads needed, ranked by RAM", EFFICIENCY, -1, lambda run: needed(run, "ram")),
    Measure("KV bytes at 8,192 tokens", EFFICIENCY, -1, lambda run: run["efficiency"]["kv_bytes"]["8192"]),
    Measure("served: lost on the new domain", EFFICIENCY, -1, lambda run: _served(run, "new")),
    Measure("served: lost on longer scenes", EFFICIENCY, -1, lambda run: _served(run, "longer")),
    Measure("heads that hold half of RAM", INTERPRETABILITY, -1, lambda run: _ram(run, "half_mass_share")),
    Measure("Gini index of RAM", INTERPRETABILITY, 1, lambda run: _ram(run, "gini")),
    Measure("RAM against effect (Spearman)", INTERPRETABILITY, 1, lambda run: run["causal"]["agreement"]["mean"]),
    Measure("heads that matter without looking", INTERPRETABILITY, -1, _blind),
    Measure("smallest necessary set", INTERPRETABILITY, -1, lambda run: _smallest(run, "lost", "effect")),
    Measure("smallest sufficient set", INTERPRETABILITY, -1, lambda run: _smallest(run, "recovered", "restoring")),
    Measure("necessary set, ranked by RAM", INTERPRETABILITY, -1, lambda run: _smallest(run, "lost", "ram")),
    Measure("circuit of few edges (CMD)", INTERPRETABILITY, -1, lambda run: run["circuit"]["cmd"]["mean"]),
    Measure("edges for 80% faithfulness", INTERPRETABILITY, -1, lambda run: run["circuit"]["share"]),
    Measure("RAM across domains (Spearman)", INTERPRETABILITY, 1, lambda run: run["stability"]["mean"]),
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """One measure of one arm beside the control.

    Attributes:
        size, arm, measure: what is compared.
        control, values: by seed, of seeds that have both.
        difference, low, high: arm minus control, mean over seeds with its 95% interval; nan with a single seed.
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
        """``better``, ``worse``, ``no difference seen``; ``one seed``, without an interval, or ``not measured``."""
        if not self.values:
            return "not measured"
        if len(self.values) < 2:
            return "one seed"
        if self.low <= 0 <= self.high:
            return "no difference seen"
        return "better" if (self.difference > 0) == (self.measure.better > 0) else "worse"


def compared(runs: Mapping[str, Run]) -> list[Comparison]:
    """Every arm and measure beside the control, in the order of the runs."""
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


def bought(rows: Sequence[Comparison], size: str, arm: str) -> dict[str, dict[str, int]]:
    """How many measures of each side are better, worse, or neither, for an arm."""
    mine = [row for row in rows if (row.size, row.arm) == (size, arm)]
    return {
        side: {word: sum(row.verdict == word for row in mine if row.measure.side == side)
               for word in ("better", "worse", "no difference seen", "one seed")}
        for side in (ACCURACY, TRAINED, EFFICIENCY, INTERPRETABILITY)
    }  # fmt: skip


def buys(rows: Sequence[Comparison], size: str, arm: str) -> dict[str, bool | None]:
    """Whether an arm buys efficiency, and interpretability: more measures better than worse; None without intervals."""
    counts, found = bought(rows, size, arm), {}
    for side in (EFFICIENCY, INTERPRETABILITY):
        better, worse, undecided = (counts[side][word] for word in ("better", "worse", "no difference seen"))
        found[side] = better > worse if better + worse + undecided else None
    return found


def sentences(rows: Sequence[Comparison]) -> list[str]:
    """What came of it, in words."""
    return list(_sentences(rows))


def _sentences(rows: Sequence[Comparison]) -> Iterator[str]:
    for size, arm in dict.fromkeys((row.size, row.arm) for row in rows):
        answer, counts = buys(rows, size, arm), bought(rows, size, arm)
        mine = [row for row in rows if (row.size, row.arm) == (size, arm)]
        n = max(len(row.values) for row in mine)
        accuracy = next(row for row in mine if row.measure.side == ACCURACY)
        lost = f"accuracy changes by {100 * accuracy.difference:+.1f} points"
        if None in answer.values():
            yield f"{size}, {arm} (one seed, so no interval): {lost}."
            continue
        said = [
            f"{side}: {'yes' if bought_ else 'no'} ({counts[side]['better']} measures better, {counts[side]['worse']} "
            f"worse, {counts[side]['no difference seen']} undecided)"
            for side, bought_ in answer.items()
        ]
        yield f"{size}, {arm} ({n} seeds): {lost}. Bought {'; '.join(said)}."
    for size in dict.fromkeys(row.size for row in rows):
        arms = dict.fromkeys(row.arm for row in rows if row.size == size)
        both = [arm for arm in arms if all(buys(rows, size, arm).values())]
        yield (
            f"{size}, both at once: {', '.join(both)}." if both
            else f"{size}: no objective bought efficiency and interpretability at once in this experiment."
        )  # fmt: skip
