"""``mech transfer``: do the heads of one domain serve another?"""

import json
from typing import Annotated, Any

import typer

from mech.cli import options
from mech.errors import ExperimentError

EPILOG = (
    "[bold]mech transfer -m reference:llava-m --out transfer.html[/]\n\n"
    "[bold]mech transfer -m reference:qwen-s -d pages -d video --fraction 3[/]  three heads of each"
)


def transfer(
    run: options.Run,
    domain: Annotated[
        list[str] | None, options.domains("Two or more. Default: grounding, documents and pages, or all of --data.")
    ] = None,
    fraction: Annotated[
        float, typer.Option(help="Share of all heads (below 1) or number of heads.", callback=options.size)
    ] = 0.05,
    to: Annotated[
        str, typer.Option(help="mean, zero, resample, uniform or paper.", callback=options.among(options.METHODS))
    ] = "mean",
    samples: Annotated[int, options.samples("Per domain: half find heads, half test them.", 8)] = 48,
    n_random: Annotated[
        int, typer.Option(help="Random sets of the same number of heads.", callback=options.whole(2))
    ] = 20,
    out: options.PictureOrData = None,
) -> None:
    """Ablate the top heads of every domain on every domain: one circuit for all, or one for each?"""
    import mech

    known = ("grounding", "documents", "pages") if run.data is None else run.opened(samples).domains
    tasks = tuple(dict.fromkeys(domain or known))
    if len(tasks) < 2:
        raise ExperimentError(f"one domain, {tasks[0]!r}", "two or more", "give --domain again")
    halves = {task: run.samples(task, samples)[0].split(0.5, run.seed) for task in tasks}
    find, test = ({task: half[i] for task, half in halves.items()} for i in (0, 1))
    hooked = run.open_model()
    with run.progress() as say:
        result = mech.transfer(
            hooked, find, test, k=options.share_or_number(fraction), to=to,
            n_random=n_random, seed=run.seed, progress=lambda i, n: say("ablation", i, n),
        )  # fmt: skip
    options.save_or_draw(result, out)
    base = result["accuracy"].isel(condition=0).mean("example")
    cautions = _cautions(result)
    if run.as_json:
        print(json.dumps({"cautions": cautions, **_said(result, base)}))
        return
    options.print_cautions(cautions)
    rows = [(str(task), *_cells(result.sel(found_on=task), "lost")) for task in result["found_on"].values]
    rows.append(("random", *_cells(result, "random_lost")))
    options.print_table(
        f"{hooked.name}: points of accuracy lost (95% over samples; of {n_random} random sets over samples and sets) "
        f"without {result.attrs['n_heads']} heads",
        ("found on", *(f"on {task} ({float(base.sel(tested_on=task)):.1%})" for task in tasks)),
        rows,
    )


def _cautions(result: Any) -> list[str]:
    """Cautions: too few samples for what a task's own heads cost on it, or too few random sets."""
    from mech.experiments.findings.cautions import few_samples, few_sets

    warned = [text for _, text in few_sets(int((result["band"] == "random").sum()))]
    for task in result["tested_on"].values:
        n = int(result["accuracy"].sel(tested_on=task).isel(condition=0).notnull().sum())
        if task in result["found_on"].values:
            own = result.sel(found_on=task, tested_on=task)
            loss = {
                end: float(own[name]) for end, name in (("mean", "lost"), ("low", "lost_low"), ("high", "lost_high"))
            }
            warned += [f"{task}: {text}" for _, text in few_samples(n, loss)]
    return warned


def _cells(result: Any, name: str) -> list[str]:
    """What is lost on each domain, in points, with its interval."""
    columns = zip(*(100 * result[name + end].values + 0.0 for end in ("", "_low", "_high")), strict=True)
    return [f"{mean:.1f} ({low:.1f} to {high:.1f})" for mean, low, high in columns]


def _said(result: Any, base: Any) -> dict[str, Any]:
    """Every pair of domains, random heads and no ablation, as JSON."""
    tasks = [str(task) for task in result["tested_on"].values]
    cells = (
        result[["lost", "lost_low", "lost_high", "p", "p_samples", "p_sets"]]
        .to_dataframe()
        .reset_index()
        .to_dict("records")
    )
    chance = result[["random_lost", "random_lost_low", "random_lost_high"]].to_dataframe().reset_index()
    return {
        **{name: result.attrs[name] for name in ("model", "method", "n_heads")},
        "accuracy": dict(zip(tasks, base.values.tolist(), strict=True)),
        "lost": cells,
        "random": chance.to_dict("records"),
    }
