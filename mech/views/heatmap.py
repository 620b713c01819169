"""Layer x head maps: which heads put their attention on the evidence.

    ram_map(dataset)      # the dataset of ``retrieval_attention_mass``, loaded from a study or fresh
    ram_map(ranking)      # anything with ``.scores()``: a DataArray over layer and head
    head_maps(scores)     # all scores of ``head_scores``; what heads add to the logits (``logit_attribution``)

Every cell is one head; its colour is the mean over samples. Pointing at it shows layer, head, value with a 95%
bootstrap interval over the samples, and rank. The heads of the top 5% are outlined. Next to the map are the same values
in order of rank; a dotted line marks what uniform attention would give: only values above it are retrieval.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from mech.axes import EXAMPLE, HEAD, LAYER
from mech.errors import OutputError
from mech.views.drawing.intervals import mean_interval
from mech.views.drawing.page import View, chart, escape, tabs

OUTLINED = 0.05


@dataclass(frozen=True)
class HeadScores:
    """A score of every head of one model on each example, with its name and unit."""

    values: Float[np.ndarray, "example layer head"]
    name: str = "RAM"
    unit: str = "attention mass"
    null: float | None = None  # what uniform attention would score
    layers: tuple[int, ...] = ()  # the model's layer for each row, where some layers have no heads

    def layer(self, row: int) -> int:
        return self.layers[row] if self.layers else row


def ram_map(result: Any, title: str = "") -> View:
    """The layer x head map of a score, with the ranked values next to it.

    Args:
        result: a RAM ``Dataset`` or ``DataArray`` with dimensions layer and head (example optional), or a ranking.
        title: heading of the view, and title of a saved page.
    """
    scores = head_scores(result)
    title = title or ("Retrieval attention mass" if scores.name == "RAM" else f"Heads by {scores.name}")
    body = f"<h3>{escape(title)}</h3>{map_and_ranks(scores)}"
    return View(title, body, height=map_height(scores.values.shape[-2]) + 130)


def head_maps(result: xr.Dataset | xr.DataArray, title: str = "") -> View:
    """A map for every variable over layer and head: several scores, or what every head adds to the logits.

    Args:
        result: a dataset in which some variables have the dimensions layer and head, or such an array; if there is one
            more dimension (a set of tokens, say), every value of it gets a panel.
        title: heading of the view, and title of a saved page.
    """
    dataset = result if isinstance(result, xr.Dataset) else result.to_dataset(name=str(result.name or "score"))
    panels: dict[str, HeadScores] = {}
    for name, array in dataset.data_vars.items():
        others = [str(dim) for dim in array.dims if dim not in (EXAMPLE, LAYER, HEAD)]
        if not {LAYER, HEAD} <= set(array.dims) or len(others) > 1 or array.dtype.kind not in "fiub":
            continue
        if not others:
            panels[str(name)] = head_scores(array.rename(str(name)))
        for value in dataset[others[0]].values.tolist() if others else ():
            panels[f"{name}: {value}"] = head_scores(
                array.sel({others[0]: value}, drop=True).rename(f"{name}: {value}")
            )
    if not panels:
        raise OutputError(
            f"a result with {sorted(map(str, dataset.data_vars))}",
            "a result of mech, or values over layer and head",
            "see the gallery in the docs",
        )
    title = title or "Heads"
    drawn = {name: map_and_ranks(scores) for name, scores in panels.items()}
    height = map_height(max(scores.values.shape[-2] for scores in panels.values())) + 190
    return View(title, f"<h3>{escape(title)}</h3>{tabs(drawn, 'score')}", height=height)


def head_scores(result: Any) -> HeadScores:
    """The scores in a dataset, an array or a ranking; as one example where only the mean is known."""
    null = None
    array, name = result, getattr(result, "name", None)
    if isinstance(result, xr.Dataset):
        if "ram" not in result:
            there = sorted(map(str, result.data_vars))
            raise OutputError(
                f"a dataset with {there}", "one with 'ram'", "pass what retrieval_attention_mass returned"
            )
        array, name = result["ram"], "ram"
        if "size_null" in result:
            null = float(result["size_null"].mean())
    elif callable(getattr(result, "scores", None)):
        array, name = result.scores(), getattr(result, "score", None)
        if getattr(result, "per_example", None) is not None:
            array = xr.DataArray(result.per_example, dims=(EXAMPLE, LAYER, HEAD), attrs=array.attrs)
    if not isinstance(array, xr.DataArray) or not {LAYER, HEAD} <= set(array.dims):
        dims = getattr(array, "dims", type(array).__name__)
        raise OutputError(f"a result with {dims}", "dimensions layer and head", "pass a RAM dataset or a ranking")
    if EXAMPLE not in array.dims:
        array = array.expand_dims(EXAMPLE)
    values = array.transpose(EXAMPLE, LAYER, HEAD).values.astype(float)
    is_ram = name in (None, "ram", "retrieval_attention_mass")
    unit = str(array.attrs.get("unit") or ("attention mass" if is_ram else "")).split(",")[0]
    layers = tuple(int(layer) for layer in array[LAYER].values) if LAYER in array.coords else ()
    return HeadScores(values, "RAM" if is_ram else str(name), unit, null, layers)


def map_and_ranks(scores: HeadScores) -> str:
    """The map and the ranked values, side by side where there is room."""
    n = int(np.isfinite(scores.values[0]).sum())
    above = "" if scores.null is None else f" Dotted: what uniform attention would give ({scores.null:.3f})."
    caption = f"Outlined: the top {OUTLINED:.0%} ({_outlined(n)} of {n} heads). Point at a cell for details."
    return (
        f'<div class="split"><figure>{_map(scores)}<figcaption>{caption}</figcaption></figure>'
        f"<figure>{_ranked(scores)}"
        f"<figcaption>The same heads in order of rank.{above}</figcaption></figure></div>"
    )


def map_height(n_layers: int) -> int:
    return int(np.clip(24 * n_layers + 90, 250, 680))


def ranks(mean: np.ndarray) -> np.ndarray:
    """1 for the highest; ties are broken by (layer, head), as in rankings."""
    order = np.argsort(-np.nan_to_num(mean.ravel(), nan=-np.inf), kind="stable")
    places = np.empty(mean.size, dtype=int)
    places[order] = np.arange(1, mean.size + 1)
    return places.reshape(mean.shape)


def _hover(scores: HeadScores, mean: np.ndarray, low: np.ndarray, high: np.ndarray) -> list[list[str]]:
    """The tooltip of every head."""
    rank, name = ranks(mean), escape(scores.name)
    lines = []
    for row in range(mean.shape[0]):
        line = []
        for head in range(mean.shape[1]):
            interval = f" [{low[row, head]:.3f}, {high[row, head]:.3f}]" if np.isfinite(low[row, head]) else ""
            value = f"{mean[row, head]:.3f}{interval}"
            called = f"L{scores.layer(row)}H{head}"
            line.append(f"<b>{called}</b><br>{name} {value}<br>rank {rank[row, head]} of {mean.size}")
        lines.append(line)
    return lines


def _map(scores: HeadScores) -> str:
    mean, low, high = mean_interval(scores.values)
    n_layers, n_heads = mean.shape
    signed = bool(np.nanmin(mean) < 0)  # centred on zero, so that the colour shows the sign
    reach = max(float(np.nanmax(np.abs(mean))), 1e-9)
    label = escape(f"{scores.name} ({scores.unit})" if scores.unit else scores.name)
    heat = {
        "type": "heatmap",
        "z": mean,
        "zmin": -reach if signed else 0,
        "zmax": reach,
        "text": _hover(scores, mean, low, high),
        "hovertemplate": "%{text}<extra></extra>",
        "colorscale": "@diverging" if signed else "@sequential",
        "hoverongaps": False,
        "xgap": 1,
        "ygap": 1,
        "colorbar": {
            "title": {"text": label, "side": "right", "font": {"size": 13}},
            "thickness": 12,
            "outlinewidth": 0,
            "tickfont": {"size": 13},
        },
    }
    best = np.argwhere(ranks(mean) <= _outlined(int(np.isfinite(mean).sum())))
    shapes = [
        {
            "type": "rect",
            "x0": head - 0.5,
            "x1": head + 0.5,
            "y0": layer - 0.5,
            "y1": layer + 0.5,
            "line": {"color": "@top", "width": 2},
        }
        for layer, head in best.tolist()
    ]
    layout = {
        "xaxis": {"title": "head", "dtick": step(n_heads), "showgrid": False, "zeroline": False},
        "yaxis": {"title": "layer (0 = first)", "showgrid": False, "zeroline": False, **_layer_ticks(scores)},
        "shapes": shapes,
    }
    label = f"Map of {n_layers} layers and {n_heads} heads, coloured by {scores.name}"
    return chart([heat], layout, height=map_height(n_layers), label=label)


def _layer_ticks(scores: HeadScores) -> dict[str, Any]:
    """Every layer, or every second, fourth or so; by name where the rows are not the first layers of the model."""
    n = scores.values.shape[1]
    if scores.layers in ((), tuple(range(n))):
        return {"dtick": step(n)}
    rows = list(range(0, n, step(n)))
    return {"tickvals": rows, "ticktext": [str(scores.layers[row]) for row in rows]}


def _ranked(scores: HeadScores) -> str:
    mean, low, high = mean_interval(scores.values)
    rank = ranks(mean).ravel()
    order = np.argsort(rank)
    text = [cell for line in _hover(scores, mean, low, high) for cell in line]
    values = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": rank[order],
        "y": mean.ravel()[order],
        "text": [text[i] for i in order],
        "hovertemplate": "%{text}<extra></extra>",
        "line": {"color": "@accent", "width": 1.5},
        "marker": {"size": 5, "color": "@accent"},
    }
    traces = [values]
    if scores.null is not None:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [1, mean.size],
                "y": [scores.null, scores.null],
                "line": {"color": "@soft", "width": 1.5, "dash": "dot"},
                "hovertemplate": f"uniform attention: {scores.null:.3f}<extra></extra>",
            }
        )
    layout = {
        "xaxis": {
            "title": "rank of the head (log scale)",
            "type": "log",
            "tickvals": _decades(mean.size),
            "showgrid": False,
        },
        "yaxis": {"title": escape(scores.name), "rangemode": "tozero"},
    }
    label = f"{scores.name} of the heads in order of rank"
    return chart(traces, layout, height=map_height(mean.shape[0]), label=label)


def _outlined(n: int) -> int:
    return max(1, round(OUTLINED * n))


def _decades(n: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to n."""
    return [digit * 10**power for power in range(len(str(n))) for digit in (1, 2, 5) if digit * 10**power <= n]


def step(n: int) -> int:
    """Distance between the ticks of an axis that counts to n: at most sixteen ticks up to n = 512."""
    return next(step for step in (1, 2, 4, 8, 16, 32) if n / step <= 16 or step == 32)
