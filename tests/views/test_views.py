"""Single views: complete, offline, and with the numbers of the results they show."""

import html
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from fabricated import fabricated_study
from pages import Page

from mech.errors import OutputError
from mech.results import load
from mech.views import View, ablation_curves, maps_view, ram_map, view
from mech.views.curves import effects
from mech.views.drawing.intervals import mean_interval
from mech.views.drawing.page import chart, page


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return fabricated_study(tmp_path_factory.mktemp("study"), draws=4, n=30)


def domain_folder(study: Path) -> Path:
    return study / "llava-s" / "grounding"


def test_an_unwritable_place_is_named_and_left_clean(study, tmp_path):
    (tmp_path / "view.html").mkdir()
    with pytest.raises(OutputError, match=r"view\.html cannot be written"):
        View("title", "<p>body</p>").save(tmp_path / "view.html")
    assert [path.name for path in tmp_path.iterdir()] == ["view.html"]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        View("title", "<p>body</p>").save(tmp_path / "file" / "view.html")
    with pytest.raises(OutputError, match=r"ends in \.html"):
        View("title", "<p>body</p>").save(tmp_path / "view.gif")


@pytest.mark.parametrize("kind", ["ram", "ablation", "maps"])
def test_every_saved_result_shows_itself(study, tmp_path, kind):
    folder = domain_folder(study)
    picture = view(load(folder / f"{kind}.nc"), folder=folder)
    saved = Page(picture.save(tmp_path / f"{kind}.html").read_text())
    assert not saved.unclosed and not saved.open and not saved.addresses
    frame = picture._repr_html_()
    inner = Page(html.unescape(re.search(r'srcdoc="([^"]*)"', frame).group(1)))
    assert inner.text == saved.text and not inner.unclosed
    assert bool(saved.charts) == (kind != "maps")
    assert len(frame) < 3e6, "a notebook holds many of them"


def test_the_map_shows_value_interval_and_rank():
    scores = np.zeros((20, 2, 3))
    scores[:, 1, 2] = np.linspace(0.4, 0.6, 20)
    scores[:, 0, 1] = 0.2
    body = Page(ram_map(xr.DataArray(scores, dims=("example", "layer", "head"))).html())
    heat = body.charts[0]["data"][0]
    assert heat["zmin"] == 0 and heat["z"][1][2] == pytest.approx(0.5)
    assert re.fullmatch(r"<b>L1H2</b><br>RAM 0\.500 \[0\.4\d\d, 0\.5\d\d\]<br>rank 1 of 6", heat["text"][1][2])
    assert heat["text"][0][1].endswith("rank 2 of 6")
    (outline,) = body.charts[0]["layout"]["shapes"]
    assert (outline["x0"], outline["x1"], outline["y0"], outline["y1"]) == (1.5, 2.5, 0.5, 1.5)
    assert body.charts[1]["data"][0]["y"] == pytest.approx([0.5, 0.2, 0, 0, 0, 0])


def test_a_ranking_is_shown_by_its_scores():
    class Ranking:
        score, per_example = "vision <mass>", None

        def scores(self):
            return xr.DataArray([[0.1, 0.9]], dims=("layer", "head"))

    ranking = Ranking()
    heat = Page(ram_map(ranking).html()).charts[0]["data"][0]
    assert heat["z"] == [[0.1, 0.9]] and "[" not in heat["text"][0][1]
    assert heat["colorbar"]["title"]["text"] == "vision &lt;mass&gt;"
    ranking.per_example = np.array([[[0.0, 0.8]], [[0.2, 1.0]]])
    heat = Page(ram_map(ranking).html()).charts[0]["data"][0]
    assert heat["z"] == [pytest.approx([0.1, 0.9])] and "[0.800, 1.000]" in heat["text"][0][1]


@pytest.mark.parametrize("wrong", [xr.Dataset({"other": ("x", [1.0])}), xr.DataArray([1.0], dims=["x"]), "text"])
def test_what_cannot_be_shown_is_refused(wrong):
    with pytest.raises(OutputError, match="Expected"):
        view(wrong)


def test_effects_are_means_with_intervals_and_draws_are_ranges(study):
    result = load(domain_folder(study) / "ablation.nc")
    found = effects(result, "accuracy")
    values = result["accuracy"].values.mean(1)
    assert found[0].method == "none" and found[0].mean == pytest.approx(values[0])
    (random,) = [e for e in found if (e.method, e.band, e.fraction) == ("mean", "random", 0.2)]
    rows = (result["method"] == "mean") & (result["band"] == "random") & (result["fraction"] == 0.2)
    assert random.draws == 4
    assert (random.low, random.mean, random.high) == (
        pytest.approx(values[rows].min()),
        pytest.approx(np.median(values[rows])),
        pytest.approx(values[rows].max()),
    )
    (top,) = [e for e in found if (e.method, e.band, e.fraction) == ("zero", "top", 0.05)]
    assert top.draws == 1 and top.low < top.mean < top.high


def test_a_measure_that_is_not_there_is_refused(study):
    result = load(domain_folder(study) / "ablation.nc")
    with pytest.raises(OutputError, match="measure 'speed'"):
        ablation_curves(result, "speed")
    with pytest.raises(OutputError, match="without"):
        ablation_curves(result.drop_vars("band"))


def test_the_interval_is_that_of_a_bootstrap():
    values = np.random.default_rng(1).normal(3, 2, (400, 2))
    mean, low, high = mean_interval(values)
    error = 1.96 * values.std(axis=0) / np.sqrt(400)
    np.testing.assert_allclose(high - mean, error, rtol=0.15)
    np.testing.assert_allclose(mean - low, error, rtol=0.15)
    assert np.isnan(mean_interval(values[:1])[1]).all()


def test_looks_draw_attention_where_it_is(study):
    folder = domain_folder(study)
    result = load(folder / "maps.nc").isel(example=[0], shown=[0, 4]).copy(deep=True)
    result.attrs["facts"] = json.dumps(json.loads(result.attrs["facts"])[:1])
    result["attention"][:] = 0
    result["attention"][0, 0, 26] = 0.36  # row 3, column 2 of 8: in the evidence
    result["attention"][0, 0, 63] = 0.09
    text = maps_view(result, folder).body
    mark = r'<rect x="(\d+)" y="(\d+)" width="14" height="14" fill="(#\w+)"[^>]*data-tip="attention ([\d.]+)'
    marks = re.findall(mark, text)
    assert [mark[:2] + mark[3:] for mark in marks] == [("28", "42", "0.36"), ("98", "98", "0.09")]
    assert marks[0][2] == "#fcfdbf", "the highest attention has the end of the scale"
    assert "evidence 0.36 · visual 0.45" in text and "evidence 0.00 · visual 0.00" in text
    assert text.count('class="evidence"') == 3, "the original and each of the two heads"
    assert text.count("data:image/webp") == 1, "a picture is in the page once"


def test_frames_without_a_token_count_with_the_frame_before(study):
    folder = study / "llava-s" / "video"
    result = load(folder / "maps.nc").isel(example=[0], shown=[0]).copy(deep=True)
    facts = json.loads(result.attrs["facts"])[:1]
    facts[0]["evidence"] = [[1, 0, 0, 112, 112]]
    result.attrs["facts"] = json.dumps(facts)
    result["token_image"][:] = result["token_image"].values // 2 * 2  # two frames to a token: only even frames have any
    result["attention"][:] = 0
    result["attention"][0, 0, :64] = 0.5 / 64  # frame 0, which stands for frame 1 too
    text = maps_view(result, folder).body
    assert "evidence 0.50 · visual 0.50" in text
    assert text.count('class="stage dim"') == 3 and text.count('class="stage"') == 6


def test_nan_leaves_a_gap_and_markup_cannot_leave_json():
    text = page("x", chart([{"y": np.array([1.0, np.nan]), "text": "</script><b>"}], {}, height=10, label="x"))
    body = Page(text)
    assert body.charts[0]["data"][0] == {"y": [1.0, None], "text": "</script><b>"}
    assert not body.unclosed


def test_no_model_code_is_imported():
    heavy = ("torch", "transformers", "plotly")
    code = f"import sys, mech.views; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
