"""Effects of patching, as a grid of numbers and over the picture itself.

    patching_grid(scores)                                  # any result of ``activation_patching`` or ``attribution``
    patching_grid(grid, on=image)                          # over=(..., "region"), regions=layout.cells(6, 6)
    patching_grid(scores, on=image, layout=inputs.layout)  # over=(..., "position"), or regions that are positions
    attribution_map(found, on=image)                       # the result of ``input_attribution``

The colour shows how far the answer moved, centred on 0, no effect: blue towards the run that was patched from (the
answer comes back when denoising, is lost when noising), orange away from it. Cells are drawn at their place in the
picture; what has none (the question, the last token) is in a separate grid. Pointing at a cell shows its value with a
95% bootstrap interval over the examples. A result over several examples is drawn over one of them: cells are places,
not contents.
"""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from mech.axes import EXAMPLE, TOKEN
from mech.errors import OutputError
from mech.views.drawing.images import Picture, cell, evidence_on, mark, owners, pictures_on, refuse_many, stage, styles
from mech.views.drawing.intervals import mean_interval
from mech.views.drawing.page import View, chart, escape
from mech.views.heatmap import map_height, step

if TYPE_CHECKING:
    from mech.inputs import TokenLayout

PLACED = ("region", "position", TOKEN)  # axes that may lie in a picture
NOTES = {
    "denoise": "0: nothing is recovered; 1: the whole answer is.",
    "noise": "0: nothing is lost; 1: the whole answer is.",
}
_BOX = re.compile(r"Box\(x0=([\d.]+), y0=([\d.]+), x1=([\d.]+), y1=([\d.]+), image=(\d+), frame=(\w+)\)")
Places = Mapping[int, Sequence[tuple[int, Sequence[float]]]]  # index on the axis -> (picture, rectangle)


@dataclass(frozen=True)
class _Effects:
    """Means over examples with intervals: rows (of any axis, or one) by columns (the last axis)."""

    axes: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    start: float  # the value of no effect
    unit: str

    @classmethod
    def of(cls, effect: xr.DataArray, start: float, unit: str) -> "_Effects":
        axes = tuple(str(dim) for dim in effect.dims if dim != EXAMPLE)
        if not 1 <= len(axes) <= 2:
            raise OutputError(f"a sweep over {axes}", "one or two axes", "choose one value: result.sel(layer=3)")
        placed = [axis for axis in axes if axis in PLACED]
        if placed and axes[-1] != placed[-1]:  # places are columns
            effect = effect.transpose(..., placed[-1])
            axes = tuple(str(dim) for dim in effect.dims if dim != EXAMPLE)
        if EXAMPLE not in effect.dims:
            effect = effect.expand_dims(EXAMPLE)
        mean, low, high = (
            part.reshape(-1, effect.sizes[axes[-1]]) for part in mean_interval(effect.transpose(EXAMPLE, ...).values)
        )
        rows = ("",) if len(axes) == 1 else tuple(str(value) for value in effect[axes[0]].values)
        return cls(axes, rows, tuple(str(v) for v in effect[axes[-1]].values), mean, low, high, start, unit)

    @property
    def reach(self) -> float:
        """The largest distance from no effect."""
        far = np.abs(self.mean[np.isfinite(self.mean)] - self.start)
        return max(float(far.max(initial=0.0)), 1e-9)

    def only(self, columns: Sequence[int]) -> "_Effects":
        at = list(columns)
        parts = {name: getattr(self, name)[:, at] for name in ("mean", "low", "high")}
        return replace(self, columns=tuple(self.columns[i] for i in at), **parts)

    def says(self, row: int, column: int, where: str = "") -> str:
        """The tooltip of a cell."""
        name = f"{self.axes[-1]} {self.columns[column]}{where}"
        head = name if len(self.axes) == 1 else f"{self.axes[0]} {self.rows[row]}, {name}"
        low, high = self.low[row, column], self.high[row, column]
        between = f" [{low:.3f}, {high:.3f}]" if np.isfinite(low) else ""
        value = self.mean[row, column]
        return f"{head}\n" + (f"effect {value:.3f}{between}" if np.isfinite(value) else "not patched")


def patching_grid(result: xr.Dataset, title: str = "", *, on: Any = None, layout: "TokenLayout | None" = None) -> View:
    """The mean effect of every cell of a sweep over one or two axes; with ``on``, over a picture.

    Args:
        result: what ``activation_patching`` or ``attribution`` returned.
        title: heading of the view, and title of a saved page.
        on: the picture, a ``Sample`` (its evidence is outlined), or several pictures.
        layout: the inputs' layout, if cells are positions.

    Raises:
        OutputError: a sweep over three axes, or a picture in which no cell lies.
    """
    attrs = result.attrs
    effects = _Effects.of(effects_from_zero(result), 0.0, "share of the gap")
    facts = [str(attrs[name]) for name in ("model", "point", "positions", "direction") if name in attrs]
    note = f"{escape(' · '.join(facts))}. {NOTES.get(str(attrs.get('direction')), '')}"
    if "rank_correlation" in attrs:  # an estimate states how far it can be trusted
        note += f" Rank correlation with exact patching, on a sample of cells: {float(attrs['rank_correlation']):.2f}."
    title = title or ("Attribution patching (estimated)" if "rank_correlation" in attrs else "Activation patching")
    head = f"<h3>{escape(title)}</h3><p class=soft>{note}</p>"
    if on is None:
        return View(title, head + _grid(effects), height=map_height(len(effects.rows)) + 140)
    pictures = pictures_on(on)
    places = _places(effects, pictures, layout)
    rest = [i for i in range(len(effects.columns)) if i not in places]
    body = head + _over(effects, places, pictures, evidence_on(on))
    if rest:
        beside = effects.only(rest)
        if layout is not None and effects.axes[-1] == "position":
            beside = replace(beside, columns=tuple(f"{p} {layout.tokens[int(p)].strip()}" for p in beside.columns))
        body += f"<h4>Effects outside the picture</h4>{_grid(beside, effects.reach)}"
    figures = len(effects.rows) * len({home for there in places.values() for home, _ in there})
    height = 610 if figures == 1 else 140 + 265 * -(-figures // 4)
    return View(title, body, height=height + (map_height(len(effects.rows)) + 40) * bool(rest))


def effects_from_zero(result: xr.Dataset) -> xr.DataArray:
    """The effects of a patching result with 0 as no effect.

    Results that do not say what zero means were saved when noising reported what was left: 1 was no effect.
    """
    attrs = result.attrs
    left = attrs.get("direction") == "noise" and "zero" not in attrs and "norm" not in attrs  # not edge attribution
    return 1 - result["effect"] if left else result["effect"]


def attribution_map(result: xr.Dataset, title: str = "", *, on: Any, layout: "TokenLayout | None" = None) -> View:
    """What every visual token or pixel adds to the metric, over the picture.

    Args:
        result: the result of ``input_attribution``.
        title: heading of the view, and title of a saved page.
        on: the picture or the ``Sample``.
        layout: the inputs' layout; without it tokens are equal cells of the picture.
    """
    values = result["attribution"]
    unit = str(values.attrs.get("unit", ""))
    pictures, evidence = pictures_on(on), evidence_on(on)
    metric, gap, total = float(result["metric"]), float(result["metric"] - result["baseline"]), float(values.sum())
    note = (
        f"{escape(result.attrs.get('model', ''))} · {escape(result.attrs.get('measure', ''))}. The metric is "
        f"{metric:.2f}, {gap:+.2f} against the baseline; the attributions sum to {total:+.2f}."
    )
    if values.dims == (TOKEN,):
        effects = _Effects.of(values, 0.0, unit)
        body = _over(effects, _places(effects, pictures, layout, result), pictures, evidence)
    elif values.dims == ("picture", "y", "x"):
        reach = max(float(np.abs(values).max()), 1e-9)
        drawn = [
            _figure(stage(picture, _veil(values.values[k], reach, picture), dim=True,
                          evidence=[rect for home, *rect in evidence if home == k]), "")
            for k, picture in enumerate(pictures[: len(values)])
        ]  # fmt: skip
        body = f'{styles(pictures)}<div class="cells">{"".join(drawn)}</div>{diverging_bar(0.0, reach, unit)}'
    else:
        raise OutputError(f"attributions over {values.dims}", "over tokens or pixels", "use over='visual'")
    title = title or "What each part of the picture contributes"
    return View(title, f"<h3>{escape(title)}</h3><p class=soft>{note}</p>{body}", height=620)


def _grid(effects: _Effects, reach: float | None = None) -> str:
    """All cells as a heatmap."""
    reach = reach or effects.reach
    text = [[f"<b>{escape(tip[0])}</b><br>{escape(tip[1])}"
             for tip in (effects.says(i, j).split("\n") for j in range(len(effects.columns)))]
            for i in range(len(effects.rows))]  # fmt: skip
    ordered = [_consecutive(names) for names in (effects.columns, effects.rows)]
    heat = {
        "type": "heatmap",
        "z": effects.mean,
        "zmin": effects.start - reach,
        "zmax": effects.start + reach,
        "colorscale": "@diverging",
        "text": text,
        "hovertemplate": "%{text}<extra></extra>",
        "hoverongaps": False,
        "xgap": 1,
        "ygap": 1,
        "x": [int(name) if ordered[0] else escape(name) for name in effects.columns],
        "y": [int(name) if ordered[1] else escape(name) for name in effects.rows],
        "colorbar": {
            "title": {"text": escape(effects.unit), "side": "right", "font": {"size": 13}},
            "thickness": 12,
            "outlinewidth": 0,
            "tickfont": {"size": 13},
        },
    }
    flat, plain = len(effects.axes) == 1, {"showgrid": False, "zeroline": False}
    kinds = [
        {"dtick": step(len(names)) if len(names) <= 64 else None} if whole else {"type": "category"}
        for whole, names in zip(ordered, (effects.columns, effects.rows), strict=True)
    ]
    layout = {
        "xaxis": {"title": escape(effects.axes[-1]), **plain, **kinds[0]},
        "yaxis": {"title": "" if flat else escape(effects.axes[0]), "showticklabels": not flat, **plain, **kinds[1]},
    }
    height = 190 if flat else map_height(len(effects.rows))
    return chart([heat], layout, height=height, label=f"Effect of patching by {' and '.join(effects.axes)}")


def _consecutive(names: Sequence[str]) -> bool:
    """Whether an axis counts up by one: then its ticks may be thinned; otherwise every value has a tick."""
    return all(name.isdigit() for name in names) and len({int(name) - i for i, name in enumerate(names)}) == 1


def _places(
    effects: _Effects, pictures: Sequence[Picture], layout: "TokenLayout | None", result: xr.Dataset | None = None
) -> Places:
    """Which picture each column lies in, and where: from the layout, or from the columns' names."""
    axis, seen = effects.axes[-1], {}
    at = {name: result[name].values for name in ("image", "frame", "row", "col")} if result is not None else {}
    cells = [tuple(map(int, name.split(","))) if re.fullmatch(r"\d+,\d+", name) else None for name in effects.columns]
    known = [named for named in cells if named is not None]
    size = (max((r for r, _ in known), default=0) + 1, max((c for _, c in known), default=0) + 1)
    for i, name in enumerate(effects.columns):
        position = int(result["pos"].values[i]) if result is not None else int(name) if name.isdigit() else None
        if layout is not None and position is not None:
            visual = layout.visual
            if position < len(visual) and not np.isnan(visual.rect[position]).any():
                home = int(owners(visual.image[position], visual.frame[position]))
                seen[i] = [(home, visual.rect[position].tolist())]
        elif at and at["row"][i] >= 0:
            owner = owners(at["image"], at["frame"])
            home, same = int(owner[i]), owner == owner[i]
            grid = int(at["row"][same].max()) + 1, int(at["col"][same].max()) + 1
            if home < len(pictures):
                seen[i] = [(home, cell((int(at["row"][i]), int(at["col"][i])), grid, pictures[home]))]
        elif axis == "region" and (named := cells[i]) is not None:
            seen[i] = [(0, cell(named, size, pictures[0]))]
        elif axis == "region" and (boxes := _BOX.findall(name)):
            seen[i] = [(int(box[4]) if box[5] == "None" else int(box[5]), [float(v) for v in box[:4]]) for box in boxes]
    lost = [home for places in seen.values() for home, _ in places if home >= len(pictures)]
    if not seen or lost:
        what = f"a cell in picture {lost[0]}, and {len(pictures)} pictures" if lost else f"no {axis} inside it"
        raise OutputError(
            f"a picture to draw on, and {what}",
            "over=('layer', 'region') with regions=layout.cells(6, 6) or boxes, or over 'position' with layout=",
            "pass layout=inputs.layout, every picture in a list, or leave out on=",
        )
    return seen


def _over(effects: _Effects, places: Places, pictures: Sequence[Picture], evidence: Sequence[Sequence[float]]) -> str:
    """Every row of effects over the pictures, on one scale."""
    reach, drawn = effects.reach, []
    refuse_many(len(effects.rows) * sum(map(len, places.values())))
    homes = sorted({home for there in places.values() for home, _ in there})  # a frame may have no token
    for row, name in enumerate(effects.rows):
        for k in homes:
            picture, marks = pictures[k], []
            for column, there in places.items():
                for home, rect in there:
                    if home == k and np.isfinite(effects.mean[row, column]):
                        x0, y0, x1, y1 = rect
                        where = f" (pixels {x0:.0f}-{x1:.0f}, {y0:.0f}-{y1:.0f})"
                        away = (effects.mean[row, column] - effects.start) / reach
                        colour = f"var(--{'plus' if away > 0 else 'minus'})"
                        marks.append(mark(rect, colour, 0.82 * abs(away), effects.says(row, column, where)))
            outlined = [rect for home, *rect in evidence if home == k]
            caption = f"{effects.axes[0]} {name}" if name else ""
            caption += f"{', ' if caption else ''}picture {k}" if len(pictures) > 1 else ""
            drawn.append(_figure(stage(picture, "".join(marks), dim=True, evidence=outlined), caption))
    bar = diverging_bar(effects.start, reach, effects.unit)
    return f'{styles(pictures)}<div class="cells">{"".join(drawn)}</div>{bar}'


def _figure(drawn: str, caption: str) -> str:
    return f"<figure>{drawn}<figcaption><b>{escape(caption)}</b></figcaption></figure>"


def diverging_bar(start: float, reach: float, unit: str) -> str:
    """The colour scale of what is drawn over pictures."""
    gradient = "background:linear-gradient(90deg,var(--minus),rgba(128,128,128,0.15),var(--plus))"
    ends = (f"{value:.2g}" for value in (start - reach, start + reach))
    low, high = ends
    return (
        f'<p class="heat-legend">{escape(unit)}: {low} <i style="{gradient}"></i> {high}'
        f"<span>(no colour: no effect, {start:g})</span></p>"
    )


def _veil(values: np.ndarray, reach: float, picture: Picture) -> str:
    """Pixel values as a transparent picture in SVG."""
    from PIL import Image

    shade = np.zeros((*values.shape, 4), dtype=np.uint8)
    shade[..., :3] = np.where(values[..., None] > 0, (43, 123, 186), (226, 106, 44))
    shade[..., 3] = (np.sqrt(np.abs(values) / reach) * 235).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(shade, "RGBA").save(buffer, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<image href="{uri}" width="{picture.width}" height="{picture.height}" preserveAspectRatio="none"/>'
