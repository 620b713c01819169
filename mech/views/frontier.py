"""Accuracy, memory and speed of sparse inference, for several ways to choose the dense heads; training for sparsity.

    view = frontier_view(found)               # what ``mech.acceleration`` returned
    view = sparsity_view(runs)                # what ``mech.reference.sparsity_runs`` returned

The first chart shows accuracy against the share of KV heads that stay dense, a line for each choice; the shade is where
random sets of the same size fall, the dotted line the dense model, the dashed line the window alone. A line matters
where it leaves the shade. The second shows what those shares cost: the cache as counted and as measured. The third
shows how many times faster than dense they are, as measured, with the bound. The star is the recommended setting; the
interval of its loss is in its tooltip.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import xarray as xr

from mech.experiments.findings.acceleration import MARGIN, NAMES, sentences, summarise
from mech.sparse.training.compared import MEASURES, Measure, compared
from mech.sparse.training.compared import sentences as sentences_of_training
from mech.views.drawing.page import View, chart, escape, table

# choice: colour, symbol, dash
LINES = {
    "ram": ("@top", "diamond", "solid"),
    "gates": ("@middle", "triangle-up", "dashdot"),
    "causal": ("@bottom", "square", "dash"),
    "reach": ("@matched", "circle", "longdash"),
    "dynamic": ("@matched", "star-triangle-up", "solid"),
    "layers": ("@bottom", "hexagon", "dot"),
    "vision": ("@soft", "cross", "dot"),
    "bottom": ("@soft", "x", "dot"),
}
NAMED, A_LINE = 16, 4  # heads named in a tooltip, and on one line of it
WINDOW_AT = 0.5  # the axis begins at half of the smallest share: a log scale has no zero


def frontier_view(
    result: xr.Dataset, title: str = "How few heads need to see everything?", margin: float = MARGIN
) -> View:
    """The pictures of one acceleration result.

    Args:
        result: what ``mech.acceleration`` returned or a study saved.
        title: heading of the view, and title of a saved page.
        margin: the loss of accuracy that the recommended setting stays below.
    """
    facts = summarise(result, margin)
    sentences_html = "".join(f"<li>{escape(text)}</li>" for _, text, _ in sentences(facts))
    return View(title, f"<h3>{escape(title)}</h3>{frontier_card(facts)}<ul>{sentences_html}</ul>", height=900)


def frontier_card(facts: Mapping[str, Any]) -> str:
    """The pictures and the table of one model, from the numbers of the summary."""
    curve, n = facts["curve"], facts["n_kv_heads"]
    local = f"{facts['sinks']} + {facts['window']} of {facts['length']} tokens"
    caption = (
        f"{facts['n_test']} test samples; bars: 95% intervals. The other heads see the first and the nearest tokens "
        f"({local}). At a given share all choices have the same cost."
    )
    parts = [f"{_legend(facts)}<figure>{_accuracy(facts)}<figcaption>{caption}</figcaption></figure>"]
    if facts["speed"]:
        left = "Cache of the text stack at the end of the prompt, and the attention work of prefill."
        right = "Text stack alone, on this machine, when the study was run. Dotted: the bound from attention alone."
        parts.append(
            f'<div class="split even"><figure>{_memory(facts)}<figcaption>{left}</figcaption></figure>'
            f"<figure>{_speed(facts)}<figcaption>{right}</figcaption></figure></div>"
        )
    parts.append(_recommended(facts))
    rows = [
        [
            escape(NAMES[point["choice"]]), f"{point['n_kv_heads']} <small>({point['n_kv_heads'] / n:.0%})</small>",
            _with(point["accuracy"], 100), _with(point["loss"], 100),
            f"{point['flops']:.0%}", f"{point['kv_bytes']:.0%}",
        ]
        for point in curve
    ]  # fmt: skip
    head = ["dense heads chosen by", "KV heads", "accuracy, %", "loss, points", "attention work", "cache"]
    parts.append(f"<details><summary>All settings as a table</summary>{table(head, rows)}</details>")
    return "".join(parts)


def _accuracy(facts: Mapping[str, Any]) -> str:
    shares = sorted({point["share"] for point in facts["curve"]})
    first, last = shares[0] * WINDOW_AT, shares[-1] * 1.15
    traces = _random(facts, shares)
    for choice, (colour, symbol, dash) in reversed(LINES.items()):
        line = sorted(
            (point for point in facts["curve"] if point["choice"] == choice), key=lambda point: point["share"]
        )
        if line:
            traces.append(_line(line, NAMES[choice], colour, symbol, dash))
    for name, entry, dash in (
        ("dense", facts["dense"], "dot"),
        ("window alone", facts["window_only"]["accuracy"], "dash"),
    ):
        says = f"<b>{name}</b><br>accuracy {entry['mean']:.1%} [{entry['low']:.1%}, {entry['high']:.1%}]<extra></extra>"
        traces.append(
            {"type": "scatter", "mode": "lines", "x": [first, last], "y": [entry["mean"]] * 2, "hovertemplate": says,
             "line": {"color": "@none", "width": 1.5, "dash": dash}}
        )  # fmt: skip
    best = facts["recommended"]
    if best is not None:
        traces.append(_star(best, max(best["share"], first)))
    layout = {
        "xaxis": {
            "type": "log", "title": "share of KV heads that stay dense (log scale)", "tickvals": shares,
            "ticktext": [f"{share:.0%}" if share >= 0.1 else f"{100 * share:.2g}%" for share in shares],
            "showgrid": False, "range": [float(np.log10(first)), float(np.log10(last))],
        },
        "yaxis": {"title": "accuracy", "range": [-0.03, 1.05], "tickformat": ".0%", "zeroline": False},
    }  # fmt: skip
    return chart(traces, layout, height=380, label="Accuracy against the share of KV heads that stay dense, by choice")


def _random(facts: Mapping[str, Any], shares: Sequence[float]) -> list[dict]:
    """The shade where random sets fall: the interval over samples and sets."""
    line = sorted((point for point in facts["curve"] if point["choice"] == "random"), key=lambda point: point["share"])
    if not line:
        return []
    x = [point["share"] for point in line]
    edge = {"type": "scatter", "mode": "lines", "x": x, "hoverinfo": "skip", "line": {"width": 0}}
    return [
        edge | {"y": [point["accuracy"]["low"] for point in line]},
        edge | {"y": [point["accuracy"]["high"] for point in line], "fill": "tonexty", "fillcolor": "@random-soft"},
        _line(line, "random sets", "@random", "circle", "solid", bars=False),
    ]


def _line(line: Sequence[Mapping[str, Any]], name: str, colour: str, symbol: str, dash: str, bars: bool = True) -> dict:
    text = [
        f"<b>{escape(name)}</b>, {point['n_kv_heads']} KV heads<br>accuracy {point['accuracy']['mean']:.1%} "
        f"[{point['accuracy']['low']:.1%}, {point['accuracy']['high']:.1%}]"
        + (f"<br>mean of {point['draws']} sets" if point["draws"] > 1 else "")
        + (f"<br>dense: {_named(point['heads'])}" if point.get("heads") else "")
        for point in line
    ]
    trace: dict[str, Any] = {
        "type": "scatter", "mode": "lines+markers", "x": [point["share"] for point in line],
        "y": [point["accuracy"]["mean"] for point in line], "text": text, "hovertemplate": "%{text}<extra></extra>",
        "line": {"color": colour, "width": 2.5 if symbol == "diamond" else 1.5, "dash": dash},
        "marker": {"symbol": symbol, "size": 9 if bars else 4, "color": colour},
    }  # fmt: skip
    if symbol == "diamond":  # only one line has bars: seven would hide each other, and the table has all intervals
        trace["error_y"] = {
            "type": "data", "symmetric": False, "color": colour, "thickness": 1, "width": 3,
            "array": np.array([point["accuracy"]["high"] - point["accuracy"]["mean"] for point in line]),
            "arrayminus": np.array([point["accuracy"]["mean"] - point["accuracy"]["low"] for point in line]),
        }  # fmt: skip
    return trace


def _named(heads: str) -> str:
    """The first heads of a set, a few per line, and how many more there are."""
    names = heads.split()
    lines = [", ".join(names[i : i + A_LINE]) for i in range(0, min(len(names), NAMED), A_LINE)]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return escape(",\n".join(lines) + more).replace("\n", "<br>")


def _star(best: Mapping[str, Any], x: float) -> dict:
    says = f"<b>recommended</b>: {best['n_kv_heads']} KV heads<br>loss {_with(best['loss'], 100, plain=True)} points"
    says += f"<br>dense: {_named(best['heads'])}" if best.get("heads") else ""
    return {
        "type": "scatter", "mode": "markers", "x": [x], "y": [best["accuracy"]["mean"]],
        "hovertemplate": f"{says}<extra></extra>",
        "marker": {"symbol": "star-open", "size": 22, "color": "@ink", "line": {"width": 2}},
    }  # fmt: skip


def _memory(facts: Mapping[str, Any]) -> str:
    entries = [facts["window_only"], *(point for point in facts["curve"] if point["choice"] == "ram")]
    counted = {point["share"]: point for point in entries}
    shares = [point["share"] for point in facts["speed"] if point["share"] in counted]
    names = [_share(share) for share in shares]
    measured = {point["share"]: point["kv_measured"] for point in facts["speed"]}
    traces = [
        _bars("cache, counted", "@bottom", names, [counted[share]["kv_bytes"] for share in shares]),
        _bars("cache, measured", "@middle", names, [measured[share] for share in shares]),
        _bars("attention work", "@random", names, [counted[share]["flops"] for share in shares]),
    ]
    layout = {
        "barmode": "group", "xaxis": {"title": "KV heads that stay dense", "type": "category"},
        "yaxis": {"title": "share of dense", "tickformat": ".0%", "range": [0, 1.02]}, **_LEGEND,
    }  # fmt: skip
    return chart(traces, layout, height=330, label="Cache bytes and attention work relative to the dense model")


def _speed(facts: Mapping[str, Any]) -> str:
    speeds, traces = facts["speed"], []
    names, ticks = [_share(timed["share"]) for timed in speeds], [2.0**power for power in range(-4, 9)]
    kinds = (("prefill", "prefill", "@top", "diamond"), ("decode", "decoding", "@middle", "triangle-up"))
    for kind, label, colour, symbol in kinds:
        middle = np.array([timed[kind]["mean"] for timed in speeds])
        traces.append(
            {
                "type": "scatter", "mode": "lines+markers", "name": label, "x": names, "y": middle,
                "hovertemplate": f"{label}: %{{y:.2f}}x<extra></extra>",
                "line": {"color": colour, "width": 2}, "marker": {"color": colour, "symbol": symbol, "size": 9},
                "error_y": {
                    "type": "data", "symmetric": False, "color": colour, "thickness": 1, "width": 3,
                    "array": np.array([timed[kind]["high"] for timed in speeds]) - middle,
                    "arrayminus": middle - np.array([timed[kind]["low"] for timed in speeds]),
                },
            }
        )  # fmt: skip
        traces.append(
            {"type": "scatter", "mode": "lines", "name": f"{label}, bound", "x": names,
             "y": [timed[f"{kind}_bound"] for timed in speeds], "line": {"color": colour, "width": 1.5, "dash": "dot"},
             "hovertemplate": f"{label}, bound from attention: %{{y:.1f}}x<extra></extra>"}
        )  # fmt: skip
    layout = {
        "xaxis": {"title": "KV heads that stay dense", "type": "category"},
        "yaxis": {
            "title": "times as fast as dense (log scale)", "type": "log", "tickvals": ticks,
            "ticktext": [f"{tick:g}x" for tick in ticks],
        },
        "shapes": [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 1, "y1": 1,
                    "line": {"color": "@none", "width": 1}}],
        **_LEGEND,
    }  # fmt: skip
    return chart(traces, layout, height=330, label="Measured speed of prefill and decoding, with the bounds")


_LEGEND = {
    "showlegend": True,
    "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 12}},
    "margin": {"l": 8, "r": 8, "t": 60, "b": 8},
}


def _bars(name: str, colour: str, x: Sequence[str], y: Sequence[float]) -> dict:
    return {"type": "bar", "name": name, "x": list(x), "y": list(y), "marker": {"color": colour},
            "hovertemplate": f"{name}: %{{y:.1%}}<extra></extra>"}  # fmt: skip


def _recommended(facts: Mapping[str, Any]) -> str:
    best, margin = facts["recommended"], f"{100 * facts['margin']:.0f} points"
    if best is None:
        return f"<p><b>No recommended setting:</b> no share tried is shown to lose less than {margin}.</p>"
    what = (
        "no KV head" if not best["n_kv_heads"] else f"{best['n_kv_heads']} of {facts['n_kv_heads']} KV heads, by RAM,"
    )
    enough = [f"{NAMES[choice]} {_share(share)}" for choice, share in facts["enough"].items() if share is not None]
    others = f" Smallest sufficient share, by choice: {escape(', '.join(enough))}." if enough else ""
    return (
        f"<p><b>Recommended:</b> {what} dense: a loss of {_with(best['loss'], 100)} points, {best['kv_bytes']:.0%} of "
        f"the cache. This is the smallest share whose loss interval lies below {margin}.{others}</p>"
    )


def _share(share: float) -> str:
    return "none" if not share else f"{100 * share:.2g}%"


def _with(value: Mapping[str, float] | None, scale: float = 1.0, plain: bool = False) -> str:
    if value is None:
        return "–"
    mean, low, high = (f"{scale * value[name] + 0.0:.0f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]" if plain else f"{mean} <small>[{low}, {high}]</small>"


def _legend(facts: Mapping[str, Any]) -> str:
    there = {point["choice"] for point in facts["curve"]}
    items = [_key("@none", "", "dot", "dense model"), _key("@none", "", "dash", "window alone")]
    items += [_key(*LINES[choice], NAMES[choice]) for choice in LINES if choice in there]
    if "random" in there:
        items.append(_key("@random", "circle", "solid", "random sets (shaded: 95% interval)", shade=True))
    return f'<ul class="legend">{"".join(items)}</ul>'


_DASHES = {"solid": "", "dash": "6 4", "dot": "2 3", "dashdot": "7 3 2 3", "longdash": "10 3"}
_SHAPES = {
    "diamond": "M15 1L21 7L15 13L9 7Z", "square": "M10 2H20V12H10Z", "triangle-up": "M15 1L21 12H9Z",
    "circle": "M11 7a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z", "cross": "M13 2H17V5H20V9H17V12H13V9H10V5H13Z",
    "x": "M10 3L12 1L15 4L18 1L20 3L17 7L20 11L18 13L15 10L12 13L10 11L13 7Z",
    "hexagon": "M15 1L20 4V10L15 13L10 10V4Z", "star-triangle-up": "M15 1L17 8L21 12L15 10L9 12L13 8Z",
}  # fmt: skip


def _key(colour: str, symbol: str, dash: str, name: str, shade: bool = False) -> str:
    paint = f"var(--{colour.removeprefix('@')})"
    band = '<rect width="30" height="14" fill="var(--random-soft)"/>' if shade else ""
    mark = f'<path d="{_SHAPES[symbol]}" fill="{paint}"/>' if symbol else ""
    line = f'<path d="M0 7H30" stroke="{paint}" stroke-width="2" stroke-dasharray="{_DASHES[dash]}"/>'
    return f'<li><svg viewBox="0 0 30 14" aria-hidden="true">{band}{line}{mark}</svg>{escape(name)}</li>'


COLOURS = ("@top", "@bottom", "@middle", "@matched", "@random")
SYMBOLS = ("diamond", "square", "triangle-up", "star", "x", "circle", "cross", "triangle-down")
PANELS = (
    ("KV heads needed, by RAM", "RAM vs effect (Spearman)"),
    ("attention outside sinks and window", "unfaithfulness of small circuits (CMD)"),
)


def sparsity_view(
    runs: Mapping[str, Mapping[str, Any]], size: str = "llava-s", title: str = "Does training for sparsity buy both?"
) -> View:
    """Efficiency against interpretability: a point for each seed of each objective, and every measure in a table.

    Args:
        runs: what ``mech.reference.sparsity_runs`` returned.
        size: which of the model sizes in it to show.
        title: heading of the view, and title of a saved page.
    """
    mine = [run for run in runs.values() if run["size"] == size]
    rows = [row for row in compared(runs) if row.size == size and row.values]
    arms = list(dict.fromkeys(run["arm"] for run in mine))
    by_name = {measure.name: measure for measure in MEASURES}
    figures = "".join(
        f"<figure>{_plane(mine, arms, by_name[x], by_name[y], legend=i == 0)}</figure>"
        for i, (x, y) in enumerate(PANELS)
    )
    caption = (
        "One point per seed; the control is hollow. Better is to the left; up in the first chart, down in the second."
    )
    cells = [
        [escape(row.measure.side), escape(row.measure.name), escape(row.arm), _values(row.control), _values(row.values),
         f"{row.difference:+.3g} <small>[{row.low:+.3g}, {row.high:+.3g}]</small>", row.verdict]
        for row in rows
    ]  # fmt: skip
    head = ["side", "measure", "objective", "control, by seed", "trained, by seed", "difference [95%]", "verdict"]
    said = "".join(f"<li>{escape(text)}</li>" for text in sentences_of_training(rows))
    page = f'<h3>{escape(title)}</h3><div class="split even">{figures}</div><p>{caption}</p><ul>{said}</ul>'
    return View(title, f"{page}<details><summary>All measures</summary>{table(head, cells)}</details>", height=760)


def _values(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def _plane(runs: Sequence[Mapping[str, Any]], arms: Sequence[str], x: Measure, y: Measure, legend: bool) -> str:
    traces = []
    for arm, colour, symbol in zip(arms, cycle(COLOURS), cycle(SYMBOLS), strict=False):
        points = [(x.of(run), y.of(run), run["seed"]) for run in runs if run["arm"] == arm]
        points = [point for point in points if None not in point[:2]]
        hollow = "-open" if arm == "control" else ""
        traces.append(
            {"type": "scatter", "mode": "markers", "name": arm, "x": [point[0] for point in points],
             "y": [point[1] for point in points], "text": [f"{escape(arm)}, seed {point[2]}" for point in points],
             "hovertemplate": "%{text}<br>%{x:.3g}, %{y:.3g}<extra></extra>", "showlegend": legend,
             "marker": {"size": 11, "color": colour, "symbol": symbol + hollow, "line": {"width": 2, "color": colour}}}
        )  # fmt: skip
    layout = {"xaxis": {"title": x.name, "rangemode": "tozero"}, "yaxis": {"title": y.name}, "showlegend": legend,
              "legend": {"orientation": "h", "y": 1.12}}  # fmt: skip
    return chart(traces, layout, height=380, label=f"{y.name} against {x.name}, a point for each seed")
