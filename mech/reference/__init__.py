"""Small trained MLLMs in real architectures that ship with the package: ``from_pretrained("reference:llava-m")``.

They exist so that every experiment, test and page of the documentation can run on a model that really retrieves
visual evidence, without a hub. They are not meant for anything else. Each folder holds the weights (safetensors), the
processor and ``card.json``: data, curve, held-out accuracy, heads, seed, time. How they are made: ``recipe`` and
``train``.
"""

import json
from pathlib import Path
from typing import Any

from mech.errors import UnsupportedModel, suggestion

PREFIX = "reference:"
FOLDER = Path(__file__).parent / "weights"


def names() -> tuple[str, ...]:
    """The reference models that are installed."""
    return tuple(sorted(folder.name for folder in FOLDER.glob("*") if (folder / "card.json").exists()))


def path(name: str) -> Path:
    """The folder of a reference model, with or without the prefix ``reference:``.

    Raises:
        UnsupportedModel: no such model.
    """
    short = name.removeprefix(PREFIX)
    if short not in names():
        known = [PREFIX + known for known in names()]
        raise UnsupportedModel(
            f"there is no reference model {short!r}", ", ".join(known), suggestion(PREFIX + short, known)
        )
    return FOLDER / short


def card(name: str) -> dict[str, Any]:
    """What is known of a reference model: data, curve, accuracy, heads, seed, time."""
    return json.loads((path(name) / "card.json").read_text(encoding="utf-8"))
