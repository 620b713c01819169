"""The command line: ``mech study``, ``mech rank``, ``mech ablate``, ``mech transfer``, ``mech patch``,
``mech paths``, ``mech view``, ``mech check``.

Nothing heavy is imported before a command runs, so ``mech --help`` answers at once. Errors that a user can mend are
printed without a traceback and end with exit code 2; Ctrl-C ends with 130 and leaves a study that can go on.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mech import cli_accelerate, cli_claims, cli_data, cli_patching, cli_transfer, cli_view
from mech.errors import ExperimentError, MechError, suggestion
from mech.terminal import (
    AsJson,
    Data,
    Domain,
    Model,
    Quiet,
    Revision,
    Root,
    Seed,
    at_least,
    chosen,
    domain_names,
    open_model,
    opened,
    print_table,
    progress,
    reference_names,
    share_or_number,
    writable,
)

INTERRUPTED = 130  # what a shell calls a program that ended by Ctrl-C

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Mechanistic interpretability of multimodal LLMs: which attention heads fetch the visual evidence, "
    "and are they needed?",
    epilog="Exit codes: 0 done; 1 a check failed; 2 a mistake that can be mended, with what to do; "
    "130 stopped by Ctrl-C (a study goes on when the same command is given again).",
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
    """What stands in front of a command."""


@app.command(
    epilog="[bold]mech study[/]  the reference models, every domain, about ten minutes on two cores\n\n"
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
            autocompletion=reference_names,
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Of the one --model; NAME@REVISION where there are several.")
    ] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            "--domain", "-d", help="May be given again. Default: all the model knows.", autocompletion=domain_names
        ),
    ] = None,
    data: Data = None,
    root: Root = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The study folder.")] = Path("study"),
    samples: Annotated[int, typer.Option(help="Samples of each domain: half find heads, half test them.")] = 64,
    n_random: Annotated[int, typer.Option(help="Random sets of each size.")] = 20,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(help="Samples per forward.")] = 16,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Rank heads by RAM, test whether they are needed, write report.html. The same command goes on where it stopped."""
    from mech.study import DEFAULT_MODELS, Settings
    from mech.study import study as run

    at_least("--samples", samples, 8)
    if revision is not None:
        if model is None or len(model) != 1:
            raise ExperimentError(
                f"--revision {revision} with {len(model or ())} models", "one --model", "write each as NAME@REVISION"
            )
        model = [f"{model[0]}@{revision}"]
    settings = Settings(
        n_find=samples // 2, n_test=samples - samples // 2, n_random=n_random, seed=seed, batch_size=batch_size
    )
    if data is not None and not model:
        raise ExperimentError(
            "--data without --model", "a model that can answer it", "name one: the default ones know the haystacks only"
        )
    own = opened(data, root, samples, seed) if data is not None else None
    with progress(quiet or as_json) as say:
        page = run(out, model or DEFAULT_MODELS, domain, data=own, settings=settings, progress=say)
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    if as_json:
        print(json.dumps(summary))
        return
    _print_findings(summary)
    print(f"\n{page}")


@app.command(
    epilog="[bold]mech rank -m reference:qwen-s -d video --out heads.json[/]\n\n"
    "[bold]mech rank --score ram,mm_retrieval,retrieval_head[/]  do they name the same heads?"
)
def rank(
    model: Model = "reference:llava-s",
    revision: Revision = None,
    domain: Domain = None,
    data: Data = None,
    root: Root = None,
    samples: Annotated[int, typer.Option(help="Samples to measure on.")] = 48,
    score: Annotated[str, typer.Option(help="ram, or others of the literature, joined by commas.")] = "ram",
    top: Annotated[int, typer.Option(help="How many heads to print, and to compare.")] = 10,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write all heads and scores as JSON.")] = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Rank the heads of a model by Retrieval Attention Mass, or by several scores, and say how far they agree."""
    import mech
    from mech.experiments.scores import passes
    from mech.results import write_json

    names = [name.strip() for name in score.split(",")]
    passes(names)  # refuses an unknown score before anything is opened
    target = writable(out) if out is not None else None
    some, called = chosen(data, root, domain, samples, seed)
    hooked = open_model(model, revision)
    with progress(quiet or as_json) as say:
        scores = mech.head_scores(hooked, some, names, seed=seed, progress=lambda i, n: say("attention", i, n))
    rankings = {name: mech.rank_heads(scores, name) for name in names}
    first = rankings[names[0]]
    if not 1 <= top <= len(first):
        raise ExperimentError(f"--top {top}", f"1 to {len(first)}, the heads of {model}", "leave it out for ten")
    written = first.to_json()
    if len(rankings) > 1:
        agree = mech.agreement(rankings, k=top, n_resamples=500, seed=seed)
        matrices = {str(name): values.values.tolist() for name, values in agree.items()}
        written = {"rankings": {name: ranking.to_json() for name, ranking in rankings.items()},
                   "agreement": {"scores": names, "n_top": top, **matrices}}  # fmt: skip
    if target is not None:
        write_json(written, target)
    if as_json:
        print(json.dumps(written))
        return
    for name, ranking in rankings.items():
        interval = ranking.interval()
        print_table(
            f"{hooked.name} on {called}: {name} ({scores[name].attrs['unit']}), {len(some)} samples",
            ("rank", "head", name, "95% interval"),
            [
                (
                    str(i),
                    f"L{layer}H{head}",
                    f"{value:.3f}",
                    _between(*(interval[end].sel(layer=layer, head=head).item() for end in ("low", "high"))),
                )
                for i, (layer, head, value) in enumerate(ranking.table[:top], start=1)
            ],
        )
    if len(rankings) > 1:
        chance = f"by chance {float(agree['jaccard_null'][0, 1]):.2f}"
        for name, what in (
            ("spearman", "Rank correlation of all heads"),
            ("jaccard", f"Jaccard of the top {top}, {chance}"),
        ):
            rows = [(one, *(_agreed(agree, name, one, other) for other in names)) for one in names]
            print_table(f"{what} (95% interval over samples)", ("", *names), rows)


def _between(low: Any, high: Any, *, digits: int = 3) -> str:
    return f"{float(low):.{digits}f} to {float(high):.{digits}f}"


def _agreed(agree: Any, name: str, one: str, other: str) -> str:
    pair = agree.sel(ranking=one, other=other)
    between = "" if one == other else f" ({_between(pair[f'{name}_low'], pair[f'{name}_high'], digits=2)})"
    return f"{float(pair[name]):.2f}{between}"


@app.command(
    epilog="[bold]mech ablate -m reference:llava-m --to mean --to zero --fraction 0.05[/]\n\n"
    "[bold]mech ablate --band top --band random --band vision --band sinks[/]  is it only that they look at pictures?"
)
def ablate(
    model: Model = "reference:llava-s",
    revision: Revision = None,
    domain: Domain = None,
    data: Data = None,
    root: Root = None,
    to: Annotated[
        list[str] | None, typer.Option(help="mean, zero, resample, uniform, paper; may be given again.")
    ] = None,
    fraction: Annotated[
        list[float] | None, typer.Option(help="Share of all heads, or from 1 on their number; repeatable.")
    ] = None,
    band: Annotated[
        list[str] | None,
        typer.Option(
            help="top, bottom, middle, random, layer_matched (default: these five); vision or sinks, the heads that "
            "look most at pictures or at tokens with more than 30% of the attention; may be given again."
        ),
    ] = None,
    heads: Annotated[
        Path | None, typer.Option(help="A ranking written by `mech rank --out`; found anew without.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Half find heads (or make the reference), half test them.")] = 96,
    n_random: Annotated[int, typer.Option(help="Random sets of each size.")] = 20,
    positions: Annotated[str, typer.Option(help="all, question, last, image or text.")] = "all",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Save every sample's result (netCDF).")] = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Ablate bands of heads, and say what each costs beside random heads."""
    import mech
    from mech.experiments.ablation import BANDS
    from mech.experiments.summary import summarise_effects
    from mech.interventions import METHODS, POSITIONS
    from mech.results import save

    at_least("--samples", samples, 8)
    methods, sizes = to or ["mean"], [share_or_number(f) for f in fraction or (0.05, 0.2)]
    bands: list[Any] = list(dict.fromkeys(band or BANDS))
    for given, known in ((methods, METHODS), ([positions], POSITIONS), (bands, (*BANDS, "vision", "sinks"))):
        for word in given:
            if word not in known:
                raise ExperimentError(f"{word!r}", ", ".join(known), suggestion(word, known))
    some, called = chosen(data, root, domain, samples, seed)
    find, test = some.split(0.5, seed)
    target = writable(out) if out is not None else None
    hooked = open_model(model, revision)
    with progress(quiet or as_json) as say:
        if heads is None:
            ranking = mech.rank_heads(
                mech.retrieval_attention_mass(hooked, find, progress=lambda i, n: say("attention", i, n))
            )
        else:
            ranking = mech.Ranking.from_json(heads)
            test = test.where(lambda sample: sample.id not in ranking.examples)
            if len(test) < 4:
                raise ExperimentError(
                    f"{heads} was found on all but {len(test)} of these samples",
                    "samples that did not find the heads",
                    "give another --seed",
                )
        for word, score in (("vision", "vision_mass"), ("sinks", "sink_mass")):
            if word in bands:
                bands[bands.index(word)] = mech.rank_heads(_looking(hooked, find, word, say), score)
        effects = mech.ablation(
            hooked,
            test,
            ranking,
            reference=find,
            to=methods,
            bands=bands,
            fractions=sizes,
            n_random=n_random,
            positions=positions,
            seed=seed,
            progress=lambda i, n: say("ablation", i, n),
        )
    if target is not None:
        save(effects, target)
    numbers = summarise_effects(effects)
    if as_json:
        print(json.dumps(numbers))
        return
    base = numbers["baseline"]["accuracy"]["mean"]
    rows = []
    for entry in numbers["ablation"]:
        drop = entry["accuracy_drop"]
        cells = (entry["method"], entry["band"], str(entry["n_heads"]), f"{entry['accuracy']['mean']:.1%}")
        rows.append((*cells, f"{100 * drop['mean']:.1f} ({100 * drop['low']:.1f} to {100 * drop['high']:.1f})"))
    print_table(
        f"{hooked.name} on {called}: accuracy {base:.1%} without ablation, {len(test)} samples",
        ("method", "band", "heads", "accuracy", "drop in points (95%)"),
        rows,
    )


def _looking(hooked: Any, find: Any, word: str, say: Any) -> Any:
    """Where heads look besides the evidence: at pictures, or at sinks."""
    import mech

    measure = partial(mech.attention_sinks, by="attention") if word == "sinks" else mech.retrieval_attention_mass
    return measure(hooked, find, progress=lambda i, n: say(word, i, n))


app.command(epilog=cli_patching.PATCH)(cli_patching.patch)
app.command(epilog=cli_patching.PATHS)(cli_patching.paths)
app.command(epilog=cli_accelerate.EPILOG)(cli_accelerate.accelerate)
app.command(epilog=cli_transfer.EPILOG)(cli_transfer.transfer)
app.command(epilog=cli_view.VIEW)(cli_view.view)
app.command(epilog=cli_data.DATA)(cli_data.data)
app.command(epilog=cli_claims.EPILOG)(cli_claims.claims)


@app.command(
    epilog="[bold]mech check Qwen/Qwen3-VL-4B-Instruct[/]  a model of the hub, a folder, or reference:llava-s\n\n"
    "[bold]mech check --all[/]  tiny random models of every family, offline"
)
def check(
    model: Annotated[str | None, typer.Argument(help="A reference model, a folder or a hub id.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Tiny random models of every family.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Every layer, not the first and last of each kind.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Does mech run this model? Parity, points, padding, generation and geometry; exits with 1 if anything fails.

    Without a model: the families that are known.
    """
    from mech.model import check as checking

    if every == (model is not None):
        if every:
            raise ExperimentError(f"{model} and --all", "one of the two", "leave one out")
        print(json.dumps(checking.family_rows()) if as_json else checking.family_table())
        return
    with progress(quiet or as_json) as say:
        if model is None:
            reports = list(checking.check_families(progress=say))
        else:
            reports = [checking.check(model, full=full, progress=say)]
    if as_json:
        print(json.dumps([report.to_json() for report in reports]))
    else:
        laws = tuple(reports[0].findings)
        rows = [(report.model, *(report.cell(law) for law in laws)) for report in reports]
        print_table("Deviations are relative to the largest logit", ("model", *laws), rows)
        print(*(note for report in reports for note in report.notes()), sep="\n")
    if not all(report.ok for report in reports):
        raise typer.Exit(1)


def _print_findings(summary: dict) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.padding import Padding

    console = Console()
    console.print("\n[bold]Findings[/] (a place is a model on a domain; the report has all of them with their numbers)")
    for finding in summary["headlines"]:
        mark = "[yellow]against the papers:[/] " if finding["against_papers"] else ""
        place = f"{finding['model']}: " if finding["model"] else ""
        console.print(Padding(mark + escape(place + finding["text"]), (0, 0, 0, 2)), highlight=False)


def main() -> None:
    """Run the command line; what a user can mend is said in three lines."""
    try:
        app()
    except MechError as error:
        print(f"mech: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            print("\nmech: stopped. A study goes on when the same command is given again.", file=sys.stderr)
        raise
