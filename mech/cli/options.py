"""What the commands share: options, the samples they mean, progress, and tables.

Nothing heavy is imported before a command runs, so ``mech --help`` answers at once. Numbers, words and output paths are
checked by the options' callbacks while the command line is read: a mistake is reported before anything is loaded.
"""

import functools
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mech.errors import ExperimentError, OutputError, printable, suggestion

if TYPE_CHECKING:
    from mech.data.samples import Samples
    from mech.model import HookedMLLM


# The library's own words, which cannot be imported without torch; a test keeps them equal.
METHODS = ("mean", "zero", "resample", "uniform", "paper")
POSITIONS = ("all", "question", "last", "image", "text")
BANDS = ("top", "bottom", "middle", "random", "layer_matched")
CHOICES = ("ram", "bottom", "random", "vision", "causal", "gates", "reach", "dynamic", "layers")
DIRECTIONS = ("denoise", "noise")
ANSWERS = ("digit", "number", "name", "sentence")


def reference_names(incomplete: str) -> list[str]:
    """Tab completions for a model."""
    folders = sorted((Path(__file__).parents[1] / "reference" / "weights").glob("*/config.json"))
    return [name for folder in folders if (name := f"reference:{folder.parent.name}").startswith(incomplete)]


def domain_names(incomplete: str) -> list[str]:
    """Tab completions for a domain."""
    return [name for name in ("grounding", "documents", "pages", "video") if name.startswith(incomplete)]


def checked(check: Callable[[str, Any], None]) -> Any:
    """The callback of an option: ``check(name, value)`` refuses invalid values, one by one for a list."""

    def callback(context: typer.Context, param: typer.CallbackParam, value: Any) -> Any:
        if not context.resilient_parsing:  # tab completion runs on an unfinished line
            for item in value if isinstance(value, list) else [] if value is None else [value]:
                check(f"--{str(param.name).replace('_', '-')}", item)
        return value

    return callback


def whole(least: int, most: int | None = None) -> Any:
    """The callback of an option that is a whole number, at least ``least``."""

    def check(name: str, value: int) -> None:
        if value < least or (most is not None and value > most):
            wanted = f"at least {least}" if most is None or value < least else f"at most {most}"
            raise ExperimentError(f"{name} {value}", wanted, "leave it out for the default")

    return checked(check)


def among(words: Sequence[str]) -> Any:
    """The callback of an option that is one of some words."""

    def check(name: str, value: str) -> None:
        if value not in words:
            raise ExperimentError(f"{name} {value}", ", ".join(words), suggestion(value, words))

    return checked(check)


def samples(text: str, least: int) -> Any:
    """``--samples``, or ``--n`` as in Python."""
    return typer.Option("--samples", "--n", help=text, callback=whole(least))


def _check_size(name: str, value: float) -> None:
    if not (0 < value < 1 or (value >= 1 and value.is_integer())):
        wanted = "a share between 0 and 1, or a whole number of heads"
        raise ExperimentError(f"{name} {value:g}", wanted, "use 0.05 for a twentieth")


def _check_text(name: str, value: str) -> None:
    if not value.strip():
        raise ExperimentError(f"{name} {value!r}", "a name", "leave it out for the default")


def _check_model(name: str, value: str) -> None:
    _check_text(name, value)
    if value.startswith("reference:"):
        from mech.reference import shipped

        shipped(value.partition("@")[0])  # refused before anything heavy is imported


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ExperimentError(f"{name} {value:g}", "a share between 0 and 1", "use 0.1 for ten percentage points")


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ExperimentError(f"{name} {value:g}", "a number above 0", "leave it out for the default")


def written_to(*endings: str) -> Any:
    """The callback of an option that names a file to write, with one of these suffixes if any are given."""

    def check(name: str, path: Path) -> None:
        if endings and path.suffix not in endings:
            known = f"{', '.join(endings[:-1])} or {endings[-1]}"
            raise OutputError(f"{name} {path.name}", f"a name that ends in {known}", "choose one")
        folder = path.resolve().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK) or (path.exists() and not path.is_file()):
            raise OutputError(f"{path} cannot be written", "a file in a folder that exists", "choose another --out")

    return checked(check)


filled, size, share, positive = map(checked, (_check_text, _check_size, _check_share, _check_positive))
known_model = checked(_check_model)

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A reference model, a folder or a hub id.",
        autocompletion=reference_names,
        callback=known_model,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision",
        help="Branch, tag or commit of a hub id; training step of a reference model (step2300).",
        callback=filled,
    ),
]
PictureOrData = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="Save the result (.nc) or its picture (.html, .png, .pdf, .svg).",
        callback=written_to(".nc", ".html", ".png", ".pdf", ".svg"),
    ),
]
Written = Annotated[Path | None, typer.Option("--out", "-o", help="Write all numbers as JSON.", callback=written_to())]
Domain = Annotated[
    str | None,
    typer.Option(
        "--domain",
        "-d",
        help="grounding (default), documents, pages, video; or a domain of --data.",
        autocompletion=domain_names,
        callback=filled,
    ),
]


def domains(text: str) -> Any:
    """``--domain`` that may be given several times."""
    return typer.Option("--domain", "-d", help=text, autocompletion=domain_names, callback=filled)


Data = Annotated[
    str | None,
    typer.Option("--data", help="Your own samples (mine.jsonl), or a published set (refcocog:200).", callback=filled),
]
Root = Annotated[
    Path | None, typer.Option("--root", help="The folder with the images of --data, if they are not next to it.")
]
Seed = Annotated[int, typer.Option(help="Seed of samples and random sets.", callback=whole(0, 2**32 - 1))]
BatchSize = Annotated[int, typer.Option(help="Samples per forward.", callback=whole(1))]
NRandom = Annotated[
    int, typer.Option(help="Random sets of each size; p over sets is at least 1 / (1 + sets).", callback=whole(1))
]
AsJson = Annotated[bool, typer.Option("--json", help="Print only JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Do not show progress.")]


BARS: ContextVar[bool] = ContextVar("bars", default=True)  # whether progress is shown as bars, or else in one line


class progress:
    """A progress bar with the time left, on standard error; nothing when quiet."""

    def __init__(self, quiet: bool):
        quiet = quiet or not BARS.get()
        self.quiet, self.bar, self.tasks = quiet, None, {}

    def __enter__(self):
        if not self.quiet:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            name = TextColumn("{task.description}", markup=False)
            columns = name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.bar.start()
        return self

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.bar is not None:
            if what not in self.tasks:
                self.tasks[what] = self.bar.add_task(printable(what), total=total)
            self.bar.update(self.tasks[what], completed=done)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()


def open_model(model: str, revision: str | None) -> "HookedMLLM":
    """The model of ``--model`` at ``--revision``; with a revision its name is MODEL@REVISION."""
    from mech.scale import model_here

    return model_here(model if revision is None else f"{model}@{revision}")


@dataclass(frozen=True)
class Sampled:
    """The user's own samples, the seed, and what is printed."""

    data: Data = None
    root: Root = None
    seed: Seed = 0
    quiet: Quiet = False
    as_json: AsJson = False

    def opened(self, n: int) -> "Samples":
        """``n`` samples of each domain of ``--data``."""
        return opened(str(self.data), self.root, n, self.seed)

    def progress(self) -> progress:
        return progress(self.quiet or self.as_json)


@dataclass(frozen=True)
class Run(Sampled):
    """The options of most commands: a model, where samples come from, and what is printed."""

    model: Model = "reference:llava-s"
    revision: Revision = None

    def open_model(self) -> "HookedMLLM":
        return open_model(self.model, self.revision)

    def samples(self, domain: str | None, n: int) -> "tuple[Samples, str]":
        """The samples that the options ask for, at most ``n``, and their name."""
        return chosen(self.data, self.root, domain, n, self.seed)


FIRST = ("model", "revision", "domain")  # in every list of options
LAST = ("out", "seed", "quiet", "as_json")


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters are options or dataclasses of options, with plain options only, as typer needs it."""
    parameters = inspect.signature(function).parameters.values()
    groups: dict[str, Any] = {p.name: p.annotation for p in parameters if is_dataclass(p.annotation)}
    options: dict[str, inspect.Parameter] = {}
    for parameter in parameters:
        own = inspect.signature(groups[parameter.name]).parameters if parameter.name in groups else {}
        options |= own or {parameter.name: parameter}
    places = {name: place for place, name in enumerate((*FIRST, "", *LAST))}
    ordered = sorted(options.values(), key=lambda option: places.get(option.name, len(FIRST)))

    @functools.wraps(function)
    def run(**given: Any) -> None:
        made = {name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        function(**made, **given)

    keyword = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in ordered]
    run.__signature__ = inspect.Signature(keyword, return_annotation=None)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in keyword}
    return run


def chosen(data: str | None, root: Path | None, domain: str | None, n: int, seed: int) -> "tuple[Samples, str]":
    """The samples that the options ask for, at most ``n``, and their name.

    Raises:
        ExperimentError: ``data`` is neither a file nor a published set, or has no such domain.
    """
    import mech

    if data is None:
        if root is not None:
            raise ExperimentError("--root without --data", "--data with pictures in that folder", "add --data")
        return mech.haystacks(domain or "grounding", n, seed), domain or "grounding"
    samples = opened(data, root, n, seed)
    if domain is not None:
        known = samples.domains
        samples = samples.where(lambda sample: sample.domain == domain)
        if not len(samples):
            raise ExperimentError.unknown(f"domain of {data}", domain, known)
    return samples, domain or ", ".join(samples.domains)


def opened(data: str, root: Path | None, n: int, seed: int) -> "Samples":
    """``n`` samples of each domain of a JSON-lines file, or of a published set; ``refcocog:200`` says how many.

    Bad records of a published set are skipped and counted on standard error; bad lines of a file are refused.
    """
    import mech
    from mech.data.hub import names

    path, (name, _, count) = Path(data).expanduser(), data.partition(":")
    if path.suffix == ".jsonl" or path.exists():
        return mech.read_samples(path, root, n=n, seed=seed)
    if name not in names():
        raise ExperimentError(
            f"--data {data} is neither a file nor a published set", f"a .jsonl file, or one of {', '.join(names())}",
            suggestion(name, names()),
        )  # fmt: skip
    if count and not (count.isdigit() and int(count)):
        raise ExperimentError(f"--data {data}", "a number of samples after the colon", f"write {name}:200")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        samples = mech.hub_samples(name, int(count or n), seed, root=root, skip_bad=True)
    for warning in caught:
        if str(warning.message).startswith(f"{name}:"):
            print(f"mech: {printable(warning.message)}", file=sys.stderr)
    return samples


def save_or_draw(result: Any, target: Path | None) -> None:
    """Save a result, or its picture, as the path's suffix says."""
    import mech
    from mech.results import save

    if target is not None and target.suffix == ".nc":
        save(result, target)
    elif target is not None:
        mech.view(result).save(target)


def share_or_number(value: float) -> float:
    """A share of all heads; from 1 on, whole numbers are numbers of heads."""
    return int(value) if value >= 1 and value.is_integer() else value


def tell(*texts: str, sep: str = "\n") -> None:
    """Print texts that may contain text by others: names in a data set, words of a model."""
    print(*map(printable, texts), sep=sep)


def print_cautions(texts: list[str]) -> None:
    """Print what limits the numbers, before the numbers."""
    for text in texts:
        print(f"Caution. {text}")
    if texts:
        print()


def print_table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a table: with lines in a terminal, as aligned words elsewhere, where it is not cut to a terminal's width.

    Cells may contain text by others; it is not read as markup.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    title, columns = printable(title), tuple(map(printable, columns))
    rows = [tuple(map(printable, row)) for row in rows]
    if not console.is_terminal:
        widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        print(title)
        for row in (columns, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    table = Table(title=Text(title), title_justify="left")
    for column in columns:
        table.add_column(Text(column))
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
