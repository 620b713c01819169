"""Your own samples: what is written is read again, and every bad line is named with its field."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mech.data.haystacks import DOMAINS, haystacks
from mech.data.jsonl import read_samples
from mech.data.jsonl_writing import write_samples
from mech.data.regions import Box, Frames, Mask, Pages
from mech.data.samples import Sample, Samples
from mech.errors import InputError, OutputError


@pytest.fixture
def folder(tmp_path):
    for name, size in {"a": (40, 30), "b": (40, 30), "other": (20, 20)}.items():
        Image.new("RGB", size, "navy").save(tmp_path / f"{name}.png")
    mask = np.zeros((30, 40), dtype=np.uint8)
    mask[5:9, 10:20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask * 0).save(tmp_path / "black.png")
    return tmp_path


GOOD = {"question": "What?", "answer": "this", "images": ["a.png"]}
FILM = {"question": "What?", "answer": "this", "video": ["a.png", "b.png"]}


def read(folder, *records, **options):
    path = folder / "mine.jsonl"
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in records), encoding="utf-8")
    return read_samples(path, **options)


@pytest.mark.parametrize("domain", DOMAINS)
def test_haystacks_are_read_as_they_were_written(domain, tmp_path):
    samples = haystacks(domain, 3, seed=5)
    path = write_samples(samples, tmp_path / "out")
    again = read_samples(path)
    assert again.digest() == samples.digest()
    for one, other in zip(samples, again, strict=True):
        assert (one.id, one.counterfactual.id, one.evidence) == (other.id, other.counterfactual.id, other.evidence)
        assert (
            one.distractors == other.distractors and one.counterfactual.distractors == other.counterfactual.distractors
        )
    if domain == "pages":  # two of three pages are those of the counterfactual, and are there once
        assert len(list((tmp_path / "out/images").iterdir())) == 3 * 4


def test_every_kind_of_region_is_read_as_it_was_written(tmp_path):
    picture, frames = Image.new("RGB", (12, 8)), tuple(Image.new("RGB", (12, 8), (k, 0, 0)) for k in range(3))
    inside = np.zeros((8, 12), dtype=bool)
    inside[2:4, 5] = True
    still = Sample("q", "a", images=(picture, picture), id="s",
                   evidence=(Box(1, 2, 3.5, 4, image=1), Mask(inside, image=1), Pages(0, 1)))  # fmt: skip
    film = Sample("q", "a", video=frames, fps=4.0, id="f", domain="film",
                  evidence=(Box(0, 0, 1, 1, frame=2), Mask(inside, frame=1), Frames(0, 2)))  # fmt: skip
    samples = Samples([still, film])
    again = read_samples(write_samples(samples, tmp_path, "x.jsonl"))
    assert again.digest() == samples.digest() and again[1].fps == 4.0
    assert [sample.evidence for sample in again] == [still.evidence, film.evidence]


def test_what_is_left_out_has_a_default(folder):
    record = {
        **GOOD,
        "evidence": [{"box": [1, 2, 3, 4]}, {"xywh": [1, 2, 3, 4]}, {"mask": "mask.png"}],
        "meta": {"x": 1},
    }
    (sample,) = read(folder, "", record)
    assert (sample.id, sample.domain, sample.fps) == ("mine:2", "mine", 2.0)
    box, other, mask = sample.evidence
    assert box == Box(1, 2, 3, 4) and other == Box(1, 2, 4, 6) and mask.pixels.sum() == 40
    partner = {"answer": "that", "images": ["b.png"]}
    (sample,) = read(folder, {**record, "counterfactual": partner})
    assert sample.counterfactual.answer == "that" and sample.counterfactual.evidence == sample.evidence
    assert sample.counterfactual.question == "What?" and sample.counterfactual.counterfactual is None


def test_a_rotated_photograph_is_upright_and_boxes_are_in_its_pixels(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (40, 30)).save(folder / "turned.jpg", exif=exif)
    (sample,) = read(folder, {**GOOD, "images": ["turned.jpg"], "evidence": [{"box": [0, 0, 30, 40]}]})
    assert sample.images[0].size == (30, 40)
    with pytest.raises(InputError, match="does not fit in a picture of 30 x 40"):
        read(folder, {**GOOD, "images": ["turned.jpg"], "evidence": [{"box": [0, 0, 40, 30]}]})


def test_a_picture_is_opened_once(folder):
    first, second = read(folder, GOOD, GOOD)
    assert first.images[0] is second.images[0]


def test_paths_stay_in_the_folder_unless_they_are_named_in_full(folder):
    inner = folder / "inner"
    inner.mkdir()
    with pytest.raises(InputError, match=r"images\[0\]: '\.\./a\.png' lies outside the folder"):
        read(inner, {**GOOD, "images": ["../a.png"]})
    with pytest.raises(InputError, match="lies outside the folder"):
        read(inner, {**GOOD, "images": ["x/../../a.png"]})
    assert len(read(inner, {**GOOD, "images": [str(folder / "a.png")]})) == 1
    assert len(read(inner, GOOD, root=folder)) == 1


def test_links_that_leave_the_folder_are_refused(folder):
    inner = folder / "inner"
    inner.mkdir()
    (inner / "here.png").symlink_to(folder / "a.png")
    (inner / "images").symlink_to(folder)
    (inner / "round.png").symlink_to("round.png")
    for name in ("here.png", "images/a.png"):
        with pytest.raises(InputError, match=rf"images\[0\]: '{name}' lies outside the folder"):
            read(inner, {**GOOD, "images": [name]})
        assert len(read(inner, {**GOOD, "images": [str(inner / name)]})) == 1  # named in full
    with pytest.raises(InputError, match=r"images\[0\]: .*round\.png"):
        read(inner, {**GOOD, "images": ["round.png"]})
    (folder / "b.png").unlink()
    (folder / "b.png").symlink_to("a.png")  # stays inside
    assert len(read(folder, {**GOOD, "images": ["b.png"]})) == 1
    (folder / "itself").symlink_to(folder)
    assert len(read(folder / "itself", {**GOOD, "images": ["b.png"]})) == 1


def test_a_snapshot_of_the_hub_is_made_of_links(folder):
    """Its files are links into the blobs beside it, and no others."""
    snapshot = folder / "datasets--o--d" / "snapshots" / "abc" / "data"
    snapshot.mkdir(parents=True)
    blobs = folder / "datasets--o--d" / "blobs"
    blobs.mkdir()
    (folder / "a.png").rename(blobs / "123")
    (snapshot / "a.png").symlink_to("../../../blobs/123")
    assert len(read(snapshot, GOOD)) == 1
    (snapshot / "b.png").symlink_to(folder / "b.png")
    with pytest.raises(InputError, match="lies outside the folder"):
        read(snapshot, {**GOOD, "images": ["b.png"]})


def test_pipes_and_devices_are_not_waited_for(folder):
    os.mkfifo(folder / "pipe.png")
    for name in ("pipe.png", "/dev/zero"):
        with pytest.raises(InputError, match=rf"{name}.* cannot be read as a picture \(it is not a regular file\)"):
            read(folder, {**GOOD, "images": [name]})
    os.mkfifo(folder / "pipe.jsonl")
    for path in (folder / "pipe.jsonl", folder, "/dev/zero"):
        with pytest.raises(OutputError, match=r"cannot be read(.|\n)*it is (not a regular file|a folder)"):
            read_samples(path)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ('{"question": ' + "[" * 100_000, ["line 1, the line", "one JSON object", "deeper than 64"]),
        ({**GOOD, "meta": json.loads("[" * 80 + "]" * 80)}, ["line 1, the line", "deeper than 64"]),
        ({**GOOD, "domain": "\x1b[2Jcats"}, ["domain:", r"\x1b[2Jcats", "a name that can be printed"]),
        ({**GOOD, "domain": "cats\ndogs"}, ["domain:", "a name that can be printed"]),
        ({**GOOD, "domain": "cats\u202edogs"}, ["domain:", "a name that can be printed"]),
        ({**GOOD, "question": "half \ud83d"}, ["question:", "complete characters"]),
        ({**GOOD, "images": ["a\0.png"]}, ["images[0]:", "the path of a picture"]),
        ({**GOOD, "evidence": [{"box": [0, 0, 9, 10**400]}]}, ["evidence[0].box:", "four numbers"]),
        ({**FILM, "fps": 10**400}, ["fps:", "frames per second"]),
        ("{'question': 1}", ["line 1, the line", "one JSON object"]),
        ("[", ["without the brackets"]),
        ("[1]", ["a JSON list", "an object"]),
        ({"answer": "this", "images": ["a.png"]}, ["question: missing"]),
        ({**GOOD, "answer": 7}, ["answer: 7", "put it in quotes"]),
        ({**GOOD, "answer": " "}, ["answer: ' '"]),
        ({**GOOD, "imgaes": []}, ["imgaes: an unknown field", "use 'images'"]),
        ({**GOOD, "images": "a.png"}, ["images: 'a.png'", "a list of paths"]),
        ({**GOOD, "images": []}, ["images: neither images nor a video"]),
        ({**GOOD, "video": ["a.png"]}, ["images: images and a video"]),
        ({**GOOD, "images": ["nowhere.png"]}, ["images[0]:", "nowhere.png", "cannot be read"]),
        ({**GOOD, "images": ["mine.jsonl"]}, ["images[0]:", "cannot be read as a picture"]),
        ({**GOOD, "domain": "a/b"}, ["domain: the domain 'a/b'", "a folder name"]),
        ({**FILM, "fps": 0}, ["fps: 0", "more than 0"]),
        ({**FILM, "video": ["a.png", "other.png"]}, ["video: frames of sizes"]),
        ({**GOOD, "evidence": {"box": [1, 2, 3, 4]}}, ["evidence: ", "a list of regions"]),
        ({**GOOD, "evidence": [{"bbox": [1, 2, 3, 4]}]}, ["evidence[0]: ", "box, xywh, mask"]),
        ({**GOOD, "evidence": [{"box": [1, 2, 3]}]}, ["evidence[0].box: [1, 2, 3]", "four numbers"]),
        ({**GOOD, "evidence": [{"box": [1, 2, 3, True]}]}, ["evidence[0].box", "four numbers"]),
        ({**GOOD, "evidence": [{"box": [9, 2, 3, 4]}]}, ["evidence[0].box", "holds no pixel"]),
        ({**GOOD, "evidence": [{"box": [0, 0, 400, 4]}]}, ["does not fit in a picture of 40 x 30"]),
        ({**GOOD, "evidence": [{"box": [0, 0, 4, 4], "image": 1}]}, ["evidence[0].image: 1", "from 0 to 0"]),
        ({**GOOD, "evidence": [{"box": [0, 0, 4, 4], "frame": 0}]}, ["evidence[0].frame", "not allowed here"]),
        ({**FILM, "evidence": [{"box": [0, 0, 4, 4]}]}, ["evidence[0].frame: missing", "from 0 to 1"]),
        ({**GOOD, "evidence": [{"pages": [1]}]}, ["evidence[0].pages: [1]", "count from 0"]),
        ({**GOOD, "evidence": [{"frames": [0]}]}, ["evidence[0].frames: frames of images"]),
        ({**GOOD, "evidence": [{"mask": "other.png"}]}, ["evidence[0].mask: a mask of 20 x 20", "40 x 30"]),
        ({**GOOD, "evidence": [{"mask": "black.png"}]}, ["without a white pixel"]),
        ({**GOOD, "distractors": {}}, ["distractors: {}", "regions with answers"]),
        ({**GOOD, "distractors": [{"box": [0, 0, 4, 4]}]}, ["distractors[0]: ", "a region with its answer"]),
        ({**GOOD, "distractors": [{"box": [0, 0, 4, 4], "answer": 7}]}, ["distractors[0].answer: 7"]),
        ({**GOOD, "counterfactual": "b.png"}, ["counterfactual: 'b.png'"]),
        ({**GOOD, "counterfactual": {"images": ["b.png"]}}, ["counterfactual: the same answer 'this'"]),
        ({**GOOD, "counterfactual": {"answer": "x", "images": ["other.png"]}}, ["pictures of sizes [(20, 20)]"]),
        ({**GOOD, "counterfactual": {"answer": "x", "evidence": [{"xywh": 3}]}}, ["counterfactual.evidence[0].xywh"]),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_with_its_field(folder, record, says):
    with pytest.raises(InputError) as caught:
        read(folder, record)
    assert "mine.jsonl, line 1, " in str(caught.value)
    for words in says:
        assert words in str(caught.value)


def test_all_bad_lines_are_named_at_once(folder):
    with pytest.raises(InputError) as caught:
        read(folder, GOOD, {**GOOD, "answer": ""}, GOOD, {**GOOD, "images": ["x.png"]})
    message = str(caught.value)
    assert "2 of 4 lines" in message and "line 2, answer" in message and "line 4, images[0]" in message
    with pytest.raises(InputError, match="and 4 more"):
        read(folder, *[{**GOOD, "answer": ""}] * 12)


def test_two_samples_of_one_id_are_refused(folder):
    with pytest.raises(InputError, match="line 2, id: 'x' is also the id of line 1"):
        read(folder, {**GOOD, "id": "x"}, {**GOOD, "id": "x"})


def test_files_that_cannot_be_used_are_refused(folder):
    with pytest.raises(OutputError, match="cannot be read"):
        read_samples(folder / "none.jsonl")
    with pytest.raises(OutputError, match="cannot be read"):
        read_samples(folder / "a.png")
    with pytest.raises(InputError, match="holds no sample"):
        read(folder, "", "  ")
    write_samples(haystacks("grounding", 1), folder / "out")
    with pytest.raises(OutputError, match="exists"):
        write_samples(haystacks("grounding", 1), folder / "out")
    with pytest.raises(OutputError, match="cannot be written"):
        write_samples(haystacks("grounding", 1), folder / "a.png")


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    (sample,) = haystacks("grounding", 1)
    for wrong in ([sample, sample], [replace(sample, answer=" ")], [replace(sample, domain="a/b")]):
        with pytest.raises(InputError):
            write_samples(wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_draw_takes_at_most_n_of_each_domain():
    samples = haystacks("grounding", 6) + haystacks("pages", 2)
    drawn = samples.draw(3, seed=1)
    assert [sample.domain for sample in drawn] == ["grounding"] * 3 + ["pages"] * 2
    assert drawn.digest() == samples.draw(3, seed=1).digest() != samples.draw(3, seed=2).digest()


def test_a_draw_from_a_file_opens_no_other_pictures(tmp_path):
    samples = haystacks("grounding", 6) + haystacks("pages", 2)
    path = write_samples(samples, tmp_path)
    part = read_samples(path, n=2, seed=1)
    assert part.digest() == samples.draw(2, seed=1).digest() and len(part) == 4
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = {sample.id for sample in part}
    broken = [line if json.loads(line)["id"] in kept else line.replace("images/", "gone/") for line in lines]
    path.write_text("\n".join(broken), encoding="utf-8")
    assert read_samples(path, n=2, seed=1).digest() == part.digest()
    with pytest.raises(InputError, match="4 of 8 lines"):
        read_samples(path)


def test_texts_may_hold_other_separators_of_lines(tmp_path):
    odd = "first\u2028second\x0bthird\x85"
    samples = [replace(haystacks("grounding", 1)[0], question=odd)]
    assert read_samples(write_samples(samples, tmp_path))[0].question == odd
