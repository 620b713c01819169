"""Samples and options as bytes that any machine may read: JSON and plain arrays, never pickle.

    content = pack({"samples": samples, "scores": {"mine": Score("last")}})
    unpack(content)["scores"]["mine"]                    # the same Score
    fingerprint(value)                                   # SHA-256 of its content, whatever file it is in

Tuples, arrays, tensors, pictures and the classes that are ``known`` are preserved; anything else is refused, and so is
a class in a file that is not known here: a file from elsewhere cannot name code to run.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from PIL import Image

from mech.data.regions import Box, Frames, Mask, Pages, Passage
from mech.data.samples import Distractor, Sample, Samples, Span
from mech.errors import ExperimentError, OutputError
from mech.files import parse_json
from mech.results.checksum import seal, unsealed

RAW = ("1", "L", "RGB", "RGBA")  # picture modes that are kept; others are shown as RGB everywhere
_KNOWN: dict[str, type] = {
    one.__name__: one for one in (Sample, Box, Frames, Mask, Pages, Passage, Distractor, Span)
}  # fmt: skip


def known(*classes: type) -> None:
    """Let dataclasses, or named tuples, be packed."""
    for one in classes:
        if _KNOWN.setdefault(one.__name__, one) is not one:
            raise ExperimentError(f"two classes called {one.__name__}", "one class of each name", "rename one of them")


def pack(value: Any) -> bytes:
    """A value as bytes, followed by a checksum.

    Raises:
        ExperimentError: something in it that is not known.
    """
    arrays: list[np.ndarray] = []
    header = json.dumps(_written(value, arrays), allow_nan=True)
    packed = io.BytesIO()
    np.savez(packed, header=np.array(header), **{f"_{i}": array for i, array in enumerate(arrays)})  # type: ignore[arg-type]
    return packed.getvalue() + seal(packed.getbuffer())


def unpack(content: bytes) -> Any:
    """The value that ``pack`` was given.

    Raises:
        OutputError: it is damaged, or names a class that is not known here.
    """
    try:
        body, whole = unsealed(content)
        if not whole:
            raise ValueError("it has no checksum: it was cut off")
        with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
            return _read(parse_json(str(arrays["header"])), arrays)
    except Exception as error:  # zipfile, numpy, PIL and the classes themselves; all of them mean: not readable
        raise OutputError(
            f"a packed file cannot be read ({error})", "a complete file", "run the same command again"
        ) from (error)


def fingerprint(value: Any) -> str:
    """SHA-256 of a value's content."""
    arrays: list[np.ndarray] = []
    text = json.dumps(_written(value, arrays), sort_keys=True)
    sha = hashlib.sha256(text.encode())
    for array in arrays:
        sha.update(f"{array.dtype.str}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def _written(value: Any, arrays: list[np.ndarray]) -> Any:
    """A value as JSON, with anything that JSON lacks under a name that begins with a dollar sign."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return _written(value.item(), arrays)
    if isinstance(value, Mapping):
        return {"$pairs": [[_written(key, arrays), _written(one, arrays)] for key, one in value.items()]}
    if type(value).__name__ in _KNOWN and _KNOWN[type(value).__name__] is type(value):
        inner = list(value) if isinstance(value, tuple) else [getattr(value, name) for name in _given(value)]
        return {"$class": type(value).__name__, "of": [_written(one, arrays) for one in inner]}
    if isinstance(value, Samples):
        return {"$samples": [_written(one, arrays) for one in value]}
    if isinstance(value, tuple | list):
        return {"$tuple" if isinstance(value, tuple) else "$list": [_written(one, arrays) for one in value]}
    if isinstance(value, Image.Image):
        shown = value if value.mode in RAW else value.convert("RGB")
        return {"$picture": _kept(np.frombuffer(shown.tobytes(), np.uint8), arrays), "as": [shown.mode, *shown.size]}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufU":
        return {"$array": _kept(value, arrays)}
    if not isinstance(value, np.ndarray) and hasattr(value, "detach"):  # a tensor, without importing torch for it
        return {"$tensor": _kept(value.detach().cpu().numpy(), arrays)}
    raise ExperimentError(
        f"an option of {type(value).__name__} cannot be sent to a worker",
        "numbers, texts, lists, arrays, samples, and the values mech itself makes",
        "run this outside mech.on_folder and mech.on_ray",
    )


def _given(kind: Any) -> list[str]:
    """The fields that a dataclass is made from; what it derives from them is derived again."""
    return [one.name for one in fields(kind) if one.init]


def _kept(array: np.ndarray, arrays: list[np.ndarray]) -> int:
    arrays.append(array)
    return len(arrays) - 1


def _read(value: Any, arrays: Any) -> Any:
    if not isinstance(value, dict):
        return value
    (name, inner), *rest = value.items()
    if name == "$pairs":
        return {_read(key, arrays): _read(one, arrays) for key, one in inner}
    if name in ("$tuple", "$list", "$samples"):
        made = {"$tuple": tuple, "$list": list, "$samples": Samples}[name]
        return made([_read(one, arrays) for one in inner])
    if name == "$picture":
        mode, width, height = rest[0][1]
        if mode not in RAW:
            raise ValueError(f"a picture of mode {mode!r}")
        return Image.frombytes(mode, (width, height), arrays[f"_{inner}"].tobytes())
    if name == "$array":
        return arrays[f"_{inner}"]
    if name == "$tensor":
        import torch  # only here: most of what is packed has none

        return torch.from_numpy(arrays[f"_{inner}"].copy())
    if name == "$class" and inner in _KNOWN:
        values = [_read(one, arrays) for one in rest[0][1]]
        kind = _KNOWN[inner]
        return kind(**dict(zip(_given(kind), values, strict=True))) if is_dataclass(kind) else kind(*values)
    raise ValueError(f"{inner if name == '$class' else name!r} is not known here")
