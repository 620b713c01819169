"""Three answers over all settings: means with intervals of known width, heads measured where they were not chosen."""

import numpy as np
import pytest
import xarray as xr

from mech.experiments.findings.pooled import attention_of_top, over_settings, pooled


def bounds(mean, width):
    return {"mean": mean, "low": mean - width, "high": mean + width}


def ram(values, null=0.05):
    return xr.Dataset(
        {"ram": (("example", "layer", "head"), values), "size_null": ("example", np.full(len(values), null))}
    )


def domain(top, random, base=0.9, fractions=(0.05, 0.2), p=0.001, n_heads=100):
    entries = [
        {"method": "mean", "band": band, "fraction": fraction, "n_heads": round(fraction * n_heads), "draws": 1,
         "accuracy": bounds(base - lost, 0.04), "accuracy_drop": bounds(lost, 0.04)}
        for fraction in fractions
        for band, lost in (("top", top), ("random", random), ("bottom", 0.0))
    ]  # fmt: skip
    tests = [{"method": "mean", "n_heads": round(f * n_heads), "p_adjusted": p} for f in fractions]
    return {
        "n_find": 8,
        "n_test": 10,
        "baseline": {"accuracy": bounds(base, 0.05)},
        "ablation": entries,
        "tests": tests,
    }


def study(**domains):
    values = np.full((8, 4, 5), 0.01)
    values[:, 1, 2] = 0.6
    rams = {("m", name): ram(values) for name in domains}
    return pooled({"models": {"m": {"domains": domains}}}, rams)


def test_the_interval_of_a_mean_of_equals_shrinks_with_the_root_of_their_number():
    one = bounds(0.5, 0.1)
    for k in (1, 4, 25):
        assert over_settings([one] * k) == pytest.approx(bounds(0.5, 0.1 / np.sqrt(k)))
    lopsided = over_settings([{"mean": 1.0, "low": 0.8, "high": 1.0}, {"mean": 0.0, "low": 0.0, "high": 0.3}])
    assert lopsided == pytest.approx({"mean": 0.5, "low": 0.4, "high": 0.65})
    assert over_settings([]) is None and over_settings([one, None]) is None


def test_it_covers_the_mean_of_the_settings():
    rng, inside = np.random.default_rng(0), 0
    truth = np.array([0.2, 0.5, 0.9])
    for _ in range(400):
        samples = rng.normal(truth, 1.0, (60, 3))
        error = 1.96 * samples.std(axis=0, ddof=1) / np.sqrt(60)
        found = over_settings([bounds(m, e) for m, e in zip(samples.mean(axis=0), error, strict=True)])
        inside += found["low"] <= truth.mean() <= found["high"]
    assert 0.92 < inside / 400 < 0.98


def test_heads_are_not_measured_on_the_samples_that_chose_them():
    noise = ram(np.random.default_rng(1).uniform(size=(16, 10, 10)))
    found = attention_of_top(noise)
    assert found["top"]["low"] < 0.5 < found["top"]["high"], "the best of noise is noise on other samples"
    assert noise["ram"].mean("example").values.max() > 0.65, "on the same ones it seems better"
    assert attention_of_top(noise.isel(example=[0, 1])) == {"top": None, "bottom": None}


def test_answers_carry_their_number_n_and_scope():
    retrieve, needed, fast = study(a=domain(0.5, 0.1), b=domain(0.3, 0.1, p=0.4))["answers"]
    assert retrieve["verdict"] == "In 2 of 2 settings" and "n = 16" in retrieve["text"]
    assert "60% [60, 60] of the question's attention" in retrieve["text"] and "5.0%" in retrieve["text"]
    assert needed["verdict"] == "In 1 of 2 settings"
    assert "falls by 40 points [37, 43]" in needed["text"]
    assert "random other heads by 10 points [7, 13]" in needed["text"]
    assert "2 settings, n = 20" in needed["text"]
    assert fast["verdict"] == "Not tested"


def test_settings_in_which_nothing_can_be_lost_are_left_out_and_counted():
    found = study(strong=domain(0.5, 0.1), weak=domain(0.0, 0.0, base=0.2))
    assert found["weak"] == [["m", "weak"]]
    assert found["baseline"]["mean"] == 0.9 and {point["n_settings"] for point in found["curve"]} == {1}
    assert (
        found["answers"][1]["verdict"] == "Yes, in the one setting tested"
        and "too weak is left out" in found["answers"][1]["text"]
    )


def test_the_curve_has_the_sizes_that_all_settings_share():
    found = study(a=domain(0.5, 0.1, fractions=(0.01, 0.05, 0.2)), b=domain(0.3, 0.1, fractions=(0.06, 0.18)))
    top = [point for point in found["curve"] if point["band"] == "top"]
    assert [point["share"] for point in top] == pytest.approx([0.055, 0.19])
    assert top[0]["accuracy"]["mean"] == pytest.approx(0.5) and top[0]["n_settings"] == 2
    assert [point["accuracy"]["mean"] for point in found["curve"] if point["band"] == "bottom"] == pytest.approx(
        [0.9] * 2
    )


def test_fast_counts_models_where_few_dense_heads_keep_the_answers():
    best = {
        "choice": "ram",
        "n_kv_heads": 4,
        "loss": bounds(0.02, 0.03),
        "speed": {"prefill": {"mean": 1.84, "low": 1.7}, "decode": {"mean": 1.21, "low": 1.1}},
    }
    most = {"choice": "ram", "share": 0.25, "n_kv_heads": 12, "loss": bounds(0.3, 0.1)}
    facts = {"n_kv_heads": 48, "n_test": 12, "margin": 0.1, "curve": [most]}
    summary = {
        "models": {"m": {"domains": {"a": domain(0.5, 0.1)}}},
        "acceleration": {
            "m": facts | {"recommended": best},
            "w": facts | {"recommended": best | {"choice": "window"}},
            "x": facts | {"recommended": None},
        },
    }
    answer = pooled(summary, {("m", "a"): ram(np.full((8, 2, 2), 0.1))})["answers"][2]
    cost = "Dense KV heads: m 4 of 48, w 4 of 48; accuracy falls by 2 points [-1, 5] at most"
    assert f"{cost}; prefill at 1.8x, decoding at 1.2x of dense speed" in answer["text"]
    assert "x loses 30 points [20, 40] with 12 of 48 KV heads dense, the most tried." in answer["text"]
    assert "except 1 where the window alone does" in answer["text"]
