"""``mech study``: the main job, from ranking the heads to the report."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mech.cli import options
from mech.errors import ExperimentError, printable

EPILOG = (
    "[bold]mech study[/]  the reference models, every domain, about eleven minutes on two cores\n\n"
    "[bold]mech study -m reference:smol --out smol[/]  a pretrained language model, half an hour of one core\n\n"
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
            callback=options.known_model,
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
    samples: Annotated[
        int | None,
        options.samples("Samples of each domain: a quarter finds heads, the others test them. Default: 132.", 8),
    ] = None,
    n_random: Annotated[
        int | None,
        typer.Option(
            help="Random sets of the size that is claimed; p over sets is 1 / (1 + sets) or more. Default: 25.",
            callback=options.whole(1),
        ),
    ] = None,
    seed: options.Seed = 0,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples per forward. Default: 16.", callback=options.whole(1))
    ] = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Rank heads by RAM, test whether they are needed, write report.html. The same command goes on where it stopped."""
    from dataclasses import replace

    from mech.results.store import read_json
    from mech.settings import default_domains, default_settings
    from mech.study import DEFAULT_MODELS
    from mech.study import study as run

    if revision is not None:
        if model is None or len(model) != 1:
            raise ExperimentError(
                f"--revision {revision} with {len(model or ())} models", "one --model", "write each as NAME@REVISION"
            )
        model = [f"{model[0]}@{revision}"]
    given = {"n_random": n_random, "batch_size": batch_size, "seed": seed}
    if samples is not None:
        given |= {"n_find": max(2, samples // 4), "n_test": samples - max(2, samples // 4)}
    models = model or DEFAULT_MODELS
    settings = replace(default_settings(models), **{name: value for name, value in given.items() if value is not None})
    if data is not None and not model:
        raise ExperimentError(
            "--data without --model", "a model that can answer it", "name one: the default ones know the haystacks only"
        )
    own = options.opened(data, root, settings.n_find + settings.n_test, seed) if data is not None else None
    domains = domain or (default_domains(models) if data is None else None)
    with options.progress(quiet or as_json) as say:
        page = run(out, models, domains, data=own, settings=settings, progress=say)
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

    from mech.experiments.findings.literature import published

    console = Console()
    console.print(f"\n{escape(summary['detectable']['text'])}", highlight=False)
    console.print(
        "\n[bold]Findings[/] (a setting is a model on a domain; the report has all of them with their numbers)"
    )
    for finding in summary["headlines"]:
        scope = escape(printable(f"differs from {published('2606.05843')}; here {summary['scope']}"))
        mark = f"[yellow]{scope}:[/] " if finding["against_papers"] else ""
        model = f"{finding['model']}: " if finding["model"] else ""
        console.print(Padding(mark + escape(printable(model + finding["text"])), (0, 0, 0, 2)), highlight=False)
