"""Saved results come back as they were, and nothing half-written or damaged is ever read."""

import json
import os
from unittest.mock import ANY

import numpy as np
import pytest
import xarray as xr

from mech.errors import OutputError
from mech.results import load, save, write_json
from mech.results.store import load_part, read_json, save_part


def dataset():
    rng = np.random.default_rng(0)
    values = rng.random((3, 4))
    values[1, 2] = np.nan
    return xr.Dataset(
        {
            "accuracy": (("condition", "example"), values, {"unit": "days since", "range": [0, 1], "none": None}),
            "right": ("example", np.array([True, False, True, True])),
            "count": ("example", np.arange(4)),
            "single": ((), np.float32(3.5)),
            "empty": ("nothing", np.zeros(0)),
            "note": ("condition", np.array(["a", "", "é — 文"])),
        },
        {"method": ("condition", np.array(["none", "mean", "zero"])), "example": ["s0", "s1", "s2", "s3"]},
        {
            "provenance": {"seed": 0, "specs": [{"to": "mean"}], "nothing": None, "yes": True},
            "text": '{"maps": "like JSON"}',
            "blank": "",
            "flag": True,
            "number": 3,
            "pair": [1, "a"],
            "long": "x" * 100_000,  # beyond the 64 KiB that HDF5 keeps in an attribute itself
        },
    )


@pytest.mark.parametrize(("write", "read", "name"), [(save, load, "a.nc"), (save_part, load_part, "a.npz")])
def test_a_dataset_comes_back_as_it_was(tmp_path, write, read, name):
    given = dataset()
    before = given.copy(deep=True)
    again = read(write(given, tmp_path / name))
    xr.testing.assert_identical(given, before)  # saving changes nothing
    xr.testing.assert_identical(again, given)
    for variable in given.variables:
        assert again[variable].dtype.kind == given[variable].dtype.kind, variable
    assert type(again.attrs["flag"]) is bool and type(again.attrs["number"]) is int
    assert [p.name for p in tmp_path.iterdir()] == [name]
    xr.testing.assert_identical(read(write(again, tmp_path / f"2{name}")), given)  # and again


def test_strings_kept_as_objects_are_saved_as_strings(tmp_path):
    given = xr.Dataset({"name": ("example", np.array(["a", "bcd"], dtype=object))})
    for again in (load(save(given, tmp_path / "a.nc")), load_part(save_part(given, tmp_path / "a.npz"))):
        assert again.name.values.tolist() == ["a", "bcd"] and again["name"].dtype.kind == "U"


@pytest.mark.parametrize("write", [save, save_part])
def test_python_objects_are_refused_and_never_pickled(tmp_path, write):
    given = xr.Dataset({"thing": ("example", np.array([{}, "a"], dtype=object))})
    with pytest.raises(OutputError, match="'thing' holds python objects"):
        write(given, tmp_path / "a.nc")
    assert not list(tmp_path.iterdir())


def test_a_loaded_file_is_in_memory_and_closed(tmp_path):
    path = save(dataset(), tmp_path / "a.nc")
    again = load(path)
    path.unlink()
    assert float(again.accuracy.sum()) == pytest.approx(float(dataset().accuracy.sum()))


def test_missing_file_names_its_neighbours(tmp_path):
    save(dataset(), tmp_path / "ram.nc")
    with pytest.raises(OutputError, match=r"no file .*rma\.nc\n.*ram\.nc"):
        load(tmp_path / "rma.nc")
    with pytest.raises(OutputError, match="no file"):
        load(tmp_path / "nowhere" / "ram.nc")


@pytest.mark.parametrize(("write", "read"), [(save, load), (save_part, load_part)])
@pytest.mark.parametrize("damage", ["empty", "half", "text", "flipped"])
def test_a_damaged_file_is_refused(tmp_path, write, read, damage):
    given = xr.Dataset({"a": ("example", np.random.default_rng(0).random(5000))})
    path = write(given, tmp_path / "a.file")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    path.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "text": b"hello", "flipped": flipped}[damage])
    with pytest.raises(OutputError, match=r"a\.file cannot be read"):
        read(path)


@pytest.mark.parametrize("write", [lambda p: save(dataset(), p), lambda p: write_json({}, p)])
def test_a_place_that_cannot_be_written_is_named(tmp_path, write):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.nc").mkdir()
    for path in (tmp_path / "file" / "a.nc", tmp_path / "folder.nc", tmp_path / "no" / "a.nc"):
        with pytest.raises(OutputError, match="cannot be written") as error:
            write(path)
        assert path.name in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.nc"]  # no part left behind


def test_a_link_stays_and_a_pipe_is_not_replaced(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    write_json({"a": 1}, tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink() and read_json(tmp_path / "real.json") == {"a": 1}
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(OutputError, match="it is not a regular file"):
        write_json({"a": 1}, tmp_path / "pipe.json")
    assert (tmp_path / "pipe.json").is_fifo()


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = save(dataset(), tmp_path / "a.nc")
    whole = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        save(dataset()[["count"]], path)
    assert path.read_bytes() == whole and [p.name for p in tmp_path.iterdir()] == ["a.nc"]


def test_json_has_no_nan_and_keeps_text(tmp_path):
    path = write_json(
        {"a": float("nan"), "b": np.float32(0.5), "c": np.arange(2), "d": "é</script>"}, tmp_path / "a.json"
    )
    given = {"a": None, "b": 0.5, "c": [0, 1], "d": "é</script>"}
    assert read_json(path) == given and "é" in path.read_text(encoding="utf-8")
    assert json.loads(path.read_bytes()) == {**given, "mech_checksum": ANY}
