"""Metrics, bands and the ablation experiment, on a trained model; findings from fabricated numbers."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from mech.data.haystacks import haystacks
from mech.errors import ExperimentError, RegionError
from mech.experiments.ablation.ablation import BASELINE, Condition, ablation, conditions
from mech.experiments.findings.sentences import KINDS, findings, headlines
from mech.experiments.findings.summary import summarise_domain, summarise_effects
from mech.experiments.metrics import ask, quiz
from mech.experiments.ranking.ranking import Head, rank_heads
from mech.experiments.scores.ram import retrieval_attention_mass
from mech.experiments.scores.sinks import attention_sinks
from mech.interventions import Ablate, intervene, reference_activations
from mech.model import HookedMLLM


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
    with pytest.raises(ExperimentError, match="use 'top'"):
        conditions(ranking, bands=["tops"])


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
    with pytest.raises(ExperimentError, match="two bands of one name"):
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


def fabricated(**changes):
    """A summary of one model in which the top heads matter, the bottom ones do not, and nothing else is odd."""
    drops = {"top": 0.6, "random": 0.02, "bottom": 0.0, "layer_matched": 0.05} | changes.pop("drops", {})
    entries = [
        {
            "method": "mean", "band": band, "fraction": size, "n_heads": round(size * 100), "draws": 1,
            "accuracy": interval(0.98 - drop), "accuracy_drop": interval(drop), "logit_diff_drop": interval(1.0),
        }
        for band, drop in drops.items()
        for size in (0.05, 0.2)
    ]  # fmt: skip
    tests = [{"method": "mean", "fraction": 0.05, "n_heads": 5, "statistic": 0.5, "p_value": 0.001,
              "p_adjusted": 0.002, "p_sets": 0.5, "smallest_p_sets": 0.5}]  # fmt: skip
    domain = {
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
    assert said(agreeing, "they are needed more than random heads are", "60 points [59, 61]", "0 of 1 random sets")
    assert said(agreeing, "smallest top set tried that halves accuracy (98%) holds 5 of 100 heads")
    assert said(agreeing, "L2H3 with RAM 0.9,")

    useless = fabricated(drops={"top": 0.02})
    useless["models"]["m"]["domains"]["grounding"]["tests"][0]["p_adjusted"] = 0.4
    assert said(useless, "not shown to be needed")[0]["against_papers"]  # its interval excludes what would matter
    assert said(useless, "stays above half")[0]["against_papers"]

    bottom = said(fabricated(drops={"bottom": 0.3}), "Low-ranked heads matter too", "the 5 heads with the lowest RAM")
    assert bottom and bottom[0]["against_papers"]
    assert said(fabricated(drops={"layer_matched": 0.5}), "belongs to the layers")[0]["against_papers"]
    assert said(fabricated(drops={"random": 0.3}), "no harmless control")
    assert not said(fabricated(drops={"by vision_mass": 0.1}), "most at visual tokens")
    seeing = fabricated(drops={"by vision_mass": 0.4}, scores={
        "names": ["ram", "vision_mass"], "n_top": 5, "jaccard": [[1, 3 / 7], [3 / 7, 1]],
        "jaccard_high": [[1, 1], [1, 1]], "jaccard_null": [[0, 0], [0, 0]]})  # fmt: skip
    assert said(seeing, "5 heads that look most at visual tokens of any kind costs 40 points", "share 3 of 5.")
    assert said(fabricated(half_mass_share=0.5), "50 of 100 heads (50%)")[0]["against_papers"]


def test_findings_see_redundancy_and_disagreeing_methods():
    summary = fabricated()
    entries = summary["models"]["m"]["domains"]["grounding"]["ablation"]
    single = copy.deepcopy(entries[0]) | {"fraction": 0.01, "n_heads": 1, "accuracy_drop": interval(0.03)}
    paper = copy.deepcopy(entries[0]) | {"method": "paper", "accuracy_drop": interval(0.2)}
    entries += [single, paper]
    assert said(summary, "stand in for one another", "3 points", "without the first 5 by 60 points")
    assert said(summary, "mean ablation costs 60 points", "paper ablation 20 points")
    # Effects that add up are no redundancy: five times twelve points are sixty.
    single["accuracy_drop"] = interval(0.12)
    assert not said(summary, "stand in for one another")


def test_findings_do_not_claim_what_cannot_be_seen():
    blind = fabricated(baseline={"accuracy": interval(0.05), "logit_diff": interval(0.0)})
    assert said(blind, "answers only 5% here")
    assert not said(blind, "random heads are") and not said(blind, "halves accuracy")
    # A random set that holds the same heads costs as much: the sentence says how many did.
    unlucky = fabricated()
    unlucky["models"]["m"]["domains"]["grounding"]["tests"][0]["p_sets"] = 1.0
    assert said(unlucky, "needed more than random heads", "1 of 1 random sets cost as much")
    assert findings(fabricated(half_mass_share=float("nan"))) is not None


def test_headlines_count_places_and_keep_what_is_said_of_a_model():
    summary = fabricated()
    weak = fabricated(drops={"bottom": 0.3})["models"]["m"]["domains"]["grounding"]
    summary["models"]["m"]["domains"]["video"] = weak
    summary["models"]["n"] = copy.deepcopy(fabricated()["models"]["m"])
    found = findings(summary)
    assert all(finding["kind"] in KINDS for finding in found)
    by_kind = {finding["kind"]: finding["text"] for finding in headlines(found)}
    assert by_kind["needed"].endswith("in 3 of 3 places (m on all domains; n on grounding).")
    assert by_kind["low"].endswith("in 1 of 3 places (m on video).")
    assert "not needed" not in by_kind
    one = {"kind": "domains", "text": "x", "model": "m", "domain": None, "against_papers": False}
    assert headlines([one]) == [one]


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
