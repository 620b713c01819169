"""What heads attend to: their attention drawn over the pictures, token by token.

    maps_view(dataset, folder)      # the "maps" dataset of a study and the folder with its pictures
    maps_view(dataset, on=samples)  # one of ``mech.attention_maps``, and the samples it was made from

For each question: the original pictures with the evidence outlined, then for every head the picture in grey with its
attention over it. The query is named under each head: the question (the mean over its tokens), or the one token at
which the head decides the answer. All heads of one question share one linear colour scale: a dark picture means that
the head attends elsewhere or spreads its attention thin, not that it was scaled. The numbers under a head are sums for
this question: over the tokens that touch the evidence, and over all visual tokens ("visual"). The rest of 1 lies on
text.

Maps that know which tokens are sinks (``mech.with_sinks``) have a switch that hides the sinks and rescales the rest.
``tenths`` draws a head from each tenth of a ranking, in one row.

A visual token of a video may stand for several frames; it is drawn on the first of them, and frames without their own
token are shown only in the original strip.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from mech.data.pictures import shows
from mech.data.samples import Sample, pictures_of
from mech.errors import OutputError
from mech.files import is_below
from mech.results.schema import check, map_facts
from mech.views.drawing.images import Picture, embedded, mark, stage, styles
from mech.views.drawing.page import View, escape

BAND_TITLES = {
    "top": "Top heads of the ranking",
    "necessary": "Necessary heads with low RAM: they attend elsewhere, but the answer needs them",
    "bottom": "Bottom heads of the ranking",
}
BAND_COLOURS = {"top": "top", "necessary": "matched", "bottom": "bottom"}
TENTH = "tenth"  # the band of ``of_each_tenth``, drawn as one row
HEAT = ("#3b0f70", "#8c2981", "#de4968", "#fe9f6d", "#fcfdbf")
FAINTEST = 0.02  # of the colour scale; below it nothing is drawn


@dataclass(frozen=True)
class _Example:
    """One question, ready to draw: arrays over the tokens that are not padding."""

    facts: Mapping[str, Any]
    pictures: Sequence[Picture]
    attention: np.ndarray  # shown, token
    rect: np.ndarray  # token, corner
    image: np.ndarray  # token
    on_evidence: np.ndarray  # token, bool
    sink: np.ndarray  # shown, token, bool: a sink of that head's layer

    def most(self, shown: Sequence[int], without_sinks: bool = False) -> float:
        """The end of a colour scale shared by some of the heads."""
        rows = self.attention[list(shown)]
        return float(np.where(self.sink[list(shown)] & without_sinks, 0.0, rows).max(initial=0.0)) or 1.0


def maps_view(
    result: xr.Dataset, folder: str | Path | None = None, title: str = "What heads attend to", on: Any = None
) -> View:
    """The attention of top and bottom heads over the pictures of a few questions.

    Args:
        result: a "maps" dataset (from ``mech.attention_maps`` or a study).
        folder: the folder with the picture files that it names.
        title: heading of the view, and title of a saved page.
        on: instead of the folder, the samples the dataset was made from; or the picture, if there is only one.

    Raises:
        OutputError: a picture is missing or unreadable, or the dataset is not a "maps" dataset.
    """
    check(result, "maps")
    if folder is None and on is None:
        raise OutputError(
            "a 'maps' dataset without its pictures", "their folder, or the samples",
            "view(maps, folder=...) or view(maps, on=samples)",
        )  # fmt: skip
    sources = _beside(result, Path(folder)) if folder is not None else _given(result, on)
    middle = result.sizes["example"] // 2
    example = _read(result, middle, map_facts(result)[middle], [embedded(source) for source in sources[middle]])
    body = f"<h3>{escape(title)}</h3>{_tenths(example, _shown(result))}{_articles(result, sources)}"
    return View(title, body, height=60 + 620 * result.sizes["example"])


def map_articles(result: xr.Dataset, folder: Path) -> str:
    """All questions of the dataset, one below the other, with pictures from a folder."""
    check(result, "maps")
    return _articles(result, _beside(result, folder))


def map_of_head(result: xr.Dataset, shown: int, on: Any) -> str:
    """One head over the pictures of the first example; their pixels must be on the page (``images.styles``)."""
    facts = map_facts(result)[0]
    example = _read(result, 0, facts, [embedded(source) for source in _given(result.isel(example=[0]), on)[0]])
    return _head(example, shown, *_shown(result)[shown][1:], range(len(example.attention)))


def tenths(result: xr.Dataset, folder: Path) -> str:
    """One head from each tenth of the ranking on the middle sample, as a row of pictures; "" if none were drawn."""
    check(result, "maps")
    middle = result.sizes["example"] // 2
    sources = [embedded(source) for source in _beside(result, folder)[middle]]
    example = _read(result, middle, map_facts(result)[middle], sources)
    return f"{styles(example.pictures)}{_tenths(example, _shown(result))}"


def _tenths(example: _Example, shown: list[tuple[str, str, float]]) -> str:
    of_band = [i for i, (band, _, _) in enumerate(shown) if band == TENTH]
    if not of_band or not example.facts["evidence"]:
        return ""
    # Of several pictures the one with the evidence; for a frame without tokens, the last frame before it with some.
    home = max((k for k in example.image.tolist() if k <= example.facts["evidence"][0][0]), default=0)
    most, least = (example.most(of_band, without_sinks=without) for without in (False, True))
    figures = []
    for place, i in enumerate(of_band):
        row, (_, name, ram) = example.attention[i], shown[i]
        low, high = (round(100 * end / len(of_band)) for end in (place, place + 1))
        part = f"top {high}%" if not place else f"last {100 - low}%" if high == 100 else f"{low}–{high}%"
        said = f"<b>{name}</b>RAM {ram:.2f}<br>here {row[example.on_evidence].sum():.2f}"
        figures.append(
            f'<figure data-head="{name}" {_scales(example, of_band)}><p class="soft">{part}</p>'
            f"{_stage(example, home, row, most, least, example.sink[i])}<figcaption>{said}</figcaption></figure>"
        )
    return f'<div class="tenths">{"".join(figures)}</div>{_scale(example, of_band, "; one scale for the whole row")}'


@dataclass(frozen=True)
class BandPicture:
    """The mean attention of one band's heads over the pictures of a question."""

    band: str
    heads: int
    stages: str  # HTML
    evidence: float  # attention mass on the tokens that touch the evidence
    visual: float  # on all visual tokens


def band_pictures(result: xr.Dataset, folder: Path, i: int = 0) -> tuple[str, list[BandPicture], float]:
    """The pictures of example ``i``: the originals, then under each band's mean attention; and the end of the scale."""
    facts = map_facts(result)[i]
    example = _read(result, i, facts, [embedded(source) for source in _beside(result, folder)[i]])
    bands = np.array([band for band, _, _ in _shown(result)])
    rows = {str(band): example.attention[bands == band].mean(axis=0) for band in dict.fromkeys(bands) if band != TENTH}
    most = max(float(row.max(initial=0.0)) for row in rows.values()) or 1.0
    pictures = []
    for band, row in rows.items():
        stages = "".join(_stage(example, k, row, most, most) for k in sorted(set(example.image.tolist())))
        on_evidence = float(row[example.on_evidence].sum())
        pictures.append(BandPicture(band, int((bands == band).sum()), stages, on_evidence, float(row.sum())))
    originals = "".join(_stage(example, k) for k in range(len(example.pictures)))
    return styles(example.pictures) + originals, pictures, most


def _beside(result: xr.Dataset, folder: Path) -> list[list[Any]]:
    """The pictures that a result names: files in its own folder, with unchanged pixels."""
    sources = []
    for facts in map_facts(result):
        sources.append([folder / name for name in facts["pictures"]])
        for path, digest in zip_longest(sources[-1], facts.get("digests", [])):
            if not is_below(path, folder):
                raise OutputError(
                    f"the picture {path} lies outside {folder}", "pictures in the folder of the result",
                    "do not trust this file; pass on=samples",
                )  # fmt: skip
            if digest is not None and not shows(path, digest):
                raise OutputError(
                    f"{path} is missing, damaged or another picture", "the one the result was made with",
                    "run the study again: it rewrites damaged pictures",
                )  # fmt: skip
    return sources


def _given(result: xr.Dataset, on: Any) -> list[list[Any]]:
    """The pictures of each example, from what a user passed as ``on=``."""
    facts = map_facts(result)[: result.sizes["example"]]
    given = [on] if isinstance(on, Sample) or not isinstance(on, Sequence) or isinstance(on, str) else list(on)
    if len(facts) == 1 and not any(isinstance(item, Sample) for item in given):
        given = [given]
    if len(given) != len(facts):
        raise OutputError(
            f"{len(given)} samples for {len(facts)} examples", "those it was made from", "pass on=samples"
        )
    sources = []
    for item, example in zip(given, facts, strict=True):
        count = len(example["pictures"])
        if isinstance(item, Sample):
            item = pictures_of(item, -(-len(item.video) // count) or 1)
        sources.append(list(item) if isinstance(item, list | tuple) else [item])
        if len(sources[-1]) != count:
            raise OutputError(
                f"{len(sources[-1])} pictures for an example with {count}", "all of them", "pass on=samples"
            )
    return sources


def _articles(result: xr.Dataset, sources: Sequence[Sequence[Any]]) -> str:
    examples = [_read(result, i, facts, [embedded(source) for source in sources[i]])
             for i, facts in enumerate(map_facts(result))]  # fmt: skip
    articles = "".join(_article(example, _shown(result)) for example in examples)
    return f"{styles(picture for example in examples for picture in example.pictures)}{articles}"


def _read(result: xr.Dataset, i: int, facts: Mapping, pictures: Sequence[Picture]) -> _Example:
    drawn = result.isel(example=i)
    image = drawn["token_image"].values.astype(int)
    there = np.flatnonzero(image >= 0)
    if there.size and image.max() >= len(pictures):
        raise OutputError(
            f"a token of picture {image.max()} in an example with {len(pictures)}", "an index of a picture"
        )
    attention = np.nan_to_num(drawn["attention"].values[:, there].astype(float))
    rect, image = drawn["rect"].values[there].astype(float), image[there]
    sink = drawn["sink"].values[:, there] > 0 if "sink" in drawn else np.zeros(attention.shape, dtype=bool)
    return _Example(facts, pictures, attention, rect, image, _touches(facts["evidence"], rect, image), sink)


def _touches(evidence: Sequence[Sequence[float]], rect: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Which tokens share area with the evidence."""
    inside = np.zeros(len(rect), dtype=bool)
    for picture, x0, y0, x1, y1 in evidence:
        # Frames of a video that share a token have it on the first: the nearest earlier frame with one stands in.
        earlier = image[image <= picture]
        home = earlier.max() if earlier.size else picture
        wide = np.minimum(rect[:, 2], x1) - np.maximum(rect[:, 0], x0)
        high = np.minimum(rect[:, 3], y1) - np.maximum(rect[:, 1], y0)
        inside |= (image == home) & (wide > 0) & (high > 0)
    return inside


def _shown(result: xr.Dataset) -> list[tuple[str, str, float]]:
    """(band, name, mean RAM) of every head drawn."""
    columns = (result[f"shown_{name}"].values.tolist() for name in ("band", "layer", "head", "ram"))
    return [(str(band), f"L{layer}H{head}", ram) for band, layer, head, ram in zip(*columns, strict=True)]


def _article(example: _Example, shown: list[tuple[str, str, float]]) -> str:
    facts = example.facts
    of_bands = [i for i, (band, _, _) in enumerate(shown) if band != TENTH]
    right = str(facts["prediction"]).strip() == str(facts["answer"]).strip()
    verdict = "✓" if right else "✗"
    originals = "".join(_stage(example, k) for k in range(len(example.pictures)))
    many = len(example.pictures) > 1
    bands = []
    for band in dict.fromkeys(shown[i][0] for i in of_bands):
        drawn = [_head(example, i, *shown[i][1:], of_bands) for i in of_bands if shown[i][0] == band]
        title = BAND_TITLES.get(band, band)
        style = f"--band:var(--{BAND_COLOURS.get(band, 'accent')})"
        name = f'<p class="band-name" style="{style}">{escape(title)}</p>'
        bands.append(f'<div>{name}<div class="heads">{"".join(drawn)}</div></div>')
    answer, prediction = escape(facts["answer"]), escape(facts["prediction"])
    strip = f'<div class="strip" style="--columns:{_columns(len(example.pictures), 8)}">{originals}</div>'
    scale = _scale(example, of_bands, "; one scale for all heads of this question")
    original = f"{strip}<figcaption>The model's input; outlined: the evidence</figcaption>"
    return (
        f'<article class="maps{" many" if many else ""}"><p class="question">{escape(facts["question"])}</p>'
        f'<p class="answers">answer <b>{answer}</b> · model says <b>{prediction}</b> {verdict}</p>'
        f'<div class="maps-grid"><figure class="original">{original}</figure>'
        f'<div class="bands">{"".join(bands)}</div></div>{scale}</article>'
    )


def _head(example: _Example, i: int, name: str, ram: float, among: Sequence[int]) -> str:
    """One head over the pictures, on the scale it shares with the heads in ``among``."""
    row = example.attention[i]
    numbers = f"evidence {row[example.on_evidence].sum():.2f} · visual {row.sum():.2f}"
    if example.sink.any():
        numbers += f" · sinks {row[example.sink[i]].sum():.2f}"
    asked = str((example.facts.get("queries") or {i: "question"})[i])
    token, colon, lost = asked.rpartition(": ")
    query = (
        f"from {escape(token)}, where it decides {escape(lost)} of the answer"
        if colon
        else f"from the {escape(asked)} (mean)"
    )
    return (
        f'<figure data-head="{name}" {_scales(example, among)}>{_strip(example, i, among, 4)}'
        f"<figcaption><b>{name}</b> · mean RAM {ram:.2f}<br>{query}<br>{numbers}</figcaption></figure>"
    )


def _strip(example: _Example, i: int, among: Sequence[int], columns: int) -> str:
    """The pictures that have tokens, under the attention of one head."""
    with_tokens = sorted(set(example.image.tolist()))
    most, least = (example.most(among, without_sinks=without) for without in (False, True))
    stages = "".join(_stage(example, k, example.attention[i], most, least, example.sink[i]) for k in with_tokens)
    return f'<div class="strip" style="--columns:{_columns(len(with_tokens), columns)}">{stages}</div>'


def _scales(example: _Example, among: Sequence[int]) -> str:
    """The ends of the scale with and without sinks, for the switch in ``page.js``."""
    if not example.sink.any():
        return ""
    return f'data-most="{example.most(among):.4g}" data-most-without="{example.most(among, without_sinks=True):.4g}"'


def _scale(example: _Example, among: Sequence[int], note: str) -> str:
    """The colour scale; if there are sinks, one with and one without them, and the switch between the two."""
    what = "attention on one visual token"
    if not example.sink.any():
        return gradient(what, example.most(among), note, power=1)
    n = int(example.sink.any(axis=0).sum())
    switch = (
        f'<label class="sinks"><input type="checkbox" class="hide-sinks"> hide sinks ({n} visual '
        f"token{'s' * (n > 1)} of this sample; dashed)</label>"
    )
    ends = [gradient(what, example.most(among, without), note, power=1) for without in (False, True)]
    return f'{switch}<div class="with">{ends[0]}</div><div class="without">{ends[1]}</div>'


def _stage(
    example: _Example,
    k: int,
    row: np.ndarray | None = None,
    most: float = 1.0,
    least: float = 1.0,
    sink: np.ndarray | None = None,
) -> str:
    """One picture: the original with its evidence (``row`` None), or dimmed under the attention of a head.

    ``least`` is the end of the scale without sinks: marks visible only on that scale are in the page, but hidden.
    """
    marks = []
    if row is not None:
        # Line breaks and class tokens of a picture have no place in it.
        for token in np.flatnonzero((example.image == k) & ~np.isnan(example.rect).any(axis=1)):
            strength, is_sink = float(row[token] / most), sink is not None and bool(sink[token])
            if is_sink or row[token] >= FAINTEST * min(least, most):
                tip = f"attention {row[token]:.3g}{', a sink' if is_sink else ''}"
                opacity = 0.85 * min(1.0, strength + 0.1) if strength >= FAINTEST else 0.0
                marks.append(mark(example.rect[token], heat(strength), opacity, tip, "sink" if is_sink else ""))
    outlined = [rect for home, *rect in example.facts["evidence"] if home == k]
    return stage(example.pictures[k], "".join(marks), dim=row is not None, evidence=outlined)


def heat(strength: float) -> str:
    """The scale's colour at a value between 0 and 1."""
    at = min(max(strength, 0.0), 1.0) * (len(HEAT) - 1)
    i = min(int(at), len(HEAT) - 2)
    ends = [[int(colour[k : k + 2], 16) for k in (1, 3, 5)] for colour in HEAT[i : i + 2]]
    mixed = [round(a + (b - a) * (at - i)) for a, b in zip(*ends, strict=True)]
    return "#" + "".join(f"{value:02x}" for value in mixed)


def gradient(what: str, most: float, note: str = "", power: int = 2) -> str:
    """The colour scale of values drawn with ``heat((value / most) ** (1 / power))``."""
    style = f"background:linear-gradient(90deg,{','.join(HEAT)})"
    return (
        f'<p class="heat-legend">{escape(what)}: 0 <i style="{style}"></i> {most:.2g}'
        f"<span>(middle of the bar: {most / 2**power:.2g}{escape(note)})</span></p>"
    )


def _columns(n: int, most: int) -> int:
    return n if n <= most else -(-n // -(-n // most))
