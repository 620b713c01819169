"""What is said of training for sparsity follows from the numbers of its runs, and from nothing else."""

import copy

import numpy as np
import pytest
from scipy import stats

from mech.reference import sparsity_runs, sparsity_served
from mech.sparse.training.compared import MEASURES, TESTABLE, compared, improves, needed, sentences, verdicts
from mech.views import sparsity_view


def run(seed, arm, *, ram=4, gini=0.2, accuracy=0.98, blind=3, n_causal=16, size="llava-s"):
    """A run of which only some numbers are its own."""
    spread = {"half_mass_share": {"mean": 0.3}, "gini": {"mean": gini}}
    return {
        "size": size, "seed": seed, "arm": arm, "samples": {"causal": n_causal}, "far_mass": 0.5,
        "ram": {"pages": spread, "documents": spread},
        "accuracy": {name: {"mean": accuracy} for name in ("pages", "documents", "new", "longer")},
        "needed": {"ram": {"n": ram}, "causal": {"n": 1}, "gates": {"n": None}},
        "efficiency": {"kv_bytes": {"8192": 0.1}, "lost": {"new": {"mean": 0.0}, "longer": {"mean": 0.0}}},
        "causal": {"agreement": {"mean": -0.3}, "blind": [[0, 0]] * blind,
                   "smallest": {"lost": {"effect": 1, "ram": ram}, "recovered": {"restoring": 1}}},
        "circuit": {"cmd": {"mean": 0.02}, "share": 0.05}, "stability": {"mean": 0.5},
    }  # fmt: skip


def three(**changes):
    """Three seeds of a control and of an arm, which differs by what is given for each seed."""
    runs = {}
    for i in range(3):
        runs[f"{i}.control"] = run(str(i), "control")
        runs[f"{i}.arm"] = run(str(i), "far 10", **{name: values[i] for name, values in changes.items()})
    return runs


def row(rows, name):
    return next(one for one in rows if one.measure.name == name)


def test_differences_are_paired_by_seed_with_a_t_interval():
    ginis = [0.3, 0.35, 0.31]
    found = row(compared(three(gini=ginis)), "Gini index of RAM")
    assert found.control == (0.2, 0.2, 0.2) and found.values == pytest.approx(ginis)
    low, high = stats.t.interval(0.95, 2, np.mean(ginis) - 0.2, stats.sem(ginis))
    assert (found.difference, found.low, found.high) == pytest.approx((np.mean(ginis) - 0.2, low, high))
    assert found.verdict == "better"
    assert row(compared(three(gini=[0.1, 0.3, 0.2])), "Gini index of RAM").verdict == "no clear difference"
    assert row(compared(three(blind=[7, 8, 7])), "heads that are causal but do not attend").verdict == "worse"


def test_a_report_of_few_samples_tells_no_single_heads():
    found = row(compared(three(blind=[7, 8, 7], n_causal=[16, 6, 6])), "heads that are causal but do not attend")
    assert found.values == (7,) and found.verdict == "one seed"


def test_an_arm_without_its_control_is_left_out_and_one_seed_has_no_interval():
    runs = three()
    del runs["0.control"], runs["1.control"]
    rows = compared(runs)
    assert {one.verdict for one in rows} == {"one seed"} and all(np.isnan(one.low) for one in rows)
    assert "one seed, so no interval" in sentences(rows)[0]
    del runs["2.control"]
    assert compared(runs) == []


def test_the_answer_is_no_unless_both_sides_gain():
    rows = compared(three(ram=[1, 2, 1], gini=[0.3, 0.31, 0.3]))
    assert improves(rows, "llava-s", "far 10") == {"efficiency": True, "interpretability": True}
    assert sentences(rows)[-1] == "llava-s: far 10 improves both efficiency and interpretability."
    rows = compared(three(ram=[1, 2, 1], blind=[9, 9, 8], gini=[0.1, 0.11, 0.1]))
    assert improves(rows, "llava-s", "far 10") == {"efficiency": True, "interpretability": False}
    counts = verdicts(rows, "llava-s", "far 10")["interpretability"]
    assert counts["worse"] == 2 and counts["better"] == 1  # the necessary set by RAM became smaller
    assert sentences(rows)[-1] == "llava-s: no objective improves both efficiency and interpretability."
    assert "interpretability does not improve (1 of 10 measures better, 2 worse)" in sentences(rows)[0]


def test_each_size_is_answered_for_itself_and_what_was_not_measured_does_not_count():
    runs = three(ram=[1, 2, 1], gini=[0.3, 0.31, 0.3])
    for name, one in three(gini=[0.1, 0.11, 0.1]).items():
        runs[f"qwen-long.{name}"] = one | {"size": "qwen-long"}
        runs[f"qwen-long.{name}"]["efficiency"]["lost"] = {"longer": {"mean": 0.0}}
    rows = compared(runs)
    assert sentences(rows)[-2:] == [
        "llava-s: far 10 improves both efficiency and interpretability.",
        "qwen-long: no objective improves both efficiency and interpretability.",
    ]
    there, absent = (
        next(one for one in rows if one.size == size and one.measure.name == "accuracy lost when served, new domain")
        for size in ("llava-s", "qwen-long")
    )
    assert there.verdict == "no clear difference" and absent.verdict == "not measured"
    assert improves(rows, "qwen-long", "far 10") == {"efficiency": False, "interpretability": False}
    assert absent.measure.name not in sparsity_view(runs, "qwen-long")._repr_html_()


def test_the_best_ranking_is_the_one_that_needs_fewest():
    assert needed(run("0", "control")) == 1 and needed(run("0", "control"), "ram") == 4
    assert needed(run("0", "control"), "gates") is None


def test_the_shipped_runs_have_every_measure_and_are_drawn():
    runs = sparsity_runs()
    assert {one["seed"] for one in runs.values() if one["arm"] == "control"} == {"0", "1", "2"}
    for one in runs.values():
        absent = {measure.name for measure in MEASURES if measure.of(one) is None}
        within = {"accuracy lost when served, new domain"} if one["size"] == "qwen-long" else set()
        if one["samples"]["causal"] < TESTABLE:
            within.add("heads that are causal but do not attend")
        assert within <= absent <= within | {"share of edges for 80% faithfulness"}
        assert one["curve"][-1]["step"] == one["steps"]
    page = sparsity_view(runs)._repr_html_()
    for sentence in sentences([row for row in compared(runs) if row.size == "llava-s"]):
        assert sentence.split(":")[0] in page
    worse = copy.deepcopy(runs)
    for one in worse.values():
        if one["arm"] != "control":
            one["causal"]["blind"] = [[0, 0]] * 48
    assert sentences(compared(worse)) != sentences(compared(runs))


def test_what_the_page_says_beside_its_tables_holds_for_the_runs():
    rows = [one for one in compared(sparsity_runs()) if one.size == "llava-s"]
    found = {one.measure.name: one for one in rows if one.arm == "far 10"}
    better = {name for name, one in found.items() if one.verdict == "better"}
    assert {"share of heads holding half of RAM", "Gini index of RAM", "RAM across domains (Spearman)"} <= better
    same = ("smallest necessary set", "smallest sufficient set", "heads that are causal but do not attend",
            "unfaithfulness of small circuits (CMD)")  # fmt: skip
    assert all(found[name].verdict == "no clear difference" for name in same)
    by_ram = found["smallest necessary set by RAM"]
    assert set(by_ram.values) == {1} and min(by_ram.control) >= 2
    gates = [one for one in rows if one.arm == "constrained 0.1"]
    assert {one.verdict for one in gates} == {"no clear difference"}


def test_what_the_page_says_of_the_longer_model_holds_for_its_runs():
    runs = {name: one for name, one in sparsity_runs().items() if one["size"] == "qwen-long"}
    rows = compared(runs)
    one_head, far = ({one.measure.name: one for one in rows if one.arm == arm} for arm in ("one head", "far 10"))
    needs = one_head["KV heads needed, best ranking"]
    assert set(needs.control) == {2} and set(needs.values) == {1} and needs.verdict == "better"
    kept = one_head["KV bytes at 8,192 tokens"]
    assert all(value < 0.6 * before for before, value in zip(kept.control, kept.values, strict=True))
    same = [name for name, one in one_head.items() if one.measure.side in ("accuracy", "interpretability")]
    assert all(one_head[name].verdict == "no clear difference" for name in same)
    first = [found["heads"] for run in runs.values() if run["arm"] == "one head" for found in run["needed"].values()]
    assert len(first) == 9 and all(heads == [[0, 0], [0, 1]] for heads in first)

    agrees = far["RAM vs effect (Spearman)"]
    assert max(agrees.control) < 0 < min(agrees.values) and agrees.verdict == "better"
    assert far["share of heads holding half of RAM"].verdict == "better"
    needs = far["KV heads needed, best ranking"]
    assert min(np.subtract(needs.values, needs.control)) >= 0 and needs.verdict == "no clear difference"
    chosen = [one["dense_heads"] for one in runs.values() if one["arm"] == "constrained 0.1"]
    by_ram = [one["needed"]["ram"]["heads"] for one in runs.values() if one["arm"] == "control"]
    assert sorted(a == b for a, b in zip(chosen, by_ram, strict=True)) == [False, True, True]
    assert all(len(heads) == 4 for heads in chosen)


def test_what_the_page_says_of_adapters_holds_for_their_trials():
    """With an adapter one or two heads do what takes the best ranking three; gates alone need three too."""
    served = sparsity_served()["qwen-long"]
    by_ram = {entry["n_kv_heads"]: entry["loss"] for entry in served["rankings"]["32"] if entry["choice"] == "ram"}
    assert by_ram[1]["low"] > 0.1 and by_ram[2]["mean"] > 0.01 >= by_ram[3]["mean"]
    trials = served["trials"]
    for name, n in (("gates alone", 3), ("two heads", 2), ("one head", 1)):
        kept = [trial["n_kv_heads"] for title, trial in trials.items() if title.endswith(name)]
        assert kept and all(heads == [n, 24] for heads in kept), name
    for title, trial in trials.items():
        dense, right = (
            sum(row[name]["mean"] * row["n"] for row in trial["tested"].values()) for name in ("dense", "served")
        )
        assert (right >= 0.99 * dense) == (title != "190 samples, one head")
    enough = [trial for title, trial in trials.items() if title != "190 samples, one head"]
    assert all(row["lost"]["mean"] <= 0.01 + 1e-9 for trial in enough for row in trial["tested"].values())
