"""What an acceleration result says: losses at equal budget, tests, the recommended setting, and sentences about them.

    facts = summarise(found)                      # ``found`` is what ``mech.acceleration`` returned
    facts["recommended"]                          # the smallest budget that keeps accuracy, or None
    for kind, text, against in sentences(facts): print(text)

Losses are dense minus sparse, paired by sample. There is a test for each of three questions. Does the ranking by RAM
keep more answers than the same number of random KV groups (the larger of two p-values, sign flips over samples and its
rank among the random sets; Holm over the shares)? Does another choice keep more, or fewer, than RAM (two-sided, Holm
over choices and shares)? Does the window alone keep them, so that no ranking is needed?

**The recommended setting** is the smallest share of dense KV groups chosen by RAM, or none at all, for which the 95%
interval of the loss ends below ``margin``. The rule is fixed before the numbers are seen, and no choice is picked by
its result. If another choice needs fewer dense groups, that is reported separately.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import xarray as xr

from mech.axes import CONDITION, EXAMPLE
from mech.experiments.effects import against_random, drop, p_is, points, share
from mech.experiments.findings.words import FLOOR
from mech.experiments.power import ALPHA
from mech.experiments.statistics import accuracy_interval, holm, proportion_interval, sign_flip_test

MARGIN = 0.1  # a loss of accuracy that is surely smaller is accepted
NAMES = {
    "ram": "RAM", "bottom": "the lowest RAM", "random": "chance", "vision": "attention on all visual tokens",
    "causal": "causal effect", "gates": "learned gates", "reach": "reach", "dynamic": "reach, chosen for each input",
    "layers": "whole layers by RAM",
}  # fmt: skip
KINDS = {
    "sparse": "A few dense heads, with a local window for the others, keep the answers",
    "not sparse": "No number of dense heads tried is shown to keep the answers",
    "window": "The window alone keeps the answers: which heads stay dense does not matter",
    "dense wins": "Dense heads chosen by RAM keep more answers than the same number of random ones",
    "dense draws": "Dense heads chosen by RAM are not shown to keep more answers than the same number of random ones",
    "dense beaten": "Another choice of dense heads keeps more answers than RAM at the same budget",
    "dense others": "RAM keeps more answers than other choices of dense heads at the same budget",
    "input": "Choosing the dense heads for every input keeps more answers than one set by the same score",
    "no input": "Choosing the dense heads for every input is not shown to keep more answers than one set by its score",
    "slower": "At the length of this study sparse inference is not faster than dense, or not in prefill and decoding",
    "faster": "Sparse inference is faster than dense, in prefill and in decoding",
}
Facts = dict[str, Any]
Said = Iterator[tuple[str, str, bool]]


def summarise(found: xr.Dataset, margin: float = MARGIN) -> Facts:
    """The numbers of an acceleration result, as plain values.

        {"n_test", "domain", "length", "sinks", "window", "n_kv_heads", "margin",
         "dense": I, "window_only": {"accuracy": I, "loss": I, "flops", "kv_bytes"},
         "curve": [{"choice", "share", "n_kv_heads", "draws", "accuracy": I, "loss": I, "flops", "kv_bytes",
                    "heads": the dense ones, for a single set}, ...],
         "against_random": [{"choice", "share", "n_kv_heads", "p_adjusted", and those of ``against_random``}, ...],
         "against_ram": [{"choice", "share", "n_kv_heads", "difference": I, "p_value", "p_adjusted"}, ...],
         "against_reach": the same for "dynamic" against one set by the same score averaged over samples,
         "speed": [{"share", "prefill": I, "decode": I, "decode_default": I, "kv_measured", "prefill_bound",
                    "decode_bound"}, ...],
         "recommended": an entry of ``curve``, or ``window_only``, with its "speed"; or None,
         "enough": {choice: the smallest share that would be recommended, or None}}             I = mean, low, high

    A difference is the other choice minus RAM: positive if RAM keeps fewer answers.
    """
    right = found["accuracy"].transpose(CONDITION, EXAMPLE)
    dense = _rows(found, "dense", 1.0)[0]
    alone = _entry(found, dense, "window", 0.0)
    pairs = list(zip(found["choice"].values.tolist(), found["share"].values.tolist(), strict=True))
    tried = [pair for pair in dict.fromkeys(pairs) if pair[0] not in ("dense", "window")]
    curve = [_entry(found, dense, choice, at) for choice, at in tried]
    speeds = _speeds(found)
    enough = {choice: _enough([e for e in curve if e["choice"] == choice], margin) for choice, _ in tried}
    keeps = alone if alone["loss"]["high"] < margin else enough.get("ram")
    return {
        "n_test": right.sizes[EXAMPLE],
        "domain": found.attrs["domain"],
        **{name: int(found.attrs[name]) for name in ("length", "sinks", "window", "n_kv_heads")},
        "margin": margin,
        "dense": proportion_interval(dense).as_dict(),
        "window_only": alone,
        "curve": curve,
        "against_random": _against_random(found, [at for choice, at in tried if choice == "ram"]),
        "against_ram": _against(found, "ram", [pair for pair in tried if pair[0] not in ("ram", "random")]),
        "against_reach": _against(found, "reach", [pair for pair in tried if pair[0] == "dynamic"]),
        "speed": speeds,
        "recommended": None if keeps is None else {**keeps, "speed": _at(speeds, keeps["share"])},
        "enough": {choice: None if entry is None else entry["share"] for choice, entry in enough.items()},
    }


def sentences(facts: Facts) -> Said:
    """What the numbers show, as (kind, text, whether it disagrees with arXiv 2606.05843); nothing for a weak model."""
    if facts["dense"]["low"] < FLOOR:
        return
    for rule in (_keeping, _random, _others, _input, _fast):
        yield from rule(facts)


def _keeping(facts: Facts) -> Said:
    alone, best, n = facts["window_only"], facts["recommended"], facts["n_kv_heads"]
    local = f"{facts['sinks']} + {facts['window']} of {facts['length']} tokens"
    if alone["loss"]["high"] < facts["margin"]:
        text = f"With no dense head at all (every head sees {local}) the loss is {points(alone['loss'])} of accuracy."
        yield "window", text, True
    elif best is not None:
        text = (
            f"With {_groups(best['n_kv_heads'], n)} dense, chosen by RAM, and the others local ({local}), the loss is "
            f"{points(best['loss'])} of accuracy ({points(alone['loss'])} with none dense); the cache holds "
            f"{best['kv_bytes']:.0%} of the bytes. This is the smallest number tried whose loss interval lies "
            f"below {100 * facts['margin']:.0f} points."
        )
        yield "sparse", text, False
    else:
        tried = [entry for entry in facts["curve"] if entry["choice"] == "ram"]
        if tried:
            most = max(tried, key=lambda entry: entry["share"])
            text = (
                f"Even with {_groups(most['n_kv_heads'], n)} dense, chosen by RAM, the loss is {points(most['loss'])} "
                f"of accuracy, its interval not below {100 * facts['margin']:.0f} points."
            )
            yield "not sparse", text, most["share"] >= 0.2  # the paper keeps 5 to 19% of the heads without loss


def _random(facts: Facts) -> Said:
    tests = facts["against_random"]
    if not tests or facts["window_only"]["loss"]["high"] < facts["margin"]:
        return
    best = min(tests, key=lambda test: (test["p_adjusted"], test["share"]))
    one, other = (_of(facts, choice, best["share"]) for choice in ("ram", "random"))
    wins = best["p_adjusted"] < ALPHA
    as_good = round(best["p_sets"] * (other["draws"] + 1)) - 1
    verdict = "RAM keeps more" if wins else "RAM is not shown to keep more"
    text = (
        f"With {_groups(best['n_kv_heads'], facts['n_kv_heads'])} dense, {one['accuracy']['mean']:.0%} of the answers "
        f"are right with those chosen by RAM and {other['accuracy']['mean']:.0%} with random ones: {verdict} (p "
        f"{p_is(best['p_samples'])} over samples, sign flips; p {p_is(best['p_sets'])} over sets, rank; the "
        f"larger p {p_is(best['p_adjusted'])} after Holm over {len(tests)} sizes; "
        f"{as_good} of {other['draws']} random sets keep as many)."
    )
    yield "dense wins" if wins else "dense draws", text, not wins


def _others(facts: Facts) -> Said:
    controls = ("bottom", "random")
    found = [test for test in facts["against_ram"] if test["p_adjusted"] < ALPHA and test["choice"] not in controls]
    for kind, better, says in (("dense beaten", 1, "keep more"), ("dense others", -1, "keep fewer")):
        of_kind = [test for test in found if better * test["difference"]["mean"] > 0]
        for choice in dict.fromkeys(test["choice"] for test in of_kind if test["choice"] != "dynamic"):
            test = max((t for t in of_kind if t["choice"] == choice), key=lambda t: abs(t["difference"]["mean"]))
            size = {name: abs(value) for name, value in test["difference"].items()}
            yield (
                kind,
                f"Dense heads chosen by {NAMES[choice]} ({_groups(test['n_kv_heads'], facts['n_kv_heads'])}) {says} "
                f"answers than those by RAM, by {points(size)} (p {p_is(test['p_adjusted'])} after Holm).",
                False,
            )


def _input(facts: Facts) -> Said:
    """Dense heads chosen for each input against one set by the same score, at the size where they gain most."""
    tests = facts["against_reach"]
    if not tests:
        return
    gains = [test for test in tests if test["p_adjusted"] < ALPHA and test["difference"]["mean"] > 0]
    test = max(gains or tests, key=lambda test: test["difference"]["mean"])
    one, other = (_of(facts, choice, test["share"]) for choice in ("dynamic", "reach"))
    verdict = "it pays" if gains else "it is not shown to pay"
    text = (
        f"With {_groups(test['n_kv_heads'], facts['n_kv_heads'])} dense, chosen for every input by what its question "
        f"would lose, {one['accuracy']['mean']:.0%} of the answers are right; with one set by the same score "
        f"{other['accuracy']['mean']:.0%}, a difference of {points(test['difference'])}: {verdict} (p "
        f"{p_is(test['p_adjusted'])} after Holm over {len(tests)} sizes)."
    )
    yield "input" if gains else "no input", text, False


def _fast(facts: Facts) -> Said:
    best = facts["recommended"]
    timed = None if best is None else best["speed"]
    if timed is None:
        return
    gains = timed["prefill"]["low"] > 1 and timed["decode"]["low"] > 1
    text = (
        f"At {facts['length']} tokens, measured here with the recommended setting: prefill of the text stack runs at "
        f"{_times(timed['prefill'])} the dense speed (at best {timed['prefill_bound']:.1f}x in attention alone), "
        f"decoding at {_times(timed['decode'])} (at best {timed['decode_bound']:.1f}x; against Hugging Face's default "
        f"cache {timed['decode_default']['mean']:.2f}x), with {timed['kv_measured']:.0%} of the cache's bytes."
    )
    yield "faster" if gains else "slower", text, False


def _groups(n: int, of: int) -> str:
    return f"{n} of {of} KV heads ({n / of:.0%})"


def _times(speed: Mapping[str, float]) -> str:
    return f"{speed['mean']:.2f}x [{speed['low']:.2f}, {speed['high']:.2f}]"


def _rows(found: xr.Dataset, choice: str, at: float) -> np.ndarray:
    here = (found["choice"] == choice) & (found["share"] == at)
    return found["accuracy"].transpose(CONDITION, EXAMPLE).values[np.flatnonzero(here.values)]


def _entry(found: xr.Dataset, dense: np.ndarray, choice: str, at: float) -> Facts:
    index = int(np.flatnonzero(((found["choice"] == choice) & (found["share"] == at)).values)[0])
    rows, one = _rows(found, choice, at), found.isel({CONDITION: index})
    named = str(one["heads"].values) if "heads" in one.coords and len(rows) == 1 else ""
    return {
        "choice": choice, "share": at, "n_kv_heads": int(one["n_kv_heads"]), "draws": len(rows),
        "accuracy": share(rows), "loss": drop(dense, rows), "flops": float(one["flops"]),
        "kv_bytes": float(one["kv_bytes"]), **({"heads": named} if named else {}),
    }  # fmt: skip


def _enough(entries: list[Facts], margin: float) -> Facts | None:
    kept = [entry for entry in entries if entry["loss"]["high"] < margin]
    return min(kept, key=lambda entry: entry["share"], default=None)


def _of(facts: Facts, choice: str, at: float) -> Any:
    return next((e for e in facts["curve"] if e["choice"] == choice and e["share"] == at), None)


def _at(speeds: list[Facts], at: float) -> Facts | None:
    return next((speed for speed in speeds if speed["share"] == at), None)


def _against_random(found: xr.Dataset, shares: list[float]) -> list[Facts]:
    tests = []
    for at in shares:
        random = _rows(found, "random", at)
        if len(random):
            ours = _rows(found, "ram", at)[0]
            tests.append({"choice": "ram", "share": at, "n_kv_heads": _count(found, "ram", at),
                          **against_random(ours, random)})  # fmt: skip
    return _corrected(tests)


def _against(found: xr.Dataset, base: str, tried: list[tuple[str, float]]) -> list[Facts]:
    tests = []
    for choice, at in tried:
        ours = _rows(found, base, at)
        if len(ours):
            difference = _rows(found, choice, at)[0] - ours[0]
            tests.append({"choice": choice, "share": at, "n_kv_heads": _count(found, choice, at),
                          "difference": accuracy_interval(difference[None]).as_dict(),
                          "p_value": float(sign_flip_test(difference))})  # fmt: skip
    return _corrected(tests)


def _corrected(tests: list[Facts]) -> list[Facts]:
    adjusted = holm(np.array([test["p_value"] for test in tests]))
    return [{**test, "p_adjusted": float(p)} for test, p in zip(tests, adjusted, strict=True)]


def _count(found: xr.Dataset, choice: str, at: float) -> int:
    here = ((found["choice"] == choice) & (found["share"] == at)).values
    return int(found["n_kv_heads"].values[here][0])


def _speeds(found: xr.Dataset) -> list[Facts]:
    if "prefill_speed" not in found:
        return []
    speeds = []
    for i, at in enumerate(found["timed"].values):
        one = found.isel(timed=i)
        entry: Facts = {"share": float(at)}
        for name in ("prefill", "decode", "decode_default"):
            turns = one[f"{name.replace('_default', '')}_speed{'_default' * name.endswith('_default')}"].values
            entry[name] = {"mean": float(np.median(turns)), "low": float(turns.min()), "high": float(turns.max())}
        entry |= {name: float(one[name]) for name in ("kv_measured", "prefill_bound", "decode_bound")}
        speeds.append(entry)
    return speeds
