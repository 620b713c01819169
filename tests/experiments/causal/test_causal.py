"""The causal report: on planted circuits it finds what is planted, told nothing; its parts obey their laws."""

import functools
import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from pages import Page

from mech.data.haystacks import haystacks
from mech.data.samples import Distractor, Samples
from mech.errors import ExperimentError, OutputError
from mech.experiments.causal.report import QUADRANTS, CausalReport, causal_report
from mech.experiments.causal.runs import Runs
from mech.experiments.causal.sets import greedy, sizes_of, smallest
from mech.experiments.causal.sufficiency import facts_of
from mech.experiments.findings.sentences import findings, headlines
from mech.experiments.metrics import LogitDiff
from mech.experiments.patching.activation import activation_patching
from mech.experiments.paths.path_patching import path_patching
from mech.experiments.ranking.ranking import Head, Ranking
from mech.experiments.statistics import sign_flip_test
from mech.model import HookedMLLM
from mech.reference import planted
from mech.views import view

N, FIND = 10, 4
BOTH, IDLE, BLIND, NEITHER = QUADRANTS
CLOSE = 1e-4


@functools.cache
def opened(name, family="llava"):
    key = planted.circuit(name, family)
    return key, HookedMLLM.from_hf(key.model, key.processor)


@functools.cache
def reported(name, family="llava"):
    key, model = opened(name, family)
    return key, causal_report(model, key.samples(N), find=key.samples(FIND, seed=5), n_boot=200, method=None)


def at(report, name, head):
    return float(report.heads[name].sel(layer=head[0], head=head[1]))


FOUND = [(name, "llava") for name in planted.NAMES if name != "roles"]
FOUND += [(name, "qwen2_5_vl") for name in ("gqa", "backup")]


@pytest.mark.parametrize(("name", "family"), FOUND)
def test_every_head_has_its_planted_effect(name, family):
    key, report = reported(name, family)
    roles = {head: role for role, head in key.truth.heads.items()}
    for head in itertools.product(range(report.heads.sizes["layer"]), range(report.heads.sizes["head"])):
        effect = key.truth.effects[roles[head],] if head in roles else planted.NOTHING
        assert at(report, "lost", head) == pytest.approx(effect.lost, abs=CLOSE)
        assert at(report, "recovered", head) == pytest.approx(effect.recovered, abs=CLOSE)
        direct = key.truth.edges.get((roles.get(head), "logits"), planted.NOTHING).lost
        assert at(report, "direct", head) == pytest.approx(direct, abs=CLOSE)
        assert at(report, "mediated", head) == pytest.approx(effect.lost - direct, abs=CLOSE)
        matters = str(report.heads["quadrant"].sel(layer=head[0], head=head[1]).values) in (BOTH, BLIND)
        assert matters == (effect != planted.NOTHING)


def test_a_mover_is_found_and_named_by_its_path():
    key, report = reported("mover")
    mover, retrieval = (key.truth.heads[role] for role in ("mover", "retrieval"))
    assert report.quadrant(BLIND) == [mover] and report.quadrant(BOTH) == [retrieval]
    assert at(report, "ram", mover) == pytest.approx(0, abs=1e-6) and at(report, "lost_p_holm", mover) < 0.05
    assert report.paths[mover].carrier == "directly on the logits"
    assert (report.paths[mover].where, report.paths[mover].reads["question"]) == ("last", pytest.approx(1, abs=1e-3))
    path = report.paths[retrieval]
    assert path.carrier == "through the values of L1H0" and path.where == "question"
    assert path.reads["evidence"] == pytest.approx(1, abs=1e-3)
    assert any("L1H0 (RAM 0.00" in line and "100% [100, 100]" in line for line in report.sentences())


@pytest.mark.parametrize(("name", "role", "way"), [("q_composition", "carry", "queries"),
                                                   ("k_composition", "previous", "keys")])  # fmt: skip
def test_composition_is_named_by_the_input_it_goes_through(name, role, way):
    key, report = reported(name)
    assert report.paths[key.truth.heads[role]].carrier == f"through the {way} of L1H0"


def test_and_needs_both_and_or_either():
    assert reported("and")[1].smallest["lost"]["effect"] == 1
    assert reported("and")[1].smallest["recovered"]["restoring"] == 2
    key, report = reported("or")
    assert report.smallest["lost"]["effect"] == 2 and report.smallest["recovered"]["restoring"] == 1
    assert set(report.members("effect", 2)) == {key.truth.heads["left"], key.truth.heads["right"]}
    assert report.agreement["mean"] is None  # nothing is lost one by one: there is no order to agree with


@pytest.mark.parametrize("family", planted.FAMILIES)
def test_a_backup_shows_itself(family):
    key, report = reported("backup", family)
    first, second = key.truth.heads["first"], key.truth.heads["second"]
    assert report.stand_ins == {second: first}
    assert report.members("effect", 2) == [first, second]  # by effect alone the second would be as good as any
    pair = report.sets.sel(order="effect", size=2)
    assert float(pair["set_lost"].mean()) == pytest.approx(1, abs=CLOSE)
    assert float(pair["set_singles"]) == pytest.approx(0, abs=CLOSE)
    assert report.paths[first].through[0].inputs["q"] == pytest.approx(-1, abs=CLOSE)


def pulled(name, role, **options):
    """The report of a planted circuit in which one role is first in the ranking."""
    key, model = opened(name)
    first = np.zeros(key.truth.ram.shape)
    first[key.truth.heads[role]] = 1
    report = causal_report(model, key.samples(6), Ranking(first), find=key.samples(FIND, seed=5), n_boot=50, n_paths=0,
                           method=None, top=1, **options)  # fmt: skip
    return report, report.facts()["redirection"]


def test_necessity_and_sufficiency_stand_side_by_side():
    """A head that fetches the answer is needed and chooses it; one that carries it on is needed and chooses nothing."""
    report, fetches = pulled("mover", "retrieval", bias=(1.0, 1000.0))
    _, carries = pulled("mover", "mover", bias=(1000.0,))
    assert fetches["necessary"] and fetches["sufficient"] and fetches["heads"] == ["L0H0"]
    assert carries["necessary"] and not carries["sufficient"] and carries["redirected"]["top"]["mean"] == 0
    assert fetches["redirected"]["top"]["mean"] == 1 and fetches["redirected"]["random"]["mean"] == 0
    assert fetches["lost"]["all"]["mean"] == pytest.approx(1, abs=CLOSE) and fetches["lost"]["random"]["mean"] < 0.5
    assert fetches["draws"] == 3 and fetches["plain"]["mean"] == 0
    dose = {(row["band"], row["bias"]): row["redirected"] for row in fetches["dose"]}
    assert dose["top", 1.0] == 0 and dose["top", 1000.0] == 1
    assert any("they are needed, and they choose where" in line for line in report.sentences())
    assert set(report.redirection["band"].values) == {"top", "random", "all"}
    with pytest.raises(ExperimentError, match="missing values"):
        facts_of(report.dataset.assign(set_noised=report.dataset["set_noised"] * np.nan))


def test_redirection_is_left_out_where_it_cannot_be_asked(monkeypatch):
    _, facts = pulled("mover", "retrieval", bias=())
    assert facts is None
    key, model = opened("mover")
    ranking, find = Ranking(key.truth.ram), key.samples(FIND, seed=5)
    lone = Samples([replace(sample, distractors=()) for sample in key.samples(4)])
    report = causal_report(model, lone, ranking, find=find, n_boot=50, n_paths=0, method=None)
    assert report.redirection is None and "no distractors" in report.dataset.attrs["no_redirection"]
    monkeypatch.setattr(HookedMLLM, "forward", lambda *_, **__: pytest.fail("a forward was run"))
    with pytest.raises(ExperimentError, match="between -65504 and 65504"):
        causal_report(model, key.samples(4), ranking, find=find, bias=(1e6,))
    same = Samples([replace(s, distractors=(Distractor(s.evidence[0], s.answer),)) for s in key.samples(4)])
    with pytest.raises(ExperimentError, match="another answer"):
        causal_report(model, same, ranking, find=find)


def test_samples_that_find_never_test():
    key, model = opened("mover")
    samples = key.samples(8)
    with pytest.raises(ExperimentError, match="find the heads"):
        causal_report(model, samples, find=samples[:4])
    report = causal_report(model, samples, n_boot=50, method="zero")
    assert report.dataset.sizes["example"] == 4 == report.dataset.attrs["n_find"]
    gone = (key.truth.logit_diff[0] - key.truth.zeroed["mover",]) / report.dataset.attrs["gap"]
    assert at(report, "ablated", key.truth.heads["mover"]) == pytest.approx(gone, abs=CLOSE)
    assert "ablated" not in reported("mover")[1].heads


def test_what_cannot_be_compared_is_refused():
    key, model = opened("mover")
    lone = Samples([sample.counterfactual for sample in key.samples(4)])
    with pytest.raises(ExperimentError, match="without a counterfactual"):
        Runs.of(model, lone)
    mute = model.hooks([("blocks.1.attn.hook_z", lambda value, hook: value * 0)])
    with mute, pytest.raises(ExperimentError, match="use samples it can answer"):
        Runs.of(model, key.samples(4))


@pytest.fixture(scope="module")
def small():
    return HookedMLLM.from_pretrained("reference:qwen-s")


@pytest.fixture(scope="module")
def runs(small):
    return Runs.of(small, haystacks("documents", 5, 3), batch_size=3)


def test_sets_and_direct_paths_agree_with_the_exact_sweeps(small, runs):
    """Batched, padded and with the pictures read once, against activation and path patching one by one."""
    samples = runs.samples
    metric = LogitDiff([s.answer for s in samples], [s.counterfactual.answer for s in samples])
    for direction, ours in (("noise", runs.lost), ("denoise", runs.recovered)):
        swept = activation_patching(small, list(samples), None, metric, layers=[1], over=("head",), direction=direction)
        away = swept["clean"] - swept["metric"] if direction == "noise" else swept["metric"] - swept["corrupted"]
        for head in (0, 5):
            np.testing.assert_allclose(ours([(1, head)]), away.sel(head=head) / runs.gap, atol=1e-4)
    every = [(layer, head) for layer in range(6) for head in range(8)]
    np.testing.assert_allclose(runs.lost(every).mean(), 1, atol=1e-5)  # all heads are the other run
    np.testing.assert_allclose(runs.recovered(every).mean(), 1, atol=1e-5)
    direct = path_patching(
        small, list(samples), None, metric, senders=["L0H3", "L4H4"], freeze=("attention", "mlp"), direction="noise"
    )
    away = (direct["clean"] - direct["metric"]).squeeze("receiver").values / runs.gap
    np.testing.assert_allclose(runs.direct()[:, [0, 4], [3, 4]], away, atol=1e-4)


def test_regions_part_the_sequence(runs):
    for batch in runs.batches:
        counts = sum(mask.int() for mask in batch.regions.values())
        for row, layout in enumerate(batch.inputs[0].layouts):
            assert counts[row, layout.positions("all")].eq(1).all()
            assert counts[row].sum() == len(layout.positions("all"))


def test_greedy_takes_what_costs_most_beside_what_is_gone():
    key, model = opened("backup")
    found = Runs.of(model, key.samples(FIND))
    heads = [Head(layer, head) for layer in range(2) for head in range(4)]
    assert greedy(found.lost, heads, 0.5, tie=lambda head: float(head == (0, 0))) == [(0, 0), (1, 0)]
    # Restored, the second of them alone brings the answer back.
    assert len(greedy(found.recovered, heads, 0.9)) == 1
    assert sizes_of(8) == [1, 2, 3, 4] and sizes_of(1) == [1] and sizes_of(128)[-1] == 64


def test_the_smallest_set_averages_random_orders():
    lost = np.array([[[0.2], [0.6]], [[0.4], [1.0]], [[0.0], [0.2]]])
    curves = xr.Dataset({"set_lost": (("order", "size", "example"), lost)},
                        {"order": ["ram", "random 0", "random 1"], "size": [1, 4]})  # fmt: skip
    assert smallest(curves, "lost", 0.5) == {"ram": 4, "random": 4}
    assert smallest(curves, "lost", 0.7) == {"ram": None, "random": None}


def test_sign_flips_are_exact_for_few_examples():
    assert sign_flip_test(np.ones(5)) == pytest.approx(2 / 32)
    assert sign_flip_test(np.zeros((5, 2))).tolist() == [1, 1]
    values = np.random.default_rng(0).normal(size=(7, 3))
    flips = np.array(list(itertools.product([1, -1], repeat=7)))
    brute = (np.abs(flips @ values) >= np.abs(values.sum(0)) - 1e-12).mean(0)
    np.testing.assert_allclose(sign_flip_test(values), brute)
    assert sign_flip_test(np.ones(40)) == pytest.approx(1 / 10_001)


def test_a_report_is_saved_and_read_again_and_drawn(tmp_path):
    _, report = reported("mover")
    report.save(tmp_path / "causal.nc")
    again = CausalReport.load(tmp_path / "causal.nc")
    assert again.sentences() == report.sentences() and again.facts() == report.facts()
    few = CausalReport(again.dataset.isel(example=slice(3)))
    assert few.sentences()[1] == "3 samples are too few to show that a single head matters: that takes 10."
    assert "too few" not in " ".join(report.sentences())
    page = view(again).save(tmp_path / "causal.html").read_text()
    written = Page(page)
    assert all(words in json.dumps(written.charts) for words in ("causal, not attending", "L1H0"))
    assert not written.unclosed and not written.open and len(written.charts) == 7


def test_findings_are_made_of_the_facts():
    facts = reported("mover")[1].facts()
    sure = {"mean": 1.0, "low": 0.9, "high": 1.0}
    numbers = {"baseline": {"accuracy": sure}, "ablation": [], "tests": [], "ranking": [[0, 0, 1.0]],
               "half_mass_share": 0.1, "size_null": 0.1, "causal": facts}  # fmt: skip
    summary = {"models": {"m": {"n_layers": 2, "n_heads": 4, "domains": {"d": numbers}}}, "scales": {"pairs": []}}
    found = {finding["kind"]: finding for finding in findings(summary)}
    assert "1 head is necessary without attending" in found["blind"]["text"] and found["blind"]["against_papers"]
    assert "L1H0 (RAM 0.00" in found["blind"]["text"] and "Noising 1 head loses half" in found["carried"]["text"]
    assert any(
        "do not attend to the evidence are necessary" in line["text"] for line in headlines(list(found.values()))
    )
    numbers["causal"] = {"reason": "no counterfactuals"}
    assert not {"blind", "carried"} & {finding["kind"] for finding in findings(summary)}


def test_a_grid_centres_its_colours_on_no_effect(tmp_path):
    key, model = opened("mover")
    metric = LogitDiff(key.sample.answer, key.sample.counterfactual.answer)
    for direction in ("denoise", "noise"):
        swept = activation_patching(model, key.clean, key.corrupted, metric, direction=direction)
        body = view(swept).body
        assert re.search(r'"zmin": ?-1[.,]', body) and "colorscale" in body and "share of the gap" in body
    words = activation_patching(
        model, key.clean, key.corrupted, metric, point="hook_resid_pre", over=("layer", "region"),
        regions={"<b>evil</b>": "image", "question": "question"},
    )  # fmt: skip
    page = view(words).save(tmp_path / "grid.html").read_text()
    assert "<b>evil" not in page and "evil" in page
    three = activation_patching(model, key.clean, key.corrupted, metric, over=("layer", "head", "region"),
                                regions={"question": "question"})  # fmt: skip
    with pytest.raises(OutputError, match="choose one value"):
        view(three)
