"""A set of positions, layers or heads: whole numbers and masks are read, everything else is refused."""

import numpy as np
import pytest
import torch
import xarray as xr

from mech.errors import ExperimentError, RegionError
from mech.indices import indices, pairs

MASK = [False, True, False, True]
MAP = [[True, False, False], [False, False, True]]


@pytest.mark.parametrize("made", [list, tuple, np.array, torch.tensor, xr.DataArray], ids=lambda f: f.__name__)
def test_a_mask_means_the_places_where_it_is_true(made):
    assert indices("layers", made(MASK)) == (1, 3) and indices("layers", made(MASK)).of == (4,)
    assert pairs("heads", made(MAP)) == ((0, 0), (1, 2)) and pairs("heads", made(MAP)).of == (2, 3)
    assert indices("layers", made([3, 1])) == (3, 1) and indices("layers", made([3, 1])).of is None
    assert pairs("heads", made([[4, 2]])) == ((4, 2),)


def test_other_lists_of_whole_numbers_are_read_as_they_are():
    assert indices("layers", range(2, 5)) == (2, 3, 4) and indices("layers", {7}) == (7,)
    assert indices("layers", (i for i in (1, 2))) == (1, 2) and indices("layers", [np.int64(3), torch.tensor(4)]) == (
        3,
        4,
    )
    assert indices("layers", ()) == pairs("heads", []) == ()
    assert all(type(one) is int for one in indices("layers", np.arange(3)))
    read = pairs("heads", zip((1, 2), (3, 4), strict=True))
    assert read == ((1, 3), (2, 4)) and pairs("heads", read) is read


@pytest.mark.parametrize(
    "given",
    [1.5, [1.5], [1.0], ["0"], "01", b"01", None, [None], [True, 3], [[1, 2]], {1: 2}, [object()], torch.tensor(3), 3,
     torch.tensor([1.0], dtype=torch.bfloat16), [[1], [2, 3]], float("nan")],
    ids=lambda given: type(given).__name__,
)  # fmt: skip
def test_what_is_no_index_is_refused(given):
    with pytest.raises(RegionError, match=r"layers=(.|\n)*whole numbers, or a mask(.|\n)*give layers"):
        indices("layers", given, RegionError)


@pytest.mark.parametrize(
    "given", [[(0.5, 1)], [(1, 2, 3)], [(1,)], [3, 5], "L3H5", ["35"], [(True, 3)], None, {3: 5}, [()]]
)
def test_what_is_no_head_is_refused(given):
    with pytest.raises(ExperimentError, match=r"heads=(.|\n)*\(layer, head\) pairs(.|\n)*give heads"):
        pairs("heads", given)


def test_a_mask_of_another_shape_is_refused():
    indices("layers", MASK).check_mask("layers", (4,))
    indices("layers", [9]).check_mask("layers", (4,))
    with pytest.raises(ExperimentError, match=r"layers as a mask of 4\nExpected: a mask of 6"):
        indices("layers", MASK).check_mask("layers", (6,))
    with pytest.raises(RegionError, match="a mask of 2 x 3\nExpected: a mask of 6 x 8"):
        pairs("heads", MAP).check_mask("heads", (6, 8), RegionError)
