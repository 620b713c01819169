"""Named sets of heads: what an experiment compares."""

from collections.abc import Sequence
from dataclasses import dataclass

from mech.experiments.ranking.ranking import Heads, Ranking


@dataclass(frozen=True)
class HeadSet:
    """A set of heads, with its band and, if it is random, the number of the draw."""

    band: str
    draw: int
    heads: Heads


def head_sets(ranking: Ranking, bands: Sequence[str], heads: float, n_random: int, seed: int) -> list[HeadSet]:
    """The sets of the bands: ``top``, ``bottom``, ``all``, and ``random``, which contains no top heads."""
    top = ranking.top(heads)
    single = {"top": lambda: top, "bottom": lambda: ranking.bottom(heads), "all": lambda: ranking.heads}
    sets = []
    for band in bands:
        drawn = ranking.random(heads, n_random, seed, exclude=top) if band == "random" else [single[band]()]
        sets += [HeadSet(band, draw, chosen) for draw, chosen in enumerate(drawn)]
    return sets
