"""Three disputes between papers on retrieval heads: a function of a ``Bench`` for each, by name in ``DISPUTES``."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np

from mech.experiments.effects import points
from mech.experiments.findings.literature import published
from mech.experiments.findings.words import TOP
from mech.experiments.ranking.agreement import agreement
from mech.experiments.ranking.ranking import Heads, rank_heads
from mech.experiments.scores.measure import head_scores
from mech.interventions import METHODS
from mech.papers.bench import Bench, Point, beyond_random, drop, heads_in


def methods(bench: Bench) -> Point:
    """Zero, mean, resample, uniform and the paper's ablation of the same heads, each compared with random heads."""
    rows = {}
    for to in METHODS:
        top, random = bench.band("top", TOP, to=to), bench.band("random", TOP, to=to)
        rows[to] = {
            "top": drop(top).as_dict(),
            "random": drop(random).as_dict(),
            **beyond_random(top, random),
        }
    drops = {to: bench.cost(bench.ranking.top(TOP), to=to) for to in METHODS}
    apart = {(a, b): drop(drops[a] - drops[b]) for a, b in combinations(METHODS, 2)}
    (a, b), widest = max(apart.items(), key=lambda one: abs(one[1].mean))
    differ = not widest.low <= 0 <= widest.high
    costs = ", ".join(f"{to} {points(row['top'])} (random {points(row['random'])})" for to, row in rows.items())
    text = (
        f"The top {heads_in(bench.ranking.count(TOP))} cost, by method: {costs}. {a} and {b} differ most, by "
        f"{points(widest)}{' (a difference)' if differ else ' (no difference is shown)'}."
    )
    numbers = {"methods": rows, "widest": [a, b, widest.as_dict()]}
    claim = "'Masking a head' is one operation: papers zero it, spread it evenly, or replace it by its mean."
    return Point("methods", claim, text, numbers, False if differ else None, published=published("2606.05843"))


def queries(bench: Bench) -> Point:
    """Heads scored by the question's rows (RAM) against heads scored by the rows that write the answer."""
    found = head_scores(bench.model, bench.find, ("ram", "visual_retrieval"), seed=bench.seed)
    rankings = {name: rank_heads(found, name) for name in ("ram", "visual_retrieval")}
    k = bench.ranking.count(TOP)
    drops = {name: bench.cost(ranking.top(k)) for name, ranking in rankings.items()}
    random, gap = drop(bench.band("random", k)), drop(drops["visual_retrieval"] - drops["ram"])
    agreed = agreement(rankings, k).sel(ranking="ram", other="visual_retrieval")
    costs = {name: drop(lost).as_dict() for name, lost in drops.items()}
    text = (
        f"Scored by the rows that write the answer, the top {heads_in(k)} cost {points(costs['visual_retrieval'])}; by "
        f"the question's rows {points(costs['ram'])}; random ones {points(random)}. The difference is {points(gap)}. "
        f"The two rankings correlate by {float(agreed['spearman']):.2f}, their top sets overlap by Jaccard "
        f"{float(agreed['jaccard']):.2f} (chance {float(agreed['jaccard_null']):.2f})."
    )
    numbers = {
        "cost": costs, "random": random.as_dict(), "difference": gap.as_dict(), "n_heads": k,
        "spearman": float(agreed["spearman"]), "jaccard": float(agreed["jaccard"]),
        "published": {"output-token": 20.4, "input-query": 51.1, "random": 91.1},
    }  # fmt: skip
    claim = "Output-token rows find the heads that matter, input-query rows miss them."
    holds = True if gap.low > 0 else False if gap.high < 0 else None
    return Point("queries", claim, text, numbers, holds, published=published("2608.27417"))


def phases(bench: Bench) -> Point:
    """Heads masked while the prompt is read, while the answer is written, and at which positions of the prompt.

    The first token of an answer is written by the prompt's last position, so masking in decoding can only change the
    later ones: the share of right tokens among those is reported as well as exact matches.
    """
    top = bench.ranking.top(TOP)
    lengths = np.array([len(answer) for answer in bench.questions.answers])
    tokens = float(lengths.mean())
    phase = {name: drop(bench.cost(top, phase=name)).as_dict() for name in ("prefill", "decode", "both")}
    where = {name: drop(bench.cost(top, positions=name)).as_dict() for name in ("image", "question", "last")}
    text = (
        f"{_written(tokens)} Masking the top {heads_in(len(top))} in prefill costs {points(phase['prefill'])}, in "
        f"decoding {points(phase['decode'])}, in both {points(phase['both'])}; at the image alone "
        f"{points(where['image'])}, at the question {points(where['question'])}, at the last position "
        f"{points(where['last'])}."
    )
    numbers: dict[str, Any] = {"phase": phase, "positions": where, "answer_tokens": tokens}
    holds, several = None, bool((lengths > 1).any())
    if several:
        costs = {name: bench.cost(top, phase=name) for name in ("prefill", "decode")}
        gap, random = drop(costs["prefill"] - costs["decode"]), drop(bench.band("random", len(top), phase="decode"))
        later = {name: _later(bench, top, name) for name in ("prefill", "decode", "both")}
        numbers |= {"later_tokens": later, "difference": gap.as_dict(), "random_decode": random.as_dict()}
        of_later = ", ".join(f"{points(cost)} ({name})" for name, cost in later.items())
        text += (
            f" The share of correct tokens after the first falls by {of_later}. Random heads masked in decoding cost "
            f"{points(random)}; prefill costs {points(gap)} more than decoding."
        )
        holds = True if gap.low > 0 else False if gap.high < 0 else None
    claim = "Masking in decoding alone does far less than in prefill (42.8 against 0.0 right)."
    return Point("phases", claim, text, numbers, holds, decides=several, published=published("2605.27243"))


def _written(tokens: float) -> str:
    if tokens == 1:
        return "A one-token answer is written by the last position of the prompt, so nothing is decoded before it."
    return f"Answers have {tokens:.1f} tokens."


def _later(bench: Bench, heads: Heads, phase: str) -> dict[str, float]:
    """The share of right tokens after the first that is lost, over answers that have any, paired by sample."""
    before, after = bench.later_tokens(), bench.later_tokens(heads, phase=phase)
    asked = ~np.isnan(before)
    return drop(before[asked] - after[asked]).as_dict()


DISPUTES: dict[str, Callable[[Bench], Point]] = {"methods": methods, "queries": queries, "phases": phases}
