"""Names of the previous version: they work for one release, and warn."""

import warnings
from collections.abc import Mapping
from typing import Any


def renamed(old: str, new: str) -> None:
    """Warn that ``old`` is now called ``new``. Call it directly in the function that the user calls."""
    warnings.warn(f"{old} is now called {new}; the next release removes the old name", DeprecationWarning, 3)


def renamed_options(options: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Options under their current names; ``names`` maps those of the previous version to them."""
    for old in names.keys() & options.keys():
        warnings.warn(f"{old}= is now called {names[old]}=; the next release removes the old name",
                      DeprecationWarning, 4)  # fmt: skip
    return {names.get(name, name): value for name, value in options.items()}
