"""Regions to positions and back, against counting pixels one by one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mech.data.regions import Box, Frames, Mask, Pages
from mech.errors import RegionError
from mech.inputs import PADDING, TEXT, TokenLayout, build
from mech.inputs.canvas import Canvas
from mech.reference import tiny_processors
from mech.reference.tiny_processors import noise

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl")


def grid_layout(width: int, height: int, columns: int, rows: int) -> TokenLayout:
    """One picture, and nothing else."""
    count = rows * columns
    row, col = np.divmod(np.arange(count), columns)
    return TokenLayout(
        kind=np.ones(count, dtype=int),
        image=np.zeros(count, dtype=int),
        frame=np.full(count, -1),
        row=row,
        col=col,
        view=np.zeros(count, dtype=int),
        rect=Canvas(columns, rows, columns / width, rows / height).rectangles(1, (width, height)),
        tokens=("<image>",) * count,
        spans={},
        images=((width, height),),
    )


@pytest.fixture(scope="module")
def two_images() -> TokenLayout:
    pictures = [noise(40, 24), noise(24, 56, 1)]
    return build(tiny_processors.processor("qwen3_vl"), "Which digit?", images=pictures, answer="seven").layout


@pytest.fixture(scope="module")
def five_frames() -> TokenLayout:
    return build(tiny_processors.processor("qwen2_5_vl"), "What?", video=[noise(32, 24, k) for k in range(5)]).layout


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(40, 24), (97, 61), (33, 200)])
def test_the_rectangle_of_a_token_covers_that_token_alone(family, size):
    layout = build(tiny_processors.processor(family), "What?", images=[noise(10, 10), noise(*size)]).layout
    for position in layout.positions("image"):
        x0, y0, x1, y1 = layout.rectangle(int(position))
        box = Box(x0, y0, x1, y1, image=int(layout.image[position]))
        assert layout.positions(box).tolist() == [position]
        assert layout.positions(box, coverage=0.99).tolist() == [position]


@st.composite
def pictures_with_boxes(draw):
    width, height = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    box = Box(x0, y0, draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height)))
    return grid_layout(width, height, draw(st.integers(1, 9)), draw(st.integers(1, 9))), box


def counted(layout: TokenLayout, inside: np.ndarray, coverage: float) -> set[int]:
    """Every pixel cut into columns x rows pieces, which no edge of a token cuts; then they are counted."""
    (width, height), (rows, columns) = layout.images[0], layout.grid()
    # One token is width x height pieces, one pixel is columns x rows pieces.
    pieces = np.kron(inside.astype(np.int64), np.ones((rows, columns), dtype=np.int64))
    shares = pieces.reshape(rows, height, columns, width).sum(axis=(1, 3)).ravel() / (height * width)
    return set(np.flatnonzero(shares > coverage + 1e-9).tolist())


@given(pictures_with_boxes(), st.sampled_from([0.0, 0.25, 0.5, 0.9]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_boxes_and_masks_equal_counting(case, coverage):
    layout, box = case
    width, height = layout.images[0]
    inside = np.zeros((height, width), dtype=bool)
    inside[box.y0 : box.y1, box.x0 : box.x1] = True
    expected = counted(layout, inside, coverage)
    for region in (box, Mask(inside)):
        if expected:
            assert set(layout.positions(region, coverage=coverage).tolist()) == expected
        else:
            with pytest.raises(RegionError, match="covers no visual token"):
                layout.positions(region, coverage=coverage)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 7), st.integers(1, 7), st.integers(0, 9))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_mask_equals_counting(width, height, columns, rows, seed):
    layout = grid_layout(width, height, columns, rows)
    inside = np.random.default_rng(seed).random((height, width)) < 0.1
    inside[0, 0] = True
    assert set(layout.positions(Mask(inside)).tolist()) == counted(layout, inside, 0.0)


def test_a_mask_of_bytes_is_a_mask():
    """255 is True, and not 255 times as much."""
    layout, inside = grid_layout(8, 8, 2, 2), np.zeros((8, 8), dtype=bool)
    inside[:4, :4], inside[0, 4] = True, True
    for mask in (inside, inside.astype(np.uint8) * 255):
        assert layout.positions(Mask(mask)).tolist() == [0, 1]
        assert layout.positions(Mask(mask), coverage=0.5).tolist() == [0]


def test_several_regions_are_their_union(two_images):
    regions = (Box(0, 0, 5, 5), Box(20, 30, 22, 40, image=1), Pages(0))
    union = np.unique(np.concatenate([two_images.positions(one) for one in regions]))
    assert two_images.positions(regions).tolist() == two_images.positions(list(regions)).tolist() == union.tolist()


def test_pages_and_image_agree(two_images):
    first, second = (two_images.positions("image", image=k).tolist() for k in (0, 1))
    assert len(first) == 3 * 5 and len(second) == 7 * 3
    assert two_images.positions(Pages(1)).tolist() == second == two_images.positions(Box(0, 0, 24, 56, 1)).tolist()
    assert two_images.positions(Pages(0, 1)).tolist() == two_images.positions("image").tolist() == first + second
    assert (
        two_images.positions(Box(0, 0, 24, 24), image=1).tolist() == two_images.positions(Box(0, 0, 24, 24, 1)).tolist()
    )
    assert two_images.grid(0) == (3, 5) and two_images.grid(1) == (7, 3)


def test_names_part_the_row(two_images):
    n = len(two_images)
    text, image = two_images.positions("text"), two_images.positions("image")
    assert sorted([*text, *image]) == list(range(n)) == two_images.positions("all").tolist()
    seen = two_images.kind == 1
    for mask in (seen, seen.tolist(), torch.as_tensor(seen)):
        assert two_images.positions(mask).tolist() == image.tolist()
    assert two_images.positions("last").tolist() == two_images.positions(-1).tolist() == [n - 1]
    assert "".join(two_images.tokens[p] for p in two_images.positions("question")) == "Which digit?"
    assert set(two_images.positions("question")) < set(text)
    assert two_images.positions([5, 3, -1, 3]).tolist() == [3, 5, n - 1]


def test_frames_are_the_temporal_patches_that_hold_them(five_frames):
    layout = five_frames
    assert layout.frames_per_token == 2 and layout.images == ((32, 24),) * 5
    assert layout.positions(Frames(0)).tolist() == layout.positions(Frames(1)).tolist()
    assert set(layout.frame[layout.positions(Frames(3, 4))]) == {2, 4}
    assert layout.positions(Frames(*range(5))).tolist() == layout.positions("image").tolist()
    assert layout.grid(frame=4) == (3, 4)
    last = layout.positions(Frames(4))[-1]
    assert layout.rectangle(int(last)) == (24, 16, 32, 24)


def test_padding_moves_everything_and_is_nothing(two_images):
    moved = two_images.shifted(3, len(two_images) + 5)
    assert len(moved) == len(two_images) + 5
    assert moved.kind[:3].tolist() == moved.kind[-2:].tolist()[:1] * 3 == [PADDING] * 3
    for where in (Box(3, 3, 30, 9), Pages(1), "image", "question", "answer", "text", "last", "all"):
        assert moved.positions(where).tolist() == [p + 3 for p in two_images.positions(where)]
    assert moved.rectangle(10) == two_images.rectangle(7)
    assert moved.tokens[3:-2] == two_images.tokens
    with pytest.raises(RegionError, match="in a row of"):
        two_images.shifted(3, len(two_images) + 2)


def test_it_says_what_it_is(two_images, five_frames):
    assert repr(two_images) == (
        "58 positions: 15 tokens of image 0 (3x5), 21 tokens of image 1 (7x3), question 44-46, answer 54-57"
    )
    assert "36 tokens of 5 video frames (3x4, 2 a token)" in repr(five_frames)
    assert repr(two_images.shifted(4, 62)).startswith("62 positions: 4 padding, 15 tokens of image 0")
    assert "question 1,3-4" in repr(replace(two_images, spans={"question": (1, 3, 4)}))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (Box(0, 0, 42, 10), r"does not fit in an image of 40 x 24 pixels(.|\n)*from_xywh"),
        (Box(-2, 0, 10, 10), "does not fit in an image"),
        (Box(0, 0, 5, 5, image=2), "of a row with 2 images\nExpected: an index from 0 to 1"),
        (Box(0, 0, 5, 5, image=-1), "of a row with 2 images"),
        (Pages(0, 2), "of a row with 2 images"),
        (Pages(), "of a row with 2 images"),
        (Frames(0), "without a video(.|\n)*use Pages"),
        (Mask(np.ones((40, 24), dtype=bool)), r"mask of shape \(40, 24\)\nExpected: \(24, 40\)"),
        (Mask(np.zeros((24, 40), dtype=bool)), "covers no visual token"),
        ("questions", "no positions are called 'questions'(.|\n)*use 'question'"),
        ("nothing like it", "choose from 'image', 'text'"),
        ([], r"positions \[\]"),
        ([0, 1000], "whole numbers from -"),
        ([0.5], "whole numbers"),
        (np.array([True, False]), r"a mask of 2\nExpected: a mask of 58"),
        (np.zeros(58, dtype=bool), r"positions \[\]"),
        ([True, 3], "whole numbers"),
        (None, "whole numbers"),
        ([Pages(0), 3], "whole numbers"),
    ],
)
def test_regions_that_are_nowhere_are_refused(two_images, where, message):
    with pytest.raises(RegionError, match=message):
        two_images.positions(where)


def test_other_misuse_is_refused(two_images, five_frames):
    with pytest.raises(RegionError, match=r"say which frame: Box\(\.\.\., frame=k\)"):
        five_frames.positions(Box(0, 0, 5, 5))
    with pytest.raises(RegionError, match="on a video"):
        five_frames.positions(Pages(0))
    with pytest.raises(RegionError, match="of a video of 5 frames"):
        five_frames.positions(Frames(2, 5))
    with pytest.raises(RegionError, match="has no rectangle"):
        two_images.rectangle(0)
    with pytest.raises(RegionError, match="0 <= coverage < 1"):
        two_images.positions(Box(0, 0, 5, 5), coverage=1.0)
    with pytest.raises(RegionError, match=r"by more than 0\.9"):
        two_images.positions(Box(0, 0, 2, 2), coverage=0.9)
    with pytest.raises(RegionError, match="image=0 with 'question'"):
        two_images.positions("question", image=0)
    text = build(tiny_processors.processor("llava"), "What?").layout
    assert (text.kind == TEXT).all()
    with pytest.raises(RegionError, match="has no 'image' positions"):
        text.positions("image")
    with pytest.raises(RegionError, match=r"of a row with 0 images(.|\n)*pass images="):
        text.positions(Box(0, 0, 5, 5))


def test_a_box_may_leave_the_image_by_the_rounding_of_a_pixel(two_images):
    assert two_images.positions(Box(-0.5, 0, 40.7, 25)).tolist() == two_images.positions(Pages(0)).tolist()


def test_the_overlay_marks_the_rectangles_and_nothing_else(two_images):
    white = Image.new("RGB", (40, 24), "white")
    box = Box(9, 9, 15, 15)
    drawn = np.asarray(two_images.overlay(white, box)) != 255
    assert drawn[8:16, 8:16].any(axis=2).all() and drawn.any(axis=2).sum() == 64
    double = np.asarray(two_images.overlay(white.resize((80, 48)), box)) != 255
    assert double[16:32, 16:32].any(axis=2).all() and double.any(axis=2).sum() == 256
    values = np.zeros(15)
    values[6] = 3
    looked = np.asarray(two_images.overlay(white, values=values)) != 255
    assert (looked.any(axis=2) == drawn.any(axis=2)).all()
    assert not (np.asarray(two_images.overlay(white, Pages(1))) != 255).any()
    with pytest.raises(RegionError, match="2 values for 15 positions"):
        two_images.overlay(white, values=[1, 2])


def test_the_overlay_of_a_frame(five_frames):
    white = Image.new("RGB", (32, 24), "white")
    last = five_frames.positions(Frames(4))[-1:]
    drawn = (np.asarray(five_frames.overlay(white, last, frame=4)) != 255).any(axis=2)
    assert drawn[16:, 24:].all() and drawn.sum() == 64
    assert not (np.asarray(five_frames.overlay(white, last, frame=0)) != 255).any()
