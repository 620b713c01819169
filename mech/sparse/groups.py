"""Sets of heads by KV group, so that sets of equal size cost the same compute *and* the same cache.

    groups = grouped(ranking, model.cfg)              # a Ranking whose "heads" are key/value heads
    heads  = expanded(groups.top(0.1), model.cfg)     # all query heads of the best tenth of the KV heads

Under grouped-query attention the cache keeps a KV group whole as soon as one of its query heads is dense, so ``k``
query heads of one ranking may cost a quarter of the bytes of ``k`` heads of another. Rankings are therefore compared
by whole groups. Without grouping (as many KV heads as query heads) nothing changes.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from mech.errors import ExperimentError
from mech.experiments.ranking.ranking import Head, Heads, Ranking
from mech.model.architectures.families import ModelConfig
from mech.sparse.policy import refuse_other_ranking


def grouped(ranking: Ranking, cfg: ModelConfig) -> Ranking:
    """The ranking of KV heads: a group scores as much as its best query head.

    Raises:
        ExperimentError: a ranking of another model.
    """
    refuse_other_ranking(ranking, cfg)
    best = ranking.mean.reshape(*ranking.mean.shape[:1], cfg.n_kv_heads, -1).max(-1)
    return replace(ranking, mean=best, per_example=None)


def expanded(groups: Iterable[tuple[int, int]], cfg: ModelConfig) -> Heads:
    """All query heads of these (layer, KV head) pairs."""
    per_group = cfg.n_heads // cfg.n_kv_heads
    return tuple(Head(layer, group * per_group + i) for layer, group in groups for i in range(per_group))


def lowest_groups(ranking: Ranking, cfg: ModelConfig, n: int) -> Heads:
    """The heads of the ``n`` lowest KV groups of *every* layer: what ``prune_heads`` can take out of a file.

    Raises:
        ExperimentError: fewer than one group, or all of them; a ranking of another model.
    """
    if not 1 <= n < cfg.n_kv_heads:
        raise ExperimentError(f"{n} KV groups of every layer", f"1 to {cfg.n_kv_heads - 1} in this model")
    scores = grouped(ranking, cfg).mean
    lowest = np.sort(np.argsort(scores, axis=1, kind="stable")[:, :n], axis=1)
    return expanded(((layer, int(g)) for layer, row in zip(ranking.layers, lowest, strict=True) for g in row), cfg)
