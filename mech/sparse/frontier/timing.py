"""Speed as a ratio: runs that are compared take turns in one process.

    times = taking_turns({"dense": lambda: model(inputs), "sparse": lambda: fast(inputs)}, turns=5)
    speed(times, "dense", "sparse")            # how many times faster, {"mean", "low", "high"}

A machine that slows down halfway slows both, so a ratio says more than seconds do. It is still a measurement on this
machine at this moment: it is saved with the result and not repeated.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

Times = dict[str, Float[np.ndarray, " turn"]]


@torch.no_grad()
def taking_turns(runs: Mapping[str, Callable[[], Any]], turns: int = 5) -> Times:
    """Seconds of every run in every turn, after one warm-up turn."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for turn in range(turns):
        # Every other turn in reverse, so that no run always follows the same one.
        for name in list(runs) if turn % 2 else reversed(list(runs)):
            _settled()
            start = time.perf_counter()
            runs[name]()
            _settled()
            taken[name].append(time.perf_counter() - start)
    return {name: np.array(seconds) for name, seconds in taken.items()}


def speed(times: Mapping[str, Float[np.ndarray, " turn"]], of: str, over: str) -> dict[str, float]:
    """How many times faster ``over`` is than ``of``: the median over turns, and the lowest and highest turn."""
    ratio = np.asarray(times[of]) / np.asarray(times[over])
    return {"mean": float(np.median(ratio)), "low": float(ratio.min()), "high": float(ratio.max())}


def _settled() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
