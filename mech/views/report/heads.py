"""Heads one by one: the table of a setting's top heads, and what ``page.js`` shows as the page of any head.

A head's page has its RAM with interval next to the RAM of even attention, its causal effect in both directions, split
into what it writes to the logits itself and what later parts make of it, and where it attends in the questions drawn.
It is reached from a cell of the map, from the table, and by its address, ``#head=SETTING/LAYER/HEAD``.
"""

from typing import Any

import numpy as np
import xarray as xr

from mech.views.drawing.intervals import mean_interval
from mech.views.drawing.page import embedded_json, escape, table
from mech.views.heatmap import ranks
from mech.views.report.folder import Setting
from mech.views.report.numbers import with_interval

LISTED = 8
EFFECTS = {
    "lost": "lost when it is patched (necessity)",
    "recovered": "recovered by it alone (sufficiency)",
    "direct": "of the loss: what it writes directly to the logits",
    "mediated": "of the loss: through later layers",
}
PANEL = '<dialog id="head" aria-label="One head"></dialog>'


def head_data(setting: Setting, key: int) -> str:
    """All heads of a setting in order of rank, as JSON for the page of a head."""
    layers, order, columns = _columns(setting)
    said: dict[str, list[str]] = {}
    for path in (setting.facts.get("causal") or {}).get("paths", ()):
        said.setdefault("L{}H{}".format(*path["head"]), []).append(path["text"])
    n_test = ""
    if setting.causal is not None:
        n_test = (
            f" Effects on {setting.causal.sizes['example']} test samples: shares of the gap in logit difference "
            "between a sample and its counterfactual."
        )
    facts = {
        "name": setting.name,
        "note": f"RAM on {setting.facts['n_find']} samples.{n_test} In brackets: 95% intervals over samples.",
        "layers": layers,
        "order": [[layers[at[0]], int(at[1])] for at in order],
        "columns": columns,
        "said": said,
        "elsewhere": "The study did not draw this head. To see it: "
        "mech.view(mech.attention_maps(model, samples, ranking, bands={'mine': [(layer, head)]}), on=samples)",
    }
    return f'<span id="heads-{key}" hidden></span>{embedded_json(facts)}'


def top_table(setting: Setting, key: int) -> str:
    """The top heads of the ranking: how much they attend to the evidence, and what is lost without them."""
    layers, order, columns = _columns(setting)
    values = {label: (unit, *rest) for label, unit, *rest in columns}
    even = float(setting.ram["size_null"].mean())
    rows = []
    for rank, (i, head) in enumerate(order[:LISTED]):
        layer = layers[i]
        cells = [f'<a href="#head={key}/{layer}/{int(head)}">L{layer}H{int(head)}</a>', str(rank + 1)]
        cells.append(_told(values["RAM"], rank))
        cells.append(f"{columns[0][2][rank] / even:.1f}×" if even > 0 else "–")
        if setting.causal is not None:
            cells += [_told(values[EFFECTS[name]], rank) for name in ("lost", "recovered")]
            cells.append(escape(values["kind"][1][rank]))
        rows.append(cells)
    head = ["head", "rank", "RAM", "vs even attention"]
    if setting.causal is not None:
        head += ["lost without it", "recovered by it alone", "kind"]
    n = f"RAM on {setting.facts['n_find']} samples"
    n += f", effects on {setting.causal.sizes['example']} test samples" if setting.causal is not None else ""
    return table(
        head, rows, f"The top heads of the ranking; click one to open its page. {n}; in brackets: 95% intervals."
    )


def _columns(setting: Setting) -> tuple[list[int], np.ndarray, list[list[Any]]]:
    """Layers of the map, places of the heads by rank, and (label, unit, values, lows, highs) in that order."""
    ram = setting.ram["ram"].transpose("example", "layer", "head")
    mean, low, high = mean_interval(ram.values.astype(float))
    order = np.argwhere(np.isfinite(mean))
    order = order[np.argsort(ranks(mean)[tuple(order.T)])]
    at = tuple(order.T)
    vision = setting.ram["vision_mass"].transpose("example", "layer", "head").values.mean(axis=0)
    columns: list[list[Any]] = [
        ["RAM", "", mean[at], low[at], high[at]],
        ["even attention would give", "", np.full(len(order), float(setting.ram["size_null"].mean())), None, None],
        ["attention on all visual tokens", "", vision[at], None, None],
    ]
    layers = [int(layer) for layer in ram["layer"].values]
    if setting.causal is not None:
        columns += _effects(setting.causal, [(layers[i], int(head)) for i, head in order])
    return layers, order, columns


def _effects(causal: xr.Dataset, heads: list[tuple[int, int]]) -> list[list[Any]]:
    there = causal.transpose("layer", "head", ...)
    rows = {int(layer): i for i, layer in enumerate(there["layer"].values)}
    at = tuple(np.array([(rows[layer], head) for layer, head in heads]).T)
    columns: list[list[Any]] = []
    for name, label in EFFECTS.items():
        if name in there:
            ends = [there[f"{name}_{end}"].values[at] if f"{name}_{end}" in there else None for end in ("low", "high")]
            columns.append([label, "%", there[name].values[at], *ends])
    return [*columns, ["kind", "", [str(kind) for kind in there["quadrant"].values[at]], None, None]]


def _told(column: tuple[Any, ...], rank: int) -> str:
    unit, values, lows, highs = column
    bounds = {"mean": values[rank], "low": None, "high": None}
    if lows is not None and np.isfinite(lows[rank]):
        bounds |= {"low": lows[rank], "high": highs[rank]}
    return with_interval(bounds, (lambda v: f"{v:z.0%}") if unit == "%" else (lambda v: f"{v:z.3f}"))
