"""The command line, one file per command: ``mech study``, ``rank``, ``ablate``, ``transfer``, ``patch``, ``paths``,
``accelerate``, ``sparsify``, ``explore``, ``claims``, ``check``, ``data``, ``view``, ``work``, ``status``. Shared
options are in ``options``; those of commands that can run on many machines are in ``scale``.

Nothing heavy is imported before a command runs, so ``mech --help`` answers at once. Errors that a user can fix are
printed without a traceback and end with exit code 2; Ctrl-C ends with 130 and leaves a study that can be resumed.
"""

import errno
import sys
from typing import Annotated

import typer

from mech.cli import ablate, accelerate, check, claims, data, explore, patching, rank, study, transfer, view
from mech.cli.options import command
from mech.cli.scale import status, work
from mech.cli.scale.spread import spread, with_bare_ray
from mech.errors import MechError, OutputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, a limit of the system
INTERRUPTED = 130  # a shell's exit code for a program that ended by Ctrl-C

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Mechanistic interpretability of multimodal LLMs: which attention heads fetch the visual evidence, "
    "and are they needed?",
    epilog="Exit codes: 0 done; 1 a check failed; 2 a mistake you can correct, with what to do; "
    "3 blocks failed, and the rest is done; 130 stopped by Ctrl-C (a study resumes when the same command is given "
    "again).",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"mech {version('mech')}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the command."""


for _command, _epilog in (
    (study.study, study.EPILOG),
    (rank.rank, rank.EPILOG),
    (ablate.ablate, ablate.EPILOG),
    (patching.patch, patching.PATCH),
    (patching.paths, patching.PATHS),
    (accelerate.accelerate, accelerate.EPILOG),
    (accelerate.sparsify, accelerate.SPARSIFY),
    (transfer.transfer, transfer.EPILOG),
    (explore.explore, explore.EPILOG),
    (view.view, view.EPILOG),
    (data.data, data.EPILOG),
    (claims.claims, claims.EPILOG),
    (check.check, check.EPILOG),
    (work.work, work.EPILOG),
    (status.status, status.EPILOG),
):
    _spreads = _command.__name__ in ("study", "rank", "ablate", "patch", "accelerate", "transfer")
    app.command(epilog=_epilog)(spread(command(_command)) if _spreads else command(_command))


def main() -> None:
    """Run the command line; errors that a user can fix are printed in three lines."""
    try:
        app(with_bare_ray(sys.argv[1:]))
    except MechError as error:
        print(f"mech: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))
    except OSError as error:
        if error.errno not in FULL:
            raise
        full = OutputError(
            f"{error.filename or 'a file'} cannot be written ({error.strerror})",
            "free space on the disk",
            "free some space",
        )
        print(f"mech: {full}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            print("\nmech: stopped. A study resumes when the same command is given again.", file=sys.stderr)
        raise
