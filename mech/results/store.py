"""Saving and loading labelled arrays: netCDF files without pickle, written whole or not at all.

``save`` and ``load`` preserve an ``xarray.Dataset``: dimensions, string coordinates, nan, and attributes that are
dicts, lists or None (written as JSON). A file is built in memory and put in place on the disk in one step, so a reader
never sees half a file, and a full disk is an error rather than a crash inside HDF5. It ends in a checksum over its
whole content (``mech.results.checksum``): damage is refused before HDF5 reads a byte.

    >>> save(scores, "ram.nc")                     # doctest: +SKIP
    >>> load("ram.nc").sel(layer=3, head=5)        # doctest: +SKIP

``save_part`` and ``load_part`` do the same for the many small pieces of an unfinished result, as ``.npz``: opening a
netCDF file takes 60 ms, which adds up to a minute over a thousand pieces. ``write_json`` and ``read_json`` do it for
plain values. Nothing here knows what the numbers mean.

A file from elsewhere is not trusted: HDF5 can point into other files of the machine (external storage, external links,
virtual datasets) and announce arrays that it does not hold; both are refused.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from mech.errors import OutputError
from mech.files import parse_json, read, write
from mech.results.checksum import NAME, SEALED, seal, sealed_record, unsealed, unsealed_record
from mech.results.older import renewed, renewed_record
from mech.results.provenance import jsonable

_JSON = "json_attributes"  # the attribute that names those written as JSON
_HEADER = "header"  # in a part: dimensions and attributes, which npz does not store
_PACKED = 5000  # bytes of an array per byte of its file; zlib reaches 1032, and names of dimensions four times that


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
    written.attrs = _encoded(written.attrs) | {NAME: SEALED}
    for name in written.variables:
        written[name].attrs = _encoded(written[name].attrs)
    # Compression needs chunks, which empty arrays, scalars and strings do not have.
    encoding = {
        name: {"zlib": True, "complevel": 4, "shuffle": True}
        for name, variable in written.variables.items()
        if variable.dtype.kind in "biuf" and variable.ndim and variable.size
    }
    content = written.to_netcdf(engine="h5netcdf", encoding=encoding)
    return write(path, content, seal(content))


def load(path: str | Path) -> xr.Dataset:
    """Read a file written by ``save`` into memory, leaving no handle open.

    Raises:
        OutputError: there is no such file, it is damaged, or it points into other files.
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
        content, whole = unsealed(read(path))
        _check_inside(content)
        # Units are our own attributes, not instructions for xarray to turn numbers into dates.
        with xr.open_dataset(
            io.BytesIO(content), engine="h5netcdf", decode_times=False, decode_timedelta=False
        ) as opened:
            dataset = opened.load().drop_encoding()
        if dataset.attrs.pop(NAME, None) is not None and not whole:
            raise ValueError("its checksum is missing: it was cut off, or changed by another program")
        dataset.attrs = _decoded(dataset.attrs)
        for name in dataset.variables:
            dataset[name].attrs = _decoded(dataset[name].attrs)
    except Exception as error:  # h5py, h5netcdf and xarray have no common error; any error means: not readable
        raise OutputError(
            f"{path} cannot be read ({type(error).__name__}: {error})",
            "a complete netCDF file",
            "delete it and run the same command again: only this file is recomputed",
        ) from error
    return renewed(dataset)


def save_part(dataset: xr.Dataset, path: str | Path) -> Path:
    """Write a small piece of a result quickly. ``load_part`` reads it back."""
    return write(path, part_bytes(dataset))


def part_bytes(dataset: xr.Dataset) -> bytes:
    """The bytes that ``save_part`` writes, checksum included."""
    header = {
        "dims": {str(name): variable.dims for name, variable in dataset.variables.items()},
        "attrs": {str(name): jsonable(variable.attrs) for name, variable in dataset.variables.items()},
        "coords": [str(name) for name in dataset.coords],
        "dataset": jsonable(dataset.attrs),
        NAME: SEALED,
    }
    arrays: dict[str, Any] = {_HEADER: np.array(json.dumps(header))}
    arrays |= {f"_{name}": _plain(variable.values, name) for name, variable in dataset.variables.items()}
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    return packed.getvalue() + seal(packed.getbuffer())


def load_part(path: str | Path) -> xr.Dataset:
    """Read a file written by ``save_part``; ``OutputError`` if it is missing or damaged."""
    path = Path(path)
    try:
        return part_of_bytes(read(path))
    except Exception as error:  # zipfile, zlib, numpy and xarray have no common error; any error means: not readable
        raise OutputError(f"{path} cannot be read ({error})", "a complete part", "delete it and run again") from error


def part_of_bytes(content: bytes) -> xr.Dataset:
    """Read what ``part_bytes`` wrote; raises an error of zipfile, zlib, numpy or xarray if it is damaged."""
    content, whole = unsealed(content)
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        header = parse_json(str(arrays[_HEADER]))
        variables = {name: (dims, arrays[f"_{name}"], header["attrs"][name]) for name, dims in header["dims"].items()}
    if NAME in header and not whole:
        raise ValueError("its checksum is missing: it was cut off")
    coords = {name: variables.pop(name) for name in header["coords"]}
    return xr.Dataset(variables, coords, header["dataset"])


def write_json(value: Mapping[str, Any], path: str | Path) -> Path:
    """Write plain values as a JSON object with its checksum, whole or not at all; nan and inf become null."""
    record = sealed_record(jsonable(value))
    return write(path, json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False), "\n")


def read_json(path: str | Path) -> Any:
    """Read a file written by ``write_json``, or any other JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: not a path, not JSON, nested too deep, or damaged.
    """
    if not isinstance(path, str | Path):  # a number would be a file descriptor, which reading would close
        raise ValueError(f"{path!r} is not a path")
    value = parse_json(read(path))
    return renewed_record(unsealed_record(value) if isinstance(value, dict) else value)


def _check_inside(content: bytes) -> None:
    """Refuse an HDF5 file whose values lie in other files, or are more than it can hold."""
    import h5py

    def problem(name: str, link: Any) -> str | None:  # returned, since h5py cannot pass on an error
        if isinstance(link, h5py.ExternalLink):
            return f"{name!r} is in another file, {link.filename}"
        part = None if isinstance(link, h5py.SoftLink) else opened[name]
        if not isinstance(part, h5py.Dataset):
            return None
        if part.external or part.is_virtual:
            return f"the values of {name!r} lie in other files"
        if part.nbytes > _PACKED * len(content):
            return f"{name!r} announces {part.nbytes} bytes in a file of {len(content)}"
        return None

    with h5py.File(io.BytesIO(content), "r") as opened:
        if wrong := opened.visititems_links(problem):
            raise ValueError(wrong)


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
    as_json = parse_json(attrs[_JSON]) if _JSON in attrs else []
    return {
        name: parse_json(value) if name in as_json else value.item() if isinstance(value, np.generic) else value
        for name, value in attrs.items()
        if name != _JSON
    }
