"""Complete offline pages: the skeleton every picture of `mech` is shown in, and ``View``, a picture that shows itself.

    view = ram_map(dataset)
    view                          # in Jupyter: an isolated frame, no network
    view.save("ram.html")         # a self-contained page
    view.save("ram.pdf")          # for papers; also .png and .svg (see ``figures``)

A chart is a plain plotly dictionary; ``chart`` puts it into the page as JSON and ``page.js`` draws it when it scrolls
into view. Its colours are names of variables in ``page.css`` (``"@top"``), so a chart turns dark with the page. The
page's own content security policy forbids every request: a mistake here cannot become a call to a server.

Charts are drawn by plotly's own "cartesian" bundle, unchanged (``plotly/``, MIT): the views use only ``scatter``,
``bar`` and ``heatmap``, and this is the smallest published bundle with all three. Smaller libraries (uPlot, Chart.js)
have no heatmap or no error bars. The bundle is compressed in the page, 0.7 MB instead of the 4.8 MB of plotly's
default, and the browser unpacks it after the text is shown (``DecompressionStream``: Chrome 80, Firefox 113, Safari
16.4).

This module knows nothing about heads, studies or models. Users' text must pass through ``escape``.
"""

import base64
import gzip
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape as _escape
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mech.errors import OutputError
from mech.files import make_folder
from mech.files import write as write_file
from mech.views.drawing.charts import as_plotly, charts_of, chosen, on_axes
from mech.views.drawing.figures import KINDS, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from plotly.graph_objects import Figure

TALLEST = 1000
PACKED_FROM = 2000  # characters; shorter text stays readable in the page
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

# A page may combine several views: the numbers only have to differ within one page.
_panel_number = count(1)


def escape(text: object) -> str:
    """``text`` made safe for HTML, for an attribute, and for a plotly label (which reads tags too)."""
    return _escape(str(text), quote=True)


@dataclass(frozen=True)
class View:
    """A picture with its title, ready for Jupyter or for a file.

    ``height`` is the height of the frame in Jupyter, in pixels, up to ``TALLEST``, beyond which it scrolls; a saved
    page takes the height it needs.
    """

    title: str
    body: str
    height: int = 480

    def html(self, paper: bool = False) -> str:
        """The whole page; with ``paper`` as drawn for papers: white, no title, no buttons, every panel open."""
        return page(self.title, self.body, alone=True, paper=paper)

    def save(self, path: str | Path, *, width: int = 1000, scale: float = 2) -> Path:
        """Write a complete offline page (``.html``), or a figure (``.png``, ``.pdf``, ``.svg``); the path is returned.

        Args:
            path: the file; its suffix chooses the format.
            width: width of a figure in CSS pixels. The default suits two columns; 520 fits one.
            scale: PNG pixels per CSS pixel.

        Raises:
            OutputError: another suffix, a path that cannot be written, or no browser to draw figures with.
        """
        path = Path(path)
        if path.suffix in (".html", ".htm"):
            return write(path, self.html())
        if path.suffix in KINDS:
            return write(path, draw(self.html(paper=True), path.suffix, width=width, scale=scale))
        raise OutputError(
            f"a view cannot be saved as {path.name!r}", f"a name that ends in .html, {', '.join(KINDS)}",
            "save('view.html')",
        )  # fmt: skip

    @property
    def charts(self) -> list[str]:
        """What each chart of the view shows, in the order of the page."""
        return list(charts_of(self.body))

    def figure(self, chart: int | str = 0) -> "Figure":
        """A chart of the view as a plotly figure, to build on.

        Args:
            chart: its index, or what it shows (see ``charts``).

        Raises:
            OutputError: there is no such chart.
        """
        return as_plotly(chosen(charts_of(self.body), chart))

    def axes(self, chart: int | str = 0, ax: "Axes | None" = None) -> "Axes":
        """A chart of the view on matplotlib axes.

        Args:
            chart: its index, or what it shows (see ``charts``).
            ax: where to draw; new axes if None.

        Raises:
            OutputError: there is no such chart, or matplotlib is not installed.
        """
        return on_axes(chosen(charts_of(self.body), chart), ax)

    def _repr_html_(self) -> str:
        # A frame keeps the page's style and the notebook's apart.
        inner = escape(page(self.title, self.body, alone=True))
        style = f"width:100%;height:{min(self.height, TALLEST)}px;border:0;border-radius:8px"
        title = escape(self.title)
        may = "allow-scripts allow-downloads"
        return f'<iframe srcdoc="{inner}" style="{style}" title="{title}" sandbox="{may}"></iframe>'


def page(title: str, body: str, *, alone: bool = False, paper: bool = False) -> str:
    """A complete HTML document around ``body``; plotly is included only if a chart needs it."""
    script = _plotly() if 'class="plot"' in body else ""
    if paper:
        script += f"\n<script>\n{asset('figure.js')}</script>"
    return (
        f'<!doctype html>\n<html lang="en"{" class=paper" if paper else ""}>\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{asset('page.css')}</style>\n</head>\n"
        f"<body{' class=alone' if alone else ''}>\n<main>\n{_pixels_once(body)}\n</main>\n"
        f"<script>\n{asset('page.js')}</script>\n{script}\n</body>\n</html>\n"
    )


def chart(data: Sequence[Mapping], layout: Mapping, *, height: int, label: str) -> str:
    """A plotly chart as HTML.

    Args:
        data, layout: what plotly takes, colours as ``"@variable"``.
        height: height in pixels; the width is that of its container.
        label: what the chart shows, for readers who cannot see it.
    """
    axis = {
        "gridcolor": "@rule",
        "zerolinecolor": "@rule",
        "linecolor": "@rule",
        "automargin": True,
        "fixedrange": True,
    }
    whole = {
        "font": {"size": 13, "color": "@ink"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 8, "r": 8, "t": 10, "b": 8},
        "showlegend": False,
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "@soft", "activecolor": "@ink"},
        "dragmode": False,
        "hovermode": "closest",
        "hoverlabel": {
            "bgcolor": "@card",
            "bordercolor": "@soft",
            "align": "left",
            "font": {"size": 13, "color": "@ink"},
        },
        **layout,
    }
    for name in ("xaxis", "yaxis", *(name for name in layout if name.startswith("xaxis") and name != "xaxis")):
        whole[name] = axis | dict(layout.get(name, {}))
        if "title" in whole[name]:
            whole[name]["title"] = {"text": whole[name]["title"], "font": {"size": 13}, "standoff": 8}
    return (
        f'<div class="plot" style="height:{height}px" role="img" aria-label="{escape(label)}"></div>'
        f"{embedded_json({'data': list(data), 'layout': whole})}"
    )


def embedded_json(value: Any) -> str:
    """A value for ``page.js`` to read; a large one is packed."""
    text = json.dumps(_plain(value), allow_nan=False, separators=(",", ":"))
    if len(text) > PACKED_FROM:
        return f'<script type="application/json" data-gzip>{packed(text)}</script>'
    # "<" in JSON would end the script element (or open a comment in it).
    text = text.replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'


def packed(text: str) -> str:
    """Text packed for ``page.js``: gzip in base64, a quarter of the bytes or less for charts and marks."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def tabs(panels: Mapping[str, str], label: str) -> str:
    """Several panels in one place, the first one shown; a single panel gets no bar."""
    if len(panels) == 1:
        return next(iter(panels.values()))
    bar, bodies = [], []
    for i, (name, body) in enumerate(panels.items()):
        key = f"panel-{next(_panel_number)}"
        bar.append(
            f'<button role="tab" id="{key}-tab" aria-controls="{key}" aria-selected="{"false" if i else "true"}"'
            f' tabindex="{-1 if i else 0}">{escape(name)}</button>'
        )
        hidden = " hidden" if i else ""
        # On paper there are no buttons: the name is above its panel.
        named = f'<h4 class="on-paper">{escape(name)}</h4>{body}'
        bodies.append(f'<div role="tabpanel" id="{key}" aria-labelledby="{key}-tab"{hidden}>{named}</div>')
    head = f'<div class="bar" role="tablist" aria-label="{escape(label)}">{"".join(bar)}</div>'
    return f'<div class="tabs">{head}{"".join(bodies)}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", kind: str = "") -> str:
    """A table whose first column names the row. Cells are HTML already: escape users' text."""
    top = "".join(f"<th{'' if i else ' class=left'}>{cell}</th>" for i, cell in enumerate(head))
    lines = "".join(
        "<tr>" + "".join(f"<td>{c}</td>" if i else f"<th>{c}</th>" for i, c in enumerate(row)) + "</tr>" for row in rows
    )
    inner = f"<thead><tr>{top}</tr></thead><tbody>{lines}</tbody>"
    return tabular(f"<table{f' class={kind}' if kind else ''}>{inner}</table>", caption)


def tabular(whole: str, caption: str = "") -> str:
    """An HTML table with its caption and a button that saves it as CSV (``page.js`` reads what is shown)."""
    # Above the table, not in it: a caption would scroll away with a wide table.
    captioned = f'<p class="soft">{caption}</p>' if caption else "<span></span>"
    button = '<button type="button" class="csv" title="Save this table as a CSV file">CSV</button>'
    return f'<div class="tabular"><div class="above">{captioned}{button}</div><div class="scroll">{whole}</div></div>'


def write(path: Path, content: str | bytes) -> Path:
    """Write the file whole or not at all; its folder is made if need be."""
    path = Path(path)
    make_folder(path.parent)
    return write_file(path, content)


def _plain(value: Any) -> Any:
    """numpy to JSON; nan to null, which plotly leaves out; six digits, more than a picture shows and half the bytes."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _pixels_once(body: str) -> str:
    """Keep only the first copy of a picture's pixels: views that show it each bring them (``images.styles``)."""
    known: set[str] = set()

    def first(rule: re.Match) -> str:
        return "" if rule[1] in known or known.add(rule[1]) else rule[0]

    return re.sub(r"\.px-(\w+)\{background-image:url\([^)]*\)\}", first, body)


@cache
def asset(name: str) -> str:
    """A file next to this one: style or script of the pages."""
    return files("mech.views.drawing").joinpath(name).read_text(encoding="utf-8")


@cache
def plotly_source() -> str:
    """The bundle of plotly.js that draws the charts."""
    return asset("plotly/plotly-cartesian.min.js")


@cache
def _plotly() -> str:
    return (
        f'<script type="text/plain" id="plotly">{packed(plotly_source())}</script>\n<script>(async () => {{\n'
        'const script = document.createElement("script");\n'
        'script.textContent = await mechUnpack(document.getElementById("plotly").textContent);\n'
        "document.head.append(script);\nmechStart();\n})()</script>"
    )
