"""The pages in a real browser: everything can be clicked, nothing complains, nothing leaves the machine."""

import json
import re
import shutil
import time

import pytest
import xarray as xr
from fabricated import (
    fabricated_attention,
    fabricated_circuit,
    fabricated_grid,
    fabricated_looks,
    fabricated_sample,
    fabricated_study,
)

from mech.experiments.ranking.ranking import rank_heads
from mech.views import report, view
from mech.views.drawing import figures

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser: pip install selenium")
SMALLEST = 11.5  # pixels of text
LOCAL = ("file:", "data:", "blob:", "about:", "chrome:", "devtools:")


class Browser:
    """A headless Chromium that remembers what pages complained about and asked for."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path, width=1400, dark=False):
        self.complaints(), self.requests()
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(path.as_uri())
        self.settle()

    def settle(self):
        """Wait until every chart that can be seen is drawn."""
        waiting = """return [...document.querySelectorAll('.plot')]
            .some(plot => plot.offsetParent && !plot.querySelector('.main-svg'))"""
        for _ in range(200):
            if not self.run(waiting):
                return
            time.sleep(0.05)
        raise AssertionError("a chart is not drawn")

    def run(self, script, *args):
        return self.driver.execute_script(script, *args)

    def all(self, css):
        return self.driver.find_elements("css selector", css)

    def one(self, css):
        (found,) = self.all(css)
        return found

    def shown(self, css):
        return self.run("return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility())", css)

    def point(self, element):
        """Move the mouse over an element's middle."""
        self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        webdriver.ActionChains(self.driver).move_to_element(element).perform()

    def complaints(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self):
        """Addresses that were asked for outside of this machine."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [address for address in asked if not address.startswith(LOCAL)]

    def is_quiet(self):
        return self.complaints() == [] and self.requests() == []

    def smallest_text(self):
        return self.run("""
            const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            let least = [99, ""];
            for (let node; node = walk.nextNode();) {
                const parent = node.parentElement, box = parent.getBoundingClientRect();
                if (!node.data.trim() || !box.width || !box.height || parent.closest("script, style")) continue;
                const size = parseFloat(getComputedStyle(parent).fontSize);
                if (size < least[0]) least = [size, node.data];
            }
            return least""")


@pytest.fixture(scope="module")
def browser():
    driver_path = shutil.which("chromedriver")
    if figures.find_browser() is None or driver_path is None:
        pytest.skip("no Chromium with its driver: apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = figures.find_browser()
    for word in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver_path))
    yield Browser(driver)
    driver.quit()


@pytest.fixture(scope="module")
def study_page(tmp_path_factory):
    shape = (("llava-s", "llava", 4, 6), ("llava-m", "llava", 6, 8))
    folder = tmp_path_factory.mktemp("study")
    return report(
        fabricated_study(folder, models=shape, domains=("grounding", "video"), methods=("mean", "zero"), n=12, draws=3)
    )


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (420, True)])
def test_the_report_can_be_clicked_through(browser, study_page, width, dark):
    browser.open(study_page, width, dark)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    drawn = len(browser.all(".plot .main-svg"))
    clicked = 0
    for _ in range(3):  # panels lie in panels
        for button in browser.shown('.tabs > .bar button[aria-selected="false"]'):
            browser.run("arguments[0].click()", button)
            panel = browser.one(f"#{button.get_attribute('aria-controls')}")
            if button.is_displayed():
                assert panel.is_displayed() and button.get_attribute("aria-selected") == "true"
                clicked += 1
    for summary in browser.all("summary"):
        browser.run("arguments[0].click()", summary)
    browser.settle()
    assert clicked > 8 and len(browser.all(".plot .main-svg")) > drawn > 0
    for link in browser.all("nav.contents a"):
        browser.run("arguments[0].click()", link)
        assert browser.driver.current_url.endswith(link.get_attribute("href").partition("#")[2])
    size, text = browser.smallest_text()
    assert size >= SMALLEST, text
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.is_quiet()


def test_charts_and_pictures_say_what_is_pointed_at(browser, study_page):
    browser.open(study_page)
    browser.point(browser.shown(".plot .draglayer .nsewdrag")[1])
    assert browser.all(".hoverlayer .hovertext")
    mark = browser.shown(".stage.dim rect[data-tip]")[0]
    browser.point(mark)
    tip = browser.one(".tip")
    assert tip.is_displayed() and tip.text == mark.get_attribute("data-tip")
    assert tip.rect["x"] >= 0 and tip.rect["x"] + tip.rect["width"] <= 1400
    browser.run("document.dispatchEvent(new Event('scroll'))")
    assert not tip.is_displayed()


def test_a_page_turns_dark_with_its_charts(browser, study_page):
    colours = []
    for dark in (False, True):
        browser.open(study_page, dark=dark)
        colours.append(
            browser.run("""return [getComputedStyle(document.body).backgroundColor,
                getComputedStyle(document.querySelector(".plot .xtick text")).fill]""")
        )
    light, dark = [[sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in pair] for pair in colours]
    assert light[0] > 600 > 200 > dark[0], "paper"
    assert light[1] < 250 and dark[1] > 500, "ticks"


def test_a_circuit_opens_its_parts(browser, tmp_path):
    ranking = rank_heads(xr.DataArray([[0.1, 0, 0.7, 0], [0, 0, 0, 0.3]], dims=("layer", "head")))
    drawn = view(fabricated_circuit(), on=fabricated_sample(), ranking=ranking, looks=fabricated_looks())
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
    assert panel.find_element("css selector", ".stage.dim").rect["height"] > 100, "where it looks"
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
