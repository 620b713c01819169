"""``mech rank``: heads by Retrieval Attention Mass, or by several scores, and how far these agree."""

import json
from typing import Annotated, Any

import typer

from mech.cli import options
from mech.errors import ExperimentError

EPILOG = (
    "[bold]mech rank -m reference:qwen-s -d video --out heads.json[/]\n\n"
    "[bold]mech rank --score ram,mm_retrieval,retrieval_head[/]  do they name the same heads?"
)


def rank(
    model: options.Model = "reference:llava-s",
    revision: options.Revision = None,
    domain: options.Domain = None,
    data: options.Data = None,
    root: options.Root = None,
    samples: Annotated[int, options.samples("Samples to measure on.", 1)] = 48,
    score: Annotated[str, typer.Option(help="ram, or others of the literature, joined by commas.")] = "ram",
    top: Annotated[int, typer.Option(help="How many heads to print, and to compare.", callback=options.whole(1))] = 10,
    out: options.Written = None,
    seed: options.Seed = 0,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Rank the heads of a model by Retrieval Attention Mass, or by several scores, and say how far they agree."""
    import mech
    from mech.experiments.scores.measure import passes
    from mech.results import write_json

    names = [name.strip() for name in score.split(",")]
    passes(names)  # refuses an unknown score before anything is opened
    some, called = options.chosen(data, root, domain, samples, seed)
    hooked = options.open_model(model, revision)
    with options.progress(quiet or as_json) as say:
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
    if out is not None:
        write_json(written, out)
    if as_json:
        print(json.dumps(written))
        return
    for name, ranking in rankings.items():
        interval = ranking.interval()
        options.print_table(
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
            options.print_table(f"{what} (95% interval over samples)", ("", *names), rows)


def _between(low: Any, high: Any, *, digits: int = 3) -> str:
    return f"{float(low):.{digits}f} to {float(high):.{digits}f}"


def _agreed(agree: Any, name: str, one: str, other: str) -> str:
    pair = agree.sel(ranking=one, other=other)
    between = "" if one == other else f" ({_between(pair[f'{name}_low'], pair[f'{name}_high'], digits=2)})"
    return f"{float(pair[name]):.2f}{between}"
