"""The loss of accuracy that a study can detect, computed from the number of samples before anything is found.

    detectable_loss(100)                  # 0.066: answers lost, none gained, 80% of the time
    detectable_loss(100, gained=0.03)     # 0.115: if some answers turn right, it takes a larger loss
    power(0.1, 100, gained=0.03)          # how often a loss of ten points would be detected

The test is the paired sign-flip test of a loss (``permutation_test``): answers that are right before and after, or
wrong both times, carry no information, and each of the others is a coin flip under the null. The result is exact for
one set of heads whose controls lose nothing; controls that lose something make the difference smaller, not the test
stronger.
"""

import numpy as np
from scipy import stats

from mech.arguments import Count, Share, checked

POWER = 0.8
ALPHA = 0.05
STEP = 1e-4  # of accuracy: the resolution of a detectable loss


@checked
def power(loss: float, n: Count, gained: float = 0.0, alpha: Share = ALPHA) -> float:
    """The probability that ``n`` samples detect a true loss of accuracy, by a one-sided sign-flip test.

    With ``m ~ Binomial(n, loss + 2 gained)`` answers that change, of which ``l ~ Binomial(m, (loss + gained) / (loss +
    2 gained))`` are lost, it is ``P(P(Binomial(m, 1/2) >= l) <= alpha)``. Unit of ``loss`` and ``gained``: share of
    answers; ``loss`` is the share lost minus the share gained.
    """
    changed = min(1.0, loss + 2 * gained)
    if changed <= 0:
        return 0.0
    m = np.arange(n + 1)
    # The smallest number lost with P(Binomial(m, 1/2) >= number) <= alpha; m + 1 where not even all of them are enough.
    needed = stats.binom.isf(alpha, m, 0.5).astype(int) + 1
    detected = stats.binom.sf(needed - 1, m, min(1.0, (loss + gained) / changed))
    return float(stats.binom.pmf(m, n, changed) @ detected)


@checked
def detectable_loss(n: Count, gained: float = 0.0, wanted: Share = POWER, alpha: Share = ALPHA) -> float:
    """The smallest true loss of accuracy that ``n`` samples detect with power ``wanted``; nan if there is none.

    ``gained`` is the share of answers that turn right, so ``loss + gained`` of all answers are lost. Unit: share of
    answers.
    """
    most = 1.0 - 2 * gained
    if most <= 0 or power(most, n, gained, alpha) < wanted:
        return float("nan")
    low, high = 0.0, most
    while high - low > STEP:
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, n, gained, alpha) >= wanted else (middle, high)
    return high
