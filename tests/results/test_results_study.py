"""A study is only added to, survives being killed, and has one writer."""

import fcntl
import gc
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from mech.errors import OutputError
from mech.results import Study, ablation_dataset, ram_dataset

SETTINGS = {"n_test": 10, "fractions": (0.01, 0.05), "data": {"seed": 0, "domains": ["a", "b"]}}
KEY = "m/d/ablation"
ROOT = Path(__file__).parents[2]


def ram():
    rng = np.random.default_rng(0)
    return ram_dataset(rng.random((3, 2, 4)), rng.random((3, 2, 4)), rng.random(3), np.arange(3), model="m")


def condition(i, n=5):
    rng = np.random.default_rng(i)
    return ablation_dataset(
        rng.random((1, n)) < 0.5,
        rng.normal(size=(1, n)),
        method=["none" if i == 0 else "mean"],
        band=["none" if i == 0 else "layer_matched"],
        fraction=[0.05 * i],
        n_heads=[i],
        draw=[i],
        examples=[f"s{j}" for j in range(n)],
        provenance={"seed": 0},
    )


def test_put_get_done_keys(tmp_path):
    study = Study(tmp_path / "new" / "study", SETTINGS)
    assert not study.done("m/d/ram") and study.keys() == []
    study.put("m/d/ram", ram())
    study.put("org/m/d/other", xr.Dataset({"x": 1.0}))
    assert study.done("m/d/ram") and study.keys() == ["m/d/ram", "org/m/d/other"]
    xr.testing.assert_identical(study.get("m/d/ram"), ram())
    assert study.file("m/d/ram") == tmp_path / "new" / "study" / "m" / "d" / "ram.nc"
    with pytest.raises(OutputError, match="only added to"):
        study.put("m/d/ram", ram())


def test_the_same_settings_open_it_again_and_others_are_refused(tmp_path):
    Study(tmp_path, SETTINGS).put("m/d/ram", ram())
    assert Study(tmp_path, dict(reversed(SETTINGS.items()))).done("m/d/ram")
    other = {**SETTINGS, "data": {"seed": 1, "domains": ["a", "b"]}}
    with pytest.raises(OutputError, match=r"made with data\.seed = 0, but now data\.seed = 1"):
        Study(tmp_path, other)
    with pytest.raises(OutputError, match='made with extra = "unset", but now extra = 3'):
        Study(tmp_path, {**SETTINGS, "extra": 3})
    assert Study(tmp_path, SETTINGS).settings["n_test"] == 10  # a refusal leaves no lock


def test_records_are_appended(tmp_path):
    study = Study(tmp_path, SETTINGS)
    study.record({"date": 1})
    Study(tmp_path, SETTINGS).record({"date": 2})
    assert [entry["date"] for entry in Study(tmp_path).records] == [1, 2]
    written = json.loads((tmp_path / "study.json").read_text())
    assert written["settings"]["fractions"] == [0.01, 0.05] and written["schema"] == 1


def test_without_settings_it_is_for_reading(tmp_path):
    with pytest.raises(OutputError, match="is not a study"):
        Study(tmp_path)
    writer = Study(tmp_path, SETTINGS)
    reader = Study(tmp_path)
    writer.put("m/d/ram", ram())
    assert reader.done("m/d/ram") and "reading only" in repr(reader)
    for write in (
        lambda: reader.put("m/d/x", ram()),
        lambda: reader.append(KEY, condition(0), 0),
        lambda: reader.record({}),
        lambda: reader.finish(KEY, 1),
    ):
        with pytest.raises(OutputError, match="open for reading"):
            write()


def test_parts_join_in_the_order_of_their_numbers(tmp_path):
    study = Study(tmp_path, SETTINGS)
    assert study.missing(KEY, 4) == [0, 1, 2, 3]
    for i in (2, 0, 3):
        study.append(KEY, condition(i), i)
    assert study.missing(KEY, 4) == [1] and not study.done(KEY) and study.keys() == []
    with pytest.raises(OutputError, match="1 of 4 parts are missing, the first is 1"):
        study.finish(KEY, 4)
    study.append(KEY, condition(1), 1)
    whole = study.finish(KEY, 4, provenance={"seed": 1})
    assert whole.draw.values.tolist() == [0, 1, 2, 3]
    assert whole.band.values.tolist() == ["none", *["layer_matched"] * 3]
    assert whole.accuracy.dims == ("condition", "example") and whole.attrs["provenance"] == {"seed": 1}
    for i in range(4):
        xr.testing.assert_equal(whole.isel(condition=[i]), condition(i))
    assert study.missing(KEY, 4) == [] and study.keys() == [KEY]
    assert sorted(p.name for p in (tmp_path / "m" / "d").iterdir()) == ["ablation.nc"]
    xr.testing.assert_identical(study.finish(KEY, 4), whole)


def test_a_study_cut_off_anywhere_ends_in_the_same_numbers(tmp_path):
    def run(path, stop=None):
        study, computed = Study(path, SETTINGS), []
        for i in study.missing(KEY, 5):
            if stop is not None and len(computed) == stop:
                raise KeyboardInterrupt
            study.append(KEY, condition(i), i)
            computed.append(i)
        return study.finish(KEY, 5), computed

    whole, computed = run(tmp_path / "whole")
    assert computed == [0, 1, 2, 3, 4]
    for stop in (0, 2, 4):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / str(stop), stop)
        again, computed = run(tmp_path / str(stop))
        assert computed == list(range(stop, 5))
        xr.testing.assert_identical(again, whole)


def test_damaged_files_count_as_missing_and_leftovers_are_cleared(tmp_path):
    study = Study(tmp_path, SETTINGS)
    study.append(KEY, condition(0), 0)
    study.append(KEY, condition(1), 1)
    part = tmp_path / "m" / "d" / "ablation.parts" / "0001.npz"
    part.write_bytes(part.read_bytes()[:-40])
    assert study.missing(KEY, 2) == [1]
    study.append(KEY, condition(1), 1)
    study.finish(KEY, 2)

    file = study.file(KEY)
    file.write_bytes(b"damaged")
    assert not study.done(KEY)
    with pytest.raises(OutputError, match="run the same command again"):
        study.get(KEY)
    study.put(KEY, condition(0))
    assert study.done(KEY)

    left = file.parent / ".ablation.nc.123.part"
    left.write_bytes(b"half")
    study = Study(tmp_path, SETTINGS)
    assert not left.exists()


def test_killed_between_the_result_and_clearing_its_parts(tmp_path):
    study = Study(tmp_path, SETTINGS)
    study.append(KEY, condition(0), 0)
    study.put(KEY, condition(0))
    xr.testing.assert_identical(study.finish(KEY, 1), condition(0))
    assert not (tmp_path / "m" / "d" / "ablation.parts").exists()


def test_parts_of_other_examples_do_not_join(tmp_path):
    study = Study(tmp_path, SETTINGS)
    study.append(KEY, condition(0), 0)
    study.append(KEY, condition(1, n=4), 1)
    with pytest.raises(OutputError, match="do not fit"):
        study.finish(KEY, 2)


def test_a_result_of_the_wrong_kind_is_refused_before_it_is_written(tmp_path):
    study = Study(tmp_path, SETTINGS)
    with pytest.raises(OutputError, match="without the variable 'accuracy'"):
        study.put(KEY, ram())
    with pytest.raises(OutputError, match="without the variable 'accuracy'"):
        study.append(KEY, ram(), 0)
    assert study.missing(KEY, 1) == [0] and not (tmp_path / "m").exists()


@pytest.mark.parametrize("key", ["", "/etc/ram", "m//ram", "../ram", "m/../../ram", ".lock", "a\\b"])
def test_keys_stay_inside_the_folder(tmp_path, key):
    with pytest.raises(OutputError, match="is not a key"):
        Study(tmp_path, SETTINGS).put(key, ram())


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "study"):
        with pytest.raises(OutputError, match="cannot be written"):
            Study(path, SETTINGS)


def test_a_broken_study_json_is_named(tmp_path):
    for text in ("{", "[]"):
        (tmp_path / "study.json").write_text(text)
        with pytest.raises(OutputError, match=r"study\.json"):
            Study(tmp_path, SETTINGS)


HOLD = """
import sys
from mech.results import Study
study = Study(sys.argv[1], {"n": 1})
print("open", flush=True)
sys.stdin.read()
"""


def test_two_processes_are_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(OutputError, match=f"being written by another process .process {other.pid} on"):
            Study(tmp_path, {"n": 1})
        Study(tmp_path)  # reading is free
    finally:
        other.kill()
        other.communicate()
    assert (tmp_path / ".lock").exists()  # what a killed run leaves behind does not hinder the next
    Study(tmp_path, {"n": 1}).put("m/d/ram", ram())


def test_a_study_closed_or_forgotten_lets_others_write(tmp_path):
    def other_can_write():  # what another process would try; a second handle in this one is refused just the same
        with (tmp_path / ".lock").open() as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    with Study(tmp_path, {"n": 1}):
        assert not other_can_write()
    assert other_can_write()
    first, second = Study(tmp_path, {"n": 1}), Study(tmp_path, {"n": 1})  # a notebook may open it twice
    first.close()
    assert not other_can_write()
    del second
    gc.collect()
    assert other_can_write()
