"""Evidence retrieval: the order against brute force, the planted head against chance, batches against single rows."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

import mech
from mech.errors import ExperimentError
from mech.experiments.attention.maps import attention_from
from mech.experiments.scores.evidence_retrieval import _judged, evidence_retrieval, retrieval_table
from mech.model import HookedMLLM


@pytest.fixture(scope="module")
def qwen():
    return HookedMLLM.from_pretrained("reference:qwen-s")


@pytest.mark.parametrize("score", [[3, 1, 2, 0], [1, 1, 0, 2], [0, 0, 0, 0], [1, 1, 2, 2], [5, 1, 1, 1]])
@pytest.mark.parametrize("right", [[1, 0, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1]])
def test_an_order_is_judged_as_the_mean_over_all_ways_to_break_its_ties(score, right):
    score, right, ks = np.array(score, dtype=float), np.array(right, dtype=bool), (1, 2, 3, 9)
    expected = []
    for order in itertools.permutations(range(4)):
        if any(score[a] < score[b] for a, b in itertools.pairwise(order)):
            continue
        hits = [right[i] for i in order]
        expected.append(
            [1 / (hits.index(True) + 1), *(any(hits[:k]) for k in ks), *(sum(hits[:k]) / right.sum() for k in ks)]
        )
    rr, hit, recall = _judged(score, right, ks)
    np.testing.assert_allclose([rr, *hit, *recall], np.mean(expected, axis=0), atol=1e-12)


def test_the_planted_retrieval_head_finds_every_cell_and_the_sink_head_none_before_others(key, toy):
    sets = {role: [head] for role, head in key.truth.heads.items()}
    found = evidence_retrieval(toy, key.samples(6), sets, ks=(1, 3))
    assert found.attrs["over"] == "cells" and (found["n_candidates"] == 16).all() and (found["n_right"] == 1).all()
    by = found["reciprocal_rank"].mean("example").values[list(found["band"].values).index("retrieval")]
    assert by == 1
    sink = found.isel(set=list(found["band"].values).index("sink"))
    assert float(sink["reciprocal_rank"].mean()) < 0.6
    rows = {row["band"]: row for row in retrieval_table(found)}
    assert rows["retrieval"]["hit@1"] == 1 and "p_value" not in rows["retrieval"]
    assert rows["chance"]["hit@1"] == pytest.approx(1 / 16) and rows["chance"]["recall@3"] == pytest.approx(3 / 16)
    assert rows["chance"]["mrr"] == pytest.approx(np.mean(1 / np.arange(1, 17)))


def test_candidates_are_ordered_by_the_attention_they_get(qwen):
    find, test = mech.haystacks("pages", 10, seed=0).split(0.5)
    ranking = mech.rank_heads(mech.retrieval_attention_mass(qwen, find))
    found = evidence_retrieval(qwen, test, ranking, heads=3, n_random=2, batch_size=3)
    assert found.attrs["over"] == "pages" and list(dict.fromkeys(found["band"].values)) == [
        "top", "bottom", "vision", "random", "all",
    ]  # fmt: skip
    drawn = ranking.random(3, 2, 0, exclude=ranking.top(3))
    for row, heads in ((0, ranking.top(3)), (1, ranking.bottom(3)), (4, drawn[1]), (5, ranking.heads)):
        for i, sample in enumerate(test):
            inputs = qwen.inputs_of(sample)
            attention = attention_from(qwen, inputs)[0].numpy()
            pages = [inputs.layout.positions(mech.Pages(page)) for page in range(len(sample.images))]
            score = np.array([sum(attention[head][tokens].mean() for head in heads) for tokens in pages])
            gold = sample.evidence[0].indices[0]
            place = 1 + int((score > score[gold] + 1e-9).sum())
            assert float(found["reciprocal_rank"][row, i]) == pytest.approx(1 / place)
            assert float(found["hit"].sel(k=1)[row, i]) == (place == 1)


def test_frames_of_a_video_and_the_table_with_its_tests(qwen):
    find, test = mech.haystacks("video", 24, seed=1).split(0.5)
    ranking = mech.rank_heads(mech.retrieval_attention_mass(qwen, find))
    found = evidence_retrieval(qwen, test, ranking, n_random=100)
    assert found.attrs["over"] == "frames" and (found["n_candidates"] == 4).all()
    rows = {row["band"]: row for row in retrieval_table(found)}
    assert rows["random"]["sets"] == 100 and rows["top"]["n_heads"] == ranking.count(0.05)
    for row in rows.values():
        for name in ("mrr", "hit@1", "recall@2"):
            assert 0 <= row[name] <= 1
            if row["band"] != "chance":
                assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    assert rows["top"]["p_value"] == max(rows["top"]["p_samples"], rows["top"]["p_sets"])
    assert rows["top"]["p_samples"] < 0.01 and rows["top"]["p_value"] < 0.05 < rows["all"]["p_value"]
    assert rows["top"]["p_value"] <= rows["top"]["p_adjusted"] <= 1
    page = mech.view(found).html()
    for word in ("hit@1", "MRR", "About 4 frames to choose from", "vision"):
        assert word in page
    assert rows["top"]["mrr"] > rows["chance"]["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_sums_favour_what_is_large_and_means_do_not(key, toy):
    sample = key.sample
    sets = {"even": [(1, 3)], "retrieval": [key.truth.heads["retrieval"]]}
    for reduce in ("mean", "sum"):
        found = evidence_retrieval(toy, [sample], sets, grid=(2, 2), reduce=reduce)
        assert float(found["reciprocal_rank"][1, 0]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"over": "page"}, "use 'pages'"),
        ({"reduce": "max"}, "choose from 'mean', 'sum'"),
        ({"ks": ()}, "at least one"),
        ({"ks": (0, 1)}, "at least 1"),
        ({"samples": []}, "at least one"),
        ({"over": "pages"}, "1 candidates"),
        ({"over": "frames"}, "0 candidates"),
        ({"ranking": {}}, "at least one"),
        ({"ranking": {"mine": [(9, 9)]}}, "by name"),
        ({"ranking": {"mine": []}}, "by name"),
        ({"grid": (1, 1)}, "1 candidates"),
    ],
)
def test_what_cannot_be_retrieved_is_refused_before_any_forward(key, toy, monkeypatch, change, message):
    monkeypatch.setattr(HookedMLLM, "forward", lambda *_, **__: pytest.fail("a forward was run"))
    given = {"samples": [key.sample], "ranking": {"retrieval": [(1, 0)]}, **change}
    with pytest.raises(ExperimentError, match=message):
        evidence_retrieval(toy, given.pop("samples"), given.pop("ranking"), **given)


def test_heads_found_on_the_same_samples_are_refused(key, toy):
    samples = key.samples(3)
    ranking = mech.rank_heads(mech.retrieval_attention_mass(toy, samples))
    with pytest.raises(ExperimentError, match="found the heads"):
        evidence_retrieval(toy, samples, ranking)
    with pytest.raises(ExperimentError, match="have no evidence"):
        evidence_retrieval(toy, [replace(key.sample, evidence=())], ranking)
    whole = replace(key.sample, evidence=(mech.Pages(0),))
    with pytest.raises(ExperimentError, match="in 16 of 16 candidates"):
        evidence_retrieval(toy, [whole], {"a": [(0, 0)]})
