"""Write samples as JSON lines with their pictures beside them, for ``mech.data.jsonl`` to read.

    write_samples(haystacks("pages", n=40), "pages")        # pages/samples.jsonl, pages/images/*.png, pages/masks/*.png

This keeps a draw of a published set, or lets generated samples be edited by hand. Samples with a context or with spans
cannot be written.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mech.arguments import Text, checking
from mech.data.jsonl import check_domain
from mech.data.pictures import picture, pixel_digest, png
from mech.data.regions import Box, Frames, Mask, Pages, Region
from mech.data.samples import Sample, Samples, SomeSamples
from mech.errors import InputError, OutputError
from mech.files import unwritable, write


@checking(InputError)
def write_samples(samples: SomeSamples, folder: str | Path, name: Text = "samples.jsonl") -> Path:
    """Write samples so that ``read_samples`` gives them back: the file, and its pictures and masks as PNG.

    A picture that several samples share is written once. Pictures become upright RGB; samples without an id get one.

    Returns:
        The path of the file.

    Raises:
        InputError: samples that could not be read back: a repeated id, an empty question or answer, a domain with a
            slash, a context, spans.
        OutputError: the file exists, or cannot be written.
    """
    ids = Samples(samples).names
    if twice := [id for id, count in Counter(ids).items() if count > 1]:
        raise InputError(f"{len(twice)} ids are repeated, the first is {twice[0]!r}", "unique ids", "rename them")
    for id, sample in zip(ids, samples, strict=True):
        check_domain(sample.domain)
        if any(one is not None and (one.context or one.spans) for one in (sample, sample.counterfactual)):
            raise InputError(
                f"sample {id!r} has a context or spans of its answer", "a sample without them: files do not hold them",
                "make it again where it is needed",
            )  # fmt: skip
        if not sample.question.strip() or not sample.answer.strip():
            raise InputError(f"sample {id!r} has no question or no answer", "both", "fill them in")
    folder = Path(folder).expanduser()
    path = folder / name
    if path.exists():
        raise OutputError(f"{path} exists", "a new file", "give another folder or name, or delete it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        records = (_record(sample, id, folder) for id, sample in zip(ids, samples, strict=True))
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
    except OSError as error:
        raise unwritable(path, error) from error
    return write(path, "\n".join(lines), "\n")


def _record(sample: Sample, id: str, folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = {"id": id, "question": sample.question, "answer": sample.answer}
    for name in ("images", "video"):
        if shown := getattr(sample, name):
            record[name] = [_saved(picture(image), folder, "images") for image in shown]
    if sample.video:
        record["fps"] = sample.fps
    record["evidence"] = [_written(region, folder) for region in sample.evidence]
    if sample.distractors:
        record["distractors"] = [
            {**_written(other.region, folder), "answer": other.answer} for other in sample.distractors
        ]
    record["domain"] = sample.domain
    if sample.counterfactual is not None:
        other = _record(sample.counterfactual, sample.counterfactual.id or f"{id}/counterfactual", folder)
        record["counterfactual"] = {name: value for name, value in other.items() if record.get(name) != value}
    return record


def _written(region: Region, folder: Path) -> dict[str, Any]:
    if isinstance(region, Frames | Pages):
        return {"frames" if isinstance(region, Frames) else "pages": [int(index) for index in region.indices]}
    assert isinstance(region, Box | Mask)  # a passage needs a context, which was refused, a partner's too
    where = {"image": region.image} if region.frame is None else {"frame": region.frame}
    if isinstance(region, Mask):
        white = Image.fromarray(region.pixels.astype(bool).astype(np.uint8) * 255)
        return {"mask": _saved(white, folder, "masks"), **where}
    corners = (region.x0, region.y0, region.x1, region.y1)
    return {"box": [int(c) if isinstance(c, int | np.integer) else float(c) for c in corners], **where}


def _saved(image: Image.Image, folder: Path, kind: str) -> str:
    """Save a picture and return its path below ``folder``; named by its pixels' digest, it is written only once."""
    path = folder / kind / f"{pixel_digest(image)[:20]}.png"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write(path, png(image))
    return f"{kind}/{path.name}"
