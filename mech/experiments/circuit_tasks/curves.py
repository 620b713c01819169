"""Summaries of a faithfulness curve: CPR, CMD and the AUROC over edges. Needs no model.

area(faithfulness)           # CPR: the area under the curve, 0.999 for a circuit that is whole from the start
area(abs(1 - faithfulness))  # CMD: the area to 1
auroc(np.abs(scores), truth)
"""

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata

from mech.arguments import checked, given_by

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of all edges, as MIB has them
MEASURES = ("cpr", "cmd", "auroc")


def area(values: Float[np.ndarray, "*rest share"]) -> Float[np.ndarray, "*rest"]:
    """The area under a curve over ``SHARES``, by trapezoids, as in MIB: from the first share to all edges."""
    return np.trapezoid(values, SHARES, axis=-1)


def auroc(scores: Float[np.ndarray, " edge"], truth: Bool[np.ndarray, " edge"]) -> float:
    """The probability that a true edge scores higher than another, ties counting half; nan if all or none are true."""
    n_true, n_false = int(truth.sum()), int((~truth).sum())
    if not (n_true and n_false):
        return float("nan")
    ranks = rankdata(scores)  # ties share their mean rank
    return float((ranks[truth].sum() - n_true * (n_true + 1) / 2) / (n_true * n_false))


@checked
def circuit_table(
    result: given_by("circuit_scores", "cpr", "cmd", "faithfulness"),
) -> list[dict[str, float | str]]:
    """CPR (more is better) and CMD (less is better) of every entry, with 95% intervals over examples, and AUROC."""
    rows: list[dict[str, float | str]] = []
    for entry in map(str, result["entry"].values):
        chosen = result.sel(entry=entry)
        row: dict[str, float | str] = {"entry": entry}
        for name in ("cpr", "cmd"):
            row |= {key: float(chosen[key]) for key in (name, f"{name}_low", f"{name}_high")}
        rows.append(row | {"auroc": float(chosen["auroc"])})
    return rows
