"""The report in a real browser: one screen first, heads and details on demand, tables as files, dark and on paper."""

import base64
import csv
import re
import time

import pytest
from fabricated import fabricated_study

from mech.views import report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser: pip install selenium")
SMALLEST = 11.5  # pixels of text


@pytest.fixture(scope="module")
def study_page(tmp_path_factory):
    shape = (("llava-s", "llava", 4, 6), ("llava-m", "llava", 6, 8))
    folder = tmp_path_factory.mktemp("study")
    domains, methods = ("grounding", "video"), ("mean", "zero")
    return report(fabricated_study(folder, shape, domains, methods, n=12, draws=3, causal=True))


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (420, True)])
def test_the_report_can_be_clicked_through(browser, study_page, width, dark):
    browser.open(study_page, width, dark)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    drawn = len(browser.all(".plot .main-svg"))
    for summary in browser.all("summary"):
        browser.run("arguments[0].click()", summary)
    clicked = 0
    for _ in range(3):  # panels lie in panels
        for button in browser.shown('.tabs > .bar button[aria-selected="false"]'):
            browser.run("arguments[0].click()", button)
            panel = browser.one(f"#{button.get_attribute('aria-controls')}")
            if button.is_displayed():
                assert panel.is_displayed() and button.get_attribute("aria-selected") == "true"
                clicked += 1
    browser.scroll_through()
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
    browser.point(browser.shown("#first .plot .draglayer .nsewdrag")[0])
    assert browser.all(".hoverlayer .hovertext")
    mark = browser.shown("#first .stage.dim rect[data-tip]")[0]
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


def test_the_first_paint_waits_for_no_chart(browser, study_page):
    browser.open(study_page)
    (paint,) = browser.run("return performance.getEntriesByName('first-contentful-paint').map(e => e.startTime)")
    assert paint < 1000
    nodes = browser.run("return document.querySelectorAll('*').length")
    assert nodes < 8000
    first = browser.one("#first").rect
    assert first["y"] + first["height"] < 900, "picture, curve and answers are one screen"


def test_no_label_covers_another_and_no_table_sticks_out(browser, study_page):
    for width in (1400, 420):
        browser.open(study_page, width)
        for summary in browser.all("summary"):
            browser.run("arguments[0].click()", summary)
        browser.scroll_through()
        overlaps = browser.run("""
            const bad = [], apart = (a, b) => a.right < b.left + 1 || b.right < a.left + 1
                || a.bottom < b.top + 1 || b.bottom < a.top + 1;
            for (const axis of document.querySelectorAll(".plot .xaxislayer-above, .plot .yaxislayer-above")) {
                const ticks = [...axis.querySelectorAll(".xtick text, .ytick text")].filter(text => text.textContent);
                ticks.forEach((one, i) => ticks.slice(i + 1).forEach(other => {
                    if (!apart(one.getBoundingClientRect(), other.getBoundingClientRect()))
                        bad.push([one.textContent, other.textContent]);
                }));
            }
            return bad""")
        assert overlaps == []
        out = browser.run("""return [...document.querySelectorAll("table")].filter(table => table.offsetParent
            && table.getBoundingClientRect().right > innerWidth && !table.closest(".scroll")).length""")
        assert out == 0


def test_narrow_contents_show_that_they_scroll(browser, study_page):
    browser.open(study_page, 420)
    wide, seen, shades = browser.run("""const nav = document.querySelector("nav.contents div");
        return [nav.scrollWidth, nav.clientWidth, getComputedStyle(nav).backgroundAttachment]""")
    assert wide > seen and shades.split(", ") == ["local", "local", "scroll", "scroll"]


def test_a_cell_of_the_map_opens_the_page_of_its_head(browser, study_page):
    browser.open(study_page)
    plot = browser.all("[data-heads] .plot")[0]
    browser.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", plot)
    browser.settle()
    layer, head = browser.run("""const [{z}] = arguments[0].data, most = Math.max(...z.flat());
        const row = z.findIndex(line => line.includes(most));
        return [row, z[row].indexOf(most)]""", plot)  # fmt: skip
    x, y = browser.run("""const [plot, layer, head] = arguments, {xaxis, yaxis} = plot._fullLayout;
        const box = plot.getBoundingClientRect();
        return [box.left + xaxis._offset + xaxis.l2p(head), box.top + yaxis._offset + yaxis.l2p(layer)]""",
        plot, layer, head)  # fmt: skip
    browser.click_at(x, y)
    page = browser.one("dialog#head")
    assert page.is_displayed() and browser.driver.current_url.endswith(f"#head=0/{layer}/{head}")
    wanted = [
        f"L{layer}H{head}, llava-s on grounding",
        "Rank 1 of 24",
        "RAM",
        "even attention would give",
        "(necessity)",
    ]
    wanted += ["50.0% [48.0%, 52.0%]", "writes directly to the logits", "attending and causal", "Where it attends"]
    for words in wanted:
        assert words in page.text, words
    browser.settle()
    assert page.find_elements("css selector", ".stage.dim rect[data-tip]"), "its pictures are here too"
    for _ in range(5):
        page.find_elements("css selector", ".bar button")[1].click()
    assert "Rank 6 of 24" in page.text and "mech.attention_maps(" in page.text, "this one was not drawn"
    page.find_element("css selector", ".close").click()
    assert not page.is_displayed() and "#head" not in browser.driver.current_url
    browser.run("arguments[0].click()", browser.shown('#model-1 a[href^="#head="]')[0])
    time.sleep(0.2)
    assert page.is_displayed() and "llava-m on grounding" in page.text
    page.send_keys(webdriver.Keys.ESCAPE)
    assert not page.is_displayed()
    browser.driver.get(study_page.as_uri() + "#head=99/0/0")
    assert not browser.one("dialog#head").is_displayed(), "no such setting"
    assert browser.is_quiet()


def test_sinks_are_hidden_and_shown_on_the_scale_that_is_left(browser, study_page):
    browser.open(study_page)
    row = browser.shown("[id^=tenths-]")[0]
    browser.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", row)
    browser.settle()
    heads = browser.run("return [...arguments[0].querySelectorAll('figure')].map(one => one.dataset.head)", row)
    assert 8 <= len(heads) <= 10 and "top 1" in row.text and "last 1" in row.text

    def drawn():
        return browser.run("""const rects = [...arguments[0].querySelectorAll(".stage.dim rect[data-tip]")];
            const seen = rects.map(one => [one.matches(".sink"), +one.dataset.tip.match(/\\d[\\d.e-]*/)[0],
                one.getAttribute("fill"), +one.getAttribute("fill-opacity")]);
            const ends = [...arguments[0].querySelectorAll(".heat-legend")].filter(one => one.checkVisibility());
            return [seen, ends.map(one => one.textContent)]""", row)  # fmt: skip

    before, scale = drawn()
    assert all(opacity > 0.8 for sink, _, _, opacity in before if sink), "they take most of the attention"
    box = row.find_element("css selector", ".hide-sinks")
    box.click()
    after, other = drawn()
    assert len(scale) == len(other) == 1 and scale != other and " 0.9(" in scale[0]
    most = max(value for sink, value, _, _ in after if not sink)
    for (sink, value, _, _), (_, _, colour, opacity) in zip(before, after, strict=True):
        strength = 0.0 if sink or value < 0.02 * most else 0.85 * min(1, value / most + 0.1)
        assert opacity == pytest.approx(strength, abs=2e-3)
        assert value < most or sink or colour == "rgb(252,253,191)"
    browser.run("arguments[0].closest('section').querySelector('details.fold > summary').click()", row)
    assert all(other.is_selected() for other in browser.all(".hide-sinks")), "one switch for all maps"
    box.click()
    assert [[sink, value, round(opacity, 2)] for sink, value, _, opacity in drawn()[0]] == [
        [sink, value, round(opacity, 2)] for sink, value, _, opacity in before
    ]
    assert browser.is_quiet()


def test_a_table_is_saved_as_csv(browser, study_page, tmp_path):
    folder = tmp_path / "saved"
    browser.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    browser.open(study_page)
    table = browser.shown("#model-0 .tabular")[0]
    browser.run("arguments[0].click()", table.find_element("css selector", ".csv"))
    rows = saved(folder)
    ends = [f"{name}{end}" for name in ("lost without it", "recovered by it alone") for end in ("", " low", " high")]
    assert rows[0] == ["head", "rank", "RAM", "RAM low", "RAM high", "vs even attention", *ends, "kind"]
    assert rows[1][1] == "1" and rows[1][6:9] == ["50%", "48%", "52%"]
    browser.run("arguments[0].click()", browser.one("#claims .csv"))
    claims = saved(folder)
    assert claims[1][1:5] == ["grounding", "video", "grounding", "video"]
    assert {"agrees", "cannot tell"} <= {cell for row in claims for cell in row}
    assert browser.is_quiet()


def test_it_prints_in_the_colours_of_the_day(browser, study_page):
    browser.open(study_page, dark=True)
    printed = browser.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]
    pdf = base64.b64decode(printed)
    assert pdf.startswith(b"%PDF") and 2 < len(re.findall(rb"/Type\s*/Page[^s]", pdf)) < 40
    media = {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    sheet = {"width": 760, "height": 1080, "deviceScaleFactor": 1, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sheet)
    browser.settle()
    seen, wide = browser.run("""dispatchEvent(new Event("beforeprint"));
        return [getComputedStyle(document.body).backgroundColor, document.documentElement.scrollWidth]""")
    assert seen == "rgb(255, 255, 255)" and wide <= 760, "nothing is cut at the edge of the sheet"
    browser.run("dispatchEvent(new Event('afterprint'))")
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def saved(folder):
    """The rows of the file that was just saved, which is then gone."""
    for _ in range(100):
        files = [path for path in folder.glob("*.csv")] if folder.exists() else []
        if files:
            break
        time.sleep(0.05)
    (path,) = files
    rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    path.unlink()
    return rows
