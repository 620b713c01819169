"""Damage is refused or changes nothing, in every kind of stored file; a full disk is an error and loses no old file."""

import json
import resource
from collections import Counter

import h5py
import numpy as np
import pytest
import xarray as xr
from fabricated import fabricated_circuit, fabricated_maps, fabricated_sample

from mech import files
from mech.data.pictures import pixel_digest, png, shows
from mech.errors import OutputError
from mech.experiments.paths.circuits import Circuit
from mech.experiments.ranking.ranking import Ranking
from mech.results import Study, ablation_dataset, load, ram_dataset, save, write_json
from mech.results.store import load_part, read_json, save_part

SETTINGS = {"n_test": 10, "words": ["grounding", "é"], "seed": 0}
SUMMARY = {"models": {"m": {"x": [0.25, None, "é"]}}, "findings": ["text"]}
PROVENANCE = {"model": {"name": "m", "weights": "ab" * 32}, "seed": 0, "nothing": None}


def ram():
    rng = np.random.default_rng(0)
    scores = rng.random((4, 2, 3))
    return ram_dataset(
        scores, scores, rng.random(4), np.arange(4), examples=["a", "bb", "é", "d"], provenance=PROVENANCE, model="m"
    )


def ablation():
    return ablation_dataset(
        np.eye(2, 5) > 0, np.random.default_rng(0).normal(size=(2, 5)), method=["none", "mean"], band=["none", "top"],
        fraction=[0, 0.05], n_heads=[0, 3], draw=[0, 0], provenance=PROVENANCE,
    )  # fmt: skip


def ranking():
    return Ranking(np.random.default_rng(0).random((2, 3)), None, "ram", "m", "grounding", ("a", "b"))


def study(folder):
    with Study(folder, SETTINGS) as made:
        made.record({"model": "m", "provenance": PROVENANCE})
    return folder / "study.json"


def settings_and_records(path):
    with Study(path.parent, SETTINGS) as opened:
        return opened.settings, opened.records


def picture(folder):
    path = folder / "map0_0.png"
    return files.write(path, png(fabricated_sample().images[0]))


def pixels(path):
    if not shows(path, pixel_digest(fabricated_sample().images[0])):
        raise OutputError("another picture")
    return True


def read_summary(path):
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise OutputError(str(error)) from error


# What is written, and what is read of it: every kind of file that mech writes and reads again.
KINDS = {
    "ram.nc": (lambda folder: save(ram(), folder / "ram.nc"), load),
    "ablation.nc": (lambda folder: save(ablation(), folder / "ablation.nc"), load),
    "maps.nc": (lambda folder: save(fabricated_maps(), folder / "maps.nc"), load),
    "part": (lambda folder: save_part(ablation(), folder / "0000.npz"), load_part),
    "summary.json": (lambda folder: write_json(SUMMARY, folder / "summary.json"), read_summary),
    "study.json": (study, settings_and_records),
    "ranking": (lambda folder: write_json(ranking().to_json(), folder / "r.json"), lambda p: Ranking.from_json(p)),
    "circuit": (lambda folder: write_json(fabricated_circuit().to_json(), folder / "c.json"), Circuit.from_json),
    "picture": (picture, pixels),
}  # fmt: skip


def same(one, other):
    if isinstance(one, xr.Dataset):
        return one.identical(other)
    if isinstance(one, Ranking | Circuit):
        return one.to_json() == other.to_json()
    return one == other


def flipped(path, read, flips, seed):
    """What becomes of a file of which one bit is another: refused, unchanged, or silently different."""
    whole, before = path.read_bytes(), read(path)
    counts = Counter()
    for bit in np.random.default_rng(seed).integers(0, 8 * len(whole), flips):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            counts["unchanged" if same(before, read(path)) else "silently different"] += 1
        except OutputError:
            counts["refused"] += 1
    path.write_bytes(whole)
    assert same(before, read(path))
    return counts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flips", [40, pytest.param(1200, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, kind, flips):
    make, read = KINDS[kind]
    counts = flipped(make(tmp_path), read, flips, seed=flips)
    assert counts["silently different"] == 0 and counts["refused"] > flips // 2 and counts.total() == flips


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_was_cut_off_is_refused(tmp_path, kind):
    make, read = KINDS[kind]
    path = make(tmp_path)
    whole = path.read_bytes()
    for left in (0, 1, len(whole) // 2, len(whole) - 100, len(whole) - 40):
        path.write_bytes(whole[:left])
        with pytest.raises(OutputError):
            read(path)


def test_a_file_that_lost_its_checksum_is_refused(tmp_path):
    for path, read in ((save(ram(), tmp_path / "a.nc"), load), (save_part(ram(), tmp_path / "a.npz"), load_part)):
        whole = path.read_bytes()
        path.write_bytes(whole[: whole.rindex(b"\nmech sha256 ")])
        with pytest.raises(OutputError, match="its checksum is missing"):
            read(path)


def test_files_from_before_there_were_checksums_are_read(tmp_path):
    given = ram().drop_attrs().assign_attrs(model="m")
    given.to_netcdf(tmp_path / "old.nc", engine="h5netcdf")
    xr.testing.assert_identical(load(tmp_path / "old.nc"), given)
    header = {"dims": {"x": ["example"]}, "attrs": {"x": {}}, "coords": [], "dataset": {"n": 1}}
    np.savez(tmp_path / "old.npz", header=np.array(json.dumps(header)), _x=np.arange(3))
    xr.testing.assert_identical(
        load_part(tmp_path / "old.npz"), xr.Dataset({"x": ("example", range(3))}, attrs={"n": 1})
    )
    (tmp_path / "old.json").write_text(json.dumps(ranking().to_json()))
    assert Ranking.from_json(tmp_path / "old.json").heads == ranking().heads
    (tmp_path / "study.json").write_text(json.dumps({"settings": SETTINGS, "records": []}))
    assert Study(tmp_path, SETTINGS).settings == SETTINGS


def test_a_json_file_may_be_laid_out_anew_but_not_changed_unless_its_checksum_goes(tmp_path):
    path = write_json(ranking().to_json(), tmp_path / "r.json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record, indent=4, sort_keys=True))
    assert Ranking.from_json(path).heads == ranking().heads
    record["model"] = "another"
    path.write_text(json.dumps(record))
    with pytest.raises(OutputError, match="changed on purpose, remove 'mech_checksum'"):
        Ranking.from_json(path)
    del record["mech_checksum"]
    path.write_text(json.dumps(record))
    assert Ranking.from_json(path).model == "another"


@pytest.mark.parametrize("value", ["{", "[1]", "3", "[" * 100_000])
@pytest.mark.parametrize("sealed", [True, False])
def test_a_broken_attribute_in_a_study_counts_as_missing(tmp_path, value, sealed):
    """As a truncated file does: it is computed anew."""
    place = Study(tmp_path, SETTINGS)
    place.put("m/d/ram", ram())
    with h5py.File(place.file("m/d/ram"), "r+") as opened:
        opened.attrs["provenance"] = value
        if not sealed:  # a file from before there were checksums
            del opened.attrs["mech_checksum"]
    assert not place.done("m/d/ram")
    place.put("m/d/ram", ram())
    xr.testing.assert_identical(place.get("m/d/ram"), ram())


@pytest.mark.parametrize("name", ["facts", "agreement"])
def test_a_broken_text_of_a_kind_is_refused(tmp_path, name):
    key = {"facts": "m/d/maps", "agreement": "m/d/causal"}[name]
    heads = xr.Dataset({"ram": (("layer", "head"), np.ones((1, 2))), "quadrant": (("layer", "head"), [["a", "b"]])})
    given = fabricated_maps() if name == "facts" else heads.assign_attrs(agreement="{}", paths="[]", members="{}")
    place = Study(tmp_path, SETTINGS)
    place.put(key, given)
    for broken in ("{", "[" * 5000, 3):
        with pytest.raises(OutputError, match=name):
            Study(tmp_path / "other", SETTINGS).put(key, given.assign_attrs({name: broken}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_said_and_keeps_what_was_there(tmp_path, kind):
    make, _ = KINDS[kind]
    path = make(tmp_path)
    whole = path.read_bytes()
    if kind == "study.json":  # is written once
        path.unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))  # the system refuses longer files, as a full disk does
    try:
        with pytest.raises(OutputError, match=r"cannot be written \(File too large\)"):
            make(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    if kind != "study.json":
        assert path.read_bytes() == whole
    assert not [p for p in tmp_path.iterdir() if p.name not in (path.name, ".lock")]  # no part of a file is left


@pytest.mark.parametrize("point", ["external", "virtual", "link", "announced"])
def test_a_file_that_points_elsewhere_or_announces_too_much_is_refused(tmp_path, point):
    secret = tmp_path / "secret.bin"
    secret.write_bytes(np.arange(4.0).tobytes())
    with h5py.File(tmp_path / "a.nc", "w") as made:
        if point == "external":
            made.create_dataset("x", (4,), "f8", external=[(str(secret), 0, 32)])
        elif point == "virtual":
            layout = h5py.VirtualLayout((4,), "f8")
            layout[:] = h5py.VirtualSource(str(secret), "y", (4,))
            made.create_virtual_dataset("x", layout)
        elif point == "link":
            made["x"] = h5py.ExternalLink(str(secret), "/y")
        else:
            made.create_dataset("x", (10**9,), "f8", chunks=(1000,))
    with pytest.raises(
        OutputError, match={"announced": "announces 8000000000 bytes"}.get(point, "in (another|other) file")
    ):
        load(tmp_path / "a.nc")


def test_hard_links_that_go_round_are_read(tmp_path):
    path = save(ram(), tmp_path / "a.nc")
    with h5py.File(path, "r+") as opened:
        opened.create_group("g")["again"] = opened["/"]
        del opened.attrs["mech_checksum"]
    xr.testing.assert_identical(load(path), ram())


def test_other_programs_read_the_files(tmp_path):
    """The checksum lies behind what HDF5 and zip read."""
    path = save(ram(), tmp_path / "a.nc")
    with xr.open_dataset(path) as opened:
        np.testing.assert_array_equal(opened["ram"], ram()["ram"])
    with np.load(save_part(ram(), tmp_path / "a.npz")) as opened:
        np.testing.assert_array_equal(opened["_ram"], ram()["ram"])


@pytest.mark.parametrize("there", [False, True])
def test_an_error_before_the_first_result_leaves_no_study(tmp_path, there):
    folder = tmp_path / "study"
    if there:
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="without the variable"), Study(folder, SETTINGS) as place:
        place.record({"model": "m"})
        place.put("m/d/ram", ablation())
    assert [p.name for p in tmp_path.rglob("*")] == (["study", "mine.txt"] if there else [])
    with pytest.raises(KeyboardInterrupt), Study(folder, {"n_test": 11}) as place:  # other settings are welcome
        place.put("m/d/ram", ram())
        raise KeyboardInterrupt
    assert Study(folder).done("m/d/ram")
