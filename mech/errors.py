"""The errors a user can cause, and how they are worded.

Every message says three things: what was given, what was expected, and one thing to do. Whatever can be checked before
a forward pass is. Nothing here knows about models, tensors or files.
"""

import difflib
import re
from collections.abc import Iterable
from typing import Self

LONGEST = 800  # most characters of the given value in a message
# Control characters except line breaks and tabs; those that reverse text; and lone surrogates, which cannot be printed.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """``text`` made safe for a terminal: control characters, which could rewrite the screen, are spelled out."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


class MechError(ValueError):
    """Something the user gave cannot be used. The message names it and says what to do.

    Names in it may come from other people's files, so the message is ``printable``.

    Args:
        given: what was given, as a statement ("no point is called 'blocks.0.hook_zz'").
        expected: what would have been right.
        do: one thing to do next, as an imperative.
    """

    def __init__(self, given: str, expected: str = "", do: str = ""):
        # The given value may be a whole file; its beginning and end are enough to recognise it.
        given = given if len(given) <= LONGEST else f"{given[: LONGEST // 2]} [...] {given[-LONGEST // 4 :]}"
        self.given, self.expected, self.do = given, expected, do
        parts = [given, expected and f"Expected: {expected}", do and f"Try: {do}"]
        super().__init__(printable("\n".join(part for part in parts if part)))

    @classmethod
    def unknown(cls, what: str, name: str, known: Iterable[str]) -> Self:
        """No ``what`` has this name; the known ones are listed, and the nearest is suggested."""
        known = list(known)
        return cls(f"no {what} is called {name!r}", ", ".join(known), suggestion(name, known))


class PointError(MechError):
    """An activation point that does not exist, is not live, or was given a value of the wrong shape."""


class InputError(MechError):
    """A question, image or video that the model cannot take."""


class RegionError(MechError):
    """A box, mask, frame or page that does not lie where it says, or covers no token."""


class UnsupportedModel(MechError):
    """An architecture, checkpoint or processor that cannot be opened."""


class ExperimentError(MechError):
    """Settings of an experiment that contradict each other or the model."""


class OutputError(MechError):
    """A folder or file that cannot be written or read."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """The nearest known names, as something to do: ``use 'hook_z'``; or the first few when none is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    if near:
        return "use " + " or ".join(repr(n) for n in near)
    shown = ", ".join(repr(n) for n in known[:6])
    return f"choose from {shown}{', ...' if len(known) > 6 else ''}"
