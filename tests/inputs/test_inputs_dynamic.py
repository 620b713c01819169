"""Families whose canvas follows the picture, and videos: Hugging Face's processors and the towers are the judges."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from impulses import boxes, changed, poked, surely, unmixed
from PIL import Image
from tokenizers import Tokenizer
from transformers import BatchFeature
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
from transformers.models.glm4v.processing_glm4v import Glm4vProcessor
from transformers.models.glm4v.video_processing_glm4v import Glm4vVideoProcessor
from transformers.models.lfm2_vl.processing_lfm2_vl import Lfm2VlProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers_source import functions

from mech.data.regions import Box, Frames, Mask
from mech.errors import InputError, RegionError, UnsupportedModel
from mech.inputs import TEXT, VIDEO, Processor, build, collate, load_processor
from mech.reference import tiny, tiny_processors
from mech.reference.tiny_tokenizer import token_id, tokenizer

NAMES = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v", "llava_pixtral", "mistral3", "gemma4",
    "lfm2_vl",
)  # fmt: skip
FILMED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v", "gemma4")
# One or two tokens, exact multiples, wide, tall, tiny, large, long.
SIZES = [(16, 8), (40, 24), (50, 21), (19, 61), (3, 2), (97, 83), (70, 9)]
NEAREST = Image.Resampling.NEAREST
QUESTION = "Which digit is in the red frame?"
noise = tiny_processors.noise


def nearest(name: str):
    return tiny_processors.processor(name, tiny_processors.image_processor(name, resample=NEAREST))


@pytest.fixture(scope="module")
def models():
    made = {}
    return lambda name: made[name] if name in made else made.setdefault(name, unmixed(name))


# --- what the model is given is what Hugging Face's processor makes -------------------------------------------------


class VideoPixels:
    """Stands for a video processor, none of which resizes without torchvision: its own patches, frames as they are."""

    def __init__(self, made, images):
        self.made, self.images = made, images
        self.merge_size, self.temporal_patch_size = made.merge_size, made.temporal_patch_size

    def __call__(self, videos, video_metadata, **kwargs):
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.images.image_mean, self.images.image_std))
        frames = [torch.tensor(np.asarray(frame)).permute(2, 0, 1).float() / 255 for frame in videos[0]]
        stacked = torch.stack([(frame - mean) / std for frame in frames])[None]
        patches, *grid = self.made.patchify(stacked, self.made.patch_size, self.merge_size, self.temporal_patch_size)
        data = {"pixel_values_videos": patches[0], "video_grid_thw": torch.tensor([grid])}
        return BatchFeature({**data, "video_metadata": video_metadata})


class SoftPixels:
    """Stands for Gemma 4's video processor, which cannot be imported without torchvision: its image processor's."""

    def __init__(self, images):
        self.images = images

    def __call__(self, videos, video_metadata, **kwargs):
        made = self.images(images=videos[0], return_tensors="pt", max_soft_tokens=70)
        return BatchFeature({
            "pixel_values_videos": made["pixel_values"],
            "video_position_ids": made["image_position_ids"],
            "num_frames_per_video": torch.tensor([len(videos[0])]),
            "num_soft_tokens_per_video": made["num_soft_tokens_per_image"][:1],
            "video_metadata": video_metadata,
        })  # fmt: skip


def oracle(name: str):
    """The Hugging Face processor of a family; its check of classes needs torchvision, and is left out."""
    images, words = tiny_processors.image_processor(name), tokenizer()
    if name.startswith("gemma4"):
        # It asks for the tokens of audio even where there is none.
        names = {"image": "<|image|>", "boi": "<|image>", "eoi": "<image|>", "audio": "[A]", "boa": "[A]", "eoa": "[A]"}
        for attribute, token in names.items():
            setattr(words, f"{attribute}_token", token)
        words.image_token_id = token_id("<|image|>")
    base = {"qwen2_vl": Qwen2VLProcessor, "glm4v": Glm4vProcessor, "gemma4": Gemma4Processor}.get(
        name, Qwen3VLProcessor
    )
    unchecked = type(base.__name__, (base,), {"check_argument_for_proper_class": lambda self, name, given: None})
    if base is Gemma4Processor:
        return unchecked(None, images, words, SoftPixels(images))
    made = (Glm4vVideoProcessor if name == "glm4v" else Qwen3VLVideoProcessor)(patch_size=4)
    return unchecked(images, words, VideoPixels(made, images))


def same(ours: dict, theirs: dict) -> None:
    assert set(ours) == set(theirs)
    for key, value in ours.items():
        their = torch.as_tensor(np.asarray(theirs[key]))
        assert value.shape == their.shape and torch.equal(value.double(), their.double()), key


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl_moe", "qwen3_5", "glm4v", "gemma4"])
@pytest.mark.parametrize("sizes", [[(40, 24)], [(24, 24), (30, 77), (100, 33)]])
def test_images_are_those_of_the_hugging_face_processor(name, sizes):
    processor = tiny_processors.processor(name)
    pictures = [noise(*size, seed=k) for k, size in enumerate(sizes)]
    theirs = dict(oracle(name)(images=pictures, text=processor.prompt(QUESTION, len(sizes))))
    same(build(processor, QUESTION, images=pictures).tensors, theirs)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl_moe", "qwen3_5", "glm4v", "gemma4"])
@pytest.mark.parametrize(("count", "fps"), [(1, 2.0), (4, 1.0), (7, 3.0), (3, 0.01)])
def test_videos_are_those_of_the_hugging_face_processor(name, count, fps):
    processor, theirs = tiny_processors.processor(name), oracle(name)
    frames = [noise(32, 24, seed) for seed in range(count)]
    times = [k / fps for k in range(count)]
    metadata = SimpleNamespace(frames_indices=list(range(count)), fps=fps, sampled_fps=fps, timestamps=times)
    data, written = theirs._process_videos([frames], video_metadata=[metadata])
    prompt = processor.prompt(QUESTION, video=True).replace(processor.video_token, written[0])
    expected = theirs.tokenizer(prompt, return_tensors="pt")
    ours = build(processor, QUESTION, video=frames, fps=fps).tensors
    assert torch.equal(ours["input_ids"], expected["input_ids"])
    kinds = torch.tensor(theirs.create_mm_token_type_ids(expected["input_ids"].tolist()))
    assert torch.equal(ours["mm_token_type_ids"], kinds)
    for key in set(data) - {"video_metadata", "num_soft_tokens_per_video"}:
        torch.testing.assert_close(ours[key], torch.as_tensor(data[key]), msg=key)
    assert ("second_per_grid_ts" in ours) is False


@pytest.mark.parametrize("name", ["llava_pixtral", "mistral3"])
@pytest.mark.parametrize("size", SIZES)
def test_pixtral_rows_are_those_of_the_hugging_face_processor(name, size):
    processor = tiny_processors.processor(name)
    config = processor.geometry.config
    them = SimpleNamespace(
        patch_size=4, spatial_merge_size=getattr(config, "spatial_merge_size", 1),
        image_token="[IMG]", image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]",
    )  # fmt: skip
    picture = noise(*size)
    if name == "mistral3" and size == (3, 2):
        with pytest.raises(InputError, match="3 x 2 pixels, which is a single token"):
            build(processor, QUESTION, images=[picture])
        return
    # PixtralProcessor tells its image processor the size of a merged token.
    made = processor.image_processor([picture], patch_size=4 * them.spatial_merge_size, return_tensors="pt")
    write = functions("pixtral/processing_pixtral.py", "replace_image_token").replace_image_token
    text = processor.prompt(QUESTION, 1).replace("[IMG]", write(them, made, 0))
    ours = build(processor, QUESTION, images=[picture]).tensors
    assert ours["input_ids"].tolist() == [processor.tokenizer(text)["input_ids"]]
    assert torch.equal(ours["pixel_values"], made["pixel_values"])
    assert ours["image_sizes"].tolist() == made["image_sizes"].tolist()


@pytest.mark.parametrize("setting", [{}, {"use_thumbnail": False}, {"do_image_splitting": False}, {"min_tiles": 1}])
@pytest.mark.parametrize("size", [*SIZES, (40, 32), (500, 20), (20, 500)])
def test_lfm2_plans_and_writes_as_the_hugging_face_processor(size, setting):
    images = tiny_processors.image_processor("lfm2_vl", **setting)
    processor = tiny_processors.processor("lfm2_vl", images)
    names = "smart_resize", "_is_image_too_large", "_get_grid_layout", "_target_ratios"
    file = "lfm2_vl/image_processing_lfm2_vl.py"
    hf = functions(file, *names, "find_closest_aspect_ratio", "round_by_factor")
    them = SimpleNamespace(_target_ratios=lambda *a, **k: hf._target_ratios(None, *a, **k))
    shared = {key: getattr(images, key) for key in ("downsample_factor", "max_image_tokens", "encoder_patch_size")}
    width, height = hf.smart_resize(None, size[1], size[0], min_image_tokens=images.min_image_tokens, **shared)
    large = hf._is_image_too_large(None, size[1], size[0], max_pixels_tolerance=images.max_pixels_tolerance, **shared)
    columns, rows = 1, 1
    if large and images.do_image_splitting:
        columns, rows, *_ = hf._get_grid_layout(
            them, size[1], size[0], images.min_tiles, images.max_tiles, images.tile_size
        )
    if width * height > images.max_image_tokens * 8**2:  # its own padding fails
        with pytest.raises(InputError, match=f"would become {width} x {height}\nExpected: at most 16 tokens"):
            images.plan(size)
        return
    plan = images.plan(size)
    assert (plan.columns, plan.rows, plan.width, plan.height) == (columns, rows, width, height)
    count = Lfm2VlProcessor._compute_tokens_for_image(None, [height, width], 4, 2)
    tile = Lfm2VlProcessor._compute_tokens_per_tile(None, images.tile_size, 4, 2)
    marks = SimpleNamespace(
        image_start_token="<|image_start|>", image_end_token="<|image_end|>", image_token="<image>",
        image_thumbnail_token="<|img_thumbnail|>",
    )  # fmt: skip
    text = Lfm2VlProcessor._build_image_tokens(marks, rows, columns, tile, count, images.use_thumbnail, True)
    written = processor.prompt(QUESTION, 1).replace("<image>", text)
    picture = noise(*size)
    ours = build(processor, QUESTION, images=[picture]).tensors
    assert ours["input_ids"].tolist() == [processor.tokenizer(written)["input_ids"]]
    assert ours["pixel_attention_mask"].sum(1).tolist() == ours["spatial_shapes"].prod(1).tolist()
    if rows * columns == 1:  # patches put together again are the resized picture
        side = images.encoder_patch_size
        patches = ours["pixel_values"][0, : width * height // side**2]
        back = patches.reshape(height // side, width // side, side, side, 3).transpose(1, 2).reshape(height, width, 3)
        resized = np.asarray(picture.resize((width, height), Image.Resampling(images.resample)))
        torch.testing.assert_close(back, torch.from_numpy(resized / 127.5 - 1).float(), atol=1e-6, rtol=0)


# --- what a token shows --------------------------------------------------------------------------------------------


# A picture of a single token is refused for Mistral 3.
@pytest.mark.parametrize(("name", "size"), [(n, s) for n in NAMES for s in SIZES if (n, s) != ("mistral3", (3, 2))])
def test_a_block_of_pixels_moves_exactly_its_own_tokens(models, name, size):
    processor, picture = nearest(name), noise(*size)
    before = build(processor, "What?", images=[picture])
    for box in boxes(size, 3):
        moved = changed(models(name), before, build(processor, "What?", images=[poked(picture, box)]))
        named = set(before.layout.positions(box).tolist())
        assert surely(before.layout, box, processor.geometry.side) <= moved <= named


@pytest.mark.parametrize("name", NAMES)
def test_the_second_picture_of_two_moves_tokens_of_its_own(models, name):
    processor, sizes = nearest(name), [(50, 21), (32, 48)]
    pictures = [noise(*size, seed=k) for k, size in enumerate(sizes)]
    before = build(processor, "What?", images=pictures)
    for box in boxes(sizes[1], 3, image=1):
        moved = changed(models(name), before, build(processor, "What?", images=[pictures[0], poked(pictures[1], box)]))
        assert surely(before.layout, box, processor.geometry.side) <= moved
        assert moved <= set(before.layout.positions(box).tolist())


@pytest.mark.parametrize("name", FILMED)
@pytest.mark.parametrize("count", [1, 4, 5])
def test_a_box_in_a_frame_moves_exactly_its_own_tokens(models, name, count):
    processor = nearest(name)
    frames = [noise(32, 24, seed) for seed in range(count)]
    before = build(processor, "What?", video=frames)
    layout = before.layout
    for index in range(count):
        for corners in [(9, 3, 22, 14), (0, 0, 32, 24)]:
            box = Box(*corners, frame=index)
            other = [poked(frame, box) if k == index else frame for k, frame in enumerate(frames)]
            named = layout.positions(box).tolist()
            inside = np.zeros((24, 32), dtype=bool)
            inside[corners[1] : corners[3], corners[0] : corners[2]] = True
            assert layout.positions(Mask(inside, frame=index)).tolist() == named
            assert set(named) <= set(layout.positions(Frames(index)).tolist())
            assert changed(models(name), before, build(processor, "What?", video=other)) == set(named)


@pytest.mark.parametrize(("name", "size"), [(n, s) for n in NAMES for s in SIZES if (n, s) != ("mistral3", (3, 2))])
def test_a_token_finds_its_rectangle_and_the_rectangle_its_token(name, size):
    layout = build(tiny_processors.processor(name), "What?", images=[noise(*size)]).layout
    for position in layout.positions("image"):
        view = "tiles" if layout.view[position] else "whole"
        box = Box(*layout.rectangle(int(position)))
        assert layout.positions(box, view=view, coverage=0.5).tolist() == [position]
    rows, columns = layout.grid()
    assert (layout.row[layout.positions("image")] < rows).all() and (layout.col < columns).all()
    assert (
        layout.rect[layout.positions("image", view="whole")][-1, 2:].tolist() == pytest.approx(size)
        or name == "lfm2_vl"
    )
    assert layout.overlay(Image.new("RGB", size), "image").size == size


def test_marks_stand_between_the_rows_and_tiles():
    layout = build(tiny_processors.processor("mistral3"), "What?", images=[noise(32, 16)]).layout
    first = int(layout.positions("image")[0])
    row = ["[IMG]"] * 4
    assert list(layout.tokens[first : first + 10]) == [*row, "[IMG_BREAK]", *row, "[IMG_END]"]
    assert layout.kind[first + 4] == TEXT and layout.grid() == (2, 4)
    tiles = build(tiny_processors.processor("lfm2_vl"), "What?", images=[noise(64, 64)]).layout
    assert tiles.grid() == (4, 4) and sorted(set(tiles.view)) == [-1, 0, 1, 2, 3, 4]
    corner = tiles.positions(Box(60, 60, 64, 64))
    assert tiles.view[corner].tolist() == [4, 0] and tiles.row[corner[0]] == tiles.col[corner[0]] == 3
    assert tiles.tokens[int(tiles.positions("image", view="tiles")[-1]) + 1] == "<|img_thumbnail|>"


# --- videos ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILMED)
def test_a_tube_is_the_union_of_its_boxes(name):
    frames = [noise(32, 24, seed) for seed in range(5)]
    layout = build(tiny_processors.processor(name), "What?", video=frames).layout
    tube = {1: (2, 2, 9, 9), 2: (10, 2, 17, 9), 4: (20, 10, 31, 20)}
    boxes_ = [Box(*corners, frame=frame) for frame, corners in tube.items()]
    found = layout.positions(boxes_)
    assert found.tolist() == sorted(set().union(*(layout.positions(box).tolist() for box in boxes_)))
    depth = layout.frames_per_token
    assert set(layout.frame[found]) == {frame - frame % depth for frame in tube}
    assert (layout.kind[found] == VIDEO).all() and set(found) < set(layout.positions(Frames(*tube)).tolist())
    assert Box.from_xywh(2, 2, 7, 7, frame=1) == boxes_[0]
    if depth == 2:  # one token holds frames 0 and 1: a box in either is a box in both
        moved = layout.positions(Box(2, 2, 9, 9, frame=0))
        assert moved.tolist() == layout.positions(boxes_[0]).tolist()


def test_boxes_in_frames_that_are_not_there_are_refused():
    video = build(tiny_processors.processor("gemma4"), "What?", video=[noise(32, 24), noise(32, 24, 1)]).layout
    image = build(tiny_processors.processor("gemma4"), "What?", images=[noise(32, 24)]).layout
    for where, layout, message in [
        (Box(0, 0, 5, 5), video, r"say which frame: Box\(\.\.\., frame=k\)"),
        (Box(0, 0, 5, 5, frame=2), video, "of a video of 2 frames\nExpected: indices from 0 to 1"),
        (Box(0, 0, 5, 5, frame=-1), video, "of a video of 2 frames"),
        (Box(0, 0, 33.5, 5, frame=1), video, "does not fit in an image of 32 x 24"),
        (Mask(np.ones((32, 24), dtype=bool), frame=1), video, r"mask of shape \(32, 24\)"),
        (Box(0, 0, 5, 5, frame=0), image, "of a row without a video"),
    ]:
        with pytest.raises(RegionError, match=message):
            layout.positions(where)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_its_rows_one_by_one(name):
    processor, model = tiny_processors.processor(name), tiny.model(name)
    rows = [
        build(processor, QUESTION, images=[noise(24, 24), noise(40, 24, 1)]),
        build(processor, "What?", images=[noise(97, 56, 2)], answer="seven"),
        build(processor, "And without a picture?"),
    ]
    if name in FILMED and name != "glm4v":
        rows.append(build(processor, "What moves?", video=[noise(24, 24, k) for k in range(4)]))
    batch = collate(rows, processor.pad_token_id)
    with torch.no_grad():
        together = model(**batch.tensors).logits
        for k, row in enumerate(rows):
            alone = model(**row.tensors).logits[0]
            torch.testing.assert_close(together[k, -len(alone) :], alone, atol=1e-3, rtol=1e-3)


def test_images_and_videos_written_with_one_token_are_not_mixed():
    processor = tiny_processors.processor("glm4v")
    frames = [noise(24, 24, k) for k in range(4)]
    rows = [build(processor, "What?", images=frames[:1]), build(processor, "What?", video=frames)]
    with pytest.raises(InputError, match="uses one token for both"):
        collate(rows, processor.pad_token_id)
    assert len(collate([rows[1], rows[1]], processor.pad_token_id)) == 2


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", ["glm4v", "gemma4", "mistral3", "lfm2_vl"])
def test_a_checkpoint_folder_gives_the_same_inputs(name, nested, tmp_path):
    """In files of their own or, since transformers 5, all in processor_config.json."""
    processor = tiny_processors.processor(name)
    processor.geometry.config.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    images = processor.image_processor.to_dict()
    images["image_processor_type"] = images["image_processor_type"].removesuffix("Pil")
    limits = {"size": {"shortest_edge": 512, "longest_edge": 2048}} if name == "glm4v" else {"max_soft_tokens": 140}
    parts = {"image_processor": images, "video_processor": limits}
    files = {"preprocessor_config.json": images, "video_preprocessor_config.json": limits}
    for file, content in ({"processor_config.json": parts} if nested else files).items():
        (tmp_path / file).write_text(json.dumps(content))
    loaded = load_processor(tmp_path)
    pictures = [noise(40, 24), noise(33, 60)]
    same(build(loaded, QUESTION, images=pictures).tensors, build(processor, QUESTION, images=pictures).tensors)
    if name in FILMED:
        assert loaded.video_size == limits.get("size", limits)
        frames = [noise(40, 24, k) for k in range(4)]
        whole, small = (build(each, QUESTION, video=frames).layout.grid(frame=0) for each in (loaded, processor))
        # 2048 pixels in four frames are 8 tokens each; Gemma 4's budget is doubled.
        assert whole == ((2, 3) if name == "glm4v" else (9, 15)) and small == ((3, 5) if name == "glm4v" else (6, 10))


def test_gemmas_video_token_is_made_a_special_token():
    """Checkpoints have it as a plain word; transformers' own processor adds it at load."""
    before = tiny_processors.processor("gemma4")
    state = json.loads(before.tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != "<|video|>"]
    plain = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), pad_token="<pad>"
    )
    word = token_id("<|video|>")
    assert plain.convert_ids_to_tokens(word) == "<|video|>" and word not in plain("<|video|>")["input_ids"]
    processor = Processor.from_hf(
        config=before.geometry.config, tokenizer=plain, image_processor=before.image_processor
    )
    frames = [noise(24, 24, k) for k in range(2)]
    same(build(processor, QUESTION, video=frames).tensors, build(before, QUESTION, video=frames).tensors)


# --- processors that do not belong to the model ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("qwen2_vl", {"patch_size": 8}, r"\(patch, merge, temporal\) \(8, 2, 2\)\nExpected: \(4, 2, 2\)"),
        ("glm4v", {"temporal_patch_size": 1}, r"\(4, 2, 1\)"),
        ("gemma4", {"pooling_kernel_size": 3}, r"\(patch, pooling\) \(4, 3\)\nExpected: \(4, 2\)"),
        ("lfm2_vl", {"downsample_factor": 4}, r"\(patch, downsampling\) \(4, 4\)"),
        ("lfm2_vl", {"tile_size": 20}, "tiles of 20 pixels and tokens of 8"),
        ("mistral3", {"size": {"longest_edge": 64}}, "at most 32 pixels a side"),
        ("mistral3", {"do_center_crop": True, "crop_size": {"height": 8, "width": 8}}, "do_center_crop"),
    ],
)
def test_image_processors_of_another_model_are_refused(name, settings, message):
    with pytest.raises(UnsupportedModel, match=message):
        tiny_processors.processor(name, tiny_processors.image_processor(name, **settings))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lfm2_vl"])
def test_pictures_as_they_are_must_be_whole_tokens(name):
    processor = tiny_processors.processor(name, tiny_processors.image_processor(name, do_resize=False))
    assert build(processor, "What?", images=[noise(24, 16)]).layout.images == ((24, 16),)
    with pytest.raises(InputError, match="with do_resize=False\nExpected: whole tokens"):
        build(processor, "What?", images=[noise(22, 16)])
