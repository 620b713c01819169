"""Change one block of pixels: exactly the tokens that the layout names change, where the text stack receives them."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from impulses import changed, embedded, poked, unmixed
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, PretrainedConfig

from mech.data.regions import Box, Frames, Pages
from mech.errors import InputError, RegionError, UnsupportedModel
from mech.inputs import IMAGE, build, geometry_of
from mech.inputs.canvas import Canvas
from mech.inputs.families.fixed import fixed_canvas
from mech.reference import tiny, tiny_processors
from mech.reference.tiny_processors import image_processor, noise

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl")

NEAREST = Image.Resampling.NEAREST


@pytest.fixture(scope="module")
def models():
    return {family: unmixed(family) for family in FAMILIES}


# Squares of (16, 16) meet no resizing; the others are enlarged by nearest neighbour, so that a block stays a block.
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llava", [(16, 16), (16, 16)]),
        ("llava", [(8, 8)]),
        ("qwen2_5_vl", [(40, 24)]),
        ("qwen2_5_vl", [(24, 56), (32, 32), (40, 24)]),
        ("qwen3_vl", [(40, 24)]),
        ("qwen3_vl", [(24, 56), (32, 32), (40, 24)]),
    ],
)
def test_a_block_of_pixels_moves_exactly_its_own_tokens(models, family, sizes):
    images = image_processor("llava", resample=NEAREST) if family == "llava" else image_processor("qwen3_vl")
    processor = tiny_processors.processor(family, images)
    pictures = [noise(*size, seed=k) for k, size in enumerate(sizes)]
    before = build(processor, "What?", images=pictures)
    rng = np.random.default_rng(1)
    for image, (width, height) in enumerate(sizes):
        for _ in range(4):
            x0, y0 = rng.integers(0, width - 1), rng.integers(0, height - 1)
            box = Box(x0, y0, rng.integers(x0 + 1, width + 1), rng.integers(y0 + 1, height + 1), image)
            other = [poked(one, box) if k == image else one for k, one in enumerate(pictures)]
            named = before.layout.positions(box)
            assert changed(models[family], before, build(processor, "What?", images=other)) == set(named.tolist())


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("count", [1, 4, 5])
def test_a_frame_moves_exactly_its_own_temporal_patch(models, family, count):
    processor = tiny_processors.processor(family)
    frames = [noise(32, 24, seed) for seed in range(count)]
    before = build(processor, "What?", video=frames)
    for index in range(count):
        other = [noise(32, 24, 99) if k == index else one for k, one in enumerate(frames)]
        named = before.layout.positions(Frames(index))
        assert len(named) == 3 * 4
        assert changed(models[family], before, build(processor, "What?", video=other)) == set(named.tolist())


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_block_of_a_frame_moves_the_tokens_with_its_rectangle(models, family):
    processor = tiny_processors.processor(family)
    frames = [noise(32, 24, seed) for seed in range(4)]
    box = Box(9, 17, 24, 20)
    before = build(processor, "What?", video=frames)
    after = build(processor, "What?", video=[*frames[:2], poked(frames[2], box), frames[3]])
    layout = before.layout
    expected = {
        int(p)
        for p in layout.positions(Frames(2))
        if layout.rect[p, 0] < 24 and layout.rect[p, 2] > 9 and layout.rect[p, 1] < 20 and layout.rect[p, 3] > 17
    }
    assert len(expected) == 2
    assert changed(models[family], before, after) == expected


def llava_with(images):
    return tiny_processors.processor("llava", images)


@pytest.mark.parametrize("size", [(32, 16), (16, 33), (22, 17)])
def test_what_a_centre_crop_takes_away_has_no_token(models, size):
    """Shortest edge 16, crop 16: the outer columns (or rows) of the longer side are never seen."""
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, resample=NEAREST)
    processor = llava_with(images)
    picture = noise(*size)
    before = build(processor, "What?", images=[picture])
    kept = before.layout.rect[before.layout.positions("image")]
    assert kept[:, :2].min(axis=0).tolist() == pytest.approx([(w - min(size)) // 2 for w in size], abs=1)
    rect = [int(x) for x in (*kept[:, :2].min(axis=0), *kept[:, 2:].max(axis=0))]
    outside = Box(0, 0, rect[0], size[1]) if rect[0] else Box(0, 0, size[0], rect[1])
    with pytest.raises(RegionError, match="covers no visual token"):
        before.layout.positions(outside)
    assert changed(models["llava"], before, build(processor, "What?", images=[poked(picture, outside)])) == set()
    if min(size) == 16:
        inside = Box(rect[0] + 5, rect[1] + 5, rect[0] + 9, rect[1] + 8)
        named = set(before.layout.positions(inside).tolist())
        assert len(named) == 2
        assert changed(models["llava"], before, build(processor, "What?", images=[poked(picture, inside)])) == named


@pytest.mark.parametrize("size", [(8, 9), (11, 9), (9, 30)])
def test_padding_about_a_small_picture_has_tokens_without_a_rectangle(models, size):
    processor = llava_with(image_processor("llava", do_resize=False, do_center_crop=True))
    picture = noise(*size)
    before = build(processor, "What?", images=[picture])
    layout = before.layout
    shown = [p for p in layout.positions("image") if not np.isnan(layout.rect[p]).any()]
    assert 0 < len(shown) < 16
    box = Box(3, 7, 8, 9)
    named = set(layout.positions(box).tolist())
    assert named <= set(shown)
    assert changed(models["llava"], before, build(processor, "What?", images=[poked(picture, box)])) == named
    assert len(layout.positions(Pages(0))) == 16
    nowhere = next(p for p in layout.positions("image") if p not in shown)
    with pytest.raises(RegionError, match="has no rectangle"):
        layout.rectangle(int(nowhere))


@pytest.mark.parametrize("size", [(16, 9), (10, 16), (8, 5), (3, 8), (3, 4)])
def test_padding_to_a_square_moves_the_picture_to_the_middle(models, size):
    sides = {"height": 16, "width": 16}
    images = LlavaImageProcessorPil(do_pad=True, size=sides, crop_size=sides, resample=NEAREST)
    processor = llava_with(images)
    picture = noise(*size)
    before = build(processor, "What?", images=[picture])
    box = Box(2, 3, min(9, size[0]), min(8, size[1]))
    named = set(before.layout.positions(box).tolist())
    assert changed(models["llava"], before, build(processor, "What?", images=[poked(picture, box)])) == named


def test_the_strategy_full_keeps_a_token_that_is_nowhere():
    model = tiny.model("llava")
    model.config.vision_feature_select_strategy = "full"
    processor = tiny_processors.processor("llava", config=model.config)
    inputs = build(processor, "What?", images=[noise(16, 16), noise(16, 16, 1)])
    layout = inputs.layout
    assert len(layout.positions("image", image=1)) == len(layout.positions(Pages(1))) == 17
    first = layout.positions("image", image=1)[0]
    assert layout.kind[first] == IMAGE and layout.row[first] == -1 and layout.image[first] == 1
    assert len(layout.positions(Box(0, 0, 16, 16, image=1))) == 16
    assert layout.grid(1) == (4, 4)
    assert embedded(model, inputs).shape[0] == len(layout)


@example(width=19, height=25, edge=6, crop=9)  # a sliver of the last column, by rounding
@given(width=st.integers(1, 90), height=st.integers(1, 90), edge=st.integers(3, 40), crop=st.integers(3, 40))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_fixed_canvas_is_the_processors_own(width, height, edge, crop):
    """Each pixel of what the processor makes comes from where the canvas says, for any size."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": edge}, crop_size={"height": crop, "width": crop}, resample=NEAREST, do_normalize=False
    )
    if max(width, height) > 6 * min(width, height):
        return
    canvas = fixed_canvas(width, height, images)
    # Colours that say where a pixel came from; one off, so that padding is 0.
    y, x = np.mgrid[1 : height + 1, 1 : width + 1]
    source = np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8)
    made = images(images=[Image.fromarray(source)], return_tensors="np")["pixel_values"][0] * 255
    assert made.shape[1:] == (canvas.height, canvas.width)
    rects = canvas.rectangles(1, (width, height)).reshape(canvas.height, canvas.width, 4)
    seen = made[0] > 0.5
    assert (seen == ~np.isnan(rects[..., 0])).all()
    for channel in (0, 1):
        found = made[channel][seen] - 0.5  # the centre of the source pixel
        assert (found > rects[seen][:, channel] - 0.51).all() and (found < rects[seen][:, channel + 2] + 0.51).all()


def test_neighbours_share_their_edge_and_fill_the_picture():
    rects = Canvas(56, 40, 56 / 97, 40 / 61).rectangles(8, (97, 61)).reshape(5, 7, 4)
    assert (rects[:, :-1, 2] == rects[:, 1:, 0]).all() and (rects[:-1, :, 3] == rects[1:, :, 1]).all()
    assert rects[0, 0, :2].tolist() == [0, 0] and rects[-1, -1, 2:].tolist() == pytest.approx([97, 61])


def test_unknown_families_towers_and_settings_are_refused():
    with pytest.raises(UnsupportedModel, match=r"model_type='qwen3_vlm'(.|\n)*use 'qwen3_vl'(.|\n)*add a row"):
        geometry_of(PretrainedConfig.from_dict({"model_type": "qwen3_vlm"}), None)
    with pytest.raises(UnsupportedModel, match=r"patches of \(patch, merge, temporal\) \(14, 2, 2\)"):
        geometry_of(tiny.MODELS["qwen3_vl"](), image_processor("qwen3_vl", patch_size=14))
    config = tiny.MODELS["llava"]()
    config.vision_config.model_type = "dinov2"
    with pytest.raises(UnsupportedModel, match="vision tower 'dinov2'"):
        geometry_of(config, image_processor("llava"))
    config.vision_config.model_type = "siglip_vision_model"
    with pytest.raises(UnsupportedModel, match="drop the first patch"):
        geometry_of(config, image_processor("llava"))
    config.vision_feature_select_strategy = "full"
    assert geometry_of(config, image_processor("llava")).class_tokens == 0
    with pytest.raises(UnsupportedModel, match="do_pad=True"):
        fixed_canvas(10, 10, image_processor("llava", do_pad=True))
    with pytest.raises(UnsupportedModel, match="longest_edge"):
        fixed_canvas(10, 10, image_processor("llava", size={"longest_edge": 24, "shortest_edge": 12}))


def test_pictures_the_tower_cannot_take_are_refused():
    with pytest.raises(InputError, match=r"becomes 32 x 32\nExpected: 16 x 16"):
        images = image_processor("llava", size={"height": 32, "width": 32})
        build(llava_with(images), "What?", images=[noise(24, 24)])
    with pytest.raises(InputError, match="factor of 200"):
        build(tiny_processors.processor("qwen3_vl"), "What?", images=[Image.new("RGB", (603, 3))])
    with pytest.raises(InputError, match="whole tokens of 8 x 8"):
        build(
            tiny_processors.processor("qwen3_vl", image_processor("qwen3_vl", do_resize=False)),
            "What?",
            images=[noise(20, 24)],
        )
