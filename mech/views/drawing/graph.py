"""A layered graph as SVG: parts of a model by depth, and between them paths as wide as their effect.

    drawing(arrows, keys, thumbnails(pictures, evidence))     # inputs at the bottom, logits on top

Names are those of ``path_patching``: "embed:evidence", "L2H5", "L4K0", "mlp.1", "logits"; any other is a group.
Choosing a part opens the panel of its key (``page.js``); each path has a tooltip.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mech.views.drawing.page import escape

WIDE, HIGH, GAP = 92, 34, 74  # width and height of a part, and gap between rows, in pixels
READS = {"q": "queries", "k": "keys", "v": "values", "": "input"}
PORTS = {"q": -0.3, "k": 0.0, "v": 0.3, "": 0.0}  # where a path enters, in widths of a part
NODE = re.compile(r"(embed|logits)(?::(.+))?|mlp\.(\d+)|L(\d+)([HK])(\d+)")


@dataclass(frozen=True)
class Arrow:
    """A path from one part to another, with its effect, interval, p-value and place."""

    sender: str
    target: str
    through: str
    effect: float
    low: float = float("nan")
    high: float = float("nan")
    p_value: float = float("nan")
    at: str = ""

    @property
    def value(self) -> str:
        between = f" [{self.low:+.2f}, {self.high:+.2f}]" if np.isfinite(self.low) and self.low != self.high else ""
        return f"{self.effect:+.2f}{between}"

    @property
    def tip(self) -> str:
        lines = [f"{called(self.sender)} to {called(self.target)}", f"effect {self.value} of the gap"]
        lines += [f"feeds its {READS[self.through]}"] if self.through else []
        lines += [f"written at: {self.at}"] if self.at else []
        lines += [f"p = {self.p_value:.2g} (corrected)"] if np.isfinite(self.p_value) else []
        return "\n".join(lines)


def parts_of(arrows: Sequence[Arrow]) -> list[str]:
    return list(dict.fromkeys(name for arrow in arrows for name in (arrow.target, arrow.sender)))


def called(name: str) -> str:
    match = NODE.fullmatch(name)
    if match is None or match[4]:
        return f"L{match[4]} kv {match[6]}" if match and match[5] == "K" else name
    return f"MLP {match[3]}" if match[3] else match[2] or {"embed": "inputs"}.get(name, name)


def drawing(arrows: Sequence[Arrow], key: Mapping[str, str], thumbnails: Mapping[str, str]) -> tuple[str, int]:
    """The graph as SVG, and its height in pixels."""
    rows = _rows(arrows)
    extra = 46 if thumbnails else 0
    width = max(340, max(len(row) for row in rows) * (WIDE + 16) + 24)
    height = len(rows) * HIGH + (len(rows) - 1) * GAP + 24 + extra
    at: dict[str, tuple[float, float]] = {}
    for r, row in enumerate(rows):
        for c, name in enumerate(row):
            at[name] = ((c + 0.5) * (width - 24) / len(row) + 12, height - extra - 12 - HIGH / 2 - r * (HIGH + GAP))
    most = max(abs(arrow.effect) for arrow in arrows)
    edges = "".join(_edge(arrow, key, at, most, width) for arrow in reversed(arrows))
    nodes = "".join(_node(name, key[name], *at[name], thumbnails.get(name, "")) for name in at)
    label = f"Graph of {len(at)} parts and {len(arrows)} paths, inputs at the bottom, logits on top"
    size = f'viewBox="0 0 {width} {height}" width="{width}"'
    return f'<svg class="graph" {size} role="group" aria-label="{label}">{edges}{nodes}</svg>', height


def key_of(arrows: Sequence[Arrow]) -> str:
    most = max(abs(arrow.effect) for arrow in arrows)
    items = []
    for share in (1.0, 0.5, 0.1):
        size = 1.2 + 8 * share
        line = f'<path d="M2 7H28" stroke="var(--plus)" stroke-width="{size:.1f}"/>'
        items.append(f'<li><svg viewBox="0 0 30 14" aria-hidden="true">{line}</svg>{share * most:.2f}</li>')
    line = '<path d="M2 7H28" stroke="var(--minus)" stroke-width="4"/>'
    items.append(f'<li><svg viewBox="0 0 30 14" aria-hidden="true">{line}</svg>works against the clean answer</li>')
    return f'<ul class="legend"><li>effect (share of the gap):</li>{"".join(items)}</ul>'


def _rows(arrows: Sequence[Arrow]) -> list[list[str]]:
    """Parts by depth from the bottom; within a row, parts that share paths are placed near each other."""
    depths = sorted({_depth(name) for name in parts_of(arrows)})
    rows = [sorted(name for name in parts_of(arrows) if _depth(name) == depth) for depth in depths]
    beside: dict[str, list[tuple[str, float]]] = {}
    for arrow in arrows:
        beside.setdefault(arrow.sender, []).append((arrow.target, abs(arrow.effect)))
        beside.setdefault(arrow.target, []).append((arrow.sender, abs(arrow.effect)))
    for _ in range(8):
        x = {name: (i + 0.5) / len(row) for row in rows for i, name in enumerate(row)}
        for row in rows:
            row.sort(key=lambda name: sum(x[o] * w for o, w in beside[name]) / sum(w for _, w in beside[name]))
            x |= {name: (i + 0.5) / len(row) for i, name in enumerate(row)}
    return rows


def _depth(name: str) -> float:
    """The depth of a part: inputs, then attention and MLP of each layer, then the logits."""
    match = NODE.fullmatch(name)
    if match is None:  # a group of parts, named by the user
        return -0.5
    whole, _, mlp, layer, _, _ = match.groups()
    return {"embed": -1.0, "logits": 1e6}[whole] if whole else 2.0 * int(layer) if layer else 2.0 * int(mlp) + 1


def _edge(
    arrow: Arrow, key: Mapping[str, str], at: Mapping[str, tuple[float, float]], most: float, width: float
) -> str:
    (x0, y0), (x1, y1) = at[arrow.sender], at[arrow.target]
    x1, y0, y1 = x1 + PORTS[arrow.through] * WIDE, y0 - HIGH / 2, y1 + HIGH / 2
    bend = max(26.0, 0.45 * (y0 - y1))
    # A path across other rows swings out, so that it does not run behind the parts in between.
    side = 0.0 if y0 - y1 <= GAP + 1 else 0.42 * min(y0 - y1, 320)
    side = min(side, width - max(x0, x1)) if x1 >= x0 else -min(side, min(x0, x1))
    path = f"M{x0:.1f} {y0:.1f}C{x0 + side:.1f} {y0 - bend:.1f} {x1 + side:.1f} {y1 + bend:.1f} {x1:.1f} {y1:.1f}"
    size = 1.2 + 8 * abs(arrow.effect) / most
    ends = f"{key[arrow.sender]} {key[arrow.target]}"
    colour = "plus" if arrow.effect > 0 else "minus"
    letter = f'<text class="port" x="{x1 + 6 + size / 2:.1f}" y="{y1 + 14:.1f}">{arrow.through}</text>'
    return (
        f'<g class="edge-group" data-ends="{ends}"><path class="wire" d="{path}" stroke="var(--{colour})" '
        f'stroke-width="{size:.1f}"/><path class="touch" d="{path}" data-tip="{escape(arrow.tip)}"/>{letter}</g>'
    )


def _node(name: str, key: str, x: float, y: float, thumbnail: str) -> str:
    label = escape(called(name))
    kind = "head" if name.startswith("L") else "other"
    box = f'x="{x - WIDE / 2:.1f}" y="{y - HIGH / 2:.1f}" width="{WIDE}" height="{HIGH}" rx="9"'
    below = f'<g transform="translate({x:.1f} {y + HIGH / 2 + 4:.1f})">{thumbnail}</g>' if thumbnail else ""
    return (
        f'<g class="node {kind}" tabindex="0" role="button" data-opens="{key}" '
        f'aria-label="{label}"><rect {box}/><text x="{x:.1f}" y="{y + 5:.1f}">{label}</text>{below}</g>'
    )


def thumbnails(pictures: Sequence[Any], evidence: Sequence[Sequence[float]]) -> dict[str, str]:
    """Thumbnails for the inputs: the evidence cut out, and the picture it lies in."""
    if not pictures:
        return {}
    home, rect = (int(evidence[0][0]), evidence[0][1:]) if evidence else (0, None)
    picture = pictures[home]

    def cut(x0: float, y0: float, x1: float, y1: float) -> str:
        wide = 42 * (x1 - x0) / (y1 - y0)
        wide, high = (min(wide, WIDE), 42 * min(1.0, WIDE / wide))
        view, size = f"{x0:g} {y0:g} {x1 - x0:g} {y1 - y0:g}", f'width="{picture.width}" height="{picture.height}"'
        return (
            f'<svg x="{-wide / 2:.1f}" width="{wide:.1f}" height="{high:.1f}" viewBox="{view}" '
            f'preserveAspectRatio="none"><image href="{picture.uri}" {size} preserveAspectRatio="none"/></svg>'
        )

    whole = cut(0, 0, picture.width, picture.height)
    shown = {"embed:picture": whole, "embed": whole}
    return shown if rect is None else {**shown, "embed:evidence": cut(*rect)}
