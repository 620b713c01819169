"""One picture among many: MM-NIAH and Visual Haystacks."""

from collections.abc import Iterator
from pathlib import PurePosixPath

from mech.data.hub.source import Record, Source
from mech.data.regions import Pages
from mech.data.samples import Sample

ANSWER_LETTER = "Answer with the option's letter from the given choices directly."
# Folders of MM-NIAH that hold only needles.
_NEEDLE_FOLDERS = ("find-image", "abnormal_pic")


def mm_niah(record: Record) -> Iterator[Sample]:
    """Image needles with choices: the pictures of the document, then the choices that are pictures."""
    paths = [str(path) for path in record.listed("images_list")]
    choices = record.get("meta", dict, "the meta record")
    texts, pictures = (list(choices.get(name) or []) for name in ("choices", "choices_image_path"))
    answer = record.get("answer", object, "the number of the right choice")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(texts or pictures):
        raise record.wrong(
            "answer", f"{answer!r:.40}", "the number of a choice: retrieval-image or reasoning-image",
            "text needles have no visual evidence, and counts are not choices: pass files= of another task",
        )  # fmt: skip
    if "<image>" in record.text("question"):
        raise record.wrong("question", "a picture inside the question", "retrieval-image or reasoning-image")
    needed = _needles(record, paths)
    kept = record.kept(len(paths), needed)
    images = [record.opened("images_list", paths[k]) for k in kept]
    images += [record.opened("meta.choices_image_path", str(path)) for path in pictures]
    lines = [f"{chr(65 + k)}. {text}" for k, text in enumerate(texts)]
    lines += [f"{chr(65 + k)}. picture {len(kept) + k + 1}" for k in range(len(pictures))]
    question = "\n".join([record.text("question"), *lines, ANSWER_LETTER])
    evidence = (Pages(*(kept.index(k) for k in needed)),)
    yield Sample(question, chr(65 + answer), tuple(images), evidence=evidence, domain=record.source.name, id=record.id)


def _needles(record: Record, paths: list[str]) -> list[int]:
    """Which pictures hold the needle: those named in meta.needles, else those from the needles' own folders."""
    names = {PurePosixPath(str(needle)).name for needle in record.listed("meta.needles")}
    found = [k for k, path in enumerate(paths) if PurePosixPath(path).name in names]
    found = found or [k for k, path in enumerate(paths) if any(folder in path for folder in _NEEDLE_FOLDERS)]
    if not found:
        raise record.wrong("meta.needles", f"{sorted(names)}", "a picture in images_list")
    return found


def visual_haystacks(record: Record) -> Iterator[Sample]:
    """A yes-or-no question about the pictures with the anchor object, which stand at random places."""
    positive, negative = ([str(path) for path in record.listed(name)] for name in ("pos_image", "neg_image"))
    if not positive:
        raise record.wrong("pos_image", "[]", "at least one picture")
    turns = record.listed("conversations")
    if len(turns) < 2 or not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns):
        raise record.wrong("conversations", f"{turns!r:.80}", "a question and an answer")
    answer = turns[1]["value"].strip().capitalize()
    if answer not in ("Yes", "No"):
        raise record.wrong("conversations", f"the answer {answer!r}", "Yes or No")
    most = len(negative) if record.most is None else max(0, record.most - len(positive))
    shown = [*positive, *record.rng.sample(negative, min(most, len(negative)))]
    record.rng.shuffle(shown)
    question = "You are given a set of images. Please answer the following question in Yes or No: " + turns[0]["value"]
    yield Sample(
        question.replace("<image>", "").strip(), answer, tuple(record.opened("pos_image", path) for path in shown),
        evidence=(Pages(*sorted(shown.index(path) for path in positive)),), domain=record.source.name, id=record.id,
    )  # fmt: skip


SOURCES = (
    Source(
        "mm-niah",
        mm_niah,
        key="id",
        hub="OpenGVLab/MM-NIAH",
        files="mm_niah_val/annotations/retrieval-image.jsonl",
        split="train",
        root="mm_niah_val/images of the repository, unpacked",
        evidence="the whole picture that holds the needle: there are no boxes",
        answer="the letter of the right choice; choices are part of the question",
        verified="fields from the set's README, choices from its own prompts; needles in meta.needles, or in separate "
        "folders (a published reader found that on all 520 records of retrieval-image)",
        assumed="the text between the pictures is left out: the questions are about the pictures, and a sample has no "
        "place for it. Scores are not those of the benchmark",
        terms="see the card",
        paper="Wang et al. 2024, arXiv 2406.07230",
    ),
    Source(
        "visual-haystacks",
        visual_haystacks,
        key="id",
        hub="tsunghanwu/visual_haystacks",
        files="single_needle/VHs_large/visual_haystack_10.json",
        split="train",
        root="the folder that holds coco/val2017 and coco/test2017",
        evidence="the whole pictures with the anchor object (pos_image)",
        answer="Yes or No: chance is 50%",
        verified="pos_image, neg_image, conversations and the prompt from the benchmark's code; the files from the hub",
        assumed="the second turn of conversations is the answer, as in LLaVA's format",
        terms="MIT; pictures: COCO 2017 (Flickr terms)",
        paper="Wu et al. 2024, arXiv 2407.13766",
    ),
)
