"""The pages in a real browser: everything can be clicked, nothing complains, nothing leaves the machine."""

import re
import time

import pytest
import xarray as xr
from fabricated import (
    fabricated_attention,
    fabricated_circuit,
    fabricated_grid,
    fabricated_maps,
    fabricated_sample,
)

from mech.experiments.ranking.ranking import rank_heads
from mech.views import view

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser: pip install selenium")


def test_a_circuit_opens_its_parts(browser, tmp_path):
    ranking = rank_heads(xr.DataArray([[0.1, 0, 0.7, 0], [0, 0, 0, 0.3]], dims=("layer", "head")))
    drawn = view(fabricated_circuit(), on=fabricated_sample(), ranking=ranking, maps=fabricated_maps())
    browser.open(drawn.save(tmp_path / "circuit.html"))
    nodes = {node.text: node for node in browser.all(".graph .node")}
    assert set(nodes) == {"logits", "L1H3", "L1H0", "MLP 0", "L0H2", "evidence", "picture"}
    heights = {name: node.rect["y"] for name, node in nodes.items()}
    assert heights["logits"] < heights["L1H3"] < heights["MLP 0"] < heights["L0H2"] < heights["evidence"]
    assert "Click a part" in browser.one(".parts").text
    nodes["L0H2"].click()
    (panel,) = browser.shown(".part")
    for words in ("L0H2", "rank 1 of 8", "evidence", "+0.80 [+0.60, +0.90]", "evidence 0.65"):
        assert words in panel.text, words
    assert panel.find_element("css selector", ".stage.dim").rect["height"] > 100, "what it attends to"
    assert len(browser.all(".edge-group.on")) == 3, "from the evidence, to the MLP and to L1H3"
    nodes["L1H0"].send_keys(webdriver.Keys.ENTER)
    assert "-0.20 [-0.30, -0.10]" in browser.shown(".part")[0].text
    browser.driver.switch_to.active_element.send_keys(webdriver.Keys.ESCAPE)
    assert "Click a part" in browser.shown(".part")[0].text and not browser.all(".graph.focused")
    wires = [float(wire.get_attribute("stroke-width")) for wire in browser.all(".wire")]
    assert max(wires) == pytest.approx(9.2) and min(wires) < 2, "width is the size of the effect"
    browser.point(browser.all(".touch")[-1])  # the strongest, between neighbouring rows
    assert "of the gap" in browser.one(".tip").text
    assert browser.is_quiet()


def test_effects_lie_where_they_belong(browser, tmp_path):
    browser.open(view(fabricated_grid(), on=fabricated_sample()).save(tmp_path / "grid.html"))
    first, second = browser.all(".cells .stage")
    strongest = browser.run("""return [...arguments[0].querySelectorAll("rect[data-tip]")]
        .sort((a, b) => b.getAttribute("fill-opacity") - a.getAttribute("fill-opacity"))[0]""", first)  # fmt: skip
    box, picture = strongest.rect, first.rect
    assert (box["x"] - picture["x"]) / picture["width"] == pytest.approx(1 / 4, abs=0.02)
    assert (box["y"] - picture["y"]) / picture["height"] == pytest.approx(1 / 4, abs=0.02)
    assert strongest.get_attribute("fill") == "var(--plus)"
    browser.point(strongest)
    said = re.escape("layer 0, region 1,1 (pixels 28-56, 28-56)") + r"\neffect 0\.\d+ \[0\.\d+, 0\.\d+\]"
    assert re.fullmatch(said, browser.one(".tip").text)
    assert len(second.find_elements("css selector", "rect.evidence")) == 1
    assert browser.all(".plot .main-svg"), "the question and the last token"
    assert browser.is_quiet()


def test_token_attention_is_drawn_from_the_page_alone(browser, tmp_path):
    page = view(fabricated_attention()).save(tmp_path / "attention.html")
    browser.open(page)
    for _ in range(100):
        if "L0H2" in browser.one("body").text:
            break
        time.sleep(0.05)
    viewer = browser.shown(".viewer")[0]
    assert all(name in viewer.text for name in ("L0H0", "L0H1", "L0H2"))
    browser.shown('.bar button[aria-selected="false"]')[0].click()
    assert "L3H1" in browser.shown(".viewer")[0].text
    assert "unpkg" not in page.read_text()
    assert browser.is_quiet()


def test_a_notebook_frame_draws_its_chart(browser, tmp_path):
    frame = view(fabricated_attention().isel(query=0, key=0, drop=True))._repr_html_()
    (tmp_path / "notebook.html").write_text(
        f"<!doctype html><meta charset=utf-8><body>{frame}</body>", encoding="utf-8"
    )
    browser.open(tmp_path / "notebook.html")
    browser.driver.switch_to.frame(browser.one("iframe"))
    for _ in range(200):
        if browser.all(".plot .main-svg"):
            break
        time.sleep(0.05)
    assert browser.all(".plot .main-svg")
    browser.driver.switch_to.default_content()
    assert browser.is_quiet()


def test_this_browser_hears_what_is_wrong(browser, tmp_path):
    (tmp_path / "bad.html").write_text("<img src='http://127.0.0.1:9/x.png'><script>nothing.there</script>")
    browser.open(tmp_path / "bad.html")
    assert browser.requests() == ["http://127.0.0.1:9/x.png"]
    assert any("nothing is not defined" in complaint for complaint in browser.complaints())
