"""The explorer in a real browser: choose, click, switch off, draw, drop, copy; no complaint, no request elsewhere."""

import io
import threading
import time

import pytest
from PIL import Image

from mech.explorer.state import State

pytest.importorskip("uvicorn", reason="the extra: pip install 'mech[explore]'")
pytest.importorskip("selenium.webdriver", reason="selenium drives the browser: pip install selenium")


@pytest.fixture(scope="module")
def home(engine):
    """The address of a running explorer."""
    from mech.explorer.server import address, listening, server_of

    with listening() as place:
        server = server_of(engine, place, "token-of-the-test")
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
        thread.start()
        yield address(place.getsockname()[1], "token-of-the-test")
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def page(browser, home):
    return Page(browser, home)


class Page:
    """The explorer as a reader uses it."""

    def __init__(self, browser, home):
        self.browser, self.home = browser, home

    def open(self, link="", **look):
        self.browser.driver.get("about:blank")
        self.browser.open(f"{self.home}#{link}", **look)
        self.settle(link)

    def settle(self, *parts):
        """Wait until the page shows its address, which holds these parts."""
        state = "return [document.querySelector('main').dataset.settled, location.hash.slice(1)]"
        waits = """return [...document.querySelectorAll(".tokens td, .twin, .now, .none")]
            .some(part => part.textContent.endsWith("…"))"""
        for _ in range(200):
            settled, link = self.browser.run(state)
            there = settled is not None and settled == link.replace("%20", "+") and all(one in link for one in parts)
            if there and not self.browser.run(waits):
                return
            time.sleep(0.05)
        raise AssertionError(f"{settled!r} is shown, {link!r} was asked for, with {parts}")

    def click(self, css):
        self.browser.run("arguments[0].click()", self.browser.one(css))

    def text(self, css):
        return self.browser.one(css).text

    def drag(self, css, start, stop):
        """With the mouse, between two places given as shares of an element."""
        left, top, width, height = self.browser.run("""const [css] = arguments, part = document.querySelector(css);
            part.scrollIntoView({block: "center"}); const box = part.getBoundingClientRect();
            return [box.left, box.top, box.width, box.height]""", css)  # fmt: skip
        for kind, (x, y), down in (("mousePressed", start, 1), ("mouseMoved", stop, 1), ("mouseReleased", stop, 0)):
            facts = {"type": kind, "x": left + x * width, "y": top + y * height, "button": "left", "buttons": down}
            self.browser.driver.execute_cdp_cmd("Input.dispatchMouseEvent", {**facts, "clickCount": 1})

    def is_quiet(self):
        """Nothing complained, and nothing was asked of anybody else."""
        own = self.home.rpartition("/token")[0]
        assert self.browser.complaints() == []
        return all(address.startswith(own) for address in self.browser.requests())


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (420, True)])
def test_a_first_look(page, engine, width, dark):
    page.open("sample=1", width=width, dark=dark)
    sample = engine.samples[1]
    assert page.text(".before") == sample.answer and sample.answer in page.text(".lead .soft")
    assert page.browser.one(".question").get_attribute("value") == sample.question
    assert len(page.browser.all(".map .cell")) == 48 and len(page.browser.all(".scatter circle")) == 48
    assert len(page.browser.all(".samples button")) == 6
    assert page.browser.run("return document.documentElement.scrollWidth") <= width
    background = page.browser.run("return getComputedStyle(document.querySelector('main')).backgroundColor")
    assert (background == "rgb(19, 22, 27)") == dark
    (paint,) = page.browser.run("return performance.getEntriesByName('first-contentful-paint').map(e => e.startTime)")
    assert paint < 1000
    size, text = page.browser.smallest_text()
    assert size >= 11.5, text
    assert page.is_quiet()


def test_a_head_is_looked_at_switched_off_and_on(page, engine):
    page.open()
    before = page.text(".before")
    page.click('.map [data-head="L0H2"]')
    page.settle("head=L0H2")
    assert page.text(".reading h3") == "L0H2 from the question" and page.text(".answering h3") == "L0H2 as it answers"
    looks = engine.ask({"action": "head", "state": "head=L0H2"})
    shown = page.browser.run("return [...document.querySelectorAll('.reading .heat title')].map(e => +e.textContent)")
    most = max(looks["question"] + looks["last"])
    assert sorted(shown) == sorted(round(v, 3) for v in looks["question"] if v / most >= 0.02)
    page.browser.point(page.browser.one('.words [data-word="4"]'))
    assert "“" in page.text(".reading h3"), "the word under the mouse"
    page.click(".switch")
    page.settle("off=L0H2")
    changed = engine.ask({"action": "change", "state": "off=L0H2"})
    assert page.text(".now") == changed["answer"] and page.text(".before") == before
    assert "random sets of 1 other head" in page.text(".twin")
    assert "off" in page.browser.one('.map [data-head="L0H2"]').get_attribute("class")
    page.click(".top")
    page.settle("off=L")
    assert len(page.browser.all(".chip")) == 2
    page.browser.run("""const way = document.querySelector("select.way"); way.value = "zero";
        way.dispatchEvent(new Event("change"))""")  # fmt: skip
    page.settle("way=zero")
    page.browser.driver.back()
    page.settle("off=L")
    assert "way=zero" not in page.browser.driver.current_url, "back undoes"
    page.click(".all-on")
    page.settle("head=L0H2")
    assert not page.browser.all(".now, .chip") and page.is_quiet()


def test_arrow_keys_move_and_paths_lead_on(page):
    page.open("head=L4H2")
    cell = page.browser.one('.map [data-head="L4H2"]')
    page.browser.run("arguments[0].focus()", cell)
    cell.send_keys("\ue012")  # left
    page.settle("head=L4H1")
    page.click(".into")
    for _ in range(100):
        if page.browser.all(".paths li"):
            break
        time.sleep(0.05)
    assert "of the gap" in page.text(".head .paths li:first-child")
    link = page.browser.all(".paths button.link")[0]
    name = link.text
    page.browser.run("arguments[0].click()", link)
    page.settle(f"head={name}")
    page.browser.run(
        "document.querySelector('.scatter [data-head=L5H7]').dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    page.settle("head=L5H7")
    assert page.is_quiet()


def test_a_box_that_is_drawn_is_the_evidence(page, engine):
    page.open("sample=2&head=L4H2")
    page.drag(".reading .stage", (0.1, 0.2), (0.6, 0.7))
    page.settle("boxes=0:")
    link = page.browser.run("return location.hash.slice(1)")
    x0, y0, x1, y1 = map(float, link.split("boxes=0:")[1].split("&")[0].split(","))
    assert (x0, y0) == pytest.approx((9.6, 19.2), abs=1.6) and (x1, y1) == pytest.approx((57.6, 67.2), abs=1.6)
    ram = engine.ask({"action": "show", "state": link})["scores"]["ram"][4][2]
    assert f"RAM {ram:.3f}" in page.text(".head p:not(.chips)") and "the box you drew" in page.text(".boxes p")
    page.drag(".reading .stage", (0.5, 0.5), (0.5, 0.5))
    assert page.browser.run("return location.hash.slice(1)") == link, "a click draws nothing"
    page.click(".clear")
    page.settle("head=L4H2")
    assert "boxes" not in page.browser.driver.current_url and page.is_quiet()


def test_another_question_is_asked(page, engine):
    page.open("sample=2")
    field = page.browser.one(".question")
    field.clear()
    field.send_keys("What number does the red frame hold?\n")
    page.settle("question=What")
    answer = engine.ask({"action": "show", "state": "sample=2&question=What+number+does+the+red+frame+hold%3F"})[
        "answer"
    ]
    assert page.text(".before") == answer and page.text(".lead .soft") == ""
    assert [one.text for one in page.browser.all(".words button")][4] == "red" and page.is_quiet()


def test_what_cannot_be_shown_is_said_and_left(page, engine):
    page.browser.driver.get("about:blank")
    page.browser.open(f"{page.home}#sample=2&boxes=0:500,500,600,600")
    page.settle()
    assert "500" in page.text(".trouble") and "Try:" in page.text(".trouble")
    assert page.browser.run("return location.hash") == "" and page.text(".before") == engine.samples[0].answer
    page.browser.one(".question").clear()
    page.click(".ask button")
    assert "The question is empty" in page.text(".trouble") and page.text(".before") == engine.samples[0].answer
    page.click('.samples [data-sample="1"]')
    page.settle("sample=1")
    assert not page.browser.shown(".trouble") and page.text(".before") == engine.samples[1].answer
    before = page.browser.one(".question").get_attribute("value")
    page.browser.run("location.hash = 'sample=1&picture=gone'")
    for _ in range(100):
        if page.browser.shown(".trouble"):
            break
        time.sleep(0.05)
    assert "no longer here" in page.text(".trouble")
    page.settle("sample=1")
    assert "picture" not in page.browser.driver.current_url
    assert page.browser.one(".question").get_attribute("value") == before
    assert page.is_quiet()


def test_sinks_are_hidden_and_the_rest_is_on_the_scale_that_is_left(page, engine):
    page.open("sample=1&head=L4H1")
    if not engine.ask({"action": "show", "state": "sample=1"})["sinks"][4]:
        assert not page.browser.all(".hide-sinks")
    run = engine._run(engine._subject(State(sample=1)))
    most = int(run.attention[4, 1, -1].argmax())
    run.sinks[4, most] = True  # a sink that takes more than any other token
    page.open("sample=1&head=L4H1&word=1")
    heat = "[...document.querySelectorAll('.heat')]"
    sinks = f"return {heat}.filter(one => one.textContent.endsWith(', a sink')).length"
    strongest = f"return Math.max(...{heat}.map(one => one.getAttribute('fill-opacity')))"
    assert page.browser.run(sinks) and "on sinks" in page.text(".answering .soft")
    assert page.browser.run(strongest) == 0.65
    page.click(".hide-sinks")
    page.settle("sinks=hidden")
    assert page.browser.run(sinks) == 0 and len(page.browser.all(".answering .sink")) == 1
    assert page.browser.run(strongest) == 0.65, "the scale ends at what is left"
    page.click(".hide-sinks")
    page.settle("word=1")
    assert "sinks" not in page.browser.driver.current_url and page.is_quiet()
    run.sinks[4, most] = False


DROP = """const [bytes, name, kind] = arguments, data = new DataTransfer();
    data.items.add(new File([new Uint8Array(bytes)], name, {type: kind}));
    const how = {dataTransfer: data, bubbles: true, cancelable: true};
    document.querySelector("main").dispatchEvent(new DragEvent("drop", how))"""


def test_a_picture_is_dropped_or_chosen(page, engine, tmp_path):
    page.open()
    written = io.BytesIO()
    engine.samples[3].images[0].save(written, "PNG")
    page.browser.run(DROP, list(written.getvalue()), "mine <b>.png", "image/png")
    page.settle("picture=")
    assert page.text(".own") == "mine <b>.png" and "Draw a box" in page.text(".map .none")
    assert page.browser.run("return document.querySelector('.reading img').naturalWidth") == 96
    photo = Image.effect_noise((120, 80), 60).convert("RGB")
    photo.save(tmp_path / "photo.jpg")
    first = page.browser.driver.current_url
    page.browser.one("input.file").send_keys(str(tmp_path / "photo.jpg"))
    for _ in range(100):
        if page.browser.driver.current_url != first:
            break
        time.sleep(0.05)
    page.settle("picture=")
    assert page.text(".own") == "photo.jpg"
    page.browser.run(DROP, [1, 2, 3], "notes.txt", "text/plain")
    for _ in range(100):
        if page.browser.shown(".trouble"):
            break
        time.sleep(0.05)
    assert "cannot be read as a picture" in page.text(".trouble") and page.text(".own") == "photo.jpg"
    assert page.is_quiet()


def test_link_and_python_are_copied(page, engine):
    page.open("sample=1&off=L0H2&way=zero&head=L0H2")
    may = ["clipboardReadWrite", "clipboardSanitizedWrite"]
    facts = {"permissions": may, "origin": page.home.rpartition("/token")[0]}
    page.browser.driver.execute_cdp_cmd("Browser.grantPermissions", facts)
    read = "const done = arguments[0]; navigator.clipboard.readText().then(done, error => done(String(error)))"
    page.click(".copy-code")
    time.sleep(0.2)
    code = page.browser.driver.execute_async_script(read).replace("\r\n", "\n")
    assert code == engine.ask({"action": "code", "state": "sample=1&off=L0H2&way=zero&head=L0H2"})["code"]
    page.click(".copy-link")
    time.sleep(0.2)
    link = page.browser.driver.execute_async_script(read)
    assert link == page.browser.driver.current_url and link.endswith("off=L0H2&way=zero&head=L0H2")
    page.open()
    page.browser.driver.get("about:blank")
    page.browser.driver.get(link)
    page.settle("off=L0H2")
    assert page.browser.all(".chip")[0].text.startswith("L0H2") and page.is_quiet()


WIDGET = """const done = arguments[0], heard = {}, set = {};
    import("./explorer.js").then(({default: widget}) => {
        const model = {
            on: (name, act) => { heard[name] = act; }, off: name => { delete heard[name]; },
            get: () => "sample=1&head=L0H2", set: (name, value) => { set[name] = value; }, save_changes: () => {},
            send: async ({number, request}) => {
                const answer = await (await fetch("ask", {method: "POST", headers: {"Content-Type": "application/json"},
                    body: JSON.stringify(request)})).json();
                heard["msg:custom"]?.({number, answer});
            },
        };
        const el = document.createElement("div");
        document.body.replaceChildren(el);
        const leave = widget.render({model, el});
        const look = n => el.querySelector(".answering .heat") ? (el.querySelector("[data-head=L4H2]").click(),
            leave(), done([set.link, el.querySelectorAll(".cell").length, Object.keys(heard).length]))
            : n ? setTimeout(() => look(n - 1), 50) : done("nothing was drawn");
        look(200);
    }, error => done(String(error)))"""


def test_the_widget_is_the_same_script(page):
    page.open()
    assert page.browser.driver.execute_async_script(WIDGET) == ["sample=1&head=L4H2", 48, 0]
    assert page.is_quiet()
