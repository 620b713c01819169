"""Sets of heads against each other: steering curves, and how well each finds the evidence.

    steering_view(curve)         # accuracy and logit difference against the factor (``mech.steering``)
    redirection_view(found)      # answers that follow the heads, against the bias (``mech.redirection``)
    retrieval_view(found)        # MRR and hit@k of every set, compared with chance (``mech.evidence_retrieval``)

Named sets have 95% bootstrap intervals over the samples. Random sets are shown as the range from the lowest to the
highest draw: anything inside it is no effect of the *ranking*.
"""

from typing import Any

import numpy as np
import xarray as xr

from mech.axes import EXAMPLE
from mech.views.curves import MEASURES, wrapped
from mech.views.drawing.intervals import accuracy_interval, mean_interval
from mech.views.drawing.page import View, chart, escape, tabs

COLOURS = {"top": "top", "bottom": "bottom", "random": "random", "vision": "matched", "all": "middle"}


def steering_view(result: xr.Dataset, title: str = "Heads scaled down and up") -> View:
    """Curves against the factor, a panel for each measure; the dotted line is the unchanged model.

    Args:
        result: the result of ``steering``.
        title: heading of the view, and title of a saved page.
    """
    panels = {
        measure.replace("logit_diff", "logit difference"): _curves(
            result[measure], "factor", "factor on the heads' output (1: unchanged)", name, vertical=1
        )
        for measure, name in MEASURES.items()
        if not bool(result[measure].isnull().all())  # where no sample has a counterfactual
    }
    return _of_sets(result, title, f"Sets of {result.attrs.get('n_heads', '')} heads.", panels)


def redirection_view(result: xr.Dataset, title: str = "Heads pulled towards a distractor") -> View:
    """Curves against the bias, a panel for each measure; the dotted line is the unchanged model.

    Args:
        result: the result of ``redirection``.
        title: heading of the view, and title of a saved page.
    """
    note = (
        f"Sets of {result.attrs.get('n_heads', '')} heads, and all heads. If the heads choose where the answer comes "
        "from, their curve rises and that of random heads does not."
    )
    return _of_sets(result, title, note, dose_curves(result))


def dose_curves(result: xr.Dataset) -> dict[str, str]:
    """For each measure of ``redirection``, a chart against the bias."""
    names = {
        "redirected": "answers that became the distractor's (share)",
        "kept": "answers that stayed right (share)",
        "logit_diff": "distractor's answer minus own (logits)",
    }
    return {
        measure.replace("logit_diff", "logit difference"): _curves(
            result[measure], "bias", "bias on the distractor's tokens (logits of attention)", name,
            horizontal=float(result[f"plain_{measure}"].mean()),
        )
        for measure, name in names.items()
    }  # fmt: skip


def _of_sets(result: xr.Dataset, title: str, note: str, panels: dict[str, str]) -> View:
    body = f'<h3>{escape(title)}</h3><p class="soft">{escape(note)}</p>{tabs(panels, "measure")}'
    return View(title, body, height=470)


def _curves(
    measured: xr.DataArray,
    axis: str,
    what: str,
    name: str,
    *,
    vertical: float | None = None,
    horizontal: float | None = None,
) -> str:
    """A curve for every band along an axis; a dotted line for the unchanged model."""
    along, traces, heads = measured[axis].values.astype(float), [], _heads_of(measured)
    for band, here in sorted(_by_band(measured), key=lambda named: named[0] != "random"):  # the shade lies below
        mean, low, high = _ends(here)
        colour = f"@{COLOURS.get(band, 'accent')}"
        line: dict[str, Any] = {
            "type": "scatter", "mode": "lines+markers", "x": along, "y": mean, "name": escape(band),
            "line": {"color": colour, "width": 2}, "marker": {"size": 7, "color": colour},
            "text": [f"{m:.2f} [{a:.2f}, {b:.2f}]" for m, a, b in zip(mean, low, high, strict=True)],
            "hovertemplate": f"<b>{escape(band)}</b>, {axis} %{{x}}<br>%{{text}}<br>{heads[band]}<extra></extra>",
        }  # fmt: skip
        if len(here) > 1:
            edge = {"type": "scatter", "mode": "lines", "x": along, "hoverinfo": "skip", "line": {"width": 0},
                    "showlegend": False}  # fmt: skip
            traces += [edge | {"y": low}, edge | {"y": high, "fill": "tonexty", "fillcolor": "@random-soft"}]
        else:
            line["error_y"] = _bars(mean, low, high, colour)
        traces.append(line)
    dotted = {"type": "line", "line": {"color": "@none", "width": 1.5, "dash": "dot"}}
    if vertical is not None:
        dotted |= {"x0": vertical, "x1": vertical, "yref": "paper", "y0": 0, "y1": 1}
    else:
        dotted |= {"y0": horizontal, "y1": horizontal, "xref": "paper", "x0": 0, "x1": 1}
    layout = {
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "margin": {"l": 8, "r": 8, "t": 44, "b": 8},
        "xaxis": {"title": what},
        "yaxis": {"title": name.split(" (")[0]},
        "shapes": [dotted],
    }
    return chart(traces, layout, height=340, label=f"{name} against the {axis}")


def retrieval_view(result: xr.Dataset, title: str = "Evidence found by attention") -> View:
    """A panel for MRR and for every hit@k: a bar for each set; the dotted line is a random order.

    Args:
        result: the result of ``evidence_retrieval``.
        title: heading of the view, and title of a saved page.
    """
    measures = {"MRR": (result["reciprocal_rank"], result["chance_rr"])}
    measures |= {f"hit@{k}": (result["hit"].sel(k=k), result["chance_hit"].sel(k=k)) for k in result["k"].values}
    panels = {}
    for name, (value, by_chance) in measures.items():
        bands, ends = zip(*((band, _ends(here)) for band, here in _by_band(value)), strict=True)
        mean, low, high = (np.array([float(end[i]) for end in ends]) for i in range(3))
        bars = {
            "type": "bar", "x": [escape(band) for band in bands], "y": mean,
            "marker": {"color": [f"@{COLOURS.get(band, 'accent')}" for band in bands]},
            "error_y": _bars(mean, low, high, "@ink"),
            "text": [f"{m:.2f} [{a:.2f}, {b:.2f}]" for m, a, b in zip(mean, low, high, strict=True)],
            "textposition": "none", "hovertemplate": "<b>%{x}</b><br>%{text}<extra></extra>",
        }  # fmt: skip
        chance = float(by_chance.mean())
        layout = {
            "xaxis": {"title": "set of heads"},
            "yaxis": {"title": escape(name), "range": [0, 1.02]},
            "shapes": [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": chance, "y1": chance,
                        "line": {"color": "@none", "width": 1.5, "dash": "dot"}}],
        }  # fmt: skip
        panels[name] = chart([bars], layout, height=300, label=f"{name} of every set of heads; by chance {chance:.2f}")
    what, n = result.attrs.get("over", "candidates"), int(result["n_candidates"].mean())
    note = f'<p class="soft">About {n} {escape(what)} to choose from; dotted: chance.</p>'
    return View(title, f"<h3>{escape(title)}</h3>{note}{tabs(panels, 'measure')}", height=440)


def _by_band(value: xr.DataArray) -> list[tuple[str, np.ndarray]]:
    """Values [set, ..., example] of every band, in order of appearance."""
    names = value["band"].values.astype(str)
    whole = value.transpose("set", ..., EXAMPLE).values
    return [(band, whole[names == band]) for band in dict.fromkeys(names.tolist())]


def _heads_of(value: xr.DataArray) -> dict[str, str]:
    """What a band's tooltip says of its heads: their names, or how many sets there are."""
    bands = value["band"].values.astype(str).tolist()
    names = value["heads"].values.astype(str).tolist() if "heads" in value.coords else [""] * len(bands)
    return {
        band: wrapped(names[bands.index(band)]) if bands.count(band) == 1 else f"{bands.count(band)} sets"
        for band in dict.fromkeys(bands)
    }


def _ends(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For one set, mean and interval over samples; for several, median, lowest and highest."""
    if len(values) > 1:
        drawn = values.mean(-1)
        return np.median(drawn, axis=0), drawn.min(0), drawn.max(0)
    of_answers = bool(np.isin(values, (0, 1)).all())
    mean, low, high = (accuracy_interval if of_answers else mean_interval)(np.moveaxis(values[0], -1, 0))
    return mean, np.where(np.isnan(low), mean, low), np.where(np.isnan(high), mean, high)  # one sample has no interval


def _bars(mean: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str) -> dict[str, Any]:
    return {"type": "data", "symmetric": False, "array": high - mean, "arrayminus": mean - low, "color": colour,
            "thickness": 1, "width": 4}  # fmt: skip
