"""Several ways to compute the same result, as a table: the first that takes a call computes it.

    WAYS = (Way("flash", flash.takes, flash.missing, flash.local), Way("blocks", anything, nothing, blocks))
    z = first_of(WAYS, call, keys, near, out, dropout)

A way that would take the call but is missing on this machine, or fails there, is skipped, with one warning.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


class Fallback(UserWarning):
    """A faster kernel is missing here: the result is the same, but takes longer."""


@dataclass(frozen=True)
class Way:
    """One way to compute a call.

    Attributes:
        name: its name in messages.
        takes: whether it computes calls like this one.
        missing: what it lacks on this machine for a call that it takes; "" for nothing.
        run: computes the call.
    """

    name: str
    takes: Callable[..., bool]
    missing: Callable[..., str]
    run: Callable[..., Any]


_failed: dict[str, str] = {}  # name -> its message when it failed
_said: set[tuple[str, str]] = set()


def anything(*call: Any) -> bool:
    return True


def nothing(*call: Any) -> str:
    return ""


def first_of(ways: tuple[Way, ...], *call: Any) -> Any:
    """The result of the first way that takes a call and is not missing; the last way has to take every call.

    Warns (``Fallback``) once per way and reason.
    """
    for way in ways[:-1]:
        if not way.takes(*call):
            continue
        why = _failed.get(way.name) or way.missing(*call)
        if not why:
            try:
                return way.run(*call)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:  # a build or a GPU without the kernel says so
                why = _failed[way.name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
        say_once(way.name, why)
    return ways[-1].run(*call)


def say_once(name: str, why: str) -> None:
    """Warn about a way and a reason, the first time only."""
    if (name, why) not in _said:
        _said.add((name, why))
        warnings.warn(f"{name} is not used ({why}): a slower implementation computes the same", Fallback, stacklevel=3)
