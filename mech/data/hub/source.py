"""A published set as a row of data, and checked access to its records.

An adapter is a ``Source`` (where the set is, what its evidence is, what was verified and what is assumed) and a pure
function ``record -> samples``. The function asks the ``Record`` for fields by name and kind; a missing or wrong field
raises an error that names the set, the record and the field, so that adapters need few checks of their own.
"""

import ast
import functools
import io
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from mech.data.pictures import picture
from mech.data.samples import Sample
from mech.errors import InputError, MechError


@dataclass(frozen=True)
class Source:
    """One published set.

    Attributes:
        name: its name here.
        hub: its dataset id on the Hugging Face hub; empty if it is not there.
        files: data files in it, if not the default ones.
        config, split: as ``datasets.load_dataset`` takes them.
        fetch: how to get the records if ``load_dataset`` cannot; then ``records=`` must be given.
        root: what the folder ``root=`` must hold; empty if the records hold the pictures.
        read: turns a record into its samples.
        key: the field that identifies a record.
        evidence: what evidence is, and which records have none.
        answer: what the answer is, and what its accuracy means (teacher-forced, see ``mech.experiments.metrics``).
        verified: the facts that were looked up, and where.
        assumed: what could not be looked up; check it on your copy.
        terms: licence or terms of use, as its card states them.
        paper: the paper that describes it.
    """

    name: str
    read: "Callable[[Record], Iterator[Sample]]" = field(repr=False)
    key: str
    evidence: str
    answer: str
    verified: str
    assumed: str
    paper: str
    terms: str
    hub: str = ""
    split: str = "test"
    config: str | None = None
    files: str | None = None
    fetch: str = ""
    root: str = ""


@dataclass(frozen=True, eq=False)
class Record:
    """One record of a set, with the caller's choice of its pictures.

    ``most`` is the largest number of pages or frames in a sample; ``rng`` decides which. ``place`` says where in the
    record the fields are, if they are only a part of it.
    """

    source: Source
    index: int
    fields: Mapping[str, Any] = field(repr=False)
    root: Path | None = None
    most: int | None = None
    rng: random.Random = field(default_factory=random.Random, repr=False)
    place: str = ""

    @property
    def id(self) -> str:
        """The set's name and the record's own key, or its number."""
        key = self.fields.get(self.source.key)
        return f"{self.source.name}/{self.index if key is None else key}"

    def wrong(self, name: str, given: str, expected: str, do: str = "") -> InputError:
        """The error for one field."""
        own = self.fields.get(self.source.key)
        called = f" ({self.source.key} = {own!r})" if own is not None else ""
        do = do or "check the record; pass skip_bad=True to skip such records"
        return InputError(f"{self.source.name}, record {self.index}{called}, {self.place}{name}: {given}", expected, do)

    def inside(self, name: str, fields: Any) -> "Record":
        """A part of the record, read like a record."""
        if not isinstance(fields, Mapping):
            raise self.wrong(name, f"{fields!r:.80}", "an object")
        own = {self.source.key: self.fields.get(self.source.key)}
        return replace(self, fields={**own, **fields}, place=f"{self.place}{name}.")

    def get(self, name: str, kind: type | tuple[type, ...], expected: str) -> Any:
        """A field, checked for its type; ``"meta.needles"`` is a field of a field."""
        value: Any = self.fields
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise self.wrong(name, "missing", expected)
            value = _plain(value[part])
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.wrong(name, f"{value!r:.80}", expected)
        return value

    def text(self, name: str) -> str:
        """A text that is not empty; numbers become text."""
        value = str(self.get(name, (str, int, float), "a string")).strip()
        if not value:
            raise self.wrong(name, "empty", "a string")
        return value

    def integer(self, name: str) -> int:
        return self.get(name, int, "a whole number")

    def listed(self, name: str) -> list[Any]:
        """A list; one stored as a string ("[3, 5]") is parsed."""
        value = _plain(self.fields.get(name)) if "." not in name else self.get(name, object, "a list")
        if isinstance(value, str):
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError) as error:
                raise self.wrong(name, f"{value!r:.80}", 'a list, or one written as text, such as "[3, 5]"') from error
        if value is None or isinstance(value, str) or not isinstance(value, Sequence):
            raise self.wrong(name, "missing" if value is None else f"{value!r:.80}", "a list")
        return list(value)

    def numbers(self, name: str, value: Any, count: int) -> list[float]:
        """``count`` numbers; ``value`` is the content of field ``name``."""
        value = _plain(value)
        value = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
        if len(value) != count or not all(isinstance(x, int | float) and not isinstance(x, bool) for x in value):
            raise self.wrong(name, f"{value!r:.80}", f"{count} numbers")
        return value

    def image(self, name: str) -> Image.Image:
        """A picture stored in the record, decoded or as bytes."""
        value = self.fields.get(name)
        if isinstance(value, Mapping):
            value = value.get("bytes")
        try:
            return picture(Image.open(io.BytesIO(value)) if isinstance(value, bytes) else value)
        except (OSError, SyntaxError, MechError) as error:
            given = error.given if isinstance(error, MechError) else str(error)
            raise self.wrong(name, "missing" if value is None else given, "a picture") from error

    def path(self, name: str, relative: str) -> Path:
        """A file below ``root``."""
        if self.root is None:
            raise self.wrong(
                name, "the records hold paths, not pictures", f"root=, a folder with {self.source.root}", "pass root="
            )
        if os.path.isabs(relative) or os.path.normpath(relative).split(os.sep)[0] == os.pardir:
            raise self.wrong(name, f"{relative!r} lies outside the folder", "a path inside root", "check the record")
        file = self.root / relative
        if not file.exists():
            raise self.wrong(name, f"{file} does not exist", self.source.root, "see root= of this set in docs/data.md")
        return file

    def numbered(self, name: str, relative: str) -> dict[int, str]:
        """The files of a folder below ``root``, by the number their names end in; paths are relative to ``root``."""
        folder = self.path(name, relative)
        return _numbered(folder, relative, folder.stat().st_mtime_ns)

    def opened(self, name: str, relative: str) -> Image.Image:
        """A picture below ``root``."""
        try:
            return picture(self.path(name, relative))
        except InputError as error:
            if error.given.startswith(self.source.name):
                raise
            raise self.wrong(name, error.given, error.expected, error.do) from error

    def kept(self, count: int, needed: Sequence[int]) -> list[int]:
        """Which of ``count`` pictures are shown, in order: those needed, and random others up to ``most``."""
        if self.most is None or count <= self.most:
            return list(range(count))
        others = [k for k in range(count) if k not in needed]
        drawn = self.rng.sample(others, max(0, min(self.most - len(set(needed)), len(others))))
        return sorted({*needed, *drawn})


def _plain(value: Any) -> Any:
    """Arrays and array scalars, as tables give them, converted to lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


@functools.lru_cache(maxsize=64)
def _numbered(folder: Path, relative: str, changed: int) -> dict[int, str]:
    """The folder is listed again when it has ``changed``."""
    numbers = ((re.search(r"(\d+)$", path.stem), path.name) for path in folder.iterdir())
    return {int(match.group(1)): f"{relative}/{name}" for match, name in numbers if match}
