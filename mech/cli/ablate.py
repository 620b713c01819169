"""``mech ablate``: what bands of heads cost when they are ablated, compared with random heads."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mech.cli import options
from mech.errors import ExperimentError

EPILOG = (
    "[bold]mech ablate -m reference:llava-m --to mean --to zero --fraction 0.05[/]\n\n"
    "[bold]mech ablate --band top --band random --band vision --band sinks[/]  is it just that they attend to pictures?"
)


@dataclass(frozen=True)
class Ablations:
    """What is ablated, how, and against how many random sets."""

    to: Annotated[
        list[str] | None,
        typer.Option(help="mean, zero, resample, uniform, paper; repeatable.", callback=options.among(options.METHODS)),
    ] = None
    fraction: Annotated[
        list[float] | None,
        typer.Option(help="Share of all heads (below 1) or number of heads; repeatable.", callback=options.size),
    ] = None
    band: Annotated[
        list[str] | None,
        typer.Option(
            help="top, bottom, middle, random (heads other than the top), layer_matched (default: these five); "
            "unrestricted, random ones from all heads; vision or sinks, the heads that attend most to pictures or to "
            "tokens with more than 30% of the attention; repeatable.",
            callback=options.among((*options.BANDS, "unrestricted", "vision", "sinks")),
        ),
    ] = None
    n_random: options.NRandom = 100
    positions: Annotated[
        str, typer.Option(help="all, question, last, image or text.", callback=options.among(options.POSITIONS))
    ] = "all"


def ablate(
    run: options.Run,
    ablations: Ablations,
    domain: options.Domain = None,
    heads: Annotated[
        Path | None, typer.Option(help="A ranking written by `mech rank --out`; ranked by RAM without it.")
    ] = None,
    allow_other_model: Annotated[
        bool,
        typer.Option(
            "--allow-other-model", help="Accept --heads of another model of this shape; the result records it."
        ),
    ] = False,
    samples: Annotated[int, options.samples("Half find heads (or form the reference), half test them.", 8)] = 96,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Save every sample's result (netCDF).", callback=options.written_to()),
    ] = None,
) -> None:
    """Ablate bands of heads, and report what each costs compared with random heads."""
    import mech
    from mech.experiments.findings.cautions import cautions
    from mech.experiments.findings.summary import stability, summarise_effects
    from mech.results import save

    some, called = run.samples(domain, samples)
    find, test = some.split(0.5, run.seed)
    hooked = run.open_model()
    with run.progress() as say:
        if heads is None:
            ranking = mech.rank_heads(_attention(hooked, find, "attention", say))
        else:
            ranking, test = _found_before(heads, test)
        effects = mech.ablation(
            hooked, test, ranking, reference=find, to=ablations.to or ["mean"],
            bands=[_band(hooked, find, band, say) for band in dict.fromkeys(ablations.band or options.BANDS)],
            fractions=[options.share_or_number(fraction) for fraction in ablations.fraction or (0.05, 0.2)],
            n_random=ablations.n_random, positions=ablations.positions, seed=run.seed,
            progress=lambda i, n: say("ablation", i, n), allow_other_model=allow_other_model,
        )  # fmt: skip
    if out is not None:
        save(effects, out)
    numbers = summarise_effects(effects)
    warned = [text for _, text in cautions(numbers | {"stability": stability(ranking)})]
    if run.as_json:
        print(json.dumps({"cautions": warned, **numbers}))
        return
    options.print_cautions(warned)
    _print_effects(numbers, f"{hooked.name} on {called}")


def _found_before(heads: Path, test: Any) -> tuple[Any, Any]:
    """A ranking of ``mech rank``, and the samples that it was not found on."""
    import mech

    ranking = mech.Ranking.from_json(heads)
    test = test.where(lambda sample: sample.id not in ranking.examples)
    if len(test) < 4:
        raise ExperimentError(
            f"{heads} was found on all but {len(test)} of these samples", "samples that did not find the heads",
            "give another --seed",
        )  # fmt: skip
    return ranking, test


def _band(hooked: Any, find: Any, band: str, say: Any) -> Any:
    """The name of a band, or the ranking whose top heads it consists of."""
    import mech

    score = {"vision": "vision_mass", "sinks": "sink_mass"}.get(band)
    return band if score is None else mech.rank_heads(_attention(hooked, find, band, say), score)


def _print_effects(numbers: dict[str, Any], title: str) -> None:
    """A row for every band; the top against random heads below."""
    from mech.experiments.effects import both_units

    rows = []
    for entry in numbers["ablation"]:
        drop, draws = entry["accuracy_drop"], entry["draws"]
        band = entry["band"] if draws == 1 else f"{entry['band']} ({draws} sets)"
        cells = (entry["method"], band, str(entry["n_heads"]), f"{entry['accuracy']['mean']:.1%}")
        rows.append((*cells, f"{100 * drop['mean']:.1f} ({100 * drop['low']:.1f} to {100 * drop['high']:.1f})"))
    base, n = numbers["baseline"]["accuracy"]["mean"], numbers["n_test"]
    options.print_table(
        f"{title}: accuracy {base:.1%} without ablation, {n} samples (intervals over samples, and over several sets)",
        ("method", "band", "heads", "accuracy", "drop in points (95%)"),
        rows,
    )
    for test in numbers["tests"]:
        name = f"{test['method']}, top {test['n_heads']} against random"
        if test["sets_as_costly"] is None:
            print(f"{name}: the top heads cost nothing here")
        else:
            p = "" if test["primary"] else f"; larger one after Holm {test['p_adjusted']:.3f}"
            print(f"{name}: {both_units(test)}{p}")


def _attention(hooked: Any, find: Any, what: str, say: Any) -> Any:
    """What heads attend to: evidence and pictures, or sinks."""
    import mech

    measure = partial(mech.attention_sinks, by="attention") if what == "sinks" else mech.retrieval_attention_mass
    return measure(hooked, find, progress=lambda i, n: say(what, i, n))
