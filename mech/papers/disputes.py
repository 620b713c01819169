"""Three disputes between papers on retrieval heads: a function of a ``Bench`` for each, by name in ``DISPUTES``."""

from collections.abc import Callable
from itertools import combinations

import numpy as np

from mech.experiments.effects import points
from mech.experiments.ranking.agreement import agreement
from mech.experiments.ranking.ranking import rank_heads
from mech.experiments.scores.measure import head_scores
from mech.interventions import METHODS
from mech.papers.bench import Bench, Point, beyond_random, drop, heads_in

TOP = 0.05


def methods(bench: Bench) -> Point:
    """Zero, mean, resample, uniform and the paper's ablation of the same heads, beside random heads by each."""
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
        f"The top {heads_in(bench.ranking.count(TOP))} cost, by method: {costs}. Farthest apart are {a} and {b}: "
        f"{points(widest)}, which is {'a difference' if differ else 'no difference that is shown'}."
    )
    numbers = {"methods": rows, "widest": [a, b, widest.as_dict()]}
    claim = "'Masking a head' is one operation: papers zero it, spread it evenly, or replace it by its mean."
    return Point("methods", claim, text, numbers, not differ)


def queries(bench: Bench) -> Point:
    """Heads scored by the question's rows (RAM) against heads scored by the rows that write the answer."""
    found = head_scores(bench.model, bench.find, ("ram", "visual_retrieval"), seed=bench.seed)
    rankings = {name: rank_heads(found, name) for name in ("ram", "visual_retrieval")}
    k = bench.ranking.count(TOP)
    drops = {name: bench.cost(ranking.top(k)) for name, ranking in rankings.items()}
    random, gap = drop(bench.band("random", k)), drop(drops["visual_retrieval"] - drops["ram"])
    agreed = agreement(rankings, k).sel(ranking="ram", other="visual_retrieval")
    costs = {name: drop(lost).as_dict() for name, lost in drops.items()}
    wins = gap.low > 0
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
    claim = "Output-token rows find the heads that matter, input-query rows miss them (arXiv 2608.27417)."
    return Point("queries", claim, text, numbers, wins)


def phases(bench: Bench) -> Point:
    """Heads masked while the prompt is read, while the answer is written, and at which positions of the prompt."""
    top = bench.ranking.top(TOP)
    phase = {name: drop(bench.cost(top, phase=name)).as_dict() for name in ("prefill", "decode", "both")}
    where = {name: drop(bench.cost(top, positions=name)).as_dict() for name in ("image", "question", "last")}
    tokens = float(np.mean([len(answer) for answer in bench.questions.answers]))
    written = (
        "An answer of one token is written by the last position of the prompt: nothing is ever decoded before it."
        if tokens == 1
        else f"Answers have {tokens:.1f} tokens."
    )
    text = (
        f"{written} Masking the top {heads_in(len(top))} in prefill costs {points(phase['prefill'])}, in decoding "
        f"{points(phase['decode'])}, in both {points(phase['both'])}; at the image alone {points(where['image'])}, at "
        f"the question {points(where['question'])}, at the last position {points(where['last'])}."
    )
    less = phase["decode"]["high"] < phase["prefill"]["low"]
    claim = "Masking in decoding alone does far less than in prefill (arXiv 2605.27243: 42.8 against 0.0)."
    numbers = {"phase": phase, "positions": where, "answer_tokens": tokens}
    return Point("phases", claim, text, numbers, less if tokens > 1 else None)


DISPUTES: dict[str, Callable[[Bench], Point]] = {"methods": methods, "queries": queries, "phases": phases}
