"""The published formula from a box to visual tokens, and what it misses.

    iou, area = simulated_iou(5000)                 # [box]; overlap of its tokens with the right ones, and box sizes
    published_tokens(mask, cols)                    # the formula on one grid of patches

Qwen-VL towers merge 2 x 2 patches into a token, in rows of tokens: the patch in row r and column c of a grid W wide
belongs to token ``(r // 2) (W / 2) + c // 2``. The published code flattens the box's patches row by row and divides by
four: ``(r W + c) // 4``, which groups four patches of one row, and gives the token of another place.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

SIDES = (24, 64)  # patches per side of the random grids
SHARES = (0.1, 0.8)  # share of a side that a box takes


def right_tokens(patches: Bool[np.ndarray, "row col"]) -> Int[np.ndarray, " token"]:
    """The merged tokens that show a set of patches."""
    rows, cols = np.nonzero(patches)
    return np.unique(rows // 2 * (patches.shape[1] // 2) + cols // 2)


def published_tokens(patches: Bool[np.ndarray, "row col"]) -> Int[np.ndarray, " token"]:
    """The tokens that the published formula gives."""
    rows, cols = np.nonzero(patches)
    return np.unique((rows * patches.shape[1] + cols) // 4)


def simulated_iou(n: int = 5000, seed: int = 0) -> tuple[Float[np.ndarray, " box"], Float[np.ndarray, " box"]]:
    """Intersection over union of the two token sets for random boxes, and the share of the picture each box takes.

    Grids have an even number of ``SIDES`` patches on each side, boxes ``SHARES`` of each side, all uniform.
    """
    rng = np.random.default_rng(seed)
    iou, area = np.empty(n), np.empty(n)
    for i in range(n):
        sides = 2 * rng.integers(SIDES[0] // 2, SIDES[1] // 2 + 1, 2)
        size = np.maximum(1, np.round(rng.uniform(*SHARES, 2) * sides)).astype(int)
        row, col = (int(rng.integers(0, side - one + 1)) for side, one in zip(sides, size, strict=True))
        patches = np.zeros(sides, dtype=bool)
        patches[row : row + size[0], col : col + size[1]] = True
        right, given = right_tokens(patches), published_tokens(patches)
        shared = len(np.intersect1d(right, given, assume_unique=True))
        iou[i], area[i] = shared / (len(right) + len(given) - shared), patches.mean()
    return iou, area
