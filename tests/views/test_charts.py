"""Charts of a view for plotly and for matplotlib: the same numbers, in colours, with their axes named."""

import numpy as np
import pytest
import xarray as xr
from fabricated import fabricated_maps, fabricated_sample, fabricated_study
from pages import Page

from mech.errors import OutputError
from mech.results import load
from mech.views import ablation_curves, causal_view, ram_map, view

SCORES = xr.DataArray([[[0.1, 0.9], [0.3, 0.2]], [[0.2, 0.8], [0.3, 0.4]]], dims=("example", "layer", "head"))


@pytest.fixture(scope="module")
def domain(tmp_path_factory):
    shape = (("toy", "llava", 4, 6),)
    study = fabricated_study(tmp_path_factory.mktemp("s"), shape, ("grounding",), n=6, draws=3, causal=True)
    return study / "toy" / "grounding"


def test_a_figure_of_plotly_has_the_numbers_of_the_page():
    shown = ram_map(SCORES)
    assert shown.charts == ["Map of 2 layers and 2 heads, coloured by RAM", "RAM of the heads in order of rank"]
    heat = shown.figure()
    np.testing.assert_allclose(np.array(heat.data[0].z, float), SCORES.mean("example"))
    assert heat.layout.xaxis.title.text == "head" and heat.layout.shapes[0].line.color == "#c2410c"
    assert heat.data[0].colorscale[0][1] == "#f3f3ee"
    ranks = shown.figure("RAM of the heads in order of rank")
    assert list(ranks.data[0].y) == pytest.approx([0.85, 0.3, 0.3, 0.15]) and ranks.layout.xaxis.type == "log"


def test_every_chart_of_every_view_is_a_figure(domain):
    for shown in (ablation_curves(load(domain / "ablation.nc")), causal_view(load(domain / "causal.nc"))):
        assert len(shown.charts) == len(set(shown.charts)) == len(Page(shown.html()).charts) > 3
        for i, name in enumerate(shown.charts):
            assert shown.figure(i) == shown.figure(name)
            assert "@" not in shown.figure(i).to_json()


@pytest.mark.parametrize("wrong", [2, -3, "no such chart"])
def test_a_chart_that_is_not_there_is_refused(wrong):
    with pytest.raises(OutputError, match=r"(?s)chart .* of a view.*0: Map of 2 layers"):
        ram_map(SCORES).figure(wrong)
    with pytest.raises(OutputError, match="it has only pictures"):
        view(fabricated_maps(), on=fabricated_sample()).figure()


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(OutputError, match="pip install matplotlib"):
        ram_map(SCORES).axes()


def test_axes_of_matplotlib_have_the_numbers_of_the_page(domain):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = pyplot.subplots(1, 2)[1]
    heat = ram_map(SCORES).axes(ax=axes[0])
    np.testing.assert_allclose(heat.images[0].get_array(), SCORES.mean("example"))
    assert (heat.get_xlabel(), heat.get_ylabel()) == ("head", "layer (0 = first)") and heat is axes[0]
    ranks = ram_map(SCORES).axes(1, ax=axes[1])
    assert ranks.get_xscale() == "log" and [tick.get_text() for tick in ranks.get_xticklabels()] == ["1", "2"]
    np.testing.assert_allclose(ranks.lines[0].get_ydata(), [0.85, 0.3, 0.3, 0.15])
    shown = ablation_curves(load(domain / "ablation.nc"), "accuracy")
    for name in shown.charts:
        drawn = shown.axes(name)
        assert drawn.get_ylabel() == "accuracy" and len(drawn.collections) >= 2, "shades of random sets"
        assert len(drawn.lines) >= 6
    shown = causal_view(load(domain / "causal.nc"))
    bars = shown.axes(1)
    assert [patch.get_height() for patch in bars.patches[:3]] == pytest.approx([0.5, 0.6, 0.7])
    assert [text.get_text() for text in bars.get_legend().get_texts()] == ["together", "sum of single effects"]
    for name in shown.charts:
        shown.axes(name).figure.canvas.draw()
    pyplot.close("all")
