"""Ablation curves: what removing heads does, as more of them are removed.

    ablation_curves(dataset)                 # one panel for each method of ablation
    ablation_curves(dataset, "logit_diff")

Lines are the named bands (top, bottom, middle of the ranking, tops by other scores; bars: 95% interval over the
samples). The shade is where random sets of the same number of other heads fall, from the lowest to the highest draw: an
effect inside the shade is no effect of the *ranking*. Layer-matched random sets have as many heads in each layer as the
top set, so they also rule out "those layers matter". Pointing at a set shows which heads it holds. The dotted line is
the unablated model.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from mech.axes import CONDITION, EXAMPLE
from mech.errors import OutputError
from mech.results import with_top_apart
from mech.results.schema import WITH_TOP
from mech.views.drawing.intervals import accuracy_interval, mean_interval
from mech.views.drawing.page import View, chart, escape, tabs

MEASURES = {"accuracy": "accuracy", "logit_diff": "logit difference (right minus wrong)"}
METHODS = {
    "mean": "mean ablation",
    "zero": "zero ablation",
    "resample": "resample ablation",
    "uniform": "uniform attention (causal)",
    "paper": "uniform, future keys too (paper)",
}
BANDS = {
    "top": ("top of the ranking", "diamond", "solid"),
    "bottom": ("bottom", "square", "dash"),
    "middle": ("middle", "triangle-up", "dashdot"),
    "random": ("random sets of other heads (lowest to highest draw)", "circle", "solid"),
    "unneeded": ("random, without heads known to be necessary", "circle", "dash"),
    "unrestricted": ("random from all heads, no top head drawn", "circle", "dashdot"),
    WITH_TOP: ("random from all heads, with top heads", "star", "dashdot"),
    "layer_matched": ("random, same layers as the top", "circle", "dot"),
    "by vision_mass": ("vision heads (attend to any visual token)", "cross", "longdash"),
    "by sink_mass": ("sink heads", "x", "longdashdot"),
}
DRAWN = ("random", "unneeded", "unrestricted", WITH_TOP, "layer_matched")
OVERVIEW = ("top", "random", "layer_matched", "bottom")  # what the overview has room for, each in its own lane
LANE = 15  # pixels
NEAR = 4  # with more rows than this the overview has ticks above as well
COLOURS = {
    "unneeded": "random",
    "unrestricted": "random",
    WITH_TOP: "random",
    "layer_matched": "matched",
    "by vision_mass": "vision",
    "by sink_mass": "sink",
}


@dataclass(frozen=True)
class Effect:
    """One measure under one condition. ``low`` to ``high`` is the interval over samples, or the range over draws."""

    method: str
    band: str
    fraction: float
    n_heads: int
    draws: int
    mean: float
    low: float
    high: float
    heads: str = ""  # which were ablated; for random sets, those of the lowest and of the highest draw


def ablation_curves(result: xr.Dataset, measure: str = "", title: str = "Ablation of heads") -> View:
    """Curves of the measure against the share of heads ablated, a panel for each method.

    Args:
        result: the dataset of ``ablation``: ``accuracy`` and ``logit_diff`` [condition, example].
        measure: one of the two; empty for both, with a switch.
        title: heading of the view, and title of a saved page.
    """
    known = [name for name in MEASURES if name in result]
    if measure and measure not in known:
        raise OutputError(f"measure {measure!r}", f"one of {known}", "leave it out to see all")
    shown = [measure] if measure else known
    by_measure = {name: effects(result, name) for name in shown}
    panels = {MEASURES[name].split(" (")[0]: method_panels(by_measure[name], name) for name in shown}
    body = f"<h3>{escape(title)}</h3>{legend(by_measure[shown[0]])}{tabs(panels, 'measure')}"
    return View(title, body, height=170 + 330 * -(-len(methods(by_measure[shown[0]])) // 3))


def effects(result: xr.Dataset, measure: str) -> list[Effect]:
    """Every (method, band, share) of the dataset once, with the draws of a random band merged; the baseline first."""
    missing = [name for name in (measure, "method", "band", "fraction", "n_heads") if name not in result.variables]
    if missing or not {CONDITION, EXAMPLE} <= set(result[measure].dims):
        raise OutputError(
            f"an ablation result without {missing or [CONDITION, EXAMPLE]}",
            "variables [condition, example] with coordinates method, band, fraction, n_heads, draw",
            "pass what ablation returned",
        )
    result = with_top_apart(result)
    values = result[measure].transpose(EXAMPLE, CONDITION).values.astype(float)
    means, lows, highs = accuracy_interval(values) if measure == "accuracy" else mean_interval(values)
    names = result["heads"].values.astype(str).tolist() if "heads" in result.coords else [""] * len(means)
    groups: dict[tuple[str, str, float, int], list[int]] = {}
    columns = [result[name].values.tolist() for name in ("method", "band", "fraction", "n_heads")]
    for i, (method, band, fraction, n_heads) in enumerate(zip(*columns, strict=True)):
        groups.setdefault((str(method), str(band), float(fraction), int(n_heads)), []).append(i)
    measured = []
    for (method, band, fraction, n_heads), members in groups.items():
        mean = float(np.median(means[members]))
        low, high = (lows[members[0]], highs[members[0]])
        heads = wrapped(names[members[0]])
        if band in DRAWN or len(members) > 1:
            least, most = members[means[members].argmin()], members[means[members].argmax()]
            low, high = means[least], means[most]
            heads = f"lowest: {wrapped(names[least])}<br>highest: {wrapped(names[most])}" if names[least] else ""
        measured.append(Effect(method, band, fraction, n_heads, len(members), mean, float(low), float(high), heads))
    return measured


def wrapped(heads: str, a_line: int = 8) -> str:
    """Names of heads for a tooltip, several per line."""
    names = escape(heads).split()
    return "<br>".join(", ".join(names[i : i + a_line]) for i in range(0, len(names), a_line))


def baseline(effects: Sequence[Effect]) -> Effect | None:
    return next((effect for effect in effects if effect.method == "none"), None)


def methods(effects: Sequence[Effect]) -> list[str]:
    """The methods present, in the order of METHODS."""
    there = dict.fromkeys(effect.method for effect in effects if effect.method != "none")
    return [m for m in METHODS if m in there] + [m for m in there if m not in METHODS]


def in_order(bands: Iterable[str]) -> list[str]:
    """The bands present, each once, in the order of BANDS; the unablated model is not one."""
    there = dict.fromkeys(band for band in bands if band != "none")
    return [band for band in BANDS if band in there] + [band for band in there if band not in BANDS]


def looks_like(band: str) -> tuple[str, str, str]:
    """Name, marker and dash of a band; a ranking by any score can be one."""
    return BANDS.get(band, (f"top {band}", "star", "longdash"))


def legend(effects: Sequence[Effect]) -> str:
    """One legend for all panels."""
    items = [_key("none", "unablated model", "dot")] if baseline(effects) else []
    there = {effect.band for effect in effects}
    items += [_key(band, looks_like(band)[0], looks_like(band)[2]) for band in in_order(there)]
    return f'<ul class="legend">{"".join(items)}</ul>'


def method_panels(effects: Sequence[Effect], measure: str) -> str:
    """A small chart for each method, all on one scale."""
    span = _span(effects, measure)
    return f'<div class="multiples">{"".join(_panel(effects, m, measure, span) for m in methods(effects))}</div>'


def overview(settings: Mapping[str, Sequence[Effect]], method: str, fraction: float) -> str:
    """One row per setting (a model on a domain): the whole model, and without its top, random and bottom heads."""
    lanes = [
        band for band in OVERVIEW if any(effect.band == band for effects in settings.values() for effect in effects)
    ]
    traces = []
    for band in (*lanes, "none"):
        picked = [(row, nearest(effects, method, band, fraction)) for row, effects in enumerate(settings.values())]
        there = [(row, effect) for row, effect in picked if effect is not None]
        if there:
            traces.append(_dots(there, band, lanes))
    rows = range(len(settings))
    lines = [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": r + 0.5, "y1": r + 0.5} for r in rows[:-1]]
    axis = {"title": "accuracy", "range": [-0.03, 1.03], "tickformat": ".0%", "zeroline": False}
    layout = {
        "xaxis": axis,
        "yaxis": {
            "range": [len(settings) - 0.5, -0.5],
            "tickvals": list(rows),
            "ticktext": [escape(name).replace(" · ", "<br>") for name in settings],
            "showgrid": False,
            "zeroline": False,
        },
        "shapes": [line | {"line": {"color": "@rule", "width": 1}} for line in lines],
    }
    if len(settings) > NEAR:  # ticks above as well: the ones below are too far from the first rows
        layout["xaxis2"] = {"overlaying": "x", "side": "top", "range": axis["range"], "tickformat": ".0%",
                            "showgrid": False, "zeroline": False, "fixedrange": True}  # fmt: skip
        traces.append({"type": "scatter", "x": [None], "y": [None], "xaxis": "x2", "hoverinfo": "skip"})
    label = f"Accuracy in every setting without the top {fraction:.0%} of heads, against controls"
    return chart(traces, layout, height=(LANE * len(lanes) + 14) * len(settings) + 80, label=label)


def overview_legend(effects: Sequence[Effect]) -> str:
    """The legend of the overview's rows, drawn with their symbols."""
    there = {effect.band for effect in effects}
    bar = '<svg viewBox="0 0 30 14" aria-hidden="true"><path d="M15 0V14" stroke="var(--none)" stroke-width="2"/></svg>'
    items = [f"<li>{bar}unablated model</li>"] if baseline(effects) else []
    items += [_key(band, looks_like(band)[0], "solid") for band in OVERVIEW if band in there]
    return f'<ul class="legend">{"".join(items)}</ul>'


def nearest(effects: Sequence[Effect], method: str, band: str, fraction: float) -> Effect | None:
    """The effect of a band whose share of heads is nearest; the baseline for band "none"."""
    if band == "none":
        return baseline(effects)
    there = [effect for effect in effects if effect.method == method and effect.band == band]
    return min(there, key=lambda effect: abs(effect.fraction - fraction), default=None)


def _dots(there: list[tuple[int, Effect]], band: str, lanes: Sequence[str]) -> dict:
    colour = f"@{_colour(band)}"
    drawn = band in DRAWN
    whole = LANE * len(lanes) + 14  # height of a row: a lane for each band, and the unablated model across all of them
    offset = (lanes.index(band) - (len(lanes) - 1) / 2) * LANE / whole if band in lanes else 0.0
    symbol, size = (looks_like(band)[1], 6 if drawn else 10) if band in lanes else ("line-ns-open", (whole - 10) / 1.4)
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [effect.mean for _, effect in there],
        "y": [row + offset for row, _ in there],
        "text": [_says(effect, "accuracy") for _, effect in there],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"symbol": symbol, "size": size, "color": colour, "line": {"width": 0 if band in lanes else 2}},
        "cliponaxis": False,
    }
    if band in lanes:
        trace["error_x"] = {
            "type": "data",
            "symmetric": False,
            "array": np.array([effect.high - effect.mean for _, effect in there]),
            "arrayminus": np.array([effect.mean - effect.low for _, effect in there]),
            "color": f"{colour}-soft" if drawn else colour,
            "thickness": 10 if drawn else 1.5,
            "width": 0,
        }
    else:
        trace["marker"]["line"]["color"] = colour
    return trace


def _panel(effects: Sequence[Effect], method: str, measure: str, span: tuple[float, float]) -> str:
    traces: list[dict] = []
    shares = sorted({effect.fraction for effect in effects if effect.method == method})
    base = baseline(effects)
    if base is not None and shares:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [shares[0], shares[-1]],
                "y": [base.mean, base.mean],
                "line": {"color": "@none", "width": 1.5, "dash": "dot"},
                "hovertemplate": f"{_says(base, measure)}<extra></extra>",
            }
        )
    # Shades first, so that the lines lie over them; the top of the ranking last, over everything.
    for band in sorted(in_order(effect.band for effect in effects)[::-1], key=lambda band: band not in DRAWN):
        line = sorted((e for e in effects if e.method == method and e.band == band), key=lambda e: e.fraction)
        if line:
            traces += _shade(line, band) if band in DRAWN else []
            traces.append(_line(line, band, measure))
    ticks = _ticks(shares)
    layout = {
        "xaxis": {
            "type": "log",
            "title": "share of all heads ablated (log scale)",
            "tickvals": ticks,
            "ticktext": [_percent(share) for share in ticks],
            "tickangle": 0,
            "showgrid": False,
        },
        "yaxis": {
            "title": MEASURES[measure].split(" (")[0],
            "range": list(span),
            "zeroline": measure != "accuracy",
            **({"tickformat": ".0%"} if measure == "accuracy" else {}),
        },
    }
    name = METHODS.get(method, method)
    plot = chart(traces, layout, height=285, label=f"{MEASURES[measure]} against the share of heads ablated, {name}")
    return f"<figure><h4>{escape(name[:1].upper() + name[1:])}</h4>{plot}</figure>"


def _line(line: list[Effect], band: str, measure: str) -> dict:
    name, symbol, dash = looks_like(band)
    colour = f"@{_colour(band)}"
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escape(name),  # for matplotlib's legend; the page has one for all panels
        "x": [effect.fraction for effect in line],
        "y": [effect.mean for effect in line],
        "text": [_says(effect, measure) for effect in line],
        "hovertemplate": "%{text}<extra></extra>",
        "line": {"color": colour, "width": 1.5 if band in DRAWN else 2.5, "dash": dash},
        "marker": {"symbol": symbol, "size": 4 if band in DRAWN else 8, "color": colour},
    }
    if band not in DRAWN:
        trace["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": np.array([effect.high - effect.mean for effect in line]),
            "arrayminus": np.array([effect.mean - effect.low for effect in line]),
            "color": colour,
            "thickness": 1,
            "width": 3,
        }
    return trace


def _shade(line: list[Effect], band: str) -> list[dict]:
    colour = _colour(band)
    edge = {"type": "scatter", "mode": "lines", "x": [effect.fraction for effect in line], "hoverinfo": "skip"}
    edge["line"] = {"width": 0}
    low = edge | {"y": [effect.low for effect in line]}
    return [low, edge | {"y": [effect.high for effect in line], "fill": "tonexty", "fillcolor": f"@{colour}-soft"}]


def _says(effect: Effect, measure: str) -> str:
    """The tooltip of an effect."""
    shown = (lambda v: f"{v:.1%}") if measure == "accuracy" else (lambda v: f"{v:.2f}")
    span = f"{shown(effect.low)} to {shown(effect.high)}" if np.isfinite(effect.low) else "one sample"
    if effect.method == "none":
        return f"<b>unablated</b><br>{measure.replace('_', ' ')} {shown(effect.mean)}<br>95% interval {span}"
    heads = f"{effect.n_heads} head{'s' if effect.n_heads > 1 else ''} ({_percent(effect.fraction)})"
    name = escape(looks_like(effect.band)[0].split(" (")[0])
    if effect.band in DRAWN or effect.draws > 1:
        text = f"median of {effect.draws} draws {shown(effect.mean)}<br>draws from {span}"
    else:
        text = f"{measure.replace('_', ' ')} {shown(effect.mean)}<br>95% interval over samples {span}"
    return f"<b>{name}</b>, {heads}<br>{text}" + (f"<br>{effect.heads}" if effect.heads else "")


def _span(effects: Sequence[Effect], measure: str) -> tuple[float, float]:
    if measure == "accuracy":
        return (-0.03, 1.05)
    ends = [value for e in effects for value in (e.low, e.mean, e.high) if np.isfinite(value)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    room = 0.05 * (high - low or 1.0)
    return (low - room, high + room)


def _ticks(shares: Sequence[float]) -> list[float]:
    """The shares that were measured, without those whose labels would touch the next one on the right."""
    ticks: list[float] = []
    span = np.log10(shares[-1] / shares[0]) if len(shares) > 1 else 1.0
    for share in reversed(shares):
        if not ticks or np.log10(ticks[-1] / share) > 0.13 * span:
            ticks.append(share)
    return ticks[::-1]


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%" if share < 0.1 else f"{100 * share:.0f}%"


def _colour(band: str) -> str:
    """The band's variable in page.css."""
    return COLOURS.get(band, band) if band in BANDS or band == "none" else "ink"


def _key(band: str, name: str, dash: str) -> str:
    colour = _colour(band)
    lines = {
        "solid": "",
        "dash": "6 4",
        "dot": "2 3",
        "dashdot": "7 3 2 3",
        "longdash": "9 3",
        "longdashdot": "9 3 2 3",
    }
    shapes = {
        "diamond": "M15 1L21 7L15 13L9 7Z",
        "square": "M10 2H20V12H10Z",
        "triangle-up": "M15 1L21 12H9Z",
        "circle": "M12 7a3 3 0 1 0 6 0a3 3 0 1 0 -6 0Z",
        "cross": "M13 1H17V5H21V9H17V13H13V9H9V5H13Z",
        "x": "M11 1L15 5L19 1L21 3L17 7L21 11L19 13L15 9L11 13L9 11L13 7L9 3Z",
        "star": "M15 0L17 5L22 5L18 8L20 13L15 10L10 13L12 8L8 5L13 5Z",
    }
    shade = f'<rect width="30" height="14" fill="var(--{colour}-soft)"/>' if band in DRAWN else ""
    mark = f'<path d="{shapes[looks_like(band)[1]]}" fill="var(--{colour})"/>' if band != "none" else ""
    stroke = f'stroke="var(--{colour})" stroke-width="2" stroke-dasharray="{lines[dash]}"'
    picture = f'<svg viewBox="0 0 30 14" aria-hidden="true">{shade}<path d="M0 7H30" {stroke}/>{mark}</svg>'
    return f"<li>{picture}{escape(name)}</li>"
