"""Arguments are held against annotations: what fits passes unchanged, what does not is refused with three sentences."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from mech.arguments import NOT_EMPTY, Amount, Count, Seed, Share, checked, checking, fits, one_of, some_of, wanted
from mech.errors import ExperimentError, MechError, RegionError
from mech.indices import Layers, Pairs

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("hint", "right", "wrong"),
    [
        (int, [3, -1, np.int64(3)], [True, 1.0, "3", None, NAN, (1,), np.bool_(True), torch.tensor(3)]),
        (float, [3, 0.5, np.float32(1)], [True, NAN, INF, "3", None, [1.0], np.float64("nan"), 1j]),
        (bool, [True, np.bool_(False)], [1, 0, None, "True"]),
        (str, ["", "word"], [b"word", 3, None]),
        (Count, [1, 20], [0, -1, True, 1.5, NAN, INF, None]),
        (Seed, [0, 7], [-1, (0, 1), True, 0.0]),
        (Share, [0.05, 0.999], [0, 1, 1.5, NAN, -0.1, True]),
        (Amount, [1, 48, 0.05], [0, -1, 1.0, 0.0, 1.5, NAN, True, "5"]),
        (one_of(("top", "bottom")), ["top"], ["tops", None, 1, ["top"], b"top"]),
        (some_of(("top", "bottom")), [["top"], ("top", "bottom")], ["top", [], ["tops"], None, {"top": 1}]),
        (
            Sequence[int],
            [[1], (), range(3), np.arange(3), torch.arange(3)],
            ["12", [1.5], [True], {1: 2}, 3, np.array([0.5]), iter([1])],
        ),
        (Iterable[int], [[1], {1, 2}], ["12", {1: 2}, 3]),
        (tuple[int, int], [(4, 4), [4, 4]], [(4,), (4, 4, 4), (4, 4.0), 4, "44"]),
        (tuple[str, ...], [(), ("a",), ["a"]], ["a", ("a", 1)]),
        (Mapping[str, Sequence[int]], [{}, {"a": [1]}], [{"a": 1}, {1: [1]}, [("a", [1])], None]),
        (int | None, [None, 2], ["2", 2.0]),
        (Callable[[int], None], [print, lambda: None], [3, "print", None]),
        (np.ndarray, [np.zeros(2)], [[0, 0], None]),
    ],
    ids=lambda value: wanted(value) if not isinstance(value, list) else "",
)
def test_values_fit_their_annotation_or_do_not(hint, right, wrong):
    assert [value for value in right if not fits(value, hint)] == []
    assert [value for value in wrong if fits(value, hint)] == []
    assert wanted(hint)


@checked
def measure(samples: Sequence[str], *, n: Count = 20, band: one_of(("top", "random")) = "top", heads: Pairs = (),
            layers: Layers | None = None, **rest) -> dict:  # fmt: skip
    """What it was given."""
    return {"samples": samples, "n": n, "band": band, "heads": heads, "layers": layers, **rest}


def test_what_fits_passes_and_sets_are_read():
    given = ["a"]
    assert measure(given)["samples"] is given and measure.__doc__ == "What it was given."
    found = measure(["a"], n=3, heads=np.eye(2, dtype=bool), layers=[False, True], more=object)
    assert found["heads"] == ((0, 0), (1, 1)) and found["layers"] == (1,) and found["more"] is object
    assert measure(letter for letter in "ab")["samples"] == ["a", "b"] and measure([], layers=None)["layers"] is None


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: measure(["a"], n=NAN), "n=nan in measure\nExpected: a whole number of at least 1\nTry: leave n out"),
        (lambda: measure(["a"], band="tpo"), "band='tpo' in measure\nExpected: 'top' or 'random'\nTry: use 'top'"),
        (lambda: measure("ab"), r"samples=.ab. in measure\nExpected: a list, each a string\nTry: pass samples=\[...\]"),
        (lambda: measure(3), "Expected: a list, each a string\nTry: see help"),
        (lambda: measure(["a"], n=[1, 2]), "Expected: a whole number of at least 1\nTry: call it once for each"),
        (lambda: measure([(0, 1)]), "samples=(.|\n)*Try: pass it by name: heads=..."),
        (lambda: measure(["a"], heads=[(0.5, 1)]), r"heads=\[\(0.5, 1\)\]\nExpected: \(layer, head\) pairs"),
        (lambda: measure(["a"], layers=["0"]), r"layers=\['0'\]\nExpected: whole numbers"),
        (
            lambda: measure(),
            r"measure: missing a required argument: 'samples'\nExpected: measure\(samples, n(.|\n)*Try: pass samples=",
        ),
        (lambda: measure(["a"], 5), "measure: too many positional arguments"),
    ],
)
def test_what_does_not_fit_is_refused_in_three_sentences(call, says):
    with pytest.raises(ExperimentError, match=says):
        call()


def test_classes_are_checked_where_they_are_made_and_misspelt_names_get_a_suggestion():
    @checking(RegionError)
    @dataclass(frozen=True)
    class Corner:
        left: float
        names: "tuple[str, ...] | None" = None

        @checked
        def moved(self, *by: int) -> float:
            return self.left + sum(by)

    assert Corner(3).moved(1, 2) == 6 and Corner(3) == Corner(left=3)
    with pytest.raises(RegionError, match=r"left='3' in (.|\n)*Corner"):
        Corner("3")
    with pytest.raises(RegionError, match=r"unexpected keyword argument 'lefft'(.|\n)*use 'left'"):
        Corner(lefft=3)
    with pytest.raises(ExperimentError, match=r"by=1.5 in (.|\n)*moved"):
        Corner(3).moved(1, 1.5)


def test_a_value_that_cannot_be_shown_is_refused_all_the_same():
    class Broken:
        def __repr__(self):
            raise RuntimeError("no words")

    with pytest.raises(MechError, match="Broken"):
        measure(Broken())


def test_not_empty_is_part_of_what_is_wanted():
    assert wanted(some_of(("a", "b"))) == "a list, each 'a' or 'b', at least one" and NOT_EMPTY.holds("a")
