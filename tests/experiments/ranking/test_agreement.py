"""Cut-offs and Lorenz curves, agreement with intervals, how many samples are enough, published lists, coverage of
keys."""

import json

import numpy as np
import pytest
import xarray as xr
from scipy import stats

import mech
from mech.data.haystacks import haystacks
from mech.errors import ExperimentError, OutputError
from mech.experiments.ranking.agreement import agreement, overlap, read_heads, sample_curve
from mech.experiments.ranking.ranking import Ranking, rank_heads
from mech.experiments.ranking.selection import above, elbow, elbow_count, lorenz, quantile
from mech.experiments.scores.coverage import key_coverage
from mech.experiments.statistics import jaccard_null
from mech.model import HookedMLLM
from mech.reference import tiny, tiny_processors

DIMS = ("example", "layer", "head")
SIGNAL = ((0, 3), (2, 1), (3, 7))


def scores(n=30, seed=0, signal=SIGNAL, noise=0.1, strength=0.8):
    rng = np.random.default_rng(seed)
    values = rng.uniform(0, noise, (n, 4, 8))
    for layer, head in signal:
        values[:, layer, head] += strength
    examples = [f"{seed}/{i}" for i in range(n)]
    return xr.DataArray(values, {"example": examples}, DIMS, "ram", {"model": "m"})


def test_the_elbow_parts_the_heads_that_stand_out_from_the_flat_rest():
    assert set(elbow(rank_heads(scores()))) == set(SIGNAL)
    assert elbow_count(np.array([0.0, 10, 9, 0.1, 0.2, 0.3, 8])) == 3
    assert elbow_count(np.array([1.0, 1, 1])) == 3 and elbow_count(np.array([3.0, 2, 1])) == 3


def test_quantiles_and_thresholds_name_heads_strictly_above():
    ranking = rank_heads(scores())
    assert quantile(ranking, 0.9) == ranking.heads[:4]  # it lies between the 28th and 29th value
    assert set(above(ranking, 0.5)) == set(SIGNAL) and above(ranking, 2) == ()
    assert quantile(rank_heads(scores() * 0), 0.5) == ()
    with pytest.raises(ExperimentError, match=r"q=1"):
        quantile(ranking, 1)


def test_lorenz_curve_agrees_with_gini_and_half_mass():
    ranking = rank_heads(scores(seed=4))
    curve = lorenz(ranking)
    share, heads = curve.values, curve["heads"].values
    assert (share[0], share[-1], heads[-1]) == pytest.approx((0, 1, 1)) and (np.diff(share) >= 0).all()
    assert 2 * np.trapezoid(share - heads, heads) == pytest.approx(ranking.gini(), abs=1e-9)
    assert heads[np.argmax(share >= 0.5)] == ranking.half_mass_share()
    even = lorenz(Ranking(np.ones((2, 4))))
    assert even.values == pytest.approx(even["heads"].values)
    with pytest.raises(ExperimentError, match="no positive score"):
        lorenz(Ranking(np.zeros((2, 4))))


def test_agreement_has_kendall_and_intervals_that_resample_the_same_examples():
    one = scores(noise=0.5)
    same = one + 0.0
    same.name, other = "same", scores(seed=9, signal=(), noise=0.5)
    rankings = {"a": rank_heads(one), "b": rank_heads(same), "c": rank_heads(other)}
    found = agreement(rankings, k=3, n_resamples=200)
    a, c = (rankings[name].mean.ravel() for name in "ac")
    assert float(found.kendall.sel(ranking="a", other="c")) == pytest.approx(stats.kendalltau(a, c).statistic)
    # Equal scores of the same examples agree in every resample; resampled apart they would not.
    for name in ("spearman_low", "spearman_high", "jaccard_low", "jaccard_high"):
        assert float(found[name].sel(ranking="a", other="b")) == pytest.approx(1)
    for name in ("spearman", "jaccard"):
        assert (found[f"{name}_low"] <= found[name] + 1e-12).all() and (
            found[name] <= found[f"{name}_high"] + 1e-12
        ).all()
    assert float(found.spearman_low.sel(ranking="a", other="c")) < 0.3
    assert "spearman_low" not in agreement(rankings, k=3)
    again = agreement(rankings, k=3, n_resamples=200)
    xr.testing.assert_identical(found, again)


def test_agreement_is_shown_with_intervals_and_chance():
    rankings = {"<a>": rank_heads(scores()), "b": rank_heads(scores(seed=1))}
    found = agreement(rankings, k=3, n_resamples=50)
    shown = mech.view(found)
    assert "<a>" not in shown.body and "&lt;a&gt;" in shown.body
    low, high = (float(found[f"spearman_{end}"][0, 1]) for end in ("low", "high"))
    assert f"{low:.2f} to {high:.2f}" in shown.body and "top 3 heads" in shown.body
    assert f"chance {float(found.jaccard_null[0, 1]):.2f}" in shown.body
    assert " to " not in mech.view(agreement(rankings, k=3)).body


def test_intervals_of_agreement_hold_the_truth_about_as_often_as_they_say():
    """Two scores of correlated maps; the truth is the correlation of their maps without noise."""
    rng = np.random.default_rng(5)
    truth = rng.normal(size=(2, 4, 8))
    truth[1] = 0.7 * truth[0] + 0.7 * truth[1]
    exact, held = stats.spearmanr(truth[0].ravel(), truth[1].ravel()).statistic, 0
    for run in range(40):
        noisy = truth[:, None] + 0.7 * rng.normal(size=(2, 60, 4, 8))
        names = [f"{run}/{i}" for i in range(60)]
        arrays = [xr.DataArray(values, {"example": names}, DIMS, "s") for values in noisy]
        found = agreement({str(i): rank_heads(array) for i, array in enumerate(arrays)}, n_resamples=200, seed=run)
        held += float(found.spearman_low[0, 1]) <= exact <= float(found.spearman_high[0, 1])
    assert held >= 32


def test_rankings_of_different_models_or_without_examples_are_refused():
    ranking = rank_heads(scores())
    other = rank_heads(scores(), model="another")
    with pytest.raises(ExperimentError, match="different models"):
        agreement({"a": ranking, "b": other})
    bare = Ranking(ranking.mean)
    with pytest.raises(ExperimentError, match="'bare' keeps only the mean"):
        agreement({"a": ranking, "bare": bare}, n_resamples=10)
    with pytest.raises(ExperimentError, match="None examples"):
        sample_curve(bare)
    single = rank_heads(scores(n=1))
    with pytest.raises(ExperimentError, match="1 example\nExpected: at least two"):
        agreement({"a": single, "b": single}, n_resamples=10)
    assert float(agreement({"a": single, "b": single})["spearman"][0, 1]) == 1  # without an interval one is enough


def test_more_samples_agree_better_and_halves_are_disjoint():
    ranking = rank_heads(scores(n=64, noise=1.0, strength=0.25))
    curve = sample_curve(ranking, k=3)
    assert list(curve["size"].values) == [1, 2, 4, 8, 16, 32]
    mean = curve.mean("split")
    assert float(mean.jaccard[-1]) > 0.8 > 0.4 > float(mean.jaccard[0])
    assert float(mean.spearman[-1]) > float(mean.spearman[0]) + 0.1
    assert curve.attrs["jaccard_null"] == pytest.approx(jaccard_null(32, 3, 3))
    noise = rank_heads(scores(n=40, signal=()))
    assert abs(float(sample_curve(noise, [20], n_splits=100).spearman.mean())) < 0.15  # no shared example, no agreement
    for sizes in ([], [0], [33]):
        with pytest.raises(ExperimentError, match="sizes from 1 to 32"):
            sample_curve(ranking, sizes)


def test_published_lists_are_read_in_every_form(tmp_path):
    expected = ((2, 1), (0, 3), (3, 7))
    ranking = rank_heads(scores())
    forms = [
        [[2, 1], [0, 3], [3, 7]],
        [[3, 7, 0.1], [0, 3, 0.2], [2, 1, 0.9]],
        {"heads": [[0, 3, 0.2], [2, 1, 0.9], [3, 7, 0.1]]},
        {"0-3": [0.1, 0.3], "2-1": 0.9, "3-7": [0.1]},
    ]
    for i, form in enumerate(forms):
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps(form))
        assert read_heads(form) == read_heads(path) == expected
    ranking.to_json(tmp_path / "all.json")
    assert read_heads(tmp_path / "all.json") == ranking.heads
    found = overlap(ranking, read_heads(forms[0]))
    assert found["jaccard"] == 1 and found["mean_rank"] == pytest.approx(1 / 31)
    assert found["jaccard_null"] == pytest.approx(jaccard_null(32, 3, 3)) and found["overlap_p"] < 1e-3
    assert overlap(ranking, ranking.bottom(3))["mean_rank"] == pytest.approx(30 / 31)


@pytest.mark.parametrize("value", [[], {}, [[1]], "abc", [[0, 1], [0, 1]], {"a-b": 1}, {"1": 2}, 5])
def test_what_is_no_list_of_heads_is_refused(value, tmp_path):
    with pytest.raises(OutputError):
        read_heads(value)
    with pytest.raises(ExperimentError, match="no head L9H0"):
        overlap(rank_heads(scores()), [(9, 0)])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "mllama"])
def test_key_token_ratio_and_coverage_are_counted_by_hand(name):
    model = HookedMLLM.from_hf(tiny.model(name), tiny_processors.processor(name), name=name)
    box = mech.Box(17, 17, 31, 31)
    samples = [
        mech.Sample(text, "7", images=(tiny_processors.noise(32, 32, i),), evidence=(box,), id=str(i))
        for i, text in enumerate(("Which?", "Which digit is red?"))
    ]
    layer = model.cfg.attention_layers[1]
    sets = {"two": [(layer, 0), (layer, 1)], "one": [(layer, 0)]}
    found = key_coverage(model, samples, sets, keys=0.3)
    for i, sample in enumerate(samples):
        inputs = model.inputs_of(sample)
        attention = mech.attention_from(model, inputs)[0].numpy()
        layout = inputs.layout.visual
        evidence = set(layout.positions(sample.evidence))
        count = round(0.3 * int((layout.kind != 3).sum()))
        top = [[set(np.argsort(-row, kind="stable")[:count]) for row in heads] for heads in attention]
        for at, head in ((1, 0), (1, 1)):
            ratio = len(top[at][head] & evidence) / len(evidence)
            assert found["key_token_ratio"].values[i, at, head] == pytest.approx(ratio)
        union = len((top[1][0] | top[1][1]) & evidence) / len(evidence)
        assert float(found["coverage"].sel(set="two")[i]) == pytest.approx(union)
        assert float(found["coverage"].sel(set="one")[i]) == pytest.approx(len(top[1][0] & evidence) / len(evidence))


def test_retrieval_heads_cover_the_evidence_and_others_do_not():
    model = HookedMLLM.from_pretrained("reference:llava-m")
    find, test = haystacks("documents", 24, seed=2).split(0.5)
    ranking = rank_heads(mech.retrieval_attention_mass(model, find))
    found = key_coverage(model, test, {"top": ranking.top(4), "bottom": ranking.bottom(4)})["coverage"].mean("example")
    assert float(found.sel(set="top")) > 2 * float(found.sel(set="bottom"))
    for given in ({"a": [(99, 0)]}, {"a": []}):
        with pytest.raises(ExperimentError, match="the set 'a'"):
            key_coverage(model, test, given)
