"""Pictures for planted circuits: a grid of cells, each a left and a right colour; and the questions about them.

    sample = scene("fill", words="", rng=random.Random(0), name="first")      # sample.counterfactual is its corruption

Half of the colours are names and half are answers, so that no cell says its own name. Nothing here depends on models.
"""

import random
from collections.abc import Mapping

from PIL import Image, ImageDraw

from mech.data.regions import Box
from mech.data.samples import Distractor, Sample
from mech.reference.planted.planting import CELL, COLOURS, SIDE

GREY = "grey"  # no colour: what an empty half of a cell shows


def scene(corruption: str, words: str, rng: random.Random, name: str) -> Sample:
    """A picture of four pairs of neighbouring cells, and a question about it.

    The left cell of a pair has a name and a fill, the right one a fill only. The pair that is asked for is in the lower
    half: near enough to the question for a head that attends to what is near.
    """
    names = rng.sample(COLOURS, 4)
    others = [colour for colour in COLOURS if colour not in names]
    pairs = [rng.randrange(4, 8)]
    pairs += rng.sample([pair for pair in range(8) if pair != pairs[0]], 3)
    fills = [*rng.sample(others, 4), *rng.sample(others, 4)]  # of the left cells, of the right cells
    # The evidence is the cell with the name; where keys are composed, the one after it.
    behind = int(corruption == "order")

    def box_of(pair: int) -> Box:
        row, column = divmod(2 * pairs[pair] + behind, SIDE)
        return Box.from_xywh(column * CELL, row * CELL, CELL, CELL)

    def shown(names: list[str], fills: list[str], asked: int) -> tuple[str, str, Box, Image.Image]:
        cells = {2 * pair: (names[i], fills[i]) for i, pair in enumerate(pairs)}
        cells |= {2 * pair + 1: (GREY, fills[4 + i]) for i, pair in enumerate(pairs)}
        answer = fills[4 * behind + asked]
        return names[asked] + words, "none" if answer == GREY else answer, box_of(asked), _picture(cells)

    changed = {
        "fill": (names, [fills[1], *fills[1:]], 0),
        "removed": (names, [GREY, *fills[1:]], 0),
        "question": (names, fills, 1),
        "order": ([names[1], names[0], *names[2:]], fills, 1),
    }
    question, answer, box, picture = shown(names, fills, 0)
    theirs = shown(*changed[corruption])
    other = Sample(theirs[0], theirs[1], (theirs[3],), evidence=(theirs[2],), domain="planted", id=f"{name}-other")
    elsewhere = tuple(Distractor(box_of(pair), fills[4 * behind + pair]) for pair in (1, 2, 3))
    return Sample(
        question, answer, (picture,), evidence=(box,), domain="planted", id=name, counterfactual=other,
        distractors=elsewhere,
    )  # fmt: skip


def _picture(cells: Mapping[int, tuple[str, str]]) -> Image.Image:
    picture = Image.new("RGB", (SIDE * CELL, SIDE * CELL), (128, 128, 128))
    draw = ImageDraw.Draw(picture)
    for cell, halves in cells.items():
        row, column = divmod(cell, SIDE)
        for half, colour in enumerate(halves):
            if colour != GREY:
                x, y = column * CELL + half * CELL // 2, row * CELL
                # Levels 1 and 255 are equally far from 128, the grey that the image processor takes as zero.
                corner = COLOURS.index(colour)
                rgb = (255 if corner & 4 else 1, 255 if corner & 2 else 1, 255 if corner & 1 else 1)
                draw.rectangle((x, y, x + CELL // 2 - 1, y + CELL - 1), fill=rgb)
    return picture
