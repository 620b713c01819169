"""Which model, which program: what must be the same on every machine before it computes anything.

    open_model("reference:llava-m@step2300")
    model_here("reference:llava-m")     # without its weights, if only workers compute
    identity(model)                     # name, digests of weights and processor, precision
    software()                          # version and digest of mech, versions of torch and transformers

A worker opens the model by its name and checks both against the job: another training step, precision or program would
put other numbers into the same result.
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xarray as xr

from mech import reference
from mech.data.samples import Samples
from mech.errors import ExperimentError, UnsupportedModel
from mech.files import read
from mech.identity import inner_model
from mech.model import HookedMLLM
from mech.model.loading import resolve
from mech.results.provenance import jsonable, model_record, software_versions
from mech.scale.measures import in_one_piece, running

HASHED = ("weights", "processor", "dtype", "attention")  # the parts of an identity, without the name


def split_revision(name: str) -> tuple[str, str | None]:
    """A model's name and its revision: ``NAME@REVISION``, or a name alone.

    Raises:
        ExperimentError: a revision of a folder.
        UnsupportedModel: a reference model without this revision.
    """
    base, _, revision = name.rpartition("@")
    if not base or Path(name).expanduser().is_dir():
        return name, None
    if Path(base).expanduser().is_dir():
        raise ExperimentError(
            f"revision {revision!r} of the folder {base}", "a hub id or a reference model", "leave the revision out"
        )
    if base.startswith(reference.PREFIX) and revision != "main":
        reference.checkpoint(base, revision)
    return base, revision


def open_model(name: str, **placement: Any) -> HookedMLLM:
    """Open a model by ``NAME`` or ``NAME@REVISION``: results carry the revision in the model's name.

    Args:
        name: the model.
        placement: ``device``, ``device_map`` and ``dtype`` of ``HookedMLLM.from_pretrained``.
    """
    base, revision = split_revision(name)
    model = HookedMLLM.from_pretrained(base, revision=revision, **placement)
    model.name = name
    return model


def model_here(name: str) -> HookedMLLM:
    """A model as this process needs it: whole if it computes, laid out without weights if only workers do.

    Raises:
        UnsupportedModel: as ``open_model``.
    """
    one = running()
    return open_model(name) if one is None or one.computes else one.laid_out(name)


@in_one_piece("model")
def recorded(model: Any, samples: Samples, *, files: Any) -> xr.Dataset:
    """A worker's record of the model it opened, in the attribute ``record``; changed ``files`` are recorded anew."""
    identity(model)  # refuses weights without a digest
    return xr.Dataset(attrs={"record": json.dumps(jsonable(model_record(model)))})


def files_of(name: str) -> list[list[Any]]:
    """The revision and, for a folder or reference model, names, sizes and times of the weight files."""
    base, revision = split_revision(name)
    folders = {Path(resolve(base)), *([reference.shipped(base)] if base.startswith(reference.PREFIX) else ())}
    return [[revision], *(list(facts) for folder in sorted(folders) for facts in _weights_in(folder))]


def _weights_in(folder: Path) -> Iterator[tuple[str, int, int]]:
    for file in sorted(folder.glob("*.safetensors")):
        yield file.name, file.stat().st_size, file.stat().st_mtime_ns


def identity(model: Any) -> dict[str, str]:
    """Name and digests of what decides a model's numbers.

    Raises:
        UnsupportedModel: weights that cannot be read, so that they cannot be compared between machines.
    """
    record = model_record(model)
    if record["weights"] is None:
        raise UnsupportedModel(
            f"the weights of {model.name} are on no device and have no digest",
            "weights in memory, to be compared between machines",
            "open it with a device_map that offloads nothing to disk",
        )
    settings = json.dumps([record["class"], record["processor"]], sort_keys=True)
    processor = hashlib.sha256(settings.encode()).hexdigest()
    named = {name: str(record[name]) for name in ("weights", "dtype", "attention")}
    return {"name": str(model.name), "processor": processor, **named}


def size_in_bytes(model: Any) -> int:
    """The memory that the weights take."""
    return sum(weight.numel() * weight.element_size() for weight in inner_model(model).state_dict().values())


def software() -> dict[str, str]:
    """Versions that affect numbers, and a digest of mech itself: a version number does not show an edited file."""
    return {**software_versions(("mech", "torch", "transformers")), "code": _code_digest()}


@functools.cache
def _code_digest() -> str:
    root, sha = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        sha.update(path.relative_to(root).as_posix().encode() + read(path))
    return sha.hexdigest()


def refuse_difference(wanted: Mapping[str, str], here: Mapping[str, str], where: str) -> None:
    """Refuse another program, or other weights, than the job was made with.

    Raises:
        ExperimentError: something differs; it names the first.
    """
    for name, value in wanted.items():
        if here.get(name) != value:
            mine, theirs = (text[:12] if len(text) == 64 else text for text in (str(here.get(name)), value))
            what = {"code": "the code of mech", "weights": "the weights", "processor": "the processor"}.get(name, name)
            raise ExperimentError(
                f"{what} on {where}: {mine}; the job was made with {theirs}",
                "the same program and the same weights on every machine",
                "install the same version, or copy the same checkpoint, on all of them",
            )
