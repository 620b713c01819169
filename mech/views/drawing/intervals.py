"""The intervals in pictures, over examples: Wilson's for shares of right answers, a bootstrap for everything else."""

import numpy as np
from jaxtyping import Float

from mech.experiments.effects import share


def accuracy_interval(
    right: Float[np.ndarray, "example *rest"],
) -> tuple[Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"]]:
    """Share of right answers over the first axis with its 95% interval, as in every table; nan: not measured."""
    columns = right.reshape(len(right), -1).T
    intervals = [share(column[None, ~np.isnan(column)]) or {} for column in columns]
    mean, low, high = (np.array([interval[name] for interval in intervals]) for name in ("mean", "low", "high"))
    return tuple(part.reshape(right.shape[1:]) for part in (mean, low, high))  # type: ignore[return-value]


def mean_interval(
    values: Float[np.ndarray, "example *rest"], seed: int = 0
) -> tuple[Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"]]:
    """Mean over the first axis with its 95% percentile bootstrap interval (1,000 resamples, seeded); nan: no value."""
    asked, known, n = ~np.isnan(values), np.nan_to_num(values), len(values)

    def mean_of(weights: Float[np.ndarray, "draw example"]) -> Float[np.ndarray, "draw *rest"]:
        count = np.tensordot(weights, asked.astype(float), axes=1)
        return np.tensordot(weights, known, axes=1) / np.where(count > 0, count, np.nan)

    mean = mean_of(np.ones((1, n)))[0]
    if n < 2:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    # The weights are how often each sample is drawn: one matrix product instead of a thousand copies.
    means = mean_of(np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=1000) / n)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return mean, low, high
