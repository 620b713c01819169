"""The part of the report about one model: its heads, where they attend, and what happens without them.

For each domain the map of heads and the table of the top ones are open; the rest is folded, each part under a line that
says what is in it, and starts with a sentence that says what to look for.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mech.results.schema import map_facts
from mech.views import agreement, causal, curves, heatmap, overlay
from mech.views.drawing.page import escape, table, tabs
from mech.views.report.folder import Setting
from mech.views.report.heads import head_data, top_table
from mech.views.report.numbers import in_points, p_value


def model_section(i: int, name: str, facts: Mapping[str, Any], settings: Sequence[tuple[int, Setting]]) -> str:
    """Everything about one model.

    Args:
        i: number of the model.
        name: its name.
        facts: its part of the summary.
        settings: its settings, each with its number in the study.
    """
    n_layers, n_heads = facts["n_layers"], facts["n_heads"]
    panels = {setting.domain: _domain(key, setting) for key, setting in settings}
    together = ""
    if len(facts.get("agreement", {}).get("domains", [])) > 1:
        together = (
            '<h3>Do the domains agree?</h3><p class="see">A high correlation means that the whole maps are alike; the '
            "overlap shows whether the top heads are <i>the same heads</i>. Chance: the expected overlap of two random "
            f"sets of that size.</p><div class=card>{agreement.domain_agreement(facts['agreement'])}</div>"
        )
    family = f"{escape(facts['family'])}, " if facts.get("family") else ""
    return (
        f'<section id="model-{i}"><h2>{escape(name)}</h2><p class="soft">{family}{n_layers} layers × {n_heads} heads = '
        f"{n_layers * n_heads} heads</p>{tabs(panels, f'domain of {name}')}{together}</section>"
    )


def _domain(key: int, setting: Setting) -> str:
    parts = [
        ("Where they attend", "on a few questions", _attending(key, setting)),
        ("What removing them costs", "by method and band of heads", _removing(setting)),
    ]
    if setting.causal is not None:
        parts.append(("Does attention imply causal effect?", "RAM against causal effect", _mattering(setting)))
    if "scores" in setting.facts:
        parts.append(
            ("Do other published scores name the same heads?", "rank agreement", _scores(setting.facts["scores"]))
        )
    folded = "".join(
        f'<details class="fold"><summary>{title}<small>{of}</small></summary>{body}</details>'
        for title, of, body in parts
    )
    return (
        f'<p class="see">{_see_map(setting)}</p><div class="card" data-heads="{key}">'
        f"{heatmap.map_and_ranks(heatmap.head_scores(setting.ram))}{_tenths(key, setting)}{top_table(setting, key)}"
        f"{head_data(setting, key)}{folded}</div>"
    )


def _tenths(key: int, setting: Setting) -> str:
    """A row of pictures, from the first heads of the ranking to the last."""
    row = overlay.tenths(setting.maps, setting.folder)
    if not row:  # a study of an earlier version
        return ""
    facts = map_facts(setting.maps)[setting.maps.sizes["example"] // 2]
    several = ", on the picture that holds the evidence" if len(facts["pictures"]) > 1 else ""
    see = (
        f"From high to low RAM: the middle head of each tenth of the ranking on one sample{several}, "
        f"“{escape(facts['question'])}” Outlined: the evidence; <i>here</i>: the share of the head's attention on it."
    )
    return f'<div id="tenths-{key}"><p class="see">{see}</p>{row}</div>'


def _see_map(setting: Setting) -> str:
    facts = setting.facts
    layer, head, score = facts["ranking"][0]
    n, even = len(facts["ranking"]), float(setting.ram["size_null"].mean())
    half = round(facts["half_mass_share"] * n)
    times = f", {score / even:.0f} times what even attention gives" if even > 0 else ""
    return (
        f"Few dark cells mean that few heads attend to the evidence: here {half} of {n} heads hold half of all RAM, "
        f"and L{int(layer)}H{int(head)} leads with {score:.2f}{times}. Click a cell to open the page of that head."
    )


def _attending(key: int, setting: Setting) -> str:
    see = (
        "Samples are ordered from low to high RAM of the top heads. Each head's attention is drawn from one named "
        "query: the token at which it decides (with the share of the answer lost there), or the question if it decides "
        "nothing. A head retrieves if its bright tokens lie inside the outline, question after question; a head that "
        "is bright at the same place in every picture does not."
    )
    return f'<p class="see">{see}</p><div id="maps-{key}">{overlay.map_articles(setting.maps, setting.folder)}</div>'


def _removing(setting: Setting) -> str:
    panels = {}
    for measure in curves.MEASURES:
        if bool(setting.ablation[measure].isnull().all()):  # no sample has a counterfactual
            continue
        found = curves.effects(setting.ablation, measure)
        panels[measure.replace("logit_diff", "logit difference")] = curves.method_panels(found, measure)
    legend = curves.legend(curves.effects(setting.ablation, "accuracy"))
    see = (
        "The ranking matters where the top line lies below the shaded band of random sets of the same size; where "
        "methods disagree, the cost also depends on the method."
    )
    return f'<p class="see">{see}</p>{legend}{tabs(panels, "measure")}{_effects_table(setting.facts)}'


def _mattering(setting: Setting) -> str:
    see = (
        "If RAM predicted what a head does, the points would rise to the right; heads at the upper left are needed "
        "without attending to the evidence."
    )
    assert setting.causal is not None  # called only where there is one
    return f'<p class="see">{see}</p>{causal.causal_card(setting.causal, setting.facts["causal"])}'


def _scores(found: Mapping[str, Any]) -> str:
    see = (
        "Dark cells are pairs of scores that order heads alike. In small print: 95% intervals over samples, and the "
        f"expected overlap of two random sets of {found['n_top']} heads. The guide explains each score."
    )
    return f'<p class="see">{see}</p>{agreement.domain_agreement(found, "score")}'


def _both(test: Mapping[str, Any]) -> str:
    """The p-value of a claim, and the two it is made of: over samples and over sets."""
    if "p_samples" not in test:  # a study of an earlier version: over samples only
        return f"{p_value(test['p_adjusted'])} <small>({p_value(test['p_value'])}, over samples only)</small>"
    star = "*" if test.get("primary") else ""
    return (
        f"{p_value(test['p_adjusted'])}{star} <small>({p_value(test['p_samples'])}, {p_value(test['p_sets'])})</small>"
    )


def _effects_table(facts: Mapping[str, Any]) -> str:
    """Drop in accuracy for every band, with the test of top against random."""
    rows_of: dict[tuple[str, float], dict[str, Mapping[str, Any]]] = {}
    for entry in facts["ablation"]:
        rows_of.setdefault((entry["method"], entry["fraction"]), {})[entry["band"]] = entry
    tests = {(test["method"], test["fraction"]): test for test in facts.get("tests", [])}
    bands = curves.in_order(band for row in rows_of.values() for band in row)
    rows = []
    for (method, fraction), row in rows_of.items():
        heads = next(iter(row.values()))["n_heads"]
        test = tests.get((method, fraction))
        p = "–" if test is None else _both(test)
        drops = [in_points(row[band]["accuracy_drop"]) if band in row else "–" for band in bands]
        rows.append([f"{escape(method)}, {fraction:.3g}", str(heads), *drops, p])
    names = [escape(band.replace("_", "-")) for band in bands]
    head = ["method, share", "heads", *names, "p top vs random"]
    caption = (
        "Drop in accuracy in percentage points, paired, with 95% intervals. p: corrected (before correction: over "
        "samples, over sets); *: the primary test."
    )
    return f"<details><summary>All effects as a table</summary>{table(head, rows, caption)}</details>"
