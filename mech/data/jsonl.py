"""Your own samples: one JSON object per line, with pictures beside the file.

    {"id": "p1", "question": "Which digit is in the red frame?", "answer": "7", "images": ["images/p1.png"],
     "evidence": [{"box": [34, 18, 48, 32]}], "domain": "signs"}

    samples = read_samples("mine/samples.jsonl")
    write_samples(samples, "copy")        # from jsonl_writing; reading it gives the same samples

``docs/data.md`` describes the whole format. Everything is checked on reading: the error for an unusable line gives its
number, the field and what was expected, and nothing is returned unless all lines are good.

Paths are relative to the file and stay in its folder: ``..`` and symbolic links out of it are refused, so that a file
from elsewhere cannot reach other files. An absolute path, or another ``root``, is used as given. Pictures become
upright RGB, as everywhere.

This module does not read video files (give their frames) or leave pictures on disk until they are needed.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mech.arguments import Count, Seed, checking
from mech.data.pictures import picture
from mech.data.regions import Box, Frames, Mask, Pages, Region
from mech.data.samples import Distractor, Sample, Samples, drawn
from mech.errors import InputError, MechError, OutputError, RegionError, printable, suggestion
from mech.files import is_below, parse_json, read_text

FIELDS = tuple(known.name for known in fields(Sample))
REGIONS = ("box", "xywh", "mask", "frames", "pages")
SHOWN = 8  # bad lines listed one by one


@checking(InputError)
def read_samples(
    path: str | Path, root: str | Path | None = None, *, n: Count | None = None, seed: Seed = 0
) -> Samples:
    """The samples of a JSON-lines file.

    Args:
        path: the file. Its name is the default ``domain`` and, with the line number, the default ``id`` of a sample.
        root: where relative paths begin; the file's folder by default.
        n: at most this many of each domain, the same as ``read_samples(path).draw(n, seed)`` gives. The pictures of
            other lines are not opened, and these lines only have to be valid JSON.
        seed: of the draw.

    Raises:
        InputError: lines that cannot be used, each with its number, its field and what was expected.
        OutputError: the file cannot be read.
    """
    path = Path(path).expanduser()
    try:
        # Not splitlines(): a text may contain line separators other than the line break.
        lines = read_text(path, "utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read", "a UTF-8 text file, one JSON object a line", str(error)) from error
    folder = _Folder(Path(root).expanduser() if root is not None else path.parent)
    wrong: list[tuple[int, _Wrong]] = []
    records: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                records[number] = _parsed(line)
        except _Wrong as bad:
            wrong.append((number, bad))
    if n is not None:
        chosen = drawn([str(record.get("domain", path.stem)) for record in records.values()], n, seed)
        records = {number: record for i, (number, record) in enumerate(records.items()) if i in chosen}
    samples: dict[str, Sample] = {}
    numbers: dict[str, int] = {}
    for number, record in records.items():
        try:
            sample = _sample(record, f"{path.stem}:{number}", path.stem, folder)
            with _at("id"):
                if sample.id in samples:
                    raise InputError(
                        f"{sample.id!r} is also the id of line {numbers[sample.id]}", "a unique id",
                        "change one, or leave ids out",
                    )  # fmt: skip
            samples[sample.id], numbers[sample.id] = sample, number
        except _Wrong as bad:
            wrong.append((number, bad))
    if wrong:
        raise _report(path, sorted(wrong, key=lambda one: one[0]), len(samples))
    if not samples:
        raise InputError(f"{path} holds no sample", "one JSON object a line", "see docs/data.md")
    return Samples(list(samples.values()))


# --- the parts of a line ----------------------------------------------------------------------------------------------


class _Wrong(Exception):
    """What is wrong with one field of a line; ``path`` grows on the way out."""

    def __init__(self, error: MechError):
        self.path, self.error = "", error


@contextmanager
def _at(name: str) -> Iterator[None]:
    """Errors raised inside concern this field."""
    try:
        yield
    except _Wrong as wrong:
        wrong.path = f"{name}{'' if wrong.path.startswith('[') else '.'}{wrong.path}"
        raise
    except MechError as error:
        wrong = _Wrong(error)
        wrong.path = name
        raise wrong from error


def _report(path: Path, wrong: list[tuple[int, _Wrong]], good: int) -> InputError:
    first_number, first = wrong[0]
    if len(wrong) == 1:
        given = f"{path}, line {first_number}, {first.path}: {first.error.given}"
        return InputError(given, first.error.expected, first.error.do)
    told = [f"  line {number}, {line.path}: {_told(line.error)}" for number, line in wrong[:SHOWN]]
    more = [f"  and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
    head = f"{len(wrong)} of {len(wrong) + good} lines of {path} cannot be used:"
    return InputError("\n".join([head, *told, *more]), "", f"start with line {first_number}: {first.error.do}")


def _told(error: MechError) -> str:
    return error.given + (f" (expected: {error.expected})" if error.expected else "")


@dataclass(frozen=True)
class _Folder:
    """Where pictures are; each is opened once."""

    root: Path
    opened: dict[Path, Image.Image] = field(default_factory=dict)

    def path(self, given: Any) -> Path:
        if not isinstance(given, str) or not given or "\0" in given:
            raise InputError(f"{given!r}", "the path of a picture", "put it in quotes")
        if os.path.isabs(given):
            return Path(given)
        if os.path.normpath(given).split(os.sep)[0] == os.pardir or not is_below(self.root / given, self.root):
            raise InputError(
                f"{given!r} lies outside the folder of the file",
                "a path inside it (links are followed), or an absolute one",
                "move the picture into that folder, or pass root=",
            )  # fmt: skip
        return self.root / given

    def picture(self, given: Any) -> Image.Image:
        path = self.path(given)
        if path not in self.opened:
            self.opened[path] = picture(path)
        return self.opened[path]


def _parsed(line: str) -> dict[str, Any]:
    with _at("the line"):
        try:
            record = parse_json(line)
        except ValueError as error:
            raise InputError(
                f"{line.strip()[:60]!r}", "one JSON object on one line", f"fix it: {error}" if line.strip() != "["
                else "write one object a line, without the brackets and commas of a list",
            ) from error  # fmt: skip
        if not isinstance(record, dict):
            raise InputError(f"a JSON {type(record).__name__}", "an object, {...}", "write one sample a line")
    return record


def _sample(record: Mapping[str, Any], id: str, domain: str, folder: _Folder, whole: bool = True) -> Sample:
    _check_texts(record)
    shown = {name: _pictures(record, name, folder) for name in ("images", "video")}
    with _at("images"):
        if bool(shown["images"]) == bool(shown["video"]):
            both = "images and a video" if shown["images"] else "neither images nor a video"
            raise InputError(both, "one of the two", "list paths in images, or the frames of a video in video")
    given: dict[str, Any] = {"id": id, "domain": domain}
    for name in ("id", "domain"):
        with _at(name):
            given[name] = _text(record.get(name, given[name]))
    with _at("domain"):
        check_domain(given["domain"])
    with _at("fps"):
        given["fps"] = fps = record.get("fps", 2.0)
        if not _is_number(fps) or not fps > 0:
            raise InputError(repr(fps), "frames per second, more than 0", "leave it out for 2.0")
    pictures, video = shown["images"] or shown["video"], bool(shown["video"])
    with _at("evidence"):
        regions = record.get("evidence", [])
        if not isinstance(regions, list):
            raise InputError(repr(regions)[:60], "a list of regions", 'write [{"box": [x0, y0, x1, y1]}]')
        given["evidence"] = tuple(_region(region, i, pictures, video, folder) for i, region in enumerate(regions))
    with _at("distractors"):
        given["distractors"] = _distractors(record.get("distractors", []), pictures, video, folder)
    sample = Sample(record["question"], record["answer"], **shown, **given)
    if not whole or record.get("counterfactual") is None:
        return sample
    return replace(sample, counterfactual=_partner(record, sample, folder))


def _check_texts(record: Mapping[str, Any]) -> None:
    """Refuse unknown fields, and a sample without question or answer."""
    for name in record:
        if name not in (*FIELDS, "meta"):
            with _at(name):
                raise InputError("an unknown field", ", ".join(FIELDS), suggestion(name, FIELDS) + "; notes go in meta")
    for name in ("question", "answer"):
        with _at(name):
            if name not in record:
                raise InputError("missing", "a string", f"add {name!r}")
            _text(record[name])


def _partner(record: Mapping[str, Any], sample: Sample, folder: _Folder) -> Sample:
    """The counterfactual: the record, updated with the fields that differ."""
    with _at("counterfactual"):
        other = record["counterfactual"]
        if not isinstance(other, dict) or "counterfactual" in other:
            raise InputError(
                repr(other)[:60], "an object with what differs", 'such as {"answer": ..., "images": [...]}'
            )
        same = {name: value for name, value in record.items() if name not in ("id", "counterfactual", "meta")}
        partner = _sample({**same, **other}, f"{sample.id}/counterfactual", sample.domain, folder, whole=False)
        _check_partner(sample, partner)
        return partner


def _distractors(given: Any, pictures: Sequence[Image.Image], video: bool, folder: _Folder) -> tuple[Distractor, ...]:
    if not isinstance(given, list):
        raise InputError(repr(given)[:60], "a list of regions with answers", '[{"box": [0, 0, 9, 9], "answer": "7"}]')
    distractors = []
    for i, item in enumerate(given):
        with _at(f"[{i}]"):
            if not isinstance(item, dict) or "answer" not in item:
                raise InputError(repr(item)[:60], "a region with its answer", 'such as {"box": [...], "answer": "7"}')
            with _at("answer"):
                answer = _text(item["answer"])
        region = {name: value for name, value in item.items() if name != "answer"}
        distractors.append(Distractor(_region(region, i, pictures, video, folder), answer))
    return tuple(distractors)


def _check_partner(sample: Sample, partner: Sample) -> None:
    """Refuse the same answer, and pictures of other sizes, since patching goes position by position."""
    if partner.answer == sample.answer:
        raise InputError(
            f"the same answer {sample.answer!r}", "another answer", "give the right answer for its pictures"
        )
    ours, theirs = ([picture.size for picture in (s.images or s.video)] for s in (sample, partner))
    if ours != theirs:
        raise InputError(f"pictures of sizes {theirs}", f"those of the sample, {ours}", "keep their sizes and number")


def check_domain(name: str) -> None:
    """Refuse a name that cannot be a folder's (each domain's results have one) or that holds control characters.

    Raises:
        InputError: such a name.
    """
    if set(name) & set("/\\") or name.startswith("."):
        raise InputError(
            f"the domain {name!r}", "a name that can be a folder name", "leave out '/', '\\' and a leading '.'"
        )
    if printable(name) != name or set(name) & set("\n\t"):
        raise InputError(f"the domain {name!r}", "a name that can be printed", "leave out control characters")


def _text(given: Any) -> str:
    if not isinstance(given, str) or not given.strip():
        raise InputError(
            repr(given)[:60],
            "a non-empty string",
            "put it in quotes" if given and not isinstance(given, str) else "fill it in",
        )
    if any("\ud800" <= character <= "\udfff" for character in given):
        raise InputError(ascii(given)[:60], "complete characters", "write the file as UTF-8, without \\u escapes")
    return given


def _is_number(given: Any) -> bool:
    return isinstance(given, int | float) and not isinstance(given, bool) and abs(given) < 1e12  # nor nan


def _pictures(record: Mapping[str, Any], name: str, folder: _Folder) -> tuple[Image.Image, ...]:
    with _at(name):
        paths = record.get(name) or []
        if not isinstance(paths, list):
            raise InputError(repr(paths)[:60], "a list of paths", f'write "{name}": ["a.png"]')
        pictures = []
        for i, path in enumerate(paths):
            with _at(f"[{i}]"):
                pictures.append(folder.picture(path))
        if name == "video" and len({frame.size for frame in pictures}) > 1:
            raise InputError(
                f"frames of sizes {sorted({f.size for f in pictures})}", "frames of one size", "resize them"
            )
    return tuple(pictures)


def _region(given: Any, i: int, pictures: Sequence[Image.Image], video: bool, folder: _Folder) -> Region:
    with _at(f"[{i}]"):
        kinds = [name for name in REGIONS if isinstance(given, dict) and name in given]
        if len(kinds) != 1:
            raise InputError(
                repr(given)[:80], f"an object with one of {', '.join(REGIONS)}", 'such as {"box": [0, 0, 9, 9]}'
            )
        kind, axis = kinds[0], "frame" if video else "image"
        allowed = (kind, axis) if kind in ("box", "xywh", "mask") else (kind,)
        for name in given:
            if name not in allowed:
                with _at(name):
                    raise InputError("not allowed here", ", ".join(allowed), suggestion(name, allowed))
        if kind in ("frames", "pages"):
            with _at(kind):
                if (kind == "frames") != video:
                    raise InputError(
                        f"{kind} of {'a video' if video else 'images'}", "frames" if video else "pages", "rename it"
                    )
                indices = given[kind]
                if not isinstance(indices, list) or not indices or not all(_is_index(k, pictures) for k in indices):
                    raise InputError(repr(indices), f"a list of numbers from 0 to {len(pictures) - 1}", "count from 0")
                return Frames(*indices) if kind == "frames" else Pages(*indices)
        with _at(axis):
            index = given.get(axis, 0)
            if video and axis not in given:
                raise InputError("missing", f"which frame, from 0 to {len(pictures) - 1}", 'add "frame": 0')
            if not _is_index(index, pictures):
                raise InputError(repr(index), f"a number from 0 to {len(pictures) - 1}", "count from 0")
        where: dict[str, Any] = {axis: index}
        with _at(kind):
            return (_mask if kind == "mask" else _box)(given, kind, pictures[index].size, where, folder)


def _is_index(given: Any, pictures: Sequence[Image.Image]) -> bool:
    return isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(pictures)


def _box(given: Mapping[str, Any], kind: str, size: tuple[int, int], where: dict[str, Any], folder: _Folder) -> Box:
    numbers = given[kind]
    if not isinstance(numbers, list) or len(numbers) != 4 or not all(map(_is_number, numbers)):
        names = "[x0, y0, x1, y1]" if kind == "box" else "[x, y, width, height]"
        raise RegionError(repr(numbers), f"four numbers {names}, in pixels", "write numbers without quotes")
    box = Box(*numbers, **where) if kind == "box" else Box.from_xywh(*numbers, **where)
    width, height = size
    if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1:
        raise RegionError(
            f"{numbers} does not fit in a picture of {width} x {height} pixels", "pixels of the upright picture",
            'scale relative boxes; use "xywh" for [x, y, width, height]',
        )  # fmt: skip
    return box


def _mask(given: Mapping[str, Any], kind: str, size: tuple[int, int], where: dict[str, Any], folder: _Folder) -> Mask:
    inside = np.asarray(folder.picture(given[kind]).convert("L")) > 127
    if inside.shape[::-1] != size:
        raise RegionError(
            f"a mask of {inside.shape[1]} x {inside.shape[0]}",
            f"{size[0]} x {size[1]}, the picture's size",
            "resize it",
        )
    if not inside.any():
        raise RegionError("a mask without a white pixel", "white inside, black outside", "check the file")
    return Mask(inside, **where)
