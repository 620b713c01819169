"""``mech accelerate``: how few heads can see everything, at which accuracy, speed and size of cache."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mech.cli import options
from mech.errors import ExperimentError

EPILOG = (
    "[bold]mech accelerate -m reference:llava-m --share 0.02 --share 0.1[/]\n\n"
    "[bold]mech accelerate -m reference:qwen-long --pictures 32 --out frontier.html[/]  more pages, and a picture of it"
)


def accelerate(
    model: options.Model = "reference:llava-s",
    revision: options.Revision = None,
    domain: options.Domain = None,
    data: options.Data = None,
    root: options.Root = None,
    pictures: Annotated[
        int | None,
        typer.Option(
            help="Pages or frames of each generated sample, for models of long contexts.", callback=options.whole(1)
        ),
    ] = None,
    samples: Annotated[int, options.samples("A quarter ranks the heads, the others test them.", 16)] = 96,
    window: Annotated[
        int | None,
        typer.Option(help="Tokens a local head sees; by default a bit over the question.", callback=options.whole(1)),
    ] = None,
    sinks: Annotated[int, typer.Option(help="First tokens that every head sees.", callback=options.whole(0))] = 4,
    share: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of KV heads that stay dense, or from 1 on their number; repeatable.", callback=options.size
        ),
    ] = None,
    choice: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(options.CHOICES)}; repeatable. Default: all.", callback=options.among(options.CHOICES)
        ),
    ] = None,
    n_random: options.NRandom = 4,
    margin: Annotated[
        float,
        typer.Option(help="The loss of accuracy that a recommended setting stays below.", callback=options.share),
    ] = 0.1,
    batch_size: options.BatchSize = 8,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Save the result (.nc) or its picture (.html).",
            callback=options.written_to(".nc", ".html"),
        ),
    ] = None,
    seed: options.Seed = 0,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Keep a few heads dense and the others local: accuracy, speed and cache, beside other choices at equal budget."""
    import mech
    from mech.experiments.findings.acceleration import sentences, summarise
    from mech.results import save
    from mech.sparse.frontier.acceleration import CHOICES, SHARES

    sizes = [options.share_or_number(one) for one in share or SHARES]
    some, called = _samples(data, root, domain, pictures, samples, seed)
    find, test = some.split(0.25, seed)
    hooked = options.open_model(model, revision)
    with options.progress(quiet or as_json) as say:
        found = mech.acceleration(
            hooked, test, find=find, window=window, sinks=sinks, choices=choice or CHOICES, shares=sizes,
            n_random=n_random, batch_size=batch_size, seed=seed, progress=say,
        )  # fmt: skip
    if out is not None and out.suffix == ".nc":
        save(found, out)
    elif out is not None:
        mech.view(found, margin=margin).save(out)
    facts = summarise(found, margin)
    if as_json:
        print(json.dumps(facts))
        return
    local = f"the others see {facts['sinks']} + {facts['window']} of {facts['length']} tokens"
    dense, alone = facts["dense"]["mean"], facts["window_only"]["accuracy"]["mean"]
    title = f"{hooked.name} on {called}: dense {dense:.1%}, window alone {alone:.1%} ({len(test)} samples; {local})"
    columns = ("KV heads dense", "chosen by", "accuracy", "loss in points (95%)", "attention work", "cache")
    options.print_table(title, columns, [_row(entry) for entry in facts["curve"]])
    options.tell(*(text for _, text, _ in sentences(facts)))


def _samples(
    data: str | None, root: Path | None, domain: str | None, pictures: int | None, n: int, seed: int
) -> tuple[Any, str]:
    import mech

    if pictures is None:
        return options.chosen(data, root, domain or ("pages" if data is None else None), n, seed)
    if data is not None:
        raise ExperimentError("--pictures with --data", "one of the two: it is for generated samples", "leave one out")
    domain = domain or "pages"
    return mech.haystacks(domain, n, seed, n_pictures=pictures), f"{domain} of {pictures} pictures"


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    loss = [f"{100 * entry['loss'][end] + 0.0:.1f}" for end in ("mean", "low", "high")]
    sets = f" (mean of {entry['draws']})" if entry["draws"] > 1 else ""
    return (
        f"{entry['n_kv_heads']} ({entry['share']:.0%})", entry["choice"] + sets, f"{entry['accuracy']['mean']:.1%}",
        f"{loss[0]} ({loss[1]} to {loss[2]})", f"{entry['flops']:.0%}", f"{entry['kv_bytes']:.0%}",
    )  # fmt: skip
