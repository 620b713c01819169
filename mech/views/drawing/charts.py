"""The charts of a view for other programs: as a plotly figure, or on matplotlib axes.

    view(result).charts                            # what each shows
    view(result).figure().update_layout(width=400) # plotly
    view(result).axes(ax=ax)                       # matplotlib, next to the other panels of a paper's figure

Both use the page's numbers, in the colours of a white page. Pictures with marks over them are not charts: save those
with ``View.save``.
"""

import base64
import gzip
import html
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from mech.errors import OutputError

if TYPE_CHECKING:  # neither is needed to draw a page
    from matplotlib.axes import Axes
    from plotly.graph_objects import Figure

CHART = re.compile(
    r'<div class="plot"[^>]*aria-label="([^"]*)"></div><script type="application/json"( data-gzip)?>(.*?)</script>'
)
DASHES = {
    "solid": "-",
    "dash": "--",
    "dot": ":",
    "dashdot": "-.",
    "longdash": (0, (8, 3)),
    "longdashdot": (0, (8, 3, 2, 3)),
}
MARKERS = {"diamond": "D", "square": "s", "triangle-up": "^", "circle": "o", "cross": "P", "x": "X", "star": "*",
           "line-ns-open": "|", "star-triangle-up": "*", "star-open": "*"}  # fmt: skip
Chart = dict[str, Any]


def charts_of(body: str) -> dict[str, Chart]:
    """What each chart in a piece of a page shows -> its data and layout for plotly."""
    charts: dict[str, Chart] = {}
    for label, zipped, text in CHART.findall(body):
        plain = gzip.decompress(base64.b64decode(text)).decode() if zipped else text
        name = html.unescape(label)
        charts[name if name not in charts else f"{name} ({len(charts) + 1})"] = json.loads(plain)
    return charts


def chosen(charts: Mapping[str, Chart], which: int | str) -> Chart:
    """One of the charts, by its index or by what it shows.

    Raises:
        OutputError: there is no such chart.
    """
    names = list(charts)
    if isinstance(which, str) and which in charts:
        return charts[which]
    if isinstance(which, int) and -len(names) <= which < len(names):
        return charts[names[which]]
    known = "; ".join(f"{i}: {name}" for i, name in enumerate(names)) or "none: it has only pictures"
    raise OutputError(f"chart {which!r} of a view", f"one of its charts ({known})", "see view.charts, or use save")


def as_plotly(chart: Chart) -> "Figure":
    """A plotly figure, with colours in place of the page's colour names."""
    from plotly.graph_objects import Figure

    painted = _painted(chart, "")
    return Figure(painted["data"], painted["layout"] | {"template": "none", "paper_bgcolor": "white"})


def on_axes(chart: Chart, ax: "Axes | None" = None) -> "Axes":
    """The chart on matplotlib axes, new ones if none are given.

    Raises:
        OutputError: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise OutputError("axes without matplotlib", "matplotlib installed", "pip install matplotlib") from error
    painted = _painted(chart, "")
    axes: Any = pyplot.subplots()[1] if ax is None else ax
    layout, below = painted["layout"], None
    bars = [trace for trace in painted["data"] if trace["type"] == "bar"]
    for trace in painted["data"]:
        if trace["type"] == "heatmap":
            _heatmap(axes, trace)
        elif trace["type"] == "bar":
            _bars(axes, trace, bars.index(trace), len(bars))
        else:
            _scatter(axes, trace, below)
            below = trace
    for shape in layout.get("shapes", ()):
        _shape(axes, shape)
    for axis, name in ((axes.xaxis, "xaxis"), (axes.yaxis, "yaxis")):
        _axis(axes, axis, layout[name])
    if layout.get("showlegend") and axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize="small")
    return axes


def _scatter(ax: "Axes", trace: Mapping[str, Any], below: Mapping[str, Any] | None) -> None:
    x, y = _numbers(trace.get("x")), _numbers(trace.get("y"))
    if x.size and np.isnan(x).all():  # only there to show a second axis
        return
    if trace.get("fill") == "tonexty" and below is not None:
        ax.fill_between(x, _numbers(below["y"]), y, color=_colour(trace["fillcolor"]), linewidth=0)
        return
    line, marker, mode = trace.get("line", {}), trace.get("marker", {}), trace.get("mode", "lines+markers")
    if line.get("width") == 0:  # the edge of a shade
        return
    drawn = {
        "color": _colour(line.get("color") or marker.get("color")),
        "linewidth": line.get("width", 1.5),
        "linestyle": DASHES[line.get("dash", "solid")] if "lines" in mode else "none",
        "marker": MARKERS.get(marker.get("symbol", "circle"), "o") if "markers" in mode else "none",
        "markersize": 0.8 * marker.get("size", 6),
        "label": _plain(trace["name"]) if trace.get("name") else None,
    }
    errors = {
        f"{way}err": np.stack([_numbers(trace[f"error_{way}"][end]) for end in ("arrayminus", "array")]).clip(0)
        for way in "xy"
        if f"error_{way}" in trace
    }
    ax.errorbar(x, y, **errors, elinewidth=1, **drawn)
    if "text" in mode:
        for at in zip(x, y, trace["text"], strict=True):
            ax.annotate(_plain(at[2]), at[:2], xytext=(4, 3), textcoords="offset points", fontsize="small")


def _bars(ax: "Axes", trace: Mapping[str, Any], place: int, of: int) -> None:
    names, y, wide = [str(name) for name in trace["x"]], _numbers(trace["y"]), 0.8 / of
    at = np.arange(len(names)) + (place - (of - 1) / 2) * wide
    error = trace.get("error_y")
    spread = None if error is None else np.stack([_numbers(error[end]) for end in ("arrayminus", "array")]).clip(0)
    ax.bar(at, y, wide, color=_colour(trace["marker"]["color"]), label=_plain(trace.get("name", "")), yerr=spread)
    ax.set_xticks(np.arange(len(names)), names)


def _heatmap(ax: "Axes", trace: Mapping[str, Any]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    z = np.array([_numbers(row) for row in trace["z"]])
    colours = LinearSegmentedColormap.from_list("mech", trace["colorscale"])
    limits: dict[str, Any] = {"vmin": trace.get("zmin"), "vmax": trace.get("zmax")}
    image = ax.imshow(z, cmap=colours, aspect="auto", origin="lower", **limits)
    for names, put in ((trace.get("x"), ax.set_xticks), (trace.get("y"), ax.set_yticks)):
        if names is not None and all(isinstance(name, str) for name in names):
            put(range(len(names)), [_plain(name) for name in names])
    title = trace.get("colorbar", {}).get("title", {})
    ax.figure.colorbar(image, ax=ax, label=_plain(title.get("text", "")))


def _shape(ax: "Axes", shape: Mapping[str, Any]) -> None:
    line = shape.get("line", {})
    style = {"color": _colour(line.get("color")), "linewidth": line.get("width", 1)}
    x, y = ([shape.get(f"{axis}{end}", 0.0) for end in (0, 1)] for axis in "xy")
    if shape["type"] == "rect":
        ax.plot([x[0], x[1], x[1], x[0], x[0]], [y[0], y[0], y[1], y[1], y[0]], **style)
    elif shape.get("yref") == "paper":
        ax.axvline(x[0], linestyle=DASHES[line.get("dash", "solid")], **style)
    elif shape.get("xref") == "paper":
        ax.axhline(y[0], linestyle=DASHES[line.get("dash", "solid")], **style)
    else:
        ax.plot(x, y, linestyle=DASHES[line.get("dash", "solid")], **style)


def _axis(ax: "Axes", axis: Any, facts: Mapping[str, Any]) -> None:
    name = axis.axis_name
    log = facts.get("type") == "log"
    if log:
        getattr(ax, f"set_{name}scale")("log")
        axis.set_minor_locator(_nothing())
    axis.set_label_text(_plain(facts.get("title", {}).get("text", "")))
    if "range" in facts:
        ends = [10**end if log else end for end in facts["range"]]
        getattr(ax, f"set_{name}lim")(*ends)
    if "tickvals" in facts:
        values = list(facts["tickvals"])
        axis.set_ticks(values, labels=[_plain(text) for text in facts.get("ticktext", [f"{v:g}" for v in values])])
    elif str(facts.get("tickformat", "")).endswith("%"):
        from matplotlib.ticker import PercentFormatter

        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _nothing() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _numbers(values: Sequence[Any] | None) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values or ()], dtype=float)


def _plain(text: Any) -> str:
    """A plotly label without its tags."""
    return html.unescape(re.sub(r"<(?!br>)[^>]*>", "", str(text)).replace("<br>", "\n"))


def _painted(value: Any, key: str) -> Any:
    """A chart with its colours filled in: ``"@name"`` under a colour key is a variable of the page's style sheet."""
    if isinstance(value, Mapping):
        return {name: _painted(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_painted(inner, key) for inner in value]
    if not isinstance(value, str) or not value.startswith("@") or "color" not in key.lower():
        return value
    colour = _variables()[value[1:]]
    stops = colour.split(", ")
    return [[i / (len(stops) - 1), stop] for i, stop in enumerate(stops)] if key == "colorscale" else colour


@cache
def _variables() -> dict[str, str]:
    """The colours of a white page: the first value of every variable."""
    sheet = files("mech.views.drawing").joinpath("page.css").read_text(encoding="utf-8")
    return dict(reversed(re.findall(r"--([\w-]+): ([^;]+);", sheet)))


def _colour(value: str | None) -> Any:
    """A colour of the style sheet in matplotlib's form."""
    if value is None:
        return "black"
    match = re.fullmatch(r"rgba\((\d+), (\d+), (\d+), ([\d.]+)\)", value)
    return value if match is None else (*(int(match[i]) / 255 for i in (1, 2, 3)), float(match[4]))
