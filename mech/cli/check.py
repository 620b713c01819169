"""``mech check``: does mech run this model? Every law, tried on the checkpoint itself."""

import json
from typing import Annotated

import typer

from mech.cli import options
from mech.errors import ExperimentError

EPILOG = (
    "[bold]mech check Qwen/Qwen3-VL-4B-Instruct[/]  a model from the hub, a folder, or reference:llava-s\n\n"
    "[bold]mech check --all[/]  tiny random models of every family, offline"
)


def check(
    model: Annotated[str | None, typer.Argument(help="A reference model, a folder or a hub id.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Tiny random models of every family.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Check every layer, not just the first and last of each kind.")
    ] = False,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Does mech run this model? Parity, points, padding, generation and geometry; exits with 1 if anything fails.

    Without a model: lists the known families.
    """
    from mech.model import check as checking

    if every == (model is not None):
        if every:
            raise ExperimentError(f"{model} and --all", "one of the two", "leave one out")
        print(json.dumps(checking.family_rows()) if as_json else checking.family_table())
        return
    with options.progress(quiet or as_json) as say:
        if model is None:
            reports = list(checking.check_families(progress=say))
        else:
            reports = [checking.check(model, full=full, progress=say)]
    if as_json:
        print(json.dumps([report.to_json() for report in reports]))
    else:
        laws = tuple(reports[0].findings)
        rows = [(report.model, *(report.cell(law) for law in laws)) for report in reports]
        options.print_table("Deviations are relative to the largest logit", ("model", *laws), rows)
        options.tell(*(note for report in reports for note in report.notes()))
    if not all(report.ok for report in reports):
        raise typer.Exit(1)
