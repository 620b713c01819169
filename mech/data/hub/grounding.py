"""Boxes in pictures and frames in videos: RefCOCO, RefCOCO+, RefCOCOg, V*Bench, Visual-CoT, VidSTG."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mech.data.hub.source import Record, Source
from mech.data.regions import Box, Frames
from mech.data.samples import Sample
from mech.errors import RegionError
from mech.files import parse_json, read

WHERE = "Please provide the bounding box coordinate of the region this sentence describes: {}"
_SUFFIX = re.compile(r"^(.*)###\[\s*([^,\]]+),([^,\]]+),([^,\]]+),([^,\]]+)\]$")
_REQUEST = re.compile(r"Please (?:think step by step and )?provide the bounding box")
_NUMBER = re.compile(r"-?\d*\.?\d+(?:[eE]-?\d+)?")


def box_of(record: Record, name: str, corners: list[float], size: tuple[int, int]) -> Box:
    """A box in pixels, clipped to the picture if it leaves it by at most 2 pixels and 0.5% of the longer side."""
    width, height = size
    x0, y0, x1, y1 = corners
    slack = 2 + 0.005 * max(size)  # annotations are rounded, and some were made on a copy
    if x0 < -slack or y0 < -slack or x1 > width + slack or y1 > height + slack:
        raise record.wrong(
            name, f"{corners} does not fit in a picture of {width} x {height}", "a box inside it, in pixels"
        )
    try:
        return Box(max(x0, 0), max(y0, 0), min(x1, width), min(y1, height))
    except RegionError as error:
        raise record.wrong(name, error.given, error.expected) from error


def _xywh(record: Record, name: str, given: list[float], size: tuple[int, int]) -> Box:
    x, y, width, height = given
    return box_of(record, name, [x, y, x + width, y + height], size)


def refcoco(record: Record) -> Iterator[Sample]:
    """The first expression for an object; the question asks for its box."""
    picture = record.image("image")
    box = _xywh(record, "bbox", record.numbers("bbox", record.listed("bbox"), 4), picture.size)
    phrases = record.listed("answer")
    if not phrases or not isinstance(phrases[0], str) or not phrases[0].strip():
        raise record.wrong("answer", f"{phrases!r:.80}", "a list of referring expressions")
    (width, height), corners = picture.size, (box.x0, box.y0, box.x1, box.y1)
    answer = [round(1000 * c / side) for c, side in zip(corners, (width, height, width, height), strict=True)]
    question = WHERE.format(phrases[0].strip())
    yield Sample(question, str(answer), (picture,), evidence=(box,), domain=record.source.name, id=record.id)


def visual_cot(record: Record) -> Iterator[Sample]:
    """The question without its request for a box; the box comes from the path, in pixels."""
    paths = record.listed("image")
    if len(paths) != 2 or not (match := _SUFFIX.match(str(paths[1]))):
        raise record.wrong("image", f"{paths!r:.120}", "two paths, the second with ###[x0, y0, x1, y1]")
    picture = record.opened("image", str(paths[0]))
    turns = record.listed("conversations")
    if len(turns) != 4 or not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns):
        raise record.wrong("conversations", f"{turns!r:.80}", "four turns: question, box, picture, answer")
    try:
        corners = [float(number) for number in match.groups()[1:]]
    except ValueError as error:
        raise record.wrong("image", f"{match.group(0)!r}", "###[x0, y0, x1, y1] in pixels") from error
    box = box_of(record, "image", corners, picture.size)
    said = [float(number) for number in _NUMBER.findall(turns[1]["value"])]
    if len(said) == 4:  # the same box again, as fractions of the padded square: reveals a wrong picture
        other = without_padding(said, picture.size)
        far = max(abs(a - b) for a, b in zip(corners, other, strict=True))
        if far > 3 + 0.005 * max(picture.size):
            raise record.wrong(
                "image", f"the path says {corners}, the text {said}, which is {[round(c) for c in other]}",
                f"the same box, on a picture of {picture.width} x {picture.height}", "is this the original picture?",
            )  # fmt: skip
    question = _REQUEST.split(turns[0]["value"].replace("<image>", ""))[0].strip()
    answer = turns[3]["value"].strip()
    if not question or not answer:
        raise record.wrong("conversations", "an empty question or answer", "texts")
    yield Sample(question, answer, (picture,), evidence=(box,), domain=record.source.name, id=record.id)


def without_padding(share: list[float], size: tuple[int, int]) -> list[float]:
    """Fractions of a picture padded to a centred square, converted to pixels of the picture.

    ``x = share * side - (side - width) // 2`` with ``side`` the longer edge, and likewise for y.
    """
    width, height = size
    side = max(size)
    left, top = (side - width) // 2, (side - height) // 2
    return [c * side - offset for c, offset in zip(share, (left, top, left, top), strict=True)]


def vstar(record: Record) -> Iterator[Sample]:
    """A multiple-choice question; the boxes are in the annotation beside the picture."""
    relative = record.text("image")
    picture = record.opened("image", relative)
    beside = record.path("image", str(Path(relative).with_suffix(".json")))
    boxes = parse_json(read(beside)).get("bbox") or []
    regions = tuple(
        _xywh(record, f"{beside.name}: bbox[{k}]", record.numbers(f"{beside.name}: bbox[{k}]", box, 4), picture.size)
        for k, box in enumerate(boxes)
    )
    label = record.text("label")
    if len(label) != 1 or not label.isupper():
        raise record.wrong("label", repr(label), "the letter of the right choice")
    question = record.text("text")
    yield Sample(question, label, (picture,), evidence=regions, domain=record.source.name, id=record.id)


def vidstg(record: Record) -> Iterator[Sample]:
    """One sample per interrogative sentence: frames of the used segment; those of the relation are evidence."""
    first, behind = (record.integer(f"used_segment.{name}") for name in ("begin_fid", "end_fid"))
    begin, end = (record.integer(f"temporal_gt.{name}") for name in ("begin_fid", "end_fid"))
    if not first <= begin < end <= behind:
        raise record.wrong("temporal_gt", f"frames {begin} to {end}", f"a part of the segment, {first} to {behind}")
    frames = record.numbered("vid", record.text("vid"))
    count = min(record.most or 32, behind - first)
    shown = [first + (2 * k + 1) * (behind - first) // (2 * count) for k in range(count)]  # the middle of each part
    if missing := [fid for fid in shown if fid not in frames]:
        raise record.wrong("vid", f"no picture of frame {missing[0]}", record.source.root, "extract all frames, from 0")
    video = tuple(record.opened("vid", frames[fid]) for fid in shown)
    fps = record.get("fps", (int, float), "frames a second")
    objects = {thing.get("tid"): thing.get("category") for thing in record.listed("subject/objects")}
    seen = [k for k, fid in enumerate(shown) if begin <= fid < end]
    evidence = (Frames(*seen),) if seen else ()
    for k, asked in enumerate(record.listed("questions")):
        target, question = asked.get("target_id"), asked.get("description")
        if not isinstance(objects.get(target), str) or not isinstance(question, str):
            raise record.wrong(f"questions[{k}]", f"{asked!r:.80}", "a description, and the target_id of an object")
        yield Sample(
            question, objects[target].replace("_", " ").split("/")[0], video=video, evidence=evidence,
            fps=count * float(fps) / (behind - first), domain=record.source.name, id=f"{record.id}/{record.index}/{k}",
        )  # fmt: skip


_REFCOCO: dict[str, Any] = dict(
    read=refcoco,
    key="question_id",
    evidence="the object's box (bbox, stored as x, y, width, height in pixels)",
    answer="the box as text, [x0, y0, x1, y1] of 1000: accuracy requires every digit and is far below IoU@0.5, and "
    "models differ in how they write boxes. Good for RAM and rankings; do not read ablation accuracy off it",
    verified="fields, types and splits from the dataset card; xywh from lmms-eval's converter",
    assumed="the first expression of `answer` is used where there are several",
    terms="see the card",
    split="val",
)
SOURCES = (
    Source("refcoco", hub="lmms-lab/RefCOCO", paper="Yu et al. 2016, arXiv 1608.00272", **_REFCOCO),
    Source("refcoco+", hub="lmms-lab/RefCOCOplus", paper="Yu et al. 2016, arXiv 1608.00272", **_REFCOCO),
    Source("refcocog", hub="lmms-lab/RefCOCOg", paper="Mao et al. 2016, arXiv 1511.02283", **_REFCOCO),
    Source(
        "vstar",
        vstar,
        key="question_id",
        hub="craigwu/vstar_bench",
        root="a copy of the hub repository (direct_attributes/*.jpg and the *.json next to them)",
        evidence="the boxes of all target objects, from the JSON beside each picture (x, y, width, height in pixels)",
        answer="the letter of the right choice; choices are part of the question",
        verified="fields image (a path), text, category, label, question_id; xywh and `bbox`, `target_object` in the "
        "annotation files (V* evaluation code and a published reading of sa_4690.json)",
        assumed="`label` is a letter",
        terms="see the card",
        paper="Wu & Xie 2023, arXiv 2312.14135",
    ),
    Source(
        "visual-cot",
        visual_cot,
        key="question_id",
        hub="deepcs233/Visual-CoT",
        files="viscot_363k.json",
        split="train",
        root="the set's pictures (cot_images_tar_split, unpacked: cot/gqa/..., cot/docvqa/..., ...)",
        evidence="one box, from the path's suffix, in pixels of the original; where several were annotated, the hull",
        answer="the short answer of the last turn",
        verified="fields, and both copies of the box: suffix in original pixels, text in 0-1 of the centred padded "
        "square (the set's own converter, tools/convert_data_to_llava_format.py)",
        assumed="nothing; a text box that contradicts the suffix is refused",
        terms="Apache-2.0 (code); each source set has its own",
        paper="Shao et al. 2024, arXiv 2403.16999",
    ),
    Source(
        "vidstg",
        vidstg,
        key="vid",
        fetch="download test_annotations.json from github.com/Guaranteer/VidSTG-Dataset and pass records=",
        root="one folder for each video, named after `vid`, with one picture for every frame of the VidOR video, "
        "numbered from 0 (ffmpeg -i VID.mp4 -start_number 0 VID/%06d.jpg)",
        evidence="the frames of temporal_gt (begin inclusive, end exclusive) among those shown, which are spread "
        "evenly over used_segment: most= of them, 32 by default",
        answer="the category of the queried object; interrogative sentences only, the declarative ones have no answer",
        verified="fields from the set's README; begin inclusive and end exclusive from VidOR's format",
        assumed="the category, up to a '/', is an answer that a model would give",
        terms="those of VidOR",
        paper="Zhang et al. 2020, arXiv 2001.06891",
    ),
)
