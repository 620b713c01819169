"""Pictures against text: which heads a model shares between them, and what the heads of each are worth for the other.

Takes the datasets of a study's ``forms``; the numbers in its sentences come from the summary.
"""

from collections.abc import Mapping
from typing import Any

import xarray as xr

from mech.views.agreement import modality_view, transfer_view
from mech.views.drawing.page import escape, tabs

ROWS = {"answer": "rows that write the answer", "question": "rows of the question (RAM)"}


def forms_section(found: Mapping[str, Mapping[str, xr.Dataset]], models: Mapping[str, Mapping[str, Any]]) -> str:
    """A card for each model whose language model was trained before it saw pictures.

    Args:
        found: model -> the datasets ``question``, ``answer`` and ``transfer``.
        models: the models of the summary.
    """
    cards = "".join(_card(name, parts, models[name]["forms"]) for name, parts in found.items())
    return (
        '<section id="forms"><h2>Pictures and text: are they the same heads?</h2>'
        '<p class="see">Every scene was shown both as a picture and as text. Points at the upper right are heads that '
        "attend to the evidence in both; in the table of losses, a row with high costs in both columns is a set of "
        f"heads that serves both.</p>{cards}</section>"
    )


def _card(name: str, parts: Mapping[str, xr.Dataset], facts: Mapping[str, Any]) -> str:
    panels = {
        title: modality_view(parts[rows], "Attention to the evidence from the " + title).body
        for rows, title in ROWS.items()
    }
    right = ", ".join(f"{share:.0%} on {form}" for form, share in facts["accuracy"].items())
    lost = transfer_view(parts["transfer"], "What the heads found on each form cost on both").body
    note = (
        f"{escape(name)} on {escape(facts['domain'])}, numbers of three digits: {facts['n_find']} scenes find heads, "
        f"{facts['n_test']} others test them (unablated: {right}). In small print: {facts['draws']} random sets."
    )
    return f'<div class="card">{tabs(panels, "rows")}<p class="soft">{note}</p>{lost}</div>'
