"""``mech study``: the main job, from ranking the heads to the report."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mech.cli import options
from mech.errors import ExperimentError, printable

EPILOG = (
    "[bold]mech study[/]  the reference models, every domain, about ten minutes on two cores\n\n"
    "[bold]mech study -m Qwen/Qwen3-VL-4B-Instruct --out qwen[/]  a model of the hub\n\n"
    "[bold]mech study -m Qwen/Qwen3-VL-4B-Instruct --data mine.jsonl[/]  on samples of your own (docs/data.md)"
)


def study(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="May be given again, also as NAME@REVISION. Default: the reference models.",
            autocompletion=options.reference_names,
            callback=options.filled,
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(
            "--revision", help="Of the one --model; NAME@REVISION where there are several.", callback=options.filled
        ),
    ] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            "--domain",
            "-d",
            help="May be given again. Default: all the model knows.",
            autocompletion=options.domain_names,
            callback=options.filled,
        ),
    ] = None,
    data: options.Data = None,
    root: options.Root = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The study folder.")] = Path("study"),
    samples: Annotated[int, options.samples("Samples of each domain: half find heads, half test them.", 8)] = 64,
    n_random: options.NRandom = 100,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 16,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Rank heads by RAM, test whether they are needed, write report.html. The same command goes on where it stopped."""
    from mech.results.store import read_json
    from mech.study import DEFAULT_MODELS, Settings
    from mech.study import study as run

    if revision is not None:
        if model is None or len(model) != 1:
            raise ExperimentError(
                f"--revision {revision} with {len(model or ())} models", "one --model", "write each as NAME@REVISION"
            )
        model = [f"{model[0]}@{revision}"]
    settings = Settings(
        n_find=samples // 2, n_test=samples - samples // 2, n_random=n_random, seed=seed, batch_size=batch_size
    )
    if data is not None and not model:
        raise ExperimentError(
            "--data without --model", "a model that can answer it", "name one: the default ones know the haystacks only"
        )
    own = options.opened(data, root, samples, seed) if data is not None else None
    with options.progress(quiet or as_json) as say:
        page = run(out, model or DEFAULT_MODELS, domain, data=own, settings=settings, progress=say)
    summary = read_json(out / "summary.json")
    if as_json:
        print(json.dumps(summary))
        return
    _print_findings(summary)
    print(f"\n{page}")


def _print_findings(summary: dict) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.padding import Padding

    console = Console()
    console.print(
        "\n[bold]Findings[/] (a setting is a model on a domain; the report has all of them with their numbers)"
    )
    for finding in summary["headlines"]:
        scope = escape(printable(f"differs from the paper (scope: {summary['scope']})"))
        mark = f"[yellow]{scope}:[/] " if finding["against_papers"] else ""
        model = f"{finding['model']}: " if finding["model"] else ""
        console.print(Padding(mark + escape(printable(model + finding["text"])), (0, 0, 0, 2)), highlight=False)
