"""``report(study)``: one page that says what a study found, from its folder alone.

    path = report("study")        # study/report.html: offline, complete, no model needed

The page is made from ``summary.json`` and the datasets and pictures next to it, so it can be made again on any machine.
Its first screen holds one picture, one curve and three answers; then a matrix of claims and settings (a setting is a
model on a domain) says where the literature is right. Below follow the settings side by side and each model with its
heads, and finally agreement of scales, methods and limits, and provenance. Details are folded.

The page draws no conclusions: findings, verdicts, tests and effects come from the summary. A summary of an older
version has no verdicts and no pooled numbers; they are computed from its numbers, as the study would compute them.
"""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import xarray as xr

from mech.arguments import checking
from mech.errors import MechError, OutputError
from mech.experiments.findings.cautions import KINDS as CAUTIONS
from mech.experiments.findings.detectable import detectable
from mech.experiments.findings.pooled import pooled
from mech.experiments.findings.verdicts import verdicts
from mech.views import agreement, curves, frontier
from mech.views.drawing.page import escape, page, table, tabs, write
from mech.views.report.first import first_screen
from mech.views.report.folder import AGAIN, Setting, read_forms, read_json, read_settings, read_summary
from mech.views.report.forms import forms_section
from mech.views.report.heads import PANEL
from mech.views.report.matrix import matrix
from mech.views.report.models import model_section
from mech.views.report.numbers import number, percent

OVERVIEW_FRACTION = 0.05


@checking(OutputError)
def report(study_folder: str | Path) -> Path:
    """Write ``report.html`` into the study folder.

    Args:
        study_folder: a finished study (``summary.json`` and the results it names).

    Returns:
        The path of the page.

    Raises:
        OutputError: a part of the study is missing or cannot be read, or the page cannot be written.
    """
    study = Path(study_folder)
    summary = read_summary(study)
    record = read_json(study / "study.json") if (study / "study.json").exists() else {}
    try:
        body = _body(summary, read_settings(study, summary), record, read_forms(study, summary))
    except MechError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # missing or unexpected entries
        raise OutputError(
            f"{study / 'summary.json'} lacks something: {error}", "a summary of schema 1", AGAIN
        ) from error
    return write(study / "report.html", page("Which heads retrieve the evidence?", body))


def _body(
    summary: Mapping[str, Any],
    settings: Sequence[Setting],
    record: Mapping[str, Any],
    forms: Mapping[str, Mapping[str, xr.Dataset]],
) -> str:
    models = summary["models"]
    links = [("first", "Summary"), ("claims", "Claims"), ("overview", "Settings")]
    links += [(f"model-{i}", name) for i, name in enumerate(models)]
    links += [("forms", "Pictures and text")] if forms else []
    links += [("sparse", "Sparse inference")] if summary.get("acceleration") else []
    links += [("scales", "Scales")] if len(models) > 1 else []
    links += [("methods", "Methods and limits"), ("provenance", "Provenance")]
    nav = "".join(f'<a href="#{key}">{escape(name)}</a>' for key, name in links)
    short = summary.get("pooled") or pooled(summary, {(one.model, one.domain): one.ram for one in settings})
    told = summary.get("verdicts") or verdicts(summary)
    sections = [
        _masthead(summary, settings),
        f'<nav class="contents" aria-label="Contents"><div>{nav}</div></nav>',
        _limits(summary),
        first_screen(short, settings),
        matrix(told, summary.get("findings", []), str(summary.get("scope", "the settings of this study"))),
        _overview(settings),
        _baselines(summary, settings),
    ]
    numbered = list(enumerate(settings))
    sections += [
        model_section(i, name, facts, [(key, one) for key, one in numbered if one.model == name])
        for i, (name, facts) in enumerate(models.items())
    ]
    if forms:
        sections.append(forms_section(forms, models))
    if summary.get("acceleration"):
        sections.append(_sparse(summary["acceleration"]))
    if len(models) > 1:
        sections.append(_scales(summary, settings))
    prose = files("mech.views.report").joinpath("methods.html").read_text(encoding="utf-8")
    sections.append(f'<section id="methods"><h2>Methods and limits</h2><div class="card">{prose}</div></section>')
    return "".join([*sections, _provenance(summary, record), PANEL])


def _masthead(summary: Mapping[str, Any], settings: Sequence[Setting]) -> str:
    domains = dict.fromkeys(setting.domain for setting in settings)
    record = summary.get("provenance", {})
    versions = _first(record, "versions") or {}
    made = str(_first(record, "date") or "date not recorded").split("T")[0]
    wanted = ("mech", "torch", "transformers")
    with_versions = [f"{name} {versions[name]}" for name in wanted if name in versions]
    facts = [
        f"{', '.join(summary['models'])} on {', '.join(domains)}",
        f"heads found on {_span(setting.facts['n_find'] for setting in settings)}",
        f"tested on {_span(setting.facts['n_test'] for setting in settings)}",
        " · ".join([made, *with_versions]),
    ]
    return (
        "<header><h1>Which heads retrieve the visual evidence, and does the answer need them?</h1>"
        f'<p class="soft">{"; ".join(escape(fact) for fact in facts)}</p></header>'
    )


def _limits(summary: Mapping[str, Any]) -> str:
    """The limits of all that follows: the first sentence is shown, the rest unfolds."""
    power = (summary.get("detectable") or detectable(summary))["text"]
    said = [*power.replace(". ", ".\n").splitlines()]
    said += [finding["text"] for finding in summary.get("headlines", []) if finding.get("kind") in CAUTIONS]
    if not said:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in said[1:])
    more = f"<ul>{items}</ul>" if items else ""
    return f'<details id="limits" class="card"><summary><b>Read first</b> {escape(said[0])}</summary>{more}</details>'


def _overview(settings: Sequence[Setting]) -> str:
    found = {f"{one.model} · {one.domain}": curves.effects(one.ablation, "accuracy") for one in settings}
    everything = [effect for effects in found.values() for effect in effects]
    panels = {
        curves.METHODS.get(method, method): curves.overview(found, method, OVERVIEW_FRACTION)
        for method in curves.methods(everything)
    }
    body = tabs(panels, "method of ablation") if panels else "<p>No heads were ablated.</p>"
    return (
        f'<section id="overview"><h2>Each setting without about {OVERVIEW_FRACTION:.0%} of the heads</h2>'
        '<p class="see">The ranking matters where the diamond lies to the left of the shaded random sets; the bar is '
        "the model with all of its heads.</p>"
        f'<div class="card">{curves.overview_legend(everything)}{body}</div></section>'
    )


def _baselines(summary: Mapping[str, Any], settings: Sequence[Setting]) -> str:
    rows = []
    for setting in settings:
        facts, model = setting.facts, summary["models"][setting.model]
        best = facts["ranking"][0]
        rows.append(
            [
                f"{escape(setting.model)}<br><small>{escape(setting.domain)}</small>",
                f"{model['n_layers']} × {model['n_heads']}",
                str(facts["n_find"]),
                str(facts["n_test"]),
                percent(facts["baseline"]["accuracy"]),
                number(facts["baseline"]["logit_diff"]),
                f"L{int(best[0])}H{int(best[1])} <small>({best[2]:.2f})</small>",
                f"{facts['half_mass_share']:.1%}",
            ]
        )
    head = [
        "model, domain",
        "layers × heads",
        "n find",
        "n test",
        "accuracy",
        "logit difference",
        "top head (RAM)",
        "half of all RAM in",
    ]
    note = "In brackets: 95% intervals. Last column: the smallest share of heads that together hold half of all RAM."
    folded = f"<details><summary>The models without ablation</summary>{table(head, rows, note)}</details>"
    return f'<section id="baseline" class="card">{folded}</section>'


def _sparse(accelerated: Mapping[str, Any]) -> str:
    """How few heads can see everything, model by model, those with the longest contexts first."""
    order = sorted(accelerated.items(), key=lambda one: -one[1]["length"])
    panels = {f"{name} ({facts['length']} tokens)": frontier.frontier_card(facts) for name, facts in order}
    return (
        '<section id="sparse"><h2>Sparse inference: how few heads need to see everything?</h2>'
        '<p class="see">A few KV heads attend to the whole prompt, the others to its first and nearby tokens. A choice '
        "of dense heads is good if its line reaches the dotted line of the dense model with few heads, and the choice "
        "matters where its line leaves the shaded band of random sets of equal cost.</p>"
        f'<div class="card">{tabs(panels, "model")}</div></section>'
    )


def _scales(summary: Mapping[str, Any], settings: Sequence[Setting]) -> str:
    depth = {name: facts["n_layers"] for name, facts in summary["models"].items()}
    by_domain: dict[str, dict[str, Any]] = {}
    for one in settings:
        by_domain.setdefault(one.domain, {})[one.model] = one.facts["ranking"]
    panels = {domain: agreement.depth_profile(rankings, depth) for domain, rankings in by_domain.items()}
    numbers = agreement.facts_table(summary.get("scales") or {})
    details = f"<details><summary>Agreement between scales in numbers</summary>{numbers}</details>" if numbers else ""
    return (
        '<section id="scales"><h2>Scales: are the retrieval heads at the same depth?</h2>'
        '<p class="see">Models whose lines coincide retrieve at the same relative depth; 1 means as much RAM as if it '
        "were spread evenly over the layers.</p>"
        f'<div class="card">{tabs(panels, "domain")}{details}</div></section>'
    )


def _provenance(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    parts = [("of the summary", summary.get("provenance") or {}), ("of the study (study.json)", settings)]
    body = "".join(
        f"<details><summary>Record {name}</summary>{agreement.facts_table(record) or '<p>Empty.</p>'}</details>"
        for name, record in parts
    )
    return (
        '<section id="provenance"><h2>Provenance</h2>'
        '<p class="soft">Everything needed to reproduce these numbers.</p>'
        f'<div class="card">{body}</div></section>'
    )


def _first(record: Any, key: str) -> Any:
    """The first value under this key, at any depth."""
    if isinstance(record, Mapping):
        if record.get(key):
            return record[key]
        record = list(record.values())
    if isinstance(record, list):
        return next((found for inner in record if (found := _first(inner, key))), None)
    return None


def _span(numbers: Any) -> str:
    known = sorted(set(numbers))
    return f"{known[0]} samples per domain" if len(known) == 1 else f"{known[0]} to {known[-1]} samples per domain"
