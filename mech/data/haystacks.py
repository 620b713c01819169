"""Visual haystacks: generated questions whose evidence is known, in four domains that mirror the literature's.

=============  ==========================================================  ==================  ===================
domain         what is shown                                               evidence            stands for
=============  ==========================================================  ==================  ===================
``grounding``  handwritten digits in coloured frames on a photograph,      the frame's `Box`   RefCOCOg
               among loose digits and coloured blobs
``documents``  a score sheet: printed names, handwritten scores            the line's `Box`    MMDocIR
``pages``      three score sheets, the asked name on one of them           the page (`Pages`)  MMLongBench
``video``      framed digits that come and go over a moving photograph     the `Frames`        VidSTG
=============  ==========================================================  ==================  ===================

``pages`` and ``video`` can be as long as one likes, with ``n_pictures``: sixty-four pages or two hundred frames are
some thousand visual tokens. What is asked about stays as much; the added room is half filled with lines (or framed
digits) of names (or colours) that occur again and again and are never asked about.

The pixels are real where they can be had offline: handwriting from scikit-learn's ``load_digits`` (UCI, 1998) and its
two photographs; names are set in Pillow's own font. Every sample carries its *counterfactual partner*: the same
pictures with only the evidence's digit rewritten, so that the answer changes and no position moves.

    >>> samples = haystacks("grounding", n=2, seed=0)
    >>> samples[0].answer != samples[0].counterfactual.answer
    True

Handwriting is split once and for all: ``split="train"`` draws from four fifths of the digits, ``"test"`` from the rest.
"""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from mech.data.regions import Box, Frames, Pages, Region
from mech.data.samples import Distractor, Sample, Samples
from mech.errors import InputError, suggestion

CELL = 16  # pixels; every object sits in a cell of this size, with a pixel of jitter
SIDE = 96  # pixels of an image's edge: 6 x 6 cells
VIDEO_SIDE = 64
PICTURES = {"grounding": 1, "documents": 1, "pages": 3, "video": 8}  # how many a scene shows by default
LONG = ("pages", "video")  # domains that can show more

Picture = UInt8[np.ndarray, "height width 3"]
Place = tuple[int, Any]  # a picture and where in it

COLOURS = {
    "red": (225, 25, 25),
    "orange": (255, 140, 0),
    "yellow": (250, 235, 20),
    "green": (20, 150, 40),
    "lime": (140, 255, 60),
    "cyan": (0, 225, 235),
    "blue": (30, 60, 230),
    "purple": (135, 30, 175),
    "pink": (255, 130, 205),
    "brown": (120, 65, 20),
    "gray": (128, 128, 128),
    "black": (0, 0, 0),
}
NAMES = (
    "Anna", "Ben", "Carl", "Dora", "Emil", "Fay", "Gus", "Hana",
    "Ivan", "June", "Kim", "Leo", "Mia", "Noor", "Olga", "Paul",
)  # fmt: skip
QUESTIONS = {
    "grounding": (
        "Which digit is in the {key} frame?",
        "What number does the {key} frame hold?",
        "Look at the {key} frame. Which digit is it?",
    ),
    "documents": (
        "What did {key} score?",
        "Which score does {key} have?",
        "Read the line of {key}. What is the score?",
    ),
    "pages": (
        "On these pages, what did {key} score?",
        "Which score does {key} have in these pages?",
        "Find the page of {key}. What is the score?",
    ),
    "video": (
        "Which digit appears in the {key} frame?",
        "What number does the {key} frame show in the video?",
        "Watch for the {key} frame. Which digit is it?",
    ),
}
DOMAINS = tuple(QUESTIONS)
MOST = {"grounding": 12, "documents": 6, "pages": 12, "video": 8}  # items of the hardest scene, the default


@dataclass(frozen=True)
class Item:
    """One thing that can be asked about: the digit ``value`` (drawn as ``glyph``) that belongs to ``key``."""

    key: str
    value: int
    glyph: int = field(repr=False)
    picture: int  # the image, or the first of the two frames, that shows it
    x: int
    y: int


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
            if self.domain in ("documents", "pages"):
                _write_line(canvas[item.picture], item)
            else:
                for picture in canvas[item.picture : item.picture + (2 if self.domain == "video" else 1)]:
                    _frame_digit(picture, item)
        return tuple(Image.fromarray(picture) for picture in canvas)

    def evidence(self, item: Item) -> Region:
        if self.domain == "pages":
            return Pages(item.picture)
        if self.domain == "video":
            return Frames(item.picture, item.picture + 1)
        return self.box(item)

    def distractors(self, item: Item) -> tuple[Distractor, ...]:
        """The other items that lie outside of this one's evidence and would be answered in another way."""
        whole = self.domain in ("pages", "video")  # their evidence is all of a picture
        return tuple(
            Distractor(self.box(other), str(other.value))
            for other in self.items
            if other.value != item.value and other.key != item.key and not (whole and other.picture == item.picture)
        )

    def box(self, item: Item) -> Box:
        """The pixels of an item alone: a frame, or a line."""
        place = {"frame" if self.domain == "video" else "image": item.picture}
        if self.domain in ("documents", "pages"):
            return Box(0, item.y, SIDE, item.y + CELL, **place)
        return Box(item.x, item.y, item.x + 14, item.y + 14, **place)

    def rewritten(self, index: int, value: int, glyph: int) -> "Scene":
        """The same scene with another digit at one item."""
        items = list(self.items)
        items[index] = replace(items[index], value=value, glyph=glyph)
        return replace(self, items=tuple(items))

    def sample(self, index: int, question: str, id: str = "", counterfactual: Sample | None = None) -> Sample:
        """The question about one item."""
        pictures, item = self.pictures(), self.items[index]
        return Sample(
            question=question.format(key=item.key),
            answer=str(item.value),
            images=() if self.domain == "video" else pictures,
            video=pictures if self.domain == "video" else (),
            evidence=(self.evidence(item),),
            domain=self.domain,
            id=id,
            counterfactual=counterfactual,
            distractors=self.distractors(item),
        )


def haystacks(
    domain: str,
    n: int,
    seed: int = 0,
    *,
    n_items: int | None = None,
    n_pictures: int | None = None,
    split: str = "test",
) -> Samples:
    """``n`` samples of one domain, each with its counterfactual partner.

    Args:
        domain: ``grounding``, ``documents``, ``pages`` or ``video``.
        n: how many samples; sample ``i`` does not depend on ``n``.
        seed: another seed, other scenes.
        n_items: how many items that can be asked about a scene holds; the hardest setting by default.
        n_pictures: how many pages (by default 3) or frames (by default 8, always even) are shown.
        split: ``"test"`` draws handwriting that the reference models never saw, ``"train"`` what they learned from.

    Raises:
        InputError: an unknown domain or split, more items than the scene has room for, fewer pictures than the default.
    """
    if domain not in DOMAINS:
        raise InputError(f"no haystack domain is called {domain!r}", ", ".join(DOMAINS), suggestion(domain, DOMAINS))
    if split not in ("train", "test"):
        raise InputError(f"split={split!r}", "'train' or 'test'", "use split='test' to measure, 'train' to train")
    most = MOST[domain]
    n_items = most if n_items is None else n_items
    if not 1 <= n_items <= most:
        raise InputError(f"n_items={n_items}", f"1 to {most} for {domain!r}", f"leave it out for {most}")
    if n < 1:
        raise InputError(f"n={n}", "at least one sample", "use n=100")
    least = PICTURES[domain]
    shown = least if n_pictures is None else n_pictures
    if shown != least and (domain not in LONG or shown < least or (domain == "video" and shown % 2)):
        expected = {"pages": "3 pages or more", "video": "an even number of frames, 8 or more"}.get(domain, "one image")
        raise InputError(f"n_pictures={shown} of {domain!r}", expected, "leave it out, or use 'pages' or 'video'")
    name = domain if shown == least else f"{domain}/{shown}"
    return Samples([_sample(domain, f"{name}/{split}/{seed}/{i}", n_items, shown, split) for i in range(n)])


def _sample(domain: str, id: str, n_items: int, n_pictures: int, split: str) -> Sample:
    rng = random.Random(id)
    scene = draw_scene(domain, rng, n_items, split, n_pictures)
    index = rng.randrange(len(scene.items))
    question = rng.choice(QUESTIONS[domain])
    other = rng.choice([value for value in range(10) if value != scene.items[index].value])
    partner = scene.rewritten(index, other, rng.choice(glyphs(split)[other]))
    sample = scene.sample(index, question, id)
    theirs = partner.sample(index, question, f"{id}/counterfactual")
    # Pictures that do not differ are held once: a long sample has hundreds of them.
    shared = {
        kind: tuple(
            a if a.tobytes() == b.tobytes() else b for a, b in zip(getattr(sample, kind), pictures, strict=True)
        )
        for kind, pictures in (("images", theirs.images), ("video", theirs.video))
    }
    return replace(sample, counterfactual=replace(theirs, **shared))


def draw_scene(domain: str, rng: random.Random, n_items: int, split: str, n_pictures: int | None = None) -> Scene:
    """A random scene of one domain with ``n_items`` items, everything decided by ``rng``."""
    return _DRAW[domain](rng, n_items, n_pictures or PICTURES[domain], split)


def _grounding(rng: random.Random, n_items: int, n_pictures: int, split: str) -> Scene:
    cells = [(col, row) for row in range(SIDE // CELL) for col in range(SIDE // CELL)]
    rng.shuffle(cells)
    canvas = _photo_crop(rng, SIDE)
    for cell in cells[n_items : n_items + rng.randint(2, 6)]:
        _clutter(canvas, *_jittered(rng, cell), rng, split)
    keys = rng.sample(list(COLOURS), n_items)
    items = tuple(_item(rng, key, split, 0, *_jittered(rng, cell)) for key, cell in zip(keys, cells, strict=False))
    return Scene("grounding", (canvas,), items)


def _documents(rng: random.Random, n_items: int, n_pictures: int, split: str) -> Scene:
    lines = rng.sample(range(SIDE // CELL), n_items)
    keys = rng.sample(NAMES, n_items)
    items = tuple(
        _item(rng, key, split, 0, 66 + rng.randint(0, 4), CELL * line) for key, line in zip(keys, lines, strict=True)
    )
    return Scene("documents", (_paper(rng),), items)


def _pages(rng: random.Random, n_items: int, n_pictures: int, split: str) -> Scene:
    lines = [(page, line) for page in range(n_pictures) for line in range(SIDE // CELL)]
    keys = rng.sample(NAMES, n_items)
    places = rng.sample(lines, n_items)
    items = tuple(
        _item(rng, key, split, page, 66 + rng.randint(0, 4), CELL * line)
        for key, (page, line) in zip(keys, places, strict=True)
    )
    canvas = tuple(_paper(rng) for _ in range(n_pictures))
    if n_pictures > PICTURES["pages"]:
        for key, (page, line) in _filling(rng, NAMES, keys, lines, places):
            _write_line(canvas[page], _item(rng, key, split, page, 66 + rng.randint(0, 4), CELL * line))
    return Scene("pages", canvas, items)


def _video(rng: random.Random, n_items: int, n_pictures: int, split: str) -> Scene:
    photo = _photo_crop(rng, VIDEO_SIDE + PICTURES["video"])
    # The camera goes one way and, in a longer video, back again.
    swing = [*range(PICTURES["video"]), *range(PICTURES["video"] - 2, 0, -1)]
    shifts = [swing[t % len(swing)] for t in range(n_pictures)]
    frames = tuple(photo[t : t + VIDEO_SIDE, t : t + VIDEO_SIDE].copy() for t in shifts)
    side = VIDEO_SIDE // CELL
    cells = [(2 * shot, (col, row)) for shot in range(n_pictures // 2) for row in range(side) for col in range(side)]
    keys = rng.sample(list(COLOURS), n_items)
    places = rng.sample(cells, n_items)
    items = tuple(
        _item(rng, key, split, frame, *_jittered(rng, cell)) for key, (frame, cell) in zip(keys, places, strict=True)
    )
    if n_pictures > PICTURES["video"]:
        for key, (frame, cell) in _filling(rng, tuple(COLOURS), keys, cells, places):
            item = _item(rng, key, split, frame, *_jittered(rng, cell))
            for picture in frames[frame : frame + 2]:
                _frame_digit(picture, item)
    return Scene("video", frames, items)


def _filling(
    rng: random.Random, keys: Sequence[str], asked: Sequence[str], places: Sequence[Place], taken: Sequence[Place]
) -> list[tuple[str, Place]]:
    """What fills half of the places that are left: keys that nobody asks about, each many times."""
    others = [key for key in keys if key not in asked]
    free = [place for place in places if place not in set(taken)]
    return [(rng.choice(others), place) for place in free if rng.random() < 0.5]


_DRAW: dict[str, Callable[[random.Random, int, int, str], Scene]] = {
    "grounding": _grounding,
    "documents": _documents,
    "pages": _pages,
    "video": _video,
}


def _item(rng: random.Random, key: str, split: str, picture: int, x: int, y: int) -> Item:
    value = rng.randrange(10)
    return Item(key, value, rng.choice(glyphs(split)[value]), picture, x, y)


def _jittered(rng: random.Random, cell: tuple[int, int]) -> tuple[int, int]:
    return cell[0] * CELL + rng.randint(0, 2), cell[1] * CELL + rng.randint(0, 2)


@functools.cache
def _handwriting() -> tuple[UInt8[np.ndarray, "glyph 8 8"], np.ndarray]:
    from sklearn.datasets import load_digits

    pixels, target = load_digits(return_X_y=True)
    ink = 255 - np.minimum(np.asarray(pixels).reshape(-1, 8, 8) * 16, 255).astype(np.uint8)
    return ink, np.asarray(target)


@functools.cache
def glyphs(split: str) -> tuple[tuple[int, ...], ...]:
    """The handwritten digits of one split: ``glyphs("train")[7]`` are the indices of its sevens."""
    target = _handwriting()[1]
    # Unseen digits, not unseen writers: every fifth image of the list goes to the test split.
    held_out = np.arange(len(target)) % 5 == 4
    chosen = held_out if split == "test" else ~held_out
    return tuple(tuple(np.flatnonzero(chosen & (target == value)).tolist()) for value in range(10))


@functools.cache
def _photographs() -> tuple[Picture, ...]:
    from sklearn.datasets import load_sample_images

    # Reduced threefold: a crop then shows a piece of the scene and not a patch of one texture.
    return tuple(np.asarray(Image.fromarray(photo).reduce(3)) for photo in load_sample_images().images)


def _photo_crop(rng: random.Random, side: int) -> Picture:
    photo = rng.choice(_photographs())
    top, left = rng.randint(0, photo.shape[0] - side), rng.randint(0, photo.shape[1] - side)
    crop = photo[top : top + side, left : left + side]
    return np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop)


def _frame_digit(picture: Picture, item: Item) -> None:
    x, y = item.x, item.y
    picture[y : y + 14, x : x + 14] = COLOURS[item.key]
    picture[y + 2 : y + 12, x + 2 : x + 12] = 255
    picture[y + 3 : y + 11, x + 3 : x + 11] = _handwriting()[0][item.glyph][..., None]


def _clutter(picture: Picture, x: int, y: int, rng: random.Random, split: str) -> None:
    """A loose digit without a frame, or a coloured blob without a digit: neither answers a question."""
    if rng.random() < 0.5:
        loose = picture[y + 3 : y + 11, x + 3 : x + 11]
        np.minimum(loose, _handwriting()[0][rng.choice(glyphs(split)[rng.randrange(10)])][..., None], out=loose)
    else:
        picture[y + 3 : y + 11, x + 3 : x + 11] = COLOURS[rng.choice(list(COLOURS))]


def _paper(rng: random.Random) -> Picture:
    tint = np.array([rng.randint(235, 255) for _ in range(3)])
    grain = np.random.default_rng(rng.getrandbits(32)).integers(-6, 7, size=(SIDE, SIDE, 1))
    return np.clip(tint + grain, 0, 255).astype(np.uint8)


@functools.cache
def _printed(name: str) -> UInt8[np.ndarray, "16 32"]:
    slip = Image.new("L", (2 * CELL, CELL), 255)
    ImageDraw.Draw(slip).text((1, 8), name, fill=0, font=ImageFont.load_default(size=12), anchor="lm")
    return np.asarray(slip)


def _write_line(picture: Picture, item: Item) -> None:
    y = item.y
    name = picture[y : y + CELL, : 2 * CELL]
    np.minimum(name, _printed(item.key)[..., None], out=name)
    picture[y + 12, 2 * CELL + 4 : 62 : 3] = 150
    score = picture[y + 4 : y + 12, item.x : item.x + 8]
    np.minimum(score, _handwriting()[0][item.glyph][..., None], out=score)
