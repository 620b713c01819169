"""The points on the papers: known answers on planted circuits, sentences that follow the numbers, tags and boxes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import mech
from mech.errors import ExperimentError
from mech.experiments.metrics import answer_logits
from mech.experiments.scores.ram import retrieval_attention_mass
from mech.model import HookedMLLM
from mech.papers import Bench, published_claims, tag_leak
from mech.papers.boxes import published_tokens, right_tokens, simulated_iou
from mech.papers.claims import KNOWN
from mech.papers.disputes import phases
from mech.papers.tags import among_others, tagged
from mech.papers.weaknesses import _grown, low_ranked, never_ablated
from mech.reference import tiny, tiny_processors


@pytest.fixture(scope="module")
def claims(key, toy):
    return published_claims(toy, key.samples(24), n_random=3)


@pytest.fixture(scope="module")
def qwen():
    return HookedMLLM.from_hf(tiny.model("qwen2_5_vl"), tiny_processors.processor("qwen2_5_vl"), name="tiny")


def test_every_point_is_there_and_says_what_it_measured(claims):
    assert list(claims) == list(KNOWN) and len(claims) == 12
    for name, point in claims.items():
        assert point.key == name and point.claim and point.text.endswith(".")
        assert any(digit in point.text for digit in "0123456789")
    facts = claims.to_json()
    assert json.loads(json.dumps(facts))["points"]["queries"]["holds"] == claims["queries"].holds
    low = claims["low-ranked"]
    verdict = f"low-ranked. Published (arXiv 2606.05843, on Qwen3-VL 4B, LLaVA-OneVision 7B): {low.claim} Here, on "
    here = "planted:roles (8 heads; planted, 12 test samples): differs. Without"
    assert claims.sentences()[1].startswith(verdict + here)
    assert "Few random sets: with 3" in claims.cautions[-1] and claims.cautions[-1] in facts["cautions"]
    shown = claims._repr_html_()
    assert shown.count("<tr>") == 13 and "planted:roles" in shown


def test_the_planted_retrieval_head_is_necessary_and_a_low_ranked_head_too(claims, key):
    """Of eight heads one retrieves; carry has RAM 0, and nobody knows what is asked without it."""
    top = claims["top-5%"]
    first = top.numbers["sizes"][0]
    assert first["n_heads"] == 1 and first["top"]["mean"] > 0.8 and first["p_samples"] < 0.05
    assert (
        top.holds is None and top.verdict == "cannot tell" and first["p_value"] == first["p_sets"] >= 1 / 4
    )  # three sets are no claim
    low = claims["low-ranked"]
    assert low.holds is False and low.numbers["sizes"][-1]["bottom"]["mean"] > 0.5
    assert low.text.endswith("Low-ranked heads matter.")
    assert claims["phases"].verdict == "measured" and "A one-token answer" in claims["phases"].text
    assert claims["phases"].numbers["phase"]["decode"]["mean"] == 0
    assert (
        claims["phases"].numbers["phase"]["prefill"]["mean"] == claims["phases"].numbers["phase"]["both"]["mean"] > 0.8
    )
    future = claims["off-distribution"].numbers["future_share"]
    assert future == pytest.approx(0.5, abs=0.03)
    assert claims["figure-and-text"].numbers["published"] == {"text": 0.244, "table": 0.217}


class Made:
    """A bench whose drops are given: what a sentence says must follow them."""

    def __init__(self, top, bottom, random):
        values = np.random.default_rng(0).uniform(size=(1, 2, 4))
        self.ranking = mech.Ranking(values[0])
        self.drops = {"top": top, "bottom": bottom, "random": random}

    def band(self, name, k, **options):
        return np.atleast_2d(self.drops[name])


def test_sentences_follow_the_numbers_whichever_way_they_fall():
    lost, kept = np.array([1.0] * 18 + [0.0] * 2), np.zeros(20)
    few = np.stack([np.roll(lost, 3) * (np.arange(20) < 2), *[kept] * 39])
    needed = never_ablated(Made(lost, kept, few))
    assert needed.holds and "The top 5% cost more" in needed.text and "90 points [" in needed.text
    idle = never_ablated(Made(kept, kept, few))
    assert idle.holds is None and "are not shown to cost more" in idle.text and "p = 1.000 over sets" in idle.text
    lone = never_ablated(Made(lost, kept, few[:2]))
    assert lone.verdict == "cannot tell" and "p < 0.001 over samples (sign flips), p = 0.333 over sets" in lone.text
    harmless = low_ranked(Made(lost, kept, few))
    assert harmless.verdict == "cannot tell" and harmless.text.endswith("No set of them is shown to cost five points.")
    assert "0 points [-13, 13]" in harmless.text, "that no answer of twenty changed does not mean none ever would"
    assert low_ranked(Made(lost, lost, few)).holds is False


def test_merged_tokens_are_those_of_the_layout_and_not_those_of_the_formula(qwen):
    picture = tiny_processors.noise(48, 32, 0)
    layout = qwen.inputs("Which?", images=[picture]).layout
    rows, cols = layout.grid()
    side = 32 / (2 * rows)  # pixels of a patch
    patches = np.zeros((2 * rows, 2 * cols), dtype=bool)
    patches[1:4, 3:6] = True
    box = mech.Box(3 * side, 1 * side, 6 * side, 4 * side)
    here = layout.positions("image")
    assert (layout.positions(box) - here[0]).tolist() == right_tokens(patches).tolist()
    assert published_tokens(patches).tolist() != right_tokens(patches).tolist()
    row = np.zeros((2, 8), dtype=bool)
    row[0, :4] = True
    assert published_tokens(row).tolist() == [0] and right_tokens(row).tolist() == [0, 1]


def test_the_formula_is_right_for_whole_pictures_only():
    whole = np.ones((6, 8), dtype=bool)
    assert published_tokens(whole).tolist() == right_tokens(whole).tolist() == list(range(12))
    iou, area = simulated_iou(400, seed=1)
    assert 0.2 < iou.mean() < 0.5 and iou[area > 0.4].mean() > iou[area < 0.1].mean()
    np.testing.assert_array_equal(iou, simulated_iou(400, seed=1)[0])


def three_pages(n=4):
    pages = [[tiny_processors.noise(16, 16, 10 * i + j) for j in range(3)] for i in range(n)]
    return mech.Samples(
        mech.Sample("Which digit?", "7", images=tuple(shown), evidence=(mech.Pages(i % 3),), id=str(i))
        for i, shown in enumerate(pages)
    )


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics3"])
def test_tags_stand_around_the_evidence_and_nothing_else_moves(name):
    model = HookedMLLM.from_hf(tiny.model(name), tiny_processors.processor(name))
    sample = three_pages()[1]
    plain, marked = tagged(model, sample, tags=None), tagged(model, sample, tags=("a ", " b"))
    built = model.inputs_of(sample)
    assert plain.tensors["input_ids"].equal(built.tensors["input_ids"])
    assert plain.layout.spans["question"] == built.layout.spans["question"]
    assert "".join(marked.layout.tokens[p] for p in marked.layout.positions("question")) == sample.question
    evidence, before = marked.layout.positions(sample.evidence), plain.layout.positions(sample.evidence)
    assert len(evidence) == len(before) and evidence[0] > before[0]
    text = [marked.layout.tokens[p] for p in range(len(marked.layout)) if marked.layout.kind[p] == 0]
    assert len(text) > len([p for p in range(len(plain.layout)) if plain.layout.kind[p] == 0])


def test_the_leak_is_what_tags_add_when_nothing_is_asked(qwen):
    samples = three_pages()
    found = tag_leak(qwen, samples, batch_size=3)
    np.testing.assert_allclose(found["plain"], retrieval_attention_mass(qwen, samples)["ram"], atol=1e-6)
    nothing = [replace(sample, question="N/A") for sample in samples]
    np.testing.assert_allclose(found["plain_null"], retrieval_attention_mass(qwen, nothing)["ram"], atol=1e-6)
    np.testing.assert_allclose(found["leak"], found["tagged_null"] - found["plain_null"])
    assert abs(found["leak"]).max() > 1e-3
    assert set(np.unique(found["right_plain"])) <= {0, 1}


def test_single_pictures_are_put_among_others_and_their_evidence_goes_along(key):
    samples = key.samples(5)
    among = among_others(samples, seed=1)
    places = set()
    for sample, shown in zip(samples, among, strict=True):
        assert len(shown.images) == 3
        region = shown.evidence[0]
        places.add(region.image)
        assert shown.images[region.image] is sample.images[0]
        assert replace(region, image=0) == sample.evidence[0]
    assert len(places) > 1
    assert among_others(samples, seed=1)[0].images == among[0].images


def test_evidence_grows_around_where_it_is():
    sample = three_pages(1)[0]
    assert _grown(mech.Pages(2), sample, 2) == mech.Pages(1, 2) and _grown(mech.Pages(0), sample, 9) == mech.Pages(
        0, 1, 2
    )
    assert _grown(mech.Box(4, 4, 8, 8), sample, 4) == mech.Box(2, 2, 10, 10)
    assert _grown(mech.Box(0, 0, 8, 8), sample, 4) == mech.Box(0, 0, 12, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"only": "low-rank"}, "use 'low-ranked'"),
        ({"samples": 4}, "at least 8 and 2"),
        ({"n_random": 1}, "at least 8 and 2"),
    ],
)
def test_what_cannot_be_examined_is_refused_before_any_forward(key, toy, monkeypatch, change, message):
    monkeypatch.setattr(HookedMLLM, "forward", lambda *_, **__: pytest.fail("a forward was run"))
    given = {"samples": 12, **change}
    with pytest.raises(ExperimentError, match=message):
        published_claims(toy, key.samples(given.pop("samples")), **given)


def test_what_cannot_be_measured_says_why_and_the_rest_goes_on(key, toy, monkeypatch):
    def impossible(bench):
        """A point that cannot be asked."""
        raise ExperimentError("a picture in a memory", "one in the sequence")

    monkeypatch.setitem(KNOWN, "acceleration", impossible)
    found = published_claims(toy, key.samples(8), ["acceleration", "figure-and-text"], n_random=2)
    assert found["acceleration"].holds is None and found["acceleration"].claim == "A point that cannot be asked."
    assert found["acceleration"].text == "Not measured: a picture in a memory."
    assert "%" in found["figure-and-text"].text


def test_other_refusals(key, toy, claims):
    with pytest.raises(ExperimentError, match="use 'queries'"):
        claims["query"]
    with pytest.raises(ExperimentError, match="samples without it"):
        tag_leak(toy, [replace(key.sample, evidence=())])
    with pytest.raises(ExperimentError, match="one sample with one picture"):
        tag_leak(toy, [key.sample])


def test_each_set_of_heads_is_ablated_once(key, toy, monkeypatch):
    bench = Bench.of(toy, key.samples(8), n_random=2)
    first = bench.cost(bench.ranking.top(1))
    bench.right()
    monkeypatch.setattr(HookedMLLM, "forward", lambda *_, **__: pytest.fail("a forward was run"))
    np.testing.assert_array_equal(bench.cost(bench.ranking.top(1)), first)
    with pytest.raises(pytest.fail.Exception):
        bench.cost(bench.ranking.top(1), to="zero")


def test_the_command_prints_sentences_and_writes_numbers(mech, tmp_path):
    code, said, _ = mech("claims", "--only", "low-ranked", "--samples", "12", "--n-random", "2", "-q",
                         "--out", str(tmp_path / "claims.json"))  # fmt: skip
    assert (
        code == 0
        and "low-ranked. Published (arXiv 2606.05843, on Qwen3-VL 4B, LLaVA-OneVision 7B): Lower-ranked heads" in said
        and "Here, on reference:llava-s (48 heads; grounding, 6 test samples): " in said
        and "reference:llava-s on grounding, 12 samples" in said
    )
    assert list(json.loads((tmp_path / "claims.json").read_text())["points"]) == ["low-ranked"]
    code, _, wrong = mech("claims", "--only", "low-rank")
    assert code == 2 and "use 'low-ranked'" in wrong


def test_masking_in_decoding_leaves_the_first_token_and_is_compared_with_prefill(qwen):
    """Answers of three digits: a disputed number that answers of one token cannot give."""
    bench = Bench.of(qwen, mech.haystacks("grounding", 8, answer="number"), n_random=2)
    top = bench.ranking.top(0.2)
    plain = list(answer_logits(qwen, bench.questions))
    with mech.intervene(qwen, mech.Ablate(heads=top, to="zero", phase="decode")) as without:
        masked = list(answer_logits(without, bench.questions))
    for before, after in zip(plain, masked, strict=True):
        assert len(before) > 1
        torch.testing.assert_close(before[0], after[0])
        assert not torch.allclose(before[1:], after[1:])
    point = phases(bench)
    assert point.decides and point.numbers["answer_tokens"] > 1
    assert "The share of correct tokens after the first falls by" in point.text
    assert set(point.numbers["later_tokens"]) == {"prefill", "decode", "both"}
    assert point.published == "arXiv 2605.27243"
    right = bench.later_tokens()
    says = [row.argmax(-1).tolist()[1:] for row in plain]
    expected = [np.mean(np.array(s) == a[1:]) for s, a in zip(says, bench.questions.answers, strict=True)]
    np.testing.assert_allclose(right, expected)
