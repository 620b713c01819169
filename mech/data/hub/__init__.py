"""Published data sets with evidence, as samples: RefCOCO, VidSTG, SlideVQA, Visual-CoT, MM-NIAH, ... (``names()``).

    samples = hub_samples("refcocog", n=200)              # from the hub, streamed
    samples = hub_samples("slidevqa", n=50, most=8)       # eight slides each, the evidence among them
    samples = hub_samples("vidstg", records="test_annotations.json", root="frames")
    print(source("visual-cot").evidence)                  # what the evidence is; also .verified, .assumed, .terms

Conventions differ from set to set (boxes as x, y, width, height or as corners, in pixels, points or fractions; pages
from 0 or 1, as numbers or as text; whole pictures where there are no boxes). Each adapter converts its own to
``mech.data.regions``: pixels of the original picture, everything counted from 0. An adapter is one row and one small
function in ``grounding``, ``documents``, ``needles`` or ``reading``; a row says what was verified and what is assumed.

Nothing is loaded before ``hub_samples`` is called, and code from the hub is never run. If a set does not contain its
pictures, ``root`` is the folder that does. None of these sets was downloaded during development: the adapters are
tested on records written by hand after the published schemas.
"""

import random
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mech.arguments import Count, Seed, checking
from mech.data.hub import documents, grounding, needles, reading
from mech.data.hub.source import Record, Source
from mech.data.samples import Sample, Samples
from mech.errors import InputError, MechError, OutputError
from mech.files import parse_json, read_text

SOURCES = {known.name: known for part in (grounding, documents, needles, reading) for known in part.SOURCES}
BUFFER = 200  # maximum size of a stream's shuffle buffer: a record may hold twenty slides


def names() -> tuple[str, ...]:
    """The names of the known sets."""
    return tuple(SOURCES)


def source(name: str) -> Source:
    """What is known about a set: where it is, its evidence, its terms, what was verified and what is assumed.

    Raises:
        InputError: an unknown name.
    """
    if name not in SOURCES:
        raise InputError.unknown("published set", name, SOURCES)
    return SOURCES[name]


@checking(InputError)
def hub_samples(
    name: str,
    n: Count = 100,
    seed: Seed = 0,
    *,
    root: str | Path | None = None,
    records: str | Path | Iterable[Mapping[str, Any]] | None = None,
    split: str | None = None,
    files: str | None = None,
    most: Count | None = None,
    skip_bad: bool = False,
) -> Samples:
    """``n`` samples of a published set, each with its evidence.

    Records without evidence (unanswerable questions, words that were not read) are skipped, and a warning says how
    many.

    Args:
        name: one of ``names()``.
        n: how many samples; fewer if the set has fewer.
        seed: of the draw of records, pages and places; a stream is shuffled in a buffer of at most 200 records.
        root: the folder with the pictures, for sets that do not contain them.
        records: the records themselves, or a .json or .jsonl file of them, instead of the hub's.
        split: instead of the default one.
        files: data files of the hub's repository, instead of the default ones.
        most: the largest number of pages or frames in a sample; those with evidence are always shown.
        skip_bad: skip records that cannot be read, and say how many, instead of stopping at the first.

    Raises:
        InputError: an unknown set, no root, a bad record (set, record and field are named), or no sample at all.
        OutputError: the records cannot be loaded.
    """
    row = source(name)
    if n < 1 or (most is not None and most < 1):
        raise InputError(f"n={n}, most={most}", "at least one", "leave most= out for all")
    folder = _folder_of(row, root)
    samples: list[Sample] = []
    bad: list[MechError] = []
    without = 0
    for index, fields in _records(row, n, seed, records, split, files):
        record = Record(row, index, fields, folder, most, random.Random(f"{seed}/{name}/{index}"))
        try:
            made = list(row.read(record))
        except Exception as error:
            bad.append(_named(record, error))
            if skip_bad:
                continue
            if bad[0] is error:
                raise
            raise bad[0] from error
        without += sum(not sample.evidence for sample in made)
        samples += [sample for sample in made if sample.evidence]
        if len(samples) >= n:
            break
    if bad and not samples and not without:
        raise bad[0]
    if bad or without:
        what = [f"{without} samples without evidence"] * bool(without) + [f"{len(bad)} bad records"] * bool(bad)
        warnings.warn(f"{name}: {' and '.join(what)} skipped. Evidence: {row.evidence}", stacklevel=2)
    if not samples:
        raise InputError(f"{name} gave no sample with evidence", row.evidence, f"root: {row.root or 'not needed'}")
    return Samples(_told_apart(samples[:n]))


def _folder_of(row: Source, root: str | Path | None) -> Path | None:
    """The folder with the pictures, if the set needs one or one was given."""
    folder = Path(root).expanduser() if root is not None else None
    if (folder is None and row.root) or (folder is not None and not folder.is_dir()):
        absent = f"root={str(root)!r} for {row.name}, which is not a folder"
        given = absent if root is not None else f"{row.name} without root="
        raise InputError(given, row.root or "no root=: the records hold the pictures", "see docs/data.md")
    return folder


def _named(record: Record, error: Exception) -> MechError:
    """The error itself, or, if no adapter foresaw it, one that names the record."""
    if isinstance(error, MechError):
        return error
    return record.wrong("the record", f"{type(error).__name__}: {error}", "the published schema")


def _records(
    row: Source, n: int, seed: int, records: Any, split: str | None, files: str | None
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if records is not None:
        given = _in_file(Path(records)) if isinstance(records, str | Path) else records
        given = given if hasattr(given, "__getitem__") and hasattr(given, "__len__") else list(given)
        for index in random.Random(seed).sample(range(len(given)), len(given)):
            yield index, given[index]
        return
    if row.fetch:
        raise OutputError(f"{row.name} cannot be loaded from the hub record by record", "records=", row.fetch)
    import datasets

    try:
        stream = datasets.load_dataset(
            row.hub, row.config, split=split or row.split, data_files=files or row.files, streaming=True
        )
        # Pictures stay undecoded until their record is chosen.
        stream = stream.decode(False).shuffle(seed=seed, buffer_size=min(BUFFER, 4 * n))
        yield from enumerate(stream)
    except Exception as error:  # whatever the network, the hub or a moved file raises
        raise OutputError(
            f"{row.hub} could not be read: {type(error).__name__}: {error}",
            "a network connection, and accepted terms if gated",
            f"see https://huggingface.co/datasets/{row.hub}, or pass your copy as records=",
        ) from error  # fmt: skip


def _in_file(path: Path) -> list[Mapping[str, Any]]:
    try:
        text = read_text(path.expanduser())
        records = [parse_json(line) for line in text.split("\n") if line.strip()] if path.suffix == ".jsonl" else None
        records = parse_json(text) if records is None else records
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read", "a .json list or a .jsonl file of records", str(error)) from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise OutputError(f"{path} does not hold a list of records", "a list of objects", "check the file")
    return records


def _told_apart(samples: list[Sample]) -> list[Sample]:
    """Number repeated ids: samples that find heads and samples that test them are told apart by id."""
    seen: dict[str, int] = {}
    told = []
    for sample in samples:
        seen[sample.id] = count = seen.get(sample.id, 0) + 1
        told.append(sample if count == 1 else replace(sample, id=f"{sample.id}#{count}"))
    return told
