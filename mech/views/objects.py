"""Samples, layouts and inputs as pictures: what was asked, where the evidence is, and what every position is.

sample_view(sample)                     # pictures with the evidence outlined, and the counterfactual
layout_view(inputs.layout, on=sample)   # every token, and the grid of visual tokens over the picture
inputs_view(inputs)                     # the same for every row, and the tensors
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from mech.data.samples import Sample, Samples
from mech.errors import OutputError
from mech.views.drawing.images import Picture, evidence_on, mark, owners, pictures_on, stage, styles
from mech.views.drawing.page import View, escape, table

if TYPE_CHECKING:
    from mech.inputs import Inputs, TokenLayout

MOST_PICTURES = 12  # per sample
MOST_SAMPLES = 8
MOST_TOKENS = 400  # text tokens
MOST_ROWS = 4
TEXT, IMAGE, VIDEO, PADDING = 0, 1, 2, 3  # as in ``TokenLayout.kind``


def sample_view(sample: Sample, title: str = "") -> View:
    """A question with its pictures, the evidence outlined, and its counterfactual."""
    pictures = pictures_on(sample)
    drawn = _pictures(sample, pictures)
    other = sample.counterfactual
    if other is not None:
        theirs = pictures_on(other)
        pictures += theirs
        halves = (("the sample", sample, drawn), ("its counterfactual", other, _pictures(other, theirs)))
        both = "".join(
            f'<div><p class="answers">{name}: <b>{escape(part.answer)}</b></p>{half}</div>'
            for name, part, half in halves
        )
        drawn = f'<div class="multiples apart">{both}</div>'
    told = f"{sample.domain}, {sample.id}" if sample.id else sample.domain
    body = (
        f'{styles(pictures)}<p class="question">{escape(sample.question)}</p>'
        f'<p class="answers">answer <b>{escape(sample.answer)}</b> · {escape(told)} · outlined: the evidence</p>{drawn}'
    )
    return View(title or "Sample", body, height=580)


def samples_view(samples: Samples, title: str = "") -> View:
    """The first samples, and how many there are of each domain."""
    first = list(samples)[:MOST_SAMPLES]
    shown, cells = [], []
    for sample in first:
        home = int(evidence_on(sample)[0][0]) if sample.evidence else 0
        picture = pictures_on(sample)[home]
        shown.append(picture)
        outlined = [rect for at, *rect in evidence_on(sample) if at == home]
        words = f"{escape(sample.question)} <b>{escape(sample.answer)}</b>"
        cells.append(f"<figure>{stage(picture, evidence=outlined)}<figcaption>{words}</figcaption></figure>")
    counts = ", ".join(f"{domain}: {sum(s.domain == domain for s in samples)}" for domain in samples.domains)
    note = f"{len(samples)} samples ({counts}); shown: the evidence pictures of the first {len(first)}"
    body = f'{styles(shown)}<p class="soft">{escape(note)}</p><div class="cells">{"".join(cells)}</div>'
    return View(title or "Samples", body, height=560)


def layout_view(layout: "TokenLayout", title: str = "", *, on: Any = None) -> View:
    """What every position of a row is; with ``on`` also the visual tokens over their pictures.

    Args:
        layout: the layout of a row of inputs.
        title: heading of the view, and title of a saved page.
        on: the sample or the pictures it was made from.
    """
    body = f'<p class="soft">{escape(repr(layout))}</p>{_tokens(layout)}'
    if on is not None:
        pictures = pictures_on(on)
        if len(pictures) != len(layout.visual.images):
            raise OutputError(
                f"{len(pictures)} pictures for a layout of {len(layout.visual.images)}", "those it was made from",
                "pass on=sample",
            )  # fmt: skip
        stages = "".join(
            f"<figure>{stage(picture, _grid(layout.visual, k))}</figure>" for k, picture in enumerate(pictures)
        )
        body += f'{styles(pictures)}<div class="cells">{stages}</div>'
    return View(title or "Layout", body, height=620 if on is not None else 260)


def inputs_view(inputs: "Inputs", title: str = "", *, on: Any = None) -> View:
    """The rows of a batch, position by position, and its tensors."""
    samples = list(on) if isinstance(on, Samples | list | tuple) and len(inputs) > 1 else [on] * len(inputs)
    rows = [layout_view(layout, on=sample).body for layout, sample in zip(inputs.layouts, samples, strict=False)]
    more = f"<p class=soft>and {len(rows) - MOST_ROWS} more rows</p>" if len(rows) > MOST_ROWS else ""
    tensors = [[escape(name), "×".join(map(str, value.shape)), escape(str(value.dtype).removeprefix("torch."))]
               for name, value in inputs.tensors.items()]  # fmt: skip
    body = "".join(rows[:MOST_ROWS]) + more + table(["tensor", "shape", "type"], tensors)
    return View(title or "Inputs", body, height=(600 if on is not None else 160) + 40 * (len(tensors) + 1))


def _pictures(sample: Sample, pictures: list[Picture]) -> str:
    outlined = evidence_on(sample)
    cells = "".join(
        f"<figure>{stage(picture, evidence=[rect for home, *rect in outlined if home == k])}</figure>"
        for k, picture in enumerate(pictures[:MOST_PICTURES])
    )
    more = f'<p class="soft">and {len(pictures) - MOST_PICTURES} more</p>' if len(pictures) > MOST_PICTURES else ""
    return f'<div class="cells">{cells}</div>{more}'


def _tokens(layout: "TokenLayout") -> str:
    """Text token by token, each run of visual tokens as one box."""
    question, chips, shown = set(layout.spans.get("question", ())), [], 0
    edges = np.flatnonzero(np.diff(np.stack([layout.kind, layout.image, layout.frame]), axis=1).any(0)) + 1
    for run in np.split(np.arange(len(layout)), edges):
        first, last, kind = int(run[0]), int(run[-1]), int(layout.kind[run[0]])
        if kind == TEXT:
            for position in run.tolist():
                shown += 1
                if shown > MOST_TOKENS:
                    continue
                name = " asked" if position in question else ""
                chips.append(
                    f'<span class="token{name}" data-tip="position {position}">{escape(layout.tokens[position])}</span>'
                )
            continue
        names = {PADDING: "padding", IMAGE: f"image {layout.image[first]}", VIDEO: f"frame {layout.frame[first]}"}
        what = names[kind]
        tip = f"{what}\npositions {first} to {last}"
        chips.append(f'<span class="token visual" data-tip="{escape(tip)}">{escape(what)}: {len(run)} tokens</span>')
    more = f'<span class="soft">and {shown - MOST_TOKENS} more</span>' if shown > MOST_TOKENS else ""
    key = '<span class="token asked">question</span> <span class="token visual">visual</span>'
    return f'<p class="tokens">{"".join(chips)}{more}</p><p class="soft">{key} other text: the template</p>'


def _grid(layout: "TokenLayout", k: int) -> str:
    """The rectangles of a picture's visual tokens, tiles over the whole view."""
    first = k - k % layout.frames_per_token  # the first of the frames that a token shows together
    owner, seen = owners(layout.image, layout.frame), ~np.isnan(layout.rect).any(axis=1)
    here = np.flatnonzero((owner == first) & seen)
    return "".join(
        mark(
            layout.rect[p].tolist(), "#fff", 0.0, f"position {p}\nrow {layout.row[p]}, column {layout.col[p]}"
        ).replace("<rect", '<rect class="cell"')
        for p in here[np.argsort(layout.view[here], kind="stable")].tolist()
    )
