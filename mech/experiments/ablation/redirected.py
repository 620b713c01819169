"""What became of answers when heads were pulled: the table of ``redirection``. No model is needed."""

import numpy as np

from mech.arguments import checked, given_by
from mech.experiments.effects import share

BAND, BIAS = "band", "bias"


@checked
def redirection_table(result: given_by("redirection", BAND, BIAS, "redirected")) -> list[dict[str, float | str]]:
    """Of every band and bias the share of redirected and of kept answers, with 95% intervals.

    Over samples; of random heads over samples and sets.
    """
    table: list[dict[str, float | str]] = []
    for band in dict.fromkeys(map(str, result[BAND].values)):
        here = result.isel(set=np.flatnonzero(result[BAND].values == band))
        for bias in result[BIAS].values:
            row: dict[str, float | str] = {"band": band, "bias": float(bias)}
            for name in ("redirected", "kept"):
                bounds = share(here[name].sel(bias=bias).values)
                assert bounds is not None  # no answer is missing
                row |= {name: bounds["mean"], f"{name}_low": bounds["low"], f"{name}_high": bounds["high"]}
            table.append(row)
    return table
