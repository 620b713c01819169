"""Are there retrieval heads at all? A test that finds none where there are none, at the error rate it claims.

    found = retrieval_test(model, samples)              # or score="vera", or any Score of the question's rows
    found["p_value"].sel(layer=3, head=5)               # corrected over all heads
    found.attrs["heads"]                                # [[layer, head], ...] beyond chance; [] for none

Every ranking has a first head, even with random weights. That a head exceeds its size null proves nothing: a random
head may prefer pictures to text, or near tokens to far ones, and this alone beats even attention. A region elsewhere is
no sufficient control either: a head that attends to every object, whatever the question, prefers evidence to
background. A head *retrieves* if its attention to the evidence depends on the question that asks for it. So samples are
paired, the questions of each pair are exchanged, and the two sums are compared. If attention does not follow the
question, either sum is equally likely to be the larger.

Samples with the same question count as one draw: a random head that happens to match the word "red" with red pixels
does so in every picture. Pairs are therefore pairs of *questions*, and all samples of two questions count once.

To check the test with shuffled labels, shuffle them between pictures, not within one. If a box moves to where another
picture has its evidence, it sometimes lands on the right place, and its own question gains: heads that retrieve are
named, and rightly. If it is never allowed to land there, only other questions gain, and no head is ever named. Neither
is a valid null. Moving a question with its box into another picture is one: there it is as wrong as any other.

The test does not say whether a head is needed (``mech.ablation``) or how strong it is (``mech.rank_heads``).
"""

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import xarray as xr
from jaxtyping import Float

from mech.arguments import Count, Progress, Seed, Share, checked
from mech.axes import HEAD, LAYER
from mech.data.samples import Sample, Samples, SomeSamples
from mech.errors import ExperimentError
from mech.experiments.scores.measure import head_scores
from mech.experiments.scores.published import Score, score_called
from mech.model import HookedMLLM

MOST_ENUMERATED = 12  # pairs of questions: 4,096 ways to exchange them
ROUNDING = 1e-6  # error of float32 sums, as a share of the highest score


@checked
def retrieval_test(
    model: HookedMLLM,
    samples: SomeSamples,
    score: str | Score = "ram",
    *,
    alpha: Share = 0.05,
    n_permutations: Count = 4000,
    batch_size: Count = 8,
    seed: Seed = 0,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Which heads attend to the evidence *because* the question asks for it, corrected over all heads.

    For a pair of samples (1, 2), ``D = s(q1, E1) + s(q2, E2) - s(q2, E1) - s(q1, E2)``, where ``s(q, E)`` is the score
    of a head on evidence E, in E's own picture, under question q. D is summed over samples with the same two questions.
    If attention to evidence does not depend on the question, exchanging the questions only changes the sign of D. Signs
    are flipped, and the largest ``sum D / sqrt(sum D^2)`` over heads is compared (max-T). If there is no retrieval
    head, the probability of naming *any* is at most ``alpha``, exactly, whatever the dependence between heads.

    Sign: ``difference`` is positive if the right question makes the head attend. Unit: that of the score.

    Args:
        samples: samples with evidence and many different questions; questions, and so samples, are paired at random.
        score: a name of ``PUBLISHED`` or a ``Score``, read at the question's rows or the last one, on evidence.
        alpha: heads with an adjusted p-value of at most this are named.
        n_permutations, seed: sign flips to draw for more than 12 pairs of questions; up to 12, all are enumerated.
        batch_size: samples per forward.
        progress: called with (samples done, samples in total), for each of the two readings.

    Returns:
        ``difference`` (mean of D / 2) and ``p_value`` (adjusted, one-sided) over layer, head; ``attrs``: ``heads`` (the
        named ones, best first), ``n_pairs`` (of samples), ``n_questions`` (pairs of them), ``smallest_p``, ``alpha``.

    Raises:
        ExperimentError: a score that cannot depend on the question in this way, or too few different questions for
            ``alpha``.

    Cost: two passes of the score.

    References: Westfall & Young 1993 (max-T); Phipson & Smyth 2010, arXiv 1603.05766 (permutation p-values).
    """
    measured = score if isinstance(score, Score) else score_called(score)
    if measured.queries not in ("question", "last") or measured.on != "evidence" or measured.aggregate != "mean":
        raise ExperimentError(
            f"{measured!r}", 'queries="question" or "last", on="evidence", aggregate="mean"', 'use score="ram"'
        )
    pairs = question_pairs(samples, seed)
    asked_by = [frozenset((first.question.strip(), second.question.strip())) for first, second in pairs]
    n_draws = len(set(asked_by))
    smallest = 1 / (2**n_draws if n_draws <= MOST_ENUMERATED else n_permutations + 1)
    if smallest > alpha:
        raise ExperimentError(
            f"{n_draws} pairs of different questions, {n_permutations} permutations",
            f"a smallest p-value of {alpha} or less, not {smallest:.3g}",
            "give more samples, with more different questions",
        )
    own = [sample for pair in pairs for sample in pair]
    other = [replace(a, question=b.question) for pair in pairs for a, b in (pair, pair[::-1])]
    asked, swapped = (
        head_scores(model, rows, {"score": measured}, batch_size=batch_size, seed=seed, progress=progress)["score"]
        for rows in (own, other)
    )
    difference, p_value = _tested(asked.values, swapped.values, asked_by, n_permutations, seed)
    mean = difference.mean(axis=0) / 2
    layers = asked[LAYER].values
    best = sorted(map(tuple, np.argwhere(p_value <= alpha).tolist()), key=lambda at: (p_value[at], -mean[at]))
    return xr.Dataset(
        {"difference": ((LAYER, HEAD), mean), "p_value": ((LAYER, HEAD), p_value)},
        {LAYER: layers, HEAD: asked[HEAD].values},
        {
            "heads": [[int(layers[row]), head] for row, head in best],
            "n_pairs": len(pairs),
            "n_questions": n_draws,
            "smallest_p": smallest,
            "alpha": alpha,
            "model": model.name,
            "score": measured.definition,
        },
    )


def _tested(
    asked: Float[np.ndarray, "example layer head"],
    swapped: Float[np.ndarray, "example layer head"],
    asked_by: Sequence[frozenset[str]],
    n_permutations: int,
    seed: int,
) -> tuple[Float[np.ndarray, "pair layer head"], Float[np.ndarray, "layer head"]]:
    """The difference of every pair of samples, and the p-value of every head; signs are flipped per question pair."""
    gain = asked - swapped
    difference = gain.reshape(len(asked_by), 2, *gain.shape[1:]).sum(axis=1)
    draws = list(dict.fromkeys(asked_by))
    together = np.stack([difference[[draw == by for by in asked_by]].sum(axis=0) for draw in draws])
    # t is scale-free, so differences within rounding error would count as much as real ones.
    together[np.abs(together) < ROUNDING * np.abs(asked).max()] = 0
    p_value = max_t(together.reshape(len(draws), -1), n_permutations, seed)
    return difference, p_value.reshape(difference.shape[1:])


def question_pairs(samples: Samples | Sequence[Sample], seed: int = 0) -> list[tuple[Sample, Sample]]:
    """Disjoint pairs of samples with different questions, each question paired with one other; the rest is left out.

    Questions are paired at random with questions that are asked equally often, so that few samples have no partner.
    """
    rng, asking = random.Random(seed), {}
    for sample in rng.sample(list(samples), len(samples)):
        asking.setdefault(sample.question.strip(), []).append(sample)
    groups = sorted(asking.values(), key=len, reverse=True)  # stable sort: random order among groups of one size
    return [
        pair
        for ones, others in zip(groups[::2], groups[1::2], strict=False)
        for pair in zip(ones, others, strict=False)
    ]


def max_t(
    difference: Float[np.ndarray, "pair head"], n_permutations: int = 4000, seed: int = 0
) -> Float[np.ndarray, " head"]:
    """One-sided p-values of every head's mean difference under sign flips, adjusted by the largest over heads.

    ``p_h = share of flips f with max_g t_g(f) >= t_h``, including the identity, so that it is never 0.
    """
    # Flips leave the sum of squares unchanged, so it serves as the scale of t for every flip.
    size = np.sqrt((difference**2).sum(axis=0))
    scaled = np.divide(difference, size, out=np.zeros_like(difference, dtype=float), where=size > 0)
    n = len(difference)
    if n <= MOST_ENUMERATED:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        drawn = np.random.default_rng(seed).integers(0, 2, (n_permutations, n))
        signs = np.concatenate([np.ones((1, n)), 1.0 - 2.0 * drawn])
    largest = (signs @ scaled).max(axis=1)
    return (largest[:, None] >= scaled.sum(axis=0) - 1e-9).mean(axis=0)
