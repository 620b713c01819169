"""``mech study``: the main job, from ranking the heads to the report."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from mech.cli import options
from mech.errors import ExperimentError, printable

EPILOG = (
    "[bold]mech study[/]  the reference models, every domain, about eleven minutes on two cores\n\n"
    "[bold]mech study -m reference:smol --out smol[/]  a pretrained language model, about forty minutes on one core\n\n"
    "[bold]mech study -m Qwen/Qwen3-VL-4B-Instruct --out qwen[/]  a model from the hub\n\n"
    "[bold]mech study -m Qwen/Qwen3-VL-4B-Instruct --data mine.jsonl[/]  on your own samples (docs/data.md)"
)


@dataclass(frozen=True)
class Models:
    """What is studied."""

    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="Repeatable, also as NAME@REVISION. Default: the reference models.",
            autocompletion=options.reference_names,
            callback=options.known_model,
        ),
    ] = None
    revision: Annotated[
        str | None,
        typer.Option(
            "--revision",
            help="Revision of a single --model; use NAME@REVISION if there are several.",
            callback=options.filled,
        ),
    ] = None
    domain: Annotated[list[str] | None, options.domains("Repeatable. Default: all that the model was trained on.")] = (
        None
    )

    def names(self) -> list[str] | None:
        """The models with their revision."""
        if self.revision is None:
            return self.model
        if self.model is None or len(self.model) != 1:
            given = f"--revision {self.revision} with {len(self.model or ())} models"
            raise ExperimentError(given, "one --model", "write each as NAME@REVISION")
        return [f"{self.model[0]}@{self.revision}"]


@dataclass(frozen=True)
class Sizes:
    """How much is measured; defaults depend on the models."""

    samples: Annotated[
        int | None,
        options.samples("Samples per domain: a quarter finds heads, the rest test them. Default: 132.", 8),
    ] = None
    n_random: Annotated[
        int | None,
        typer.Option(
            help="Random sets of the claimed size; p over sets is at least 1 / (1 + sets). Default: 25.",
            callback=options.whole(1),
        ),
    ] = None
    batch_size: Annotated[
        int | None, typer.Option(help="Samples per forward. Default: 16.", callback=options.whole(1))
    ] = None

    def given(self) -> dict[str, int]:
        """The settings of a study that were given."""
        sizes = {"n_random": self.n_random, "batch_size": self.batch_size}
        if self.samples is not None:
            n_find = max(2, self.samples // 4)
            sizes |= {"n_find": n_find, "n_test": self.samples - n_find}
        return {name: value for name, value in sizes.items() if value is not None}


def study(
    which: Models,
    sizes: Sizes,
    run: options.Sampled,
    out: Annotated[Path, typer.Option("--out", "-o", help="The study folder.")] = Path("study"),
) -> None:
    """Rank heads by RAM, test whether they are needed, write report.html. The same command resumes where it stopped."""
    from mech.results.store import read_json
    from mech.settings import default_domains, default_settings
    from mech.study import DEFAULT_MODELS
    from mech.study import study as studied

    named = which.names()
    models = named or DEFAULT_MODELS
    settings = replace(default_settings(models), seed=run.seed, **sizes.given())
    if run.data is not None and not named:
        raise ExperimentError(
            "--data without --model",
            "a model that can answer it",
            "name one: the default models know only the haystacks",
        )
    own = run.opened(settings.n_find + settings.n_test) if run.data is not None else None
    domains = which.domain or (default_domains(models) if run.data is None else None)
    with run.progress() as say:
        page = studied(out, models, domains, data=own, settings=settings, progress=say)
    summary = read_json(out / "summary.json")
    if run.as_json:
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
    console.print("\n[bold]Findings[/] (a setting is a model on a domain; the report has the numbers)")
    for finding in summary["headlines"]:
        mark = "[yellow]≠[/] " if finding["against_papers"] else "  "
        model = f"{finding['model']}: " if finding["model"] else ""
        console.print(Padding(mark + escape(printable(model + finding["text"])), (0, 0, 0, 2)), highlight=False)
    if any(finding["against_papers"] for finding in summary["headlines"]):
        scope = escape(printable(f"differs from {published('2606.05843')}; here {summary['scope']}"))
        console.print(
            f"\n  [yellow]≠[/] {scope}: not universal, which does not make it wrong for other models", highlight=False
        )
