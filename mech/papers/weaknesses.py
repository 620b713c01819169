"""Nine weaknesses of arXiv 2606.05843, each measured: a function of a ``Bench``, by name in ``WEAKNESSES``."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist

import mech.sparse.localize as sparse
from mech.data.regions import Box, Frames, Pages, Region
from mech.data.samples import Sample, Samples
from mech.errors import ExperimentError
from mech.experiments.effects import both_units, p_is, points
from mech.experiments.findings import literature
from mech.experiments.findings.literature import published
from mech.experiments.findings.words import MATTERS, TOP
from mech.experiments.metrics import ask, quiz
from mech.experiments.power import ALPHA
from mech.experiments.ranking.agreement import agreement, sample_curve
from mech.experiments.ranking.ranking import Heads, Ranking, rank_heads
from mech.experiments.scores.coverage import key_coverage
from mech.experiments.scores.measure import Score, head_scores
from mech.experiments.scores.ram import evidence_mass, retrieval_attention_mass
from mech.experiments.scores.sinks import attention_sinks
from mech.experiments.statistics import holm, mean_of, spearman
from mech.interventions import METHODS, Ablate, intervene, reference_activations
from mech.papers.bench import Bench, Point, beyond_random, drop, heads_in
from mech.papers.boxes import published_tokens, simulated_iou
from mech.papers.tags import TAGS, tag_leak

ABLATED = {"Qwen3-VL-4B": (30, 36 * 32), "LLaVA-OneVision-7B": (30, 28 * 28)}  # heads in the largest set, heads in all
ON_TWO = published("2606.05843", literature.ABLATED)  # where heads were ablated
ON_THREE = published("2606.05843", literature.FASTER)  # where heads were kept dense


def never_ablated(bench: Bench) -> Point:
    """The "top 5%" against the largest sets that were ablated: 30 heads, 2.6% and 3.8%."""
    rows = []
    for share in sorted({*(k / n for k, n in ABLATED.values()), TOP, 2 * TOP}):
        top, random = bench.band("top", share), bench.band("random", share)
        rows.append({
            "share": share, "n_heads": bench.ranking.count(share), "top": drop(top).as_dict(),
            "random": drop(random).as_dict(), **beyond_random(top, random),
        })  # fmt: skip
    five = next(row for row in rows if row["share"] == TOP)
    sizes = ", ".join(f"{k} of {n} heads ({k / n:.1%})" for k, n in ABLATED.values())
    costs = "; ".join(f"{row['share']:.1%} ({heads_in(row['n_heads'])}) {points(row['top'])}" for row in rows)
    needed = five["p_value"] < ALPHA
    text = (
        f"The largest published ablated sets hold {sizes}, not 5%. Here, by size: {costs}. The top 5% "
        f"{'cost' if needed else 'are not shown to cost'} more than the same number of random other heads "
        f"({points(five['random'])}; {both_units(five)}; a claim needs both below {ALPHA:g})."
    )
    claim = "The top 5% of the heads are necessary (largest ablated set: 30 heads)."
    holds = True if needed else False if five["top"]["high"] < MATTERS else None  # not shown is not refuted
    return Point("top-5%", claim, text, {"published": ABLATED, "sizes": rows}, holds, published=ON_TWO)


def low_ranked(bench: Bench) -> Point:
    """Bottom heads against the same number of random heads."""
    rows = []
    for share in (0.026, TOP, 0.2):
        bottom, random = drop(bench.band("bottom", share)), drop(bench.band("random", share))
        rows.append({"share": share, "n_heads": bench.ranking.count(share), "bottom": bottom.as_dict(),
                     "random": random.as_dict()})  # fmt: skip
    worst = max(rows, key=lambda row: row["bottom"]["mean"])
    matters = worst["bottom"]["low"] > 0 and worst["bottom"]["mean"] >= MATTERS
    costs = "; ".join(f"{heads_in(r['n_heads'])} {points(r['bottom'])}, random {points(r['random'])}" for r in rows)
    text = f"Without the lowest-ranked heads accuracy falls by: {costs}. " + (
        "Low-ranked heads matter." if matters else "No set of them is shown to cost five points."
    )
    claim = "Lower-ranked heads have minimal effect (the paper's own figure: bottom 30 cost about 13 points)."
    harmless = all(row["bottom"]["high"] < MATTERS for row in rows)
    return Point("low-ranked", claim, text, {"sizes": rows}, False if matters else True if harmless else None,
                 published=ON_TWO)  # fmt: skip


def box_to_tokens(bench: Bench) -> Point:
    """The published formula from a box to tokens, by simulation and by its effect on RAM here."""
    iou, area = simulated_iou()
    thirds = np.digitize(area, np.quantile(area, [1 / 3, 2 / 3]))
    numbers: dict[str, Any] = {
        "n": len(iou), "mean_iou": float(iou.mean()), "right": float((iou == 1).mean()),
        "by_size": {name: float(iou[thirds == i].mean()) for i, name in enumerate(("small", "medium", "large"))},
    }  # fmt: skip
    sizes = ", ".join(f"{name} {value:.2f}" for name, value in numbers["by_size"].items())
    text = (
        f"Over {len(iou)} random boxes the tokens of the published formula overlap with the right ones by "
        f"{iou.mean():.2f} (mean IoU; {sizes}), and are right for {numbers['right']:.1%} of them."
    )
    wrong = _ram_by_formula(bench)
    if wrong is not None:
        k = bench.ranking.count(TOP)
        numbers["here"] = {
            "spearman": spearman(wrong.mean, bench.ranking.mean),
            "top_shared": len(set(wrong.top(k)) & set(bench.ranking.top(k))), "n_top": k,
            "ram_of_top": [float(np.mean([_of(r, h) for h in bench.ranking.top(k)])) for r in (bench.ranking, wrong)],
        }  # fmt: skip
        here = numbers["here"]
        text += (
            f" With its tokens, RAM of the top {heads_in(k)} is {here['ram_of_top'][1]:.2f} instead of "
            f"{here['ram_of_top'][0]:.2f}, {here['top_shared']} of them stay on top, and the rankings correlate by "
            f"{here['spearman']:.2f}."
        )
    claim = "The tokens of a box are its patches, flattened row by row and divided by four."
    return Point("box-to-tokens", claim, text, numbers, bool(iou.mean() > 0.95))


def boundary_tags(bench: Bench) -> Point:
    """Tags around the evidence that stay in the prompt."""
    if any(sample.video for sample in bench.test):
        text = "Not measured: tags inside a video are not plain text of the prompt."
        return Point("boundary-tags", _TAGS_CLAIM, text, {"reason": text}, decides=False)
    found = tag_leak(bench.model, bench.test, seed=bench.seed)
    leak = found["leak"].mean("example")
    top = bench.ranking.top(TOP)
    of_top = mean_of(np.mean([found["leak"].sel(layer=layer, head=head).values for layer, head in top], axis=0)[None])
    by = [rank_heads(found, name) for name in ("plain", "tagged")]
    k = by[0].count(TOP)
    most = Ranking(leak.values, score="leak", layers=bench.ranking.layers).heads[0]
    right = [float(found[name].mean()) for name in ("right_plain", "right_tagged")]
    numbers = {
        "tags": list(TAGS), "leak_of_top": of_top.as_dict(), "largest": [*most, float(leak.max())],
        "spearman": spearman(by[0].mean, by[1].mean), "top_shared": len(set(by[0].top(k)) & set(by[1].top(k))),
        "n_top": k, "right": right,
    }  # fmt: skip
    leaks = of_top.low > 0
    alone = all(len(sample.images) == 1 for sample in bench.test)
    among = "Among pictures of other samples, with" if alone else "With"
    text = (
        f"{among} a null question ('N/A'), tags change the top heads' mass on the evidence by "
        f"{of_top.mean:+.3f} [{of_top.low:+.3f}, {of_top.high:+.3f}], that of {most} by {float(leak.max()):+.3f}; "
        f"rankings with and without tags correlate by {numbers['spearman']:.2f} and share {numbers['top_shared']} of "
        f"their top {k}; right answers go from {right[0]:.0%} to {right[1]:.0%}. "
        + ("The tags leak." if leaks else "No leak is shown.")
    )
    return Point("boundary-tags", _TAGS_CLAIM, text, numbers, False if leaks else None)


_TAGS_CLAIM = "Tags that mark the evidence may stay in the prompt while heads are scored."


def off_distribution(bench: Bench) -> Point:
    """How far from any natural output of the heads is what each ablation makes them put out?"""
    model, top = bench.model, bench.ranking.top(TOP)
    names = [f"blocks.{layer}.attn.hook_z" for layer in sorted({layer for layer, _ in top})]

    def outputs(samples: Samples, to: str = "") -> np.ndarray:
        """z of the top heads at the question's rows: [row, head * d_head]."""
        rows = []
        for sample in samples:
            inputs = model.inputs_of(sample)
            if to:
                with intervene(model, Ablate(heads=top, to=to, reference=bench.reference, seed=bench.seed)) as without:
                    _, cache = without.run_with_cache(inputs, names_filter=names, logits_to_keep=1)
            else:
                _, cache = model.run_with_cache(inputs, names_filter=names, logits_to_keep=1)
            at = inputs.layout.positions("question")
            z = [cache[f"blocks.{layer}.attn.hook_z"][0, at, head] for layer, head in top]
            rows.append(np.concatenate([value.float().cpu().numpy() for value in z], axis=1))
        return np.concatenate(rows)

    seen, few = outputs(bench.find), bench.test[:8]
    scale = seen.std(0) + 1e-6

    def nearest(to: str = "") -> float:
        """The median distance to the nearest output seen on the samples that found the heads."""
        return float(np.median(cdist(outputs(few, to) / scale, seen / scale).min(1)))

    natural = nearest()
    distance = {to: nearest(to) / natural for to in METHODS}
    lengths = [len(model.inputs_of(sample).layout) for sample in few]
    future = float(np.mean([(n - 1) / (2 * n) for n in lengths]))
    cost = {to: drop(bench.cost(top, to=to)).as_dict() for to in METHODS}
    by = ", ".join(f"{to} {distance[to]:.1f}" for to in METHODS)
    text = (
        f"The published ablation spreads attention over all keys; averaged over the prompt, {future:.0%} of it goes to "
        f"keys that come later. At the question, the top heads' outputs then lie {distance['paper']:.1f} times as far "
        f"from any output seen before as those on new samples do (by method: {by}). It costs "
        f"{points(cost['paper'])}, mean ablation {points(cost['mean'])}."
    )
    claim = "Setting a head's logits to 0 behind the causal mask removes the head."
    return Point("off-distribution", claim, text, {"distance": distance, "future_share": future, "cost": cost},
                 decides=False, published=ON_TWO)  # fmt: skip


def size_and_sinks(bench: Bench) -> Point:
    """RAM grows with the size of the evidence, and with sinks inside it."""
    model, grown = bench.model, {}
    for factor in (1, 2, 4):
        samples = [replace(s, evidence=tuple(_grown(r, s, factor) for r in s.evidence)) for s in bench.find]
        ram = retrieval_attention_mass(model, samples)
        grown[factor] = {
            "tokens": float(ram["n_evidence"].mean()), "ram": float(ram["ram"].mean()),
            "even": float(ram["size_null"].mean()),
        }  # fmt: skip
    scores = {
        "ram": Score(), "size": Score(calibrate="size"), "null question": Score(calibrate="null_question"),
        "region elsewhere": Score(calibrate="random"), "no sinks": Score(calibrate="no_sinks"),
    }  # fmt: skip
    try:
        found = head_scores(model, bench.find, scores, seed=bench.seed)
    except ExperimentError:  # evidence that leaves no room for a region elsewhere
        del scores["region elsewhere"]
        found = head_scores(model, bench.find, scores, seed=bench.seed)
    agreed = agreement({name: rank_heads(found, name) for name in scores}, TOP)
    alike = {name: float(agreed["spearman"].sel(ranking="ram", other=name)) for name in scores if name != "ram"}
    by_attention = attention_sinks(model, bench.find, by="attention")
    on_sinks = float(by_attention["ram_on_sinks"].sum() / max(float(by_attention["ram"].sum()), 1e-30))
    first, last = grown[1], grown[4]
    grows = last["ram"] > first["ram"] * 1.2
    text = (
        f"As evidence grows from {first['tokens']:.1f} to {last['tokens']:.1f} tokens, the mean RAM of all heads goes "
        f"from {first['ram']:.3f} to {last['ram']:.3f}, that of even attention from {first['even']:.3f} to "
        f"{last['even']:.3f}; {on_sinks:.0%} of RAM sits on sinks by attention. Rankings after calibration correlate "
        f"with RAM by {', '.join(f'{value:.2f} ({name})' for name, value in alike.items())}."
    )
    numbers = {"grown": grown, "spearman_with_ram": alike, "on_sinks": on_sinks}
    return Point("size-and-sinks", "RAM needs no calibration.", text, numbers, not grows)


def controls_of_acceleration(bench: Bench) -> Point:
    """Few dense heads, the rest local: does the ranking matter, or would any heads do?"""
    model, ranking = bench.model, bench.ranking
    vision = rank_heads(bench.ram, "vision_mass")
    longest = max(
        len(layout) - int(layout.positions("question")[0]) for b in bench.questions.batches for layout in b.layouts
    )
    length = min(int((layout.kind != 3).sum()) for b in bench.questions.batches for layout in b.layouts)
    window, sinks = longest, 1

    def right(dense: Heads) -> np.ndarray:
        with sparse.localize(model, dense_heads=dense, sinks=sinks, window=window, phase="prefill") as local:
            return ask(local, bench.questions)["accuracy"]

    rows = []
    for share in (TOP, 0.2):
        k = ranking.count(share)
        random = np.stack(
            [right(heads) for heads in ranking.random(k, min(4, bench.n_random), bench.seed, ranking.top(k))]
        )
        top = right(ranking.top(k))
        rows.append({
            "share": share, "n_heads": k, "top": float(top.mean()), "bottom": float(right(ranking.bottom(k)).mean()),
            "vision": float(right(vision.top(k)).mean()), "random": float(random.mean()),
            "better_than_random": drop(top - random).as_dict(), **beyond_random(top, random),
        })  # fmt: skip
    dense, none = float(bench.right().mean()), float(right(()).mean())
    by = "; ".join(
        f"{heads_in(r['n_heads'])} dense: top {r['top']:.0%}, random {r['random']:.0%}, bottom {r['bottom']:.0%}, "
        f"vision {r['vision']:.0%}" for r in rows
    )  # fmt: skip
    best = float(holm(np.array([row["p_value"] for row in rows])).min())
    matters = best < ALPHA
    text = (
        f"Prompts have about {length} tokens; local heads see {sinks} sink and {window} near tokens. Accuracy is "
        f"{dense:.0%} dense, {none:.0%} with every head local; {by}. The ranking "
        f"{'beats' if matters else 'is not shown to beat'} random heads at the same budget (p "
        f"{p_is(best)} after Holm; p is the larger of that over samples and that over {rows[0]['draws']} random sets)."
    )
    numbers = {"dense": dense, "all_local": none, "window": window, "sinks": sinks, "budgets": rows}
    claim = "Keeping the top heads dense keeps the accuracy (no random, bottom or vision heads at the same budget)."
    return Point("acceleration", claim, text, numbers, True if matters else None, published=ON_THREE)


def no_intervals(bench: Bench) -> Point:
    """What intervals, other samples and disjoint splits change."""
    model, k = bench.model, bench.ranking.count(TOP)
    curve = sample_curve(bench.ranking, sizes=[len(bench.find) // 2], k=k, n_splits=50, seed=bench.seed)
    shared, null = float(curve["jaccard"].mean()), float(curve.attrs["jaccard_null"])
    new = drop(bench.cost(bench.ranking.top(k)))
    # The same heads on the samples that found them; the mean then comes from the others.
    same = quiz(model, bench.find)
    spec = Ablate(heads=bench.ranking.top(k), to="mean", reference=reference_activations(model, bench.test))
    with intervene(model, spec) as without:
        old = drop(ask(model, same)["accuracy"] - ask(without, same)["accuracy"])
    inclusion = bench.ranking.stability(500, k, bench.seed)
    sure = int((inclusion >= 0.95).sum())
    text = (
        f"Two disjoint sets of {len(bench.find) // 2} samples agree on the top {heads_in(k)} by Jaccard {shared:.2f} "
        f"(chance {null:.2f}); {sure} of the {k} stay in the top set in 95% of resamples. The top heads cost "
        f"{points(new)} on {len(bench.test)} new samples and {points(old)} on those that found them."
    )
    numbers = {
        "jaccard": shared,
        "jaccard_null": null,
        "sure": sure,
        "n_top": k,
        "new": new.as_dict(),
        "old": old.as_dict(),
    }
    return Point(
        "no-intervals", "One ranking, and one number per set: no intervals, seeds or splits.", text, numbers,
        decides=False,
    )  # fmt: skip


def figure_and_text(bench: Bench) -> Point:
    """Two mismatches of the published text, and the same quantities from one result here."""
    k = min(15, len(bench.ranking) // 3)
    sets = {"top": bench.ranking.top(k), "bottom": bench.ranking.bottom(k)}
    covered = key_coverage(bench.model, bench.test, sets)["coverage"]
    found = {name: mean_of(covered.sel(set=name).values[None]).as_dict() for name in sets}
    above = max(found, key=lambda name: found[name]["mean"])
    sparsity = bench.ranking.half_mass_share()
    text = (
        "One share is 24.4% in the text and 21.7% in the table, and one legend is inverted. Here both come from one "
        f"result: the {above} {k} heads cover more of the evidence, {found[above]['mean']:.1%} (top "
        f"{found['top']['mean']:.1%} [{found['top']['low']:.1%}, {found['top']['high']:.1%}], bottom "
        f"{found['bottom']['mean']:.1%} [{found['bottom']['low']:.1%}, {found['bottom']['high']:.1%}]), and "
        f"{sparsity:.1%} of the heads hold half of all RAM."
    )
    numbers = {"published": {"text": 0.244, "table": 0.217}, "coverage": found, "half_mass_share": sparsity, "k": k}
    return Point("figure-and-text", "24.4% (text) or 21.7% (table); top heads cover more keys of the evidence.", text,
                 numbers, above == "top")  # fmt: skip


def _of(ranking: Ranking, head: tuple[int, int]) -> float:
    return float(ranking.mean[ranking.layers.index(head[0]), head[1]])


def _ram_by_formula(bench: Bench) -> Ranking | None:
    """RAM on the tokens that the published formula gives for the boxes, as if every token had 2 x 2 patches."""
    model, parts = bench.model, []
    for sample in bench.find:
        if sample.video or not all(isinstance(region, Box) for region in sample.evidence):
            return None
        row = model.inputs_of(sample)
        layout, keys = row.layout.visual, []
        for image in sorted({region.image for region in sample.evidence if isinstance(region, Box)}):
            here = layout.positions("image", image=image)
            here = here[layout.row[here] >= 0]
            rows, cols = layout.grid(image)
            if len(here) != rows * cols:  # tiles: another formula
                return None
            evidence = np.isin(here, layout.positions(sample.evidence))
            patches = evidence[np.lexsort((layout.col[here], layout.row[here]))].reshape(rows, cols)
            keys += here[published_tokens(patches.repeat(2, 0).repeat(2, 1))].tolist()
        parts.append(evidence_mass(model, row, [np.array(sorted(keys))])[0][0, 0].cpu().numpy())
    return Ranking(np.mean(parts, axis=0), layers=bench.ranking.layers)


def _grown(region: Region, sample: Sample, factor: int) -> Region:
    """The region with about ``factor`` times as many tokens, around the same place."""
    if isinstance(region, Pages | Frames):
        count = len(sample.images) if isinstance(region, Pages) else len(sample.video)
        size = min(count, factor * len(region.indices))
        start = max(0, min(region.indices[0] - (size - len(region.indices)) // 2, count - size))
        return type(region)(*range(start, start + size))
    if not isinstance(region, Box):
        return region
    picture = (sample.images or sample.video)[region.image if region.frame is None else region.frame]
    grow = factor**0.5 / 2
    edges = []
    for low, high, limit in ((region.x0, region.x1, picture.width), (region.y0, region.y1, picture.height)):
        middle, half = (low + high) / 2, (high - low) * grow
        edges.append((max(0.0, middle - half), min(float(limit), middle + half)))
    (x0, x1), (y0, y1) = edges
    return replace(region, x0=x0, x1=x1, y0=y0, y1=y1)


WEAKNESSES: dict[str, Callable[[Bench], Point]] = {
    "top-5%": never_ablated,
    "low-ranked": low_ranked,
    "box-to-tokens": box_to_tokens,
    "boundary-tags": boundary_tags,
    "off-distribution": off_distribution,
    "size-and-sinks": size_and_sinks,
    "acceleration": controls_of_acceleration,
    "no-intervals": no_intervals,
    "figure-and-text": figure_and_text,
}
