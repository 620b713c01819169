"""Verdicts on claims: sure of both, or not told; and nothing where nothing was tested."""

import pytest

from mech.experiments.findings.sentences import KINDS
from mech.experiments.findings.verdicts import AGREES, CANNOT_TELL, CLAIMS, DIFFERS, NEEDED, RANKED, UNSURE, verdicts


def entry(band, drop, low, high, fraction=0.05, n=5):
    lost = {"mean": drop, "low": low, "high": high}
    return {"method": "mean", "band": band, "fraction": fraction, "n_heads": n, "accuracy_drop": lost}


def numbers(*entries, accuracy=0.9, causal=None):
    right = {"mean": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.05}
    return {"baseline": {"accuracy": right}, "ablation": list(entries), **({"causal": causal} if causal else {})}


def summary(domains, findings=(), **more):
    made = [
        {"kind": kind, "model": "m", "domain": domain, "text": kind, "against_papers": against}
        for domain, kind, against in findings
    ]
    return {"models": {"m": {"domains": domains, **more}}, "findings": made}


def told(found, claim):
    return {
        (cell["model"], cell["domain"]): cell["verdict"]
        for row in found
        if row["claim"].startswith(claim)
        for cell in row["cells"]
    }


def test_claims_name_findings_that_there_are():
    named = {kind for claim in CLAIMS for kind in (*claim.agrees, *claim.differs)} | set(UNSURE)
    assert named <= set(KINDS)
    texts = [claim.text for claim in CLAIMS]
    assert len(set(texts)) == len(texts) and set(UNSURE.values()) <= set(texts)


def test_not_shown_is_not_refuted():
    wide = numbers(entry("top", 0.1, -0.1, 0.3), entry("random", 0.02, -0.05, 0.1))
    tight = numbers(entry("top", 0.0, -0.02, 0.03), entry("random", 0.02, -0.05, 0.1))
    found = verdicts(
        summary(
            {"shown": wide, "open": wide, "refuted": tight, "untested": numbers()},
            [("shown", "needed", False), ("open", "not needed", False), ("refuted", "not needed", True)],
        )
    )
    assert told(found, NEEDED) == {("m", "shown"): AGREES, ("m", "open"): CANNOT_TELL, ("m", "refuted"): DIFFERS}


@pytest.mark.parametrize(
    ("top", "control", "verdict"),
    [((0.5, 0.4, 0.6), (0.05, 0.0, 0.1), AGREES), ((0.5, 0.4, 0.6), (0.2, 0.0, 0.4), CANNOT_TELL),
     ((0.1, -0.1, 0.3), (0.0, 0.0, 0.01), CANNOT_TELL)],
)  # fmt: skip
def test_a_control_must_surely_cost_less_than_half(top, control, verdict):
    found = verdicts(summary({"d": numbers(entry("top", *top), entry("layer_matched", *control))}))
    assert told(found, "It is these heads") == {("m", "d"): verdict}
    said = next(cell["text"] for row in found for cell in row["cells"] if row["claim"].startswith("It is these"))
    assert f"{100 * top[0]:.0f} points" in said and f"{100 * control[0]:.0f} points" in said


def test_low_ranked_heads_hardly_matter_where_the_largest_set_surely_costs_little():
    small, unsure = entry("bottom", 0.0, -0.02, 0.02, 0.2, 20), entry("bottom", 0.0, -0.2, 0.2, 0.2, 20)
    found = verdicts(
        summary({"yes": numbers(small), "open": numbers(unsure), "no": numbers(unsure)}, [("no", "low", True)])
    )
    assert told(found, "Low-ranked") == {("m", "yes"): AGREES, ("m", "open"): CANNOT_TELL, ("m", "no"): DIFFERS}


def test_a_weak_model_tells_nothing():
    found = verdicts(summary({"d": numbers(entry("top", 0.0, 0.0, 0.0), entry("random", 0, 0, 0), accuracy=0.2)}))
    assert set(told(found, NEEDED).values()) == {CANNOT_TELL}
    assert "gets only 20%" in next(row for row in found if row["claim"] == NEEDED)["cells"][0]["text"]


def test_none_found_counts_only_where_one_could_be():
    heads = {"attending and causal": [[0, 0]], "attending, not causal": [], "causal, not attending": [],
             "neither": [[0, i] for i in range(1, 48)]}  # fmt: skip
    few, many = ({"quadrants": heads, "n_test": n} for n in (5, 20))
    found = verdicts(summary({"few": numbers(causal=few), "many": numbers(causal=many)}))
    assert told(found, "Heads that do not attend") == {("m", "few"): CANNOT_TELL, ("m", "many"): AGREES}
    assert told(found, "Heads that attend") == {("m", "few"): AGREES, ("m", "many"): AGREES}


def test_what_is_said_of_a_model_is_one_cell():
    both = {"agreement": {"domains": ["a", "b"]}}
    for against, verdict in ((True, DIFFERS), (False, AGREES)):
        found = verdicts(summary({"a": numbers(), "b": numbers()}, [(None, "domains", against)], **both))
        assert told(found, "The ranking is the same") == {("m", None): verdict}


def test_sparse_inference_is_judged_where_it_was_tried():
    loss = {"mean": 0.3, "low": 0.2, "high": 0.4}
    facts = {"domain": "pages", "n_kv_heads": 8, "margin": 0.1, "against_random": [{}], "recommended": None,
             "curve": [{"choice": "ram", "share": 0.25, "n_kv_heads": 2, "loss": loss}]}  # fmt: skip
    whole = summary({"a": numbers()}, [("pages", "dense draws", True)])
    whole["acceleration"] = {"m": facts}
    found = verdicts(whole)
    assert told(found, "A few dense heads") == {("m", "pages"): DIFFERS}
    assert told(found, RANKED) == {("m", "pages"): CANNOT_TELL}
    assert told(found, "Sparse inference is faster") == {}, "nothing was recommended, so nothing was timed"
