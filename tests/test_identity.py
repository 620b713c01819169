"""Heads and activations of another model are refused, also where it has the same shape; or allowed, and recorded."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from cards import Cards

import mech
from mech import identity
from mech.data.haystacks import haystacks
from mech.errors import ExperimentError
from mech.experiments.ablation.redirection import redirection
from mech.identity import made_elsewhere, weight_digest, weights_in
from mech.interventions import Ablate, intervene, reference_activations
from mech.model import HookedMLLM
from mech.reference import tiny


@pytest.fixture(scope="module")
def model():
    return HookedMLLM.from_pretrained("reference:llava-s")


@pytest.fixture(scope="module")
def other():
    """Another training of the same architecture."""
    return HookedMLLM.from_pretrained("reference:llava-s-seed1")


@pytest.fixture(scope="module")
def halves():
    return haystacks("grounding", 8, seed=31).split(0.5)


@pytest.fixture(scope="module")
def foreign(other, halves):
    return mech.rank_heads(mech.retrieval_attention_mass(other, halves[0]))


@pytest.fixture(scope="module")
def bank(other, halves):
    return reference_activations(other, halves[0], n_draws=4)


def test_rankings_and_references_remember_their_weights(other, foreign, bank, tmp_path):
    digest = weight_digest(other)
    assert foreign.weights == bank.weights == digest and foreign.model == bank.model == other.name
    path = tmp_path / "ranking.json"
    assert foreign.to_json(path)["weights"] == digest and mech.Ranking.from_json(path).weights == digest
    old = {key: value for key, value in json.loads(path.read_text()).items() if key != "weights"}
    assert mech.Ranking.from_json(old).weights == ""
    assert weights_in({}) == weights_in({"provenance": "{"}) == weights_in({"provenance": {"model": None}}) == ""


def test_a_large_model_is_known_by_sums_that_are_made_where_it_lies(monkeypatch):
    """What earlier versions wrote down, digests of every byte, is still known."""
    made = tiny.model("llava").bfloat16()
    by_bytes = weight_digest(made, by_bytes=True)
    monkeypatch.setattr(identity, "LARGE", 0)
    monkeypatch.setattr(identity, "_BLOCK", 64)
    monkeypatch.setattr(identity, "_AT_ONCE", 2)
    digest = weight_digest(made)
    assert digest.endswith(".sums") and weight_digest(copy.deepcopy(made)) == digest != by_bytes
    hooked = HookedMLLM.from_hf(made, name="mine")
    for known in (by_bytes, digest):
        assert made_elsewhere("a ranking", "mine", known, hooked) == ""
    with Cards():
        assert weight_digest(copy.deepcopy(made).to("card:1")) == digest
    weight = made.get_input_embeddings().weight
    for change in (
        lambda: weight[3, 5].mul_(-1), lambda: weight.copy_(weight.flip(0)),
        lambda: weight[:2].copy_(weight[:2].flip(1)),
        lambda: weight[-1, -1].add_(1),
    ):  # fmt: skip
        with torch.no_grad():
            change()
        digest, before = weight_digest(made), digest
        assert digest != before
        with pytest.raises(ExperimentError, match="a ranking of mine"):
            made_elsewhere("a ranking", "mine", before, hooked)


def test_sums_are_those_of_python_s_integers():
    words = torch.randint(-(2**63), 2**63 - 1, (2**17 + 3,), generator=torch.Generator().manual_seed(0))
    first, second = identity._sums(words.view(torch.uint8)).tolist()

    def factor(place):
        mixed = signed(place * 0x9E3779B97F4A7C15)
        return signed((mixed ^ (mixed >> 31)) * 0xBF58476D1CE4E5B9) | 1

    def signed(number):
        return (number + 2**63) % 2**64 - 2**63

    expected = [signed(word * factor(i % 2**17 + 1)) for i, word in enumerate(words.tolist())]
    assert first == signed(sum(expected[: 2**17])) and second == signed(sum(expected[2**17 :]))
    assert identity._sums(words[:1].view(torch.uint8)[:3]).tolist() == [
        signed(int.from_bytes(words[:1].view(torch.uint8)[:3].numpy().tobytes(), "little") * factor(1))
    ]


def uses(model, halves, foreign, bank, **options):
    """Every public function that takes heads or activations from elsewhere: name -> what it gives, when called."""
    find, test = halves
    own = dict(reference=find, fractions=[2], n_random=1)
    return {
        "ablation": lambda: mech.ablation(model, test, foreign, bands=["top"], **own, **options),
        "ablation, a band": lambda: mech.ablation(
            model, test, plain(foreign), bands=["top", foreign], **own, **options
        ),
        "ablation, reference": lambda: mech.ablation(
            model, test, plain(foreign), **own | dict(reference=bank), bands=["top"], **options
        ),
        "steering": lambda: mech.steering(model, test, foreign, factors=[1], bands=["top"], **options),
        "evidence_retrieval": lambda: mech.evidence_retrieval(model, test, foreign, n_random=1, **options),
        "attention_maps": lambda: mech.attention_maps(model, test[:1], foreign, k=1, **options),
        "transfer": lambda: mech.transfer(
            model, {"a": find}, {"a": test}, rankings={"a": foreign}, n_random=2, **options
        ),
    }


def plain(ranking):
    """The same heads, of a file that does not say whose they are."""
    return replace(ranking, weights="", examples=())


CASES = [
    "ablation",
    "ablation, a band",
    "ablation, reference",
    "steering",
    "evidence_retrieval",
    "attention_maps",
    "transfer",
]


@pytest.mark.parametrize("case", CASES)
def test_another_model_is_refused_before_any_forward(model, halves, foreign, bank, monkeypatch, case):
    foreign = replace(foreign, score="other")
    for method in ("forward", "generate", "encode_pictures"):
        monkeypatch.setattr(HookedMLLM, method, lambda *_, **__: pytest.fail("a forward was run"))
    with pytest.raises(ExperimentError, match=r"of reference:llava-s-seed1 \(weights(.|\n)*allow_other_model=True"):
        uses(model, halves, foreign, bank)[case]()


@pytest.mark.parametrize("case", CASES)
def test_it_can_be_allowed_and_the_result_says_so(model, halves, foreign, bank, case):
    foreign = replace(foreign, score="other")
    found = uses(model, halves, foreign, bank, allow_other_model=True)[case]()
    assert "of reference:llava-s-seed1 (weights " in found.attrs["other_model"]


def test_the_rest_refuses_it_too(model, halves, foreign, bank, monkeypatch):
    find, test = halves
    monkeypatch.setattr(HookedMLLM, "forward", lambda *_, **__: pytest.fail("a forward was run"))
    heads = [(1, 0), (1, 1)]
    for call in (
        lambda: mech.causal_report(model, test, foreign, find=find),
        lambda: mech.causal_report(model, test, plain(foreign), find=find, reference=bank),
        lambda: mech.acceleration(model, test, find=find, rankings={"ram": foreign}),
        lambda: redirection(model, test, foreign),
        lambda: mech.prune_heads(model, heads, reference=bank),
        lambda: intervene(model, Ablate(heads=heads, reference=bank)).__enter__(),
    ):
        with pytest.raises(ExperimentError, match="allow_other_model=True"):
            call()
    with intervene(model, Ablate(heads=heads, reference=bank, allow_other_model=True)) as allowed:
        described = allowed.specs[0].describe()
    assert described["allow_other_model"] and described["reference_model"] == bank.weights


def test_the_same_weights_are_the_same_model_whatever_its_name(model, halves):
    ranking = mech.rank_heads(mech.retrieval_attention_mass(model, halves[0]))
    again = HookedMLLM.from_pretrained("reference:llava-s")
    again.name = "by another name"
    assert made_elsewhere("a ranking", ranking.model, ranking.weights, again) == ""
    assert "other_model" not in mech.ablation(again, halves[1], ranking, to="zero", bands=["top"], fractions=[1]).attrs
    assert mech.Ranking(np.ones((6, 8))).weights == "" and made_elsewhere("a ranking", "x", "", model) == ""
