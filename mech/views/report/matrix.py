"""What the literature claims, and on which models, compared with what was found here: a table of marks, claim by claim.

The verdicts come from ``mech.experiments.findings.verdicts``; pointing at a mark shows the numbers behind it. All
findings follow below as sentences, folded.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mech.experiments.findings.verdicts import AGREES, CANNOT_TELL, DIFFERS
from mech.views.drawing.page import escape, tabular

MARKS = {AGREES: ("✓", "agrees"), DIFFERS: ("✗", "differs"), CANNOT_TELL: ("?", "cannot")}
SEE = (
    "Each row is a published claim with the models it was made for, each column a model on a domain of this study; "
    "point at a mark to see its numbers."
)


def matrix(verdicts: Sequence[Mapping[str, Any]], findings: Sequence[Mapping[str, Any]], scope: str) -> str:
    """The table of verdicts within the ``scope`` of a study, and the findings in words."""
    within = (
        f"Measured here: {escape(scope)}. A small model cannot contradict a large one: a claim that fails on it is not "
        "universal, and one that is reproduced may still fail elsewhere."
    )
    return (
        '<section id="claims"><h2>Published claims, compared with what was measured here</h2>'
        f'<p class="see">{SEE} {within}</p>{claims_table(verdicts)}'
        f'<div class="card">{sentences(findings) or "<p>The study computed no findings.</p>"}</div></section>'
    )


def claims_table(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """A row per claim, a column per setting."""
    if not verdicts:
        return "<p>The study tested no claim.</p>"
    columns = _columns(verdicts)
    models = dict.fromkeys(model for model, _ in columns)
    widths = {model: sum(name == model for name, _ in columns) for model in models}
    top = "".join(f'<th class="new" colspan="{widths[model]}">{escape(model)}</th>' for model in models)
    starts = {next(column for column in columns if column[0] == model) for model in models}
    names = "".join(f"<th{_new((m, d), starts)}>{escape(d)}</th>" for m, d in columns)
    rows = "".join(_row(row, columns, starts) for row in verdicts)
    words = ("agrees with the claim", "differs from it", "cannot tell: the intervals allow both")
    marks = [f"<span><b>{sign}</b>{said}</span>" for (sign, _), said in zip(MARKS.values(), words, strict=True)]
    legend = f'<span class="marks">{"".join(marks)}<span>blank: not tested</span></span>'
    head = f"<tr><th></th>{top}<th></th></tr><tr><th class=left>claim</th>{names}<th class=left>overall</th></tr>"
    whole = f'<table class="verdicts"><thead>{head}</thead><tbody>{rows}</tbody></table>'
    return f'<div class="card">{tabular(whole, legend)}</div>'


def sentences(findings: Sequence[Mapping[str, Any]]) -> str:
    """All findings in words, model by model, folded."""
    groups: dict[str, list[str]] = {}
    for finding in findings:
        differs = ' class="differs"' if finding.get("against_papers") else ""
        where = f'<span class="where">{escape(finding["domain"])}</span>' if finding.get("domain") else ""
        group = finding["model"] or "All models"
        groups.setdefault(group, []).append(f"<li{differs}>{where}{escape(finding['text'])}</li>")
    return "".join(
        f"<details><summary>{escape(name)}: {len(items)} finding{'s' * (len(items) != 1)} with the numbers</summary>"
        f'<ul class="findings">{"".join(items)}</ul></details>'
        for name, items in groups.items()
    )


def _columns(verdicts: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Every setting with its own verdict, grouped by model, in the order of the study."""
    there = dict.fromkeys(
        (c["model"], c["domain"]) for row in verdicts for c in row["cells"] if c["domain"] is not None
    )
    return [column for model in dict.fromkeys(m for m, _ in there) for column in there if column[0] == model]


def _row(row: Mapping[str, Any], columns: Sequence[tuple[str, str]], starts: set[tuple[str, str]]) -> str:
    cells = {(cell["model"], cell["domain"]): cell for cell in row["cells"]}
    parts, i = [], 0
    while i < len(columns):
        model, domain = columns[i]
        whole = cells.get((model, None))
        span = sum(name == model for name, _ in columns) if whole else 1
        parts.append(
            _cell(whole or cells.get((model, domain)), model, None if whole else domain, span, columns[i] in starts)
        )
        i += span
    counted = {kind: sum(cell["verdict"] == kind for cell in row["cells"]) for kind in MARKS}
    said = " ".join(f"{n} {MARKS[kind][0]}" for kind, n in counted.items() if n)
    made = row.get("published", "")
    claim = escape(row["claim"]) + (f"<br><small>{escape(made)}</small>" if made else "")
    tip = f' data-tip="{escape(row["in_all"])}"' if "in_all" in row else ""
    return f'<tr><th>{claim}</th>{"".join(parts)}<td class="count new"{tip}>{said}</td></tr>'


def _cell(cell: Mapping[str, Any] | None, model: str, domain: str | None, span: int, new: bool) -> str:
    wide = f' colspan="{span}"' if span > 1 else ""
    if cell is None:
        return f'<td class="{"new" if new else "none"}"{wide} aria-label="not tested"></td>'
    sign, kind = MARKS[cell["verdict"]]
    where = f"{model} on {domain}" if domain else model
    tip = escape(f"{where}: {cell['verdict']}\n{cell['text']}")
    said = f'data-tip="{tip}" data-csv="{cell["verdict"]}" aria-label="{cell["verdict"]}"'
    return f'<td class="{kind}{" new" if new else ""}"{wide} {said}>{sign}</td>'


def _new(column: tuple[str, str], starts: set[tuple[str, str]]) -> str:
    return ' class="new"' if column in starts else ""
