"""``mech rank``: heads by Retrieval Attention Mass, or by several scores, and how far these agree."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mech.cli import options
from mech.errors import ExperimentError

EMPTY: dict[str, Any] = {"inclusion": ()}
NAMED = {"even": "even attention", "elsewhere": "same head elsewhere", "exchanged": "other samples' answers"}
EPILOG = (
    "[bold]mech rank -m reference:qwen-s -d video --out heads.json[/]\n\n"
    "[bold]mech rank --score ram,mm_retrieval,retrieval_head[/]  do they select the same heads?\n\n"
    "[bold]mech rank --score ram,gaze,contrastive,gating --export heads.json[/]  all in one file, to share"
)


def rank(
    run: options.Run,
    domain: options.Domain = None,
    samples: Annotated[int, options.samples("Samples to measure on.", 1)] = 48,
    score: Annotated[
        str, typer.Option(help="ram, other published scores, or gating (causal head gating), separated by commas.")
    ] = "ram",
    top: Annotated[int, typer.Option(help="Number of heads to print and to compare.", callback=options.whole(1))] = 10,
    out: options.Written = None,
    export: Annotated[
        Path | None,
        typer.Option(
            help="Write every score with intervals, nulls and top heads (heads.json), to be loaded as a ranking.",
            callback=options.written_to(".json"),
        ),
    ] = None,
) -> None:
    """Rank the heads of a model by Retrieval Attention Mass, or by several scores, and say how far they agree."""
    import mech
    from mech.experiments.findings.cautions import unstable
    from mech.experiments.findings.summary import stability
    from mech.experiments.scores.record import check_names
    from mech.results import write_json

    names = [name.strip() for name in score.split(",")]
    check_names(names)  # before anything is opened
    some, called = run.samples(domain, samples)
    hooked = run.open_model()
    with run.progress() as say:
        record = mech.head_record(hooked, some, names, seed=run.seed, progress=lambda i, n: say("scores", i, n))
    rankings = {name: record.ranking(name) for name in names}
    nulls = {name: {word: null.tolist() for word, null in one.null.items()} for name, one in record.scores.items()}
    first = rankings[names[0]]
    if not 1 <= top <= len(first):
        raise ExperimentError(f"--top {top}", f"1 to {len(first)}, the heads of {run.model}", "leave it out for ten")
    warned = [
        f"{name}: {text}" for name, ranking in rankings.items() for _, text in unstable(stability(ranking) or EMPTY)
    ]
    agree = mech.agreement(rankings, k=top, n_resamples=500, seed=run.seed) if len(rankings) > 1 else None
    written = _in_json(rankings, nulls, agree, top) | {"cautions": warned}
    if out is not None:
        write_json(written, out)
    if export is not None:
        replace(record, n_top=top).to_json(export)
    if run.as_json:
        print(json.dumps(written))
        return
    options.print_cautions(warned)
    for name, ranking in rankings.items():
        unit = record.scores[name].about["unit"]
        _print_ranking(ranking, nulls[name], f"{hooked.name} on {called}: {name} ({unit}), {len(some)}", top)
    if agree is not None:
        _print_agreement(agree, names, top)


def _in_json(rankings: dict[str, Any], nulls: dict[str, Any], agree: Any, top: int) -> dict[str, Any]:
    """One ranking with its nulls; or all of them by name, and how far they agree."""
    each = {name: {**ranking.to_json(), "null": nulls[name]} for name, ranking in rankings.items()}
    if agree is None:
        return next(iter(each.values()))
    matrices = {str(name): values.values.tolist() for name, values in agree.items()}
    return {"rankings": each, "agreement": {"scores": list(rankings), "n_top": top, **matrices}}


def _print_agreement(agree: Any, names: list[str], top: int) -> None:
    chance = f"by chance {float(agree['jaccard_null'][0, 1]):.2f}"
    for name, what in (
        ("spearman", "Rank correlation of all heads"),
        ("jaccard", f"Jaccard of the top {top}, {chance}"),
    ):
        rows = [(row_name, *(_agreed(agree, name, row_name, other) for other in names)) for row_name in names]
        options.print_table(f"{what} (95% interval over samples)", ("", *names), rows)


def _print_ranking(ranking: Any, null: dict[str, Any], title: str, top: int) -> None:
    """The top heads with their intervals, and what each would score without retrieval."""
    interval, rows = ranking.interval(), []
    for i, (layer, head, value) in enumerate(ranking.table[:top], start=1):
        ends = (interval[end].sel(layer=layer, head=head).item() for end in ("low", "high"))
        beside = (f"{known[ranking.layers.index(layer)][head]:.3f}" for known in null.values())
        rows.append((str(i), f"L{layer}H{head}", f"{value:.3f}", _between(*ends), *beside))
    columns = ("rank", "head", ranking.score, "95% over samples", *(f"null: {NAMED[word]}" for word in null))
    options.print_table(f"{title} samples", columns, rows)


def _between(low: Any, high: Any, *, digits: int = 3) -> str:
    return f"{float(low):.{digits}f} to {float(high):.{digits}f}"


def _agreed(agree: Any, name: str, name_a: str, other: str) -> str:
    pair = agree.sel(ranking=name_a, other=other)
    between = "" if name_a == other else f" ({_between(pair[f'{name}_low'], pair[f'{name}_high'], digits=2)})"
    return f"{float(pair[name]):.2f}{between}"
