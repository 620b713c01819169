"""Which sets of heads the answer depends on: found on some samples, measured on others.

    order  = greedy(find_runs.lost, candidates, 0.5)        # each head the one that costs most with those before it
    curves = set_curves(test_runs, {"effect": order, "ram": ranking.heads}, sizes_of(48))
    smallest(curves, "lost", 0.5)                           # {"effect": 3, "ram": 8}

``lost`` over the size of a set is the *completeness* curve (little is left without a complete set), ``recovered`` the
*faithfulness* curve (a faithful set alone, with all other heads corrupted, brings the answer back). The greedy search
sees what single effects hide: of two redundant heads the second costs everything once the first is gone.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import xarray as xr
from jaxtyping import Float

from mech.experiments.causal.runs import Runs
from mech.experiments.ranking.ranking import Head


def greedy(
    effect: Callable[[list[Head]], Float[np.ndarray, " example"]],
    candidates: Sequence[Head],
    share: float,
    steps: int = 5,
    tie: Callable[[Head], float] = lambda head: 0.0,
) -> list[Head]:
    """Heads one by one, each the one that has the largest joint effect with those before it.

    ``effect`` is ``runs.lost`` (a set to remove) or ``runs.recovered`` (one to restore). Stops when the effect reaches
    ``share`` of the gap, or after ``steps``. If heads do the same, ``tie`` decides.

    Cost: for each step a forward for each candidate and sample.
    """
    found: list[Head] = []
    while len(found) < min(steps, len(candidates)):
        rest = [head for head in candidates if head not in found]
        effects = {head: float(effect([*found, head]).mean()) for head in rest}
        found.append(max(rest, key=lambda head: (round(effects[head], 4), tie(head))))
        if effects[found[-1]] >= share:
            break
    return found


def sizes_of(n: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 16, 32, ... up to half of ``n``."""
    steps = sorted({1, 3, 6, *(2**i for i in range(1, 12))})
    return [size for size in steps if size <= max(1, n // 2)]


def set_curves(
    runs: Runs,
    orders: Mapping[str, Sequence[Head]],
    sizes: Sequence[int],
    singles: Mapping[Head, float],
    tick: Callable[[], None] = lambda: None,
) -> xr.Dataset:
    """What the first heads of each order cost together, and recover together.

    Returns:
        ``set_lost`` and ``set_recovered`` over (order, size, example); ``set_singles`` over (order, size): the sum of
        what each of the heads costs by itself.

    Cost: two forwards for each order, size and sample.
    """
    lost, recovered, sums = [], [], []
    for heads in orders.values():
        lost.append([runs.lost(heads[:size]) for size in sizes])
        recovered.append([runs.recovered(heads[:size]) for size in sizes])
        sums.append([sum(singles[head] for head in heads[:size]) for size in sizes])
        tick()
    dims = ("order", "size", "example")
    return xr.Dataset(
        {"set_lost": (dims, np.array(lost)), "set_recovered": (dims, np.array(recovered)),
         "set_singles": (dims[:2], np.array(sums))},
        {"order": list(orders), "size": list(sizes)},
    )  # fmt: skip


def smallest(curves: xr.Dataset, what: str, share: float) -> dict[str, int | None]:
    """For each order the smallest size tried with at least ``share`` lost or recovered; None if none is enough.

    Random orders are averaged.
    """
    mean = curves[f"set_{what}"].mean("example")
    names = np.array([str(name).split()[0] for name in mean["order"].values])
    found = {}
    for name in dict.fromkeys(names.tolist()):
        enough = mean.values[names == name].mean(0) >= share
        found[name] = int(mean["size"].values[enough.argmax()]) if enough.any() else None
    return found
