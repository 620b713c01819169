"""What could have been detected: computed, and the same when samples are drawn and the study's own test is asked."""

import numpy as np
import pytest
from scipy import stats

from mech.experiments.power import detectable_loss, power
from mech.experiments.statistics import permutation_test


@pytest.mark.parametrize("n, loss, gained", [(24, 0.2, 0.0), (32, 0.15, 0.03), (100, 0.07, 0.01), (100, 0.1, 0.05)])
def test_power_is_how_often_the_studys_test_detects_a_loss(n, loss, gained):
    rng, trials = np.random.default_rng(0), 1500
    drawn = rng.choice([1.0, -1.0, 0.0], size=(trials, n), p=[loss + gained, gained, 1 - loss - 2 * gained])
    control = np.zeros((1, n))
    found = [
        permutation_test(one, control, n_permutations=2000, seed=i).p_value <= 0.05 for i, one in enumerate(drawn[:300])
    ]
    expected = power(loss, n, gained)
    assert np.mean(found) == pytest.approx(expected, abs=3.5 * (expected * (1 - expected) / 300) ** 0.5 + 0.01)
    # The same test in closed form, over all trials.
    lost, won = (drawn > 0).sum(1), (drawn < 0).sum(1)
    exact = stats.binom.sf(lost - 1, lost + won, 0.5) <= 0.05
    assert exact.mean() == pytest.approx(expected, abs=3.5 * (expected * (1 - expected) / trials) ** 0.5)


def test_a_detectable_loss_has_the_power_that_was_asked_for():
    for n, gained in ((16, 0.0), (32, 0.02), (100, 0.0), (100, 0.05)):
        least = detectable_loss(n, gained)
        assert power(least, n, gained) == pytest.approx(0.8, abs=0.01)
        assert power(least - 0.02, n, gained) < 0.8 < power(least + 0.02, n, gained)
    # Without gains it takes five lost answers, and the share of which that is expected in 80% is a beta quantile.
    assert detectable_loss(100) == pytest.approx(stats.beta.ppf(0.8, 5, 96), abs=2e-4)


def test_more_samples_detect_less_and_gained_answers_hide_losses():
    assert detectable_loss(32) > detectable_loss(100) > detectable_loss(1000)
    assert detectable_loss(100, 0.1) > detectable_loss(100, 0.02) > detectable_loss(100)
    assert np.isnan(detectable_loss(4)) and np.isnan(detectable_loss(100, 0.5))
    assert power(0.0, 100) == 0.0 and power(0.0, 100, gained=0.1) <= 0.05 and power(1.0, 5) == pytest.approx(1.0)
