"""``mech claims``: which published statements about retrieval heads hold on this model."""

import json
from typing import Annotated

import typer

from mech.cli import options
from mech.errors import ExperimentError, suggestion

EPILOG = (
    "[bold]mech claims -m reference:qwen-s -d video[/]\n\n"
    "[bold]mech claims --only low-ranked --only queries[/]  some of them"
)


def claims(
    model: options.Model = "reference:llava-s",
    revision: options.Revision = None,
    domain: options.Domain = None,
    data: options.Data = None,
    root: options.Root = None,
    only: Annotated[list[str] | None, typer.Option(help="A point by its name; repeatable. Default: all.")] = None,
    samples: Annotated[int, options.samples("Half find the heads, half test them.", 8)] = 48,
    n_random: options.NRandom = 20,
    out: options.Written = None,
    seed: options.Seed = 0,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure what the papers on retrieval heads claim or leave open: nine points and three disputes, in sentences."""
    import mech
    from mech.papers import KNOWN
    from mech.results import write_json

    for name in only or ():
        if name not in KNOWN:
            raise ExperimentError(f"no point is called {name!r}", ", ".join(KNOWN), suggestion(name, KNOWN))
    used, where = options.chosen(data, root, domain, samples, seed)
    hooked = options.open_model(model, revision)
    with options.progress(quiet or as_json) as say:
        result = mech.published_claims(
            hooked, used, only, n_random=n_random, seed=seed, progress=lambda i, n: say("points", i, n)
        )
    if out is not None:
        write_json(result.to_json(), out)
    if as_json:
        print(json.dumps(result.to_json()))
        return
    options.print_cautions(list(result.cautions))
    options.tell(f"{hooked.name} on {where}, {len(used)} samples", *result.sentences(), sep="\n\n")
