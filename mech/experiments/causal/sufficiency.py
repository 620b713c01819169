"""Are the top heads needed, and do they choose the evidence? Read from a causal report's dataset; needs no model.

facts = facts_of(report.dataset)
facts["necessary"], facts["sufficient"]
print(sentence_of(facts))
"""

from typing import Any

import xarray as xr

from mech.errors import ExperimentError
from mech.experiments.ablation.redirected import redirection_table
from mech.experiments.effects import Bounds, interval, share

BANDS = ("top", "random", "all")
NAMES = ("redirected", "kept", "logit_diff")


def redirection_of(dataset: xr.Dataset) -> xr.Dataset | None:
    """What ``redirection`` measured, from the dataset of a causal report; None if heads were not pulled."""
    if "redirected" not in dataset:
        return None
    found = dataset[[*NAMES, *(f"plain_{name}" for name in NAMES)]]
    found = found.assign_coords(heads=("set", dataset["pulled"].values))
    about = {"model": dataset.attrs.get("model", ""), "domain": dataset.attrs.get("domain", "")}
    return found.assign_attrs(about, kind="redirection", n_heads=len(str(found["heads"].values[0]).split()))


def facts_of(dataset: xr.Dataset) -> dict[str, Any] | None:
    """Necessity and sufficiency of the top heads in plain numbers; None if heads were not pulled.

    ``lost`` by band, ``redirected`` by band at the largest bias, ``plain`` without a pull, ``dose`` for every bias; and
    whether the set is ``necessary`` (at least the report's threshold is lost, and the interval lies above the mean of
    random heads) and ``sufficient`` (the interval of redirected answers lies above the mean of random heads and the
    interval without a pull).
    """
    found = redirection_of(dataset)
    if found is None:
        return None
    strongest = float(max(found["bias"].values, key=abs))
    dose, bands = redirection_table(found), found["band"].values.astype(str)
    lost = {band: _at(interval(dataset["set_noised"].values[bands == band])) for band in BANDS}
    answers = {
        str(row["band"]): {"mean": row["redirected"], "low": row["redirected_low"], "high": row["redirected_high"]}
        for row in dose
        if row["bias"] == strongest
    }
    plain = _at(share(found["plain_redirected"].values[None]))
    return {
        "heads": str(found["heads"].values[0]).split(),
        "draws": int((bands == "random").sum()),
        "bias": strongest,
        "lost": lost,
        "redirected": answers,
        "plain": plain,
        "necessary": lost["top"]["mean"] >= dataset.attrs["threshold"]
        and lost["top"]["low"] > max(0.0, lost["random"]["mean"]),
        "sufficient": float(answers["top"]["low"]) > max(float(answers["random"]["mean"]), plain["high"]),
        "dose": dose,
    }


def sentence_of(facts: dict[str, Any]) -> str:
    """Necessity and sufficiency of the top heads in a sentence."""
    lost, answers, n = facts["lost"], facts["redirected"], len(facts["heads"])
    verdict = {
        (True, True): "they are needed, and they choose where the answer comes from",
        (True, False): "they are needed, but are not shown to choose where the answer comes from",
        (False, True): "they choose where the answer comes from, but are not shown to be needed",
        (False, False): "they are not shown to be needed, nor to choose where the answer comes from",
    }[facts["necessary"], facts["sufficient"]]
    return (
        f"The top {n} head{'s' * (n > 1)} of the ranking, noised together, lose{'s' * (n == 1)} "
        f"{_percent(lost['top'])} of the gap (random heads {_percent(lost['random'])}); pulled to a distractor by a "
        f"bias of {facts['bias']:g}, {_percent(answers['top'])} of the answers become the distractor's (random heads "
        f"{_percent(answers['random'])}, all heads {_percent(answers['all'])}, unpulled {_percent(facts['plain'])}): "
        f"{verdict}."
    )


def _at(bounds: Bounds | None) -> Bounds:
    if bounds is None:
        raise ExperimentError(
            "a causal report with missing values", "an effect for every sample",
            "leave out samples whose clean and corrupted runs give the same answer",
        )  # fmt: skip
    return bounds


def _percent(bounds: Bounds) -> str:
    mean, low, high = (round(100 * bounds[name]) for name in ("mean", "low", "high"))  # whole numbers have no -0
    return f"{mean}% [{low}, {high}]"
