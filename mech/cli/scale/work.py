"""``mech work``: compute the blocks in a folder, for the driver that put them there."""

import sys
from typing import Annotated, Any

import typer

from mech.cli import options
from mech.errors import ExperimentError, printable

EPILOG = (
    "[bold]mech study --blocks /shared/blocks --elsewhere[/]  on one machine, and on any others\n\n"
    "[bold]mech work /shared/blocks[/]  as often as there are GPUs (docs/scale.md has a SLURM script)"
)


def work(
    folder: Annotated[str, typer.Argument(help="The folder of --blocks: a path, or a URL such as s3://bucket/blocks.")],
    device: Annotated[
        str | None, typer.Option(help="cuda:0, cpu. Default: a GPU if there is one.", callback=options.filled)
    ] = None,
    device_map: Annotated[
        str | None, typer.Option(help="auto: a model over several GPUs.", callback=options.filled)
    ] = None,
    idle: Annotated[
        float, typer.Option(help="Exit after this many seconds without work.", callback=options.positive)
    ] = 600.0,
    linger: Annotated[
        float,
        typer.Option(help="The same, once all drivers are done.", callback=options.positive),
    ] = 30.0,
    modules: Annotated[
        list[str] | None, typer.Option("--import", help="Modules with your own measurements; repeatable.")
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Compute blocks until no driver is left: start as many as you like, on any machine that sees the folder."""
    from mech.scale.measures import import_all
    from mech.scale.work import work as run

    import_all(modules or ())
    if device and device_map:
        raise ExperimentError("--device with --device-map", "one of the two", "leave one out")
    placement: dict[str, Any] = {"device": device} if device else {"device_map": device_map} if device_map else {}

    def say(outcome: Any, task: Any) -> None:
        if not quiet:
            n = len(task.block.ids)
            words = f"{task.block.what}{f', {n} samples' if n else ''}: {outcome.state} in {outcome.seconds:.1f} s"
            print(printable(words + (f" ({outcome.error})" if outcome.error else "")), file=sys.stderr)

    counts = run(folder, placement=placement, idle=idle, linger=linger, say=say)
    print(", ".join(f"{n} {how}" for how, n in counts.items()))
    if counts["failed"]:
        raise typer.Exit(3)
