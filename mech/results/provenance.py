"""How a number was made: the record that is saved with every result.

    >>> record = provenance(model, samples, metric="logit difference", seed=0)     # doctest: +SKIP
    >>> record["model"]["weights"], record["data"]["digest"], record["versions"]["transformers"]  # doctest: +SKIP

The record is plain JSON. It names the model by revision *and* by a digest of its weights, because a model can be
retrained under the same name; the data by a digest of its pixels; and everything that is known to move a number in
its third decimal: processor settings, dtype, attention implementation, device and package versions.

``model`` is inspected, never run: any object with ``.hf_model`` (or a Hugging Face model itself) will do, and what it
does not provide is recorded as None. Two records of the same run differ only in ``date``.
"""

import dataclasses
import functools
import importlib.metadata
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence, Set
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mech.errors import MechError
from mech.identity import inner_model, weight_digest

PACKAGES = ("mech", "torch", "transformers", "transformer-lens", "numpy", "scipy", "xarray")
PROCESSOR_SETTINGS = (
    "size", "crop_size", "min_pixels", "max_pixels", "patch_size", "merge_size", "temporal_patch_size",
    "do_resize", "do_center_crop", "do_rescale", "resample", "image_mean", "image_std",
)  # fmt: skip


def provenance(
    model: Any = None,
    data: Any = None,
    *,
    metric: Any = None,
    specs: Any = None,
    seed: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """The record of one result, ready for ``json.dumps``.

    Args:
        model: a ``HookedMLLM``, a Hugging Face model, or None.
        data: ``Samples`` (anything with ``.digest()``), a dict of them, or None.
        metric: what was measured; a string or a metric object.
        specs: the interventions, as frozen specs or as text.
        seed: the seed that all randomness came from.
        settings: whatever else decided the numbers.
    """
    return {
        "model": model_record(model) if model is not None else None,
        "data": data_record(data) if data is not None else None,
        "metric": jsonable(metric),
        "specs": jsonable(specs),
        "seed": seed,
        "settings": jsonable(settings),
        "versions": {"python": platform.python_version(), **software_versions(PACKAGES)},
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def model_record(model: Any) -> dict[str, Any]:
    """Name, revision, weight digest, dtype, device, attention implementation and processor settings of a model."""
    if known := getattr(model, "elsewhere", None):  # no weights here: the record was made where they are
        return dict(known)
    hf = inner_model(model)
    config = _first(getattr(hf, "config", None), getattr(model, "config", None))
    try:
        processor = getattr(model, "processor", None)
    except (MechError, OSError):  # a model without a processor is recorded all the same
        processor = None
    image_processor = _first(getattr(processor, "image_processor", None), processor)
    return {
        "name": jsonable(_first(getattr(model, "name", None), getattr(hf, "name_or_path", None))),
        "class": type(hf).__name__,
        "revision": jsonable(_first(getattr(config, "_commit_hash", None), getattr(model, "revision", None))),
        "weights": weight_digest(model),
        "dtype": jsonable(_first(getattr(model, "dtype", None), getattr(hf, "dtype", None))),
        "device": jsonable(_first(getattr(model, "device", None), getattr(hf, "device", None))),
        "accelerator": _accelerator(_first(getattr(model, "device", None), getattr(hf, "device", None))),
        "attention": jsonable(getattr(config, "_attn_implementation", None)),
        "processor": {
            name: jsonable(getattr(image_processor, name))
            for name in PROCESSOR_SETTINGS
            if getattr(image_processor, name, None) is not None
        },
    }


def data_record(data: Any) -> dict[str, Any]:
    """Digest, number and domains of a list of samples, or of each list in a dict: ``{"find": ..., "test": ...}``."""
    if isinstance(data, Mapping):
        return {str(name): data_record(part) for name, part in data.items()}
    digest = getattr(data, "digest", None)
    return {
        "digest": digest() if callable(digest) else None,
        "n": len(data) if hasattr(data, "__len__") else None,
        "domains": jsonable(getattr(data, "domains", None)),
    }


def jsonable(value: Any) -> Any:
    """The same value as dicts, lists, strings, numbers, booleans and None.

    Dataclasses become a dict with their class under ``"type"``; numbers that JSON does not have (nan, inf) become
    None; anything unknown becomes its ``str``.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):  # an IntEnum (how to resample) becomes its number
        return int(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted((jsonable(item) for item in value), key=repr)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [jsonable(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if callable(tolist := getattr(value, "tolist", None)):  # numpy scalars and arrays, tensors
        return jsonable(tolist())
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value)


def _accelerator(device: Any) -> str | None:
    torch = sys.modules.get("torch")
    if torch is None or not str(device).startswith("cuda"):
        return None
    return torch.cuda.get_device_name(device)


def software_versions(packages: Sequence[str]) -> dict[str, Any]:
    """Version by package; None if it is not installed."""
    return {name: _version(name) for name in packages}


_installed = functools.cache(importlib.metadata.version)  # reading metadata takes milliseconds


def _version(package: str) -> str | None:
    try:
        return _installed(package)
    except importlib.metadata.PackageNotFoundError:
        return getattr(sys.modules.get(package.replace("-", "_")), "__version__", None)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
