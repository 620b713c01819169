"""Agreement: do two scores, two domains, pictures and text, or two sizes of a model, find the same heads?

Matrices are tables, so that they can be read, copied and read aloud; the browser mixes their shades from the page's
colours. The depth profile lays models of different size over each other: the share of all RAM in each layer, against
relative depth. The sample curve says how many samples a ranking needs.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from mech.views.drawing.page import View, chart, escape, table, tabs, tabular

BESIDE = 5  # up to this many names two matrices stand side by side
LINES = ("@top", "@bottom", "@middle", "@matched", "@random", "@accent")
SYMBOLS = ("diamond", "square", "triangle-up", "circle", "x", "star")
# On which forms ``modality_transfer`` found heads at the top.
ORIGINS = {
    "on text before, and on pictures": ("@top", "diamond"),
    "on pictures only": ("@matched", "triangle-up"),
    "on text only": ("@bottom", "square"),
    "neither": ("@random", "circle"),
}
LABELLED = 12  # heads labelled with their name


def matrix(
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    caption: str,
    null: Any = None,
    interval: Any = None,
    columns: Sequence[str] | None = None,
) -> str:
    """A matrix as a shaded table; without ``columns`` it is symmetric, and its diagonal has no small print.

    In small print under each value: its ``interval`` (low and high, as matrices) and ``null``, the value by chance.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in columns or names)
    rows = []
    for i, name in enumerate(names):
        cells = []
        for j in range(len(columns or names)):
            value = values[i][j]
            if value is None or not math.isfinite(value):
                cells.append("<td>–</td>")
                continue
            shade = f"--v:{min(abs(value), 1):.2f};--shade:var(--{'minus' if value < 0 else 'plus'})"
            told = columns is not None or i != j
            by_chance = null[i][j] if null is not None and told else None
            chance = "" if by_chance is None else f"<small>chance {by_chance:.2f}</small>"
            ends = [end[i][j] for end in interval] if interval is not None and told else [None]
            if all(end is not None and math.isfinite(end) for end in ends):
                chance = f"<small>{ends[0]:.2f} to {ends[1]:.2f}</small>{chance}"
            cells.append(f'<td style="{shade}">{value:.2f}{chance}</td>')
        rows.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>")
    body = f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return tabular(f'<table class="matrix">{body}</table>', escape(caption))


def domain_agreement(agreement: Mapping[str, Any], what: str = "RAM") -> str:
    """Rank correlation and overlap of the top heads, for the domains of one model or for several scores ("names")."""
    names = agreement.get("domains") or agreement["names"]
    between = {name: [agreement[f"{name}_{end}"] for end in ("low", "high")] if f"{name}_low" in agreement else None
               for name in ("spearman", "jaccard")}  # fmt: skip
    caption = f"Spearman correlation of whole {what} maps".replace("  ", " ")
    spearman = matrix(names, agreement["spearman"], caption, interval=between["spearman"])
    null, top = agreement.get("jaccard_null"), agreement.get("n_top")
    caption = f"Jaccard overlap of the top {'' if top is None else f'{top} '}heads"
    wide = len(names) > BESIDE
    if wide and null is not None:  # chance is the same for all pairs: it is stated once
        null, caption = None, f"{caption}; by chance {null[0][1]:.2f}"
    jaccard = matrix(names, agreement["jaccard"], caption, null, between["jaccard"])
    if wide:
        return tabs({"whole maps": spearman, "top heads": jaccard}, "measure of agreement")
    return f'<div class="multiples"><div>{spearman}</div><div>{jaccard}</div></div>'


def agreement_view(result: xr.Dataset, title: str = "Agreement of rankings") -> View:
    """The result of ``mech.agreement``: how far scores, domains or seeds name the same heads.

    Args:
        result: the result of ``mech.agreement``.
        title: heading of the view, and title of a saved page.
    """
    names = [str(name) for name in result["ranking"].values]
    facts = {"names": names, "n_top": result.attrs["n_top"], **{str(n): v.values.tolist() for n, v in result.items()}}
    body = f"<h3>{escape(title)}</h3>{domain_agreement(facts, '')}"
    return View(title, body, height=(220 if len(names) > BESIDE else 170) + 64 * len(names))


def transfer_view(result: xr.Dataset, title: str = "Transfer of heads") -> View:
    """The result of ``mech.transfer``: what is lost on each task (columns) without the top heads of each (rows).

    Args:
        result: the result of ``mech.transfer``.
        title: heading of the view, and title of a saved page.
    """
    rows, columns = ([str(name) for name in result[dim].values] for dim in ("found_on", "tested_on"))
    chance = np.broadcast_to(result["random_lost"].values, (len(rows), len(columns)))
    between = [result[f"lost_{end}"].values for end in ("low", "high")]
    caption = f"Accuracy lost without {result.attrs['n_heads']} heads. Rows: found on; columns: tested on"
    lost = matrix(rows, result["lost"].values.tolist(), caption, chance, between, columns)
    heads = dict(zip(result["band"].values.astype(str), result["heads"].values.astype(str), strict=True))
    named = table(["found on", "heads"], [[escape(name), escape(heads.get(name, ""))] for name in rows], kind="record")
    which = f"<details><summary>Which heads</summary>{named}</details>"
    return View(title, f"<h3>{escape(title)}</h3>{lost}{which}", height=200 + 64 * len(rows))


def modality_view(result: xr.Dataset, title: str = "Pictures and text") -> View:
    """Every head's score on pictures against that on text, and how many top heads the readings share.

    Args:
        result: the result of ``mech.modality_transfer``.
        title: heading of the view, and title of a saved page.
    """
    before = "base text" if "base text" in result["reading"].values else "text"
    of_base = f" of {escape(result.attrs['base'])}, before tuning" if before == "base text" else ""
    caption = (
        f"Each point is a head of {escape(result.attrs['model'])}. Vertical: its score on pictures; horizontal: on the "
        f"same {result.sizes['example']} scenes as text{of_base}. In colour: the {result.attrs['n_top']} top heads of "
        f"each. Score: {escape(result.attrs['score'])}."
    )
    parts = f"<figure>{_forms(result, before)}<figcaption>{caption}</figcaption></figure>{_shared(result)}"
    return View(title, f"<h3>{escape(title)}</h3>{parts}", height=820)


def _forms(result: xr.Dataset, before: str) -> str:
    means, layers = result["score"].mean("example"), result["layer"].values
    on, had = means.sel(reading="pictures").values, means.sel(reading=before).values
    origin = result["origin"].values
    labelled = _apart(had, on)
    traces = []
    for name, (colour, symbol) in ORIGINS.items():
        at = np.argwhere(origin == name)
        names = [f"L{layers[i]}H{j}" for i, j in at]
        x, y = had[tuple(at.T)], on[tuple(at.T)]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "name": f"{name} ({len(at)})",
                "x": x,
                "y": y,
                "text": [
                    head if name != "neither" and int(i * on.shape[1] + j) in labelled else ""
                    for head, (i, j) in zip(names, at, strict=True)
                ],
                "textposition": "top right",
                "textfont": {"size": 12},
                "hovertext": [
                    f"<b>{head}</b>, {name}<br>pictures {b:.3f}<br>{before} {a:.3f}"
                    for head, a, b in zip(names, x, y, strict=True)
                ],
                "hovertemplate": "%{hovertext}<extra></extra>",
                "marker": {"color": colour, "symbol": symbol, "size": 8},
            }
        )
    layout = {
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 12}},
        "margin": {"l": 8, "r": 8, "t": 60, "b": 8},
        "xaxis": {"title": f"{before}: {result.attrs['unit']}"},
        "yaxis": {"title": f"pictures: {result.attrs['unit']}"},
    }
    return chart(traces, layout, height=440, label="Score of every head on pictures against its score on text")


def _apart(x: np.ndarray, y: np.ndarray) -> set[int]:
    """The highest points whose names have room: none overlaps the name of a higher one."""
    named: list[tuple[int, float, float]] = []
    places = x / (np.abs(x).max() or 1.0), y / (np.abs(y).max() or 1.0)
    for i in np.argsort(-np.maximum(x, y), axis=None)[:LABELLED].tolist():
        right, up = (float(place.flat[i]) for place in places)
        if all(abs(right - a) > 0.08 or abs(up - b) > 0.05 for _, a, b in named):
            named.append((i, right, up))
    return {i for i, _, _ in named}


def _shared(result: xr.Dataset) -> str:
    """What the top heads for pictures share with every other reading, and how much of that layers explain."""
    rows = []
    for other in result["other"].values[1:]:
        row = result.sel(reading="pictures", other=other)
        values = {name: float(row[name]) for name in ("shared", "shared_low", "shared_high", "expected", "p", "within")}
        rows.append(
            [
                escape(str(other)),
                "{shared:.0f} [{shared_low:.0f}, {shared_high:.0f}]".format(**values),
                "{expected:.1f}".format(**values),
                "{p:.2g}".format(**values),
                "{within:.2f}".format(**values),
            ]
        )
    head = ["top heads on pictures and on", "shared [95%]", "by layers alone", "p", "correlation within layers"]
    caption = (
        f"Of {result.attrs['n_top']} heads each. By layers alone: the overlap of sets with the "
        "same number of heads per layer."
    )
    return table(head, rows, caption)


def sample_curve_view(result: xr.Dataset, title: str = "How many samples does a ranking need?") -> View:
    """How well two rankings from disjoint samples agree, as their number grows: mean and 95% range over the splits.

    Args:
        result: the result of ``mech.sample_curve``.
        title: heading of the view, and title of a saved page.
    """
    traces: list[dict[str, Any]] = []
    for (name, called), colour in zip(
        {"spearman": "Spearman correlation of all heads", "jaccard": "Jaccard overlap of the top heads"}.items(),
        ("bottom", "top"), strict=True,
    ):  # fmt: skip
        values = result[name].transpose("split", "size").values
        mean, (low, high) = values.mean(0), np.quantile(values, [0.025, 0.975], axis=0)
        sizes = result["size"].values
        edge = {"type": "scatter", "mode": "lines", "x": sizes, "hoverinfo": "skip", "line": {"width": 0}}
        edge["showlegend"] = False
        traces += [edge | {"y": low}, edge | {"y": high, "fill": "tonexty", "fillcolor": f"@{colour}-soft"}]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": called,
                "x": sizes,
                "y": mean,
                "text": [f"{m:.2f} [{a:.2f}, {b:.2f}]" for m, a, b in zip(mean, low, high, strict=True)],
                "hovertemplate": f"<b>{called}</b><br>%{{x}} samples each: %{{text}}<extra></extra>",
                "line": {"color": f"@{colour}", "width": 2},
                "marker": {"size": 7, "color": f"@{colour}"},
            }
        )
    layout = {
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 13}},
        "margin": {"l": 8, "r": 8, "t": 44, "b": 8},
        "xaxis": {"title": "samples per ranking (log scale)", "type": "log", "tickvals": sizes},
        "yaxis": {"title": "agreement", "range": [min(0.0, float(traces[0]["y"].min())) - 0.02, 1.04]},
    }
    null = result.attrs.get("jaccard_null")
    note = f"Shaded: 95% of {result.sizes['split']} splits into disjoint samples."
    note += f" By chance the top heads overlap by {float(null):.2f}." if null is not None else ""
    drawn = chart(traces, layout, height=360, label="Agreement of two rankings against the number of samples")
    return View(title, f"<h3>{escape(title)}</h3><p class=soft>{note}</p>{drawn}", height=500)


def depth_profile(rankings: Mapping[str, Sequence[Sequence[float]]], n_layers: Mapping[str, int]) -> str:
    """Share of all RAM in each layer against relative depth, a line for each ranking.

    Args:
        rankings: name -> ``[[layer, head, score], ...]``, all heads.
        n_layers: name -> number of layers of that model.
    """
    traces = []
    for i, (name, heads) in enumerate(rankings.items()):
        depth = n_layers[name]
        mass = np.zeros(depth)
        for layer, _, score in heads:
            mass[int(layer)] += max(score, 0.0)
        # Density, not share: 4 layers and 8 layers with the same profile must coincide.
        density = mass / (mass.sum() or 1.0) * depth
        colour, symbol = LINES[i % len(LINES)], SYMBOLS[i % len(SYMBOLS)]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": escape(name),
                "x": (np.arange(depth) + 0.5) / depth,
                "y": density,
                "text": [
                    f"layer {layer} of {depth}: {m / (mass.sum() or 1.0):.0%} of all RAM"
                    for layer, m in enumerate(mass)
                ],
                "hovertemplate": f"<b>{escape(name)}</b><br>%{{text}}<extra></extra>",
                "line": {"color": colour, "width": 2},
                "marker": {"symbol": symbol, "size": 8, "color": colour},
            }
        )
    layout = {
        "showlegend": len(traces) > 1,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 13}},
        "margin": {"l": 8, "r": 8, "t": 44, "b": 8},
        "xaxis": {"title": "relative depth (0 = first layer, 1 = last)", "range": [0, 1], "tickformat": ".1f"},
        "yaxis": {"title": "RAM relative to an even spread", "rangemode": "tozero"},
    }
    return chart(traces, layout, height=320, label="Share of retrieval attention mass in each layer by relative depth")


def facts_table(record: Mapping[str, Any], caption: str = "") -> str:
    """Every number and word of a nested record, one row each, under its dotted name."""
    rows = [[escape(name), escape(value)] for name, value in leaves(record)]
    return table(["name", "value"], rows, escape(caption), kind="record") if rows else ""


def leaves(value: Any, name: str = "") -> list[tuple[str, str]]:
    """(dotted name, text) of everything in nested dicts and lists; short flat lists stay together."""
    if isinstance(value, Mapping):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list | tuple):
        if all(not isinstance(item, Mapping | list | tuple) for item in value):
            return [(name, ", ".join(_text(item) for item in value))]
        return [leaf for i, inner in enumerate(value) for leaf in leaves(inner, f"{name}[{i}]")]
    return [(name, _text(value))]


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)
