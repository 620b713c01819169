"""What a user may hand in by mistake: it works as a viewer would show it, or is refused before a forward pass."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mech.data.pictures import picture, pictures
from mech.data.regions import Box, Frames, Mask
from mech.errors import InputError, MechError, RegionError
from mech.inputs import build, encode
from mech.reference import tiny_processors

noise = tiny_processors.noise
FAMILIES = tuple(tiny_processors.IMAGE_PROCESSORS)


def saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode", ["L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "HSV", "LAB", "RGBA", "RGBX", "RGBa", "La"]
)
def test_every_mode_is_what_pil_shows_on_white(mode):
    source = noise(9, 7).convert("RGBA" if mode in ("LA", "PA", "RGBA", "RGBa", "La") else "RGB")
    if source.mode == "RGBA":
        source.putalpha(Image.fromarray((np.arange(63, dtype=np.uint8) * 4).reshape(7, 9)))
    given = source.convert({"PA": "P", "La": "LA"}.get(mode, mode)).convert(mode)
    expected = (given.convert("LA") if mode == "La" else given).convert("RGBA")
    ground = Image.new("RGBA", given.size, "white")
    shown = picture(given)
    assert shown.mode == "RGB" and shown.size == (9, 7)
    assert np.array_equal(np.asarray(shown), np.asarray(Image.alpha_composite(ground, expected).convert("RGB")))


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_a_transparent_colour_is_white(mode, tmp_path):
    """A palette's or a PNG's transparent colour is no colour: the black below it must not be seen."""
    given = Image.new(mode, (4, 4), 0)
    if mode == "P":
        given.putpalette([0, 0, 0, 255, 0, 0])
    given.paste(1 if mode == "P" else (255 if mode == "L" else (255, 0, 0)), (0, 0, 2, 4))
    path = saved(given, tmp_path / "a.png", transparency=(0, 0, 0) if mode == "RGB" else 0)
    shown = np.asarray(picture(path))
    assert (shown[:, 2:] == 255).all()
    assert (shown[:, :2, 0] == 255).all() and ((shown[:, :2, 1] == 0).all() or mode == "L")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_its_exif_says(orientation, tmp_path):
    upright = noise(9, 7)
    turns = Image.Transpose
    undo = {
        2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM, 5: turns.TRANSPOSE,
        6: turns.ROTATE_90, 7: turns.TRANSVERSE, 8: turns.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[274] = orientation
    shown = picture(saved(stored, tmp_path / "a.png", exif=exif))
    assert np.array_equal(np.asarray(shown), np.asarray(upright))
    assert np.array_equal(np.asarray(picture(shown)), np.asarray(upright)), "turned twice"


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tiff"])
def test_several_frames_are_not_one_picture(ending, tmp_path):
    frames = [noise(8, 8, seed) for seed in range(3)]
    path = saved(frames[0], tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:])
    with Image.open(path) as opened:
        for given in (path, opened):
            with pytest.raises(InputError, match=r"of 3 frames\nExpected: a single picture\nTry: choose one"):
                picture(given)
        opened.seek(1)
        assert picture(opened.convert("RGB")).size == (8, 8)
    assert picture(saved(frames[0], tmp_path / f"b.{ending}")).size == (8, 8)


def test_a_phones_photograph_with_a_preview_is_one_picture(tmp_path):
    first = noise(16, 16)
    path = saved(first, tmp_path / "a.mpo", save_all=True, append_images=[noise(16, 16, 1)])
    assert picture(path).size == (16, 16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Image.fromarray(np.zeros((4, 4), dtype=np.uint16)), "mode 'I;16'\nExpected: 8 bits a channel"),
        (Image.new("F", (4, 4)), "mode 'F'"),
        (np.zeros((4, 4), dtype=np.uint16), "array of uint16"),
        (np.zeros((0, 4, 3), dtype=np.uint8), r"shape \(0, 4, 3\)"),
        (np.zeros((4, 4, 2), dtype=np.uint8), r"shape \(4, 4, 2\)"),
        (np.zeros((1, 4, 4, 3), dtype=np.uint8), r"shape \(1, 4, 4, 3\)"),
        (None, "type NoneType"),
        (b"\x89PNG", "type bytes"),
    ],
)
def test_what_would_lose_something_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        picture(given)


def test_files_that_are_no_picture_say_so(tmp_path):
    whole = saved(noise(64, 64), tmp_path / "a.png")
    broken = tmp_path / "b.png"
    broken.write_bytes(whole.read_bytes()[:2000])
    text = tmp_path / "c.png"
    text.write_text("not a picture")
    for path in (broken, text, tmp_path, tmp_path / "absent.png"):
        with pytest.raises(InputError, match="cannot be read as a picture"):
            picture(path)


def test_huge_pictures_are_refused_before_their_pixels_are_read(tmp_path, monkeypatch):
    """20,000 pixels a side: 400 million pixels, of which not one may be decoded."""
    path = saved(Image.new("1", (20_000, 20_000)), tmp_path / "huge.png")
    monkeypatch.setattr(Image.Image, "convert", lambda *args: pytest.fail("pixels were read"))
    with pytest.raises(InputError, match=r"too large\nExpected: at most 89478485 pixels\nTry: shrink it"):
        picture(path)
    middle = saved(Image.new("1", (10_000, 9_500)), tmp_path / "large.png")  # PIL itself would only warn
    with pytest.raises(InputError, match="too large"):
        picture(middle)
    with pytest.raises(InputError, match="20000 x 20000 pixels, which is too large"):
        picture(Image.new("1", (20_000, 20_000)))


def test_a_long_banner_is_no_bomb(tmp_path):
    path = saved(Image.new("L", (20_000, 30), 7), tmp_path / "banner.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert picture(path).size == (20_000, 30)


def test_a_single_picture_is_no_list():
    for given in (noise(4, 4), "a.png", np.zeros((4, 4, 3), dtype=np.uint8), 7, None):
        with pytest.raises(InputError, match=r"pass video=\[\.\.\.\]"):
            pictures(given, "video")


# --- regions --------------------------------------------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize("corners", [(5, 5, 5, 9), (5, 5, 9, 5), (9, 5, 5, 9), (5, 9, 9, 5)])
def test_boxes_without_a_pixel_are_refused(corners):
    with pytest.raises(RegionError, match=r"holds no pixel(.|\n)*Box\.from_xywh"):
        Box(*corners)


@pytest.mark.parametrize("corners", [(NAN, 0, 5, 5), (0, 0, NAN, 5), (0, 0, 5, NAN), (0, 0, 5, float("inf"))])
def test_boxes_that_are_nowhere_are_refused(corners):
    with pytest.raises(RegionError, match="in Box\nExpected: a finite number"):
        Box(*corners)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((4, 4), 0.5), r"a mask of float64 and shape \(4, 4\)\nExpected: a bool array"),
        (np.full((4, 4), NAN), "float64"),
        (np.ones((4, 4, 1), dtype=bool), r"shape \(4, 4, 1\)"),
        (np.ones(4, dtype=bool), r"shape \(4,\)"),
        ([[True, False]], r"pixels=\[\[True, False\]\] in Mask"),
        (noise(4, 4).convert("1"), "pixels=<PIL"),
    ],
)
def test_masks_that_are_none_are_refused(pixels, message):
    with pytest.raises(RegionError, match=message):
        Mask(pixels)


def test_a_region_lies_in_an_image_or_in_a_frame():
    for make in (lambda: Box(0, 0, 5, 5, image=1, frame=0), lambda: Mask(np.ones((4, 4), dtype=bool), 1, frame=2)):
        with pytest.raises(RegionError, match="lies in an image and in a frame"):
            make()


@pytest.mark.parametrize(("question", "answer"), [(3, ""), (None, ""), ("What?", 7)])
def test_a_question_and_an_answer_are_text(question, answer):
    with pytest.raises(InputError, match=r"of type (int|NoneType)\n(.|\n)*Expected: text"):
        build(tiny_processors.processor("llava"), question, images=[noise(24, 24)], answer=answer)


def test_every_refusal_says_what_to_do():
    """Three things in each message: what was given, what was expected, what to do."""
    bad = [
        lambda: picture(Image.new("F", (4, 4))),
        lambda: Box(1, 1, 0, 0),
        lambda: Mask(np.ones(3)),
        lambda: pictures(3),
    ]
    for call in bad:
        with pytest.raises(MechError) as caught:
            call()
        assert caught.value.given and caught.value.expected and caught.value.do
    assert Frames(1).indices == (1,)


# --- models and processors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_processor_of_another_family_is_refused_or_makes_what_the_map_says(name):
    """Never an error from within, and never a picture on another canvas than the layout's."""
    own = type(tiny_processors.image_processor(name))
    others = {type(one := tiny_processors.image_processor(other)): one for other in FAMILIES}
    refused = 0
    for kind, other in others.items():
        if kind is own:
            continue
        try:
            processor = tiny_processors.processor(name, other)
            inputs = build(processor, "What?", images=[noise(50, 21)])
        except MechError as error:
            refused += 1
            assert error.given and error.expected and error.do
        else:
            token = processor.tokenizer.convert_tokens_to_ids(processor.visual_tokens[0])
            assert len(inputs.layout.positions("image")) == (inputs.tensors["input_ids"] == token).sum()
    assert refused >= len(others) - 5


@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_and_placeholders_must_be_as_many(name):
    processor, one = tiny_processors.processor(name), noise(24, 24)
    token = processor.image_token
    for text, images in [("no placeholder", [one]), (f"{token} alone", []), (f"{token} x {token} two", [one])]:
        with pytest.raises(InputError, match=r"placeholders? '(.|\n)*for \d image"):
            encode(processor, text, images)
    for typed in {token, processor.visual_tokens[0]}:
        with pytest.raises(InputError, match="the question holds the special token"):
            build(processor, f"What is {typed}?", images=[one])
    with pytest.raises(InputError, match="both images and a video"):
        build(processor, "What?", images=[one], video=[one])
    if processor.video_token is None:
        with pytest.raises(InputError, match="takes none"):
            build(processor, "What?", video=[one])
        return
    with pytest.raises(InputError, match="frames of sizes"):
        build(processor, "What?", video=[one, noise(24, 16)])
    for fps in (0, -1.0, NAN):
        with pytest.raises(InputError, match="fps="):
            build(processor, "What?", video=[one], fps=fps)
    layout = build(processor, "What?", video=[one]).layout
    assert layout.images == ((24, 24),) and set(layout.frame[layout.positions(Frames(0))]) == {0}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 3), (3, 1), (400, 2), (1, 1000)])
def test_the_smallest_and_the_longest_pictures_have_tokens_or_are_refused(name, size):
    """Sides of 1 and 3 look like channels to a guess at the axes."""
    processor = tiny_processors.processor(name)
    try:
        layout = build(processor, "What?", images=[noise(*size)]).layout
    except InputError as error:
        assert error.given and error.expected and error.do
        assert size in ((400, 2), (1, 1000)) or (name == "mistral3" and "single token" in error.given)
    else:
        layout = layout.memory or layout
        found = layout.positions(Box(0, 0, *size))
        assert len(found) and (layout.image[found] == 0).all()


# --- the mapping in the literature ----------------------------------------------------------------------------------


def test_the_flattened_index_divided_by_four_is_elsewhere():
    """Patches numbered row by row, divided by four, are not the merged 2 x 2 squares (SCIENCE, section 2).

    Over boxes with random corners the published formula's tokens and the right ones have a mean IoU of 0.2-0.3.
    """
    rng = np.random.default_rng(0)
    images = tiny_processors.image_processor("qwen2_5_vl", do_resize=False)
    processor = tiny_processors.processor("qwen2_5_vl", images)
    layout = build(processor, "What?", images=[noise(160, 160)]).layout
    first, patch = int(layout.positions("image")[0]), 4
    across = 160 // patch
    assert layout.grid() == (across // 2, across // 2)
    overlaps = []
    for _ in range(3000):
        (x0, x1), (y0, y1) = np.sort(rng.uniform(0, 160, (2, 2)))
        box = Box(x0, y0, x1, y1)
        rows = np.arange(int(box.y0 // patch), int(np.ceil(box.y1 / patch)))
        columns = np.arange(int(box.x0 // patch), int(np.ceil(box.x1 / patch)))
        published = set(((rows[:, None] * across + columns) // 4).ravel().tolist())
        ours = {int(p) - first for p in layout.positions(box)}
        right = set(((rows[:, None] // 2) * (across // 2) + columns // 2).ravel().tolist())
        assert ours == right
        overlaps.append(len(published & right) / len(published | right))
    assert 0.2 < np.mean(overlaps) < 0.3


def test_an_address_is_named_by_its_kind_and_length():
    for given, do in (("data:image/png;base64," + "A" * 5000, "BytesIO"), ("https://example.com/x.png", "download it")):
        with pytest.raises(InputError) as error:
            picture(given)
        assert f"{len(given)} characters" in str(error.value) and do in str(error.value)
        assert len(str(error.value)) < 300


def test_a_message_shows_the_beginning_and_the_end_of_something_long():
    said = str(MechError("begin " + "x" * 50_000 + " end", "something short", "shorten it"))
    assert len(said) < 800 and said.startswith("begin x") and " end\nExpected: something short" in said
