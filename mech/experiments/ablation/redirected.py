"""Tables of results by band and strength: what happened to the answers when heads were pulled. Needs no model."""

from collections.abc import Callable, Mapping

import numpy as np
import xarray as xr

from mech.arguments import checked, given_by
from mech.errors import ExperimentError
from mech.experiments.effects import share

BAND, BIAS = "band", "bias"


def table(
    result: xr.Dataset, axis: str, cells: Callable[[xr.Dataset], Mapping[str, float]]
) -> list[dict[str, float | str]]:
    """A row for every band and strength: what ``cells`` computes from its sets and samples."""
    rows: list[dict[str, float | str]] = []
    for band in dict.fromkeys(map(str, result[BAND].values)):
        here = result.isel(set=np.flatnonzero(result[BAND].values == band))
        for strength in result[axis].values:
            rows.append({"band": band, axis: float(strength), **cells(here.sel({axis: strength}))})
    return rows


@checked
def redirection_table(result: given_by("redirection", BAND, BIAS, "redirected")) -> list[dict[str, float | str]]:
    """The share of redirected and of kept answers for every band and bias, with 95% intervals.

    The intervals are over samples; for random heads over samples and sets.
    """
    return table(result, BIAS, _shares)


def _shares(here: xr.Dataset) -> dict[str, float]:
    cells: dict[str, float] = {}
    for name in ("redirected", "kept"):
        bounds = share(here[name].values)
        if bounds is None:
            raise ExperimentError(
                f"{name!r} of a redirection with missing values", "an answer for every sample",
                "select with sel or isel: where() leaves gaps",
            )  # fmt: skip
        cells |= {name: bounds["mean"], f"{name}_low": bounds["low"], f"{name}_high": bounds["high"]}
    return cells
