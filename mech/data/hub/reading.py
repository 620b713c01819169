"""Text in pictures: TextVQA and synthdog-en with boxes."""

import functools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mech.data.hub.grounding import box_of
from mech.data.hub.source import Record, Source
from mech.data.regions import Box
from mech.data.samples import Sample
from mech.files import parse_json, read

OCR = "TextVQA_Rosetta_OCR_v0.2_{}.json"


def textvqa(record: Record) -> Iterator[Sample]:
    """The most frequent of ten answers; evidence is where its words were read."""
    picture = record.image("image")
    answers = [str(answer).strip() for answer in record.listed("answers")]
    if not any(answers):
        raise record.wrong("answers", f"{answers!r:.60}", "answers; the test split has none", "use split='validation'")
    answer = Counter(text for text in answers if text).most_common(1)[0][0]
    evidence = tuple(_read_words(record, answer, picture.size))
    yield Sample(
        record.text("question"), answer, (picture,), evidence=evidence, domain=record.source.name, id=record.id
    )


def _read_words(record: Record, answer: str, size: tuple[int, int]) -> Iterator[Box]:
    """Boxes of the words of the answer, if each of them was read at least once."""
    part = "train" if str(record.fields.get("set_name", "val")).startswith("train") else "val"
    path = record.path("image_id", OCR.format(part))
    read = _words(path, path.stat().st_mtime_ns).get(record.text("image_id"), [])
    wanted = {_bare(word) for word in answer.split()} - {""}
    found = [(k, word) for k, word in enumerate(read) if _bare(str(word.get("word", ""))) in wanted]
    if {_bare(word["word"]) for _, word in found} != wanted:
        return
    for k, word in found:
        name = f"ocr_info[{k}].bounding_box"
        box = word.get("bounding_box") or {}
        given = [box.get(key) for key in ("top_left_x", "top_left_y", "width", "height")]
        x, y, width, height = record.numbers(name, given, 4)
        pixels = [x * size[0], y * size[1], (x + width) * size[0], (y + height) * size[1]]
        yield box_of(record, name, pixels, size)


def _bare(word: str) -> str:
    return re.sub(r"\W", "", word).lower()


@functools.lru_cache(maxsize=2)
def _words(path: Path, changed: int) -> dict[str, list[dict[str, Any]]]:
    return {record["image_id"]: record.get("ocr_info") or [] for record in parse_json(read(path))["data"]}


def synthdog(record: Record) -> Iterator[Sample]:
    """The first piece of text, which a reader reads out first."""
    picture = record.image("image")
    pieces = record.listed("2_coord")
    if not pieces:  # pages without text
        yield Sample("Read the text in this image.", "(none)", (picture,), domain=record.source.name, id=record.id)
        return
    first = pieces[0] if isinstance(pieces[0], dict) else {}
    corners = [number for corner in first.get("coord") or [] for number in corner]
    box = box_of(record, "2_coord[0].coord", record.numbers("2_coord[0].coord", corners, 4), picture.size)
    text = first.get("chunk")
    if not isinstance(text, str) or not text.strip():
        raise record.wrong("2_coord[0].chunk", repr(text), "the text in the box")
    question = "Read the text in this image."
    yield Sample(question, text.strip(), (picture,), evidence=(box,), domain=record.source.name, id=record.id)


SOURCES = (
    Source(
        "textvqa",
        textvqa,
        key="question_id",
        hub="lmms-lab/textvqa",
        split="validation",
        root=f"{OCR.format('val')}, from textvqa.org",
        evidence="the boxes of the answer's words among the words that Rosetta read; none where a word was not read",
        answer="the most frequent of ten answers: stricter than VQA accuracy",
        verified="fields from the dataset card; ocr_info with word and bounding_box {top_left_x, top_left_y, width, "
        "height} from a published reader",
        assumed="boxes are shares of width and height; their rotation is not used",
        terms="CC-BY-4.0; pictures: OpenImages",
        paper="Singh et al. 2019, arXiv 1904.08920",
    ),
    Source(
        "synthdog-en-detection",
        synthdog,
        key="id",
        hub="nnethercott/synthdog-en-detection",
        split="train",
        evidence="the box of the first piece of text (2_coord, two corners in pixels); pages without text have none",
        answer="the first piece of text: right if a reading begins with it",
        verified="image and 2_coord with chunk and coord [[x0, y0], [x1, y1]] in pixels, from SparseMM's code "
        "(arXiv 2506.05344)",
        assumed="pieces are in reading order",
        terms="see the card",
        paper="Kim et al. 2022, arXiv 2111.15664",
    ),
)
