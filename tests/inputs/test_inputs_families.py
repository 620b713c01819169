"""Every family of fixed tiles: its inputs are the Hugging Face processor's, and a block of pixels moves its own tokens.

The impulse test is an independent oracle of the whole way: a vision tower whose attention adds nothing cannot carry a
change from one token to another, so what changes where the text stack receives it is what the token really shows.
"""

import importlib
import json
import sys

import numpy as np
import pytest
import torch
from impulses import boxes, changed, poked, surely, unmixed
from PIL import Image
from transformers.image_utils import SizeDict
from transformers_source import functions

from mech.data.regions import Box, Frames
from mech.errors import InputError, RegionError, UnsupportedModel
from mech.inputs import VIDEO, build, collate, load_processor
from mech.reference import tiny, tiny_processors
from mech.reference.tiny_tokenizer import tokenizer

NAMES = (
    "llava", "llava_siglip", "llava_qwen3", "llava_next", "llava_onevision", "internvl", "gemma3", "paligemma",
    "idefics3", "smolvlm", "cohere2_vision", "llama4",
)  # fmt: skip
TILED = ("llava_next", "llava_onevision", "internvl", "idefics3", "smolvlm", "cohere2_vision", "llama4")
# One tile, exact multiples, wide, tall, tiny, large, long.
SIZES = [(16, 16), (48, 32), (50, 21), (19, 61), (3, 2), (97, 83), (70, 9)]
NEAREST = Image.Resampling.NEAREST
PAN_AND_SCAN = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8, "pan_and_scan_max_num_crops": 3}
FULL = ("vision_feature_select_strategy", "full")
QUESTION = "Which digit is in the red frame?"


@pytest.fixture(scope="module")
def models():
    made = {}
    return lambda name: made[name] if name in made else made.setdefault(name, unmixed(name))


KEEP_SHAPE = ("llava_qwen3", "llava_next", "llava_onevision", "llama4")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [*NAMES, "gemma3 with crops"])
def test_a_block_of_pixels_moves_exactly_its_own_tokens(models, name, size):
    name, *crops = name.split(" with ")
    options = {"pan_and_scan_min_ratio_to_activate": 1.2, **PAN_AND_SCAN} if crops else {}
    processor = tiny_processors.processor(name, tiny_processors.image_processor(name, resample=NEAREST, **options))
    picture = tiny_processors.noise(*size)
    before = build(processor, "What?", images=[picture])
    for box in boxes(size, 2):
        moved = changed(models(name), before, build(processor, "What?", images=[poked(picture, box)]))
        try:
            named = set(before.layout.positions(box).tolist())
        except RegionError:  # the model takes whole tokens off at the border, and a sliver of the picture with them
            named = set()
        side = processor.geometry.side
        assert surely(before.layout, box, side, name in KEEP_SHAPE) <= moved <= named


@pytest.mark.parametrize(("name", "edge"), [("llava_siglip", 18), ("llava_onevision", 18), ("smolvlm", 19)])
def test_what_a_tile_has_left_over_is_seen_by_no_token(monkeypatch, name, edge):
    """384 pixels are 27 patches of 14 and 6 pixels that the tower drops, at the end of every tile."""
    config = tiny.MODELS[name]()
    config.vision_config.image_size = edge
    square = {"height": edge, "width": edge}
    settings = {"size": square}
    if name == "llava_onevision":
        config.image_grid_pinpoints = [[edge, 2 * edge], [2 * edge, edge], [3 * edge, edge], [2 * edge, 2 * edge]]
        settings |= {"crop_size": square, "image_grid_pinpoints": config.image_grid_pinpoints}
    if name == "smolvlm":
        config.scale_factor = 3
        settings = {"size": {"longest_edge": 3 * edge}, "max_image_size": {"longest_edge": edge}}
    monkeypatch.setitem(tiny.MODELS, "leftover", lambda: config)
    model, processor = (
        unmixed("leftover"),
        tiny_processors.processor(name, tiny_processors.image_processor(name, resample=NEAREST, **settings), config),
    )
    picture = tiny_processors.noise(2 * edge, edge)
    before = build(processor, "What?", images=[picture])
    for box in [*boxes(picture.size, 6), Box(edge - 1, 0, edge, edge), Box(edge - 1, 0, edge + 1, edge)]:
        moved = changed(model, before, build(processor, "What?", images=[poked(picture, box)]))
        try:
            named = set(before.layout.positions(box).tolist())
        except RegionError:
            named = set()
        assert surely(before.layout, box, processor.geometry.side) <= moved <= named


# Published checkpoints, the last two SmolVLM's: image size, patch, pixel shuffle, settings of the image processor.
_NEXT = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_GRID = [[384 * high, 384 * wide] for high in range(1, 7) for wide in range(1, 7)]
PUBLISHED = {
    "llava_next": (336, 14, 1, {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336},
                                "do_center_crop": True, "image_grid_pinpoints": _NEXT}),
    "llava_onevision": (384, 14, 1, {"size": {"height": 384, "width": 384}, "image_grid_pinpoints": _GRID}),
    "internvl": (448, 14, 2, {"size": {"height": 448, "width": 448}, "max_patches": 12}),
    "idefics3": (364, 14, 2, {"size": {"longest_edge": 4 * 364}, "max_image_size": {"longest_edge": 364}}),
    "idefics3 at 384": (384, 14, 3, {"size": {"longest_edge": 4 * 384}, "max_image_size": {"longest_edge": 384}}),
    "idefics3 at 512": (512, 16, 4, {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_as_many_tokens_as_in_hugging_face(monkeypatch, name):
    edge, patch, factor, settings = PUBLISHED[name]
    name = name.split(" at ")[0]
    config = tiny.MODELS[name]()
    config.vision_config.image_size = [edge, edge] if name == "internvl" else edge
    config.vision_config.patch_size = [patch, patch] if name == "internvl" else patch
    config.scale_factor, config.vision_aspect_ratio = factor, "anyres_max_9"
    if "image_grid_pinpoints" in settings:
        config.image_grid_pinpoints = settings["image_grid_pinpoints"]
    images = tiny_processors.image_processor(name, **settings)
    processor = tiny_processors.processor(name, images, config)
    whole, side = oracle(name, monkeypatch, images), edge // patch // factor
    whole.patch_size, whole.vision_aspect_ratio = patch, "anyres_max_9"
    for count in ("num_image_tokens", "image_seq_length", "image_seq_len"):
        setattr(whole, count, side**2)
    sizes = [*np.random.default_rng(0).integers(20, 2500, (60, 2)).tolist(), [edge, edge], [3 * edge, edge], [9, 7]]
    theirs = whole._get_num_multimodal_tokens([size[::-1] for size in sizes])
    for size, tokens, patches in zip(sizes, theirs.num_image_tokens, theirs.num_image_patches, strict=True):
        shown = processor.geometry.show(tuple(size), images)
        written = "".join(one if isinstance(one, str) else "<image>" * len(one) for one in shown.pieces)
        assert len(processor.tokenizer(written)["input_ids"]) == tokens, size
        assert name.startswith("llava") or shown.tiles == patches


@pytest.mark.parametrize("name", TILED)
def test_the_second_picture_of_two_moves_tokens_of_its_own(models, name):
    processor = tiny_processors.processor(name, tiny_processors.image_processor(name, resample=NEAREST))
    sizes = [(50, 21), (32, 48)]
    pictures = [tiny_processors.noise(*size, seed=k) for k, size in enumerate(sizes)]
    before = build(processor, "What?", images=pictures)
    for box in boxes(sizes[1], 3, image=1):
        moved = changed(models(name), before, build(processor, "What?", images=[pictures[0], poked(pictures[1], box)]))
        assert surely(before.layout, box, processor.geometry.side, name in KEEP_SHAPE) <= moved
        assert moved <= set(before.layout.positions(box).tolist())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_a_token_finds_its_rectangle_and_the_rectangle_its_token(name, size):
    layout = build(tiny_processors.processor(name), "What?", images=[tiny_processors.noise(*size)]).layout
    shown = [int(p) for p in layout.positions("image") if not np.isnan(layout.rect[p]).any()]
    tiles = bool((layout.view > 0).any())
    for position in shown[:: 1 + len(shown) // 30]:
        view = layout.view[position]
        found = layout.positions(Box(*layout.rectangle(position)), view=("tiles" if view else "whole"), coverage=0.5)
        assert found.tolist() == [position]
    whole = layout.rect[layout.positions("image", view="tiles" if tiles else "whole")]
    assert np.nanmin(whole[:, :2]) == 0 or name in ("llava_next", "llava_onevision")
    assert (layout.row[shown] >= 0).all() and (layout.col[shown] >= 0).all()
    finest = layout.positions("image", view="tiles" if tiles else "whole")
    finest = finest[layout.row[finest] >= 0]
    rows, columns = layout.grid()
    assert len(finest) == len({(layout.row[p], layout.col[p]) for p in finest}) == rows * columns
    picture = layout.overlay(Image.new("RGB", size), "image", np.ones(len(layout.positions("image"))))
    assert picture.size == size and np.asarray(picture).any()


# The named tokens that a Hugging Face processor looks up on its tokenizer.
TOKENS = {
    "internvl": {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "gemma3": {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
    "paligemma": {"image_token": "<image>"},
    "cohere2_vision": {
        "boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>", "image_token": "<|IMG_PATCH|>",
        "img_line_break_token": "<|IMG_LINE_BREAK|>",
    },
}  # fmt: skip
FIRST = {"gemma3": "<bos>", "paligemma": "<bos>", "cohere2_vision": "<bos>", "llama4": "<|begin_of_text|>"}


def oracle(name: str, monkeypatch, images):
    """The Hugging Face processor of a family; its check of classes, which wants torchvision, is left out."""
    tokens = tokenizer(**TOKENS.get(name, {}), **({"bos_token": FIRST[name]} if name in FIRST else {}))
    base = {
        "llava": "LlavaProcessor", "llava_next": "LlavaNextProcessor", "llava_onevision": "LlavaOnevisionProcessor",
        "internvl": "InternVLProcessor", "gemma3": "Gemma3Processor", "paligemma": "PaliGemmaProcessor",
        "idefics3": "Idefics3Processor", "smolvlm": "SmolVLMProcessor", "cohere2_vision": "Cohere2VisionProcessor",
        "llama4": "Llama4Processor",
    }[name]  # fmt: skip
    base = getattr(importlib.import_module(f"transformers.models.{name}.processing_{name}"), base)
    unchecked = type(base.__name__, (base,), {"check_argument_for_proper_class": lambda self, name, given: None})
    options = {
        "llava": {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        "llava_next": {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        "llava_onevision": {
            "num_image_tokens": 16, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_4",
        },
        "internvl": {"image_seq_length": 16},
        "gemma3": {"image_seq_length": 16},
        "idefics3": {"image_seq_len": 16},
        "smolvlm": {"image_seq_len": 16, "video_processor": None},
        "llama4": {"patch_size": 2, "pixel_shuffle_ratio": 0.5},
    }.get(name, {})  # fmt: skip
    if name == "smolvlm":  # only counts of video frames are written out in words
        monkeypatch.setattr(sys.modules[base.__module__], "num2words", str)
    if name == "paligemma":
        images.image_seq_length = 16
    return unchecked(image_processor=images, tokenizer=tokens, **options)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's labels, unused here
@pytest.mark.parametrize("sizes", [[(50, 21)], [(3, 2)], [(16, 16), (19, 61)]])
@pytest.mark.parametrize(
    "name", ["llava", "llava_next", "llava_onevision", "internvl", "gemma3", "paligemma", "idefics3", "smolvlm",
             "cohere2_vision", "llama4"],
)  # fmt: skip
def test_the_inputs_are_those_of_the_hugging_face_processor(monkeypatch, name, sizes):
    images = tiny_processors.image_processor(name)
    processor = tiny_processors.processor(name, images)
    pictures = [tiny_processors.noise(*size, seed=k) for k, size in enumerate(sizes)]
    text = processor.prompt(QUESTION, images=len(sizes))
    if name == "paligemma":  # its Hugging Face processor writes <bos> and the line break itself
        text = text.replace("<bos>", "").removesuffix("\n")
    theirs = oracle(name, monkeypatch, images)(images=[pictures], text=[text], return_tensors="pt")
    ours = build(processor, QUESTION, images=pictures).tensors
    unused = {"num_crops", "num_patches", "labels", "aspect_ratios", "rows", "cols"}
    known = {key for key in theirs if key not in unused}
    if "token_type_ids" not in ours:
        known.discard("token_type_ids")
    assert set(ours) == known
    for key, value in ours.items():
        assert torch.equal(value.double(), torch.as_tensor(theirs[key]).double()), key


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl"])
def test_the_layouts_of_a_batch_are_those_of_its_rows(name):
    """That the logits are is for ``test_check.py``."""
    processor = tiny_processors.processor(name)
    rows = [
        build(processor, QUESTION, images=[tiny_processors.noise(*size, seed=k) for k, size in enumerate(sizes)])
        for sizes in ([(50, 21)], [(16, 16), (19, 40)], [], [(3, 3)])
    ]
    batch = collate(rows, processor.pad_token_id)
    for row, layout in zip(rows, batch.layouts, strict=True):
        pad = len(layout) - len(row.layout)
        assert (layout.view[pad:] == row.layout.view).all() and (layout.view[:pad] == -1).all()


@pytest.mark.parametrize("size", [(50, 21), (19, 61), (97, 83)])
def test_crops_of_gemma_are_those_of_the_hugging_face_processor(monkeypatch, size):
    settings = {"pan_and_scan_min_ratio_to_activate": 1.1, **PAN_AND_SCAN}
    images = tiny_processors.image_processor("gemma3", **settings)
    processor = tiny_processors.processor("gemma3", images)
    picture = tiny_processors.noise(*size)
    text = processor.prompt(QUESTION, images=1)
    # Its defaults go before the settings of its image processor: they have to be said at the call.
    theirs = oracle("gemma3", monkeypatch, images)(images=[picture], text=text, return_tensors="pt", **settings)
    ours = build(processor, QUESTION, images=[picture])
    assert (ours.layout.view > 0).any()
    for key, value in ours.tensors.items():
        assert torch.equal(value.double(), theirs[key].double()), key


@pytest.mark.parametrize("most", [4, 6, 12, 16])
def test_the_arrangements_are_those_of_the_torchvision_processors(most):
    """Llama 4's and Cohere Vision's image processors cannot be imported here; their arithmetic can be read."""
    file = "cohere2_vision/image_processing_cohere2_vision.py"
    cohere = functions(file, "get_all_supported_aspect_ratios", "get_optimal_tiled_canvas")
    llama = functions(
        "llama4/image_processing_llama4.py", "get_factors", "find_supported_resolutions", "get_best_fit",
        "get_max_res_without_distortion",
    )  # fmt: skip
    edge = 16
    ours = {name: tiny_processors.image_processor(name, max_patches=most) for name in ("cohere2_vision", "llama4")}
    largest = tiny_processors.image_processor("llama4", max_patches=most, resize_to_max_canvas=True)
    square = SizeDict(height=edge, width=edge)
    resolutions = torch.tensor(llama.find_supported_resolutions(most, square))
    rng = np.random.default_rng(0)
    sizes = [*SIZES, (32, 32), (160, 16), (16, 16 * most), *rng.integers(1, 200, (200, 2)).tolist()]
    for width, height in sizes:
        columns, rows = cohere.get_optimal_tiled_canvas((height, width), (edge, edge), 1, most)
        assert ours["cohere2_vision"].arrangement((width, height))[0] == (columns, rows)
        for images in (ours["llama4"], largest):
            fits = images.resize_to_max_canvas
            high, wide = llama.get_best_fit((height, width), resolutions, resize_to_max_canvas=fits).tolist()
            target = (high, wide) if fits else (min(max(height, edge), high), min(max(width, edge), wide))
            new_height, new_width = llama.get_max_res_without_distortion((height, width), target)
            grid, new = images.arrangement((width, height))
            assert grid == (wide // edge, high // edge) and new == (max(new_width, 1), max(new_height, 1))


def test_interpolated_tokens_stand_for_their_share_of_the_picture(models):
    """LLaVA-OneVision with few tokens: 2 x 2 tiles of 16 tokens become one of about as many, mixed with neighbours."""
    model = models("llava_onevision")
    config = tiny.MODELS["llava_onevision"]()
    config.vision_aspect_ratio = model.config.vision_aspect_ratio = "anyres_max_2"
    images = tiny_processors.image_processor("llava_onevision", resample=NEAREST)
    processor = tiny_processors.processor("llava_onevision", images, config)
    picture = tiny_processors.noise(32, 30)
    before = build(processor, "What?", images=[picture])
    layout = before.layout
    assert layout.grid() == (5, 5) and (layout.view == 1).sum() == 5 * 6
    for box in boxes(picture.size, 8):
        moved = changed(model, before, build(processor, "What?", images=[poked(picture, box)]))
        wider = Box(max(0, box.x0 - 8), max(0, box.y0 - 8), min(32, box.x1 + 8), min(30, box.y1 + 8))
        assert moved <= set(layout.positions(wider).tolist())
        x0, y0, x1, y1 = layout.rect.T
        inside = (x0 >= box.x0) & (y0 >= box.y0) & (x1 <= box.x1) & (y1 <= box.y1)
        assert set(np.flatnonzero(inside).tolist()) <= moved


@pytest.mark.parametrize("name", ["internvl", "llava_onevision"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_block_of_a_frame_moves_its_own_tokens(models, name, count):
    processor = tiny_processors.processor(name, tiny_processors.image_processor(name, resample=NEAREST))
    frames = [tiny_processors.noise(50, 21, seed) for seed in range(count)]
    before = build(processor, "What?", video=frames)
    layout = before.layout
    assert layout.has_video and layout.images == ((50, 21),) * count and not layout.has_images
    for index in range(count):
        for box in boxes((50, 21), 2, seed=index):
            there = Box(box.x0, box.y0, box.x1, box.y1, frame=index)
            other = [poked(one, box) if k == index else one for k, one in enumerate(frames)]
            moved = changed(models(name), before, build(processor, "What?", video=other))
            assert moved <= set(layout.positions(there).tolist()) <= set(layout.positions(Frames(index)).tolist())
            if box.x1 - box.x0 > 4 and box.y1 - box.y0 > 2:
                assert moved
    shown = layout.positions("image")
    assert (layout.kind[shown] == VIDEO).all() and layout.grid(frame=0) == ((4, 4) if name == "internvl" else (2, 2))


@pytest.mark.parametrize("name", ["internvl", "llava_onevision"])
def test_videos_are_written_as_by_the_hugging_face_processor(monkeypatch, name):
    processor = tiny_processors.processor(name)
    frames = [tiny_processors.noise(16, 16, seed) for seed in range(3)]
    ours = build(processor, QUESTION, video=frames).tensors
    pixels = ours["pixel_values_videos" if name == "llava_onevision" else "pixel_values"].reshape(1, 3, 3, 16, 16)
    whole = oracle(name, monkeypatch, processor.image_processor)
    written = whole.replace_video_token({"pixel_values_videos": pixels}, 0)
    text = processor.prompt(QUESTION, video=True).replace("<video>", written)
    assert torch.equal(ours["input_ids"], whole.tokenizer(text, return_tensors="pt")["input_ids"])
    single = processor.image_processor(images=frames, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels[0], single if name == "internvl" else single[:, 0])


@pytest.mark.parametrize("name", ["llama4", "cohere2_vision", "internvl", "llava_next"])
def test_a_saved_processor_is_the_same(tmp_path, name):
    """Also where transformers has no image processor without torchvision."""
    processor = tiny_processors.processor(name)
    processor.geometry.config.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    picture = tiny_processors.noise(50, 21)
    for suffix in ("Pil", "", "Fast"):
        stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
        stored["image_processor_type"] = stored["image_processor_type"].removesuffix("Pil") + suffix
        if suffix == "Pil" or name in ("llama4", "cohere2_vision"):
            (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
        made, loaded = (build(p, QUESTION, images=[picture]) for p in (processor, load_processor(tmp_path)))
        for key, value in made.tensors.items():
            assert torch.equal(value, loaded.tensors[key])
    assert load_processor(tmp_path).settings() == processor.settings()


def test_settings_that_do_not_belong_together_are_refused():
    def refused(name, match, change=lambda config: None, **settings):
        config = tiny.MODELS[name]()
        change(config)
        with pytest.raises(UnsupportedModel, match=match):
            tiny_processors.processor(name, tiny_processors.image_processor(name, **settings), config)

    refused("llava_next", "image_grid_pinpoints", image_grid_pinpoints=[[16, 32]])
    refused("llava_next", r"tiles of \[16, 32\] pixels", size={"height": 32, "width": 16})
    refused("llava_next", "a square of patches|squares of patches", lambda c: setattr(c, *FULL))
    refused("internvl", "a square of patches", lambda c: setattr(c, *FULL))
    refused("gemma3", "8 patches a side pooled to 3 tokens", lambda c: setattr(c, "mm_tokens_per_image", 9))
    with pytest.raises(InputError, match=r"becomes 24 x 24\nExpected: 16 x 16"):
        images = tiny_processors.image_processor("llama4", size={"height": 24, "width": 24})
        build(tiny_processors.processor("llama4", images), "What?", images=[tiny_processors.noise(9, 9)])
    with pytest.raises(InputError, match="do_resize=False"):
        images = tiny_processors.image_processor("cohere2_vision", do_resize=False)
        build(tiny_processors.processor("cohere2_vision", images), "What?", images=[tiny_processors.noise(9, 9)])
    with pytest.raises(InputError, match="200 x 2 pixels, of which no whole token is left"):
        build(tiny_processors.processor("llava_next"), "What?", images=[tiny_processors.noise(200, 2)])
    with pytest.raises(InputError, match="takes none"):
        build(tiny_processors.processor("smolvlm"), "What?", video=[tiny_processors.noise(9, 9)])


def test_views_can_be_asked_for_by_name():
    layout = build(tiny_processors.processor("internvl"), "What?", images=[tiny_processors.noise(48, 32)]).layout
    box = Box(0, 0, 12, 12)
    both, tiles, whole = (layout.positions(box, view=view).tolist() for view in (None, "tiles", "whole"))
    assert sorted(tiles + whole) == both and len(tiles) == 9 and len(whole) == 2
    assert (layout.view[tiles] == 1).all() and (layout.view[whole] == 0).all()
    assert len(layout.positions("image", view="whole")) == 16 and len(layout.positions("image")) == 7 * 16
    with pytest.raises(RegionError, match="view='tile'"):
        layout.positions(box, view="tile")
    small = build(tiny_processors.processor("internvl"), "What?", images=[tiny_processors.noise(9, 9)]).layout
    with pytest.raises(RegionError, match="no tokens in the view 'tiles'"):
        small.positions(Box(0, 0, 9, 9), view="tiles")


def test_the_answer_of_paligemma_does_not_look_ahead():
    """Its prompt is read in both directions; an answer that is given is not part of the prompt."""
    processor = tiny_processors.processor("paligemma")
    inputs = build(processor, QUESTION, images=[tiny_processors.noise(9, 9)], answer="seven")
    types = inputs.tensors["token_type_ids"][0].numpy()
    assert set(np.flatnonzero(types)) == set(inputs.layout.positions("answer").tolist())
