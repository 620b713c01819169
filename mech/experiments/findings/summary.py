"""A study's results in numbers: ``summary.json``.

Effects are *drops*: baseline minus ablated, paired by sample, so a positive number means that the heads are needed.
Drops in accuracy have ``accuracy_interval``, accuracies of a single set Wilson's interval, and logit differences
bootstrap intervals: over samples, and for bands with several random sets over samples crossed with sets. The tests ask
whether the top heads cost more than random sets of the same number of *other* heads. ``p_samples`` generalises to new
samples (sign flips), ``p_sets`` to new sets (the rank of the top set among the random ones, which cannot fall below
``smallest_p_sets`` = 1 / (1 + sets)); ``p_value`` is the larger of the two. One test is *primary*: the first method, at
the size nearest to a twentieth of the heads, fixed before anything is measured. Findings rest on it, and its
``p_adjusted`` is its p. The other tests are corrected (Holm) over all other sizes and methods of one model on one
domain.

    {"schema": 1,
     "models": {MODEL: {"n_layers", "n_heads", "family",
        "domains": {DOMAIN: {"n_find", "n_test",
           "baseline": {"accuracy": I, "logit_diff": I},
           "ranking": [[layer, head, score], ...],                       best first
           "half_mass_share": share of the heads that hold half of all RAM,
           "size_null": the RAM of a head that attends evenly,
           "stability": {"n_top", "n_find", "inclusion": [[layer, head, share of resamples in the top set], ...]},
           "ablation": [{"method", "band", "fraction", "n_heads", "n_test", "draws", "heads": of a single set,
                         "accuracy": I, "gained": share of answers right only without the heads,
                         "accuracy_drop": I, "logit_diff_drop": I or null}, ...],
           "tests": [{"method", "fraction", "n_heads", "primary", "statistic", "p_value", "p_samples", "p_sets",
                      "smallest_p_sets", "p_adjusted", "draws", "sets_as_costly"}, ...],
           "scores": {"names", "n_top", "spearman", "jaccard", "jaccard_null", ...}: matrices over pairs of scores;
                     ``_low`` and ``_high`` are 95% intervals over samples; if heads are patched one by one, also
                     the two signs of causal head gating (intervals over fits),
           "causal": ``CausalReport.facts()``, or {"reason": why there is none}}},
        "agreement": {"domains", "spearman", "jaccard", "jaccard_null"},
        "forms": ``forms.summarise``, pictures against text, for a model tuned from a language model}},
     "acceleration": {MODEL: ``acceleration.summarise``},   sparse inference, on one domain each
     "scales": {"pairs": [{"a", "b", "domain", "overlap", "overlap_null", "pearson", "centre_a", "centre_b"}, ...]},
     "detectable": ``detectable.detectable``, the losses that could have been found,
     "scope": the models and domains of the findings, in words,
     "findings": [{"kind", "text", "model", "domain", "against_papers": differs from the paper (within scope)}, ...],
     "headlines": one per kind of finding; what limits the others (unstable top sets, too few samples) first,
     "verdicts": [{"claim", "cells": [{"model", "domain", "verdict", "text"}, ...]}, ...]: from ``verdicts``,
     "pooled": three answers and a curve over all settings, from ``pooled``,
     "provenance": {...}}                                                 I = {"mean", "low", "high"}
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import xarray as xr

from mech.axes import CONDITION
from mech.experiments.effects import against_random, drop, interval, share
from mech.experiments.findings.words import TOP
from mech.experiments.ranking.agreement import agreement, scale_agreement
from mech.experiments.ranking.ranking import Ranking, rank_heads
from mech.experiments.scores.published import is_null
from mech.experiments.statistics import holm, proportion_interval
from mech.results import with_top_apart


def summarise_domain(ranking: Ranking, ram: xr.Dataset, effects: xr.Dataset) -> dict[str, Any]:
    """One model on one domain: the ranking, the effect of every band, and the tests."""
    return {
        "n_find": ram.sizes["example"],
        "ranking": [[layer, head, round(score, 6)] for layer, head, score in ranking.table],
        "stability": stability(ranking),
        "half_mass_share": ranking.half_mass_share(),
        "size_null": float(ram["size_null"].mean()),
        **summarise_effects(effects),
    }


def summarise_effects(effects: xr.Dataset) -> dict[str, Any]:
    """The results of an ablation: ``n_test``, ``baseline``, ``ablation`` and ``tests`` of the schema above."""
    effects = with_top_apart(effects)
    baseline = effects.isel({CONDITION: 0})
    right, margin = baseline["accuracy"].values, baseline["logit_diff"].values
    entries, tests = [], []
    for (method, band, n_heads), group in bands(effects):
        asked = _asked(group)
        group, before, gap = group.isel(example=asked), right[asked], margin[asked]
        entries.append(
            {
                "method": method,
                "band": band,
                "fraction": float(group["fraction"][0]),
                "n_heads": n_heads,
                "n_test": len(before),
                "draws": group.sizes[CONDITION],
                **(
                    {"heads": str(group["heads"].values[0])} if group.sizes[CONDITION] == 1 and "heads" in group else {}
                ),
                "accuracy": share(group["accuracy"].values),
                "gained": float((group["accuracy"].values > before).mean()),
                "accuracy_drop": drop(before, group["accuracy"].values),
                "logit_diff_drop": interval(gap - group["logit_diff"].values),
            }
        )
    for (method, band, n_heads), group in bands(effects):
        random = _select(effects, method, "random", n_heads)
        if band == "top" and random.sizes[CONDITION]:
            asked = _asked(random)
            top, others = (right[asked] - some["accuracy"].values[:, asked] for some in (group, random))
            test = against_random(top[0], others)
            tests.append({"method": method, "fraction": float(group["fraction"][0]), "n_heads": n_heads, **test})
    _adjust(tests)
    return {
        "n_test": effects.sizes["example"],
        "baseline": {"accuracy": proportion_interval(right).as_dict(), "logit_diff": interval(margin[None])},
        "ablation": entries,
        "tests": tests,
    }


def _asked(group: xr.Dataset) -> np.ndarray:
    """The examples measured under these conditions; a study measures some methods on only part of them."""
    return np.flatnonzero(~np.isnan(group["accuracy"].values).any(axis=0))


def _adjust(tests: list[dict[str, Any]]) -> None:
    """Mark the primary test, and correct the others."""
    first = [test for test in tests if test["method"] == tests[0]["method"]]
    primary = min(first, key=lambda test: abs(test["fraction"] - TOP), default=None)
    others = [test for test in tests if test is not primary]
    for test, adjusted in zip(others, holm(np.array([test["p_value"] for test in others])), strict=True):
        test |= {"primary": False, "p_adjusted": float(adjusted)}
    if primary is not None:
        primary |= {"primary": True, "p_adjusted": primary["p_value"]}


def stability(ranking: Ranking, k: int | float = TOP, n_resamples: int = 1000) -> dict[str, Any] | None:
    """How often each top head stays in the top set when the samples that found it are resampled; None if unknown."""
    if ranking.n_examples is None or ranking.n_examples < 2:
        return None
    share = ranking.stability(n_resamples, k)
    top = ranking.top(k)
    inclusion = [[layer, head, float(share.sel(layer=layer, head=head))] for layer, head in top]
    return {"n_top": len(top), "n_find": ranking.n_examples, "inclusion": inclusion}


def bands(effects: xr.Dataset) -> Iterator[tuple[tuple[str, str, int], xr.Dataset]]:
    """The conditions of an ablation result, grouped so that a group differs only in the draw."""
    keys = zip(effects["method"].values, effects["band"].values, effects["n_heads"].values, strict=True)
    for method, band, n_heads in dict.fromkeys((str(m), str(b), int(n)) for m, b, n in keys if b != "none"):
        yield (method, band, n_heads), _select(effects, method, band, n_heads)


def _select(effects: xr.Dataset, method: str, band: str, n_heads: int) -> xr.Dataset:
    chosen = (effects["method"] == method) & (effects["band"] == band) & (effects["n_heads"] == n_heads)
    return effects.isel({CONDITION: np.flatnonzero(chosen.values)})


def summarise_agreement(rankings: Mapping[str, Ranking]) -> dict[str, Any]:
    """How well the rankings of one model agree across domains: whole maps and top sets."""
    found = agreement(rankings, TOP)
    matrices = {name: found[name].values.tolist() for name in ("spearman", "jaccard", "jaccard_null", "overlap_p")}
    return {"domains": list(rankings), "n_top": int(found.attrs["n_top"]), **matrices}


def summarise_scores(scores: xr.Dataset, gated: xr.Dataset | None = None, n_resamples: int = 500) -> dict[str, Any]:
    """How well rankings by several scores agree, for one model and domain; intervals over samples.

    Scores that only serve as nulls are left out. ``gated`` (from ``causal_head_gating``) adds both signs, with
    intervals over fits.
    """
    rankings = {str(name): rank_heads(scores, str(name)) for name in scores if not is_null(str(name))}
    if gated is not None:
        rankings |= {sign: rank_heads(gated, sign) for sign in ("facilitating", "interfering")}
    found = agreement(rankings, TOP, n_resamples)
    matrices = {str(name): values.values.tolist() for name, values in found.items()}
    return {"names": list(rankings), "n_top": int(found.attrs["n_top"]), **matrices}


def above_null(ram: xr.Dataset) -> Ranking:
    """The ranking by RAM above that of even attention; summed over many heads, that floor would dominate."""
    score = (ram["ram"] - ram["size_null"]).mean("example").clip(min=0)
    return rank_heads(score.rename("ram_above_null"), model=str(ram.attrs.get("model", "")))


def summarise_scales(rankings: Mapping[str, Mapping[str, Ranking]]) -> dict[str, Any]:
    """How well models agree on the relative depth of retrieval (by ``above_null``), for each pair and domain."""
    pairs = []
    names = list(rankings)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            for domain in rankings[a]:
                if domain in rankings[b] and all(rankings[m][domain].mean.any() for m in (a, b)):
                    found = scale_agreement(rankings[a][domain], rankings[b][domain])
                    overlap, pearson = float(found["overlap"]), float(found["pearson"])
                    null = float(found["overlap_null"])
                    centre_a, centre_b = (float(centre) for centre in found["centre"])
                    pairs.append({"a": a, "b": b, "domain": domain, "overlap": overlap, "overlap_null": null,
                                  "pearson": None if np.isnan(pearson) else pearson,
                                  "centre_a": centre_a, "centre_b": centre_b})  # fmt: skip
    return {"pairs": pairs}
