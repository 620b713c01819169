"""``mech explore``: explore a model with the mouse, on a page of this machine."""

from pathlib import Path
from typing import Annotated

import typer

from mech.cli import options

EPILOG = (
    "[bold]mech explore reference:llava-s[/]  prints the address of a page\n\n"
    "[bold]mech explore Qwen/Qwen3-VL-2B-Instruct --data mine.jsonl --open[/]"
)
SPLIT = 4  # from this many samples on, half are kept apart for mean and resample ablation


def explore(
    model: Annotated[
        str,
        typer.Argument(
            help="A reference model, a folder or a hub id.",
            autocompletion=options.reference_names,
            callback=options.known_model,
        ),
    ] = "reference:llava-s",
    revision: options.Revision = None,
    domain: options.Domain = None,
    data: options.Data = None,
    root: options.Root = None,
    samples: Annotated[
        int, options.samples("Number of samples; half are shown, half give the means for ablation.", 1)
    ] = 32,
    port: Annotated[int, typer.Option(help="Port; 0 finds a free one.", callback=options.whole(0, 65_535))] = 0,
    state: Annotated[str, typer.Option(help="The state shown first: the part of a link after #.")] = "",
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    seed: options.Seed = 0,
) -> None:
    """Explore a model on a page of this machine: where its heads attend, and what happens without them."""
    import secrets
    import webbrowser

    from mech.explorer.server import address, listening, serve
    from mech.explorer.state import Origin, State

    State.read(state)
    with listening(port) as place:  # a taken port is reported before anything is loaded
        from mech.explorer.engine import Engine

        some, _ = options.chosen(data, root, domain, samples, seed)
        reference, shown = some.split(0.5) if len(some) >= SPLIT else (some, some)
        made = Origin(_model(model, revision), _samples(data, root, domain, samples, seed), len(some) >= SPLIT)
        engine = Engine(options.open_model(model, revision), shown, reference, made)
        engine.warm()
        token = secrets.token_urlsafe(16)
        if open_browser:
            webbrowser.open(address(place.getsockname()[1], token, state))
        serve(engine, place, token, state)


def _model(model: str, revision: str | None) -> str:
    """The expression that opens the model."""
    from mech.explorer.state import quoted

    return f"mech.HookedMLLM.from_pretrained({quoted(model)}{f', revision={quoted(revision)}' if revision else ''})"


def _samples(data: str | None, root: Path | None, domain: str | None, n: int, seed: int) -> str:
    """The expression that gives the samples chosen by ``options.chosen``."""
    from mech.explorer.state import quoted

    if data is None:
        return f"mech.haystacks({quoted(domain or 'grounding')}, n={n}, seed={seed})"
    beside = f", root={quoted(str(root))}" if root else ""
    path, (name, _, count) = Path(data).expanduser(), data.partition(":")
    if path.exists():
        made = f"mech.read_samples({quoted(str(path.resolve()))}, n={n}, seed={seed}{beside})"
    else:
        made = f"mech.hub_samples({quoted(name)}, {count or n}, {seed}{beside}, skip_bad=True)"
    return made if domain is None else f"{made}.where(lambda sample: sample.domain == {quoted(domain)})"
