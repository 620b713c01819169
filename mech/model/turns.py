"""One thread at a time: hooks sit on modules that all threads share.

A run holds the model until it ends, a block of hooks (``hooks``, ``attending``, ``intervene``) until it closes. Other
threads' runs wait, so that each gets its own numbers; the same thread may nest blocks and runs to any depth. A thread
that keeps a block open without running while another waits is most likely waiting for that other one: after
``PATIENCE`` seconds the waiting thread is refused, so that the two do not deadlock.
"""

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

from mech.errors import ExperimentError

P = ParamSpec("P")
R = TypeVar("R")
PATIENCE = 30.0  # seconds that a thread waits for another that holds the model without running it


class Turns:
    """Which thread holds the model."""

    def __init__(self):
        self._changed = threading.Condition()
        self._owner: threading.Thread | None = None
        self._depth = self._runs = 0  # open blocks and runs, and open runs alone
        self._idle_since = 0.0

    def __reduce__(self):
        return Turns, ()  # no thread holds a copy of a model

    @contextmanager
    def taken(self, running: bool = False) -> Iterator[None]:
        """Hold the model for this thread alone; ``running`` if it is about to run, so that others wait for it.

        Raises:
            ExperimentError: another thread has held it without running it for ``PATIENCE`` seconds.
        """
        with self._changed:
            while self._owner not in (None, threading.current_thread()):
                self._wait()
            self._owner = threading.current_thread()
            self._depth += 1
            self._runs += running
            self._idle_since = time.monotonic()
        try:
            yield
        finally:
            with self._changed:  # perhaps in another thread: a generator is closed by whoever drops it
                self._depth -= 1
                self._runs -= running
                self._idle_since = time.monotonic()
                if not self._depth:
                    self._owner = None
                self._changed.notify_all()

    def _wait(self) -> None:
        left = PATIENCE - (time.monotonic() - self._idle_since)
        if self._runs:
            self._changed.wait()
        elif left > 0:
            self._changed.wait(left)
        else:
            assert self._owner is not None
            raise ExperimentError(
                f"the thread {self._owner.name!r} has kept hooks open for {PATIENCE:g} s without running the model, "
                f"and {threading.current_thread().name!r} wants to run it",
                "blocks of hooks that are closed before another thread runs: hooks hold for one thread only",
                "open them in the thread that runs, or give each thread its own model",
            )


def alone(function: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Make a function hold its model from beginning to end, because it touches the model's modules."""

    @functools.wraps(function)
    def call(model: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        with model.turns.taken():
            return function(model, *args, **kwargs)

    return call
