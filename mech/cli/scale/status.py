"""``mech status``: how far the drivers of a folder are, what failed, and the costs so far."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mech.cli import options

EPILOG = "[bold]mech status study[/]  from another shell, while `mech study --ray` runs"


def status(
    folder: Annotated[str, typer.Argument(help="A study, or a folder of blocks (also s3://...).")],
    as_json: options.AsJson = False,
) -> None:
    """Say how far a study on other machines is: blocks, samples per second, time left, failures, costs."""
    from mech.results.study import BLOCKS
    from mech.scale.status import COSTS
    from mech.scale.status import status as read

    inner = Path(folder) / BLOCKS
    found = read(inner if inner.is_dir() else folder)
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        options.tell(str(found))
        if found.costs:
            options.print_table("Costs so far", COSTS, found.costs)
    if found.failed:
        raise typer.Exit(3)
