"""How long a click takes in the explorer, in a real browser: from the click to the change that it makes on the page.

    python benchmarks/explorer.py                # needs the extra 'explore', selenium and Chromium
    python benchmarks/explorer.py --pictures     # the pictures of docs/explore.md as well

Every kind of click is done ``--clicks`` times, each time on something else, on two reference models; the median of the
slower model is recorded. The comparison with random heads comes after the answer itself, and is measured too.
"""

import argparse
import io
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image
from record import ROOT, record

import mech
from mech.explorer.assets import static
from mech.explorer.engine import Engine
from mech.explorer.server import address, listening, server_of

sys.path.insert(0, str(ROOT / "tests" / "support"))
from browser import Browser, started

MODELS = ("reference:llava-s", "reference:qwen-s")
BAR = "<= 300"
# What the n-th click does; which parts of the page are new when it is done (none of them is what it was before).
CLICKS = {
    "sample": ("main.querySelectorAll('.samples button')[1 + n % 11].click()", ".before"),
    "head": ("main.querySelector(`.map [data-head=L${n % 6}H${(n * 5 + 1) % 8}]`).click()", ".answering .heat"),
    "off": ("main.querySelector('.switch').click()", ".now"),
    "random": (
        "main.querySelectorAll('.map .cell')[7 * n % 48].click(); main.querySelector('.switch').click()",
        ".range",
    ),
    "box": ("draw(20 + n, 20, 60, 60 + n)", ".boxes .clear:not([hidden])"),
    "paths": ("main.querySelector(`.map [data-head=L${3 + n % 3}H${n % 8}]`).click()", ".paths li"),
}
WORDS = {
    "sample": "another sample: picture, answer, scores",
    "head": "a head: where it attends",
    "off": "a head off: the answer",
    "random": "a head off: the answer beside five random sets",
    "box": "a box: the scores",
    "paths": "paths into a head",
}
TIMED = """const [part, n, done] = arguments, main = document.querySelector("main");
    const draw = (...at) => {
        const stage = main.querySelector(".reading .stage"), box = stage.getBoundingClientRect();
        ["pointerdown", "pointermove", "pointerup"].forEach((kind, i) => {
            const [x, y] = i ? at.slice(2) : at.slice(0, 2);
            const clientX = box.left + x / 96 * box.width, clientY = box.top + y / 96 * box.height;
            stage.dispatchEvent(new PointerEvent(kind, {bubbles: true, pointerId: 1, clientX, clientY}));
        });
    };
    HTMLElement.prototype.setPointerCapture = () => {};  // there is no pointer
    main.querySelectorAll(part).forEach(one => { one.old = true; });
    const start = performance.now();
    ACT;
    const look = () => {
        const now = [...main.querySelectorAll(part)].filter(one => !one.old && one.textContent !== "…");
        const taken = performance.now() - start;
        now.length || taken > 9000 ? done(taken) : requestAnimationFrame(look);
    };
    look();"""


@contextmanager
def explored(name: str) -> Iterator[str]:
    """The address of an explorer of a model."""
    reference, samples = mech.haystacks("grounding", n=32, seed=0).split(0.5)
    engine = Engine(mech.HookedMLLM.from_pretrained(name), samples, reference)
    engine.warm()
    with listening() as place:
        server = server_of(engine, place, "benchmark")
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
        thread.start()
        yield address(place.getsockname()[1], "benchmark")
        server.should_exit = True
        thread.join(10)


def settle(browser: Browser) -> None:
    """Wait until no request is pending."""
    for _ in range(200):
        time.sleep(0.1)
        if browser.run("return document.querySelector('main').dataset.settled !== undefined"):
            return
    raise TimeoutError("the page does not settle")


def measured(browser: Browser, home: str, clicks: int) -> dict[str, float]:
    """The median of every kind of click, in ms."""
    found = {}
    for kind, (act, part) in CLICKS.items():
        browser.driver.get("about:blank")
        browser.driver.get(f"{home}#sample=1&head=L3H3")
        settle(browser)
        if kind == "paths":
            browser.run("document.querySelector('.into').click()")
        taken = []
        for n in range(clicks):
            taken.append(browser.driver.execute_async_script(TIMED.replace("ACT", act), part, n))
            time.sleep(0.8)  # so that what still follows is not measured with the next one
        found[kind] = statistics.median(taken)
    return found


PICTURES = {  # name -> state, width, height, dark, whether paths are shown
    "explore": ("sample=1&head=L0H2&word=4", 1280, 800, False, False),
    "explore-off": ("sample=1&head=L0H2&off=L0H2,L0H4&way=zero&word=4", 1280, 860, True, False),
    "explore-narrow": ("sample=1&head=L4H1&off=L0H2", 420, 1500, False, True),
}


def draw_pictures(browser: Browser, home: str) -> None:
    """``docs/explore*.png``."""
    for name, (state, width, height, dark, paths) in PICTURES.items():
        browser.driver.get("about:blank")
        browser.open(f"{home}#{state}", width, dark)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        settle(browser)
        if paths:
            browser.run("document.querySelector('.into').click(); document.querySelector('.said').scrollIntoView()")
            time.sleep(1)
        shot = Image.open(io.BytesIO(browser.driver.get_screenshot_as_png())).convert("RGB")
        shot.quantize(256, Image.Quantize.FASTOCTREE).save(ROOT / "docs" / f"{name}.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clicks", type=int, default=15)
    parser.add_argument("--pictures", action="store_true")
    given = parser.parse_args()
    browser = started()
    try:
        medians = {}
        for name in MODELS:
            with explored(name) as home:
                browser.open(home)
                settle(browser)
                (paint,) = browser.run(
                    "return performance.getEntriesByName('first-contentful-paint').map(e => e.startTime)"
                )
                medians[name] = measured(browser, home, given.clicks)
                if given.pictures and name == MODELS[0]:
                    draw_pictures(browser, home)
            print(f"{name}: first paint {paint:.0f} ms", {kind: round(ms) for kind, ms in medians[name].items()})
    finally:
        browser.driver.quit()
    size = sum(len(static(part).encode()) for part in ("page.html", "page.js", "explorer.js", "explorer.css"))
    print(f"page: {size:,} bytes")
    for kind in CLICKS:
        slower = max(MODELS, key=lambda name: medians[name][kind])
        record(f"explore_{kind}", medians[slower][kind], what=WORDS[kind], unit="ms", bar=BAR, compared_with="a click",
               model=slower, clicks=given.clicks)  # fmt: skip


if __name__ == "__main__":
    main()
