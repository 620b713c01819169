"""Pages as files for papers: PNG, PDF and SVG, drawn by an installed Chromium, without the network.

    ram_map(ram).save("ram.pdf")                   # one page, cut to the picture, text as text
    ram_map(ram).save("ram.png", scale=3)          # pixels: width x scale
    ram_map(ram).save("ram.svg")                   # shapes and text, to be edited

The page is the same as in HTML, on white, without its title and buttons; panels are placed one below the other.
Chromium, Google Chrome or Edge is looked for on the path (``MECH_BROWSER`` names another one) and runs headless, once
to lay the page out and once to draw it. No driver, server or further package is needed.
"""

import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mech.errors import OutputError

KINDS = (".png", ".pdf", ".svg")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
PLACES = {
    "darwin": ("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
               "/Applications/Chromium.app/Contents/MacOS/Chromium"),
    "win32": (r"C:\Program Files\Google\Chrome\Application\chrome.exe",
              r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe"),
}  # fmt: skip
LARGEST = 16_000  # pixels per side: the most that a browser can draw in one piece
PATIENCE = 120  # seconds


def find_browser() -> str | None:
    """The path of a Chromium browser, or None."""
    named = os.environ.get("MECH_BROWSER")
    candidates = [named] if named else [*BROWSERS, *PLACES.get(sys.platform, ())]
    return next((browser for name in candidates if (browser := shutil.which(name))), None)


def draw(page: str, kind: str, *, width: int, scale: float) -> bytes:
    """A page for papers (``View.html(paper=True)``) as the content of a PNG, PDF or SVG file.

    Args:
        page: its HTML.
        kind: ``.png``, ``.pdf`` or ``.svg``.
        width: width of the page in CSS pixels; the height follows from the content.
        scale: PNG pixels per CSS pixel.

    Raises:
        OutputError: no browser is installed, or it failed.
    """
    if not 200 <= width <= LARGEST or not 0 < scale <= 8:
        raise OutputError(
            f"width={width}, scale={scale}", f"200 to {LARGEST} pixels, a scale up to 8", "use 1000 and 2"
        )
    browser = find_browser()
    if browser is None:
        raise OutputError(
            f"no browser to draw a {kind} with",
            "Chromium, Google Chrome or Edge",
            "install one (apt install chromium), name it in MECH_BROWSER, or save as .html",
        )
    with tempfile.TemporaryDirectory(prefix="mech-figure-") as name:
        folder = Path(name)
        source = folder / "page.html"
        source.write_text(page, encoding="utf-8")
        height, svg = _laid_out(browser, source, width)
        if kind == ".svg":
            return svg.encode()
        if height * scale > LARGEST and kind == ".png":
            raise OutputError(f"a picture of {height} pixels at scale {scale:g}", f"{LARGEST} at most", "lower scale=")
        drawn = folder / f"page{kind}"
        if kind == ".pdf":
            # A little longer than the page: content pushed over its end by rounding would make a second sheet.
            sheet = f"<style>@page {{ size: {width}px {height + 4}px; margin: 0 }}</style></head>"
            source.write_text(page.replace("</head>", sheet, 1), encoding="utf-8")
            _run(browser, source, width, height, "--no-pdf-header-footer", f"--print-to-pdf={drawn}")
        else:
            _run(browser, source, width, height, f"--force-device-scale-factor={scale:g}", f"--screenshot={drawn}")
            _cut(drawn, round(width * scale), round(height * scale))
        return drawn.read_bytes()


def _laid_out(browser: str, source: Path, width: int) -> tuple[int, str]:
    """The height of a page, and the whole page as one SVG, both left in it by ``figure.js``."""
    text = _run(browser, source, width, 1000, "--dump-dom")
    match = re.search(r'<pre id="figure" hidden="">(.*?)</pre>', text, re.DOTALL)
    if match is None:
        raise OutputError(f"{browser} drew no page", "a recent browser", "try another one in MECH_BROWSER")
    made = json.loads(html.unescape(match[1]))
    return int(made["height"]), str(made["svg"])


def _run(browser: str, source: Path, width: int, height: int, *options: str) -> str:
    """Run the browser headless on a file, with no host name resolvable; returns what it prints."""
    words: Sequence[str] = (
        browser, "--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-extensions",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={source.parent / 'profile'}",
        # Pages draw in turns of the event loop: virtual time that passes while idle costs nothing.
        "--virtual-time-budget=8000",
        # Headless browsers count the window's frame as well; pictures are cropped afterwards.
        f"--window-size={width},{min(height, LARGEST) + 300}",
        *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []),
        *options, source.as_uri(),
    )  # fmt: skip
    try:
        done = subprocess.run(words, capture_output=True, timeout=PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        stderr = getattr(error, "stderr", None) or b""
        last = stderr.decode(errors="replace").strip().splitlines()[-1:] or [str(error)]
        raise OutputError(
            f"{browser} did not draw the page ({last[0][:200]})", "a browser that runs headless",
            "try another one in MECH_BROWSER, or save as .html",
        ) from error  # fmt: skip
    return done.stdout.decode(errors="replace")


def _cut(path: Path, width: int, height: int) -> None:
    from PIL import Image

    with Image.open(path) as picture:
        picture.convert("RGB").crop((0, 0, width, height)).save(path, optimize=True)
