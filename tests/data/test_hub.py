"""Published sets: records of the true schemas, made by hand, become samples in our conventions; bad ones are named."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

import mech
from mech.data import hub
from mech.data.hub import hub_samples
from mech.data.hub.grounding import without_padding
from mech.data.regions import Box, Frames, Pages
from mech.errors import InputError, OutputError


def paint(size=(40, 30), shade=0):
    return Image.new("RGB", size, (shade, 0, 0))


def coded(picture):
    kept = io.BytesIO()
    picture.save(kept, "PNG")
    return {"bytes": kept.getvalue(), "path": None}


def save(path, picture=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    (picture or paint()).save(path)
    return path


# --- boxes ------------------------------------------------------------------------------------------------------------

REFCOCO = {
    "question_id": "469306", "image": paint(), "question": "Please carefully observe the area circled in the image ...",
    "answer": ["the lady with the blue shirt", "lady on the left"], "segmentation": [1.0, 2.0, 3.0, 4.0],
    "bbox": [4.0, 3.0, 20.0, 15.0], "iscrowd": 0, "file_name": "COCO_train2014_000000296747_0.jpg",
}  # fmt: skip


@pytest.mark.parametrize("name", ["refcoco", "refcoco+", "refcocog"])
def test_refcoco_stores_corner_and_size_in_pixels(name):
    (sample,) = hub_samples(name, records=[REFCOCO])
    assert sample.evidence == (Box(4, 3, 24, 18),)
    assert (
        sample.question.endswith("describes: the lady with the blue shirt") and sample.answer == "[100, 100, 600, 600]"
    )
    assert (sample.id, sample.domain) == (f"{name}/469306", name)


def test_pictures_come_decoded_or_as_bytes():
    (sample,) = hub_samples("refcoco", records=[{**REFCOCO, "image": coded(paint())}])
    assert sample.images[0].size == (40, 30) and sample.images[0].mode == "RGB"


VIEW = {
    "dataset": "gqa", "split": "train", "question_id": 7,
    "image": ["cot/gqa/1.jpg", "cot/gqa/1.jpg###[4, 3, 24, 18]"],
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is she holding? Please provide the bounding box coordinate of the "
         "region that can help you answer the question better."},
        {"from": "gpt", "value": "[0.100, 0.200, 0.600, 0.575]"},
        {"from": "human", "value": "<image>"},
        {"from": "gpt", "value": "a cup"},
    ],
}  # fmt: skip


def test_visual_cot_has_pixels_in_the_path_and_shares_of_the_padded_square_in_the_text(tmp_path):
    save(tmp_path / "cot/gqa/1.jpg")
    (sample,) = hub_samples("visual-cot", records=[VIEW], root=tmp_path)
    assert sample.evidence == (Box(4, 3, 24, 18),)
    assert (sample.question, sample.answer) == ("What is she holding?", "a cup")
    # By the set's own converter: wide pictures get y + (width - height) // 2, all is divided by the width.
    assert without_padding([4 / 40, (3 + 5) / 40, 24 / 40, (18 + 5) / 40], (40, 30)) == pytest.approx([4, 3, 24, 18])
    assert without_padding([(4 + 5) / 40, 3 / 40, (24 + 5) / 40, 18 / 40], (30, 40)) == pytest.approx([4, 3, 24, 18])
    save(tmp_path / "cot/gqa/1.jpg", paint((400, 400)))  # another picture: the two copies part
    with pytest.raises(InputError, match=r"the path says .* the text"):
        hub_samples("visual-cot", records=[VIEW], root=tmp_path)


def test_vstar_boxes_stand_beside_the_picture(tmp_path):
    save(tmp_path / "direct_attributes/sa_1.jpg")
    beside = tmp_path / "direct_attributes/sa_1.json"
    beside.write_text(json.dumps({"target_object": ["glove"], "bbox": [[4, 3, 20, 15]], "options": ["rubber"]}))
    record = {"image": "direct_attributes/sa_1.jpg", "text": "What is the glove made of?\n(A) rubber\n(B) cotton",
              "category": "direct_attributes", "label": "A", "question_id": 0}  # fmt: skip
    (sample,) = hub_samples("vstar", records=[record], root=tmp_path)
    assert sample.evidence == (Box(4, 3, 24, 18),) and sample.answer == "A" and "(B) cotton" in sample.question


FILM = {
    "vid": "515", "frame_count": 60, "fps": 30.0, "width": 40, "height": 30,
    "subject/objects": [{"tid": 0, "category": "bicycle"}, {"tid": 1, "category": "ball/sports_ball"}],
    "used_segment": {"begin_fid": 10, "end_fid": 50}, "temporal_gt": {"begin_fid": 20, "end_fid": 30},
    "used_relation": {"subject_tid": 0, "object_tid": 1, "predicate": "in_front_of", "begin_fid": 20, "end_fid": 30},
    "captions": [{"description": "there is a ball", "type": "object", "target_id": 1}],
    "questions": [{"description": "what is behind the bicycle?", "type": "object", "target_id": 1}],
}  # fmt: skip


def test_vidstg_shows_frames_of_the_segment_and_those_of_the_relation_are_evidence(tmp_path):
    for fid in range(60):
        save(tmp_path / f"515/{fid:06d}.png", paint(shade=fid))
    records = tmp_path / "test_annotations.json"
    records.write_text(json.dumps([FILM]))
    (sample,) = hub_samples("vidstg", records=records, root=tmp_path, most=8)
    shown = [frame.getpixel((0, 0))[0] for frame in sample.video]
    assert shown == [12, 17, 22, 27, 32, 37, 42, 47]
    assert sample.evidence == (Frames(2, 3),)  # begin inclusive, end exclusive
    assert sample.answer == "ball" and sample.fps == 8 * 30 / 40
    with pytest.raises(OutputError, match="pass records="):
        hub_samples("vidstg", root=tmp_path)
    with pytest.raises(InputError, match=r"vidstg, record 0 \(vid = '515'\), the record: AttributeError"):
        hub_samples("vidstg", records=[{**FILM, "questions": ["what?"]}], root=tmp_path)
    with pytest.raises(InputError, match="a part of the segment, 10 to 50"):
        hub_samples("vidstg", records=[{**FILM, "temporal_gt": {"begin_fid": 45, "end_fid": 55}}], root=tmp_path)


# --- pages ------------------------------------------------------------------------------------------------------------


def deck(evidence, pages=5):
    shown = {f"page_{k}": paint(shade=k) if k <= pages else None for k in range(1, 21)}
    return {"deck_name": "d", "qa_id": 3, "question": "How many?", "answer": "12", "evidence_pages": evidence, **shown}


def test_slidevqa_counts_pages_from_one():
    (sample,) = hub_samples("slidevqa", records=[deck([2, 5])])
    assert sample.evidence == (Pages(1, 4),) and len(sample.images) == 5
    with pytest.raises(InputError, match=r"slidevqa, record 0 \(qa_id = 3\), evidence_pages: \[0\]"):
        hub_samples("slidevqa", records=[deck([0])])
    with pytest.raises(InputError, match="page numbers from 1 to 5"):
        hub_samples("slidevqa", records=[deck([6])])


@pytest.mark.parametrize("seed", range(4))
def test_the_evidence_is_among_the_pages_that_are_kept(seed):
    (sample,) = hub_samples("slidevqa", records=[deck([2, 5])], most=3, seed=seed)
    shades = [page.getpixel((0, 0))[0] for page in sample.images]
    assert len(shades) == 3 and shades == sorted(shades)
    assert [shades[k] for k in sample.evidence[0].indices] == [2, 5]


def paper(pages, answer="White", form="Str"):
    return {"doc_id": "report.pdf", "doc_type": "Tutorial/Workshop", "question": "Which?", "answer": answer,
            "evidence_pages": pages, "evidence_sources": "['Chart']", "answer_format": form}  # fmt: skip


@pytest.fixture
def report(tmp_path):
    for k in range(1, 12):
        save(tmp_path / f"report/page-{k:02d}.png", paint(shade=k))
    return tmp_path


def test_mmlongbench_doc_stores_evidence_pages_as_a_string(report):
    (sample,) = hub_samples("mmlongbench-doc", records=[paper("[3, 10]")], root=report)
    assert [sample.images[k].getpixel((0, 0))[0] for k in sample.evidence[0].indices] == [3, 10]
    (sample,) = hub_samples("mmlongbench-doc", records=[paper("[3]", "['White', '10%']", "List")], root=report)
    assert sample.answer == "White, 10%"
    with pytest.raises(InputError, match=r"evidence_pages: 'three'.*\n.*such as \"\[3, 5\]\""):
        hub_samples("mmlongbench-doc", records=[paper("three")], root=report)
    (report / "report/page-04.png").unlink()
    with pytest.raises(InputError, match="number from 1"):
        hub_samples("mmlongbench-doc", records=[paper("[3]")], root=report)


def test_questions_without_evidence_are_passed_over_with_a_warning(report):
    records = [paper("[]", "Not answerable", "None"), paper("[3]")]
    with pytest.warns(UserWarning, match="mmlongbench-doc: 1 samples without evidence skipped"):
        assert len(hub_samples("mmlongbench-doc", records=records, root=report)) == 1
    with pytest.raises(InputError, match="no sample with evidence"), pytest.warns(UserWarning):
        hub_samples("mmlongbench-doc", records=records[:1], root=report)


def test_mmlongbench_finds_pages_by_the_number_in_their_names(tmp_path):
    names = ["a/a_page8.jpg", "b/b_page9.jpg", "a/a_page9.jpg"]
    for name in names:
        save(tmp_path / "mmlongbench-doc" / name)
    record = {"id": "mmlongdoc_4", "doc_name": "a", "question": "What?", "answer": "0-375 miles", "ans_page_list": [9],
              "page_list": [f"mmlongbench-doc/{name}" for name in names], "answer_format": "Str"}  # fmt: skip
    (sample,) = hub_samples("mmlongbench", records=[record], root=tmp_path)
    assert sample.evidence == (Pages(2),)
    with pytest.raises(InputError, match=r"page 7 of a.*\n.*\[8, 9\]"):
        hub_samples("mmlongbench", records=[{**record, "ans_page_list": [7]}], root=tmp_path)
    with pytest.raises(InputError, match="use the set slidevqa"):
        hub_samples("mmlongbench", records=[{**record, "page_list": ["slidevqa/x-3-1024.jpg"]}], root=tmp_path)


def test_mmdocir_boxes_are_in_points_of_the_page_and_pages_count_from_zero(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"doc_name": name, "image_binary": coded(paint((80, 40), k))["bytes"]} for k, name in enumerate("xaaab")]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "MMDocIR_pages.parquet")
    part = {"page": 2, "page_size": [160.0, 120.0], "bbox": [16, 12, 80.0, 60]}
    record = {"doc_name": "a", "domain": "News", "page_indices": [1, 3], "layout_indices": [0, 9], "questions": [
        {"Q": "Where?", "A": "Berlin", "page_id": [2], "type": "['Table']", "layout_mapping": [part]},
        {"Q": "Who?", "A": "['x', 'y']", "page_id": [0, 1], "type": "['Figure']", "layout_mapping": []},
    ]}  # fmt: skip
    first, second = hub_samples("mmdocir", records=[record], root=tmp_path)
    assert first.evidence == (Box(8, 4, 40, 20, image=2),) and second.evidence == (Pages(0, 1),)
    assert [page.getpixel((0, 0))[0] for page in first.images] == [1, 2, 3]
    assert (first.id, second.id, second.answer) == ("mmdocir/a/0", "mmdocir/a/1", "x, y")
    with pytest.raises(InputError, match="row 4 belongs to b"):
        questions = [{**record["questions"][0], "layout_mapping": [{**part, "page": 3}]}]
        hub_samples("mmdocir", records=[{**record, "page_indices": [1, 4], "questions": questions}], root=tmp_path)
    with pytest.raises(InputError, match=r"questions\[0\].layout_mapping\[0\].bbox: "):
        questions = [{**record["questions"][0], "layout_mapping": [{**part, "bbox": [1, 2, 3]}]}]
        hub_samples("mmdocir", records=[{**record, "questions": questions}], root=tmp_path)


# --- needles ----------------------------------------------------------------------------------------------------------


def niah(tmp_path, **changed):
    names = ["obelics/0.jpg", "obelics/1.jpg", "obelics_paste/find-image/2.jpg", "obelics/3.jpg"]
    meta = {"placed_depth": [0.5], "num_images": 4, "needles": ["needle/x.png"], "choices": None,
            "choices_image_path": ["c/0.jpg", "c/1.jpg"], **changed.pop("meta", {})}  # fmt: skip
    for k, name in enumerate([*names, "c/0.jpg", "c/1.jpg"]):
        save(tmp_path / name, paint(shade=10 * k))
    record = {
        "id": 5,
        "images_list": names,
        "context": "a <image> b",
        "question": "Which of these appears?",
        "answer": 1,
    }
    return {**record, "meta": meta, **changed}


def test_the_needle_of_mm_niah_is_a_whole_picture(tmp_path):
    (sample,) = hub_samples("mm-niah", records=[niah(tmp_path)], root=tmp_path)
    assert sample.evidence == (Pages(2),) and sample.answer == "B" and len(sample.images) == 6
    assert "A. picture 5\nB. picture 6" in sample.question
    named = niah(tmp_path, meta={"needles": ["some/1.jpg"], "choices": ["cat", "dog"], "choices_image_path": None})
    (sample,) = hub_samples("mm-niah", records=[named], root=tmp_path, most=2)
    assert len(sample.images) == 2 and "B. dog" in sample.question
    assert sample.images[sample.evidence[0].indices[0]].getpixel((0, 0))[0] in range(8, 13)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"answer": [1, 0, 2]}, "counts are not choices"),
        ({"answer": "the blue one"}, "text needles have no visual evidence"),
        ({"answer": 2}, "the number of a choice"),
        ({"images_list": ["obelics/0.jpg"]}, r"mm-niah, record 0 \(id = 5\), meta.needles"),
        ({"question": "How many <image>?"}, "a picture inside the question"),
        ({"images_list": ["../x/find-image/0.jpg"]}, "lies outside the folder"),
        ({"images_list": ["gone/find-image/0.jpg"]}, "does not exist"),
    ],
)
def test_what_mm_niah_cannot_give_is_said(tmp_path, changed, says):
    with pytest.raises(InputError, match=says):
        hub_samples("mm-niah", records=[niah(tmp_path, **changed)], root=tmp_path)


def test_the_positive_picture_of_visual_haystacks_is_somewhere_else_for_another_seed(tmp_path):
    paths = [f"coco/val2017/{k}.jpg" for k in range(6)]
    for k, path in enumerate(paths):
        save(tmp_path / path, paint(shade=40 * k))
    turns = [{"from": "human", "value": "For the image with a dog, is there a car?"}, {"from": "gpt", "value": "yes"}]
    record = {"pos_image": paths[:1], "neg_image": paths[1:], "conversations": turns}
    places = set()
    for seed in range(12):
        (sample,) = hub_samples("visual-haystacks", records=[record], root=tmp_path, seed=seed, most=4)
        (place,) = sample.evidence[0].indices
        assert len(sample.images) == 4 and sample.answer == "Yes" and sample.images[place].getpixel((0, 0))[0] < 10
        places.add(place)
    assert len(places) > 1
    with pytest.raises(InputError, match="Yes or No"):
        bad = {**record, "conversations": [turns[0], {"from": "gpt", "value": "maybe"}]}
        hub_samples("visual-haystacks", records=[bad], root=tmp_path)


# --- text -------------------------------------------------------------------------------------------------------------


def test_textvqa_evidence_is_where_the_words_of_the_answer_were_read(tmp_path):
    def read(word, x):
        return {
            "word": word,
            "bounding_box": {"top_left_x": x, "top_left_y": 0.1, "width": 0.25, "height": 0.5, "yaw": 0},
        }

    seen = [
        {"image_id": "i", "ocr_tokens": [], "ocr_info": [read("Coca-Cola", 0.0), read("zero,", 0.5), read("x", 0.2)]}
    ]
    (tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json").write_text(json.dumps({"data": seen}))
    record = {"image_id": "i", "question_id": 9, "question": "What drink?", "image": paint(), "set_name": "val",
              "answers": ["coca cola zero", "cocacola Zero", "cocacola Zero"], "ocr_tokens": []}  # fmt: skip
    (sample,) = hub_samples("textvqa", records=[record], root=tmp_path)
    assert sample.answer == "cocacola Zero" and sample.evidence == (Box(0, 3, 10, 18), Box(20, 3, 30, 18))
    with pytest.raises(InputError, match="no sample with evidence"), pytest.warns(UserWarning):
        hub_samples("textvqa", records=[{**record, "answers": ["pepsi"] * 10}], root=tmp_path)
    with pytest.raises(InputError, match=r"answers: .*\n.*the test split has none"):
        hub_samples("textvqa", records=[{**record, "answers": [""] * 10}], root=tmp_path)
    with pytest.raises(InputError, match=r"textvqa without root=.*\n.*Rosetta"):
        hub_samples("textvqa", records=[record])


def test_synthdog_pieces_have_two_corners_in_pixels():
    pieces = [
        {"chunk": "Hello there", "coord": [[4.0, 3.0], [24.0, 18.0]]},
        {"chunk": "x", "coord": [[0, 20], [9, 29]]},
    ]
    record = {"image": coded(paint()), "ground_truth": "{}", "2_coord": pieces, "2_coord_norm": []}
    (sample,) = hub_samples("synthdog-en-detection", records=[record])
    assert sample.answer == "Hello there" and sample.evidence == (Box(4, 3, 24, 18),)
    with pytest.raises(InputError, match=r"record 0, 2_coord\[0\].coord: "):
        hub_samples("synthdog-en-detection", records=[{**record, "2_coord": [{"chunk": "a", "coord": [[1, 2]]}]}])


# --- what all have ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"bbox": [1.0, 2.0, 3.0]}, r"refcocog, record 0 \(question_id = '469306'\), bbox: \[1.0, 2.0, 3.0\]"),
        ({"bbox": None}, "bbox: missing"),
        ({"bbox": [10.0, 10.0, 200.0, 10.0]}, "does not fit in a picture of 40 x 30"),
        ({"bbox": [10.0, 10.0, 0.0, 10.0]}, "holds no pixel"),
        ({"answer": []}, "a list of referring expressions"),
        ({"image": None}, "image: missing"),
        ({"bbox": "[1, 2"}, "bbox: "),
        ({"image": {"bytes": b"not a picture", "path": None}}, "image: "),
    ],
)
def test_a_bad_record_is_named_with_its_field_or_passed_over(changed, says):
    bad = {**REFCOCO, **changed}
    with pytest.raises(InputError, match=says):
        hub_samples("refcocog", records=[bad])
    with pytest.warns(UserWarning, match="refcocog: 1 bad records skipped"):
        assert len(hub_samples("refcocog", records=[bad, REFCOCO], skip_bad=True)) == 1


def test_tables_give_arrays():
    table = {**REFCOCO, "bbox": np.array([4.0, 3.0, 20.0, 15.0]), "answer": np.array(["a lady"], dtype=object)}
    (sample,) = hub_samples("refcoco", records=[table])
    assert sample.evidence == (Box(4, 3, 24, 18),) and type(sample.evidence[0].x0) is float


def test_heads_can_be_ranked_on_pages_and_on_films(tmp_path):
    for fid in range(60):
        save(tmp_path / f"515/{fid:06d}.png", paint(shade=fid))
    model = mech.HookedMLLM.from_pretrained("reference:qwen-s")
    slides = hub_samples("slidevqa", records=[deck([2, 5])], most=3)
    film = hub_samples("vidstg", records=[FILM], root=tmp_path, most=8)
    found = mech.retrieval_attention_mass(model, slides + film)
    assert (found["n_evidence"] > 0).all() and (found["ram"] <= found["vision_mass"] + 1e-6).all()


def test_n_and_seed_choose_and_ids_are_told_apart():
    records = [{**REFCOCO, "question_id": "same", "answer": [str(k)]} for k in range(9)]
    first, again, other = (hub_samples("refcoco", 4, seed, records=records) for seed in (0, 0, 1))
    assert first.digest() == again.digest() != other.digest()
    assert [sample.id for sample in first] == ["refcoco/same", *(f"refcoco/same#{k}" for k in (2, 3, 4))]


def test_a_set_is_streamed_from_the_hub_and_nothing_of_it_is_run(monkeypatch):
    """The stream is a local one here; what ``load_dataset`` is asked for is what the hub would be asked for."""
    rows = [{**REFCOCO, "question_id": str(k), "image": coded(paint())} for k in range(6)]
    text, number = datasets.Value("string"), datasets.Value("float32")
    features = datasets.Features(
        {"image": datasets.Image(), "question_id": text, "answer": datasets.List(text), "bbox": datasets.List(number)}
    )
    kept = [{name: row[name] for name in features} for row in rows]
    asked = []

    def local(*given, **options):
        asked.append((given, options))
        return datasets.Dataset.from_list(kept, features=features).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", local)
    samples = hub_samples("refcocog", 3, seed=1)
    assert len(samples) == 3 and samples[0].evidence == (Box(4, 3, 24, 18),)
    assert asked == [(("lmms-lab/RefCOCOg", None), dict(split="val", data_files=None, streaming=True))]


def test_a_set_that_cannot_be_read_says_where_it_is(monkeypatch):
    def refused(*given, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refused)
    with pytest.raises(OutputError, match="lmms-lab/RefCOCO could not be read: ConnectionError: no network"):
        hub_samples("refcoco")


def test_wrong_names_and_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="use 'refcoco' or 'refcocog'"):
        hub_samples("refcocoq")
    with pytest.raises(InputError, match="at least 1"):
        hub_samples("refcoco", 0)
    with pytest.raises(InputError, match="not a folder"):
        hub_samples("vstar", root=tmp_path / "none")
    with pytest.raises(OutputError, match="cannot be read"):
        hub_samples("refcoco", records=tmp_path / "none.json")


def test_every_row_says_what_it_is_and_stands_in_the_documentation():
    page = (Path(hub.__file__).parents[3] / "docs/data.md").read_text(encoding="utf-8")
    for name in hub.names():
        assert f"`{name}`" in page
        row = hub.source(name)
        assert row.hub or row.fetch, name
        for said in (row.evidence, row.answer, row.verified, row.assumed, row.terms, row.paper):
            assert len(said) > 5, name
        assert not row.fetch or "records" in row.fetch
