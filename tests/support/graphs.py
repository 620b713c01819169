"""A stand-in for CUDA graphs on a CPU: kernels are recorded with the memory they use, and replayed without Python.

    with recording(record := Record()):
        out = step()
    record.replay()        # the same kernels, on the same memory; what came from Python is what it was

As a CUDA graph, a record knows nothing of the code that made it: a number that was read from a tensor, or a shape that
grew, would stay what it was. Whatever would wait for a card, or leave it, raises ``Waits``.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique2", "aten::is_nonzero")


class Waits(AssertionError):
    """An operation that a CUDA graph cannot hold."""


class Record(TorchDispatchMode):
    """Runs operations and keeps them, with the tensors they read and wrote."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name in _WAITING:
            raise Waits(func._schema.name)
        if func._schema.name in ("aten::_to_copy", "aten::copy_"):
            devices = {x.device for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor | torch.device)
                       for x in (x if isinstance(x, torch.Tensor) else torch.empty(0, device=x),)}  # fmt: skip
            if len(devices) > 1:
                raise Waits(f"{func._schema.name} between devices")
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self):
        """Run them again; what was made then lies where it lay."""
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        assert old.shape == new.shape
                        old.copy_(new)


class Graph:
    """``torch.cuda.CUDAGraph``."""

    def __init__(self):
        self.record = Record()
        self.replays = 0

    def replay(self):
        self.replays += 1
        self.record.replay()


@contextmanager
def capturing(graph, capture_error_mode="global"):
    """``torch.cuda.graph``."""
    with graph.record:
        yield


class Stream:
    """``torch.cuda.Stream``."""

    def wait_stream(self, other):
        pass


def stand_in(monkeypatch):
    """Put these in the place of CUDA's."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
