"""Figures for papers: PNG, PDF and SVG of any view, drawn by the browser that is there."""

import re
import xml.etree.ElementTree as ET

import pytest
from fabricated import fabricated_attention, fabricated_circuit
from PIL import Image

from mech.errors import OutputError
from mech.views import view
from mech.views.drawing import figures

needs_browser = pytest.mark.skipif(figures.find_browser() is None, reason="no Chromium: apt install chromium")


@needs_browser
def test_figures_for_papers(tmp_path):
    drawn = view(fabricated_circuit())
    with Image.open(drawn.save(tmp_path / "circuit.png", width=600, scale=1.5)) as picture:
        assert picture.width == 900 and picture.getpixel((1, 1)) == (255, 255, 255)
        colours = {
            colour for _, colour in picture.convert("P", palette=Image.Palette.ADAPTIVE).convert("RGB").getcolors()
        }
        assert len(colours) > 20, "something is drawn"
    pdf = drawn.save(tmp_path / "circuit.pdf", width=600).read_bytes()
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page[^s]", pdf)) == 1
    root = ET.parse(drawn.save(tmp_path / "circuit.svg", width=600)).getroot()
    words = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"L1H3", "evidence", "logits"} <= set(words), "text is text"
    assert "var(" not in ET.tostring(root, encoding="unicode"), "colours are colours"
    assert "Circuit" not in words, "titles are for captions"


@needs_browser
def test_a_figure_holds_charts_and_every_panel(tmp_path):
    pattern = fabricated_attention().isel(key=0, drop=True).rename(query="set").isel(set=[0, 4])
    root = ET.parse(view(pattern).save(tmp_path / "maps.svg")).getroot()
    words = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert words.count("layer (0 = first)") == 2, "charts are shapes with text"
    assert "score: <user>" in words and "score: red" in words, "names of panels stand above them"
    pdf = view(pattern).save(tmp_path / "maps.pdf").read_bytes()
    assert len(re.findall(rb"/Type\s*/Page[^s]", pdf)) == 1


def test_without_a_browser_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("MECH_BROWSER", "no-such-browser")
    with pytest.raises(OutputError, match=r"no browser to draw a \.png with(?s:.*)apt install chromium"):
        view(fabricated_circuit()).save(tmp_path / "circuit.png")
    assert not list(tmp_path.iterdir())


def test_a_browser_that_fails_is_named(tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no display >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("MECH_BROWSER", str(broken))
    with pytest.raises(OutputError, match=r"broken did not draw the page \(no display\)"):
        view(fabricated_circuit()).save(tmp_path / "circuit.png")
