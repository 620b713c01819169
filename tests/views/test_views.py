"""The report and the single views: complete, offline, escaped, and made from the study folder alone."""

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
from mech.views import View, ablation_curves, looks, ram_map, report, view
from mech.views.curves import effects
from mech.views.drawing.intervals import mean_interval
from mech.views.drawing.page import chart, page


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return fabricated_study(tmp_path_factory.mktemp("study"), draws=4, n=30)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One model, one domain, one method, and a question that tries to break out of the page."""
    return fabricated_study(
        tmp_path_factory.mktemp("small"),
        models=(("<b>evil</b>", "llava", 4, 4),),
        domains=("grounding",),
        methods=("zero",),
        question='</script><script>alert("{colour}")</script><img src=http://evil.example/x>',
        draws=3,
        n=10,
    )


@pytest.fixture(scope="module")
def text(study):
    return report(study).read_text()


@pytest.fixture(scope="module")
def written(text):
    return Page(text)


def domain_folder(study: Path) -> Path:
    return study / "llava-s" / "grounding"


def test_the_page_asks_for_nothing_from_outside(written):
    assert written.addresses, "the contents link to the sections"
    assert all(address.startswith("#") for address in written.addresses)
    styles = " ".join(written.blocks["style"])
    assert "@import" not in styles
    assert all(address.startswith("data:image/") for address in re.findall(r"url\(([^)]*)\)", styles))


def test_the_page_forbids_requests_itself(text):
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text[:2000]).group(1)
    assert "default-src 'none'" in policy and "http" not in policy and "*" not in policy


def test_plotly_is_there_once_and_whole(text):
    from plotly.offline import get_plotlyjs

    assert text.count(get_plotlyjs()) == 1
    assert len(text) < 12e6


def test_every_tag_is_closed_and_every_id_is_its_own(written):
    assert not written.unclosed and not written.open
    assert len(set(written.ids)) == len(written.ids)
    links = {address[1:] for address in written.addresses}
    assert links <= set(written.ids)


def test_all_sections_are_there(written):
    assert {"findings", "overview", "baseline", "model-0", "model-1", "scales", "methods", "provenance"} <= set(
        written.ids
    )
    for words in ("Where they look", "What removing them does", "Do the domains agree?", "What this cannot show"):
        assert words in written.text


def test_the_numbers_of_the_summary_appear(study, written):
    summary = json.loads((study / "summary.json").read_text())
    # Headlines, and what is said of each model; what is said of no model is a headline or is not shown twice.
    for finding in summary["headlines"] + [f for f in summary["findings"] if f["model"]]:
        assert finding["text"] in written.text
    assert written.text.count("against the papers") == 2
    domain = summary["models"]["llava-m"]["domains"]["video"]
    layer, head, score = domain["ranking"][0]
    for number in (
        "98.3%",
        "7.31",
        "[6.90, 7.70]",
        "6.2%",
        f"L{layer}H{head}",
        f"({score:.2f})",
        "0.046",
        "(0.012)",
        "0.873",
    ):
        assert number in written.text, number
    effect = next(
        e for e in domain["ablation"] if e["band"] == "bottom" and e["method"] == "paper" and e["fraction"] == 0.2
    )
    assert f"{100 * effect['accuracy_drop']['mean']:.1f}" in written.text
    assert "2026-06-01" in written.text and "5.23.0" in written.text and "f3f3f3" in written.text


def test_every_chart_names_its_axes(written):
    # Of each of 6 places: a map, the ranks, five methods for each of two measures; overviews; three depth profiles.
    assert len(written.charts) == 6 * (2 + 10) + 5 + 3
    for figure in written.charts:
        assert figure["layout"]["xaxis"]["title"]["text"]
        heat = figure["data"][0]["type"] == "heatmap"
        overview = "ticktext" in figure["layout"]["yaxis"]
        assert overview or figure["layout"]["yaxis"]["title"]["text"]
        assert not heat or figure["data"][0]["colorbar"]["title"]["text"] == "RAM (attention mass)"


def test_colours_of_charts_are_variables_of_the_page(written):
    names = set(re.findall(r'"@([a-z-]+)"', json.dumps(written.charts)))
    sheet = " ".join(written.blocks["style"])
    assert {"top", "random-soft", "sequential"} <= names
    for name in names:
        assert len(re.findall(rf"--{name}:", sheet)) >= 2, f"--{name} in light and in dark"


def test_text_of_users_cannot_become_markup(small):
    text = report(small).read_text()
    body = Page(text)
    assert '</script><script>alert("red")</script>' in body.text
    assert not any("alert(" in script for script in body.blocks["script"])
    assert not any("evil.example" in address for address in body.addresses)
    assert "<b>evil</b>" not in text and "&lt;b&gt;evil&lt;/b&gt;" in text
    # Labels of charts are read as markup by plotly: they have to be escaped inside the JSON too.
    labels = json.dumps([figure["layout"] for figure in body.charts])
    assert "<b>evil" not in labels and "&lt;b&gt;evil" in labels


def test_one_model_and_one_domain_need_no_comparison(small):
    body = Page(report(small).read_text())
    assert "scales" not in body.ids and "Do the domains agree?" not in body.text
    assert "<b>evil</b>" in body.text


def test_a_prefixed_model_name_finds_its_folder(tmp_path):
    study = fabricated_study(
        tmp_path, models=(("llava-m", "llava", 4, 4),), domains=("grounding",), methods=("mean",), n=6
    )
    summary = json.loads((study / "summary.json").read_text())
    summary["models"] = {"reference:llava-m": summary["models"]["llava-m"]}
    (study / "summary.json").write_text(json.dumps(summary))
    assert "reference:llava-m" in Page(report(study).read_text()).text


@pytest.mark.parametrize("missing", ["summary.json", "llava-s/grounding/ram.nc", "llava-s/grounding/looks.nc"])
def test_a_missing_piece_is_named(tmp_path, missing):
    study = fabricated_study(
        tmp_path, models=(("llava-s", "llava", 4, 4),), domains=("grounding",), methods=("mean",), n=6
    )
    (study / missing).unlink()
    with pytest.raises(OutputError, match=f"(?s){re.escape(str(study / missing))} is not there.*mech study"):
        report(study)


def test_a_missing_picture_is_named(tmp_path):
    study = fabricated_study(
        tmp_path, models=(("llava-s", "llava", 4, 4),), domains=("grounding",), methods=("mean",), n=6
    )
    (domain_folder(study) / "look1_0.png").write_bytes(b"no picture")
    with pytest.raises(OutputError, match=r"look1_0\.png cannot be read"):
        report(study)


@pytest.mark.parametrize("text", ["", "[1]", '{"models": {}}', '{"models": {"llava-s": {"domains": {}}}}'])
def test_a_broken_summary_is_refused(tmp_path, text):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(OutputError, match=r"summary\.json"):
        report(tmp_path)


def test_a_summary_without_a_field_is_refused(tmp_path):
    study = fabricated_study(
        tmp_path, models=(("llava-s", "llava", 4, 4),), domains=("grounding",), methods=("mean",), n=6
    )
    summary = json.loads((study / "summary.json").read_text())
    del summary["models"]["llava-s"]["domains"]["grounding"]["baseline"]
    (study / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(OutputError, match="lacks something: 'baseline'"):
        report(study)


def test_what_could_not_be_computed_is_a_dash(tmp_path):
    shape = (("llava-s", "llava", 4, 4),)
    study = fabricated_study(tmp_path, models=shape, domains=("grounding", "pages"), methods=("mean",), n=1)
    summary = json.loads((study / "summary.json").read_text())
    facts = summary["models"]["llava-s"]
    nothing = {"mean": 0.625, "low": None, "high": None}
    for domain in facts["domains"].values():
        domain["baseline"] = {"accuracy": nothing, "logit_diff": nothing}
        domain["tests"][0] |= {"p_value": None, "p_adjusted": None}
    facts["agreement"]["spearman"][0][1] = facts["agreement"]["jaccard_null"][0][1] = None
    (study / "summary.json").write_text(json.dumps(summary))
    text = Page(report(study).read_text()).text
    assert "62.5%" in text and "–" in text
    assert not re.search(r"\b(None|nan|null)\b", text)


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


@pytest.mark.parametrize("kind", ["ram", "ablation", "looks"])
def test_every_saved_result_shows_itself(study, tmp_path, kind):
    folder = domain_folder(study)
    picture = view(load(folder / f"{kind}.nc"), folder=folder)
    saved = Page(picture.save(tmp_path / f"{kind}.html").read_text())
    assert not saved.unclosed and not saved.open and not saved.addresses
    frame = picture._repr_html_()
    inner = Page(html.unescape(re.search(r'srcdoc="([^"]*)"', frame).group(1)))
    assert inner.text == saved.text and not inner.unclosed
    assert bool(saved.charts) == (kind != "looks")
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
    result = load(folder / "looks.nc").isel(look=[0], shown=[0, 4]).copy(deep=True)
    result.attrs["looks"] = json.dumps(json.loads(result.attrs["looks"])[:1])
    result["attention"][:] = 0
    result["attention"][0, 0, 26] = 0.36  # row 3, column 2 of 8: in the evidence
    result["attention"][0, 0, 63] = 0.09
    text = looks(result, folder).body
    mark = r'<rect x="(\d+)" y="(\d+)" width="14" height="14" fill="(#\w+)"[^>]*data-tip="attention ([\d.]+)'
    marks = re.findall(mark, text)
    assert [mark[:2] + mark[3:] for mark in marks] == [("28", "42", "0.360"), ("98", "98", "0.090")]
    assert marks[0][2] == "#fcfdbf", "the highest attention has the end of the scale"
    assert "evidence 0.36 · visual 0.45" in text and "evidence 0.00 · visual 0.00" in text
    assert text.count('class="evidence"') == 3, "the original and each of the two heads"
    assert text.count("data:image/png") == 1, "a picture is in the page once"


def test_frames_without_a_token_count_with_the_frame_before(study):
    folder = study / "llava-s" / "video"
    result = load(folder / "looks.nc").isel(look=[0], shown=[0]).copy(deep=True)
    facts = json.loads(result.attrs["looks"])[:1]
    facts[0]["evidence"] = [[1, 0, 0, 112, 112]]
    result.attrs["looks"] = json.dumps(facts)
    result["token_image"][:] = result["token_image"].values // 2 * 2  # two frames to a token: only even frames have any
    result["attention"][:] = 0
    result["attention"][0, 0, :64] = 0.5 / 64  # frame 0, which stands for frame 1 too
    text = looks(result, folder).body
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
