"""Visual haystacks: generated questions with known evidence, in four domains that mirror those of the papers.

=============  ==========================================================  ==================  ===================
domain         what is shown                                               evidence            stands for
=============  ==========================================================  ==================  ===================
``grounding``  handwritten digits in coloured frames on a photograph,      the frame's `Box`   RefCOCOg
               among loose digits and coloured blobs
``documents``  a score sheet: printed names, handwritten scores            the line's `Box`    MMDocIR
``pages``      three score sheets, one with the name asked about           the page (`Pages`)  MMLongBench
``video``      framed digits that come and go over a moving photograph     the `Frames`        VidSTG
=============  ==========================================================  ==================  ===================

``pages`` and ``video`` can be of any length (``n_pictures``): sixty-four pages or two hundred frames come to a thousand
visual tokens or more. The number of items asked about stays the same; half of the added room is filled with lines (or
framed digits) of names (or colours) that recur again and again and are never asked about.

Real pixels are used where they are available offline: handwriting from scikit-learn's ``load_digits`` (UCI, 1998) and
its two photographs; names are set in Pillow's own font. Every sample carries its *counterfactual partner*: the same
pictures with only the evidence's digit (or name, if asked for) rewritten, so the answer changes and no position moves.

    >>> samples = haystacks("grounding", n=2, seed=0)
    >>> samples[0].answer != samples[0].counterfactual.answer
    True

Handwriting is split once and for all: ``split="train"`` draws from four fifths of the digits, ``"test"`` from the rest.
"""

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from mech.arguments import Count, Seed, checking, one_of
from mech.data import answers
from mech.data.drawing import (
    CELL,
    COLOURS,
    NAMES,
    SIDE,
    VIDEO_SIDE,
    Picture,
    clutter,
    frame_digits,
    glyphs,
    paper,
    photo_crop,
    write_line,
)
from mech.data.regions import Box, Frames, Pages, Passage, Region
from mech.data.samples import Distractor, Sample, Samples, Span
from mech.errors import InputError

PICTURES = {"grounding": 1, "documents": 1, "pages": 3, "video": 8}  # how many a scene shows by default
LONG = ("pages", "video")  # domains that can show more

Place = tuple[int, Any]  # a picture and where in it

QUESTIONS = answers.QUESTIONS["digit"]
DOMAINS = tuple(QUESTIONS)
MOST = {"grounding": 12, "documents": 6, "pages": 12, "video": 8}  # items of the hardest scene, the default
MOST_NUMBERS = dict(MOST, grounding=8)  # a number is three cells wide


@dataclass(frozen=True)
class Item:
    """One thing that can be asked about: the ``digits`` (drawn as ``glyphs``, a cell each) that belong to ``key``."""

    key: str
    digits: tuple[int, ...]
    glyphs: tuple[int, ...] = field(repr=False)
    picture: int  # the image, or the first of the two frames, that shows it
    x: int
    y: int

    @property
    def number(self) -> str:
        return "".join(map(str, self.digits))


@dataclass(frozen=True)
class Scene:
    """A background and the items on it; drawing the same scene twice gives the same pixels."""

    domain: str
    canvas: tuple[Picture, ...] = field(repr=False)
    items: tuple[Item, ...]

    def pictures(self) -> tuple[Image.Image, ...]:
        """The images, or the frames of the video."""
        canvas = [picture.copy() for picture in self.canvas]
        for item in self.items:
            _draw(self.domain, canvas, item)
        return tuple(Image.fromarray(picture) for picture in canvas)

    def evidence(self, item: Item) -> Region:
        if self.domain == "pages":
            return Pages(item.picture)
        if self.domain == "video":
            return Frames(item.picture, item.picture + 1)
        return self.box(item)

    def box(self, item: Item) -> Box:
        """The pixels of an item alone: a frame, or a line."""
        where = {"frame" if self.domain == "video" else "image": item.picture}
        if self.domain in ("documents", "pages"):
            return Box(0, item.y, SIDE, item.y + CELL, **where)
        return Box(item.x, item.y, item.x + CELL * len(item.digits) - 2, item.y + 14, **where)

    def distractors(self, item: Item, answer: str, form: str) -> tuple[Distractor, ...]:
        """The other items that lie outside this one's evidence and have another answer."""
        # In pages and frames the evidence is the whole picture, in text only one line.
        whole = self.domain in ("pages", "video") and form == "pictures"
        others = [
            other for other in self.items
            if other.number != item.number and other.key != item.key and not (whole and other.picture == item.picture)
        ]  # fmt: skip
        return tuple(
            Distractor(
                self.box(other) if form == "pictures" else self.written(other)[1],
                answers.answer_to(answer, self.domain, other.key, other.number),
            )
            for other in others
        )

    def shown(self, item: Item, part: int | None) -> tuple[Region, ...]:
        """Where a part of an item is drawn: a digit in its cell, or (None) the name, or the frame of that colour."""
        line, video = self.domain in ("documents", "pages"), self.domain == "video"
        if part is None:
            x, width = (0, 2 * CELL) if line else (item.x, CELL * len(item.digits) - 2)
        else:
            x, width = (item.x - 2, CELL - 4) if line else (item.x, CELL - 2)
            x += CELL * part
        box = Box(x, item.y, x + width, item.y + (CELL if line else 14), image=0 if video else item.picture)
        return tuple(replace(box, frame=item.picture + k) for k in (0, 1)) if video else (box,)

    def rewritten(self, index: int, **changes) -> "Scene":
        """The same scene with another last digit, or another key, at one item."""
        items = list(self.items)
        items[index] = replace(items[index], **changes)
        return replace(self, items=tuple(items))

    def sample(self, index: int, question: str, id: str, answer: str = "digit", form: str = "pictures") -> Sample:
        """The question about one item, over the pictures or over the scene written out."""
        item, pictures, context = self.items[index], (), ""
        answered = answers.answer_to(answer, self.domain, item.key, item.number)
        evidence, where = self.evidence(item), functools.partial(self.shown, item)
        if form == "pictures":
            pictures = self.pictures()
        else:
            context, evidence = self.written(item)
            where = functools.partial(_passage, item, evidence)
        return Sample(
            question=question.format(key=item.key, number=item.number),
            answer=answered,
            images=() if self.domain == "video" else pictures,
            video=pictures if self.domain == "video" else (),
            evidence=(evidence,),
            domain=f"{self.domain}-text" if context else self.domain,
            id=id,
            distractors=self.distractors(item, answer, form),
            spans=() if answer == "digit" else tuple(
                Span(first, first + length, where(part)) for first, length, part in _parts(item, answered)
            ),
            context=context,
        )  # fmt: skip

    def written(self, item: Item) -> tuple[str, Passage]:
        """The scene written out, one line per item in reading order, and the line of this item."""
        line = "{}: {}" if self.domain in ("documents", "pages") else "{} frame: {}"
        order = sorted(self.items, key=lambda item: (item.picture, item.y, item.x))
        lines = [line.format(entry.key, entry.number) for entry in order]
        start = sum(len(entry) + 1 for entry in lines[: order.index(item)])
        return "".join(f"{entry}\n" for entry in lines), Passage(start, start + len(lines[order.index(item)]))


def _passage(item: Item, line: Passage, part: int | None) -> tuple[Region, ...]:
    """Where a part of an item is written: a digit, or (None) the key, with which the line begins."""
    start = line.start if part is None else line.stop - len(item.digits) + part
    return (Passage(start, start + (len(item.key) if part is None else 1)),)


def _parts(item: Item, answer: str) -> Iterator[tuple[int, int, int | None]]:
    """(first character, length, digit) of each part of an answer that appears in the scene; None is the key."""
    if item.key in answer:
        yield answer.index(item.key), len(item.key), None
    if item.number in answer:
        start = answer.index(item.number)
        yield from ((start + k, 1, k) for k in range(len(item.digits)))


@checking(InputError)
def haystacks(
    domain: one_of(DOMAINS),
    n: Count,
    seed: Seed = 0,
    *,
    n_items: Count | None = None,
    n_pictures: Count | None = None,
    split: one_of(("train", "test")) = "test",
    answer: one_of(answers.ANSWERS) = "digit",
    form: one_of(("pictures", "text")) = "pictures",
) -> Samples:
    """``n`` samples of one domain, each with its counterfactual partner.

    Args:
        domain: ``grounding``, ``documents``, ``pages`` or ``video``.
        n: how many samples; sample ``i`` does not depend on ``n``.
        seed: a different seed gives different scenes.
        n_items: how many items in a scene can be asked about; the hardest setting by default.
        n_pictures: how many pages (by default 3) or frames (by default 8, always even) are shown.
        split: ``"test"`` draws handwriting that the reference models never saw, ``"train"`` what they learned from.
        answer: what is asked for: a ``digit``, a ``number`` of three digits, the ``name`` (or colour) that a number
            belongs to, or a ``sentence`` with name and number (see ``mech.data.answers``). For numbers and sentences,
            the counterfactual's answer diverges late: only the last digit differs.
        form: ``"pictures"``, or ``"text"``: the same scenes written out as the ``context`` of the question, under the
            same ids, in domains called ``grounding-text`` and so on. Shows what a model does with words, compared with
            pixels.

    Raises:
        InputError: an unknown domain, split, answer or form, more items than fit, too few pictures.
    """
    most = (MOST if answers.digits_of(answer) == 1 else MOST_NUMBERS)[domain]
    items = most if n_items is None else n_items
    if not 1 <= items <= most:
        raise InputError(f"n_items={items}", f"1 to {most} for {domain!r}", f"leave it out for {most}")
    least = PICTURES[domain]
    shown = least if n_pictures is None else n_pictures
    if shown != least and (domain not in LONG or shown < least or (domain == "video" and shown % 2)):
        expected = {"pages": "3 pages or more", "video": "an even number of frames, 8 or more"}.get(domain, "one image")
        raise InputError(f"n_pictures={shown} of {domain!r}", expected, "leave it out, or use 'pages' or 'video'")
    name = domain if shown == least else f"{domain}/{shown}"
    name = name if answer == "digit" else f"{name}/{answer}"
    asked = functools.partial(_sample, domain, n_items=items, n_pictures=shown, split=split, answer=answer, form=form)
    return Samples([asked(f"{name}/{split}/{seed}/{i}") for i in range(n)])


def _sample(domain: str, id: str, *, n_items: int, n_pictures: int, split: str, answer: str, form: str) -> Sample:
    rng = random.Random(id)
    scene = draw_scene(domain, rng, n_items, split, n_pictures, answers.digits_of(answer))
    index = rng.randrange(len(scene.items))
    question = rng.choice(answers.QUESTIONS[answer][domain])
    item = scene.items[index]
    if answer == "name":
        taken = {item.key for item in scene.items}
        partner = scene.rewritten(index, key=rng.choice([key for key in _keys(domain) if key not in taken]))
    else:
        other = rng.choice([value for value in range(10) if value != item.digits[-1]])
        drawn = rng.choice(glyphs(split)[other])
        partner = scene.rewritten(index, digits=(*item.digits[:-1], other), glyphs=(*item.glyphs[:-1], drawn))
    sample = scene.sample(index, question, id, answer, form)
    theirs = partner.sample(index, question, f"{id}/counterfactual", answer, form)
    # Identical pictures are stored once: a long sample has hundreds of them.
    shared = {
        kind: tuple(
            a if a.tobytes() == b.tobytes() else b for a, b in zip(getattr(sample, kind), pictures, strict=True)
        )
        for kind, pictures in (("images", theirs.images), ("video", theirs.video))
    }
    return replace(sample, counterfactual=replace(theirs, **shared))


def draw_scene(
    domain: str, rng: random.Random, n_items: int, split: str, n_pictures: int | None = None, n_digits: int = 1
) -> Scene:
    """A random scene of one domain with ``n_items`` items of ``n_digits``, fully determined by ``rng``.

    Numbers of several digits are all different, so that a number identifies its item.
    """
    scene = _DRAW[domain](rng, n_items, n_pictures or PICTURES[domain], split, n_digits)
    known: set[str] = set()
    for index, item in enumerate(scene.items if n_digits > 1 else ()):
        while item.number in known:
            digits, drawn = _digits(rng, split, n_digits)
            item = replace(item, digits=digits, glyphs=drawn)
        known.add(item.number)
        scene = scene.rewritten(index, digits=item.digits, glyphs=item.glyphs)
    return scene


def _keys(domain: str) -> tuple[str, ...]:
    return NAMES if domain in ("documents", "pages") else tuple(COLOURS)


def _cells(side: int, n_digits: int) -> list[tuple[int, int]]:
    """Where items can be, as (column, row) of their first cell: side by side without a gap."""
    n = side // CELL
    return [(col, row) for row in range(n) for col in range(0, n - n_digits + 1, n_digits)]


def _grounding(rng: random.Random, n_items: int, n_pictures: int, split: str, n_digits: int) -> Scene:
    cells = _cells(SIDE, n_digits)
    rng.shuffle(cells)
    canvas = photo_crop(rng, SIDE)
    for cell in cells[n_items : n_items + rng.randint(2, 6)]:
        clutter(canvas, *_jittered(rng, cell), rng, split)
    keys = rng.sample(list(COLOURS), n_items)
    items = tuple(
        _item(rng, key, split, 0, *_jittered(rng, cell), n_digits) for key, cell in zip(keys, cells, strict=False)
    )
    return Scene("grounding", (canvas,), items)


def _score_at(rng: random.Random, n_digits: int) -> int:
    """Where the first digit of a line begins: one digit stands in the fifth of six cells, three in the last three."""
    return (66 if n_digits == 1 else SIDE - CELL * n_digits + 2) + rng.randint(0, 4)


def _documents(rng: random.Random, n_items: int, n_pictures: int, split: str, n_digits: int) -> Scene:
    lines = rng.sample(range(SIDE // CELL), n_items)
    keys = rng.sample(NAMES, n_items)
    items = tuple(
        _item(rng, key, split, 0, _score_at(rng, n_digits), CELL * line, n_digits)
        for key, line in zip(keys, lines, strict=True)
    )
    return Scene("documents", (paper(rng),), items)


def _pages(rng: random.Random, n_items: int, n_pictures: int, split: str, n_digits: int) -> Scene:
    lines = [(page, line) for page in range(n_pictures) for line in range(SIDE // CELL)]
    keys = rng.sample(NAMES, n_items)
    places = rng.sample(lines, n_items)
    items = tuple(
        _item(rng, key, split, page, _score_at(rng, n_digits), CELL * line, n_digits)
        for key, (page, line) in zip(keys, places, strict=True)
    )
    canvas = [paper(rng) for _ in range(n_pictures)]
    if n_pictures > PICTURES["pages"]:
        for key, (page, line) in _filling(rng, NAMES, keys, lines, places):
            _draw("pages", canvas, _item(rng, key, split, page, _score_at(rng, n_digits), CELL * line, n_digits))
    return Scene("pages", tuple(canvas), items)


def _video(rng: random.Random, n_items: int, n_pictures: int, split: str, n_digits: int) -> Scene:
    photo = photo_crop(rng, VIDEO_SIDE + PICTURES["video"])
    # The camera goes one way and, in a longer video, back again.
    swing = [*range(PICTURES["video"]), *range(PICTURES["video"] - 2, 0, -1)]
    shifts = [swing[t % len(swing)] for t in range(n_pictures)]
    frames = [photo[t : t + VIDEO_SIDE, t : t + VIDEO_SIDE].copy() for t in shifts]
    cells = [(2 * shot, cell) for shot in range(n_pictures // 2) for cell in _cells(VIDEO_SIDE, n_digits)]
    keys = rng.sample(list(COLOURS), n_items)
    places = rng.sample(cells, n_items)
    items = tuple(
        _item(rng, key, split, frame, *_jittered(rng, cell), n_digits)
        for key, (frame, cell) in zip(keys, places, strict=True)
    )
    if n_pictures > PICTURES["video"]:
        for key, (frame, cell) in _filling(rng, tuple(COLOURS), keys, cells, places):
            _draw("video", frames, _item(rng, key, split, frame, *_jittered(rng, cell), n_digits))
    return Scene("video", tuple(frames), items)


def _filling(
    rng: random.Random, keys: Sequence[str], asked: Sequence[str], places: Sequence[Place], taken: Sequence[Place]
) -> list[tuple[str, Place]]:
    """Fill half of the free places with keys that are never asked about, each many times."""
    others = [key for key in keys if key not in asked]
    free = [place for place in places if place not in set(taken)]
    return [(rng.choice(others), place) for place in free if rng.random() < 0.5]


_DRAW: dict[str, Callable[[random.Random, int, int, str, int], Scene]] = {
    "grounding": _grounding,
    "documents": _documents,
    "pages": _pages,
    "video": _video,
}


def _item(rng: random.Random, key: str, split: str, picture: int, x: int, y: int, n_digits: int) -> Item:
    digits, drawn = _digits(rng, split, n_digits)
    return Item(key, digits, drawn, picture, x, y)


def _digits(rng: random.Random, split: str, n_digits: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Digits, the first of several never 0, and the handwritten glyphs that show them."""
    pairs = [(value := rng.randrange(n_digits > 1 and not place, 10), rng.choice(glyphs(split)[value]))
             for place in range(n_digits)]  # fmt: skip
    return tuple(value for value, _ in pairs), tuple(glyph for _, glyph in pairs)


def _draw(domain: str, canvas: list[Picture], item: Item) -> None:
    if domain in ("documents", "pages"):
        write_line(canvas[item.picture], item.key, item.glyphs, item.x, item.y)
    else:
        for picture in canvas[item.picture : item.picture + (2 if domain == "video" else 1)]:
            frame_digits(picture, item.key, item.glyphs, item.x, item.y)


def _jittered(rng: random.Random, cell: tuple[int, int]) -> tuple[int, int]:
    return cell[0] * CELL + rng.randint(0, 2), cell[1] * CELL + rng.randint(0, 2)
