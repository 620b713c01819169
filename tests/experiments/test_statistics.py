"""Statistics: coverage of the intervals, false positives and power of the tests, known values, refusals."""

import numpy as np
import pytest
from scipy import stats

from mech.errors import ExperimentError
from mech.experiments.statistics import (
    accuracy_interval,
    benjamini_hochberg,
    bootstrap_interval,
    bootstrap_means,
    holm,
    jaccard,
    jaccard_null,
    overlap_p_value,
    permutation_test,
    proportion_interval,
    spearman,
    two_way_bootstrap,
)


def coverage(draw, truth, interval, repeats=400):
    rng = np.random.default_rng(0)
    found = [interval(draw(rng), seed) for seed in range(repeats)]
    return np.mean([i.low <= truth <= i.high for i in found])


def null_p_values(over, repeats=300, n=60, n_draws=19):
    """The top set is one more random set: same difficulty per example, independent answers."""
    rng, p = np.random.default_rng(1), []
    for seed in range(repeats):
        difficulty = rng.random(n)
        drops = rng.normal(difficulty, 1.0, size=(n_draws + 1, n))
        p.append(permutation_test(drops[0], drops[1:], over=over, n_permutations=500, seed=seed).p_value)
    return np.array(p)


@pytest.mark.parametrize("n", [12, 40])
def test_bootstrap_interval_covers_the_mean_as_often_as_it_says(n):
    found = coverage(lambda rng: rng.normal(3.0, 2.0, n), 3.0, lambda x, s: bootstrap_interval(x, 0.9, 500, s))
    assert 0.86 <= found <= 0.94  # binomial noise of 400 repeats: +- 0.03


def test_two_way_interval_covers_when_sets_differ_and_the_one_way_does_not():
    def draw(rng):  # sets of heads differ in what they cost; examples in how hard they are
        return rng.normal(0, 1, (12, 1)) + rng.normal(0, 0.3, (1, 60)) + rng.normal(0, 0.3, (12, 60))

    both = coverage(draw, 0.0, lambda x, s: two_way_bootstrap(x, 0.9, 300, s), repeats=150)
    one = coverage(draw, 0.0, lambda x, s: bootstrap_interval(x.mean(axis=0), 0.9, 300, s), repeats=150)
    assert both >= 0.85
    assert one <= 0.5


# What happens to one answer: right before, lost if it was, gained if it was not.
CHANGES = [(0.9, 0.3, 0.1), (0.8, 0.6, 0.2), (0.95, 0.15, 0.1), (0.5, 0.5, 0.5), (0.95, 0.9, 0.05)]
RARE = [(0.95, 0.0, 0.0), (0.95, 0.02, 0.0), (0.6, 0.1, 0.05)]


def covered(change, truth):
    found = accuracy_interval(change)
    assert (found.high > found.low).all() and (found.low >= -1).all() and (found.high <= 1).all()
    return np.mean((found.low <= truth + 1e-12) & (truth - 1e-12 <= found.high))


@pytest.mark.parametrize("n", [4, 8, 16, 32, 48, 100])
def test_the_interval_of_lost_accuracy_covers_as_often_as_it_says(n):
    """2,000 experiments each; where hardly an answer changes it errs to the wide side, as every honest one does."""
    rng = np.random.default_rng(n)
    for right, lost, gained in CHANGES + RARE:
        before = rng.random((2000, 1, n)) < right
        after = np.where(before, rng.random(before.shape) >= lost, rng.random(before.shape) < gained)
        share = covered(before * 1.0 - after, right * lost - (1 - right) * gained)
        wide = n < 32 or (right, lost, gained) in (*RARE, CHANGES[-1])
        assert 0.9 <= share <= (1.0 if wide else 0.97), (right, lost, gained)


@pytest.mark.parametrize(("n", "draws"), [(32, 20), (32, 100), (48, 20), (48, 100)])
def test_the_interval_of_random_sets_counts_examples_and_sets(n, draws):
    rng, shape = np.random.default_rng(draws), (2000, draws, n)
    few = rng.random((2000, 1, n)) < 0.05
    for hurt, strong, truth, most in (  # how easily an example is lost, how much a set does
        (rng.beta(2, 1, (2000, 1, n)), rng.beta(2, 2, (2000, draws, 1)), 2 / 3 * 0.5, 0.98),
        (np.full((2000, 1, n), 0.9), 0.1 + 0.8 * (rng.random((2000, draws, 1)) < 0.3), 0.9 * 0.34, 0.97),
        (rng.beta(0.5, 4, (2000, 1, n)), rng.beta(1, 3, (2000, draws, 1)), 0.5 / 4.5 * 0.25, 1.0),  # hardly any loss
        (0.6 * few, np.ones((2000, draws, 1)), 0.03, 1.0),  # one example in twenty, which may not be among these
    ):
        change = (rng.random(shape) < hurt * strong).astype(float)
        assert 0.9 <= covered(change, truth) <= most


def test_the_interval_of_lost_accuracy_is_never_empty_and_never_beyond_what_is_possible():
    none, all_lost = accuracy_interval(np.zeros((1, 4))), accuracy_interval(np.ones((3, 32)))
    assert none.low == -none.high and 0.3 < none.high < 0.6 and all_lost.high == 1 and 0.7 < all_lost.low < 1
    once = np.zeros((100, 32))
    once[3, 5] = 1  # 32 examples, however many sets: one answer that is lost once does not make it narrow
    assert accuracy_interval(once).high > accuracy_interval(np.zeros((100, 32))).high > 0.04
    wide, narrow = (accuracy_interval(np.tile([0.0, 1.0], (1, n))) for n in (8, 32))
    assert wide.mean == narrow.mean == 0.5 and wide.high - wide.low > 1.5 * (narrow.high - narrow.low)
    for bad in (np.zeros(4), np.full((1, 4), 1.5), np.full((1, 4), np.nan), np.zeros((1, 0))):
        with pytest.raises(ExperimentError, match="changes of accuracy"):
            accuracy_interval(bad)


def test_bootstrap_interval_is_seeded_ordered_and_keeps_the_other_axes():
    values = np.random.default_rng(0).random((30, 3, 4))
    a, b = bootstrap_interval(values, seed=5), bootstrap_interval(values, seed=5)
    assert a.mean.shape == a.low.shape == (3, 4)
    assert (a.low < a.mean).all() and (a.mean < a.high).all()
    assert np.array_equal(a.low, b.low)
    assert not np.array_equal(a.low, bootstrap_interval(values, seed=6).low)
    one = bootstrap_interval(values[:, 1, 2], seed=5)
    assert one.low == pytest.approx(a.low[1, 2], abs=1e-12)
    assert set(one.as_dict()) == {"mean", "low", "high"} and isinstance(one.as_dict()["low"], float)


def test_a_higher_level_gives_a_wider_interval():
    values = np.random.default_rng(0).random(40)
    narrow, wide = bootstrap_interval(values, 0.8), bootstrap_interval(values, 0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_resampling_in_chunks_draws_the_same_as_at_once(monkeypatch):
    values = np.random.default_rng(0).random((10, 2))
    whole = bootstrap_means(values, 50, seed=3)
    monkeypatch.setattr("mech.experiments.statistics._CHUNK", 70)
    assert bootstrap_means(values, 50, seed=3) == pytest.approx(whole, abs=1e-14)


def test_equal_values_give_an_interval_without_width():
    found = bootstrap_interval(np.full(20, 0.1))
    assert found.low <= found.mean <= found.high
    assert [found.low, found.mean, found.high] == pytest.approx([0.1] * 3, abs=1e-15)


def test_pairing_removes_what_both_runs_share():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 10, 50)
    a, b = difficulty + 1 + rng.normal(0, 0.1, 50), difficulty + rng.normal(0, 0.1, 50)
    paired = bootstrap_interval(a - b)
    assert 0.9 < paired.low < 1 < paired.high < 1.1  # unpaired it would be about +- 4


def test_proportion_interval_keeps_its_width_when_all_are_right():
    found = proportion_interval(np.ones(50))
    assert (found.mean, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(50 / (50 + 1.959964**2), abs=1e-6)  # Wilson's closed form at k = n


@pytest.mark.parametrize("over", ["examples", "sets", "both"])
def test_no_more_false_positives_than_promised(over):
    p = null_p_values(over)
    for alpha in (0.05, 0.2):
        assert (p <= alpha).mean() <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / len(p))


@pytest.mark.parametrize("over", ["examples", "sets"])
def test_null_p_values_are_not_needlessly_large(over):
    assert (null_p_values(over) <= 0.2).mean() >= 0.12


@pytest.mark.parametrize("over", ["examples", "sets", "both"])
def test_a_real_difference_is_found(over):
    rng = np.random.default_rng(0)
    random = (rng.random((24, 80)) < 0.05) * 1.0
    top = (rng.random(80) < 0.4) * 1.0
    found = permutation_test(top, random, over=over)
    assert found.p_value <= 0.04
    assert found.statistic == pytest.approx(top.mean() - random.mean())
    less = permutation_test(-top, random, over=over)  # one-sided: costing *less* is no evidence
    assert less.p_value > 0.95


def test_the_two_forms_answer_different_questions():
    # One lucky draw costs as much as the top set: examples cannot see that, sets can.
    rng = np.random.default_rng(0)
    top = rng.normal(1.0, 0.1, 100)
    random = np.concatenate([rng.normal(0.0, 0.1, (18, 100)), [top + 0.01]])
    assert permutation_test(top, random, over="examples").p_value < 0.001
    assert permutation_test(top, random, over="sets").p_value == pytest.approx(2 / 20)
    assert permutation_test(top, random, over="both").p_value == pytest.approx(2 / 20)


def test_few_draws_say_how_small_p_can_be():
    found = permutation_test(np.ones(30), np.zeros((9, 30)), over="sets")
    assert found.p_value == found.smallest_p == pytest.approx(0.1)


def test_few_examples_are_enumerated_exactly():
    found = permutation_test(np.array([1.0, 2, 3, 4]), np.zeros((3, 4)))
    assert found.p_value == found.smallest_p == 1 / 16
    # by hand: signed sums of (1, 2, -4) are at least -1 in five of eight cases: 7, 5, 3, 1, -1
    assert permutation_test(np.array([1.0, 2, -4]), np.zeros((1, 3))).p_value == 5 / 8


def test_ties_count_as_ties():
    # Averages of the same thirds in another order differ in the last bit.
    top = np.array([0.1, 0.2, 0.3] * 10)
    random = np.stack([np.roll(top, i) for i in range(7)])
    assert permutation_test(top, random, over="sets").p_value == 1.0
    assert permutation_test(top, np.stack([top] * 7), over="examples").p_value == 1.0
    assert permutation_test(np.zeros(40), np.zeros((5, 40)), over="both").p_value == 1.0


def test_sampled_flips_agree_with_enumerated_ones():
    difference = np.random.default_rng(3).normal(0.3, 1, 13)
    exact = permutation_test(difference, np.zeros((1, 13)), n_permutations=2**13).p_value
    sampled = permutation_test(difference, np.zeros((1, 13)), n_permutations=8000).p_value
    assert sampled == pytest.approx(exact, abs=0.02) and sampled != exact


def test_holm_known_values_and_family_wise_error():
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([[0.5], [0.9]])).shape == (2, 1)
    p = np.random.default_rng(0).random((2000, 10))
    assert np.mean([holm(row).min() <= 0.05 for row in p]) <= 0.065
    assert (holm(p[0]) >= p[0]).all() and len(holm(np.array([]))) == 0


def test_benjamini_hochberg_known_values():
    assert benjamini_hochberg(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    p = np.random.default_rng(0).random((4, 6))
    assert (benjamini_hochberg(p) <= holm(p) + 1e-12).all()
    assert benjamini_hochberg(p).shape == p.shape


def test_jaccard_null_is_the_average_over_random_sets():
    rng = np.random.default_rng(0)
    drawn = [jaccard(rng.choice(20, 5, replace=False), rng.choice(20, 8, replace=False)) for _ in range(4000)]
    assert jaccard_null(20, 5, 8) == pytest.approx(np.mean(drawn), abs=0.005)
    assert jaccard_null(7, 7, 7) == pytest.approx(1.0)


def test_overlap_p_value_known_values():
    assert overlap_p_value(10, 2, 2, 2) == pytest.approx(1 / 45)
    assert overlap_p_value(10, 2, 2, 0) == pytest.approx(1.0)


def test_spearman_against_scipy_with_ties_and_a_constant_map():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, (6, 4)), rng.random((6, 4))
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a.ravel(), b.ravel()).statistic)
    assert spearman(b, b) == 1.0
    assert np.isnan(spearman(np.ones((6, 4)), b))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval(np.ones(1)), "1 example\n"),
        (lambda: bootstrap_interval(np.array(3.0)), "one value"),
        (lambda: bootstrap_interval(np.array([1.0, np.nan])), "example 1 holds nan"),
        (lambda: bootstrap_interval(np.ones(3), level=95), "level=95"),
        (lambda: bootstrap_interval(np.ones(3), n_resamples=0), "n_resamples=0"),
        (lambda: two_way_bootstrap(np.ones((1, 9))), "at least two draws"),
        (lambda: proportion_interval(np.array([0.5, 1])), "not 0 or 1"),
        (lambda: permutation_test(np.ones(4), np.ones((4, 3))), "the draws on axis 0"),
        (lambda: permutation_test(np.ones(4), np.full((2, 4), np.nan)), "random holds nan"),
        (lambda: permutation_test(np.ones(4), np.ones((2, 4)), over="heads"), "over='heads'"),
        (lambda: permutation_test(np.ones(1), np.ones((2, 1))), "at least two examples"),
        (lambda: holm(np.array([0.5, np.nan])), "p-values that are nan"),
        (lambda: benjamini_hochberg(np.array([1.5])), "outside 0 to 1"),
        (lambda: jaccard([], []), "two empty sets"),
        (lambda: jaccard_null(5, 6, 1), "sets of 6 and 1 out of 5"),
        (lambda: overlap_p_value(10, 2, 2, 3), "3 shared"),
        (lambda: spearman(np.ones(3), np.ones(4)), "the same shape"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(call, message):
    with pytest.raises(ExperimentError) as error:
        call()
    assert message in str(error.value)
