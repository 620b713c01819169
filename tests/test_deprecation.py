"""Names of the version before: they work and warn; what they wrote is still read."""

import json

import numpy as np
import pytest
import xarray as xr
from fabricated import fabricated_circuit, fabricated_maps, fabricated_sample

import mech
from mech.experiments.causal.report import QUADRANTS, CausalReport
from mech.results import Study, load, save
from mech.results.older import LABELS
from mech.views import view


@pytest.mark.parametrize("old, new", [("looks", "attention_maps"), ("asking", "with_question")])
def test_names_of_the_version_before_warn(old, new):
    with pytest.warns(DeprecationWarning, match=f"mech.{old} is now called mech.{new}") as warned:
        assert getattr(mech, old) is getattr(mech, new)
    assert warned[0].filename == __file__, "the warning points at the caller"
    assert old not in mech.__all__


def test_options_of_the_version_before_warn():
    maps = fabricated_maps()
    with pytest.warns(DeprecationWarning, match="looks= is now called maps="):
        drawn = view(fabricated_circuit(), on=fabricated_sample(), looks=maps)
    now = view(fabricated_circuit(), on=fabricated_sample(), maps=maps)
    assert drawn.body.count("<figure") == now.body.count("<figure") > 0 and drawn.height == now.height


def test_quadrants_of_the_version_before():
    dims = ("layer", "head")
    heads = xr.Dataset({name: (dims, np.ones((1, 2))) for name in ("ram", "lost", "recovered")}, {"layer": [3]})
    heads["quadrant"] = (dims, [[QUADRANTS[0], QUADRANTS[2]]])
    renamed = "quadrant 'matters, does not look' is now called 'causal, not attending'"
    with pytest.warns(DeprecationWarning, match=renamed):
        assert CausalReport(heads).quadrant("matters, does not look") == [(3, 1)]
    assert set(LABELS.values()) == set(QUADRANTS[:3])


def test_files_of_the_version_before_are_read(tmp_path):
    maps = fabricated_maps()
    older = maps.rename(example="look").assign_attrs(kind="looks", looks=maps.attrs["facts"])
    del older.attrs["facts"]
    folder = tmp_path / "m" / "d"
    folder.mkdir(parents=True)
    save(older, folder / "looks.nc")
    xr.testing.assert_identical(load(folder / "looks.nc"), maps)
    with Study(tmp_path, settings={}) as study:
        assert study.done("m/d/maps")
        xr.testing.assert_identical(study.get("m/d/maps"), maps)

    dims = ("layer", "head")
    heads = xr.Dataset({"ram": (dims, [[1.0]]), "quadrant": (dims, [["looks, does not matter"]])})
    save(heads, tmp_path / "causal.nc")
    assert load(tmp_path / "causal.nc")["quadrant"].item() == "attending, not causal"


def test_settings_and_summaries_of_the_version_before_are_read(tmp_path):
    settings = {"n_looks": 3, "seed": 0}
    (tmp_path / "study.json").write_text(json.dumps({"schema": 1, "settings": settings, "records": []}))
    with Study(tmp_path, settings={"n_maps": 3, "seed": 0}) as study:
        assert study.settings == {"n_maps": 3, "seed": 0}
