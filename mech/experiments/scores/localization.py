"""Localization heads: heads that attend to the picture, and to few places in it (arXiv 2503.06287).

Three steps: keep the heads with a mean image mass above the elbow of the sorted curve; in each example rank them by the
spatial entropy of their attention; count how often a head is among the first. ``head_scores`` computes it under the
name ``localization``. It needs no evidence, so it is a control for scores that do.
"""

import numpy as np
from jaxtyping import Float
from scipy import ndimage

from mech.experiments.ranking.ranking import head_count
from mech.experiments.ranking.selection import elbow_count
from mech.inputs import TokenLayout

_BESIDE = np.zeros((3, 3, 3), dtype=bool)
_BESIDE[1] = True  # eight neighbours in the same picture, none across pictures


def spatial_entropy(attention: Float[np.ndarray, "head visual"], layout: TokenLayout) -> Float[np.ndarray, " head"]:
    """``- sum_c P(c) log P(c)`` over connected components c of the tokens above the mean; P is their attention share.

    Unit: nats. Sign: lower means fewer places. For each picture or frame, the whole view is one grid and the tiles are
    another.

    Args:
        attention: attention to the visual tokens, in the order of ``layout.positions("image")``.
    """
    visual = layout.positions("image")
    shown = layout.row[visual] >= 0
    at = visual[shown]
    pictures = np.stack([layout.image[at], layout.frame[at], layout.view[at] > 0])
    picture = np.unique(pictures, axis=1, return_inverse=True)[1].reshape(-1)
    cell = (picture, layout.row[at], layout.col[at])
    entropy = []
    for values in attention[:, shown]:
        grid = np.zeros([int(index.max()) + 1 for index in cell])
        grid[cell] = np.where(values >= values.mean(), values, 0)
        labels, count = ndimage.label(grid, _BESIDE)
        mass = ndimage.sum_labels(grid, labels, np.arange(1, count + 1))
        share = mass[mass > 0] / max(mass.sum(), 1e-30)
        entropy.append(float(-(share * np.log(share)).sum()))
    return np.array(entropy)


def localized(
    entropy: Float[np.ndarray, "example layer head"], mass: Float[np.ndarray, "example layer head"], top: int | float
) -> Float[np.ndarray, "example layer head"]:
    """1 for the ``top`` heads of lowest entropy in each example, among heads with mean mass above the elbow."""
    mean = mass.mean(axis=0).ravel()
    candidates = np.argsort(-mean, kind="stable")[: elbow_count(mean)]
    count = min(head_count(top, mean.size, "top"), len(candidates))
    flat = entropy.reshape(len(entropy), -1)
    chosen = np.zeros_like(flat)
    candidates = np.sort(candidates)  # equal entropies stay in (layer, head) order
    best = candidates[np.argsort(flat[:, candidates], axis=1, kind="stable")[:, :count]]
    np.put_along_axis(chosen, best, 1, axis=1)
    return chosen.reshape(entropy.shape)
