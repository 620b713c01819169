"""``mech view``: the picture of any saved result, without a model.

A netCDF file of a result, a study folder, or the JSON of a ranking or a circuit becomes a complete offline page, or a
figure for a paper.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from mech.cli import options
from mech.errors import MechError, OutputError

EPILOG = (
    "[bold]mech view study[/]  rebuilds the report of a study\n\n"
    "[bold]mech view study/llava-s/grounding/ablation.nc --out ablation.pdf --width 520[/]  for one column\n\n"
    "[bold]mech view grid.nc --on photo.png --out grid.png[/]  effects drawn over the picture"
)

DRAWN = (".html", ".htm", ".png", ".pdf", ".svg")


def view(
    file: Annotated[
        Path, typer.Argument(help="A .nc file, a study folder, or a ranking, a record of heads or a circuit (.json).")
    ],
    on: Annotated[
        list[Path] | None,
        typer.Option("--on", help="The picture to draw on; repeatable, in the order of the images."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help=".html, .png, .pdf or .svg. Default: a page next to the file.",
            callback=options.written_to(*DRAWN),
        ),
    ] = None,
    width: Annotated[
        int, typer.Option(help="Width of a figure, in CSS pixels.", callback=options.whole(200, 16_000))
    ] = 1000,
    scale: Annotated[float, typer.Option(help="PNG pixels per CSS pixel.", callback=options.positive)] = 2.0,
    title: Annotated[str | None, typer.Option(help="The title of the page.")] = None,
) -> None:
    """Draw a saved result: an offline page, or a figure for a paper. No model is needed."""
    if file.suffix in (*DRAWN, ".jpg", ".jpeg") and not file.is_dir():
        raise OutputError(
            f"{file} is a page or a picture, not a result", "a .nc file, a study folder, a ranking or circuit (.json)",
            "open it in a browser, or pass the file it was drawn from",
        )  # fmt: skip
    if not file.exists():
        raise OutputError(f"there is no file or folder {file}", "something that mech saved", "check the path")

    from mech import views
    from mech.files import read, write

    if file.is_dir():
        page = views.report(file)
        if out is not None:
            if out.suffix not in (".html", ".htm"):
                raise OutputError(
                    f"--out {out.name} for a whole study", "a name that ends in .html", "view one .nc file"
                )
            page = write(out, read(page))
        print(page)
        return
    target = out if out is not None else file.with_suffix(".html")
    named = {"title": title} if title else {}
    pictures = None if not on else on[0] if len(on) == 1 else list(on)
    try:
        drawn = views.view(_read(file), on=pictures, folder=None if on else file.parent, **named)
    except MechError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # not a result of mech
        raise OutputError(
            f"{file} cannot be drawn ({type(error).__name__}: {error})", "a result that mech saved", "save it again"
        ) from error
    print(drawn.save(target, width=width, scale=scale))


def _read(file: Path) -> Any:
    """What a file holds."""
    from mech.results.store import load, read_json

    if file.suffix != ".json":
        return load(file)
    try:
        record = read_json(file)
    except (OSError, ValueError) as error:
        raise OutputError(f"{file} cannot be read ({error})", "a file that mech wrote") from error
    if isinstance(record, dict) and "found" in record:
        from mech.experiments.paths.circuits import Circuit

        return Circuit.from_json(record)
    if isinstance(record, dict) and record.get("kind") == "heads":
        from mech.experiments.scores.record import HeadRecord

        return HeadRecord.from_json(record).dataset
    from mech.experiments.ranking.ranking import Ranking

    return Ranking.from_json(record if isinstance(record, dict) else {})
