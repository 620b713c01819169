"""The report: its first screen, claims, heads; complete, offline, small, escaped, made from the study folder alone."""

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from fabricated import fabricated_study
from pages import Page, unpacked

from mech.data.pictures import picture, pixel_digest
from mech.errors import OutputError
from mech.experiments.findings.pooled import pooled
from mech.experiments.findings.verdicts import verdicts
from mech.results import load, map_facts, save
from mech.views import ram_map, report, view
from mech.views.drawing import page


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return fabricated_study(tmp_path_factory.mktemp("study"), draws=4, n=30, causal=True)


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
        causal=True,
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
    assert "http:" not in written.text and "https:" not in written.text
    styles = " ".join(written.blocks["style"])
    assert "@import" not in styles
    assert all(address.startswith("data:image/") for address in re.findall(r"url\(([^)]*)\)", styles))


def test_the_page_forbids_requests_itself(text):
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text[:2000]).group(1)
    assert "default-src 'none'" in policy and "http" not in policy and "*" not in policy


def test_plotly_is_there_once_as_npm_has_it(text):
    bundle = page.plotly_source()
    digest = "79542150855a52c567260e3137095dbe2b744e6d702a5cabe67da246942fba7a"
    assert hashlib.sha256(bundle.encode()).hexdigest() == digest, "plotly.js-cartesian-dist-min 4.1.1"
    assert "Licensed under the MIT license" in bundle[:200]
    assert text.count(page.packed(bundle)) == 1


def test_a_report_and_a_view_are_small(text, study):
    assert len(text.encode()) < 3e6
    view = ram_map(load(study / "llava-m" / "video" / "ram.nc")).html()
    assert len(view.encode()) < 1.5e6


def test_every_tag_is_closed_and_every_id_is_its_own(written):
    assert not written.unclosed and not written.open
    assert len(set(written.ids)) == len(written.ids)
    links = {address[1:] for address in written.addresses if not address.startswith("#head=")}
    assert links <= set(written.ids)


def test_all_sections_are_there(written):
    wanted = {
        "first",
        "claims",
        "overview",
        "baseline",
        "model-0",
        "model-1",
        "scales",
        "methods",
        "provenance",
        "head",
    }
    assert wanted <= set(written.ids)
    for words in ("Where they attend", "What removing them costs", "Do the domains agree?", "What this cannot show"):
        assert words in written.text


def test_the_numbers_of_the_summary_appear(study, written):
    summary = json.loads((study / "summary.json").read_text())
    for finding in summary["findings"]:
        assert finding["text"] in written.text
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
        "0.046* (0.012, 0.023)",
        "0.873",
    ):
        assert number in written.text, number
    effect = next(
        e for e in domain["ablation"] if e["band"] == "bottom" and e["method"] == "paper" and e["fraction"] == 0.2
    )
    assert f"{100 * effect['accuracy_drop']['mean']:.1f}" in written.text
    assert "2026-06-01" in written.text and "5.23.0" in written.text and "f3f3f3" in written.text


def test_every_chart_names_its_axes(written):
    # The first; of each of 6 settings a map, the ranks, five methods for each of two measures, four of causal effects;
    # an overview for each method; three depth profiles.
    assert len(written.charts) == 1 + 6 * (2 + 10 + 4) + 5 + 3
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
    assert "<i>directly</i>" not in text, "texts of heads are in JSON"
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


@pytest.mark.parametrize("missing", ["summary.json", "llava-s/grounding/ram.nc", "llava-s/grounding/maps.nc"])
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
    (domain_folder(study) / "map1_0.png").write_bytes(b"no picture")
    with pytest.raises(OutputError, match=r"map1_0\.png cannot be read"):
        report(study)


def looks_of(folder, **changes):
    """A saved "maps" dataset whose first example says something else."""
    found = load(folder / "maps.nc")
    facts = map_facts(found)
    facts[0] |= changes
    return save(found.assign_attrs(facts=json.dumps(facts)), folder / "maps.nc")


def test_pictures_of_a_result_lie_in_its_folder(tmp_path):
    """A result from elsewhere names its pictures; it must not put others of this machine on a page."""
    study = fabricated_study(
        tmp_path / "study", models=(("llava-s", "llava", 4, 4),), domains=("grounding",), methods=("mean",), n=6
    )
    folder, secret = domain_folder(study), tmp_path / "secret.png"
    (folder / "map0_0.png").rename(secret)
    (folder / "link.png").symlink_to(secret)
    (folder / "inner").symlink_to(tmp_path)
    for name in (str(secret), "../../../secret.png", "link.png", "inner/secret.png"):
        looks_of(folder, pictures=[name])
        for draw in (lambda: report(study), lambda: view(load(folder / "maps.nc"), folder=folder)):
            with pytest.raises(OutputError, match="lies outside"):
                draw()
    os.mkfifo(folder / "pipe.png")
    looks_of(folder, pictures=["pipe.png"])
    with pytest.raises(OutputError, match=r"pipe\.png cannot be read"):
        report(study)


def test_a_picture_that_is_another_one_is_refused(tmp_path):
    study = fabricated_study(
        tmp_path, models=(("llava-s", "llava", 4, 4),), domains=("grounding",), methods=("mean",), n=6
    )
    folder = domain_folder(study)
    path = folder / "map0_0.png"
    looks_of(folder, digests=[pixel_digest(picture(path))])
    assert report(study).exists()
    image = picture(path)
    image.putpixel((3, 3), (1, 2, 3))
    image.save(path)
    with pytest.raises(OutputError, match=r"map0_0\.png is missing, damaged or another picture"):
        report(study)


@pytest.mark.parametrize("names", ["../..", "/etc"])
def test_a_summary_cannot_lead_out_of_its_study(tmp_path, names):
    study = fabricated_study(
        tmp_path / "a", models=(("llava-s", "llava", 4, 4),), domains=("grounding",), methods=("mean",), n=6
    )
    other = json.loads((study / "summary.json").read_text())
    other["models"]["llava-s"]["domains"] = {names: other["models"]["llava-s"]["domains"]["grounding"]}
    (study / "summary.json").write_text(json.dumps(other))
    with pytest.raises(OutputError, match="is not there"):
        report(study)


@pytest.mark.parametrize("models", [[1], {"m": 3}, {"m": {"domains": [1]}}, {"llava-s": {"domains": {"grounding": 3}}}])
def test_a_summary_of_other_entries_is_refused(tmp_path, models):
    study = fabricated_study(
        tmp_path, models=(("llava-s", "llava", 4, 4),), domains=("grounding",), methods=("mean",), n=6
    )
    (study / "summary.json").write_text(json.dumps({"models": models}))
    with pytest.raises(OutputError, match=r"summary\.json"):
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


def test_the_first_screen_holds_the_pooled_numbers(study, written):
    summary = json.loads((study / "summary.json").read_text())
    rams = {(m, d): load(study / m / d / "ram.nc") for m, f in summary["models"].items() for d in f["domains"]}
    found = pooled(summary, rams)
    questions = [
        "Do the top heads retrieve?",
        "Does the answer need them?",
        "Are a few dense heads enough, and faster?",
    ]
    assert [answer["question"] for answer in found["answers"]] == questions
    for answer in found["answers"]:
        assert f"{answer['question']} {answer['verdict']} {answer['text']}" in written.text
    lines = {trace["name"]: trace for trace in written.charts[0]["data"] if "name" in trace}
    for band in ("top", "random", "bottom"):
        wanted = [point["accuracy"]["mean"] for point in found["curve"] if point["band"] == band]
        (line,) = [trace for name, trace in lines.items() if name.startswith(band)]
        assert line["y"] == pytest.approx(wanted, rel=1e-4) and len(wanted) == 4
    maps = load(study / "llava-s" / "grounding" / "maps.nc")
    middle = json.loads(maps.attrs["facts"])[maps.sizes["example"] // 2]["question"]
    assert f"“{middle}”" in written.text and "the middle sample of this setting" in written.text


def test_what_limits_the_findings_is_read_first(tmp_path):
    study = fabricated_study(tmp_path, models=(("llava-s", "llava", 4, 4),), domains=("grounding",), n=6)
    summary = json.loads((study / "summary.json").read_text())
    limit = {"kind": "unstable", "text": "The top set is <b>not</b> stable", "model": None, "domain": None}
    summary["headlines"] = [{**limit, "against_papers": False}, *summary["headlines"]]
    (study / "summary.json").write_text(json.dumps(summary))
    text = report(study).read_text()
    assert text.index('id="limits"') < text.index('id="first"') and "Measured here: 2 models; haystacks." in text
    said = Page(text).text
    assert said.index("Read first With 6 test samples") < said.index(limit["text"])


def test_studies_of_earlier_versions_open(tmp_path):
    study = fabricated_study(tmp_path, models=(("llava-s", "llava", 4, 4),), domains=("grounding",), n=6)
    summary = json.loads((study / "summary.json").read_text())
    del summary["scope"]
    for test in summary["models"]["llava-s"]["domains"]["grounding"]["tests"]:
        for name in ("primary", "p_samples", "p_sets"):
            del test[name]
    (study / "summary.json").write_text(json.dumps(summary))
    text = Page(report(study).read_text()).text
    assert "(0.023, over samples only)" in text and "Measured here: the settings of this study." in text


def test_a_summary_that_brings_its_own_answers_is_shown_as_it_is(tmp_path):
    shape = (("llava-s", "llava", 4, 4),)
    study = fabricated_study(tmp_path, models=shape, domains=("grounding",), methods=("mean",), n=6)
    summary = json.loads((study / "summary.json").read_text())
    ram = load(study / "llava-s" / "grounding" / "ram.nc")
    summary["pooled"] = pooled(summary, {("llava-s", "grounding"): ram})
    summary["pooled"]["answers"][0] |= {"verdict": "In <b>no</b> setting", "text": "as said"}
    cell = {"model": "llava-s", "domain": "grounding", "verdict": "differs", "text": "because <i>so</i>"}
    summary["verdicts"] = [{"claim": "All is <b>well</b>", "cells": [cell]}]
    (study / "summary.json").write_text(json.dumps(summary))
    text = report(study).read_text()
    body = Page(text)
    assert "In <b>no</b> setting as said" in body.text and "All is <b>well</b>" in body.text
    assert 'data-tip="llava-s on grounding: differs\nbecause &lt;i&gt;so&lt;/i&gt;"' in text


def test_claims_stand_against_settings(study, text):
    summary = json.loads((study / "summary.json").read_text())
    table = re.search(r'<table class="verdicts">.*?</table>', text, re.DOTALL)[0]
    rows = verdicts(summary)
    assert table.count("<tr>") == 2 + len(rows)
    for row in rows:
        made = (
            f"<br><small>{row['published']}</small>" if row["published"] else ""
        )  # who claims it, and of which models
        line = re.search(rf"<tr><th>{re.escape(row['claim'] + made)}</th>(.*?)</tr>", table, re.DOTALL)[1]
        assert f'data-tip="{row["in_all"]}"' in line
        assert re.findall(r'data-csv="([^"]*)"', line) == [cell["verdict"] for cell in row["cells"]]
    assert 'colspan="3" data-tip="llava-s: ' in table, "what is said of a model spans its domains"


def test_every_head_has_a_page(study, written):
    facts = written.values[0]
    summary = json.loads((study / "summary.json").read_text())
    ranking = summary["models"]["llava-s"]["domains"]["grounding"]["ranking"]
    assert facts["name"] == "llava-s on grounding" and facts["order"] == [head[:2] for head in ranking]
    columns = {label: values for label, _, values, *_ in facts["columns"]}
    assert columns["RAM"] == pytest.approx([score for *_, score in ranking], rel=1e-4)
    causal = load(study / "llava-s" / "grounding" / "causal.nc")
    lost = [float(causal["lost"][layer, head]) for layer, head, _ in ranking]
    (named,) = [label for label in columns if label.startswith("lost")]
    assert columns[named] == pytest.approx(lost, rel=1e-4)
    last = "L{}H{}".format(*ranking[-1][:2])
    assert facts["said"] == {last: ["It acts <i>directly</i> on the logits."]}
    assert len(written.values) == 6
    for key in range(6):
        assert f"heads-{key}" in written.ids and f"maps-{key}" in written.ids


def test_top_heads_show_attention_and_effect(written):
    first = written.values[0]["order"][0]
    address = "#head=0/{}/{}".format(*first)
    assert address in written.addresses
    assert (
        "lost without it" in written.text
        and "50% [48%, 52%]" in written.text
        and "attending and causal" in written.text
    )


def test_every_table_can_be_saved(text):
    plain = unpacked(text)
    assert plain.count("<table") == plain.count('class="tabular"') + 1, "all but the one in the prose"
    assert plain.count('class="csv"') == plain.count('class="tabular"')


def test_details_are_folded_and_figures_are_explained(text):
    assert not re.search(r"<details[^>]* open", text)
    shown = re.sub(r"<details.*?</details>", "", text, flags=re.DOTALL)
    assert shown.count('class="plot"') < text.count('class="plot"')
    assert text.count('class="see"') >= 10
    parts = re.sub(r"<(script|template).*?</\1>", "", text, flags=re.DOTALL)
    assert len(re.findall(r"<[a-z]", parts)) < 7000, "marks wait in templates"


def test_layers_without_heads_keep_their_numbers():
    import xarray as xr

    scores = xr.DataArray(np.array([[[0.1, 0.2], [0.5, 0.3]]]), {"layer": [3, 8]}, ("example", "layer", "head"))
    heat = Page(ram_map(scores).html()).charts[0]
    assert heat["data"][0]["text"][1][0].startswith("<b>L8H0</b>")
    assert heat["layout"]["yaxis"]["ticktext"] == ["3", "8"]
