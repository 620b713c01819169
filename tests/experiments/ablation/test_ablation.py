"""Metrics, bands and the ablation experiment, on a trained model; findings from fabricated numbers."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from mech.data.haystacks import haystacks
from mech.errors import ExperimentError, RegionError
from mech.experiments.ablation.ablation import BASELINE, CONTROLS, Condition, ablation, conditions
from mech.experiments.effects import against_random, both_units
from mech.experiments.findings.cautions import cautions, few_samples, few_sets, unstable
from mech.experiments.findings.detectable import detectable
from mech.experiments.findings.sentences import KINDS, findings, headlines, scope
from mech.experiments.findings.summary import summarise_domain, summarise_effects
from mech.experiments.metrics import ask, quiz
from mech.experiments.ranking.ranking import Head, rank_heads
from mech.experiments.scores.ram import retrieval_attention_mass
from mech.experiments.scores.sinks import attention_sinks
from mech.interventions import Ablate, intervene, reference_activations
from mech.model import HookedMLLM
from mech.results import ablation_dataset, heads_text
from mech.views import curves, view


@pytest.fixture(scope="module")
def model():
    return HookedMLLM.from_pretrained("reference:llava-s")


@pytest.fixture(scope="module")
def halves():
    return haystacks("grounding", 32, seed=21).split(0.5)


@pytest.fixture(scope="module")
def ram(model, halves):
    return retrieval_attention_mass(model, halves[0])


@pytest.fixture(scope="module")
def effects(model, halves, ram):
    options = dict(reference=halves[0], to=("mean", "zero"), fractions=(1, 0.1, 0.2), n_random=4)
    return ablation(model, halves[1], rank_heads(ram), **options)


def test_an_answer_is_right_exactly_when_generation_writes_it(model, halves):
    """Also for heads whose loss makes the model wrong now and then."""
    samples = halves[1]
    spec = Ablate(heads=[(layer, head) for layer in range(2) for head in range(8)], to="zero")
    with intervene(model, spec) as without:
        scores = ask(without, quiz(model, samples, batch_size=8))
        written = [without.generate_text(model.inputs_of(sample), max_new_tokens=1)[0] for sample in samples]
    assert scores["accuracy"].tolist() == [float(text == s.answer) for text, s in zip(written, samples, strict=True)]
    assert 0 < scores["accuracy"].mean() < 1


@pytest.mark.parametrize("name", ["llava-s", "qwen-s"])
def test_pictures_read_once_give_the_same_logits(name):
    model = HookedMLLM.from_pretrained(f"reference:{name}")
    for domain in ("pages", "video") if name == "qwen-s" else ("pages",):
        inputs = model.collate([model.inputs_of(sample) for sample in haystacks(domain, 3)])
        blind, seen = model.encode_pictures(inputs)
        assert not any(key.startswith("pixel") for key in blind.tensors)
        for _ in range(2):  # what was read may be used again
            assert torch.equal(model(blind, mm_encoder_outputs=dict(seen)), model(inputs))


def token(model, text):
    return model.tokenizer(text, add_special_tokens=False).input_ids[0]


@torch.no_grad()
def test_the_logit_difference_is_read_where_the_answers_part(model, halves):
    sample = halves[1][0]
    logits = model(model.inputs_of(sample))[0, -1]
    right, wrong = (token(model, text) for text in (sample.answer, sample.counterfactual.answer))
    found = ask(model, quiz(model, [sample]))["logit_diff"][0]
    assert found == pytest.approx(float(logits[right] - logits[wrong]), abs=1e-4)
    # Longer answers that begin alike: the difference lies at the second token.
    longer = replace(sample, answer="12", counterfactual=replace(sample.counterfactual, answer="15"))
    at_fork = model(model.inputs(sample.question, sample.images, answer="1"))[0, -1]
    found = ask(model, quiz(model, [longer]))["logit_diff"][0]
    assert found == pytest.approx(float(at_fork[token(model, "2")] - at_fork[token(model, "5")]), abs=1e-4)


def test_a_sample_without_partner_has_no_logit_difference(model, halves):
    scores = ask(model, quiz(model, [replace(halves[1][0], counterfactual=None)]))
    assert np.isnan(scores["logit_diff"]).all() and not np.isnan(scores["accuracy"]).any()
    with pytest.raises(ExperimentError, match="has no answer"):
        quiz(model, [replace(halves[1][0], answer=" ")])


def test_conditions_are_every_combination_once(ram):
    ranking = rank_heads(ram)
    todo = conditions(ranking, to=("mean", "zero"), bands=("top", "random"), fractions=(1, 0.05, 2), n_random=3)
    # 5% of 48 heads are two: asked for twice, run once.
    assert len(todo) == len(set(todo)) == 2 * 2 * (1 + 3)
    assert {len(condition.heads) for condition in todo} == {1, 2}
    top = next(c for c in todo if c.band == "top" and len(c.heads) == 2)
    assert top.heads == ranking.top(2) and top.fraction == pytest.approx(2 / 48)
    same = [{c.draw: c.heads for c in todo if c.method == m and c.band == "random"} for m in ("mean", "zero")]
    assert same[0] == same[1]
    with pytest.raises(ExperimentError, match="use 'zero'"):
        conditions(ranking, to="zeros")
    with pytest.raises(ExperimentError, match="use 'unrestricted'"):
        conditions(ranking, bands=["random"], fractions=[0.6])
    with pytest.raises(ExperimentError, match="without necessary heads"):
        conditions(ranking, bands=["unneeded"])
    with pytest.raises(ExperimentError, match="there is no head L9H0"):
        conditions(ranking, necessary=[(9, 0)])
    with pytest.raises(ExperimentError, match="use 'top'"):
        conditions(ranking, bands=["tops"])


def test_random_controls_do_not_hold_the_treatment(ram):
    ranking = rank_heads(ram)
    needed = [ranking.heads[20], ranking.heads[30]]
    bands = ("top", "random", "unneeded", "unrestricted")
    todo = conditions(ranking, bands=bands, fractions=(3, 10), n_random=40, necessary=needed)
    for size in (3, 10):
        top = set(ranking.top(size))
        sets = {band: [set(c.heads) for c in todo if c.band == band and len(c.heads) == size] for band in bands}
        assert [len(sets[band]) for band in bands] == [1, 40, CONTROLS, CONTROLS]
        assert not any(drawn & top for drawn in sets["random"] + sets["unneeded"])
        assert any(drawn & set(needed) for drawn in sets["random"])
        assert not any(drawn & set(needed) for drawn in sets["unneeded"])
        assert any(drawn & top for drawn in sets["unrestricted"])
    every = [Head(layer, head) for layer in range(6) for head in range(8)][:44]  # nothing is left to draw from
    assert not conditions(ranking, bands=["unneeded"], fractions=(5,), necessary=every)


def test_sets_of_all_heads_that_hold_a_top_head_are_shown_apart(model, halves, ram):
    ranking = rank_heads(ram)
    bands = ("top", "random", "unrestricted")
    effects = ablation(model, halves[1][:4], ranking, to="zero", bands=bands, fractions=(10,), n_random=6)
    assert effects["heads"].values[0] == "" and effects["heads"].values[1] == heads_text(ranking.top(10))
    drawn = effects["heads"].values[effects["band"] == "unrestricted"]
    top = set(effects["heads"].values[1].split())
    holding = sum(bool(top & set(heads.split())) for heads in drawn)
    entries = {entry["band"]: entry for entry in summarise_effects(effects)["ablation"]}
    assert holding > 0 and entries["unrestricted, with top"]["draws"] == holding
    assert entries.get("unrestricted", {"draws": 0})["draws"] == 6 - holding
    assert entries["top"]["heads"] == heads_text(ranking.top(10)) and "heads" not in entries["random"]
    drawn = {effect.band: effect for effect in curves.effects(effects, "accuracy")}
    assert drawn["top"].heads.replace("<br>", ", ").split(", ") == heads_text(ranking.top(10)).split()
    assert drawn["random"].heads.startswith("lowest: L") and drawn["unrestricted, with top"].draws == holding
    assert "random from all heads, with top heads" in view(effects).body
    assert {effect.heads for effect in curves.effects(effects.drop_vars("heads"), "accuracy")} == {""}  # older files


def test_a_ranking_by_another_score_is_a_band(model, halves, ram):
    find, test = halves
    sinks = rank_heads(attention_sinks(model, find, by="attention"), "sink_mass")
    vision, ranking = rank_heads(ram, "vision_mass"), rank_heads(ram)
    effects = ablation(model, test, ranking, to="zero", bands=("top", vision, sinks), fractions=(0.05, 0.1))
    assert effects["band"].values.tolist() == ["none", *(b for b in ("top", "by vision_mass", "by sink_mass")
                                                         for _ in range(2))]  # fmt: skip
    with intervene(model, Ablate(heads=vision.top(0.1), to="zero")) as without:
        alone = ask(without, quiz(model, test))
    row = effects["logit_diff"].values[(effects["band"] == "by vision_mass") & (effects["n_heads"] == 5)]
    np.testing.assert_allclose(row[0], alone["logit_diff"], atol=1e-3)
    assert {entry["band"] for entry in summarise_effects(effects)["ablation"]} == {*effects["band"].values} - {"none"}


def test_bands_that_cannot_be_are_refused(model, halves, ram):
    ranking, vision = rank_heads(ram), rank_heads(ram, "vision_mass")
    with pytest.raises(ExperimentError, match="two bands of the same name"):
        conditions(ranking, bands=[vision, vision])
    with pytest.raises(ExperimentError, match="every head scores 0"):
        conditions(ranking, bands=[rank_heads(ram["ram"].rename("sink_mass") * 0)])
    with pytest.raises(ExperimentError, match="rank the heads of one model"):
        conditions(ranking, bands=[rank_heads(ram["vision_mass"][:, :3])])
    seen = rank_heads(retrieval_attention_mass(model, halves[1][:2]), "vision_mass")
    with pytest.raises(ExperimentError, match="found the heads"):
        ablation(model, halves[1], ranking, to="zero", bands=["top", seen])


def test_the_result_names_every_condition_and_starts_with_the_baseline(model, halves, effects):
    assert effects["band"].values[0] == "none" and effects.sizes["example"] == 16
    bands, counts = np.unique(effects["band"].values, return_counts=True)
    assert dict(zip(bands, counts, strict=True)) == {
        "none": 1, "top": 6, "bottom": 6, "middle": 6, "random": 24, "layer_matched": 24,
    }  # fmt: skip
    assert effects.attrs["provenance"]["seed"] == 0 and effects.attrs["positions"] == "all"
    assert list(effects["example"].values) == [sample.id for sample in halves[1]]
    clean = ask(model, quiz(model, halves[1]))
    np.testing.assert_allclose(effects["logit_diff"].values[0], clean["logit_diff"], atol=1e-4)


def test_a_row_is_what_the_intervention_gives(model, halves, ram, effects):
    bank = reference_activations(model, halves[0], batch_size=16)
    spec = Ablate(heads=rank_heads(ram).top(0.1), to="mean", reference=bank)
    with intervene(model, spec) as without:
        expected = ask(without, quiz(model, halves[1]))
    row = effects.isel(condition=(effects["band"] == "top") & (effects["method"] == "mean") & (effects["n_heads"] == 5))
    np.testing.assert_allclose(row["logit_diff"].values[0], expected["logit_diff"], atol=1e-3)


def test_samples_that_found_the_heads_may_not_test_them(model, halves, ram):
    find, test = halves
    with pytest.raises(ExperimentError, match="found the heads"):
        ablation(model, find, rank_heads(ram), to="zero")
    with pytest.raises(ExperimentError, match="are the reference"):
        ablation(model, test, rank_heads(ram), to="mean", reference=test)
    with pytest.raises(ExperimentError, match="without reference"):
        ablation(model, test[:2], rank_heads(ram), to="mean", fractions=(1,), bands=("top",))


def test_every_head_gone_leaves_chance(model, halves):
    everything = Condition("zero", "top", 1.0, tuple(Head(layer, h) for layer in range(6) for h in range(8)))
    scores = ablation(model, halves[1], [everything])
    assert scores["accuracy"][0].mean() > 0.8 and scores["accuracy"][1].mean() < 0.4


def test_summary_and_findings_follow_the_numbers(ram, effects):
    numbers = summarise_domain(rank_heads(ram), ram, effects)
    base = effects["accuracy"].values[0].mean()
    top = next(e for e in numbers["ablation"] if (e["method"], e["band"], e["n_heads"]) == ("mean", "top", 10))
    assert top["accuracy_drop"]["mean"] == pytest.approx(base - top["accuracy"]["mean"])
    assert top["accuracy_drop"]["low"] <= top["accuracy_drop"]["mean"] <= top["accuracy_drop"]["high"]
    random = next(e for e in numbers["ablation"] if (e["method"], e["band"], e["n_heads"]) == ("mean", "random", 10))
    assert random["draws"] == 4 and len(numbers["tests"]) == 6
    assert all(test["p_value"] <= test["p_adjusted"] <= 1 for test in numbers["tests"])
    assert all(test["p_value"] == max(test["p_samples"], test["p_sets"]) >= 1 / 5 for test in numbers["tests"])
    (primary,) = [test for test in numbers["tests"] if test["primary"]]
    assert primary["method"] == "mean" and primary["n_heads"] == 1 and primary["p_adjusted"] == primary["p_value"]
    assert numbers["stability"]["n_top"] == 2 and numbers["stability"]["n_find"] == numbers["n_test"] == 16
    assert [kind for kind, _ in cautions(numbers)][-1] == "few sets"


def test_a_claim_needs_samples_and_sets():
    sure, half = np.array([1.0] * 24), np.array([1.0, 0.0] * 12)
    none = np.zeros((100, 24))
    both = against_random(sure, none)
    assert both["p_value"] == both["p_sets"] == pytest.approx(1 / 101) and both["p_samples"] < 1e-3
    few = against_random(sure, none[:3])
    assert few["p_samples"] < 1e-3 and few["p_value"] == few["p_sets"] == 0.25
    some = against_random(half, np.concatenate([none[:90], np.tile(sure, (10, 1))]))
    assert some["sets_as_costly"] == 10 and some["p_value"] == pytest.approx(11 / 101)
    assert "p < 0.001 over samples (sign flips), p = 0.250 over sets (rank); 0 of 3 random sets" in both_units(few)
    nothing = against_random(none[0], none)  # both cost nothing: no set "cost as much"
    assert nothing["sets_as_costly"] is None and nothing["p_value"] == 1 and "cost as much" not in both_units(nothing)


def test_what_limits_the_numbers_is_said():
    stable = {"n_top": 2, "n_find": 32, "inclusion": [[0, 2, 0.99], [3, 5, 0.6]]}
    (text,) = [text for _, text in unstable(stable)]
    assert "1 of its 2 heads" in text and "(L3H5 60%)" in text
    assert not list(unstable(stable | {"inclusion": [[0, 2, 0.99], [3, 5, 0.8]]}))
    assert (
        not list(few_samples(32, interval(0.5))) and "32 detect a loss of 20" in next(few_samples(32, interval(0)))[1]
    )
    assert "no loss of accuracy can be significant" in next(few_samples(4, interval(1)))[1]
    assert not list(few_sets(20)) and "0.10" in next(few_sets(9))[1]


def test_methods_that_were_asked_of_a_part_are_summarised_over_that_part():
    """Baseline and pairs are those of the examples that were asked; the others are nan."""
    right = np.array([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    rows = np.array([right, 1 - right, right, right * 0, right])
    rows[3:, 4:] = np.nan
    effects = ablation_dataset(
        rows, rows, method=["none", "mean", "mean", "zero", "zero"], band=["none", "top", "random", "top", "random"],
        fraction=[0, 0.05, 0.05, 0.05, 0.05], n_heads=[0, 2, 2, 2, 2], draw=[0] * 5,
        examples=[f"e{i}" for i in range(6)],
    )  # fmt: skip
    facts = summarise_effects(effects)
    by = {(e["method"], e["band"]): e for e in facts["ablation"]}
    assert facts["n_test"] == by["mean", "top"]["n_test"] == 6 and by["zero", "top"]["n_test"] == 4
    assert by["zero", "top"]["accuracy_drop"]["mean"] == 0.75 and by["zero", "random"]["accuracy_drop"]["mean"] == 0
    assert by["mean", "top"]["gained"] == pytest.approx(1 / 6) and by["zero", "top"]["gained"] == 0
    assert [test["statistic"] for test in facts["tests"]] == pytest.approx([4 / 6, 0.75])
    drawn = {(e.method, e.band): e for e in curves.effects(effects, "accuracy")}
    assert drawn["zero", "top"].mean == 0 and drawn["zero", "random"].mean == 0.75
    assert np.isfinite([drawn["zero", "top"].high, *(e.low for e in curves.effects(effects, "logit_diff"))]).all()
    told = detectable({"models": {"m": {"domains": {"grounding": facts}}}})
    assert told["settings"][0]["n_test"] == 6 and told["settings"][0]["loss_with_gains"] is None
    assert told["text"].startswith("With 6 test samples")


def fabricated(**changes):
    """A summary of one model in which the top heads matter, the bottom ones do not, and nothing else is odd."""
    drops = {"top": 0.6, "random": 0.02, "bottom": 0.0, "layer_matched": 0.05} | changes.pop("drops", {})
    against = {"statistic": 0.5, "p_value": 0.01, "p_samples": 0.001, "p_sets": 0.01, "smallest_p_sets": 0.01}
    entries = [
        {
            "method": "mean", "band": band, "fraction": size, "n_heads": round(size * 100), "draws": 1,
            "accuracy": interval(0.98 - drop), "accuracy_drop": interval(drop), "logit_diff_drop": interval(1.0),
        }
        for band, drop in drops.items()
        for size in (0.05, 0.2)
    ]  # fmt: skip
    tests = [{"method": "mean", "fraction": 0.05, "n_heads": 5, "primary": True, "p_adjusted": 0.01, **against,
              "draws": 99, "sets_as_costly": 0}]  # fmt: skip
    domain = {
        "n_test": 64, "stability": {"n_top": 5, "n_find": 64, "inclusion": [[2, 3, 1.0]] * 5},
        "baseline": {"accuracy": interval(0.98), "logit_diff": interval(5.0)}, "ranking": [[2, 3, 0.9]],
        "half_mass_share": 0.06, "size_null": 0.02, "ablation": entries, "tests": tests,
    } | changes  # fmt: skip
    return {
        "models": {"m": {"n_layers": 10, "n_heads": 10, "domains": {"grounding": domain}}},
        "scales": {"pairs": []},
    }


def interval(mean, half=0.01):
    return {"mean": mean, "low": mean - half, "high": mean + half}


def said(summary, *words):
    return [f for f in findings(summary) if all(word in f["text"] for word in words)]


def test_findings_turn_with_the_numbers():
    agreeing = fabricated()
    assert not any(finding["against_papers"] for finding in findings(agreeing))
    assert said(
        agreeing,
        "they are needed more than random heads (",
        "60 points [59, 61]",
        "p = 0.001 over samples",
        "0 of 99 random sets",
    )
    assert said(agreeing, "smallest top set tried that halves accuracy (98%) holds 5 of 100 heads")
    assert said(agreeing, "L2H3 with RAM 0.9;")

    useless = fabricated(drops={"top": 0.02})
    useless["models"]["m"]["domains"]["grounding"]["tests"][0]["p_adjusted"] = 0.4
    assert said(useless, "not shown to be needed")[0]["against_papers"]  # its interval excludes what would matter
    assert said(useless, "stays above half")[0]["against_papers"]

    bottom = said(fabricated(drops={"bottom": 0.3}), "Low-ranked heads matter too", "the 5 heads with the lowest RAM")
    assert bottom and bottom[0]["against_papers"]
    assert said(fabricated(drops={"layer_matched": 0.5}), "belongs to the layers")[0]["against_papers"]
    assert said(fabricated(drops={"random": 0.3}), "not a harmless control")
    assert not said(fabricated(drops={"by vision_mass": 0.1}), "most at visual tokens")
    seeing = fabricated(drops={"by vision_mass": 0.4}, scores={
        "names": ["ram", "vision_mass"], "n_top": 5, "jaccard": [[1, 3 / 7], [3 / 7, 1]],
        "jaccard_high": [[1, 1], [1, 1]], "jaccard_null": [[0, 0], [0, 0]]})  # fmt: skip
    assert said(seeing, "5 heads that attend most to visual tokens of any kind costs 40 points", "share 3 of 5.")
    assert said(fabricated(half_mass_share=0.5), "50 of 100 heads (50%)")[0]["against_papers"]


def test_findings_see_redundancy_and_disagreeing_methods():
    summary = fabricated()
    entries = summary["models"]["m"]["domains"]["grounding"]["ablation"]
    single = copy.deepcopy(entries[0]) | {"fraction": 0.01, "n_heads": 1, "accuracy_drop": interval(0.03)}
    paper = copy.deepcopy(entries[0]) | {"method": "paper", "accuracy_drop": interval(0.2)}
    entries += [single, paper]
    assert said(summary, "Heads are redundant", "3 points", "without the first 5 by 60 points")
    assert said(summary, "mean ablation costs 60 points", "paper ablation 20 points")
    # Effects that add up are no redundancy: five times twelve points are sixty.
    single["accuracy_drop"] = interval(0.12)
    assert not said(summary, "Heads are redundant")


def test_findings_do_not_claim_what_cannot_be_seen():
    blind = fabricated(baseline={"accuracy": interval(0.05), "logit_diff": interval(0.0)})
    assert said(blind, "gets only 5% right here")
    assert not said(blind, "more than random heads") and not said(blind, "halves accuracy")
    unlucky = fabricated()  # sure on these samples, yet a fifth of the random sets cost as much
    test = unlucky["models"]["m"]["domains"]["grounding"]["tests"][0]
    test |= {"p_sets": 0.2, "p_value": 0.2, "p_adjusted": 0.2, "sets_as_costly": 19}
    assert said(unlucky, "not shown to be needed more", "p = 0.200 over sets", "19 of 99 random sets cost as much")
    idle = fabricated(drops={"top": 0.0})
    idle["models"]["m"]["domains"]["grounding"]["tests"][0] |= {"p_adjusted": 1.0, "sets_as_costly": None}
    assert said(idle, "No loss is shown, so there is nothing to compare.") and not said(idle, "cost as much")
    assert findings(idle)[0]["kind"] == "few samples" == headlines(findings(idle))[0]["kind"]
    loose = fabricated(stability={"n_top": 5, "n_find": 8, "inclusion": [[2, 3, 1.0], [0, 1, 0.4]]})
    assert findings(loose)[0]["kind"] == "unstable" == headlines(findings(loose))[0]["kind"]
    spared = fabricated(drops={"unneeded": 0.01})
    assert said(spared, "2 points [1, 3] (1 sets), random heads not known to be necessary 1 point [0, 2]")
    assert findings(fabricated(half_mass_share=float("nan"))) is not None


def test_headlines_count_settings_and_keep_what_is_said_of_a_model():
    summary = fabricated()
    weak = fabricated(drops={"bottom": 0.3})["models"]["m"]["domains"]["grounding"]
    summary["models"]["m"]["domains"]["video"] = weak
    summary["models"]["n"] = copy.deepcopy(fabricated()["models"]["m"])
    found = findings(summary)
    assert all(finding["kind"] in KINDS for finding in found)
    by_kind = {finding["kind"]: finding["text"] for finding in headlines(found)}
    assert by_kind["needed"].endswith("in 3 of 3 settings (m on all domains; n on grounding).")
    assert by_kind["low"].endswith("in 1 of 3 settings (m on video).")
    assert "not needed" not in by_kind
    assert scope(summary["models"]) == "2 models of 100 heads; grounding, video"
    one = {"kind": "domains", "text": "x", "model": "m", "domain": None, "against_papers": False}
    assert headlines([one]) == [one]


def test_what_was_asked_in_few_settings_is_counted_among_those():
    made = [("needed", "grounding"), ("needed", "pages"), ("order", "pages"), ("sparse", "grounding")]
    found = [dict(kind=kind, text="", model="m", domain=domain, against_papers=False) for kind, domain in made]
    ends = {finding["kind"]: finding["text"].rpartition(": ")[2] for finding in headlines(found)}
    assert ends["needed"] == "in 2 of 2 settings (m on all domains)."
    assert ends["order"] == "in 1 of 1 setting (m on pages)."  # no head was patched on grounding
    assert ends["sparse"] == "in 1 of 1 setting (m on grounding)."


def test_the_baseline_is_always_there(model, halves):
    scores = ablation(model, halves[1][:2], [BASELINE])
    assert scores.sizes["condition"] == 1
    torch.testing.assert_close(torch.tensor(scores["accuracy"].values[0]).mean(), torch.tensor(1.0).double())


def test_a_mask_means_its_true_positions_and_one_of_another_row_is_refused(model, halves, ram, monkeypatch):
    layout = model.inputs_of(halves[1][0], answer=True).layout
    one_length = [s for s in halves[1] if len(model.inputs_of(s, answer=True).layout) == len(layout)]
    seen = layout.kind == 1
    options = dict(to="zero", bands=["top"], fractions=[0.1])
    by_word = ablation(model, one_length, rank_heads(ram), positions="image", **options)
    by_mask = ablation(model, one_length, rank_heads(ram), positions=torch.as_tensor(seen), **options)
    assert by_mask.equals(by_word) and by_mask.attrs["positions"] == str(np.flatnonzero(seen).tolist())
    monkeypatch.setattr(HookedMLLM, "forward", lambda *_, **__: pytest.fail("a forward was run"))
    monkeypatch.setattr(HookedMLLM, "encode_pictures", lambda *_, **__: pytest.fail("pictures were read"))
    with pytest.raises(RegionError, match="positions as a mask of"):
        ablation(model, one_length, rank_heads(ram), positions=seen[1:], **options)
