"""Named sets of heads: what an experiment compares."""

from collections.abc import Sequence
from dataclasses import dataclass

from mech.experiments.ranking.ranking import Heads, Ranking


@dataclass(frozen=True)
class HeadSet:
    """A set of heads: the band it is of, and the number of the draw if it is random."""

    band: str
    draw: int
    heads: Heads


def head_sets(ranking: Ranking, bands: Sequence[str], heads: float, n_random: int, seed: int) -> list[HeadSet]:
    """The sets of the bands: ``top``, ``bottom``, ``all``, and ``random`` ones, none of whose heads is at the top."""
    top = ranking.top(heads)
    single = {"top": lambda: top, "bottom": lambda: ranking.bottom(heads), "all": lambda: ranking.heads}
    sets = []
    for band in bands:
        drawn = ranking.random(heads, n_random, seed, exclude=top) if band == "random" else [single[band]()]
        sets += [HeadSet(band, draw, chosen) for draw, chosen in enumerate(drawn)]
    return sets
