"""Which measurements can be cut, and whether they are being cut right now.

    @per_sample(what="attention")
    def masses(model, samples, *, queries, batch_size, progress=None) -> xr.Dataset: ...

Called by itself, ``masses`` is the plain function. Inside ``mech.on_folder`` or ``mech.on_ray`` it is measured block by
block, and returns the same dataset.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import xarray as xr

from mech.axes import CONDITION
from mech.errors import ExperimentError
from mech.scale.packing import known

F = TypeVar("F", bound=Callable[..., xr.Dataset])


@dataclass(frozen=True)
class Measure:
    """A function of (model, samples, options) whose numbers belong to single samples.

    Attributes:
        name: ``module:name``.
        function: returns a dataset with the dimension ``example``.
        what: the measurement in a word, for people to read.
        over: a list option whose items are measured separately, along ``condition``.
        placed: whether it takes the index of its first sample among all (``first``), for seeds.
        beside: options that are lists with one entry for each sample.
        dim: the dimension of ``over``.
        whole: one piece of work, never cut.
    """

    name: str
    function: Callable[..., xr.Dataset]
    what: str
    over: str | None = None
    placed: bool = False
    beside: tuple[str, ...] = ()
    dim: str = CONDITION
    whole: bool = False


class Running(Protocol):
    """What cuts a measurement, and joins what comes back."""

    @property
    def computes(self) -> bool:
        """Whether this process computes too, and so needs weights."""
        ...

    def laid_out(self, name: str) -> Any:
        """A model without its weights."""
        ...

    def measure(self, measure: Measure, model: Any, samples: Any, options: dict[str, Any]) -> xr.Dataset: ...


_MEASURES: dict[str, Measure] = {}
_RUNNING: ContextVar[Running | None] = ContextVar("running", default=None)


def per_sample(
    what: str, *, over: str | None = None, beside: tuple[str, ...] = (), classes: tuple[type, ...] = ()
) -> Callable[[F], F]:
    """Mark a measurement as one whose samples can be measured separately.

    Its arguments are ``(model, samples, *, batch_size, progress=None, first=0, ...)``; ``first`` if its draws use it.

    Args:
        what: the measurement in a word, for people to read.
        over: an option whose items can be measured separately, too.
        beside: options with one entry for each sample.
        classes: frozen dataclasses that its options are made of.
    """

    def mark(function: F) -> F:
        placed = "first" in inspect.signature(function).parameters
        return _marked(Measure(_name(function), function, what, over, placed, beside), classes)

    return mark


def in_one_piece(what: str, *, classes: tuple[type, ...] = ()) -> Callable[[F], F]:
    """Mark a measurement that cannot be cut: it is one block, computed by one worker and stored once.

    Its arguments are ``(model, samples, **options)``, and it returns any dataset; ``progress``, if it has one, is not
    called from elsewhere. Meant for means over samples, searches and timings: work that does not grow with the samples
    of a study.

    Args:
        what: the measurement in a word, for people to read.
        classes: as in ``per_sample``.
    """

    def mark(function: F) -> F:
        return _marked(Measure(_name(function), function, what, whole=True), classes)

    return mark


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__}:{function.__qualname__}"


def _marked(measure: Measure, classes: tuple[type, ...]) -> Any:
    known(*classes)
    _MEASURES[measure.name] = measure

    @functools.wraps(measure.function)
    def call(model: Any, samples: Any, **options: Any) -> xr.Dataset:
        running = _RUNNING.get()
        if running is None:
            return measure.function(model, samples, **options)
        return running.measure(measure, model, samples, options)

    call.measure = measure  # type: ignore[attr-defined]
    return call


def import_all(modules: Iterable[str]) -> None:
    """Import modules with measurements that are not part of mech.

    Raises:
        ExperimentError: a module that Python does not find here.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ExperimentError(
                f"the module {module} cannot be imported ({error})", "a module that Python finds on every machine",
                "set PYTHONPATH",
            ) from error  # fmt: skip


def find_measure(name: str) -> Measure:
    """The measurement of a job. One outside mech must have been imported before: a file cannot name code to run.

    Raises:
        ExperimentError: there is none of this name.
    """
    module = name.partition(":")[0]
    if name not in _MEASURES and module.split(".")[0] == "mech":
        importlib.import_module(module)
    if name not in _MEASURES:
        raise ExperimentError(
            f"no measurement is called {name!r} here", "one of mech, or of a module that was imported",
            f"start the worker with --import {module}",
        )  # fmt: skip
    return _MEASURES[name]


def running() -> Running | None:
    """What cuts measurements now; None outside ``on_folder`` and ``on_ray``."""
    return _RUNNING.get()


@contextmanager
def run_by(one: Running | None) -> Iterator[None]:
    """Let ``one`` cut the measurements inside; with None they are not cut."""
    token = _RUNNING.set(one)
    try:
        yield
    finally:
        _RUNNING.reset(token)
