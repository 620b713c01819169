"""Where memory runs out the batch is halved and the result is the same; where nothing fits, that is said."""

import pytest
import torch
from pairs import METRIC, pair

import mech
from mech.errors import ExperimentError
from mech.model import HookedMLLM
from mech.model.partial.continuation import Continuation
from mech.model.partial.room import Room, SmallerBatches, fitting
from mech.reference import tiny, tiny_processors


@pytest.fixture(scope="module")
def llava():
    return HookedMLLM.from_hf(tiny.model("llava").double(), tiny_processors.processor("llava"))


@pytest.fixture
def card(monkeypatch):
    """A layer on which no more than so many rows fit; counts what was tried."""
    state, layer = {"rows": 10**9, "most": 0}, Continuation._layer

    def limited(self, index, x, rows):
        if len(x) * len(rows) > state["rows"]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        state["most"] = max(state["most"], len(x) * len(rows))
        return layer(self, index, x, rows)

    monkeypatch.setattr(Continuation, "_layer", limited)
    return state


@pytest.mark.parametrize("positions", ["last", "question"])
def test_a_sweep_that_runs_out_of_memory_goes_on_in_halves_and_says_so_once(llava, card, positions):
    right = mech.activation_patching(llava, *pair(llava), METRIC, positions=positions)
    card["rows"] = card["most"] // 3
    done = []
    with pytest.warns(SmallerBatches) as said:
        found = mech.activation_patching(
            llava, *pair(llava), METRIC, positions=positions, progress=lambda n, total: done.append(n)
        )
    assert len(said) == 1
    assert found.algorithm == "wavefront" and done == [*range(1, found.effect.size + 1)]
    torch.testing.assert_close(torch.tensor(found.metric.values), torch.tensor(right.metric.values), atol=1e-6, rtol=0)


def test_paths_go_on_in_halves(llava, card):
    options = {"senders": [(0, 0), (0, 3), (1, 2)], "freeze": (), "method": "walk", "positions": "last"}
    right = mech.path_patching(llava, *pair(llava), METRIC, **options)
    card["rows"] = card["most"] // 2
    with pytest.warns(SmallerBatches):
        found = mech.path_patching(llava, *pair(llava), METRIC, **options)
    torch.testing.assert_close(torch.tensor(found.metric.values), torch.tensor(right.metric.values), atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore::mech.model.partial.room.SmallerBatches")
def test_a_single_variant_that_does_not_fit_is_an_error(llava, card):
    card["rows"] = 1
    with pytest.raises(ExperimentError, match="a single variant of the run does not fit in memory"):
        mech.activation_patching(llava, *pair(llava), METRIC, positions="question")


def test_a_forward_that_does_not_fit_is_an_error(llava, monkeypatch):
    monkeypatch.setattr(
        HookedMLLM, "forward", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory."))
    )
    with pytest.raises(ExperimentError, match=r"a forward of .* positions does not fit in memory"):
        mech.activation_patching(llava, *pair(llava), METRIC)


def test_items_are_done_once_and_in_order():
    room, tried = Room(64, 64), []

    def run(part):
        tried.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return [2 * item for item in part]

    with pytest.warns(SmallerBatches) as said:
        parts = list(fitting(room, list(range(10)), run))
    assert [item for part, _ in parts for item in part] == list(range(10))
    assert [value for _, found in parts for value in found] == list(range(0, 20, 2))
    assert len(said) == 1 and room.held == 64 // 2 ** (len(tried) - len(parts))


def test_on_a_card_batches_follow_the_memory_that_is_free(llava, monkeypatch):
    free = {"bytes": 2**30}
    monkeypatch.setattr(HookedMLLM, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["bytes"], 2**34))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**20)
    large = Room.of(llava)
    free["bytes"] //= 2**12
    small = Room.of(llava)
    assert 0 < small.called < large.called and 0 < small.held < large.held
