"""What is served: how fast policies run at some thousand tokens, and what ``mech sparsify`` gives beside rankings.

    speeds(model, {1 / 24: heads}, base)           # for each length and number of dense key/value heads
    trial(model, TRIALS["mixed lengths"], folder)  # trains, and asks samples of several lengths
    rankings(model, 32)                            # the same samples, by rankings, without an adapter

All of it is plain numbers for ``mech/reference/sparsity.json``. Speeds are ratios of runs that take turns in one
process. A trial trains on some samples and is asked others, of lengths it saw and of longer ones.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mech import HookedMLLM, acceleration, haystacks, localize, sparsify
from mech.data.samples import Samples
from mech.errors import ExperimentError
from mech.experiments.findings.acceleration import summarise
from mech.experiments.metrics import ask, quiz
from mech.experiments.ranking.ranking import Heads
from mech.experiments.statistics import accuracy_interval, proportion_interval
from mech.sparse.frontier.speed import speed_dataset
from mech.sparse.groups import expanded
from mech.sparse.policy import Policy

TOKENS = (2048, 8192, 16384)
PER_PAGE = 38.5  # tokens of a page, its frame included
BASE = Policy((), sinks=4, window=64)
TESTED = {8: 100, 32: 300, 64: 60}  # pages -> samples that are asked
RANKED, CHOICES, COUNTS = 16, ("ram",), (1, 2, 3)
RANKED_PAGES = (32,)
SINGLES = 24  # samples on which every single key/value head is tried


@dataclass(frozen=True)
class Trial:
    """One use of ``mech.sparsify``.

    Attributes:
        pages: pages of a sample -> how many samples of them train.
        options: of ``sparsify``.
    """

    pages: Mapping[int, int]
    options: Mapping[str, Any]


_ADAPTER = {"rank": 16, "rate": 2e-3, "target": 0.05}
_ONE, _TWO = _ADAPTER | {"at_most": 1}, _ADAPTER | {"at_most": 2, "rate": 1e-3, "target": 0.005}
_FEW, _MANY, _MORE = {6: 120, 16: 40, 32: 30}, {6: 300, 16: 250, 32: 250}, {6: 600, 16: 500, 32: 500}
TRIALS = {
    "48 samples, gates alone": Trial({6: 16, 16: 16, 32: 16}, {"rank": 0, "steps": 120, "target": 0.02}),
    "190 samples, two heads": Trial(_FEW, _TWO | {"steps": 300}),
    "190 samples, one head": Trial(_FEW, _ONE | {"steps": 400, "target": None, "strength": 0.3}),
    "800 samples, one head": Trial(_MANY, _ONE | {"steps": 900}),
    "1,600 samples, one head": Trial(_MORE, _ONE | {"steps": 1200}),
}


def speeds(model: HookedMLLM, sets: Mapping[float, Heads], base: Policy, turns: int = 5) -> list[dict[str, Any]]:
    """How many times faster than dense, medians over turns, by length and by number of dense key/value heads."""
    found = []
    for tokens in TOKENS:
        (sample,) = haystacks("pages", 1, 52, n_pictures=round(tokens / PER_PAGE))
        times = speed_dataset(model, sample, sets, base, turns=turns)
        for share, heads in sets.items():
            one = times.sel(timed=share)
            ratios = {name: one[name].values.tolist() for name in ("prefill_speed", "decode_speed")}
            ratios["decode_speed_default"] = one["decode_speed_default"].values.tolist()
            found.append(
                {"tokens": times.attrs["timed_tokens"], "n_kv_heads": round(share * n_groups(model)),
                 "heads": [list(head) for head in heads]}
                | {name: {"median": median(values), "turns": values} for name, values in ratios.items()}
                | {name: float(one[name]) for name in ("kv_measured", "prefill_bound", "decode_bound")}
                | {name: times.attrs[name] for name in ("prefill_seconds", "token_seconds", "threads")}
            )  # fmt: skip
    return found


def n_groups(model: HookedMLLM) -> int:
    """All key/value heads of a model."""
    return len(model.cfg.attention_layers) * model.cfg.n_kv_heads


def trial(model: HookedMLLM, given: Trial, folder: Path) -> dict[str, Any]:
    """Train, save, and ask: what the served model answers beside the dense one."""
    drawn = [haystacks("pages", n, 7, n_pictures=pages) for pages, n in given.pages.items()]
    train = Samples([sample for some in drawn for sample in some])
    began = time.perf_counter()
    record: dict[str, Any] = {"pages": {str(pages): n for pages, n in given.pages.items()}, **given.options}
    try:
        found = sparsify(model, train, sinks=BASE.sinks, window=BASE.window, **given.options)
    except ExperimentError as error:
        return record | {"refused": str(error)}
    found.save(folder)
    record |= {"minutes": round((time.perf_counter() - began) / 60, 1), "nats": found.loss,
               "n_kv_heads": list(found.n_kv_heads), "policy": found.policy.to_json(), "curve": found.curve,
               "tested": {}}  # fmt: skip
    for pages, n in TESTED.items():
        questions = quiz(model, haystacks("pages", n, 51, n_pictures=pages), 4)
        dense = ask(model, questions)["accuracy"]
        with found.serve(model) as fast:
            served = ask(fast, questions)["accuracy"]
        record["tested"][str(pages)] = {
            "n": n, "dense": proportion_interval(dense).as_dict(), "served": proportion_interval(served).as_dict(),
            "lost": accuracy_interval((dense - served)[None]).as_dict(),
        }  # fmt: skip
    return record


def rankings(model: HookedMLLM, pages: int) -> list[dict[str, Any]]:
    """The same questions under policies of few dense heads by rankings that were made on samples of that length.

    One more is the best of all single key/value heads, found by trying each: no ranking can choose a better one.
    """
    find, test = (haystacks("pages", n, seed, n_pictures=pages) for n, seed in ((RANKED, 50), (TESTED[pages], 51)))
    result = acceleration(
        model, test, find=find, window=BASE.window, sinks=BASE.sinks, choices=CHOICES, shares=COUNTS, turns=0
    )
    curve = [
        {name: entry[name] for name in ("choice", "n_kv_heads", "accuracy", "loss")}
        for entry in summarise(result)["curve"]
    ]
    return [*curve, single(model, pages)]


def single(model: HookedMLLM, pages: int) -> dict[str, Any]:
    """The best single dense key/value head, found on some samples and asked the others."""
    tried = quiz(model, haystacks("pages", SINGLES, 53, n_pictures=pages), 4)
    groups = [(layer, group) for layer in model.cfg.attention_layers for group in range(model.cfg.n_kv_heads)]

    def right(group: tuple[int, int], questions: Any) -> np.ndarray:
        with localize(model, Policy(expanded([group], model.cfg), BASE.sinks, BASE.window)) as fast:
            return ask(fast, questions)["accuracy"]

    best = max(groups, key=lambda group: right(group, tried).mean())
    questions = quiz(model, haystacks("pages", TESTED[pages], 51, n_pictures=pages), 4)
    dense, served = ask(model, questions)["accuracy"], right(best, questions)
    return {"choice": "every one tried", "n_kv_heads": 1, "head": list(best),
            "accuracy": proportion_interval(served).as_dict(),
            "loss": accuracy_interval((dense - served)[None]).as_dict()}  # fmt: skip
