"""Saving and loading labelled arrays: netCDF files without pickle, written whole or not at all.

``save`` and ``load`` keep an ``xarray.Dataset`` as it is: dimensions, string coordinates, nan, and attributes that are
dicts, lists or None (written as JSON). A file is written beside its place and moved there in one step, so a reader
never sees half a file; blocks carry checksums, so a damaged one is refused rather than read.

    >>> save(scores, "ram.nc")                     # doctest: +SKIP
    >>> load("ram.nc").sel(layer=3, head=5)        # doctest: +SKIP

``save_part`` and ``load_part`` do the same for the many small pieces of an unfinished result, as ``.npz``: opening a
netCDF file takes 60 ms, which over a thousand pieces is a minute. Nothing here knows what the numbers mean.
"""

import contextlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from mech.errors import OutputError
from mech.results.provenance import jsonable

_JSON = "json_attributes"  # names, in one attribute, of those attributes that were written as JSON
_HEADER = "header"  # in a part: what npz does not say, dimensions and attributes


def save(dataset: xr.Dataset, path: str | Path) -> Path:
    """Write a dataset to one netCDF file, whole or not at all.

    Raises:
        OutputError: the folder cannot be written, something else is in the way, or a value is not a number, a
            boolean or a string.
    """
    path = Path(path)
    written = dataset.copy(deep=False).drop_encoding()
    for name, variable in written.variables.items():
        if variable.dtype == object:
            written[name] = (variable.dims, _plain(variable.values, name), variable.attrs)
    written.attrs = _encoded(written.attrs)
    for name in written.variables:
        written[name].attrs = _encoded(written[name].attrs)
    # Checksums and compression need chunks, which empty arrays, scalars and strings do not have.
    encoding = {
        name: {"zlib": True, "complevel": 4, "shuffle": True, "fletcher32": True}
        for name, variable in written.variables.items()
        if variable.dtype.kind in "biuf" and variable.ndim and variable.size
    }
    with _replacing(path) as part:
        written.to_netcdf(part, engine="h5netcdf", encoding=encoding)
    return path


def load(path: str | Path) -> xr.Dataset:
    """Read a file of ``save`` into memory, leaving no handle open.

    Raises:
        OutputError: there is no such file, or it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.nc")) if path.parent.is_dir() else []
        raise OutputError(
            f"there is no file {path}",
            f"one of {', '.join(beside)}" if beside else "a netCDF file written by mech",
            "give the path of a result, or run the study that makes it",
        )
    try:
        # Units are attributes of ours, not instructions for xarray to turn numbers into dates.
        with xr.open_dataset(path, engine="h5netcdf", decode_times=False, decode_timedelta=False) as opened:
            dataset = opened.load().drop_encoding()
    except Exception as error:  # h5py, h5netcdf and xarray have no common error; all of them mean: not readable
        raise OutputError(
            f"{path} cannot be read ({type(error).__name__}: {error})",
            "a whole netCDF file",
            "delete it and run the same command again: only this file is computed anew",
        ) from error
    dataset.attrs = _decoded(dataset.attrs)
    for name in dataset.variables:
        dataset[name].attrs = _decoded(dataset[name].attrs)
    return dataset


def save_part(dataset: xr.Dataset, path: str | Path) -> Path:
    """Write a small piece of a result quickly. ``load_part`` reads it back."""
    path = Path(path)
    header = {
        "dims": {str(name): variable.dims for name, variable in dataset.variables.items()},
        "attrs": {str(name): jsonable(variable.attrs) for name, variable in dataset.variables.items()},
        "coords": [str(name) for name in dataset.coords],
        "dataset": jsonable(dataset.attrs),
    }
    arrays: dict[str, Any] = {_HEADER: np.array(json.dumps(header))}
    arrays |= {f"_{name}": _plain(variable.values, name) for name, variable in dataset.variables.items()}
    with _replacing(path) as part, part.open("wb") as written:
        np.savez(written, **arrays)
    return path


def load_part(path: str | Path) -> xr.Dataset:
    """Read a file of ``save_part``; ``OutputError`` when it is missing or damaged (zip keeps checksums)."""
    path = Path(path)
    try:
        # Opened here, because np.load leaves the file open when it is damaged.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            header = json.loads(str(arrays[_HEADER]))
            variables = {
                name: (dims, arrays[f"_{name}"], header["attrs"][name]) for name, dims in header["dims"].items()
            }
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise OutputError(f"{path} cannot be read ({error})", "a whole part", "delete it and run again") from error
    coords = {name: variables.pop(name) for name in header["coords"]}
    return xr.Dataset(variables, coords, header["dataset"])


def write_json(value: Any, path: str | Path) -> Path:
    """Write plain values as a JSON file, whole or not at all; nan and inf become null."""
    path = Path(path)
    text = json.dumps(jsonable(value), indent=1, allow_nan=False, ensure_ascii=False)
    with _replacing(path) as part:
        part.write_text(text + "\n", encoding="utf-8")
    return path


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` when all went well."""
    part = path.parent / f".{path.name}.{os.getpid()}.part"
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        yield part
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(part, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder, or say that it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise unwritable(path, PermissionError("permission denied"))


def unwritable(path: Path, error: OSError) -> OutputError:
    """The error for a place that cannot be written."""
    return OutputError(
        f"{path} cannot be written ({error.strerror or error})",
        "a folder that can be written, on a disk that is not full",
        "give another folder, or make room and permission for this one",
    )


def _plain(values: np.ndarray, name: Any) -> np.ndarray:
    """The same values without python objects, which would need pickle."""
    if values.dtype != object:
        return values
    if not all(isinstance(value, str) for value in values.flat):
        raise OutputError(f"{name!r} holds python objects", "numbers, booleans or strings", "convert it first")
    return values.astype(str)


def _encoded(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    # netCDF attributes hold strings, numbers and flat arrays of numbers; the rest goes in as JSON, listed by name.
    plain: dict[str, Any] = {}
    as_json: list[str] = []
    for name, value in attrs.items():
        if name == _JSON:
            continue
        if isinstance(value, str | int | float | np.integer | np.floating) and not isinstance(value, bool):
            plain[str(name)] = str(value) if isinstance(value, str) else value
        elif isinstance(value, np.ndarray) and value.ndim == 1 and value.size and value.dtype.kind in "iuf":
            plain[str(name)] = value
        else:
            plain[str(name)] = json.dumps(jsonable(value), allow_nan=False)
            as_json.append(str(name))
    return {**plain, _JSON: json.dumps(as_json)} if as_json else plain


def _decoded(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    as_json = json.loads(attrs[_JSON]) if _JSON in attrs else []
    return {
        name: json.loads(value) if name in as_json else value.item() if isinstance(value, np.generic) else value
        for name, value in attrs.items()
        if name != _JSON
    }
