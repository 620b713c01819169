"""Names of the version before: they work for one release, and warn."""

import warnings
from collections.abc import Mapping
from typing import Any


def renamed(old: str, new: str) -> None:
    """Warn that ``old`` is called ``new`` now. To be called by the function that the user calls."""
    warnings.warn(f"{old} is called {new} now; the old name goes with the next release", DeprecationWarning, 3)


def renamed_options(options: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Options under the names they have now; ``names`` maps those of the version before to them."""
    for old in names.keys() & options.keys():
        warnings.warn(f"{old}= is called {names[old]}= now; the old name goes with the next release",
                      DeprecationWarning, 4)  # fmt: skip
    return {names.get(name, name): value for name, value in options.items()}
