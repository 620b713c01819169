"""How sets of positions, layers or heads are read everywhere: as whole numbers, or as a boolean mask.

    indices("positions", layout.kind == 1)        # a mask means the places where it is True
    indices("layers", range(4, 9))                # (4, 5, 6, 7, 8)
    pairs("heads", ranking.mean > 0.1)            # a mask over (layer, head), or (layer, head) pairs

Masks may be numpy arrays, tensors, xarray arrays or lists. Anything else is refused: floats, which would be truncated,
strings, and bools among numbers, which would count as 0 and 1.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from mech.arguments import Reading, short
from mech.errors import ExperimentError, MechError


class Indices(tuple):
    """Indices, or (layer, head) pairs; ``of`` is the shape of the mask they were read from, if there was one."""

    of: tuple[int, ...] | None = None

    def check_mask(self, name: str, shape: tuple[int, ...], error: type[MechError] = ExperimentError) -> "Indices":
        """Return self; refuse a mask whose shape differs from that of what it chooses from."""
        if self.of not in (None, shape):
            raise error(
                f"{name} as a mask of {' x '.join(map(str, self.of or ()))}",
                f"a mask of {' x '.join(map(str, shape))}",
                "make the mask from what it selects from, or give whole numbers",
            )
        return self


def indices(name: str, given: Any, error: type[MechError] = ExperimentError) -> Indices:
    """The whole numbers given, or the places where a mask is True.

    Raises:
        MechError: anything else; ``error`` is its class.
    """
    if isinstance(given, Indices):
        return given
    array = _array(given)
    if array is None or array.ndim != 1:
        raise error(
            f"{name}={short(given)}",
            "whole numbers, or a mask of True and False",
            f"give {name}=[3], range(4, 9), or a boolean mask",
        )
    return _read(array)


def pairs(name: str, given: Any, error: type[MechError] = ExperimentError) -> Indices:
    """The (layer, head) pairs given, or those where a mask over (layer, head) is True.

    Raises:
        MechError: anything else; ``error`` is its class.
    """
    if isinstance(given, Indices):
        return given
    array = _array(given)
    if array is not None and array.shape == (0,):
        return Indices()
    if array is None or array.ndim != 2 or (array.dtype.kind != "b" and array.shape[1] != 2):
        raise error(
            f"{name}={short(given)}",
            "(layer, head) pairs of whole numbers, or a mask over (layer, head)",
            f"give {name}=[(3, 5)], or {name}=ranking.top(0.05)",
        )
    return _read(array)


# For signatures: `checked` reads the values before it passes them on.
Layers = Annotated[Sequence[int], Reading(indices, "whole numbers, or a mask")]
Pairs = Annotated[Sequence[tuple[int, int]], Reading(pairs, "(layer, head) pairs")]


def _read(array: np.ndarray) -> Indices:
    mask = array.dtype.kind == "b"
    indices = (np.argwhere(array) if array.ndim == 2 else np.flatnonzero(array)) if mask else array
    read = Indices(tuple(index) if isinstance(index, list) else index for index in indices.tolist())
    if mask:
        read.of = array.shape
    return read


def _array(given: Any) -> np.ndarray | None:
    """Whole numbers or bools as an array; None for everything else."""
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        return None
    if callable(getattr(given, "detach", None)):  # a tensor, on any device
        given = given.detach().cpu()  # type: ignore[attr-defined]
    elif not hasattr(given, "dtype"):
        given = list(given)
        flat = [index for row in given for index in (row if isinstance(row, list | tuple) else [row])]
        bools = [isinstance(index, bool | np.bool_) for index in flat]
        if any(bools) and not all(bools):
            return None
    try:
        array = np.asarray(given)
    except (TypeError, ValueError, RuntimeError):  # rows of different lengths, or a type that numpy does not know
        return None
    if not array.size and array.ndim == 1:
        return array.astype(int)
    return array if array.dtype.kind in "biu" else None
