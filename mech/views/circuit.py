"""Circuits: from regions of the image through heads and MLPs to the logits, drawn as a layered graph.

    circuit_view(trace_circuit(model, samples, metric))                  # or what ``path_patching`` returned
    circuit_view(edge_attribution(model, clean, corrupted, metric))      # its strongest edges
    maps = mech.attention_maps(model, [sample], ranking, bands={"": circuit.heads})
    circuit_view(circuit, on=sample, ranking=ranking, maps=maps)

Height is depth: inputs at the bottom, logits on top. The width of an edge is the size of its effect, its colour the
sign: blue supports the clean answer, orange works against it. Edges enter a head on the left if they feed its queries,
in the middle for keys, on the right for values. Pointing at an edge shows effect, interval and p; a click on a part
shows what it reads and writes, what the ranking says about it, and what it attends to.

    circuit_scores_view(circuit_scores(task))                            # faithfulness against size, CPR, CMD, AUROC

Nothing is computed here: the edges are those of the measurement that made the circuit.
"""

from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np
import xarray as xr

from mech.axes import EXAMPLE
from mech.errors import OutputError
from mech.experiments.circuit_tasks.curves import circuit_table
from mech.views.drawing.graph import NODE, READS, Arrow, called, drawing, key_of, parts_of, thumbnails
from mech.views.drawing.images import evidence_on, pictures_on, styles
from mech.views.drawing.intervals import mean_interval
from mech.views.drawing.page import View, chart, escape, table, tabs
from mech.views.overlay import map_of_head
from mech.views.patching import effects_from_zero

STRONGEST = 30  # paths drawn from a result that has all of them
LEAST = 0.005  # share of the gap: below it nothing is drawn
COLOURS = ("@top", "@bottom", "@matched", "@middle", "@accent")
DASHES = ("solid", "dash", "dashdot", "dot", "longdash")
_number = count(1)


def circuit_view(
    result: Any, title: str = "", *, on: Any = None, ranking: Any = None, maps: xr.Dataset | None = None
) -> View:
    """The graph of a circuit, with a panel for every part.

    Args:
        result: a ``Circuit``, or what ``path_patching`` or ``edge_attribution`` returned.
        title: heading of the view, and title of a saved page.
        on: a ``Sample``, whose evidence and pictures stand for the inputs (or its picture).
        ranking: says for each head whether it attends to the evidence.
        maps: ``mech.attention_maps`` on that sample with the circuit's heads: shows what a head attends to.

    Raises:
        OutputError: no edge has an effect, or ``maps`` without the sample.
    """
    arrows = _arrows(result)
    if not arrows:
        raise OutputError("a circuit without edges", "at least one path with an effect", "lower the threshold")
    if maps is not None and on is None:
        raise OutputError("maps without a picture", "the sample they were made from", "pass on=sample")
    number = next(_number)
    key = {name: f"part-{number}-{i}" for i, name in enumerate(parts_of(arrows))}
    pictures = pictures_on(on) if on is not None else []
    drawn, tall = drawing(arrows, key, thumbnails(pictures, evidence_on(on)))
    panels = "".join(_panel(name, key[name], arrows, ranking, _seen(name, maps, on)) for name in key)
    hint = "<p>Click a part to see what it reads, what it writes and what it attends to.</p>"
    words = getattr(result, "describe", None)
    description = str(words(ranking)) if callable(words) else ""
    sentences = "".join(f"<p>{escape(line)}</p>" for line in description.splitlines())
    start = f'<div class="part" id="part-{number}-none">{hint}{sentences}</div>'
    title = title or "Circuit"
    body = (
        f"<h3>{escape(title)}</h3><p class=soft>{escape(_source(result, arrows))}</p>{styles(pictures)}"
        f'<div class="circuit"><div class="scroll">{drawn}</div>'
        f'<div class="parts" aria-live="polite">{start}{panels}</div></div>{key_of(arrows)}'
    )
    return View(title, body, height=max(tall, 300 if maps is None else 560) + 170)


def circuit_scores_view(result: xr.Dataset, title: str = "Which method finds a faithful circuit?") -> View:
    """Faithfulness against the share of edges, a curve for each entry, and CPR, CMD and AUROC in a table.

    Args:
        result: the result of ``circuit_scores``.
        title: heading of the view, and title of a saved page.
    """
    panels = {
        name: _faithfulness(result["faithfulness"].sel(order=order))
        for order, name in (("signed", "edges by signed score (CPR)"), ("size", "edges by size (CMD)"))
    }
    rows = [
        [escape(row["entry"]), *(_between(row, name) for name in ("cpr", "cmd")), _known(float(row["auroc"]))]
        for row in circuit_table(result)
    ]
    about = result.attrs
    note = (
        f"{about.get('task', '')}: {about.get('n_edges', '')} edges, scored on {about.get('n_find', '')} samples; "
        f"circuits measured on {result.sizes[EXAMPLE]} others. Edges outside a circuit come from the corrupted run."
    )
    head = ["entry", "CPR (more is better)", "CMD (less is better)", "AUROC over edges (chance 0.5)"]
    body = (
        f'<h3>{escape(title)}</h3><p class="soft">{escape(note)}</p>{tabs(panels, "order of edges")}{table(head, rows)}'
    )
    return View(title, body, height=620)


def _faithfulness(values: xr.DataArray) -> str:
    """A curve for each entry, mean and 95% interval over samples."""
    shares, traces = values["share"].values, []
    for number, entry in enumerate(map(str, values["entry"].values)):
        mean, low, high = mean_interval(values.sel(entry=entry).transpose(EXAMPLE, "share").values)
        random, colour = entry == "random", COLOURS[number % len(COLOURS)]
        text = [f"{m:.2f} [{a:.2f}, {b:.2f}]" for m, a, b in zip(mean, low, high, strict=True)]
        traces.append({
            "type": "scatter", "mode": "lines+markers", "name": escape(entry), "x": shares, "y": mean, "text": text,
            "hovertemplate": f"<b>{escape(entry)}</b>, %{{x:.1%}} of all edges<br>%{{text}}<extra></extra>",
            "line": {"color": "@random" if random else colour, "width": 2, "dash": DASHES[number % len(DASHES)]},
            "marker": {"size": 7, "color": "@random" if random else colour},
        })  # fmt: skip
    line = {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": 1, "y1": 1,
            "line": {"color": "@none", "width": 1.5, "dash": "dot"}}  # fmt: skip
    layout = {
        "showlegend": True, "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "margin": {"l": 8, "r": 8, "t": 44, "b": 8}, "shapes": [line], "yaxis": {"title": "faithfulness"},
        "xaxis": {"title": "share of all edges in the circuit", "type": "log", "tickvals": shares,
                  "ticktext": [f"{share:.1%}" for share in shares]},
    }  # fmt: skip
    return chart(traces, layout, height=340, label="Faithfulness of circuits against their size, by entry")


def _between(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"


def _known(value: float) -> str:
    return "no truth" if np.isnan(value) else f"{value:.3f}"


def _arrows(result: Any) -> list[Arrow]:
    """The paths of a result, the strongest first."""
    if isinstance(result, xr.Dataset):
        measured = _measured(result)
    else:
        measured = [
            Arrow(e.sender, name, e.through, e.effect, e.low, e.high, e.p_value, e.at)
            for name in result.graph.nodes
            for e in result.edges(name)
        ]
    return sorted(measured, key=lambda arrow: -abs(arrow.effect))


def _measured(result: xr.Dataset) -> list[Arrow]:
    """The strongest paths of a dataset over sender and receiver; for several regions, the strongest region."""
    effect = effects_from_zero(result).transpose(EXAMPLE, "sender", "receiver", ...)
    values = effect.values.reshape(*effect.shape[:3], -1)
    mean, low, high = mean_interval(values)
    places = [" at ".join(map(str, at)) for at in _product([effect[dim].values.tolist() for dim in effect.dims[3:]])]
    senders, receivers = (list(map(str, effect[axis].values)) for axis in ("sender", "receiver"))
    named = [receiver.partition(".") for receiver in receivers]
    if _counts(receivers, "H") == _counts(receivers, "K"):  # no sharing: each head has its own keys and values
        named = [(name.replace("K", "H"), dot, through) for name, dot, through in named]
    edges = []
    for i, j in np.argwhere(np.isfinite(mean).any(-1)):
        at = int(np.nanargmax(np.abs(mean[i, j])))
        target, _, through = named[j] if receivers[j].startswith("L") else (receivers[j], "", "")
        numbers = (float(part[i, j, at]) for part in (mean, low, high))
        edges.append(Arrow(str(senders[i]), str(target), through, *numbers, at=places[at]))
    edges.sort(key=lambda arrow: -abs(arrow.effect))
    return [arrow for arrow in edges[:STRONGEST] if abs(arrow.effect) >= LEAST]


def _counts(receivers: Sequence[str], letter: str) -> int:
    return len({name.partition(".")[0] for name in receivers if (match := NODE.match(name)) and match[5] == letter})


def _product(axes: Sequence[Sequence[Any]]) -> list[tuple]:
    return [()] if not axes else [(first, *rest) for first in axes[0] for rest in _product(axes[1:])]


def _panel(name: str, key: str, arrows: Sequence[Arrow], ranking: Any, seen: str) -> str:
    """The panel shown when a part is chosen."""
    rank_line = ""
    match = NODE.fullmatch(name)
    if ranking is not None and match is not None and match[5] == "H":
        layer, head = int(match[4]), int(match[6])
        rank = [tuple(known) for known in ranking.heads].index((layer, head)) + 1
        value = float(ranking.scores().sel(layer=layer, head=head))
        rank_line = f"<p>{escape(ranking.score)} {value:.2f}, rank {rank} of {len(ranking.heads)}.</p>"
    tables = ""
    for what, mine, other in (("reads from", "target", "sender"), ("writes to", "sender", "target")):
        rows = [
            [escape(called(getattr(a, other))), a.through and READS[a.through], f"{a.value}", escape(a.at)]
            for a in arrows
            if getattr(a, mine) == name
        ]
        if rows:
            columns = [what, "as", "effect", "at"]
            shown = [c for c in range(4) if c in (0, 2) or any(row[c] for row in rows)]
            tables += table([columns[c] for c in shown], [[row[c] for c in shown] for row in rows])
    return f'<div class="part" id="{key}" hidden><h4>{escape(called(name))}</h4>{rank_line}{seen}{tables}</div>'


def _seen(name: str, maps: xr.Dataset | None, on: Any) -> str:
    """What a head attends to in the first example."""
    match = NODE.fullmatch(name)
    if maps is None or match is None or match[5] != "H":
        return ""
    heads = zip(maps["shown_layer"].values.tolist(), maps["shown_head"].values.tolist(), strict=True)
    shown = next((i for i, head in enumerate(heads) if head == (int(match[4]), int(match[6]))), None)
    if shown is None:
        return ""
    return map_of_head(maps, shown, on)


def _source(result: Any, arrows: Sequence[Arrow]) -> str:
    """What the graph was made from, in one line."""
    measured = isinstance(result, xr.Dataset)
    n = result.sizes[EXAMPLE] if measured else result.n_examples
    facts = result.attrs if measured else {"model": result.model, "direction": result.direction}
    parts = [str(facts[name]) for name in ("model", "direction") if facts.get(name)]
    parts.append(f"{n} example{'s' * (n != 1)}")
    if measured:
        held = facts.get("freeze")
        parts.append(f"held: {', '.join(held) or 'nothing'}" if held is not None else "estimated (edge attribution)")
        parts.append(f"the {len(arrows)} strongest paths")
    elif result.unfollowed:
        parts.append(f"not followed further: {', '.join(result.unfollowed)}")
    return " · ".join(parts)
