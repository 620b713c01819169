"""What the commands share: options, progress, tables, and the question whether a file can be written.

Nothing heavy is imported before a command runs, so ``mech --help`` answers at once.
"""

from pathlib import Path
from typing import Annotated

import typer

from mech.errors import OutputError

Model = Annotated[str, typer.Option("--model", "-m", help="A reference model, a folder or a hub id.")]
Domain = Annotated[str, typer.Option("--domain", "-d", help="grounding, documents, pages or video.")]
Seed = Annotated[int, typer.Option(help="Of samples and random sets.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


class progress:
    """A progress bar with the time left, on standard error; nothing when quiet."""

    def __init__(self, quiet: bool):
        self.quiet, self.bar, self.tasks = quiet, None, {}

    def __enter__(self):
        if not self.quiet:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.bar.start()
        return self

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.bar is not None:
            if what not in self.tasks:
                self.tasks[what] = self.bar.add_task(what, total=total)
            self.bar.update(self.tasks[what], completed=done)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()


def writable(path: Path) -> Path:
    """The path, if its folder is there and can be written: asked before the work, not after."""
    import os

    folder = path.resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or path.is_dir():
        raise OutputError(f"{path} cannot be written", "a file in a folder that exists", "choose another --out")
    return path


def print_table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A table with lines in a terminal, aligned words elsewhere: what is piped is not cut to a terminal's width."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        print(title)
        for row in (columns, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    console.print(table)
