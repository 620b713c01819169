"""Every kind of result finds its picture: in the right place, with the right numbers, closed, escaped, and alone."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from fabricated import (
    fabricated_attention,
    fabricated_circuit,
    fabricated_grid,
    fabricated_maps,
    fabricated_sample,
    fabricated_study,
)
from pages import Page, unpacked

from mech.data.samples import Samples, outlines
from mech.errors import ExperimentError, OutputError
from mech.experiments.attention.maps import attention_maps
from mech.experiments.attention.tokens import token_attention, token_groups
from mech.experiments.ranking.ranking import rank_heads
from mech.inputs import TokenLayout
from mech.model import HookedMLLM
from mech.model.cache import ActivationCache
from mech.results import save, write_json
from mech.views import View, view


def lens(signed: bool = False) -> xr.Dataset:
    """Words at a 2 x 2 grid and one position of text, in two layers."""
    measure = "logit" if signed else "probability"
    words = np.full((1, 2, 5, 2), "five", dtype="<U9")
    words[0, 1, 3, 0] = "<b>red"
    values = np.full((1, 2, 5, 2), 0.1)
    values[0, 1, 3, 0] = -2.0 if signed else 0.9
    dims = ("example", "sender" if signed else "layer", "position", "place")
    grid = {"image": [0, 0, 0, 0, -1], "frame": [-1] * 5, "row": [0, 0, 1, 1, -1], "col": [0, 1, 0, 1, -1]}
    coords = {"example": ["one"], "position": [1, 2, 3, 4, 9], **{n: ("position", v) for n, v in grid.items()}}
    coords[dims[1]] = ["L0H1", "L1H0"] if signed else [0, 4]
    return xr.Dataset({"word": (dims, words), measure: (dims, values)}, coords, {"model": "toy"})


def edges() -> xr.Dataset:
    """Edge attribution between two layers of two heads without shared keys."""
    senders, receivers = ["embed", "L0H0", "L0H1"], ["L1H0.q", "L1H1.q", "L1K0.v", "L1K1.v", "logits"]
    effect = np.zeros((2, 3, 5))
    effect[:, 1, 3], effect[:, 2, 4], effect[:, 0, 0] = 0.5, -0.25, np.nan
    dims = {"example": [0, 1], "sender": senders, "receiver": receivers}
    return xr.Dataset({"effect": (tuple(dims), effect)}, dims, {"direction": "denoise", "ig_steps": 5})


def sample_curve() -> xr.Dataset:
    """Agreement that grows with the number of samples."""
    values = np.linspace(0.2, 0.9, 3)[:, None] + np.linspace(-0.1, 0.1, 5)
    names = ("spearman", "jaccard")
    return xr.Dataset({n: (("size", "split"), values) for n in names}, {"size": [2, 8, 32]}, {"jaccard_null": 0.03})


KINDS = {
    "sample curve": lambda: view(sample_curve()),
    "estimates": lambda: view(fabricated_grid().assign_attrs(rank_correlation=0.83)),
    "circuit": lambda: view(fabricated_circuit(), on=fabricated_sample(), maps=fabricated_maps()),
    "edges": lambda: view(edges()),
    "grid": lambda: view(fabricated_grid()),
    "grid on a picture": lambda: view(fabricated_grid("noise"), on=fabricated_sample().images[0]),
    "maps": lambda: view(fabricated_maps(), on=fabricated_sample()),
    "lens": lambda: view(lens(), on=fabricated_sample()),
    "lens without a picture": lambda: view(lens(signed=True)),
    "attention": lambda: view(fabricated_attention()),
    "sample": lambda: view(fabricated_sample()),
    "samples": lambda: view(Samples([fabricated_sample()] * 3)),
    "scores": lambda: view(xr.Dataset({n: (("layer", "head"), [[-0.1, 0.4]]) for n in ("ram", "<i>vera")})),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_picture_is_whole_and_asks_for_nothing(kind):
    body = Page(KINDS[kind]().html())
    assert not body.unclosed and not body.open
    assert not [address for address in body.addresses if not address.startswith("data:image/")]
    assert len(set(body.ids)) == len(body.ids)
    for markup in ("toy <b>", "<digit>", "<b>red", "<i>vera"):
        assert markup not in KINDS[kind]().body, "text of users is escaped"
    for figure in body.charts:
        assert figure["layout"]["xaxis"]["title"]["text"]
        assert all(trace["colorbar"]["title"]["text"] for trace in figure["data"] if trace["type"] == "heatmap")


EVIL = "<img src=x onerror=alert(1)>&<a href='https://elsewhere'>"


def of_sets(**measures) -> xr.Dataset:
    """What several sets of heads do, on three examples."""
    bands = ("set", ["top", EVIL])
    found = {name: (dims, np.full([{"set": 2, "k": 1, "factor": 2, "example": 3}[d] for d in dims], 0.5))
             for name, dims in measures.items()}  # fmt: skip
    return xr.Dataset(found, {"band": bands}, {"n_heads": EVIL, "over": EVIL})


def poisoned(result):
    """A result in which every text is markup: names of dimensions that are free, coordinates, attributes."""
    words = {name: value.astype(str).str.cat(EVIL) for name, value in result.coords.items()
             if value.dtype.kind in "US" and name not in ("sender", "receiver")}  # fmt: skip
    kept = ("direction", "maps", "over")
    attrs = {
        name: value if name in kept or not isinstance(value, str) else EVIL for name, value in result.attrs.items()
    }
    return result.assign_coords({name: (value.dims, value.values) for name, value in words.items()}).assign_attrs(attrs)


STRANGERS = {
    "steering": lambda: of_sets(accuracy=("set", "factor", "example"), logit_diff=("set", "factor", "example"))
    .assign_coords(factor=[0.0, 1.0]),
    "retrieval": lambda: of_sets(
        reciprocal_rank=("set", "example"), hit=("set", "k", "example"), chance_rr=("example",),
        chance_hit=("k", "example"), n_candidates=("example",),
    ).assign_coords(k=[EVIL]),
    "grid": lambda: poisoned(fabricated_grid().rename(region=EVIL)),
    "grid of units": lambda: poisoned(fabricated_grid().rename(layer=EVIL).assign_attrs(unit="x", model="m")),
    "edges": lambda: poisoned(edges().assign_attrs(model="m")),
    "lens": lambda: poisoned(lens(signed=True)),
    "attention": lambda: poisoned(fabricated_attention()),
    "scores": lambda: xr.Dataset({EVIL: xr.DataArray([[-0.1, 0.4]], dims=("layer", "head"), attrs={"unit": EVIL})}),
}  # fmt: skip


@pytest.mark.parametrize("kind", STRANGERS)
def test_texts_of_a_strangers_file_are_no_markup(kind):
    page = Page(view(STRANGERS[kind]()).html())
    assert not page.unclosed and not [address for address in page.addresses if "elsewhere" in address or address == "x"]

    def texts(value):
        if isinstance(value, dict):
            value = list(value.values())
        return [text for one in value for text in texts(one)] if isinstance(value, list) else [value]

    # Plotly reads tags in labels: bold, line breaks and links.
    assert not [text for text in texts(page.charts) if isinstance(text, str) and ("<img" in text or "<a " in text)]


def test_a_page_may_hold_two_circuits():
    body = Page(View("both", view(fabricated_circuit()).body + view(fabricated_circuit()).body).html())
    assert len(set(body.ids)) == len(body.ids)


def test_colours_of_effects_are_centred_on_no_effect():
    before = fabricated_grid("noise")  # saved when noising counted what was left
    del before.attrs["zero"]
    for grid in (fabricated_grid("denoise"), fabricated_grid("noise"), before.assign(effect=1 - before["effect"])):
        (heat,) = Page(view(grid).html()).charts[0]["data"]
        assert heat["zmin"] + heat["zmax"] == pytest.approx(0) and heat["colorscale"] == "@diverging"
        assert np.isclose(heat["z"][0][5], 0.9, atol=0.03)
        assert heat["text"][0][5].startswith("<b>layer 0, region 1,1</b><br>effect ")
    (heat,) = Page(view(xr.DataArray([[-0.5, 0.2]], dims=("layer", "head"))).html()).charts[0]["data"]
    assert (heat["zmin"], heat["zmax"], heat["colorscale"]) == (-0.5, 0.5, "@diverging")


def test_an_estimate_says_how_far_to_trust_it():
    text = KINDS["estimates"]().body
    assert "estimated" in text and "on a sample of cells: 0.83" in text


def test_a_sample_curve_shows_the_splits():
    _, band, line, *_ = Page(KINDS["sample curve"]().html()).charts[0]["data"]
    assert line["y"] == pytest.approx([0.2, 0.55, 0.9]) and line["x"] == [2, 8, 32]
    assert band["y"][0] == pytest.approx(0.295) and band["fillcolor"] == "@bottom-soft"


def test_boxes_and_positions_lie_where_their_pixels_are():
    box = "[Box(x0=28, y0=42, x1=56, y1=70, image=0, frame=None)]"
    effect = xr.DataArray([[[0.5]], [[0.0]]], dims=("region", "layer", "example"))
    result = xr.Dataset({"effect": effect}, {"region": [box, "last"], "layer": [3]}, {"direction": "denoise"})
    text = view(result, on=fabricated_sample()).body
    assert re.findall(r'<rect x="28" y="42" width="28" height="28" fill="var\(--plus\)" fill-opacity="0.82"', text)
    rect = np.full((4, 4), np.nan)
    rect[2] = (0, 56, 56, 112)
    layout = TokenLayout(
        **{name: np.array([0, 0, 1, 0]) for name in ("kind",)},
        **{name: np.array([-1, -1, 0, -1]) for name in ("image", "frame", "row", "col", "view")},
        rect=rect, tokens=("a", "b", "", "c"), spans={}, images=((112, 112),),
    )  # fmt: skip
    result = xr.Dataset({"effect": (("example", "position"), [[0.0, 0.1, -0.2, 0.1]])}, {"position": [0, 1, 2, 3]})
    drawn = Page(view(result, on=fabricated_sample(), layout=layout).html())
    assert drawn.charts[0]["data"][0]["x"] == ["0 a", "1 b", "3 c"]
    assert '<rect x="0" y="56" width="56" height="56" fill="var(--minus)"' in view(
        result, on=fabricated_sample(), layout=layout
    ).body.replace("&quot;", '"')


def test_edges_of_unshared_keys_belong_to_their_heads():
    text = view(edges()).body
    tips = re.findall(r'data-tip="([^"]*)"', text)
    assert [tip.split("\n")[0] for tip in tips] == ["L0H1 to logits", "L0H0 to L1H1"], "the strongest lies on top"
    assert "feeds its values" in tips[1] and "-0.25" in tips[0]
    assert "the 2 strongest paths" in text and 'stroke="var(--minus)"' in text


def test_effects_of_paths_begin_at_zero_also_where_a_saved_result_counted_what_was_left():
    effect = xr.DataArray(np.full((3, 1, 1), 0.3), dims=("example", "sender", "receiver"))
    coords = {"sender": ["L0H0"], "receiver": ["logits"]}
    zero = {"zero": "no effect"}
    for direction, said, shown in (("denoise", {}, 0.3), ("noise", zero, 0.3), ("noise", {}, 0.7)):
        attrs = {"freeze": [], "direction": direction, **said}
        assert f"effect {shown:+.2f}" in view(xr.Dataset({"effect": effect}, coords, attrs)).body


def test_words_stand_in_their_cells():
    text = view(lens(), on=fabricated_sample()).body
    assert 'x="56" y="56" width="56" height="56"' in text and "row 1, column 1 (position 4)" in text
    assert ">&lt;b&gt;red<" in text and "probability: 0" in text
    assert "<th>9</th>" in text, "what lies in no picture stands in a table"
    with pytest.raises(OutputError, match="example=1"):
        view(lens(), example=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: view(fabricated_maps()), "without its pictures"),
        (lambda: view(fabricated_maps(), on=[fabricated_sample()] * 2), r"2 samples for 1 examples"),
        (lambda: view(fabricated_grid(), on="nowhere.png"), "nowhere.png cannot be read"),
        (lambda: view(fabricated_grid().sel(region=["last"]), on=fabricated_sample()), "no region inside it"),
        (lambda: view(fabricated_grid(), colour="red"), "colour= with patching_grid"),
        (lambda: view(fabricated_circuit(), maps=fabricated_maps()), "maps without a picture"),
        (lambda: view(edges() * 0), "without edges"),
        (lambda: view(lens().isel(layer=[0] * 16000), on=fabricated_sample()), r"64,000 cells to draw"),
        (lambda: view(fabricated_attention().isel(query=[0, 1])), "attention over"),
        (lambda: view(fabricated_grid().expand_dims(head=2)), "a sweep over"),
    ],
)
def test_what_does_not_fit_is_said(call, message):
    with pytest.raises(OutputError, match=message):
        call()


@pytest.fixture(scope="module")
def model():
    return HookedMLLM.from_pretrained("reference:llava-s")


@pytest.fixture(scope="module")
def samples():
    from mech.data.haystacks import haystacks

    return haystacks("grounding", 3, seed=4)


def test_values_show_themselves(model, samples):
    inputs = model.inputs_of(samples[0])
    ranking = rank_heads(xr.DataArray([[0.1, 0.2]], dims=("layer", "head")))
    for value, word in (
        (samples, samples[0].question),
        (samples[0], "counterfactual"),
        (inputs, "pixel_values"),
        (inputs.layout, "question"),
        (ranking, "rank of the head"),
        (fabricated_circuit(), "L0H2"),
    ):
        assert "srcdoc" in value._repr_html_() and word in view(value).body
    assert len(outlines(samples[0])) == len(samples[0].evidence)
    grid = unpacked(view(inputs.layout, on=samples[0]).body)
    assert grid.count('class="cell"') == len(inputs.layout.positions("image"))


def test_groups_of_tokens_add_up_to_the_whole_pattern(model, samples):
    inputs = model.inputs_of(samples[0])
    found = token_attention(model, inputs, layers=[1, 3], groups=20)
    groups = token_groups(inputs.layout, 20)
    assert list(found["key"].values) == list(groups) and found.sizes["key"] <= 20
    positions = sorted(position for group in groups.values() for position in group)
    assert positions == list(range(len(inputs.layout))), "every position once"
    _, cache = model.run_with_cache(inputs, names_filter=["blocks.1.attn.hook_pattern", "blocks.3.attn.hook_pattern"])
    for layer in (1, 3):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0]
        member = torch.zeros(len(groups), pattern.shape[-1])
        for row, positions in enumerate(groups.values()):
            member[row, positions] = 1
        expected = torch.einsum("qr,hrs,ks->hqk", member / member.sum(1, keepdim=True), pattern, member)
        np.testing.assert_allclose(found.sel(layer=layer), expected, atol=1e-5)
    np.testing.assert_allclose(found.sum("key"), 1, atol=1e-5)
    assert max(len(token_groups(inputs.layout)), 1) <= 64
    with pytest.raises(ExperimentError, match=r"pieces of text in 3 groups"):
        token_attention(model, inputs, groups=3)
    with pytest.raises(ExperimentError, match=r"layers \[99\]"):
        token_attention(model, inputs, layers=[99])


def test_looks_are_where_ram_is(model, samples):
    from mech.experiments.scores.ram import retrieval_attention_mass

    ram = retrieval_attention_mass(model, samples)
    ranking = rank_heads(ram)
    found = attention_maps(model, samples, ranking, k=2)
    assert found.sizes["shown"] == 4 and found["shown_band"].values.tolist() == ["top", "top", "bottom", "bottom"]
    for i, sample in enumerate(samples):
        layout = model.inputs_of(sample).layout
        on = np.isin(layout.positions("image"), layout.positions(sample.evidence))
        for k in range(4):
            layer, head = (int(found[f"shown_{name}"][k]) for name in ("layer", "head"))
            seen = found["attention"].values[i, k][: len(on)]
            np.testing.assert_allclose(seen[on].sum(), ram["ram"].values[i, layer, head], atol=1e-5)
    assert view(found, on=samples).body.count("<article") == 3
    with pytest.raises(ExperimentError, match="no head L9H9"):
        attention_maps(model, samples, ranking, bands={"mine": [(9, 9)]})
    with pytest.raises(OutputError, match="2 samples for 3 examples"):
        view(found, on=samples[:2])


def test_saved_results_are_drawn_without_a_model(mech, tmp_path):
    save(fabricated_grid(), tmp_path / "grid.nc")
    fabricated_sample().images[0].save(tmp_path / "picture.png")
    write_json(fabricated_circuit().to_json(), tmp_path / "circuit.json")
    ranking = rank_heads(xr.DataArray([[0.1, 0.2]], dims=("layer", "head")))
    write_json(ranking.to_json(), tmp_path / "heads.json")
    for words, inside in (
        (("grid.nc", "--title", "Mine"), "<title>Mine</title>"),
        (("grid.nc", "--on", str(tmp_path / "picture.png"), "--out", str(tmp_path / "on.html")), "stage dim"),
        (("circuit.json",), "L0H2"),
        (("heads.json",), "rank of the head"),
    ):
        code, out, err = mech("view", str(tmp_path / words[0]), *words[1:])
        assert code == 0, err
        assert inside in Path(out.strip()).read_text(encoding="utf-8")
    study = fabricated_study(tmp_path / "study", models=(("toy", "llava", 2, 4),), domains=("pages",), n=4, draws=2)
    code, out, _ = mech("view", str(study), "--out", str(tmp_path / "again.html"))
    assert code == 0 and out.strip() == str(tmp_path / "again.html") and (study / "report.html").exists()
    assert mech("view", str(study / "toy" / "pages" / "maps.nc"))[0] == 0, "its pictures lie beside it"
    for words, said in (
        ((str(tmp_path / "none.nc"),), "none.nc"),
        ((str(tmp_path),), "summary.json"),
        ((str(tmp_path / "grid.nc"), "--out", str(tmp_path / "grid.gif")), "ends in .html, .htm, .png, .pdf or .svg"),
    ):
        code, _, err = mech("view", *words)
        assert code == 2 and said in err
    for i, other in enumerate([{}, {"ram": 1}, {"shown": ("shown", [1])}, {"word": 1}]):
        save(xr.Dataset(other), tmp_path / f"{i}.nc")
        code, _, err = mech("view", str(tmp_path / f"{i}.nc"))
        assert code == 2 and err.startswith("mech: "), other
    (tmp_path / "other.json").write_text(json.dumps([1]))
    assert mech("view", str(tmp_path / "other.json"))[0] == 2


@pytest.mark.parametrize("kind", ["tensor", "array", "cache"])
def test_activations_are_refused_with_what_draws_attention(kind):
    pattern = torch.zeros(1, 4, 6, 6)
    given = {"tensor": pattern, "array": pattern.numpy(), "cache": ActivationCache({"pattern": pattern}, None)}[kind]
    with pytest.raises(OutputError, match=r"mech\.view\(mech\.token_attention") as error:
        view(given)
    assert kind == "cache" or "(1, 4, 6, 6)" in str(error.value)
