"""``mech patch`` and ``mech paths``: activation and path patching from the command line.

Samples are generated with their counterfactuals, one is patched from the other, and the cells (or paths) that move the
answer most are printed, or all of them as JSON; ``--out`` saves the result as netCDF or as a picture.
"""

import itertools
import json
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from mech.cli import options
from mech.errors import ExperimentError

PATCH = (
    "[bold]mech patch -m reference:llava-s --positions question --direction noise[/]\n\n"
    "[bold]mech patch --point hook_resid_post --over layer --over region --regions 6x6 --out grid.html[/]"
)
PATHS = (
    "[bold]mech paths -m reference:llava-s --freeze attention --freeze mlp[/]  the direct path of every head\n\n"
    "[bold]mech paths --sender L0H2 --receiver mlp.0 --receiver L2K2.v --freeze attention --direction noise[/]"
)


@dataclass(frozen=True)
class Pairs:
    """The samples to patch with their counterfactuals, and what to show."""

    domain: options.Domain = None
    direction: Annotated[
        str,
        typer.Option(
            help="denoise (tests sufficiency) or noise (tests necessity).",
            callback=options.among(options.DIRECTIONS),
        ),
    ] = "denoise"
    samples: Annotated[int, options.samples("Number of samples, each patched with its counterfactual.", 1)] = 4
    top: Annotated[int, typer.Option(help="How many rows to print.", callback=options.whole(1))] = 10
    out: options.PictureOrData = None

    def of(self, run: options.Run) -> tuple[Any, Any, str]:
        """The model, the pairs, and a title."""
        some, called = run.samples(self.domain, self.samples)
        hooked = run.open_model()
        pairs, called = _paired(hooked, some, called)
        return hooked, pairs, f"{hooked.name} on {called}"


def patch(
    run: options.Run,
    pairs: Pairs,
    point: Annotated[str, typer.Option(help="An activation point without its layer.")] = "attn.hook_z",
    over: Annotated[
        list[str] | None, typer.Option(help="layer, head, kv_head, position or region; repeatable.")
    ] = None,
    positions: Annotated[str, typer.Option(help="all, question, last, image or text.")] = "all",
    regions: Annotated[
        str | None, typer.Option(help="For --over region: a grid over the image (6x6), or names (image,question,last).")
    ] = None,
) -> None:
    """Activation patching: which head, layer, position or region carries what the counterfactual changes."""
    from mech.experiments.patching.paired import patched_pairs

    hooked, samples, called = pairs.of(run)
    with run.progress() as say:
        result = patched_pairs(
            hooked, samples, point=point, over=tuple(over or ("layer", "head")),
            positions=positions, regions=_regions(hooked, samples, regions), direction=pairs.direction,
            progress=lambda i, n: say("patching", i, n),
        )  # fmt: skip
    _print_effects(result, f"{called}: {point}, {pairs.direction}", pairs, run.as_json)


def paths(
    run: options.Run,
    pairs: Pairs,
    sender: Annotated[
        list[str] | None, typer.Option(help="L0H2, mlp.0 or embed; repeatable. Default: every head.")
    ] = None,
    receiver: Annotated[
        list[str] | None, typer.Option(help="logits, L3H4.q, L3K4.k, L3K4.v, mlp.3; repeatable.")
    ] = None,
    freeze: Annotated[list[str] | None, typer.Option(help="attention, mlp, norm; repeatable.")] = None,
) -> None:
    """Path patching: through which paths heads and MLPs act, with what lies between held fixed."""
    import mech

    hooked, samples, called = pairs.of(run)
    every = [f"L{layer}H{head}" for layer in hooked.cfg.attention_layers for head in range(hooked.cfg.n_heads)]
    frozen = tuple(freeze or ("attention", "mlp"))
    with run.progress() as say:
        result = mech.path_patching(
            hooked, list(samples), None, _difference(samples), senders=sender or every, freeze=frozen,
            direction=pairs.direction, receivers="logits" if receiver in (None, ["logits"]) else receiver,
            progress=lambda i, n: say("samples", i, n),
        )  # fmt: skip
    _print_effects(result, f"{called}: {', '.join(frozen)} frozen, {pairs.direction}", pairs, run.as_json)


def _paired(hooked: Any, samples: Any, called: str) -> tuple[Any, str]:
    """The samples with a counterfactual each, made by blanking where there is none, and their name."""
    from mech.experiments.patching.blanked import paired_by_blanking

    if all(sample.counterfactual for sample in samples):
        return samples, called
    return paired_by_blanking(hooked, samples), f"{called}, evidence blanked"


def _difference(data: Any) -> Any:
    """Logit of each sample's answer minus that of its counterfactual."""
    import mech

    return mech.LogitDiff([sample.answer for sample in data], [sample.counterfactual.answer for sample in data])


def _regions(hooked: Any, data: Any, wanted: str | None) -> dict[str, Any] | None:
    """Cells of the first picture, or named spans; None if none are asked for."""
    if wanted is None:
        return None
    rows, cross, cols = wanted.partition("x")
    if not (cross and rows.isdigit() and cols.isdigit()):
        return {name.strip(): name.strip() for name in wanted.split(",")}
    cells = [hooked.inputs_of(sample).layout.cells(int(rows), int(cols)) for sample in data]
    if any(other != cells[0] for other in cells):
        raise ExperimentError(
            f"--regions {wanted} for pictures at different positions", "pictures at the same positions",
            "pass --samples 1",
        )  # fmt: skip
    return cells[0]


def _print_effects(result: Any, title: str, pairs: Pairs, as_json: bool) -> None:
    """The cells with the largest effects, or all of them as JSON."""
    options.save_or_draw(result, pairs.out)
    mean = result["effect"].mean("example")
    cells = [
        {**{str(axis): value.item() for axis, value in zip(mean.dims, at, strict=True)}, "effect": float(value)}
        for at, value in zip(
            itertools.product(*(mean[axis].values for axis in mean.dims)), mean.values.ravel(), strict=True
        )
    ]
    if as_json:
        attrs = {name: value for name, value in result.attrs.items() if isinstance(value, str | int | float)}
        print(
            json.dumps({**attrs, "cells": [c if c["effect"] == c["effect"] else {**c, "effect": None} for c in cells]})
        )
        return
    known = [cell for cell in cells if cell["effect"] == cell["effect"]]
    best = sorted(known, key=lambda cell: -abs(cell["effect"]))[: pairs.top]
    rows = [(*(str(cell[str(axis)]) for axis in mean.dims), f"{cell['effect']:.3f}") for cell in best]
    n = result.sizes["example"]
    whole = "the whole answer is lost" if result.attrs.get("direction") == "noise" else "the whole answer is recovered"
    note = f"{title} ({n} sample{'s' * (n > 1)}; effect 0: nothing changes, 1: {whole})"
    options.print_table(note, (*map(str, mean.dims), "effect"), rows)
