"""The options ``--ray``, ``--blocks``, ``--elsewhere``, ``--gpus-per-model`` and ``--threads``, for any command.

    app.command()(spread(rank))              # `mech rank --ray auto --blocks s3://bucket/rank`

Everything that the command measures over samples is then cut into blocks; its numbers and its output stay the same.
"""

import functools
import inspect
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from mech.cli import options
from mech.errors import ExperimentError

OPENING, A_LINE = "opening models and workers", 60.0  # seconds between two lines of a log
LOCAL = "local"  # what a bare --ray means: a cluster of this machine's cores and GPUs


def _check_gpus(name: str, value: float) -> None:
    if not (0 < value < 1 or (value >= 1 and float(value).is_integer())):
        raise ExperimentError(
            f"{name} {value:g}", "a share of one GPU, or a whole number of GPUs", "use 0.5, 1, 2, ..."
        )


Ray = Annotated[
    str | None,
    typer.Option(
        "--ray", metavar="[auto|ray://HOST:PORT]", callback=options.filled,
        help="Measure on a Ray cluster: one running here (auto), a remote one, or all cores and GPUs of this machine.",
    ),
]  # fmt: skip
Blocks = Annotated[
    str | None,
    typer.Option(
        "--blocks", callback=options.filled,
        help="Folder (or s3://...) for blocks, shared with `mech work`. Default with --ray: OUT/blocks, mech-blocks.",
    ),
]  # fmt: skip
Elsewhere = Annotated[bool, typer.Option("--elsewhere", help="Leave all blocks to `mech work` processes.")]
Gpus = Annotated[
    float | None,
    typer.Option("--gpus-per-model", help="With --ray: 0.5 puts two models on a GPU, 4 spreads one over four.",
                 callback=options.checked(_check_gpus)),
]  # fmt: skip
Threads = Annotated[int | None, typer.Option(help="CPU threads of each worker.", callback=options.whole(1))]
_OPTIONS: dict[str, tuple[Any, Any]] = {
    "ray": (Ray, None), "blocks": (Blocks, None), "elsewhere": (Elsewhere, False), "gpus_per_model": (Gpus, None),
    "threads": (Threads, None),
}  # fmt: skip


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command with these options added; if none of them is used, it runs unchanged."""

    @functools.wraps(command)
    def spread_out(**given: Any) -> None:
        own = {name: given.pop(name) for name in _OPTIONS}
        own["quiet"] = bool(given.get("quiet") or given.get("as_json"))
        if own["ray"] is None and own["blocks"] is None:
            _refuse_alone(own)
            command(**given)
            return
        own["folder"] = own.pop("blocks") or str(_default(command, given))
        with _running(**own):
            command(**given)

    signature = inspect.signature(command)
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [inspect.Parameter(name, keyword, default=default, annotation=kind)
             for name, (kind, default) in _OPTIONS.items()]  # fmt: skip
    spread_out.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *added])  # type: ignore[attr-defined]
    spread_out.__annotations__ = command.__annotations__ | {name: kind for name, (kind, _) in _OPTIONS.items()}
    return spread_out


def with_bare_ray(words: list[str]) -> list[str]:
    """The words of a command line, with what a bare ``--ray`` means written after it."""
    found = []
    for i, word in enumerate(words):
        found.append(word)
        if word == "--ray" and (i + 1 == len(words) or words[i + 1].startswith("-")):
            found.append(LOCAL)
    return found


def _refuse_alone(own: dict[str, Any]) -> None:
    for name, needs in (("elsewhere", "--blocks"), ("gpus_per_model", "--ray"), ("threads", "--ray or --blocks")):
        if own[name]:
            option = f"--{name.replace('_', '-')}"
            raise ExperimentError(f"{option} without {needs}", f"{needs} as well", f"add {needs}")


def _default(command: Callable[..., None], given: dict[str, Any]) -> Path:
    """Where blocks land by default: in the folder of a study, or else in their own folder."""
    return Path(given["out"], "blocks") if command.__name__ == "study" else Path("mech-blocks")


@contextmanager
def _running(
    ray: str | None, folder: str, elsewhere: bool, gpus_per_model: float | None, threads: int | None, quiet: bool
) -> Iterator[None]:
    """Measurements inside are cut; one line shows their progress, and a table at the end what they cost."""
    import mech

    if gpus_per_model is not None and ray is None:
        _refuse_alone({"elsewhere": False, "gpus_per_model": gpus_per_model, "threads": None})
    with _one_line(quiet, f"waiting for workers: mech work {folder}" if elsewhere else OPENING) as say:
        if ray is None:
            opened = mech.on_folder(folder, works=not elsewhere, threads=threads, say=say)
        elif elsewhere:
            raise ExperimentError("--elsewhere with --ray", "one of the two: Ray's workers measure", "leave one out")
        else:
            opened = mech.on_ray(ray, folder=folder, gpus_per_model=gpus_per_model, threads=threads, say=say)
        with opened as run:
            try:
                yield
            finally:
                if not quiet:
                    _print_costs(run)


@contextmanager
def _one_line(quiet: bool, first: str) -> Iterator[Callable[[Any], None]]:
    """A line on standard error with the overall progress, in place of the bars; in a log, one line a minute."""
    if quiet:
        yield lambda seen: None
        return
    from dataclasses import asdict

    from rich.console import Console
    from rich.markup import escape

    from mech.errors import printable
    from mech.scale.status import line

    console, token, last = Console(stderr=True), options.BARS.set(False), [0.0, ""]

    def written(seen: Any) -> None:
        if time.monotonic() - last[0] > A_LINE or seen.what != last[1]:
            last[:] = [time.monotonic(), seen.what]
            print(printable(line(asdict(seen))), file=sys.stderr, flush=True)

    try:
        if not console.is_terminal:
            print(printable(first), file=sys.stderr, flush=True)
            yield written
            return
        with console.status(escape(printable(first))) as shown:
            yield lambda seen: shown.update(escape(printable(line(asdict(seen)))))
    finally:
        options.BARS.reset(token)


def _print_costs(run: Any) -> None:
    from dataclasses import asdict

    from mech.scale.status import COSTS, cost_rows

    rows = cost_rows({what: asdict(cost) for what, cost in run.costs.items()})
    table = [COSTS, *rows] if rows else []
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), file=sys.stderr)
