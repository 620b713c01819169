"""A headless Chromium as tests see it: what a page complains about, asks for and shows."""

import json
import shutil
import time

import pytest

from mech.views.drawing import figures

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser: pip install selenium")
LOCAL = ("file:", "data:", "blob:", "about:", "chrome:", "devtools:")


class Browser:
    """A headless Chromium that remembers what pages complained about and asked for."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, page, width=1400, dark=False):
        """A file, or an address."""
        self.complaints(), self.requests()
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(page if isinstance(page, str) else page.as_uri())
        self.settle()

    def settle(self):
        """Wait until every chart and every mark that is in sight is drawn."""
        waiting = """return [...document.querySelectorAll('.plot, .stage > template')].some(part => {
            const place = part.matches('template') ? part.parentElement : part, box = place.getBoundingClientRect();
            return place.offsetParent && box.bottom > 0 && box.top < innerHeight && !place.querySelector('svg');
        })"""
        for _ in range(200):
            if not self.run(waiting):
                return
            time.sleep(0.05)
        raise AssertionError("a chart is not drawn")

    def run(self, script, *args):
        return self.driver.execute_script(script, *args)

    def scroll_through(self):
        """Down the whole page, a screen at a time."""
        for top in range(0, self.run("return document.documentElement.scrollHeight"), 850):
            self.run("scrollTo({top: arguments[0], behavior: 'instant'})", top)
            self.settle()

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

    def click_at(self, x, y):
        """Click at a place of the window."""
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = "none" if kind == "mouseMoved" else "left"
            facts = {"type": kind, "x": x, "y": y, "button": button, "clickCount": 1}
            self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", facts)
        time.sleep(0.3)

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


def started():
    """A browser, or a skipped test; quit its ``driver``."""
    driver_path = shutil.which("chromedriver")
    if figures.find_browser() is None or driver_path is None:
        pytest.skip("no Chromium with its driver: apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = figures.find_browser()
    for word in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver_path))
    return Browser(driver)
