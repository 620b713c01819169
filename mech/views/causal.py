"""Does attention imply causal effect? RAM against causal effect, and sets of heads.

    view = causal_view(report)             # a ``CausalReport``, or its dataset

In the scatter every head is a point: heads on the right attend to the evidence, heads at the top are necessary. Lines
divide it into the four quadrants; heads that matter are labelled. Next to it is what sets of heads cost together and as
the sum of single effects: where the two differ, heads are redundant (or depend on each other).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from mech.experiments.causal.sufficiency import facts_of, redirection_of, sentence_of
from mech.views.drawing.intervals import mean_interval
from mech.views.drawing.page import View, chart, escape, table, tabs
from mech.views.sets import dose_curves

QUADRANTS = {
    "attending and causal": ("@top", "diamond"),
    "attending, not causal": ("@bottom", "square"),
    "causal, not attending": ("@matched", "triangle-up"),
    "neither": ("@random", "circle"),
}
LABELLED = 8  # heads labelled with their name
APART = 0.06  # of the largest effect: smaller ones have no name
ORDERS = {
    "effect": ("greedy, by what is lost", "@top", "solid"),
    "restoring": ("greedy, by what is recovered", "@matched", "dashdot"),
    "ram": ("by RAM", "@bottom", "dash"),
    "random": ("random", "@random", "dot"),
}


def causal_view(result: Any, title: str = "Does attention imply causal effect?") -> View:
    """RAM against causal effect, self-repair and the curves of sets.

    Args:
        result: a ``CausalReport`` or its dataset.
        title: heading of the view, and title of a saved page.
    """
    return View(title, f"<h3>{escape(title)}</h3>{causal_card(getattr(result, 'dataset', result))}", height=900)


def causal_card(data: xr.Dataset, facts: Mapping[str, Any] | None = None) -> str:
    """The pictures of one report; ``facts``, from the summary, add its sentences and its table."""
    even = float(data["even"])
    caption = (
        f"Each point is a head: means over {data.sizes['example']} test samples with 95% intervals; the corrupted "
        f"runs see {escape(data.attrs.get('corruption', 'counterfactuals'))}; labelled: the largest effects. Dotted: "
        f"what even attention would give ({even:.3f}) and the smallest effect that counts "
        f"({float(data.attrs['threshold']):.0%})."
    )
    parts = [
        f'<div class="split"><figure>{_scatter(data)}<figcaption>{caption}</figcaption></figure><figure>'
        f"{_repair(data)}<figcaption>The first heads of the greedy order: what they cost together, and the sum of "
        "what each costs alone. Where the bars differ, single effects mislead.</figcaption></figure></div>"
    ]
    curves = {
        "without them (noising)": _curves(data, "set_lost", "share of the answer lost"),
        "with only them (denoising)": _curves(data, "set_recovered", "share of the answer recovered"),
    }
    parts.append(tabs(curves, "direction"))
    parts.append(_both_ways(data))
    if facts:
        parts.append(_smallest(facts))
        if paths := facts["paths"]:
            parts.append("<ul>" + "".join(f"<li>{escape(path['text'])}</li>" for path in paths) + "</ul>")
    return "".join(parts)


def _scatter(data: xr.Dataset) -> str:
    ram, kind = data["ram"].values, data["quadrant"].values
    sides = _label_sides(data)
    traces = [_points(data, name, sides) for name in QUADRANTS if (kind == name).any()]
    line = {"color": "@soft", "width": 1, "dash": "dot"}
    even, least = float(data["even"]), float(data.attrs["threshold"])
    layout = {
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 12}},
        "margin": {"l": 8, "r": 8, "t": 60, "b": 8},
        "xaxis": {"title": "RAM (attention mass on the evidence)", "range": [0, 1.08 * max(even, float(ram.max()))]},
        "yaxis": {"title": "necessity (share of the gap lost)", "tickformat": ".0%"},
        "shapes": [
            {"type": "line", "x0": even, "x1": even, "y0": 0, "y1": 1, "yref": "paper", "line": line},
            {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": least, "y1": least, "line": line},
        ],
    }
    return chart(traces, layout, height=420, label="RAM of every head against what is lost when it is noised")


def _label_sides(data: xr.Dataset) -> dict[tuple[int, ...], str]:
    """Where to put the names of the heads with the largest effects; those of similar RAM alternate above and below."""
    ram, size = data["ram"].values, np.abs(data["lost"].values)
    best = np.argsort(-size, axis=None)[:LABELLED]
    best = best[size.ravel()[best] > APART * size.max()]  # names of points at the line hide each other
    sides = {}
    for turn, flat in enumerate(sorted(best, key=lambda i: ram.ravel()[i])):
        at = tuple(map(int, np.unravel_index(flat, ram.shape)))
        # Next to the interval, inside the picture.
        sides[at] = f"{('top', 'bottom')[turn % 2]} {'left' if ram[at] > 0.8 * ram.max() else 'right'}"
    return sides


def _points(data: xr.Dataset, name: str, sides: dict[tuple[int, ...], str]) -> dict:
    """The heads of one quadrant, with intervals; those listed in ``sides`` are labelled."""
    heads = [tuple(map(int, at)) for at in np.argwhere(data["quadrant"].values == name)]
    columns = ("ram", "ram_rank", "lost", "lost_low", "lost_high", "recovered")
    ram, rank, lost, low, high, back = (np.array([data[c].values[at] for at in heads]) for c in columns)
    names = [f"L{data['layer'].values[layer]}H{head}" for layer, head in heads]
    colour, symbol = QUADRANTS[name]
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": name,
        "x": ram,
        "y": lost,
        "text": [label if at in sides and name != "neither" else "" for label, at in zip(names, heads, strict=True)],
        "textposition": [sides.get(at, "top right") for at in heads],
        "textfont": {"size": 12},
        "hovertext": [
            f"<b>{label}</b>, {name}<br>RAM {ram[i]:.3f} (rank {rank[i]})<br>"
            f"lost {lost[i]:.1%} [{low[i]:.1%}, {high[i]:.1%}]<br>recovered {back[i]:.1%}"
            for i, label in enumerate(names)
        ],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {"color": colour, "symbol": symbol, "size": 8},
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": high - lost,
            "arrayminus": lost - low,
            "color": colour,
            "thickness": 1,
            "width": 0,
        },
    }


def _repair(data: xr.Dataset) -> str:
    sets = data.sel(order="effect")
    sizes = [str(size) for size in sets["size"].values]
    mean, low, high = mean_interval(sets["set_lost"].transpose("example", "size").values)
    bars = [
        {
            "type": "bar",
            "name": "together",
            "x": sizes,
            "y": mean,
            "marker": {"color": "@top"},
            "error_y": {
                "type": "data",
                "symmetric": False,
                "array": high - mean,
                "arrayminus": mean - low,
                "color": "@ink",
                "thickness": 1,
            },
            "hovertemplate": "%{x} heads together: %{y:.1%}<extra></extra>",
        },
        {
            "type": "bar",
            "name": "sum of single effects",
            "x": sizes,
            "y": sets["set_singles"].values,
            "marker": {"color": "@random"},
            "hovertemplate": "%{x} heads, summed: %{y:.1%}<extra></extra>",
        },
    ]
    layout = {
        "barmode": "group",
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 12}},
        "margin": {"l": 8, "r": 8, "t": 60, "b": 8},
        "xaxis": {"title": "heads", "type": "category"},
        "yaxis": {"title": "share of the gap lost", "tickformat": ".0%"},
    }
    return chart(bars, layout, height=420, label="Effect of sets of heads and the sum of their single effects")


def _curves(data: xr.Dataset, name: str, title: str) -> str:
    values = data[name].transpose("example", "order", "size").values
    orders = [str(order).split()[0] for order in data["order"].values]
    sizes = data["size"].values
    traces = []
    for order, (label, colour, dash) in ORDERS.items():
        chosen = [i for i, member in enumerate(orders) if member == order]
        if not chosen:
            continue
        mean, low, high = mean_interval(values[:, chosen].mean(1))
        hover = [
            f"{k} heads, {label}: {m:.1%} [{a:.1%}, {b:.1%}]" for k, m, a, b in zip(sizes, mean, low, high, strict=True)
        ]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": label,
                "x": sizes,
                "y": mean,
                "hovertext": hover,
                "hovertemplate": "%{hovertext}<extra></extra>",
                "line": {"color": colour, "dash": dash, "width": 2},
                "marker": {"size": 6, "color": colour},
            }
        )
    layout = {
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 12}},
        "margin": {"l": 8, "r": 8, "t": 44, "b": 8},
        "xaxis": {"title": "heads in the set", "type": "log", "tickvals": sizes, "ticktext": [str(s) for s in sizes]},
        "yaxis": {"title": title, "tickformat": ".0%"},
    }
    return chart(traces, layout, height=300, label=f"{title} against the size of the set")


def _both_ways(data: xr.Dataset) -> str:
    """Necessity and sufficiency of the top heads, with their controls, and the dose curves of the pull."""
    facts, found = facts_of(data), redirection_of(data)
    if facts is None or found is None:
        return ""
    named = {"top": f"top of the ranking ({', '.join(facts['heads'])})", "random": f"random, {facts['draws']} sets",
             "all": "all heads"}  # fmt: skip
    rows = [
        [escape(name), _share(facts["lost"][band]), _share(facts["redirected"][band])] for band, name in named.items()
    ]
    rows.append(["none", "", _share(facts["plain"])])
    head = ["heads", "share of the gap lost, noised together (necessary)",
            f"answers that follow a pull of {facts['bias']:g} to a distractor (sufficient)"]  # fmt: skip
    caption = f"{escape(sentence_of(facts))} Intervals: 95%, of random heads over samples and sets."
    return table(head, rows, caption) + tabs(dose_curves(found), "measure")


def _share(bounds: Mapping[str, float]) -> str:
    return f"{bounds['mean']:.0%} [{bounds['low']:.0%}, {bounds['high']:.0%}]"


def _smallest(facts: Mapping[str, Any]) -> str:
    def cell(size: int | None) -> str:
        return "none tried" if size is None else str(size)

    rows = [
        [ORDERS[order][0], cell(facts["smallest"]["lost"][order]), cell(facts["smallest"]["recovered"][order])]
        for order in ORDERS
        if order in facts["smallest"]["lost"]
    ]
    counts = "; ".join(f"{name}: {len(heads)}" for name, heads in facts["quadrants"].items())
    head = ["heads chosen", "smallest set that loses half", "smallest set that recovers 90%"]
    return table(head, rows, f"Heads by kind: {escape(counts)}. The sets were chosen on other samples.")
