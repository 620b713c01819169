"""Pictures against text: numbers of the summary, and sentences that follow them whichever way they fall."""

import pytest

from mech.experiments.ablation.forms import Scenes, forms_in
from mech.experiments.findings import forms
from mech.experiments.findings.literature import in_all, published
from mech.model import HookedMLLM
from mech.reference import tiny, tiny_processors
from mech.results import Study


def opened():
    return HookedMLLM.from_hf(tiny.model("llava"), tiny_processors.processor("llava"), name="tiny")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    with Study(tmp_path_factory.mktemp("forms"), {"seed": 0}) as results:
        of, silent = Scenes("documents", n=8, k=2, n_random=2, batch_size=4), lambda *_: None
        first = forms_in(results, "tiny/forms", opened(), opened, of, silent)
        refused = lambda: pytest.fail("what is there is not computed again")  # noqa: E731
        again = forms_in(results, "tiny/forms", opened(), refused, of, silent)
    assert all(first[name].equals(again[name]) for name in first)
    return first


def test_the_numbers_are_those_of_the_datasets(found):
    facts = forms.summarise(found)
    assert (facts["domain"], facts["n_find"], facts["n_test"], facts["n_top"]) == ("documents", 4, 4, 2)
    assert set(facts["rows"]) == {"question", "answer"} and set(facts["accuracy"]) == {"pictures", "text"}
    same = forms.pair(facts, "answer", "text", "base text")
    assert same["shared"] == 2 and same["within"] == pytest.approx(1), "the base is the model itself"
    lost = forms.cell(facts, "text before tuning", "pictures")
    assert lost["lost"]["mean"] == float(
        found["transfer"]["lost"].sel(found_on="text before tuning", tested_on="pictures")
    )
    assert facts["draws"] == 2 and sum(facts["rows"]["answer"]["origin"].values()) == facts["n_heads"]


def fabricated(shared, pictures, text):
    interval = lambda mean: {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}  # noqa: E731
    pairs = [{"reading": "pictures", "other": "base text", "shared": shared, "shared_low": shared - 1,
              "shared_high": shared + 1, "expected": 3.0, "p": 0.5 if shared < 5 else 1e-4, "within": 0.9}]  # fmt: skip
    heads = [{"head": f"L{i}H0", "origin": "on pictures only"} for i in range(14 - shared)]
    rows = {"pairs": pairs, "origin": {"on text before, and on pictures": shared}, "heads": heads}
    lost = [
        {"found_on": on, "tested_on": form, "lost": interval(value), "p": 0.04, "p_samples": 0.01, "p_sets": 0.04}
        for on, value in (("pictures", pictures), ("text before tuning", text))
        for form in ("pictures", "text")
    ]
    return {"n_top": 14, "n_find": 24, "rows": {"answer": rows, "question": rows}, "lost": lost, "draws": 8,
            "random_lost": {"pictures": interval(0.05), "text": interval(0.05)}}  # fmt: skip


def test_sentences_follow_the_numbers():
    said = {kind: (text, against) for kind, text, against in forms.sentences(fabricated(12, 0.9, 0.85))}
    assert set(said) == {"shared heads", "one for both"}
    assert "12 [11, 13]" in said["shared heads"][0] and not any(against for _, against in said.values())
    said = {kind: (text, against) for kind, text, against in forms.sentences(fabricated(2, 0.9, 0.1))}
    assert set(said) == {"other heads", "recruited", "one for each"}
    assert said["one for each"][1] and said["other heads"][1] and "12 were recruited" in said["recruited"][0]
    assert "one for both" not in {kind for kind, *_ in forms.sentences(fabricated(12, 0.05, 0.05))}, "nothing to share"
    assert set(forms.KINDS) >= set(said)


def test_what_all_settings_come_to_is_no_more_than_they_can_say():
    told = lambda *verdicts: in_all(verdicts, "agrees", "differs")  # noqa: E731
    assert (
        told("agrees", "differs", "cannot tell") == "Not universal: it fails in 1 of 3 settings and is reproduced in 1."
    )
    assert told("differs") == "Not universal: it fails in the one setting tried."
    assert told("agrees", "agrees") == "Reproduced in all 2 settings tried."
    assert told("agrees", "cannot tell") == "Reproduced in 1 of 2 settings; the others cannot tell."
    assert told("cannot tell") == "Cannot tell in the one setting tried."
    assert published("2608.27417") == "arXiv 2608.27417, on Qwen3-VL 8B" and published("") == ""
