"""``mech claims``: which published statements about retrieval heads hold on this model."""

import json
from typing import Annotated

import typer

from mech.cli import options
from mech.errors import ExperimentError

EPILOG = (
    "[bold]mech claims -m reference:qwen-s -d video[/]\n\n"
    "[bold]mech claims --only low-ranked --only queries[/]  some of them\n\n"
    "[bold]mech claims -m reference:smol -d documents --answer number --only phases[/]  answers of several tokens"
)


def claims(
    run: options.Run,
    domain: options.Domain = None,
    only: Annotated[list[str] | None, typer.Option(help="A point, by name; repeatable. Default: all.")] = None,
    answer: Annotated[
        str,
        typer.Option(
            help="What haystacks ask for: digit (one token), number, name or sentence.",
            callback=options.among(options.ANSWERS),
        ),
    ] = "digit",
    samples: Annotated[int, options.samples("Half find the heads, half test them.", 8)] = 48,
    n_random: options.NRandom = 20,
    out: options.Written = None,
) -> None:
    """Measure what the papers on retrieval heads claim or leave open: nine points and three disputes, in sentences."""
    import mech
    from mech.papers import KNOWN
    from mech.results import write_json

    for name in only or ():
        if name not in KNOWN:
            raise ExperimentError.unknown("point", name, KNOWN)
    used, where = run.samples(domain, samples)
    if answer != "digit":
        if run.data is not None:
            raise ExperimentError(
                f"--answer {answer} with --data", "the answers that --data holds", "leave --answer out"
            )
        used = mech.haystacks(domain or "grounding", samples, run.seed, answer=answer)
    hooked = run.open_model()
    with run.progress() as say:
        result = mech.published_claims(
            hooked, used, only, n_random=n_random, seed=run.seed, progress=lambda i, n: say("points", i, n)
        )
    if out is not None:
        write_json(result.to_json(), out)
    if run.as_json:
        print(json.dumps(result.to_json()))
        return
    options.print_cautions(list(result.cautions))
    options.tell(f"{hooked.name} on {where}, {len(used)} samples", *result.sentences(), sep="\n\n")
