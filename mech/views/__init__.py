"""Pictures of results: single views for notebooks and papers, and the report of a study. No model is needed.

    from mech.views import view, report
    view(result)                       # the fitting picture; shows itself in Jupyter
    view(grid, on=sample)              # drawn over the picture, where the result has a place in it
    view(result).save("figure.pdf")    # or .html (complete, offline), .png, .svg
    report("study")                    # study/report.html

The view is chosen by the result's variables and dimensions. Samples, layouts, inputs, rankings and circuits are shown
as well; in Jupyter they show themselves through ``view``.
"""

from inspect import signature
from pathlib import Path
from typing import Any

import xarray as xr

from mech.arguments import checked
from mech.deprecation import renamed_options
from mech.errors import OutputError
from mech.views.agreement import agreement_view, modality_view, sample_curve_view, transfer_view
from mech.views.attention import attention_view
from mech.views.causal import causal_view
from mech.views.circuit import circuit_scores_view, circuit_view
from mech.views.curves import ablation_curves
from mech.views.drawing.page import View
from mech.views.frontier import frontier_view, sparsity_view
from mech.views.heatmap import head_maps, ram_map
from mech.views.lens import lens_view
from mech.views.objects import inputs_view, layout_view, sample_view, samples_view
from mech.views.overlay import maps_view
from mech.views.patching import attribution_map, patching_grid
from mech.views.report.report import report
from mech.views.sets import redirection_view, retrieval_view, steering_view

__all__ = [
    "View",
    "ablation_curves",
    "agreement_view",
    "attention_view",
    "attribution_map",
    "causal_view",
    "circuit_scores_view",
    "circuit_view",
    "frontier_view",
    "head_maps",
    "inputs_view",
    "layout_view",
    "lens_view",
    "maps_view",
    "modality_view",
    "patching_grid",
    "ram_map",
    "redirection_view",
    "report",
    "retrieval_view",
    "sample_curve_view",
    "sample_view",
    "samples_view",
    "sparsity_view",
    "steering_view",
    "transfer_view",
    "view",
]


@checked
def view(result: Any, *, on: Any = None, folder: str | Path | None = None, **options: Any) -> View:
    """The picture that fits a result.

    Args:
        result: what a measurement returned (see the gallery in the docs), or a ``Circuit``, ``Ranking``,
            ``CausalReport``, ``Sample``, ``Samples``, ``Inputs`` or ``TokenLayout``.
        on: the picture to draw over: a ``Sample`` (its evidence is outlined), an image, an array or a path; or several.
        folder: the folder with the pictures of a saved "maps" dataset.
        options: options of the view: ``title``; ``layout`` (the inputs' layout, where cells are positions) for patching
            and attributions; ``ranking`` and ``maps`` for circuits; ``measure`` for ablation.

    Raises:
        OutputError: no view fits, or the picture is missing or does not fit.
    """
    result = getattr(result, "dataset", result)  # a causal report has one
    if hasattr(result, "cache_dict") or (hasattr(result, "__array__") and not hasattr(result, "dims")):
        what = f"a tensor of shape {tuple(result.shape)}" if hasattr(result, "shape") else "an activation cache"
        raise OutputError(
            f"{what}, whose tokens are unknown", "a result of mech",
            "draw attention with mech.view(mech.token_attention(model, inputs, layers=[3]))",
        )  # fmt: skip
    options = renamed_options(options, {"looks": "maps"})
    draw = _dataset_view(result) if isinstance(result, xr.Dataset) else _object_view(result)
    takes = signature(draw).parameters
    given = {name: value for name, value in {"on": on, **options}.items() if value is not None}
    if unknown := [name for name in given if name not in takes]:
        known = ", ".join(name for name in list(takes)[1:] if name != "folder")
        raise OutputError(f"{unknown[0]}= with {draw.__name__}", known, f"leave {unknown[0]} out")
    if draw is attribution_map and on is None:
        raise OutputError("attributions without a picture", "the picture they are drawn over", "pass on=sample")
    return draw(result, **given, **({"folder": folder} if "folder" in takes else {}))


def _dataset_view(result: xr.Dataset) -> Any:
    """The view that draws a dataset, chosen by what is in it."""
    names, dims = set(map(str, result.data_vars)), set(map(str, result.dims))
    if "shown" in dims:
        return maps_view
    if "quadrant" in names:
        return causal_view
    if "faithfulness" in names:
        return circuit_scores_view
    if "found_on" in dims:
        return transfer_view
    if "factor" in dims:
        return steering_view
    if "bias" in dims:
        return redirection_view
    if "reciprocal_rank" in names:
        return retrieval_view
    if {"choice", "share"} <= set(map(str, result.variables)):
        return frontier_view
    if {"band", "fraction"} <= set(map(str, result.variables)):
        return ablation_curves
    if "origin" in names:
        return modality_view
    if "word" in names:
        return lens_view
    if "jaccard_null" in names:
        return agreement_view
    if {"size", "split"} <= dims:
        return sample_curve_view
    if "effect" in names:
        return circuit_view if {"sender", "receiver"} <= dims else patching_grid
    if "attribution" in names:
        return attribution_map
    return ram_map if "ram" in names and "size_null" in names else head_maps


def _object_view(result: Any) -> Any:
    """The view that draws anything else, chosen by its attributes."""
    if isinstance(result, xr.DataArray):
        if {"query", "key"} <= set(map(str, result.dims)):
            return attention_view
        return ram_map if set(result.dims) <= {"example", "layer", "head"} else head_maps
    for asked, draw in (
        ("graph", circuit_view), ("heads", ram_map), ("counterfactual", sample_view), ("domains", samples_view),
        ("layouts", inputs_view), ("spans", layout_view),
    ):  # fmt: skip
        if hasattr(result, asked):
            return draw
    return ram_map
