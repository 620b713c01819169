"""The logit lens over the picture: which word can be read at every visual token, layer by layer.

    lens_view(logit_lens(model, sample, track=sample.answer), on=sample)    # where can the answer be read?
    lens_view(ov_reading(model, heads, sample), on=sample)                  # what would a head say for each token?

Each cell shows the likeliest word; the other panels show one tracked word each. Colour is its probability (square root,
so that faint readings stay visible) or, for a head's reading, its logit: blue speaks for the word, orange against.
Pointing at a cell shows the likeliest words with their numbers. Without a picture only the grid is drawn. Words cannot
be averaged, so one example is shown.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from mech.axes import EXAMPLE, LAYER
from mech.errors import OutputError
from mech.views.drawing.images import Picture, cell, evidence_on, mark, owners, pictures_on, refuse_many, stage, styles
from mech.views.drawing.page import View, escape, table, tabs
from mech.views.overlay import gradient, heat
from mech.views.patching import diverging_bar

if TYPE_CHECKING:
    from mech.inputs import TokenLayout

CELL = 48  # pixels per token where no picture is given
LETTERS = 7  # letters of a word that fit in a cell


def lens_view(
    result: xr.Dataset, title: str = "", *, on: Any = None, layout: "TokenLayout | None" = None, example: int = 0
) -> View:
    """Words over the picture, a picture for each layer (or head).

    Args:
        result: the result of ``logit_lens`` or ``ov_reading``.
        title: heading of the view, and title of a saved page.
        on: the ``Sample`` or the picture.
        layout: the inputs' layout; without it tokens are equal cells of the picture.
        example: which of several examples.

    Raises:
        OutputError: no such example.
    """
    if not 0 <= example < result.sizes[EXAMPLE]:
        raise OutputError(f"example={example}", f"0 to {result.sizes[EXAMPLE] - 1}", "leave it out for the first")
    drawn = result.isel(example=example)
    lens = _Lens.of(drawn, on, layout)
    series, measure, placed = lens.series, lens.measure, lens.placed
    shown = {"likeliest word": (drawn[measure].isel(place=0).values, True)}
    if f"tracked_{measure}" in drawn:
        for i, word in enumerate(drawn["tracked"].values.tolist()):
            shown[f"“{word}”"] = (drawn[f"tracked_{measure}"].values[..., i], False)
    refuse_many(len(shown) * drawn.sizes[series] * len(placed))
    panels = {}
    for name, (values, written) in shown.items():
        if len(placed):
            panels[name] = lens.stages(values, written)
    there = "".join(_words(drawn, series, measure, np.setdiff1d(np.arange(drawn.sizes["position"]), placed)))
    where = "the stream entering each layer" if series == LAYER else "each head"
    note = f"{drawn.attrs.get('model', '')} · {measure} of words at {where}"
    note += f" · example {example + 1} of {result.sizes[EXAMPLE]}" if result.sizes[EXAMPLE] > 1 else ""
    figures = drawn.sizes[series] * len({home for home, _ in lens.rects})
    height = 170 + 480 * -(-figures // 2) + (40 * (drawn.sizes[series] + 2) if there else 0)
    title = title or ("Logit lens" if series == LAYER else "What heads write from what they attend to")
    body = f"<h3>{escape(title)}</h3><p class=soft>{escape(note)}</p>{styles(lens.pictures)}"
    return View(title, body + (tabs(panels, "word") if panels else "") + there, height=height)


@dataclass(frozen=True, eq=False)
class _Lens:
    """One example, ready to draw: the positions that lie in pictures, and where."""

    drawn: xr.Dataset
    series: str  # the axis that has a picture per entry
    measure: str
    placed: np.ndarray
    rects: Sequence[tuple[int, list[float]]]
    pictures: Sequence[Picture]
    evidence: Sequence[Sequence[float]]

    @classmethod
    def of(cls, drawn: xr.Dataset, on: Any, layout: Any) -> "_Lens":
        series = LAYER if LAYER in drawn.dims else "sender"
        measure = "probability" if "probability" in drawn else "logit"
        placed = np.flatnonzero(drawn["row"].values >= 0) if "row" in drawn.coords else np.array([], int)
        pictures = pictures_on(on) if on is not None and len(placed) else _blank(drawn, placed)
        rects = [_rect(drawn, int(p), pictures, layout) for p in placed]
        return cls(drawn, series, measure, placed, rects, pictures, evidence_on(on))

    def stages(self, values: np.ndarray, written: bool) -> str:
        """One measure over the pictures, a picture for each layer or head."""
        signed = bool((values < 0).any())
        most = max(float(np.abs(values[:, self.placed]).max()), 1e-9)
        figures = []
        for i, name in enumerate(self.drawn[self.series].values.tolist()):
            for k in sorted({home for home, _ in self.rects}):  # frames without their own token are left out
                marks = "".join(self._marks(i, k, values[i] / most, signed, written))
                outlined = [rect for home, *rect in self.evidence if home == k]
                caption = f"{'layer ' if self.series == LAYER else ''}{name}"
                caption += f", picture {k}" if len(self.pictures) > 1 else ""
                figure = stage(self.pictures[k], marks, dim=bool(self.pictures[k].uri), evidence=outlined)
                figures.append(f"<figure>{figure}<figcaption><b>{escape(caption)}</b></figcaption></figure>")
        unit = "logits" if self.measure == "logit" else "probability"
        bar = diverging_bar(0.0, most, unit) if signed else gradient(unit, most)
        return f'<div class="cells wide">{"".join(figures)}</div>{bar}'

    def _marks(self, i: int, k: int, shares: np.ndarray, signed: bool, written: bool) -> Iterator[str]:
        """The cells of picture ``k``, each coloured by its share of the largest value."""
        for p, (home, rect) in zip(self.placed.tolist(), self.rects, strict=True):
            if home != k:
                continue
            share = float(shares[p])
            colour = f"var(--{'plus' if share > 0 else 'minus'})" if signed else heat(abs(share) ** 0.5)
            opacity = 0.82 * abs(share) if signed else 0.1 + 0.75 * abs(share) ** 0.5
            yield mark(rect, colour, opacity, _says(self.drawn, self.series, i, p))
            word = str(self.drawn["word"].values[i, p, 0])
            if written and "\ufffd" not in word:  # part of a letter is not a word; the tooltip still shows it
                yield _written(rect, word)


def _blank(shown: xr.Dataset, placed: np.ndarray) -> list[Picture]:
    """Empty pictures with the tokens' grids."""
    if not len(placed):
        return []
    owner, pages = owners(shown["image"].values, shown["frame"].values)[placed], []
    for k in range(int(owner.max(initial=-1)) + 1):
        rows, cols = (int(shown[axis].values[placed[owner == k]].max(initial=0)) + 1 for axis in ("row", "col"))
        pages.append(Picture("blank", cols * CELL, rows * CELL, ""))
    return pages


def _rect(shown: xr.Dataset, p: int, pictures: Sequence[Picture], layout: Any) -> tuple[int, list[float]]:
    """The picture that a position lies in, and where."""
    owner = owners(shown["image"].values, shown["frame"].values)
    home, position = int(owner[p]), int(shown["position"].values[p])
    if home >= len(pictures):
        raise OutputError(f"a token of picture {home}, and {len(pictures)} pictures", "all of them", "pass on=sample")
    if layout is not None and not np.isnan(layout.visual.rect[position]).any():
        return home, layout.visual.rect[position].tolist()
    rows, cols = (int(shown[axis].values[owner == home].max()) + 1 for axis in ("row", "col"))
    return home, cell((int(shown["row"].values[p]), int(shown["col"].values[p])), (rows, cols), pictures[home])


def _says(shown: xr.Dataset, series: str, i: int, p: int) -> str:
    """The tooltip of a cell."""
    measure = "probability" if "probability" in shown else "logit"
    where = f"row {int(shown['row'].values[p])}, column {int(shown['col'].values[p])}"
    head = f"{series} {shown[series].values[i]}, {where} (position {int(shown['position'].values[p])})"
    lines = [
        f"{word.strip()}  {value:.3g}"
        for word, value in zip(shown["word"].values[i, p].astype(str), shown[measure].values[i, p], strict=True)
    ]
    if f"tracked_{measure}" in shown:
        ranks = shown["tracked_rank"].values[i, p] if "tracked_rank" in shown else [None] * shown.sizes["tracked"]
        for word, value, rank in zip(
            shown["tracked"].values, shown[f"tracked_{measure}"].values[i, p], ranks, strict=True
        ):
            lines.append(f"{word}: {value:.3g}" + (f" (rank {int(rank)})" if rank is not None else ""))
    return "\n".join([head, *lines])


def _written(rect: Sequence[float], word: str) -> str:
    """A word in its cell, as large as it fits."""
    x0, y0, x1, y1 = rect
    word = word.strip()
    word = word if len(word) <= LETTERS else word[: LETTERS - 1] + "…"
    size = min(0.42 * (y1 - y0), 1.5 * (x1 - x0) / max(len(word), 2))
    return (
        f'<text class="word" x="{(x0 + x1) / 2:g}" y="{(y0 + y1) / 2 + size / 3:g}" font-size="{size:.2g}">'
        f"{escape(word)}</text>"
    )


def _words(shown: xr.Dataset, series: str, measure: str, positions: np.ndarray) -> list[str]:
    """A table of the likeliest words at positions that lie in no picture."""
    if not len(positions):
        return []
    names = [escape(shown["position"].values[p]) for p in positions.tolist()]
    rows = []
    for i, name in enumerate(shown[series].values.tolist()):
        words = shown["word"].values[i, positions, 0].astype(str)
        numbers = shown[measure].values[i, positions, 0]
        cells = [f"{escape(w.strip())} <small>{v:.2g}</small>" for w, v in zip(words, numbers, strict=True)]
        rows.append([escape(name), *cells])
    return [table([escape(series), *names], rows, f"The likeliest word at each position, with its {measure}")]
