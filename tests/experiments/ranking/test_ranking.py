"""Rankings: order and ties, sets and their controls, stability, sparsity, files, agreement."""

import json
import math

import numpy as np
import pytest
import xarray as xr

from mech.errors import ExperimentError, OutputError
from mech.experiments.ranking.agreement import agreement, scale_agreement
from mech.experiments.ranking.ranking import Head, Ranking, rank_heads
from mech.experiments.statistics import jaccard_null

DIMS = ("example", "layer", "head")


def scores(n=30, n_layers=4, n_heads=8, seed=0, signal=()):
    """Noise of 0.1 on every head, with a mean of 0.8 on the heads of ``signal``."""
    values = np.random.default_rng(seed).uniform(0, 0.1, (n, n_layers, n_heads))
    for layer, head in signal:
        values[:, layer, head] += 0.8
    return xr.DataArray(values, dims=DIMS, name="ram", attrs={"model": "m", "domain": "d"})


SIGNAL = ((0, 3), (2, 1), (3, 7))


def test_heads_are_ordered_by_their_mean_with_ties_in_layer_head_order():
    values = np.zeros((2, 2, 3))
    values[:, 1, 2] = [1, 3]
    values[:, 0, 1] = [4, 0]
    ranking = rank_heads(xr.DataArray(values, dims=DIMS))
    assert ranking.heads == ((0, 1), (1, 2), (0, 0), (0, 2), (1, 0), (1, 1))
    assert ranking.table[:2] == [(0, 1, 2.0), (1, 2, 2.0)]
    assert ranking.top(2) == ((0, 1), (1, 2))
    assert ranking.bottom(2) == ((1, 1), (1, 0))  # worst first
    assert ranking.middle(2) == ((0, 0), (0, 2))
    assert len(ranking) == 6 and (ranking.n_layers, ranking.n_heads, ranking.n_examples) == (2, 3, 2)


def test_a_head_is_its_tuple_and_prints_as_the_field_writes_it():
    assert Head(3, 5) == (3, 5) and str(Head(3, 5)) == f"{Head(3, 5)}" == "L3H5"
    assert json.dumps(Head(3, 5)) == "[3, 5]"


def test_the_same_ranking_from_any_order_of_dimensions_and_from_a_dataset():
    array = scores(signal=SIGNAL)
    dataset = xr.Dataset({"other": array * -1, "ram": array.drop_attrs()}, attrs={"model": "m", "domain": "d"})
    rankings = [rank_heads(array), rank_heads(array.transpose("head", "example", "layer")), rank_heads(dataset)]
    for ranking in rankings:
        assert ranking.heads == rankings[0].heads
        assert (ranking.model, ranking.domain, ranking.score) == ("m", "d", "ram")
    assert rank_heads(dataset, "other").heads[-1] == rankings[0].heads[0]
    assert rank_heads(array, model="x").model == "x"
    assert rank_heads(array.mean("example")).heads == rankings[0].heads
    assert np.array_equal(rankings[0].scores().values, array.values.mean(axis=0))
    assert float(rankings[0].scores().sel(layer=2, head=1)) == rankings[0].mean[2, 1]


@pytest.mark.parametrize(
    ("k", "n"),
    [(1, 1), (32, 32), (0.05, 2), (0.01, 1), (0.5, 16), (0.9999, 32), (np.int64(3), 3), (np.float32(0.5), 16)],
)
def test_count(k, n):
    assert rank_heads(scores()).count(k) == n  # 32 heads; 0.05 * 32 = 1.6 -> 2


def test_count_rounds_a_half_up_whatever_the_last_bit():
    ranking = rank_heads(scores(n_layers=3, n_heads=5))
    assert [ranking.count(k) for k in (0.1, 0.3, 0.5)] == [2, 5, 8]  # 1.5, 4.5, 7.5


@pytest.mark.parametrize("k", [0, -1, 33, 0.0, 1.0, 1.5, True, "3", None, float("nan")])
def test_count_refuses_what_could_be_misread(k):
    with pytest.raises(ExperimentError, match="an int from 1 to 32, or a share"):
        rank_heads(scores()).count(k)


def test_random_sets_have_the_size_differ_and_avoid_what_is_excluded():
    ranking = rank_heads(scores(signal=SIGNAL))
    draws = ranking.random(5, n_draws=30, seed=1, exclude=ranking.top(3))
    assert len(draws) == len(set(draws)) == 30
    for heads in draws:
        assert len(set(heads)) == 5 and not set(heads) & set(SIGNAL)
    assert ranking.random(5, 10, seed=1, exclude=ranking.top(3)) == draws[:10]  # more draws begin with the same
    assert ranking.random(5, 30, seed=2, exclude=ranking.top(3)) != draws


def test_every_head_is_as_likely_in_a_random_set():
    ranking = rank_heads(scores())
    drawn = [head for heads in ranking.random(8, n_draws=800) for head in heads]
    counts = np.array([drawn.count(head) for head in ranking.heads])
    expected = 800 * 8 / 32
    # chi-square of 31 degrees of freedom; fixed counts per set shrink it, so this is generous
    assert ((counts - expected) ** 2 / expected).sum() < 60


def test_a_random_set_is_never_drawn_twice():
    ranking = rank_heads(scores(n_layers=1, n_heads=3))
    draws = ranking.random(1, n_draws=7)
    assert len(draws) == len(set(draws)) == 3
    assert set(ranking.random(3, n_draws=4)) == {((0, 0), (0, 1), (0, 2))}


def test_layer_matched_sets_have_as_many_heads_in_each_layer_and_none_of_the_given():
    ranking = rank_heads(scores())
    given = ((0, 1), (0, 2), (3, 4))
    draws = ranking.layer_matched(given, n_draws=20)
    assert len(set(draws)) == 20
    for heads in draws:
        assert [head.layer for head in heads] == [0, 0, 3]
        assert not set(heads) & set(given)
    assert ranking.layer_matched(given, 5) == draws[:5]


def test_layer_matched_fills_up_from_the_set_where_a_layer_has_too_few_others():
    ranking = rank_heads(scores())
    given = tuple((0, h) for h in range(6))  # two others remain in layer 0
    draws = ranking.layer_matched(given, n_draws=15)
    assert len(set(draws)) == math.comb(6, 4) == 15
    for heads in draws:
        assert len(set(heads)) == 6 and {(0, 6), (0, 7)} <= set(heads)
    with pytest.raises(ExperimentError, match="fill their layers"):
        ranking.layer_matched([(1, h) for h in range(8)])
    # one layer full, another not: the full one stays as it is
    heads = ranking.layer_matched([*((1, h) for h in range(8)), (2, 0)], n_draws=1)[0]
    assert heads[:8] == tuple((1, h) for h in range(8)) and heads[8] != (2, 0)


def test_interval_holds_the_mean_and_shrinks_with_examples():
    few, many = rank_heads(scores(10)), rank_heads(scores(400))
    for ranking in (few, many):
        found = ranking.interval(n_resamples=300)
        assert ((found.low <= found["mean"]) & (found["mean"] <= found.high)).all()
        assert found["mean"].dims == ("layer", "head")
    width = [float((i.high - i.low).mean()) for i in (few.interval(), many.interval())]
    assert width[0] > 4 * width[1]  # sqrt(40) = 6.3 in theory


def test_stability_is_one_for_heads_that_stand_out_and_sums_to_k():
    ranking = rank_heads(scores(signal=SIGNAL))
    three = ranking.stability(200, k=3)
    assert [float(three.sel(layer=layer, head=head)) for layer, head in SIGNAL] == [1.0, 1.0, 1.0]
    five = ranking.stability(200, k=5)
    assert float(five.sum()) == pytest.approx(5)
    others = five.values[(five.values > 0) & (five.values < 1)]
    assert len(others) > 2  # places four and five are noise, and it shows


def test_stability_of_ties_is_as_deterministic_as_the_ranking():
    values = np.repeat(np.random.default_rng(0).random((20, 1, 1)), 8, axis=2)
    found = rank_heads(xr.DataArray(values, dims=DIMS)).stability(100, k=3)
    assert found.values.ravel().tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


def test_sparsity_known_values():
    def of(*values):
        return rank_heads(xr.DataArray(np.array([values], dtype=float), dims=("layer", "head")))

    assert of(1, 1, 1, 1).half_mass_share() == 0.5 and of(1, 1, 1, 1).gini() == pytest.approx(0)
    assert of(8, 0, 0, 0).half_mass_share() == 0.25 and of(8, 0, 0, 0).gini() == pytest.approx(0.75)
    assert of(3, 2, 1, -9).half_mass_share() == 0.25  # negative scores are no mass: 3 of 6
    assert of(1, 2, 3, 4).gini() == pytest.approx(0.25)
    assert math.isnan(of(0, 0).half_mass_share()) and math.isnan(of(-1, 0).gini())
    assert of(*[0.1] * 10).half_mass_share() == 0.5  # 5 * 0.1 is half of the sum, last bits or not


def test_json_round_trip(tmp_path):
    ranking = rank_heads(scores(signal=SIGNAL))
    value = ranking.to_json(tmp_path / "ranking.json")
    assert value["heads"][0] == list(ranking.table[0]) and len(value["heads"]) == 32
    for source in (tmp_path / "ranking.json", str(tmp_path / "ranking.json"), value, json.loads(json.dumps(value))):
        again = Ranking.from_json(source)
        assert again.heads == ranking.heads and again.table == ranking.table
        assert (again.model, again.domain, again.score) == ("m", "d", "ram")
        assert again.random(3, 4) == ranking.random(3, 4)
    with pytest.raises(ExperimentError, match="keeps only the mean"):
        again.interval()


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([[0, 0, 1.0], [1, 1, 0.5]], "every head of the model"),
        ([[0, 0, 1.0], [0, 0, 0.5]], "every head of the model"),
        ([[0, 0]], "holds no heads"),
        ([], "holds no heads"),
        ("abc", "holds no heads"),
    ],
)
def test_json_that_is_no_ranking_is_refused(heads, message):
    with pytest.raises(OutputError, match=message):
        Ranking.from_json({"heads": heads})


def test_json_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(OutputError, match=r"none\.json cannot be read"):
        Ranking.from_json(tmp_path / "none.json")


def test_a_ranking_shows_itself_and_escapes_its_names():
    ranking = rank_heads(scores(signal=SIGNAL), score="<script>alert(1)</script>")
    assert "srcdoc" in ranking._repr_html_() and "<script>alert" not in ranking._repr_html_()
    assert repr(rank_heads(scores(signal=((2, 1),)))).startswith("Ranking(m d: 4 x 8 heads by ram: L2H1 0.8")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rank_heads(scores().rename(head="kv_head")), r"\(example, layer, head\)"),
        (lambda: rank_heads(scores().expand_dims("phase")), r"scores over \(phase, example, layer, head\)"),
        (lambda: rank_heads(xr.Dataset({"a": scores()})), "no score 'ram'"),
        (lambda: rank_heads(scores().where(scores() > 0.001)), r"the score at \{'example': \d+, 'layer'"),
        (lambda: rank_heads(scores()[:0]), "no example"),
        (lambda: rank_heads(scores()).random(30, exclude=[(0, h) for h in range(8)]), "30 random heads from 24"),
        (lambda: rank_heads(scores()).random(3, exclude=[(4, 0)]), "no head L4H0"),
        (lambda: rank_heads(scores()).random(3, n_draws=0), "n_draws=0"),
        (lambda: rank_heads(scores()).layer_matched([(0, -1)]), "no head L0H-1"),
        (lambda: rank_heads(scores(n=1)).interval(), "at least two examples"),
        (lambda: agreement({}), "no rankings"),
        (lambda: agreement({"a": rank_heads(scores()), "b": rank_heads(scores(n_layers=5))}), "scale_agreement"),
        (lambda: scale_agreement(rank_heads(scores() * 0), rank_heads(scores())), "no positive score"),
    ],
)
def test_what_cannot_be_ranked_is_refused_by_name(make, message):
    with pytest.raises(ExperimentError, match=message):
        make()


def test_agreement_finds_shared_heads_and_not_others():
    same = {name: rank_heads(scores(seed=i, signal=SIGNAL)) for i, name in enumerate("ab")}
    other = rank_heads(scores(seed=3, signal=((1, 1), (1, 2), (1, 3))))
    found = agreement({**same, "c": other}, k=3)
    assert found.jaccard.sel(ranking="a", other="b") == 1
    assert found.jaccard.sel(ranking="a", other="c") == 0
    assert float(found.jaccard_null[0, 1]) == pytest.approx(jaccard_null(32, 3, 3))
    assert float(found.overlap_p.sel(ranking="a", other="b")) == pytest.approx(1 / math.comb(32, 3))
    assert found.spearman.sel(ranking="a", other="a") == 1
    assert np.array_equal(found.spearman, found.spearman.T)
    assert found.attrs["n_top"] == 3


def test_scale_agreement_compares_relative_depth():
    small = rank_heads(scores(n_layers=4, signal=((1, 0), (1, 1))), model="s")
    large = rank_heads(scores(n_layers=8, signal=((2, 0), (3, 1))), model="l")
    late = rank_heads(scores(n_layers=8, signal=((7, 0), (7, 1))), model="late")
    alike, apart = scale_agreement(small, large), scale_agreement(small, late)
    assert alike.share.sum("depth").values == pytest.approx([1, 1])
    assert float(alike.overlap) > 0.8 > 0.7 > float(apart.overlap)
    assert float(alike.pearson) > 0.9 and float(apart.pearson) < 0
    assert float(apart.centre.sel(ranking="late")) > float(apart.centre.sel(ranking="s"))
    assert list(alike.ranking.values) == ["s", "l"]


def test_relative_depth_is_exact_when_one_model_has_three_layers_and_the_other_two():
    three = rank_heads(xr.DataArray(np.array([[6.0], [0], [3]]), dims=("layer", "head")))
    two = rank_heads(xr.DataArray(np.array([[1.0], [1]]), dims=("layer", "head")))
    found = scale_agreement(three, two)
    assert found.share.values == pytest.approx(np.array([[2 / 3, 1 / 3], [0.5, 0.5]]))
    assert found.centre.values == pytest.approx([(2 / 3) * (1 / 6) + (1 / 3) * (5 / 6), 0.5])
    assert np.isnan(found.pearson)
