"""lmms-eval tasks as samples: the question, the pictures and the answer of each document.

    from lmms_eval.tasks import TaskManager, get_task_dict

    task = get_task_dict(["mmbench_en_dev"], TaskManager())["mmbench_en_dev"]
    samples = lmms_samples(task, n=200)
    located = lmms_samples(task, n=200, evidence=lambda doc: (Box(*doc["bbox"]),))      # evidence, for RAM

Nothing is imported from lmms-eval: any object with ``eval_docs``, ``doc_to_text``, ``doc_to_visual`` and
``doc_to_target`` will do. Documents that give a video or a sound as a path are refused.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from PIL import Image

from mech.arguments import Count, checking
from mech.data.regions import Region
from mech.data.samples import Sample, Samples
from mech.errors import InputError

PLACE = re.compile(r"<(image|video)(\s*\d+)?>\s*")  # where a prompt places its pictures; here templates place them


@checking(InputError)
def lmms_samples(
    task: Any, n: Count | None = None, *, evidence: Callable[[Any], Iterable[Region]] | None = None
) -> Samples:
    """The first ``n`` documents of a task, all of them if None.

    Args:
        task: an lmms-eval task.
        n: how many.
        evidence: gives the regions of a document that hold its answer, since tasks do not.

    Raises:
        InputError: not a task, or a document without a picture or without one answer.
    """
    return Samples(islice(each_sample(task, evidence), n))


def each_sample(task: Any, evidence: Callable[[Any], Iterable[Region]] | None = None) -> Iterator[Sample]:
    """The documents of a task one by one, for ``mech.scale.stream``; otherwise like ``lmms_samples``."""
    lacking = [
        name for name in ("eval_docs", "doc_to_text", "doc_to_visual", "doc_to_target") if not hasattr(task, name)
    ]
    if lacking:
        raise InputError(
            f"a {type(task).__name__} without {lacking[0]}", "a task of lmms-eval",
            "get_task_dict([name], TaskManager())[name]",
        )  # fmt: skip
    config = getattr(task, "config", None)
    name = str(getattr(config, "task", None) or getattr(task, "task_name", None) or type(task).__name__)
    for i, doc in enumerate(task.eval_docs):
        where = f"document {i} of {name}"
        yield Sample(
            PLACE.sub("", str(task.doc_to_text(doc))).strip(),
            _answer(task.doc_to_target(doc), where),
            images=_pictures(task.doc_to_visual(doc), where),
            evidence=tuple(evidence(doc)) if evidence is not None else (),
            domain=name,
            id=f"{name}/{i}",
        )


def _pictures(shown: Any, where: str) -> tuple[Image.Image, ...]:
    found = tuple(shown) if isinstance(shown, list | tuple) else (shown,)
    if not found or not all(isinstance(picture, Image.Image) for picture in found):
        kinds = ", ".join(sorted({type(value).__name__ for value in found})) or "nothing"
        raise InputError(f"{where} shows {kinds}", "pictures", "leave out tasks with videos or sound")
    return tuple(picture.convert("RGB") for picture in found)


def _answer(said: Any, where: str) -> str:
    """The answer; the first, if several count as right."""
    first = said[0] if isinstance(said, list | tuple) and said else said
    if not isinstance(first, str | int | float) or not str(first).strip():
        raise InputError(f"{where} has the answer {first!r}", "a string", "leave out tasks without one answer")
    return str(first)
