"""The pixels of the haystacks: handwriting, framed digits, loose digits and blobs, paper with lines, photographs."""

import functools
import random
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

CELL = 16  # pixels; every object sits in a cell of this size, with a pixel of jitter
SIDE = 96  # pixels of an image's edge: 6 x 6 cells
VIDEO_SIDE = 64

Picture = UInt8[np.ndarray, "height width 3"]

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


@functools.cache
def handwriting() -> tuple[UInt8[np.ndarray, "glyph 8 8"], np.ndarray]:
    from sklearn.datasets import load_digits

    pixels, target = load_digits(return_X_y=True)
    ink = 255 - np.minimum(np.asarray(pixels).reshape(-1, 8, 8) * 16, 255).astype(np.uint8)
    return ink, np.asarray(target)


@functools.cache
def glyphs(split: str) -> tuple[tuple[int, ...], ...]:
    """The handwritten digits of one split: ``glyphs("train")[7]`` are the indices of its sevens."""
    target = handwriting()[1]
    # Unseen digits, not unseen writers: every fifth image of the list goes to the test split.
    held_out = np.arange(len(target)) % 5 == 4
    chosen = held_out if split == "test" else ~held_out
    return tuple(tuple(np.flatnonzero(chosen & (target == value)).tolist()) for value in range(10))


@functools.cache
def _photographs() -> tuple[Picture, ...]:
    from sklearn.datasets import load_sample_images

    # Reduced threefold, so that a crop shows a piece of the scene and not a patch of one texture.
    return tuple(np.asarray(Image.fromarray(photo).reduce(3)) for photo in load_sample_images().images)


def photo_crop(rng: random.Random, side: int) -> Picture:
    photo = rng.choice(_photographs())
    top, left = rng.randint(0, photo.shape[0] - side), rng.randint(0, photo.shape[1] - side)
    crop = photo[top : top + side, left : left + side]
    return np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop)


def frame_digits(picture: Picture, key: str, drawn: Sequence[int], x: int, y: int) -> None:
    """Draw a frame in the colour ``key`` around handwritten digits, given by index; each digit fills a cell."""
    right = x + CELL * len(drawn) - 2
    picture[y : y + 14, x:right] = COLOURS[key]
    picture[y + 2 : y + 12, x + 2 : right - 2] = 255
    for left, glyph in zip(range(x + 3, right, CELL), drawn, strict=True):
        picture[y + 3 : y + 11, left : left + 8] = handwriting()[0][glyph][..., None]


def clutter(picture: Picture, x: int, y: int, rng: random.Random, split: str) -> None:
    """Draw a loose digit without a frame, or a coloured blob without a digit: neither answers a question."""
    if rng.random() < 0.5:
        loose = picture[y + 3 : y + 11, x + 3 : x + 11]
        np.minimum(loose, handwriting()[0][rng.choice(glyphs(split)[rng.randrange(10)])][..., None], out=loose)
    else:
        picture[y + 3 : y + 11, x + 3 : x + 11] = COLOURS[rng.choice(list(COLOURS))]


def paper(rng: random.Random) -> Picture:
    tint = np.array([rng.randint(235, 255) for _ in range(3)])
    grain = np.random.default_rng(rng.getrandbits(32)).integers(-6, 7, size=(SIDE, SIDE, 1))
    return np.clip(tint + grain, 0, 255).astype(np.uint8)


@functools.cache
def _printed(name: str) -> UInt8[np.ndarray, "16 32"]:
    slip = Image.new("L", (2 * CELL, CELL), 255)
    ImageDraw.Draw(slip).text((1, 8), name, fill=0, font=ImageFont.load_default(size=12), anchor="lm")
    return np.asarray(slip)


def write_line(picture: Picture, key: str, drawn: Sequence[int], x: int, y: int) -> None:
    """Write a line of a score sheet: the name ``key``, dots, and handwritten digits from ``x`` on, a cell each."""
    name = picture[y : y + CELL, : 2 * CELL]
    np.minimum(name, _printed(key)[..., None], out=name)
    picture[y + 12, 2 * CELL + 4 : x - 4 if len(drawn) > 1 else 62 : 3] = 150
    for left, glyph in zip(range(x, SIDE, CELL), drawn, strict=False):
        score = picture[y + 4 : y + 12, left : left + 8]
        np.minimum(score, handwriting()[0][glyph][..., None], out=score)
