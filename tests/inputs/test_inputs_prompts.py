"""Questions to tensors: the Hugging Face processors and the models' own positions are the judges."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BatchFeature, LlavaProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from mech.data.regions import Frames
from mech.errors import InputError, UnsupportedModel
from mech.inputs import Inputs, Processor, build, collate, encode, load_processor
from mech.reference import tiny, tiny_processors
from mech.reference.tiny_processors import image_processor, noise
from mech.reference.tiny_tokenizer import tokenizer

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl")

QUESTION = "Which digit is in the red frame?"
TEMPLATE = "{% for c in messages[0].content %}{% if c.type == 'text' %}TEXT{% else %}IMAGE{% endif %}{% endfor %}"


class VideoPixels:
    """Stands for a video processor, none of which runs without torchvision: its own patches, frames as they are.

    Qwen2.5-VL's cannot even be imported; it cuts patches as Qwen3-VL's does.
    """

    def __init__(self, made, image_processor):
        self.made, self.image_processor = made, image_processor
        self.merge_size, self.temporal_patch_size = made.merge_size, made.temporal_patch_size

    def __call__(self, videos, video_metadata, **kwargs):
        frames = torch.stack([self.normal(frame) for frame in videos[0]])[None]
        patches, *grid = self.made.patchify(frames, self.made.patch_size, self.merge_size, self.temporal_patch_size)
        data = {"pixel_values_videos": patches[0], "video_grid_thw": torch.tensor([grid])}
        return BatchFeature({**data, "video_metadata": video_metadata})

    def normal(self, frame: Image.Image) -> torch.Tensor:
        pixels = torch.tensor(np.asarray(frame)).permute(2, 0, 1).float() / 255
        mean, std = (
            torch.tensor(values)[:, None, None]
            for values in (self.image_processor.image_mean, self.image_processor.image_std)
        )
        return (pixels - mean) / std


class Metadata:
    """Frames that were sampled already, ``fps`` a second."""

    def __init__(self, count: int, fps: float):
        self.frames_indices, self.fps, self.sampled_fps = list(range(count)), fps, fps


def oracle(family: str):
    """The Hugging Face processor of a family; its check of classes needs torchvision, and is left out."""
    if family == "llava":
        return LlavaProcessor(
            image_processor("llava"),
            tokenizer(),
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    base = {"qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}[family]
    unchecked = type(base.__name__, (base,), {"check_argument_for_proper_class": lambda self, name, given: None})
    images = image_processor("qwen3_vl")
    return unchecked(images, tokenizer(), VideoPixels(Qwen3VLVideoProcessor(patch_size=4), images))


def same(ours: dict, theirs: dict) -> None:
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        their = torch.as_tensor(theirs[name])
        assert value.shape == their.shape and torch.equal(value.double(), their.double()), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [[(40, 24)], [(24, 24), (30, 77), (100, 33)]])
def test_images_are_those_of_the_hugging_face_processor(family, sizes):
    processor = tiny_processors.processor(family)
    pictures = [noise(*size, seed=k) for k, size in enumerate(sizes)]
    text = processor.prompt(QUESTION, images=len(sizes))
    theirs = oracle(family)(images=pictures, text=text, return_tensors="pt")
    theirs.pop("token_type_ids", None)
    same(build(processor, QUESTION, images=pictures).tensors, dict(theirs))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize(("count", "fps"), [(1, 2.0), (4, 1.0), (7, 3.0)])
def test_videos_are_those_of_the_hugging_face_processor(family, count, fps):
    processor = tiny_processors.processor(family)
    frames = [noise(32, 24, seed) for seed in range(count)]
    theirs = oracle(family)._process_videos([frames], video_metadata=[Metadata(count, fps)])
    data, replacement = theirs
    text = processor.prompt(QUESTION, video=True)
    whole = oracle(family)
    written = text.replace("<|video_pad|>", replacement[0])
    expected = whole.tokenizer(written, return_tensors="pt")
    ours = build(processor, QUESTION, video=frames, fps=fps)
    assert torch.equal(ours.tensors["input_ids"], expected["input_ids"])
    kinds = torch.tensor(whole.create_mm_token_type_ids(expected["input_ids"]))
    assert torch.equal(ours.tensors["mm_token_type_ids"], kinds)
    assert torch.equal(ours.tensors["video_grid_thw"], data["video_grid_thw"])
    torch.testing.assert_close(ours.tensors["pixel_values_videos"], data["pixel_values_videos"])
    if family == "qwen2_5_vl":
        assert ours.tensors["second_per_grid_ts"].tolist() == pytest.approx(data["second_per_grid_ts"])
    else:
        assert "second_per_grid_ts" not in ours.tensors


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("shown", ["images", "video"])
def test_the_models_rotary_positions_follow_the_layout(family, shown):
    """Row and column of the layout are the second and third rotary position, but for each picture's offset."""
    processor, model = tiny_processors.processor(family), tiny.model(family)
    if shown == "images":
        first = build(processor, QUESTION, images=[noise(40, 24), noise(24, 56)])
    else:
        first = build(processor, QUESTION, video=[noise(40, 24, k) for k in range(6)], fps=0.5)
    batch = collate([first, build(processor, "What?", images=[noise(64, 64)] * 3)], processor.pad_token_id)
    names = (
        "input_ids",
        "mm_token_type_ids",
        "image_grid_thw",
        "video_grid_thw",
        "second_per_grid_ts",
        "attention_mask",
    )
    given = {name: batch.tensors[name] for name in names if name in batch.tensors}
    positions, _ = model.model.get_rope_index(**given)
    for row, layout in enumerate(batch.layouts):
        for picture in {(layout.image[p], layout.frame[p]) for p in layout.positions("image")}:
            here = np.flatnonzero((layout.image == picture[0]) & (layout.frame == picture[1]) & (layout.row >= 0))
            time, high, wide = positions[:, row, here].numpy()
            start = high[0]
            assert (high - layout.row[here] == start).all() and (wide - layout.col[here] == start).all()
            assert len(set(time)) == 1
            if family == "qwen3_vl" or picture[1] < 0:
                assert time[0] == start
            else:  # four seconds between temporal patches of two frames, at 4 positions a second
                assert time[0] - start == int(picture[1] / 2 * 4 * model.config.vision_config.tokens_per_second)


def test_the_layouts_of_a_batch_are_those_of_its_rows():
    """That the logits are is for ``test_check.py``, and with answers or videos ``test_inputs_dynamic.py``."""
    processor = tiny_processors.processor("qwen3_vl")
    rows = [
        build(processor, QUESTION, images=[noise(24, 24), noise(40, 24, 1)]),
        build(processor, "What?", images=[noise(24, 56, 2)], answer="seven"),
        build(processor, "And without a picture?"),
        build(processor, "What moves?", video=[noise(24, 24, k) for k in range(4)]),
    ]
    batch = collate(rows, processor.pad_token_id)
    assert len(batch) == len(batch.layouts) == len(rows)
    for ids, mask, layout, row in zip(
        batch.tensors["input_ids"], batch.tensors["attention_mask"], batch.layouts, rows, strict=True
    ):
        assert (layout.positions("all") == np.flatnonzero(mask)).all()
        own = row.tensors["input_ids"][0, row.layout.positions("question")]
        assert torch.equal(ids[layout.positions("question")], own)


def test_batches_join_to_larger_batches():
    processor = tiny_processors.processor("qwen3_vl")
    rows = [build(processor, "x" * n, images=[noise(24, 24, n)]) for n in (3, 9, 6)]
    pad = processor.pad_token_id
    at_once, in_steps = collate(rows, pad), collate([collate(rows[:2], pad), rows[2]], pad)
    same(at_once.tensors, in_steps.tensors)
    assert [repr(layout) for layout in at_once.layouts] == [repr(layout) for layout in in_steps.layouts]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("question", [QUESTION, "user", "USER: 7", "  spaces  ", "Wo ist die 7? äöü 数字", "a\nb", "?"])
def test_the_question_is_found_by_place_and_not_by_its_words(family, question):
    processor = tiny_processors.processor(family)
    layout = build(processor, question, images=[noise(24, 24)], answer="user").layout
    positions = layout.positions("question")
    assert (np.diff(positions) == 1).all() and positions[0] > layout.positions("image")[-1]
    ids = build(processor, question, images=[noise(24, 24)]).tensors["input_ids"][0]
    assert processor.tokenizer.decode(ids[positions]).strip() == question.strip()
    answer = build(processor, question, images=[noise(24, 24)], answer="user")
    assert (
        processor.tokenizer.decode(answer.tensors["input_ids"][0, answer.layout.positions("answer")]).strip() == "user"
    )
    assert answer.layout.positions("answer")[-1] == answer.layout.positions("last")[0]
    assert tuple(answer.tensors["input_ids"][0, answer.layout.positions("answer")].tolist()) == processor.answer_ids(
        "user"
    )
    assert torch.equal(answer.tensors["input_ids"][0, : len(ids)], ids)


def test_templates_may_strip_the_question_but_not_change_it():
    template = TEMPLATE.replace("TEXT", "[ {{ c.text | trim }} ]").replace("IMAGE", "<image>")
    processor = tiny_processors.processor("llava", chat_template=template)
    layout = build(processor, "  What?  ", images=[noise(24, 24)]).layout
    assert "".join(layout.tokens[p] for p in layout.positions("question")).strip() == "What?"
    for bad in ("| upper", "| replace('What', 'Who')", "~ c.text"):
        changed = tiny_processors.processor("llava", chat_template=template.replace("| trim", bad))
        with pytest.raises(InputError, match="does not print the question exactly once"):
            build(changed, "What?", images=[noise(24, 24)])


def test_a_first_special_token_in_the_template_is_not_doubled():
    tokens = tokenizer(bos_token="<s>")
    from tokenizers.processors import TemplateProcessing

    tokens.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = {
        "config": tiny.MODELS["llava"](),
        "image_processor": image_processor("llava"),
        "tokenizer": tokens,
    }
    picture = noise(24, 24)
    plain = build(Processor.from_hf(**made), QUESTION, images=[picture])
    own = Processor.from_hf(**made)
    printed = build(Processor.from_hf(**made, chat_template="<s>" + own.chat_template), QUESTION, images=[picture])
    assert plain.tensors["input_ids"].tolist() == printed.tensors["input_ids"].tolist()
    assert plain.tensors["input_ids"][0, :2].tolist().count(1) == 1
    assert plain.layout.spans == printed.layout.spans


@pytest.mark.parametrize("family", FAMILIES)
def test_spans_of_a_text_survive_the_expansion(family):
    processor = tiny_processors.processor(family)
    picture = {"video": [noise(24, 24)] * 5} if family == "qwen3_vl" else {"images": [noise(24, 24)]}
    token = processor.video_token if family == "qwen3_vl" else processor.image_token
    text = f"before {token} behind"
    layout = encode(
        processor, text, **picture, spans={"a": (0, 6), "b": (len(text) - 6, len(text)), "c": (0, len(text))}
    ).layout
    assert "".join(layout.tokens[p] for p in layout.positions("a")) == "before"
    assert "".join(layout.tokens[p] for p in layout.positions("b")).strip() == "behind"
    assert not set(layout.positions("c")) & set(layout.positions("image"))
    assert set(layout.positions("a")) | set(layout.positions("b")) <= set(layout.positions("c"))


def test_pictures_come_in_many_forms(tmp_path):
    processor = tiny_processors.processor("qwen3_vl")
    picture = noise(40, 24)
    expected = build(processor, "What?", images=[picture]).tensors["pixel_values"]
    picture.save(tmp_path / "a.png")
    clear = picture.convert("RGBA")
    for form in (np.asarray(picture), tmp_path / "a.png", str(tmp_path / "a.png"), clear):
        assert torch.equal(build(processor, "What?", images=[form]).tensors["pixel_values"], expected)
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright: to be turned by a quarter
    picture.save(tmp_path / "turned.png", exif=exif)
    turned = build(processor, "What?", images=[tmp_path / "turned.png"])
    assert turned.layout.images == ((24, 40),) and turned.layout.grid() == (5, 3)
    assert torch.equal(
        turned.tensors["pixel_values"],
        build(processor, "What?", images=[picture.transpose(Image.Transpose.ROTATE_270)]).tensors["pixel_values"],
    )
    nothing = Image.new("RGBA", (24, 24), (0, 0, 0, 0))
    white = Image.new("L", (24, 24), 255)
    ours = [build(processor, "What?", images=[one]).tensors["pixel_values"] for one in (nothing, white)]
    assert torch.equal(*ours)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("no/such.png", "cannot be read as a picture"),
        (np.zeros((3, 8, 8), dtype=np.uint8), r"uint8 and shape \(3, 8, 8\)"),
        (np.zeros((8, 8, 3)), "float64"),
        (Image.new("I", (8, 8)), "mode 'I'"),
        (Image.new("RGB", (0, 8)), "0 x 8 pixels"),
        (7, "type int"),
    ],
)
def test_what_is_no_picture_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        build(tiny_processors.processor("llava"), "What?", images=[given])


def test_counts_and_placeholders_are_checked():
    llava, qwen = tiny_processors.processor("llava"), tiny_processors.processor("qwen3_vl")
    picture = noise(24, 24)
    with pytest.raises(InputError, match="0 placeholders '<image>' in the text for 1 image\n"):
        encode(llava, "no picture", images=[picture])
    with pytest.raises(InputError, match="2 placeholders '<image>' in the text for 0 images"):
        encode(llava, "<image><image>")
    with pytest.raises(InputError, match=r"0 placeholders '<\|video_pad\|>' in the text for 1 video"):
        encode(qwen, "nothing", video=[picture])
    with pytest.raises(InputError, match=r"1 placeholders '<\|image_pad\|>' in the text for 0 images"):
        encode(qwen, "<|video_pad|> <|image_pad|>", video=[picture])
    with pytest.raises(InputError, match="both images and a video"):
        build(qwen, "What?", images=[picture], video=[picture])
    with pytest.raises(InputError, match="takes none"):
        build(llava, "What?", video=[picture])
    with pytest.raises(InputError, match="side by side"):
        encode(qwen, "<|image_pad|><|image_pad|>", images=[picture, picture])
    with pytest.raises(InputError, match=r"images=\[\.\.\.\]"):
        build(llava, "What?", images=picture)
    with pytest.raises(InputError, match="placeholders '<image>' in the text for 2 images"):
        build(
            tiny_processors.processor("llava", chat_template="<image>{{ messages[0].content[-1].text }}:"),
            "?",
            images=[picture] * 2,
        )
    assert encode(llava, "<image><image>", images=[picture] * 2).layout.images == ((24, 24),) * 2
    assert "pixel_values" not in build(qwen, "What?").tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_typed_does_not_become_a_picture(family):
    processor = tiny_processors.processor(family)
    for token in (processor.image_token, "<|im_end|>"):
        with pytest.raises(InputError, match="the question holds the special token"):
            build(processor, f"What is {token}?", images=[noise(24, 24)])
        with pytest.raises(InputError, match="the answer holds the special token"):
            build(processor, "What?", images=[noise(24, 24)], answer=token)
    with pytest.raises(InputError, match="an empty question"):
        build(processor, " \n", images=[noise(24, 24)])


def test_videos_are_checked():
    processor = tiny_processors.processor("qwen2_5_vl")
    with pytest.raises(InputError, match=r"frames of sizes \[\(24, 24\), \(32, 24\)\]"):
        build(processor, "What?", video=[noise(24, 24), noise(32, 24)])
    for fps in (0, -1.0, float("nan")):
        with pytest.raises(InputError, match="fps="):
            build(processor, "What?", video=[noise(24, 24)], fps=fps)


def test_a_video_has_its_own_limits():
    """Qwen3-VL's limits are of the whole video, Qwen2.5-VL's of a frame."""
    frames = [noise(64, 48, k) for k in range(8)]
    limits = {"shortest_edge": 64, "longest_edge": 8 * 24 * 32}
    whole = build(tiny_processors.processor("qwen3_vl", video_size=limits), "What?", video=frames).layout
    each = build(
        tiny_processors.processor("qwen2_5_vl", video_size={**limits, "longest_edge": 24 * 32}), "What?", video=frames
    ).layout
    assert whole.grid(frame=0) == each.grid(frame=0) == (3, 4)
    assert whole.rectangle(int(whole.positions(Frames(7))[-1])) == (48, 32, 64, 48)
    free = build(tiny_processors.processor("qwen3_vl"), "What?", video=frames).layout
    assert free.grid(frame=0) == (6, 8)


def test_batches_that_do_not_fit_are_refused():
    llava, qwen = tiny_processors.processor("llava"), tiny_processors.processor("qwen3_vl")
    one, two = (build(p, "What?", images=[noise(24, 24)]) for p in (llava, qwen))
    with pytest.raises(InputError, match="made for different models"):
        collate([one, two], 0)
    with pytest.raises(InputError, match="empty list"):
        collate([], 0)
    small = {**two.tensors, "pixel_values": two.tensors["pixel_values"][:, :-3]}
    with pytest.raises(InputError, match="'pixel_values' of shapes"):
        collate([two, Inputs(small, two.layouts)], 0)
    with pytest.raises(InputError, match="one layout for each row"):
        Inputs(two.tensors, (two.layout.shifted(1, len(two.layout) + 1),))
    with pytest.raises(InputError, match=r"use \.layouts\[row\]"):
        _ = collate([two, two], 0).layout


def test_inputs_move_and_show_themselves():
    inputs = build(tiny_processors.processor("qwen2_5_vl"), "What?", video=[noise(24, 24)])
    half = inputs.to("cpu", torch.bfloat16)
    assert half.tensors["pixel_values_videos"].dtype == torch.bfloat16
    assert half.tensors["second_per_grid_ts"].dtype == torch.float32 and half.tensors["input_ids"].dtype == torch.int64
    assert inputs.to().tensors["pixel_values_videos"].dtype == torch.float32
    assert "pixel_values_videos (36, 96)" in repr(inputs) and "1 video frames" in repr(inputs)
    assert "2 rows" in repr(collate([inputs, inputs], 0))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_folder_gives_the_same_inputs(family, tmp_path):
    processor = tiny_processors.processor(family)
    tiny.MODELS[family]().save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    loaded = load_processor(tmp_path)
    pictures = [noise(40, 24), noise(33, 60)]
    same(build(loaded, QUESTION, images=pictures).tensors, build(processor, QUESTION, images=pictures).tensors)
    assert json.loads(json.dumps(loaded.settings())) == loaded.settings() == processor.settings()
    shown = f"<|vision_start|>{processor.image_token}<|vision_end|>"
    template = TEMPLATE.replace("TEXT", "{{ c.text }}!").replace("IMAGE", shown)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (tmp_path / "video_preprocessor_config.json").write_text('{"size": {"shortest_edge": 64, "longest_edge": 999}}')
    again = load_processor(tmp_path)
    assert again.chat_template == template and again.video_size == {"shortest_edge": 64, "longest_edge": 999}
    (tmp_path / "chat_template.jinja").write_text(template + "?")
    assert load_processor(tmp_path).chat_template == template + "?"


def test_checkpoints_that_cannot_be_opened_say_so(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"cannot be loaded(.|\n)*run it again"):
        load_processor(tmp_path / "absent")
    tiny.MODELS["llava"]().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="cannot be loaded"):
        load_processor(tmp_path)
    tokens, config = tokenizer(), tiny.MODELS["llava"]()
    with pytest.raises(UnsupportedModel, match="without image processor and config"):
        Processor.from_hf(tokenizer=tokens)
    config.image_token_index = 500
    with pytest.raises(UnsupportedModel, match=r"config\.image_token_id=500"):
        Processor.from_hf(config=config, tokenizer=tokens, image_processor=image_processor("llava"))
    config.image_token_index = 300
    tokens = tokenizer()
    with pytest.raises(UnsupportedModel, match="its own special token"):
        Processor.from_hf(config=config, tokenizer=tokens, image_processor=image_processor("llava"))


def test_a_hugging_face_processor_is_taken_apart():
    made = Processor.from_hf(oracle("llava"), tiny.MODELS["llava"]())
    assert made.image_token == "<image>" and made.video_token is None
    hf = oracle("qwen3_vl")
    hf.video_processor.size = {"shortest_edge": 64, "longest_edge": 6400}
    assert Processor.from_hf(hf, tiny.MODELS["qwen3_vl"]()).video_size == {"shortest_edge": 64, "longest_edge": 6400}


def test_torchvision_processors_are_exchanged_for_their_pil_variant():
    """Results must not depend on whether torchvision is installed."""
    fast = {"backend": property(lambda self: "torchvision")}
    made = image_processor("llava", resample=0, do_normalize=False)
    config, tokens = tiny.MODELS["llava"](), tokenizer()
    for name in ("CLIPImageProcessor", "CLIPImageProcessorFast"):
        stand_in = type(name, (type(made),), fast).from_dict(made.to_dict())
        taken = Processor.from_hf(config=config, tokenizer=tokens, image_processor=stand_in)
        assert type(taken.image_processor) is type(made) and taken.image_processor.to_dict() == made.to_dict()
    alien = type("AlienImageProcessor", (type(made),), fast)()
    with pytest.raises(UnsupportedModel, match="AlienImageProcessorPil"):
        Processor.from_hf(config=config, tokenizer=tokens, image_processor=alien)


@pytest.mark.parametrize(("family", "before"), [("llava", "ASSISTANT: "), ("qwen3_vl", "assistant\n")])
def test_an_answer_stands_where_the_model_would_write_it(family, before):
    """A space after a word, nothing after a line break, and never two."""
    processor = tiny_processors.processor(family)
    for answer in ("seven", " seven"):
        text = "".join(build(processor, "What?", answer=answer).layout.tokens)
        assert text.endswith(before + (answer.strip() if family == "llava" else answer))
