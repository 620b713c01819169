"""``mech data``: check your own samples before a model is opened, or see what is known about the published sets."""

import json
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mech.cli import options

if TYPE_CHECKING:
    from mech.data.samples import Samples

EPILOG = (
    "[bold]mech data mine.jsonl[/]  checks every line and lists what is there (docs/data.md)\n\n"
    "[bold]mech data[/]  the published sets\n\n[bold]mech data visual-cot[/]  details of one"
)


def data(
    what: Annotated[str | None, typer.Argument(help="A .jsonl file, or the name of a published set.")] = None,
    root: options.Root = None,
    as_json: options.AsJson = False,
) -> None:
    """Check a file of samples, or show all about one published set; without either, list the published sets."""
    import mech
    from mech.data import hub

    if what is None:
        rows = [hub.source(name) for name in hub.names()]
        if as_json:
            print(json.dumps([_said(row) for row in rows]))
            return
        cells = [(row.name, row.hub or "-", "yes" if row.root else "-", row.evidence) for row in rows]
        options.print_table("Published sets", ("name", "hub", "root=", "evidence"), cells)
    elif what.endswith(".jsonl") or Path(what).exists():
        found = _counted(mech.read_samples(what, root))
        if as_json:
            print(json.dumps(found))
            return
        cells = [(name, *(_cell(value) for value in counts.values())) for name, counts in found.items()]
        options.print_table(f"{what}: every line can be used", ("domain", *next(iter(found.values()))), cells)
    else:
        facts = _said(hub.source(what))
        if as_json:
            print(json.dumps(facts))
        else:
            options.tell(*(f"{name:9} {value}" for name, value in facts.items() if value))


def _said(row: Any) -> dict[str, Any]:
    return {field.name: getattr(row, field.name) for field in fields(row) if field.name != "read"}


def _counted(samples: "Samples") -> dict[str, dict[str, Any]]:
    """What each domain holds."""
    counts = {}
    for domain in samples.domains:
        some = samples.where(lambda sample, domain=domain: sample.domain == domain)
        shown = [picture for sample in some for picture in sample.images or sample.video]
        sizes = [f"{width} x {height}" for width, height in sorted({picture.size for picture in shown})]
        counts[domain] = {
            "samples": len(some),
            "pictures": len(shown),
            "sizes": sizes if len(sizes) <= 2 else [sizes[0], "...", sizes[-1]],
            "evidence": dict(Counter(type(region).__name__ for sample in some for region in sample.evidence)),
            "without evidence": sum(not sample.evidence for sample in some),
            "counterfactuals": sum(sample.counterfactual is not None for sample in some),
        }
    return counts


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items()) or "-"
    return ", ".join(value) if isinstance(value, list) else str(value)
