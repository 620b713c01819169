"""The pictures in executed notebooks, made light: one copy of plotly for the whole documentation.

In Jupyter every view is a frame with everything it needs inside, about 0.9 MB each. Here each becomes a page of its own
beside the others, loads the one copy of plotly in ``_static``, is drawn when it is scrolled to, tells the page how high
it is, and follows the theme of the page. At the end no page may load anything from elsewhere.
"""

import hashlib
import html
import re
from pathlib import Path

from mech.views.drawing.page import plotly_source

FRAME = re.compile(r'<iframe srcdoc="(?P<inner>[^"]*)"(?P<rest>[^>]*)></iframe>')
BUNDLE = re.compile(r'<script type="text/plain" id="plotly">.*?</script>\s*<script>.*?</script>', re.DOTALL)
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
STYLE = re.compile(r'style="[^"]*height:(\d+)px[^"]*"')
ELSEWHERE = re.compile(r'<(?:script|link|img|iframe)[^>]*\s(?:src|href)="(?:https?:)?//[^"]*"')
SHARED = '<script src="../_static/plotly.js"></script><script>mechStart()</script>'
TELL = """<script>
const tell = () => parent.postMessage({ mechHeight: document.body.offsetHeight }, "*");
new ResizeObserver(tell).observe(document.body);
addEventListener("message", tell);
</script>"""


def share(app, failure: Exception | None) -> None:
    """Take the frames out of all built pages, and refuse pages that load something from elsewhere."""
    from sphinx.errors import ExtensionError  # here, so that the tests need no Sphinx

    if failure or app.builder.name != "html":
        return
    out = Path(app.outdir)
    (out / "_static" / "plotly.js").write_text(plotly_source(), encoding="utf-8")
    for page in out.rglob("*.html"):
        if page.parent.name == "_views":
            continue
        up = "../" * (len(page.relative_to(out).parts) - 1)
        text = page.read_text(encoding="utf-8")
        lighter = lightened(text, out, up)
        if lighter != text:
            page.write_text(lighter, encoding="utf-8")
        if "srcdoc=" in lighter:
            raise ExtensionError(f"{page.relative_to(out)} holds a view that docs/frames.py cannot share")
        if found := ELSEWHERE.search(lighter):
            raise ExtensionError(f"{page.relative_to(out)} loads from elsewhere: {found.group()[:200]}")


def lightened(text: str, out: Path, up: str) -> str:
    """A page whose frames are pages of their own in ``out/_views``; ``up`` leads from the page to ``out``."""
    return FRAME.sub(lambda found: _shared(found, out, up), text)


def _shared(found: re.Match, out: Path, up: str) -> str:
    inner = BUNDLE.sub(SHARED, html.unescape(found["inner"]))
    # What is left of the policy would forbid the shared copy; the page loads nothing else.
    inner = POLICY.sub("", inner).replace("</body>", f"{TELL}</body>")
    name = hashlib.sha256(inner.encode()).hexdigest()[:16] + ".html"
    (out / "_views").mkdir(exist_ok=True)
    (out / "_views" / name).write_text(inner, encoding="utf-8")
    height = STYLE.search(found["rest"])
    title = re.search(r'title="[^"]*"', found["rest"])
    return (
        f'<iframe class="mech" src="{up}_views/{name}" loading="lazy" style="height:{height[1] if height else 480}px"'
        f" {title[0] if title else ''}></iframe>"
    )
