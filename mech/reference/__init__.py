"""Small trained MLLMs in real architectures that ship with the package: ``from_pretrained("reference:llava-m")``.

    >>> names()
    ('llava-m', 'llava-s', 'llava-s-seed1', 'llava-s-sparse', 'qwen-long', 'qwen-long-sparse', 'qwen-s', 'smol')
    >>> revisions("llava-s-seed1")       # how it was while it learned: from_pretrained(..., revision="step2300")
    ('step2200', 'step2300', 'step2500')

They exist so that every experiment, test and page of the documentation can run on a model that really retrieves
visual evidence, without a hub. They are not meant for anything else. There are two sizes and two families; a second
seed of one of them, with checkpoints of its training; and one that reads a few thousand visual tokens. Each folder
holds the weights (safetensors), the processor and ``card.json``: data, curve, held-out accuracy, heads, seed, time.
They are made by ``recipe`` and ``train``.

``smol`` is different: a pretrained language model (SmolLM2-135M-Instruct, from the extra ``mech[smol]``) that was given
a vision stack here. Only the vision stack and the adapter ship; the whole is assembled when it is first opened. Its one
revision, ``"base"``, is the language model before tuning, with the same vision stack. See ``smol.assembly``.

``llava-s-sparse`` is ``llava-s`` trained further, with a penalty on attention outside sinks and a window, and
``qwen-long-sparse`` is ``qwen-long`` trained to need a single dense key/value head; only the layers that changed ship.
``Policy.from_json(card("llava-s-sparse")["policy"])`` keeps dense the fewest heads that it needs; what training did to
them, and to other seeds, is in ``sparsity_runs()``.
"""

import json
from pathlib import Path
from typing import Any

from mech.errors import UnsupportedModel, suggestion

PREFIX = "reference:"
FOLDER = Path(__file__).parent / "weights"
CHANGED = "changed.safetensors"  # the weights that differ, if a model is another one trained further


def names() -> tuple[str, ...]:
    """The reference models that are installed."""
    return tuple(sorted(folder.name for folder in FOLDER.glob("*") if (folder / "card.json").exists()))


def path(name: str) -> Path:
    """The folder to open for a reference model, with or without the prefix ``reference:``.

    Where only changed weights ship, it is the folder of the model that was trained further; ``smol`` is assembled if
    need be.

    Raises:
        UnsupportedModel: no such model, or the package that it needs is not installed.
    """
    folder = shipped(name)
    if changed(name) is not None:
        return path(card(name)["start"])
    if not _needs_base(folder):
        return folder
    from mech.reference.smol.assembly import assembled

    return assembled(folder)


def shipped(name: str) -> Path:
    """The folder of a reference model in the package.

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


def _needs_base(folder: Path) -> bool:
    return (folder / "adapter.safetensors").exists()


def revisions(name: str) -> tuple[str, ...]:
    """The training checkpoints that ship with a reference model, in order; most have none."""
    folder = shipped(name)
    if _needs_base(folder):
        return ("base",)
    return tuple(sorted((file.stem for file in folder.glob("step*.safetensors")), key=lambda step: int(step[4:])))


def checkpoint(name: str, revision: str) -> Path:
    """The weights of a revision of a reference model: those that differ from the final ones.

    Raises:
        UnsupportedModel: no such model or revision.
    """
    known = revisions(name)
    if revision not in known:
        raise UnsupportedModel(
            f"{name!r} has no revision {revision!r}",
            ", ".join(known) if known else "no revision: it ships without checkpoints of its training",
            suggestion(revision, known) if known else "leave revision out",
        )
    return path(name) / f"{revision}.safetensors"


def changed(name: str) -> Path | None:
    """The weights in which a reference model differs from the one whose folder it opens with; None for most.

    Raises:
        UnsupportedModel: no such model.
    """
    file = shipped(name) / CHANGED
    return file if file.exists() else None


def card(name: str) -> dict[str, Any]:
    """What is known about a reference model: data, curve, accuracy, heads, seed, time."""
    return json.loads((shipped(name) / "card.json").read_text(encoding="utf-8"))


def sparsity_runs() -> dict[str, dict[str, Any]]:
    """Measurements of models that were trained for sparsity, by run: see ``mech.sparse.training.compared``."""
    return _sparsity()["runs"]


def sparsity_served() -> dict[str, dict[str, Any]]:
    """How models do with few dense heads, by name: ``speed``, ``trials`` of ``sparsify``, ``rankings`` to compare."""
    return _sparsity()["served"]


def _sparsity() -> dict[str, Any]:
    return json.loads((FOLDER.parent / "sparsity.json").read_text(encoding="utf-8"))
