"""What a study says at a glance: three answers and one curve, pooled over all settings (models x domains).

    found = pooled(summary, rams)
    for answer in found["answers"]: print(answer["question"], answer["verdict"], answer["text"])

Every setting has the same weight. The interval of a mean over settings is combined from the settings' intervals
(MOVER: Zou and Donner 2008, Statistics in Medicine 27): with means ``m_i`` in ``[l_i, u_i]``

    low = mean(m) - sqrt(sum_i (m_i - l_i)^2) / k,    high = mean(m) + sqrt(sum_i (u_i - m_i)^2) / k

It therefore covers new samples of *these* settings, not other settings, and assumes that settings are independent.
Settings in which the model is too weak to lose anything are left out of the ablation and listed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from mech.experiments.effects import points
from mech.experiments.findings.cautions import ALPHA
from mech.experiments.findings.words import FLOOR, TOP
from mech.experiments.statistics import bootstrap_interval

STEPS = {"prefill": "prefill", "decoding": "decode"}  # what is timed: in words, in the summary
Bounds = dict[str, float]
Setting = tuple[str, str]
LINES = ("top", "random", "bottom")
ALIKE = 1.5  # two settings' sizes are one point of the curve if their shares differ by less than this factor


def pooled(summary: Mapping[str, Any], rams: Mapping[Setting, xr.Dataset]) -> dict[str, Any]:
    """The three answers of a study with their numbers.

    Args:
        summary: the summary; its ``models`` and ``acceleration`` are used.
        rams: the saved RAM of every (model, domain): top heads are found on half of the samples and measured on the
            other half, which a ranking alone does not allow.

    Returns:
        ``{"scope", "weak": [[model, domain], ...], "retrieval": {"top": I, "bottom": I, "even", "share"},
        "baseline": I, "curve": [{"band", "share", "n_settings", "accuracy": I}, ...],
        "answers": [{"question", "verdict", "text"}, ...]}``
    """
    settings = {
        (model, domain): numbers
        for model, facts in summary["models"].items()
        for domain, numbers in facts["domains"].items()
    }
    weak = [list(setting) for setting, numbers in settings.items() if _too_weak(numbers)]
    strong = {setting: numbers for setting, numbers in settings.items() if list(setting) not in weak}
    masses = {setting: attention_of_top(ram) for setting, ram in rams.items()}
    retrieval = {name: over_settings([mass[name] for mass in masses.values()]) for name in ("top", "bottom")}
    found: dict[str, Any] = {
        "scope": _scope(list(settings), settings),
        "weak": weak,
        "retrieval": {
            **retrieval,
            "share": TOP,
            "even": float(np.mean([float(ram["size_null"].mean()) for ram in rams.values()])),
        },
        "baseline": over_settings([numbers["baseline"]["accuracy"] for numbers in strong.values()]),
        "curve": _curve(list(strong.values())),
    }
    found["answers"] = [
        _retrieves(found, masses, rams),
        _needed(strong, len(weak)),
        _fast(summary.get("acceleration") or {}),
    ]
    return found


def over_settings(bounds: Sequence[Mapping[str, float] | None]) -> Bounds | None:
    """The mean of several means with its interval (MOVER); None if there are none or one is unknown."""
    if not bounds or any(one is None or None in one.values() for one in bounds):
        return None
    mean, low, high = (np.array([one[name] for one in bounds if one]) for name in ("mean", "low", "high"))
    middle, k = float(mean.mean()), len(mean)
    return {
        "mean": middle,
        "low": middle - float(np.sqrt(((mean - low) ** 2).sum())) / k,
        "high": middle + float(np.sqrt(((high - mean) ** 2).sum())) / k,
    }


def attention_of_top(ram: xr.Dataset, share: float = TOP) -> dict[str, Bounds | None]:
    """The mean RAM of the top and bottom heads, chosen on one half of the samples and measured on the other half.

    Heads chosen and measured on the same samples look better than they are.
    """
    values = ram["ram"].transpose("example", "layer", "head").values.astype(float)
    values = values.reshape(len(values), -1)
    if len(values) < 4:
        return {"top": None, "bottom": None}
    k = max(1, round(share * values.shape[1]))
    per_sample = {"top": np.empty(len(values)), "bottom": np.empty(len(values))}
    halves = np.arange(len(values)) % 2
    for half in (0, 1):
        order = np.argsort(-values[halves != half].mean(axis=0), kind="stable")
        for name, heads in (("top", order[:k]), ("bottom", order[-k:])):
            per_sample[name][halves == half] = values[halves == half][:, heads].mean(axis=1)
    return {name: bootstrap_interval(each).as_dict() for name, each in per_sample.items()}


def _too_weak(numbers: Mapping[str, Any]) -> bool:
    low = numbers["baseline"]["accuracy"]["low"]
    return low is not None and low < FLOOR


def _scope(names: Sequence[Setting], settings: Mapping[Setting, Mapping[str, Any]]) -> dict[str, int]:
    return {
        "settings": len(names),
        "models": len({model for model, _ in names}),
        "domains": len({domain for _, domain in names}),
        "n_find": sum(numbers["n_find"] for numbers in settings.values()),
        "n_test": sum(numbers["n_test"] for numbers in settings.values()),
    }


def _curve(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy against the share of heads, for the bands and sizes that all settings have in common."""
    if not settings:
        return []
    fewest = min(settings, key=lambda numbers: len(_shares(numbers)))
    curve = []
    for band in LINES:
        for share in _shares(fewest):
            there = [entry for numbers in settings if (entry := _entry(numbers, band, share))]
            accuracy = over_settings([entry["accuracy"] for entry in there])
            if len(there) == len(settings) and accuracy:
                mean = float(np.mean([entry["fraction"] for entry in there]))
                curve.append({"band": band, "share": mean, "n_settings": len(there), "accuracy": accuracy})
    return curve


def _shares(numbers: Mapping[str, Any]) -> list[float]:
    return sorted(
        {e["fraction"] for e in numbers["ablation"] if e["method"] == _method(numbers) and e["band"] == "top"}
    )


def _method(numbers: Mapping[str, Any]) -> str:
    """Mean ablation if it was used, else the first method."""
    there = dict.fromkeys(entry["method"] for entry in numbers["ablation"])
    return "mean" if "mean" in there or not there else next(iter(there))


def _entry(numbers: Mapping[str, Any], band: str, share: float) -> Mapping[str, Any] | None:
    there = [
        entry
        for entry in numbers["ablation"]
        if entry["method"] == _method(numbers)
        and entry["band"] == band
        and 1 / ALIKE < entry["fraction"] / share < ALIKE
    ]
    return min(there, key=lambda entry: abs(entry["fraction"] - share), default=None)


def _retrieves(
    found: Mapping[str, Any], masses: Mapping[Setting, Mapping[str, Bounds | None]], rams: Mapping[Setting, xr.Dataset]
) -> dict[str, str]:
    question = "Do the top heads retrieve?"
    top, bottom = (found["retrieval"][name] for name in ("top", "bottom"))
    if top is None or bottom is None:
        return _answer(
            question, "Cannot tell", "There are too few samples to choose heads on one half and measure on the other."
        )
    above = [
        setting
        for setting, mass in masses.items()
        if mass["top"] and mass["top"]["low"] > float(rams[setting]["size_null"].mean())
    ]
    text = (
        f"The {TOP:.0%} of heads with the highest RAM put {_percent(top)} of the question's attention on the evidence; "
        f"even attention would put {found['retrieval']['even']:.1%} there, and the lowest {TOP:.0%} put "
        f"{_percent(bottom)}. {_over(len(masses))}, n = {found['scope']['n_find']}; heads are chosen on "
        "one half of the samples and measured on the other."
    )
    return _answer(question, _share_of(len(above), len(masses)), text)


def _needed(settings: Mapping[Setting, Mapping[str, Any]], n_weak: int) -> dict[str, str]:
    question = "Does the answer need them?"
    pairs = {}
    for setting, numbers in settings.items():
        top, random = _entry(numbers, "top", TOP), _entry(numbers, "random", TOP)
        test = top and next(
            (t for t in numbers["tests"] if (t["method"], t["n_heads"]) == (_method(numbers), top["n_heads"])), None
        )
        if top and random and test and test["p_adjusted"] is not None:
            pairs[setting] = (top, random, test)
    lost, control = (over_settings([pair[i]["accuracy_drop"] for pair in pairs.values()]) for i in (0, 1))
    if lost is None or control is None:
        return _answer(
            question, "Not tested", "No setting has a top set and random sets of about a twentieth of the heads."
        )
    sure = sum(test["p_adjusted"] < ALPHA for _, _, test in pairs.values())
    n = sum(settings[setting]["n_test"] for setting in pairs)
    methods = sorted({_method(settings[setting]) for setting in pairs})
    left_out = (
        f" {_settings(n_weak)} where the model is too weak {'is' if n_weak == 1 else 'are'} left out." if n_weak else ""
    )
    text = (
        f"Without them ({' and '.join(methods)} ablation of about {TOP:.0%}) accuracy falls by {points(lost)}, without "
        f"the same number of random other heads by {points(control)}. {_over(len(pairs))}, n = {n}. A setting counts "
        f"if the top heads cost more than random ones, over samples and over sets (both p < {ALPHA:g}).{left_out}"
    )
    return _answer(question, _share_of(sure, len(pairs)), text)


def _fast(accelerated: Mapping[str, Any]) -> dict[str, str]:
    question = "Are a few dense heads enough, and faster?"
    if not accelerated:
        return _answer(question, "Not tested", "This study has no sparse inference.")
    enough = {m: f for m, f in accelerated.items() if f["recommended"] and f["recommended"]["choice"] == "ram"}
    alone = [m for m, f in accelerated.items() if f["recommended"] and f["recommended"]["choice"] == "window"]
    n, margin = sum(f["n_test"] for f in accelerated.values()), 100 * next(iter(accelerated.values()))["margin"]
    text = (
        f"{_kept(accelerated)}. A model counts if dense heads chosen by RAM lose less than {margin:.0f} points over "
        f"the whole interval{f', except {len(alone)} where the window alone does' if alone else ''}. n = {n}, one "
        "domain each."
    )
    faster = sum(_is_faster(facts["recommended"]["speed"]) for facts in enough.values())
    if len(accelerated) > 1:
        verdict = f"Enough i{_share_of(len(enough), len(accelerated), 'model')[1:]}, faster in {faster}"
    else:
        verdict = "Not shown to be enough" if not enough else "Enough, and faster" if faster else "Enough, not faster"
    return _answer(question, verdict, text)


def _is_faster(speed: Mapping[str, Any] | None) -> bool:
    """Whether prefill and decoding are both surely faster than dense at the study's length."""
    return bool(speed) and min(speed["prefill"]["low"], speed["decode"]["low"]) > 1


def _kept(accelerated: Mapping[str, Any]) -> str:
    """What stays dense in each model and what it costs; the largest set tried if none is enough."""
    best = {model: facts["recommended"] for model, facts in accelerated.items() if facts["recommended"] is not None}
    said = []
    if best:
        listed = ", ".join(f"{m} {one['n_kv_heads']} of {accelerated[m]['n_kv_heads']}" for m, one in best.items())
        worst = max((one["loss"] for one in best.values()), key=lambda loss: loss["mean"])
        most = " at most" if len(best) > 1 else ""
        said.append(f"Dense KV heads: {listed}; accuracy falls by {points(worst)}{most}")
        timed = [one["speed"] for one in best.values() if one["speed"]]
        if timed:
            said.append(
                ", ".join(f"{name} at {_times(timed, kind)}" for name, kind in STEPS.items()) + " of dense speed"
            )
    for model, facts in accelerated.items():
        tried = [entry for entry in facts["curve"] if entry["choice"] == "ram"]
        if model not in best and tried:
            most = max(tried, key=lambda entry: entry["share"])
            dense = f"{most['n_kv_heads']} of {facts['n_kv_heads']}"
            said.append(f"{model} loses {points(most['loss'])} with {dense} KV heads dense, the most tried")
        elif model not in best:
            said.append(f"{model} has no set chosen by RAM")
    return "; ".join(said)


def _times(timed: Sequence[Mapping[str, Any]], kind: str) -> str:
    """The speed relative to dense, as a range over models."""
    low, high = (end(speed[kind]["mean"] for speed in timed) for end in (min, max))
    return f"{low:.1f}x" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f}x"


def _answer(question: str, verdict: str, text: str) -> dict[str, str]:
    return {"question": question, "verdict": verdict, "text": text}


def _share_of(k: int, n: int, noun: str = "setting") -> str:
    if n == 1:
        return f"Yes, in the one {noun} tested" if k else f"Not shown in the one {noun} tested"
    return f"In {k} of {n} {noun}s"


def _settings(n: int) -> str:
    return f"{n} setting{'s' * (n != 1)}"


def _over(n: int) -> str:
    return f"Mean over {n} settings" if n > 1 else "One setting"


def _percent(bounds: Mapping[str, float]) -> str:
    digits = 0 if bounds["mean"] >= 0.1 else 1
    return f"{bounds['mean']:.{digits}%} [{100 * bounds['low']:.{digits}f}, {100 * bounds['high']:.{digits}f}]"
