"""Pages: SlideVQA, MMLongBench-Doc, MMLongBench, MMDocIR."""

import ast
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mech.data.hub.grounding import box_of
from mech.data.hub.source import Record, Source
from mech.data.regions import Box, Pages, Region
from mech.data.samples import Sample


def _pages(
    record: Record, count: int, evidence: Sequence[int], open_page: Callable[[int], Image.Image]
) -> tuple[tuple[Image.Image, ...], dict[int, int]]:
    """The pages shown, and the place of each; pages with evidence are always among them."""
    kept = record.kept(count, evidence)
    return tuple(open_page(k) for k in kept), {page: place for place, page in enumerate(kept)}


def _sample(
    record: Record,
    question: str,
    answer: str,
    images: tuple[Image.Image, ...],
    evidence: Sequence[Region],
    id: str = "",
) -> Sample:
    return Sample(question, answer, images, evidence=tuple(evidence), domain=record.source.name, id=id or record.id)


def _from_one(record: Record, name: str, numbers: Sequence[Any], count: int) -> list[int]:
    """Page numbers counted from 1, as indices from 0."""
    if not all(isinstance(n, int) and 1 <= n <= count for n in numbers):
        raise record.wrong(name, f"{list(numbers)}", f"page numbers from 1 to {count}")
    return sorted({n - 1 for n in numbers})


def _answer(given: str) -> str:
    """A list stored as text, ``"['White', '10%']"``, as a person would say it: ``White, 10%``."""
    if given.startswith("[") and given.endswith("]"):
        try:
            read = ast.literal_eval(given)
        except (ValueError, SyntaxError):
            return given
        return ", ".join(map(str, read)) if isinstance(read, list) and read else given
    return given


def slidevqa(record: Record) -> Iterator[Sample]:
    """A deck of up to 20 slides; pages count from 1."""
    present = [k for k in range(1, 21) if record.fields.get(f"page_{k}") is not None]
    if present != list(range(1, len(present) + 1)) or not present:
        raise record.wrong("page_1", f"pages {present}", "page_1 to page_20 without a gap")
    needed = _from_one(record, "evidence_pages", record.listed("evidence_pages"), len(present))
    images, index_of = _pages(record, len(present), needed, lambda k: record.image(f"page_{k + 1}"))
    evidence = [Pages(*(index_of[k] for k in needed))] if needed else []
    yield _sample(record, record.text("question"), record.text("answer"), images, evidence)


def mmlongbench_doc(record: Record) -> Iterator[Sample]:
    """A PDF as pictures of its pages; ``evidence_pages`` is a string, and counts from 1."""
    document = Path(record.text("doc_id")).stem
    pages = record.numbered("doc_id", document)
    if sorted(pages) != list(range(1, len(pages) + 1)):
        raise record.wrong("doc_id", f"pages {sorted(pages)[:8]} in {document}", record.source.root, "number from 1")
    needed = _from_one(record, "evidence_pages", record.listed("evidence_pages"), len(pages))
    images, index_of = _pages(record, len(pages), needed, lambda k: record.opened("doc_id", pages[k + 1]))
    evidence = [Pages(*(index_of[k] for k in needed))] if needed else []
    id = f"{record.source.name}/{document}/{record.index}"
    yield _sample(record, record.text("question"), _answer(record.text("answer")), images, evidence, id)


def mmlongbench(record: Record) -> Iterator[Sample]:
    """Long-document questions: pages of several documents, named ``{document}_page{N}``."""
    paths = [str(path) for path in record.listed("page_list")]
    labels = [re.search(r"([^/]+)_page(\d+)\.\w+$", path) for path in paths]
    if not paths or not all(labels):
        bad = next((path for path, label in zip(paths, labels, strict=True) if not label), "nothing")
        raise record.wrong(
            "page_list", repr(bad), "paths that end in _page{N}.jpg", "use the set slidevqa for the slides"
        )
    document = record.text("doc_name")
    own = {int(label.group(2)): k for k, label in enumerate(labels) if label and label.group(1) == document}
    asked = record.listed("ans_page_list")
    if missing := [page for page in asked if page not in own]:
        raise record.wrong("ans_page_list", f"page {missing[0]} of {document}", f"one of {sorted(own)}")
    needed = sorted({own[page] for page in asked})
    images, index_of = _pages(record, len(paths), needed, lambda k: record.opened("page_list", paths[k]))
    evidence = [Pages(*(index_of[k] for k in needed))] if needed else []
    yield _sample(record, record.text("question"), _answer(record.text("answer")), images, evidence)


def mmdocir(record: Record) -> Iterator[Sample]:
    """All questions of one document; boxes are in points of the page, pages count from 0."""
    first, last = (int(n) for n in record.numbers("page_indices", record.listed("page_indices"), 2))
    table = record.path("page_indices", "MMDocIR_pages.parquet")
    rows = _page_table(table, table.stat().st_mtime_ns)
    if not 0 <= first <= last < len(rows):
        raise record.wrong("page_indices", f"[{first}, {last}]", f"rows of the page table, which has {len(rows)}")
    document = record.text("doc_name")
    opened = functools.cache(lambda page: _picture(record, rows, first + page))  # questions share pages
    for k, asked in enumerate(record.listed("questions")):
        question = record.inside(f"questions[{k}]", asked)
        parts = question.listed("layout_mapping")
        where: list[Any] = [part.get("page") for part in parts if isinstance(part, dict)] or question.listed("page_id")
        if not all(isinstance(page, int) and 0 <= page <= last - first for page in where):
            raise question.wrong("page_id", f"{where}", f"pages from 0 to {last - first}")
        for page in where:
            if (owner := rows.select_columns(["doc_name"])[first + page]["doc_name"]) != document:
                raise record.wrong("page_indices", f"row {first + page} belongs to {owner}", f"pages of {document}")
        images, index_of = _pages(question, last - first + 1, where, opened)
        evidence: list[Region] = (
            [Pages(*(index_of[page] for page in sorted(set(where))))] if not parts and where else []
        )
        for n, part in enumerate(parts):
            name = f"layout_mapping[{n}]"
            width, height = question.numbers(f"{name}.page_size", part.get("page_size"), 2)
            corners = question.numbers(f"{name}.bbox", part.get("bbox"), 4)
            shown = images[index_of[part["page"]]]
            scale = (shown.width / width, shown.height / height) * 2
            pixels = [c * s for c, s in zip(corners, scale, strict=True)]
            box = box_of(record, f"{name}.bbox", pixels, shown.size)
            evidence.append(Box(box.x0, box.y0, box.x1, box.y1, image=index_of[part["page"]]))
        yield _sample(record, question.text("Q"), _answer(question.text("A")), images, evidence, f"{record.id}/{k}")


@functools.lru_cache(maxsize=2)
def _page_table(path: Path, changed: int) -> Any:
    """The page table, left on disk: the file is one row group of gigabytes and is never held in memory."""
    import datasets

    return datasets.Dataset.from_parquet(str(path))


def _picture(record: Record, rows: Any, index: int) -> Image.Image:
    row = rows.select_columns(["image_binary"])[index]
    return record.inside(f"row {index} of the pages", row).image("image_binary")


SOURCES = (
    Source(
        "slidevqa",
        slidevqa,
        key="qa_id",
        hub="NTT-hil-insight/SlideVQA",
        evidence="the slides of evidence_pages (stored from 1)",
        answer="short text; numbers as they stand on the slide or are computed",
        verified="fields and 'evidence pages (1 - 20)' from the set's README; pictures in page_1 to page_20; gated: "
        "its terms must be accepted on the hub",
        assumed="evidence_pages holds whole numbers",
        terms="NTT evaluation licence (gated)",
        paper="Tanaka et al. 2023, arXiv 2301.04883",
    ),
    Source(
        "mmlongbench-doc",
        mmlongbench_doc,
        key="doc_id",
        hub="yubo2333/MMLongBench-Doc",
        split="train",
        root="one folder for each document, named after doc_id without .pdf, with a picture for every page, numbered "
        "from 1 (pdftoppm -png DOC.pdf DOC/page)",
        evidence="the pages of evidence_pages (a string, counting from 1); unanswerable questions have none",
        answer="short text; lists are joined by commas, which is seldom stated",
        verified="fields, the string and counting from 1 (the set's data/samples.json: 'the chart on page 14' is [14])",
        assumed="the hub's parquet has the fields of samples.json; PDFs must be rendered by you",
        terms="see the card",
        paper="Ma et al. 2024, arXiv 2407.01523",
    ),
    Source(
        "mmlongbench",
        mmlongbench,
        key="id",
        hub="ZhaoweiWang/MMLongBench",
        fetch="download 0_mmlb_data.tar.gz from the hub, and pass records='mmlb_data/documentQA/mmlongdoc_K8.jsonl' "
        "(or longdocurl_K*)",
        root="mmlb_image, from 5_docqa_image.tar.gz",
        evidence="the pages of ans_page_list among page_list, by the number in the file's name",
        answer="short text, or 'Not answerable'",
        verified="question, answer, doc_name, page_list from the benchmark's data.py; ans_page_list from a published "
        "reader",
        assumed="ans_page_list and the names count alike (a published converter says from 0); slides, whose names are "
        "different, are refused",
        terms="see the card; each source set has its own",
        paper="Wang et al. 2025, arXiv 2505.10610",
    ),
    Source(
        "mmdocir",
        mmdocir,
        key="doc_name",
        hub="MMDocIR/MMDocIR_Evaluation_Dataset",
        files="MMDocIR_annotations.jsonl",
        split="train",
        root="MMDocIR_pages.parquet of the same repository",
        evidence="the layout boxes (points of page_size, scaled to the picture), pages counting from 0; whole pages "
        "where there are none",
        answer="short text; lists are joined by commas",
        verified="fields and formats from the set's README and annotations ('page 47' is page_id 46); page_indices are "
        "the first and last row",
        assumed="boxes have their origin in the upper left corner",
        terms="Apache-2.0 (code), CC-BY-NC-4.0 (data)",
        paper="Dong et al. 2025, arXiv 2501.08828",
    ),
)
