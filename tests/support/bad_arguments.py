"""What is wrong for each kind of argument: the material of the fuzz test, with the calls of ``right_calls``.

``WRONG`` maps a kind to a strategy of values that no argument of this kind may be.
"""

from typing import Any

import numpy as np
import torch
import xarray as xr
from hypothesis import strategies as st

import mech

NAN, INF = float("nan"), float("inf")


def values(*wrong: Any) -> st.SearchStrategy:
    """Some values as they are: hypothesis would show them by their repr, and copy none."""
    return st.sampled_from([lambda value=value: value for value in wrong]).map(lambda made: made())


WORDLIKE = values(None, 3, True, NAN, b"top", ["top", 3], {"top": 1}, object(), "", "<script>alert(1)</script>")
NO_NUMBER = values(None, "3", "", b"3", [], {}, object(), NAN, INF, -INF, True, False, 1j, np.array([1, 2]))
FRACTION = st.floats(allow_nan=True, allow_infinity=True).filter(lambda x: not x.is_integer())
OBJECTS = values(None, 3, 0.5, True, NAN, "", "a text", b"bytes", [], {}, object(), type, print, (1, 2))
WRONG: dict[str, st.SearchStrategy] = {
    "count": NO_NUMBER | FRACTION | st.integers(max_value=0) | values((1, 2), 1.0),
    "whole": NO_NUMBER | FRACTION | st.integers(max_value=-1) | values((1, 2), 1.0),
    "seed": NO_NUMBER | FRACTION | st.integers(max_value=-1) | values((0, 1), [0], 0.0),
    "positive": NO_NUMBER | st.floats(max_value=0, allow_nan=False) | values((1,), "0.5"),
    "int": NO_NUMBER | FRACTION | values((1, 2), 1.0),
    "number": NO_NUMBER | values((1,), "0.5"),
    "share": NO_NUMBER | st.floats(max_value=0) | st.floats(min_value=1) | values(0, 1, (0.5,)),
    "amount": NO_NUMBER | st.floats(max_value=0) | st.floats(min_value=1) | st.integers(max_value=0) | values((1,)),
    "flag": values(None, 1, 0, "True", "", [], NAN, object()),
    "flag or auto": values(None, 1, 0, "True", "", "always", ["auto"], NAN, object()),
    "word": WORDLIKE | st.text(max_size=8).map(lambda text: "no " + text),
    "words": WORDLIKE | values([], ["no such word"], "top", 3, [3], [None], {}, [["top"]]),
    "text": values(None, 3, True, NAN, b"text", ["text"], {}, object()),
    "texts": values(None, 3, "text", [3], [None], {}, object(), NAN),
    "function": values(3, "print", [], {}, True, NAN, object()),
    "model": OBJECTS,
    "sample": OBJECTS,
    "samples": OBJECTS | values([None], [3], ["a text"], [[]], object()),
    "inputs": OBJECTS,
    "several inputs": OBJECTS | values([None], [3], ["a text"]),
    "given": OBJECTS | values([None], [3], ["a text"], [[]]),
    "metric": OBJECTS | values("logit_diff", mech.LogitDiff, ["a"]),
    "ranking": OBJECTS | values([(1, 2)], {"heads": [[0, 0, 1.0]]}, "ranking.json", xr.Dataset()),
    "rankings": OBJECTS | values({"a": 3}, {"a": None}, [3], {3: 4}),
    "tasks": OBJECTS | values({"a": 3}, {"a": [3]}, {"a": None}, {3: []}),
    "sets": values(3, "image", NAN, {}, {"a": 3}, {"a": [(0.5, 1)]}, {"a": [(99, 0)]}, {"a": []}, {3: [(0, 1)]}),
    "places": values(3, NAN, {}, {"a": 0.5}, {"a": [True, 2]}, {"a": "nowhere"}, {"a": []}, {"a": None}),
    "where": values(1.5, NAN, None, {}, [], "", "nowhere", [1.5], [True, 2], ["0"], [10**6], [-(10**6)], b"",
            object(),
                    [True, False], np.zeros(3, dtype=bool), torch.tensor([0.5]), [None], [[0]], mech.Box),
    "heads": values(None, 3, NAN, "L1H2", [3], [(0.5, 1)], [(99, 0)], [(-1, 0)], [("a", "b")], {1: 2}, [(1, 2, 3)],
            [],
                    [(True, 2)], [None], np.ones((2, 2)), np.ones((1, 1), dtype=bool), object()),
    "layers": values(3, NAN, "01", [1.5], ["0"], [99], [-1], [], [True, 2], {1: 2}, [None], [True], object(), [[0]]),
    "path": values(3, NAN, [], {}, True, 1.5, object()),
    "dataset": OBJECTS | values(xr.Dataset(), xr.DataArray(np.zeros(2)), xr.Dataset({"a": 1}), {"effect": 1}),
    "numbers": values([], "12", None, 3, ["1"], [NAN], [INF], [None], [True], {}, [[]], object()),
    "amounts": values([], "12", None, 3, ["1"], [NAN], [INF], [0], [-1], [1.5], [True], [None], {}, object()),
    "grid": values((4,), (4, 4, 4), (0, 4), (4, -1), (1.5, 4), 4, "44", (10**5, 10**5), (NAN, 4), (True, 4), [],
            None),
    "regions": values(3, NAN, {}, [], {"a": 0.5}, ["nowhere"], [None], [1.5], object(), {"a": [True, 2]}),
    "evidence": OBJECTS.filter(lambda value: str(value) not in ("[]", "None")) | values([3], ["box"], [(0, 0, 1, 1)]),
    "pictures": values(3, NAN, "picture.png", [3], ["picture.png"], {}, [None], object(), True, [np.zeros((4, 4))]),
    "answers": values(None, 1.5, NAN, {}, [1.5], [None], b"yes", object(), True, [True]),
    "dtype": values(3, NAN, [], object(), "no dtype", 0.5),
    "device": values(3.5, NAN, [], object(), "no device"),
    "mask": values(None, 3, "mask", [[True]], np.zeros((2, 2)), np.zeros(4, dtype=bool), object(), NAN),
    "tensors": values(None, 3, [], {}, "ids", {"input_ids": 3}, {"input_ids": torch.zeros(3)}, object()),
    "array": values(None, 3, "scores", [[0.0]], {}, np.zeros(3), np.full((2, 2), NAN), object(), np.zeros((0, 0))),
    "columns": values(None, 3, "kind", [0], {}, object(), NAN),
    "settings": values(3, "settings", [], [1], object(), True),
    "hooks": values(3, "blocks.0.hook_mlp_out", [3], [("blocks.0.hook_mlp_out",)], [("blocks.0.hook_mlp_out", 3)],
                    [("blocks.0.hook_nothing", print)], [(None, print)], {}, None, object()),
    "points": values(3, "blocks.0.hook_nothing", ["blocks.0.hook_nothing"], [3], NAN, {}, object(), b"blocks", True),
    "specs": OBJECTS | values(mech.Ablate, "ablate", [], mech.Ablate(heads=[(99, 0)], to="zero")),
    "source": values(3, "run", [], {}, object(), NAN, True),
    "rows": values(None, 3, "image", [1.5], [None], [["a"]], object()),
    "pair of texts": values(None, 3, "ab", ("a",), ("a", 3), ("a", "b", "c"), {}, object()),
    "scores": values(None, 3, [], ["nonsense"], "nonsense", [3], {}, {"a": 3}, {"a": "ram"}, object(), True),
    "ends": values(None, 3, [], {}, ["L99H0"], ["nonsense"], "nonsense", [(99, 0)], [(0.5, 1)], [3], object(), NAN),
    "records": values(3, NAN, True, object(), [3], [None]),
    "layouts": values(None, 3, "layout", [], [3], object()),
}  # fmt: skip
WRONG["dims"] = WRONG["layers"].filter(lambda value: str(value) != "[99]")  # as many as the stream is wide
WRONG["head list"] = WRONG["heads"].filter(lambda value: str(value) not in ("[(99, 0)]", "[(-1, 0)]", "[(1, 2, 3)]"))
# May be left out with None, or with nothing in it.
OPTIONAL = {"?" + kind: strategy.filter(lambda value: value is not None) for kind, strategy in WRONG.items()}
EMPTY = {"*" + kind: strategy.filter(lambda value: value is not None and not _empty(value))
         for kind, strategy in WRONG.items()}  # fmt: skip


def _empty(value: Any) -> bool:
    return hasattr(value, "__len__") and len(value) == 0


def wrong(kind: str) -> st.SearchStrategy:
    """Values that an argument of this kind may not have; "?": None may be given, "*": and nothing, too."""
    return (WRONG | OPTIONAL | EMPTY)[kind]
