"""Pictures of results: single views for notebooks, and the report of a study. No model is needed to draw them.

from mech.views import view, report
view(dataset)                      # the picture that fits the dataset; shows itself in Jupyter
view(looks, folder="study/llava-m/grounding").save("looks.html")
report("study")                    # study/report.html
"""

from pathlib import Path
from typing import Any

import xarray as xr

from mech.errors import OutputError
from mech.views.agreement import agreement_view
from mech.views.causal import causal_view, patching_grid
from mech.views.curves import ablation_curves
from mech.views.heatmap import ram_map
from mech.views.overlay import looks
from mech.views.page import View
from mech.views.report import report

__all__ = [
    "View",
    "ablation_curves",
    "agreement_view",
    "causal_view",
    "looks",
    "patching_grid",
    "ram_map",
    "report",
    "view",
]


def view(result: Any, *, folder: str | Path | None = None) -> View:
    """The picture that fits a result.

    Args:
        result: a dataset of kind "ram", "ablation" or "looks"; a RAM ``DataArray``; a ranking of heads; what
            ``activation_patching`` or ``agreement`` returned; or a causal report.
        folder: where the pictures of a "looks" dataset lie.
    """
    if isinstance(result, xr.Dataset) and "attention" in result:
        if folder is None:
            raise OutputError(
                "a 'looks' dataset without its folder", "the folder of its pictures", "view(looks, folder=...)"
            )
        return looks(result, folder)
    if isinstance(result, xr.Dataset) and {"accuracy", "logit_diff"} & set(map(str, result.data_vars)):
        return ablation_curves(result)
    whole = getattr(result, "dataset", result)
    if isinstance(whole, xr.Dataset) and "quadrant" in whole:
        return causal_view(whole)
    if isinstance(result, xr.Dataset) and "effect" in result:
        return patching_grid(result)
    if isinstance(result, xr.Dataset) and "jaccard_null" in result:
        return agreement_view(result)
    return ram_map(result)
