"""How many rows are run at once: as many as fit into free memory, and half as many after memory runs out.

    room = Room.of(model)
    for part, found in fitting(room, cells, run):       # parts of `cells`, halved where torch runs out of memory
        ...

On a CPU they are few, so that what a layer computes for them stays in the caches. On a GPU they are as many as fit: a
layer's kernels are then launched once for all of them.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from mech.errors import ExperimentError
from mech.model.hooked import HookedMLLM

ROWS = 16384  # rows of the stream held at once on a CPU; a single variant may have more
CPU_ROWS = 2048  # rows in one call of a layer on a CPU
MOST_HELD, MOST_CALLED = 2**18, 2**15  # on a GPU: more rows per call make no kernel faster
LOGITS = 2**27  # logits held at once
_SHARE = 0.35  # of the free memory, for each of: held streams, and what a layer computes

Item = TypeVar("Item")
Found = TypeVar("Found")


class SmallerBatches(UserWarning):
    """Memory ran out: the result is the same, but takes longer."""


@dataclass(eq=False)
class Room:
    """How much may be run at once.

    Attributes:
        held: rows of the stream held in memory.
        called: rows in one call of a layer.
    """

    held: int
    called: int
    _said: bool = False

    @classmethod
    def of(cls, model: HookedMLLM) -> "Room":
        """The room for a model on its current devices."""
        if model.device.type != "cuda":
            return cls(ROWS, CPU_ROWS)
        free = min(_free(device) for device in {p.device for p in model.hf_model.parameters() if p.is_cuda})
        held, called = bytes_of_row(model)
        return cls(
            max(1, min(MOST_HELD, int(_SHARE * free) // held)), max(1, min(MOST_CALLED, int(_SHARE * free) // called))
        )

    def reserve(self, model: HookedMLLM, rows: int) -> None:
        """Allocate memory for ``rows`` rows once and return it to torch, which then serves growing batches from it.

        Otherwise every layer, whose batch is a little larger than the one before, asks the driver for new memory.
        """
        if model.device.type == "cuda":
            held, called = bytes_of_row(model)
            wanted = min(rows, self.held) * held + min(rows, self.called) * called
            wanted = min(wanted, int(2 * _SHARE * _free(model.device)))
            with suppress(torch.OutOfMemoryError):  # it is free, but not in one piece
                torch.empty(wanted, dtype=torch.uint8, device=model.device)

    def halve(self, count: int) -> None:
        """Halve the room, after ``count`` variants at once were too many.

        Warns (``SmallerBatches``) the first time.

        Raises:
            ExperimentError: it was a single variant.
        """
        if count < 2:
            raise too_large("a single variant of the run")
        self.held, self.called = max(1, self.held // 2), max(1, self.called // 2)
        if not self._said:
            self._said = True
            warnings.warn(
                "out of memory: the sweep continues in batches of half the size", SmallerBatches, stacklevel=4
            )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def too_large(what: str) -> ExperimentError:
    """The error for something that does not fit into memory even by itself."""
    return ExperimentError(
        f"{what} does not fit in memory", "room for one forward, and as much again",
        "use a shorter input, fewer rows or later positions, or a smaller dtype",
    )  # fmt: skip


def bytes_of_row(model: HookedMLLM) -> tuple[int, int]:
    """Bytes of a held row, and of a row that passes through a layer: an estimate of what is alive there at once."""
    cfg = model.cfg
    heads = max(cfg.n_heads * cfg.d_head, cfg.d_model)
    size = model.dtype.itemsize
    return 4 * cfg.d_model * size, (6 * cfg.d_model + 8 * heads + 3 * cfg.d_mlp) * size


def _free(device: torch.device) -> int:
    """Bytes that the driver has free, plus those that torch holds unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def fitting(
    room: Room, items: Sequence[Item], run: Callable[[Sequence[Item]], Found]
) -> Iterator[tuple[Sequence[Item], Found]]:
    """``run`` on all items, or, where memory runs out, on halves of them, and on halves of those.

    Raises:
        ExperimentError: one item by itself does not fit.
    """
    waiting: list[Sequence[Any]] = [items]
    while waiting:
        part = waiting.pop()
        try:
            found = run(part)
        except torch.OutOfMemoryError:
            found = None
        if found is None:  # after the handler: the error holds what was computed until it is dropped
            room.halve(len(part))
            waiting += [part[len(part) // 2 :], part[: len(part) // 2]]
        else:
            yield part, found
