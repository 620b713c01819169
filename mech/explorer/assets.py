"""What page and widget share: the files that a browser gets, and the packages of the extra ``mech[explore]``."""

from importlib.resources import files
from importlib.util import find_spec

from mech.errors import OutputError


def static(name: str) -> str:
    """A file of ``static/``: the script, its style, the empty page."""
    return files("mech.explorer").joinpath("static", name).read_text(encoding="utf-8")


def needs(*packages: str) -> None:
    """Refuse to continue without packages that only the explorer needs.

    Raises:
        OutputError: one of them is not installed.
    """
    if missing := [name for name in packages if find_spec(name) is None]:
        raise OutputError(
            f"the explorer without {' and '.join(missing)}", "the extra 'explore'", "pip install 'mech[explore]'"
        )
