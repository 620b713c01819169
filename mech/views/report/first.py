"""The first screen: one picture of heads that attend, one curve of what removing heads costs, and three answers.

The picture is not chosen by what it shows: it is the middle one of the questions drawn, from the first setting with the
fewest pictures per question. The curve and the answers come from ``mech.experiments.findings.pooled``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mech.results.schema import map_facts
from mech.views import curves
from mech.views.drawing.page import chart, escape
from mech.views.overlay import BandPicture, band_pictures, gradient
from mech.views.report.folder import Setting

BANDS = {
    "top": "The top {n} heads by RAM",
    "necessary": "{n} necessary heads with low RAM",
    "bottom": "The bottom {n} heads by RAM",
}


def first_screen(found: Mapping[str, Any], settings: Sequence[Setting]) -> str:
    """Picture, curve and answers.

    Args:
        found: the result of ``pooled``.
        settings: all settings of the study.
    """
    return f'<div class="first" id="first">{_picture(settings)}{_curve(found)}{_answers(found["answers"])}</div>'


def _answers(answers: Sequence[Mapping[str, str]]) -> str:
    items = [
        f"<li>{escape(answer['question'])}<b>{escape(answer['verdict'])}</b>{escape(answer['text'])}</li>"
        for answer in answers
    ]
    return f'<ol class="short">{"".join(items)}</ol>'


def _picture(settings: Sequence[Setting]) -> str:
    setting = min(settings, key=lambda one: len(map_facts(one.maps)[0]["pictures"]))
    middle = setting.maps.sizes["example"] // 2
    facts = map_facts(setting.maps)[middle]
    original, bands, most = band_pictures(setting.maps, setting.folder, middle)
    query = "each head from its deciding query" if "queries" in facts else "attention of the question"
    many = len(facts["pictures"]) > 1
    columns = f' style="--columns:{min(len(facts["pictures"]), 6)}"'
    right = "right" if str(facts["prediction"]).strip() == str(facts["answer"]).strip() else "wrong"
    said = f"The model says <b>{escape(facts['prediction'])}</b>, which is {right}. Outlined: the evidence"
    figures = [f'<figure><div class="strip"{columns}>{original}</div><figcaption>{said}</figcaption></figure>']
    figures += [_band(band, columns) for band in bands]
    return (
        f"<section><h2>“{escape(facts['question'])}”</h2>"
        f'<div class="trio{" wide" if many else ""}">{"".join(figures)}</div>'
        f"{gradient('attention on one visual token', most, power=1)}"
        f'<p class="soft">{escape(setting.name)}, the middle sample of this setting; {query}.</p></section>'
    )


def _band(band: BandPicture, columns: str) -> str:
    name = escape(BANDS.get(band.band, band.band).format(n=band.heads))
    return (
        f'<figure><div class="strip"{columns}>{band.stages}</div><figcaption><b>{name}</b> put {band.evidence:.0%} of '
        f"their attention on the evidence, {band.visual:.0%} on the picture</figcaption></figure>"
    )


def _curve(found: Mapping[str, Any]) -> str:
    scope, curve, base = found["scope"], found["curve"], found["baseline"]
    if not curve or base is None:
        return (
            "<section><h2>Accuracy without heads</h2><p>No number of heads was ablated in every setting.</p></section>"
        )
    n = curve[0]["n_settings"]
    over = f"Mean over {n} settings" if n > 1 else "One setting"
    weak = f", excluding {len(found['weak'])} too weak to lose anything" if found["weak"] else ""
    see = (
        f"The ranking matters where the top line lies below the shaded band of random heads. {over} "
        f"(n = {scope['n_test']}{weak}); 95% intervals."
    )
    return (
        f"<section><h2>Accuracy without top, bottom or random heads</h2>{_drawn(curve, base)}"
        f'<p class="soft">{see}</p></section>'
    )


def _drawn(curve: Sequence[Mapping[str, Any]], base: Mapping[str, float]) -> str:
    shares = sorted({point["share"] for point in curve})
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter", "mode": "lines", "name": "no head removed", "x": [shares[0], shares[-1]],
            "y": [base["mean"]] * 2, "line": {"color": "@none", "width": 1.5, "dash": "dot"},
            "hovertemplate": f"no head removed: {_interval(base)}<extra></extra>",
        }
    ]  # fmt: skip
    for band, name in (("random", "random heads"), ("bottom", "bottom of the ranking"), ("top", "top of the ranking")):
        line = [point for point in curve if point["band"] == band]
        if line:
            traces += _band_traces(line, band, name)
    layout = {
        "xaxis": {
            "type": "log", "title": "share of all heads ablated (log scale)", "tickvals": shares,
            "ticktext": [f"{100 * share:.2g}%" for share in shares], "showgrid": False,
        },
        "yaxis": {"title": "accuracy", "range": [-0.03, 1.05], "tickformat": ".0%", "zeroline": False},
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 13}},
        "margin": {"l": 8, "r": 8, "t": 34, "b": 8},
    }  # fmt: skip
    return chart(traces, layout, height=300, label="Accuracy against the share of heads ablated, all settings pooled")


def _band_traces(line: Sequence[Mapping[str, Any]], band: str, name: str) -> list[dict[str, Any]]:
    x = [point["share"] for point in line]
    mean, low, high = (np.array([point["accuracy"][end] for point in line]) for end in ("mean", "low", "high"))
    _, symbol, dash = curves.looks_like(band)
    trace: dict[str, Any] = {
        "type": "scatter", "mode": "lines+markers", "name": name, "x": x, "y": mean,
        "text": [f"<b>{name}</b>, {at['share']:.1%} of the heads<br>{_interval(at['accuracy'])}" for at in line],
        "hovertemplate": "%{text}<extra></extra>",
        "line": {"color": f"@{band}", "width": 2.5, "dash": dash},
        "marker": {"symbol": symbol, "size": 8, "color": f"@{band}"},
    }  # fmt: skip
    if band == "random":
        edge = {
            "type": "scatter",
            "mode": "lines",
            "x": x,
            "hoverinfo": "skip",
            "line": {"width": 0},
            "showlegend": False,
        }
        return [edge | {"y": low}, edge | {"y": high, "fill": "tonexty", "fillcolor": "@random-soft"}, trace]
    trace["error_y"] = {
        "type": "data", "symmetric": False, "array": high - mean, "arrayminus": mean - low,
        "color": f"@{band}", "thickness": 1.2, "width": 3,
    }  # fmt: skip
    return [trace]


def _interval(bounds: Mapping[str, float]) -> str:
    return f"accuracy {bounds['mean']:.1%} [{100 * bounds['low']:.1f}, {100 * bounds['high']:.1f}]"
