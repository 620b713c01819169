"""``report(study)``: one page that says what a study found, from its folder alone.

    path = report("study")        # study/report.html: offline, complete, no model needed

The page reads ``summary.json`` and the datasets and pictures beside it, so it can be made again on any machine. It
opens with the findings the study computed (flagged where they speak against the published papers) and an overview.
Then comes each model: RAM maps, where heads look, ablation curves with their controls, agreement of domains; at the
end agreement of scales, methods and limits, and provenance.

It computes no conclusion of its own: findings, tests and effects are those of the summary.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import xarray as xr

from mech.errors import OutputError
from mech.results.store import load
from mech.views import agreement, causal, curves, frontier, heatmap, overlay
from mech.views.drawing.page import escape, page, table, tabs, write

OVERVIEW_FRACTION = 0.05
AGAIN = "run the same `mech study` command again; it computes only what is missing"


@dataclass(frozen=True)
class _Place:
    """One model on one domain: its part of the summary and its datasets."""

    model: str
    domain: str
    facts: Mapping[str, Any]
    folder: Path
    ram: xr.Dataset
    ablation: xr.Dataset
    looks: xr.Dataset
    causal: xr.Dataset | None = None  # studies may leave it out


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
    summary = _summary(study)
    places = _places(study, summary)
    settings = _read_json(study / "study.json") if (study / "study.json").exists() else {}
    try:
        body = _body(summary, places, settings)
    except (KeyError, TypeError) as error:
        raise OutputError(
            f"{study / 'summary.json'} lacks something: {error}", "a summary of schema 1", AGAIN
        ) from error
    return write(study / "report.html", page("Which heads fetch the evidence?", body))


def _summary(study: Path) -> dict[str, Any]:
    summary = _read_json(study / "summary.json")
    if not summary.get("models"):
        raise OutputError(f"{study / 'summary.json'} names no models", "a summary of schema 1", AGAIN)
    return summary


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OutputError(f"{path} is not there or cannot be read", "a finished study", AGAIN) from error
    except ValueError as error:
        raise OutputError(f"{path} is no JSON ({error})", "a finished study", f"delete it and {AGAIN}") from error
    if not isinstance(record, dict):
        raise OutputError(f"{path} holds a {type(record).__name__}", "a JSON object", f"delete it and {AGAIN}")
    return record


def _places(study: Path, summary: Mapping[str, Any]) -> list[_Place]:
    found = []
    for model, of_model in summary["models"].items():
        for domain, facts in of_model.get("domains", {}).items():
            folder = _folder(study, model, domain)
            parts = {kind: _part(folder / f"{kind}.nc") for kind in ("ram", "ablation", "looks")}
            patched = _part(folder / "causal.nc") if "quadrants" in (facts.get("causal") or {}) else None
            found.append(_Place(model, domain, facts, folder, **parts, causal=patched))
    if not found:
        raise OutputError(f"{study / 'summary.json'} names no domains", "at least one model on one domain", AGAIN)
    return found


def _folder(study: Path, model: str, domain: str) -> Path:
    # A model may be named by where it comes from ("reference:llava-m"); its folder then has the last part only.
    names = (model, model.replace(":", "/").rsplit("/", 1)[-1], model.replace("/", "--").replace(":", "--"))
    candidates = [study / name / domain for name in names]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise OutputError(f"{candidates[0]} is not there", f"the results of {model} on {domain}", AGAIN)


def _part(path: Path) -> xr.Dataset:
    if not path.exists():
        raise OutputError(f"{path} is not there", "a finished study", AGAIN)
    return load(path)


def _body(summary: Mapping[str, Any], places: list[_Place], settings: Mapping[str, Any]) -> str:
    models = summary["models"]
    links = [("findings", "Findings"), ("overview", "Overview")]
    links += [(f"model-{i}", name) for i, name in enumerate(models)]
    links += [("sparse", "Sparse inference")] if summary.get("acceleration") else []
    links += [("scales", "Scales")] if len(models) > 1 else []
    links += [("methods", "Methods and limits"), ("provenance", "Provenance")]
    nav = "".join(f'<a href="#{key}">{escape(name)}</a>' for key, name in links)
    sections = [_masthead(summary, places), _findings(summary), _overview(places), _baselines(summary, places)]
    sections += [
        _model(i, name, facts, [place for place in places if place.model == name])
        for i, (name, facts) in enumerate(models.items())
    ]
    if summary.get("acceleration"):
        sections.append(_sparse(summary["acceleration"]))
    if len(models) > 1:
        sections.append(_scales(summary, places))
    prose = files("mech.views.report").joinpath("methods.html").read_text(encoding="utf-8")
    sections.append(f'<section id="methods"><h2>Methods and limits</h2><div class="card">{prose}</div></section>')
    sections.append(_provenance(summary, settings))
    return f'{sections[0]}<nav class="contents"><div>{nav}</div></nav>{"".join(sections[1:])}'


def _masthead(summary: Mapping[str, Any], places: list[_Place]) -> str:
    domains = dict.fromkeys(place.domain for place in places)
    record = summary.get("provenance", {})
    versions = _first(record, "versions") or {}
    wanted = ("mech", "torch", "transformers")
    facts = {
        "models": ", ".join(summary["models"]),
        "domains": ", ".join(domains),
        "samples that find heads": _span(place.facts["n_find"] for place in places),
        "samples that test them": _span(place.facts["n_test"] for place in places),
        "made": str(_first(record, "date") or "not recorded").split("T")[0],
        "versions": " · ".join(f"{name}\u00a0{versions[name]}" for name in wanted if name in versions)
        or "not recorded",
    }
    items = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return (
        "<header><h1>Which attention heads fetch the visual evidence, and does the answer need them?</h1>"
        "<p class=soft>Heads are ranked by how much of the question's attention they put on the evidence. Then they "
        "are removed, and the right answers are counted again, beside random heads as a control.</p>"
        f'<dl class="facts">{items}</dl></header>'
    )


def _findings(summary: Mapping[str, Any]) -> str:
    found = summary.get("findings", [])
    if not found:
        return '<section id="findings"><h2>Findings</h2><p>The study computed no findings.</p></section>'
    details = []
    for model in dict.fromkeys(finding["model"] for finding in found if finding["model"]):
        of_model = [finding for finding in found if finding["model"] == model]
        details.append(
            f"<details><summary>{escape(model)}: {len(of_model)} findings with their numbers</summary>"
            f"{_sentences(of_model, ('domain',))}</details>"
        )
    note = '<p class="soft">Computed from the numbers below by fixed rules. A place is a model on a domain.</p>'
    top = _sentences(summary.get("headlines", found), ("model", "domain"))
    return f'<section id="findings"><h2>Findings</h2>{note}{top}{"".join(details)}</section>'


def _sentences(findings: list[Mapping[str, Any]], placed_by: tuple[str, ...]) -> str:
    items = []
    for finding in findings:
        against = bool(finding.get("against_papers"))
        where = " · ".join(escape(finding[key]) for key in placed_by if finding.get(key))
        badge = '<span class="badge">against the papers</span>' if against else ""
        place = f'<span class="where">{where}</span>' if where else ""
        items.append(f"<li{' class=against' if against else ''}>{badge}{place}{escape(finding['text'])}</li>")
    return f'<ol class="findings">{"".join(items)}</ol>'


def _overview(places: list[_Place]) -> str:
    found = {f"{place.model} · {place.domain}": curves.effects(place.ablation, "accuracy") for place in places}
    everything = [effect for effects in found.values() for effect in effects]
    panels = {
        curves.METHODS.get(method, method): curves.overview(found, method, OVERVIEW_FRACTION)
        for method in curves.methods(everything)
    }
    body = tabs(panels, "method of ablation") if panels else "<p>Nothing was ablated.</p>"
    return (
        f'<section id="overview"><h2>Overview: without about {OVERVIEW_FRACTION:.0%} of the heads</h2>'
        '<p class="soft">Accuracy on the test samples. The ranking matters where the diamond lies left of the shaded '
        "random sets of the same size.</p>"
        f'<div class="card">{curves.legend(everything)}{body}</div></section>'
    )


def _baselines(summary: Mapping[str, Any], places: list[_Place]) -> str:
    rows = []
    for place in places:
        facts, model = place.facts, summary["models"][place.model]
        best = facts["ranking"][0]
        rows.append(
            [
                f"{escape(place.model)}<br><small>{escape(place.domain)}</small>",
                f"{model['n_layers']} × {model['n_heads']}",
                str(facts["n_find"]),
                str(facts["n_test"]),
                _percent(facts["baseline"]["accuracy"]),
                _number(facts["baseline"]["logit_diff"]),
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
    body = table(head, rows, note)
    return f'<section id="baseline"><h3>The models as they are</h3><div class="card">{body}</div></section>'


def _model(i: int, name: str, facts: Mapping[str, Any], places: list[_Place]) -> str:
    n_layers, n_heads = facts["n_layers"], facts["n_heads"]
    panels = {place.domain: _domain(place) for place in places}
    together = ""
    if len(facts.get("agreement", {}).get("domains", [])) > 1:
        together = (
            "<h3>Do the domains agree?</h3><div class=card>"
            f"{agreement.domain_agreement(facts['agreement'])}"
            "<p class=soft>A high correlation means that the whole map looks alike; the overlap says whether the top "
            "heads are <i>the same heads</i>. Chance: the overlap expected of two random sets of that size.</p></div>"
        )
    family = f"{escape(facts['family'])}, " if facts.get("family") else ""
    return (
        f'<section id="model-{i}"><h2>{escape(name)}</h2><p class="soft">{family}{n_layers} layers × {n_heads} heads = '
        f"{n_layers * n_heads} heads</p>{tabs(panels, f'domain of {name}')}{together}</section>"
    )


def _domain(place: _Place) -> str:
    maps = heatmap.map_and_ranks(heatmap.head_scores(place.ram))
    panels = {}
    for measure in curves.MEASURES:
        if bool(place.ablation[measure].isnull().all()):  # no sample has a counterfactual
            continue
        found = curves.effects(place.ablation, measure)
        panels[measure.replace("logit_diff", "logit difference")] = curves.method_panels(found, measure)
    legend = curves.legend(curves.effects(place.ablation, "accuracy"))
    parts = {
        "Which heads look at the evidence": maps,
        "Where they look": overlay.look_articles(place.looks, place.folder),
        "What removing them does": f"{legend}{tabs(panels, 'measure')}{_effects_table(place.facts)}",
    }
    if "scores" in place.facts:
        found = place.facts["scores"]
        parts["Do the scores of the literature name the same heads?"] = (
            f"{agreement.domain_agreement(found, 'score')}<p class=soft>Small: 95% intervals over samples, and the "
            f"overlap that two random sets of {found['n_top']} heads have. What each score is stands in the guide.</p>"
        )
    if place.causal is not None:
        parts["Does looking mean mattering?"] = causal.causal_card(place.causal, place.facts["causal"])
    return "".join(f'<h3>{title}</h3><div class="card">{part}</div>' for title, part in parts.items())


def _effects_table(facts: Mapping[str, Any]) -> str:
    """Drop of accuracy of every band, with the test of top against random."""
    rows_of: dict[tuple[str, float], dict[str, Mapping[str, Any]]] = {}
    for entry in facts["ablation"]:
        rows_of.setdefault((entry["method"], entry["fraction"]), {})[entry["band"]] = entry
    tests = {(test["method"], test["fraction"]): test for test in facts.get("tests", [])}
    bands = curves.in_order(band for row in rows_of.values() for band in row)
    rows = []
    for (method, fraction), row in rows_of.items():
        heads = next(iter(row.values()))["n_heads"]
        test = tests.get((method, fraction))
        p = "–" if test is None else f"{_p(test['p_adjusted'])} <small>({_p(test['p_value'])})</small>"
        drops = [_points(row[band]["accuracy_drop"]) if band in row else "–" for band in bands]
        rows.append([f"{escape(method)}, {fraction:.3g}", str(heads), *drops, p])
    names = [escape(band.replace("_", "-")) for band in bands]
    head = ["method, share", "heads", *names, "p top vs random"]
    caption = "Drop of accuracy in percentage points, paired, with 95% intervals. p: corrected (as computed)."
    return f"<details><summary>All effects as a table</summary>{table(head, rows, caption)}</details>"


def _sparse(accelerated: Mapping[str, Any]) -> str:
    """How few heads can see everything, model by model; those of long contexts first."""
    order = sorted(accelerated.items(), key=lambda one: -one[1]["length"])
    panels = {f"{name} ({facts['length']} tokens)": frontier.frontier_card(facts) for name, facts in order}
    return (
        '<section id="sparse"><h2>Sparse inference: how few heads can see everything?</h2>'
        '<p class="soft">A few KV heads attend to the whole prompt, the others to its first tokens and those nearby. '
        "Which heads stay dense is chosen on samples that do not test them, in several ways, at equal cost.</p>"
        f'<div class="card">{tabs(panels, "model")}</div></section>'
    )


def _scales(summary: Mapping[str, Any], places: list[_Place]) -> str:
    depth = {name: facts["n_layers"] for name, facts in summary["models"].items()}
    by_domain: dict[str, dict[str, Any]] = {}
    for place in places:
        by_domain.setdefault(place.domain, {})[place.model] = place.facts["ranking"]
    panels = {domain: agreement.depth_profile(rankings, depth) for domain, rankings in by_domain.items()}
    numbers = agreement.facts_table(summary.get("scales") or {})
    details = f"<details><summary>Agreement between scales in numbers</summary>{numbers}</details>" if numbers else ""
    return (
        '<section id="scales"><h2>Scales: are the retrieval heads at the same depth?</h2>'
        '<p class="soft">Where in the network the mass lies, so that models of different depth can be compared. '
        "1 means as much as an even spread over the layers.</p>"
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
        '<p class="soft">What made these numbers: enough to make them again.</p>'
        f'<div class="card">{body}</div></section>'
    )


def _first(record: Any, key: str) -> Any:
    """The first value under this key, however deep it lies."""
    if isinstance(record, Mapping):
        if record.get(key):
            return record[key]
        record = list(record.values())
    if isinstance(record, list):
        return next((found for inner in record if (found := _first(inner, key))), None)
    return None


def _span(numbers: Any) -> str:
    known = sorted(set(numbers))
    return f"{known[0]} in each domain" if len(known) == 1 else f"{known[0]} to {known[-1]} in a domain"


def _percent(interval: Mapping[str, float | None]) -> str:
    return _with_interval(interval, lambda value: f"{value:.1%}")


def _points(interval: Mapping[str, float | None]) -> str:
    return _with_interval(interval, lambda value: f"{100 * value:.1f}")


def _number(interval: Mapping[str, float | None] | None) -> str:
    return _with_interval(interval, lambda value: f"{value:.2f}")


def _with_interval(interval: Mapping[str, float | None] | None, shown: Callable[[float], str]) -> str:
    """A mean with its interval; JSON has null for what could not be computed (one sample has no interval)."""
    if interval is None:  # no counterfactual: no logit difference
        return "–"
    mean, low, high = (interval[key] for key in ("mean", "low", "high"))
    if mean is None:
        return "–"
    if low is None or high is None:
        return shown(mean)
    return f"{shown(mean)} <small>[{shown(low)}, {shown(high)}]</small>"


def _p(value: float | None) -> str:
    return "–" if value is None else "&lt; 0.001" if value < 0.001 else f"{value:.3f}"
