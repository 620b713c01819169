"""Made-up results: a study folder in the schema of a real one, and what single views draw, for tests of both."""

import json
from pathlib import Path

import numpy as np
import xarray as xr
from PIL import Image, ImageDraw

from mech.data.regions import Box
from mech.data.samples import Sample
from mech.experiments.paths.circuits import Circuit, Edge
from mech.results import ShownHead, ablation_dataset, maps_dataset, ram_dataset, save

FRACTIONS = (0.01, 0.05, 0.1, 0.2)
METHODS = ("mean", "zero", "resample", "uniform", "paper")
SIDE, CELLS = 112, 8
COLOURS = {"red": "#e23b3b", "blue": "#3b6be2", "green": "#37b24d", "yellow": "#f2c200"}


def fabricated_study(
    folder: Path,
    models: tuple[tuple[str, str, int, int], ...] = (("llava-s", "llava", 6, 8), ("llava-m", "llava", 12, 12)),
    domains: tuple[str, ...] = ("grounding", "pages", "video"),
    methods: tuple[str, ...] = METHODS,
    question: str = "which digit is in the {colour} frame?",
    n: int = 60,
    draws: int = 20,
    causal: bool = False,
) -> Path:
    """Write the folder (models are ``(name, family, layers, heads)``) and return it; with ``causal`` heads patched."""
    rng = np.random.default_rng(0)
    summary = {"schema": 1, "models": {}, "scales": {}, "scope": "2 models; haystacks", "provenance": _provenance()}
    for name, family, n_layers, n_heads in models:
        truth = _map(rng, n_layers, n_heads)
        entry = {"n_layers": n_layers, "n_heads": n_heads, "family": family, "domains": {}}
        for domain in domains:
            place = folder / name / domain
            place.mkdir(parents=True)
            scores = np.clip(truth + rng.normal(0, 0.04, (n, n_layers, n_heads)), 0, 1)
            save(ram_dataset(scores, np.clip(scores + 0.1, 0, 1), np.full(n, 0.04), np.full(n, 4)), place / "ram.nc")
            order = np.dstack(np.unravel_index(np.argsort(-scores.mean(0).ravel()), truth.shape))[0].tolist()
            ranking = [[layer, head, float(scores.mean(0)[layer, head])] for layer, head in order]
            patched = _causal(rng, place, scores.mean(0)) if causal else None
            ablation, effects, tests = _ablation(rng, methods, n, draws, n_layers * n_heads)
            save(ablation, place / "ablation.nc")
            _looks(rng, place, ranking, pictures={"grounding": 1, "pages": 4}.get(domain, 6), question=question)
            entry["domains"][domain] = _domain(n, ranking, effects, tests) | ({"causal": patched} if patched else {})
        entry["agreement"] = _agreement(domains)
        summary["models"][name] = entry
    if len(models) > 1:
        summary["scales"] = {d: {"models": [m[0] for m in models], "correlation": 0.873} for d in domains}
    summary["findings"] = _findings(models[0][0], domains)
    summary["headlines"] = [
        {"text": "Low-ranked heads matter: in 1 of 2 settings.", "model": None, "domain": None, "against_papers": True}
    ]
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "study.json").write_text(json.dumps({"settings": {"n_test": n, "seed": 0}, "created": "2026-06-01"}))
    return folder


def _domain(n: int, ranking: list, effects: dict, tests: dict) -> dict:
    return {
        "n_find": n,
        "n_test": n,
        "baseline": {
            "accuracy": {"mean": 0.983, "low": 0.95, "high": 1.0},
            "logit_diff": {"mean": 7.31, "low": 6.9, "high": 7.7},
        },
        "ranking": ranking,
        "half_mass_share": 0.0625,
        "size_null": 0.04,
        "ablation": effects,
        "tests": tests,
    }


def _agreement(domains: tuple[str, ...]) -> dict:
    k = len(domains)
    close = 0.8 + 0.2 * np.eye(k)
    return {
        "domains": list(domains),
        "spearman": close.tolist(),
        "jaccard": (close - 0.2 * (1 - np.eye(k))).tolist(),
        "jaccard_null": np.full((k, k), 0.03).tolist(),
    }


def _findings(model: str, domains: tuple[str, ...]) -> list[dict]:
    return [
        {
            "kind": "needed",
            "text": "Removing the top 5% of heads (mean ablation) costs 81 points of accuracy; random sets cost 3.",
            "model": model,
            "domain": domains[0],
            "against_papers": False,
        },
        {
            "kind": "low",
            "text": "The bottom 20% of the ranking costs 31 points, more than every random draw: "
            "heads that never attend to the evidence are necessary.",
            "model": model,
            "domain": domains[-1],
            "against_papers": True,
        },
        {"text": "All domains share most of their top heads.", "model": None, "domain": None, "against_papers": False},
    ]


def _provenance() -> dict:
    return {
        "date": "2026-06-01T10:00:00+00:00",
        "seed": 0,
        "versions": {"python": "3.11.2", "mech": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "model": {"name": "llava-m", "weights": "f3" * 32, "dtype": "float32", "attention": "sdpa"},
        "machine": {"platform": "Linux", "cpus": 2},
    }


def _causal(rng: np.random.Generator, place: Path, ram: np.ndarray, n: int = 6) -> dict:
    """Every head patched: the first by RAM carries half of the answer, the last a tenth, and both follow a path."""
    dims, order = ("layer", "head"), np.dstack(np.unravel_index(np.argsort(-ram.ravel()), ram.shape))[0]
    (first, last), lost = (tuple(order[0]), tuple(order[-1])), rng.normal(0, 0.004, ram.shape)
    lost[first], lost[last] = 0.5, 0.1
    kind = np.full(ram.shape, "neither", dtype="<U24")
    kind[first], kind[last] = "attending and causal", "causal, not attending"
    values = {"ram": ram, "ram_rank": 1 + np.argsort(np.argsort(-ram.ravel())).reshape(ram.shape), "quadrant": kind}
    for name, effect in {"lost": lost, "recovered": lost / 2, "direct": lost / 4, "mediated": lost * 3 / 4}.items():
        values |= {name: effect, f"{name}_low": effect - 0.02, f"{name}_high": effect + 0.02}
    sizes, orders = [1, 2, 4], ["effect", "restoring", "ram", "random 0"]
    growing = np.broadcast_to(np.array([0.5, 0.6, 0.7]), (n, len(orders), len(sizes)))
    sets = {f"set_{name}": (("example", "order", "size"), growing) for name in ("lost", "recovered")}
    dataset = xr.Dataset(
        {**{name: (dims, value) for name, value in values.items()}, **sets, "even": 0.04,
         "set_singles": (("order", "size"), growing[0])},
        {"layer": np.arange(ram.shape[0]), "head": np.arange(ram.shape[1]), "order": orders, "size": sizes},
        {"threshold": 0.02, "corruption": "counterfactuals <b>"},
    )  # fmt: skip
    save(dataset, place / "causal.nc")
    at = {name: [list(map(int, head)) for head in np.argwhere(kind == name)] for name in np.unique(kind)}
    found = {"attending and causal": [], "attending, not causal": [], "causal, not attending": [], **at}
    smallest = {"effect": 1, "restoring": 1, "ram": 1, "random": None}
    path = {"head": list(map(int, last)), "carrier": "directly", "text": "It acts <i>directly</i> on the logits."}
    return {"n_test": n, "quadrants": found, "necessary_blind": [path["head"]], "threshold": 0.02, "paths": [path],
            "smallest": {"lost": smallest, "recovered": smallest}}  # fmt: skip


def _map(rng: np.random.Generator, n_layers: int, n_heads: int) -> np.ndarray:
    truth = rng.gamma(0.6, 0.03, (n_layers, n_heads))
    for head in rng.choice(n_heads, 4, replace=False):
        truth[rng.integers(n_layers // 3, 2 * n_layers // 3 + 1), head] = rng.uniform(0.6, 0.97)
    return truth


def _ablation(rng: np.random.Generator, methods: tuple[str, ...], n: int, draws: int, total: int):
    rows = [("none", "none", 0.0, 0, 0, 0.98)]
    harm = {"top": 0.85, "bottom": 0.3, "middle": 0.06, "random": 0.15, "layer_matched": 0.25,
            "by vision_mass": 0.5, "by mm_retrieval": 0.6}  # fmt: skip
    for method in methods:
        for fraction in FRACTIONS:
            for band, worst in harm.items():
                for draw in range(draws if band in ("random", "layer_matched") else 1):
                    reach = fraction / (fraction + 0.04) * worst * (1.1 if method == "zero" else 1.0)
                    noise = rng.uniform(-0.5, 0.5) * reach if band in ("random", "layer_matched") else 0
                    count = max(1, round(fraction * total))
                    rows.append((method, band, fraction, count, draw, float(np.clip(0.98 - reach - noise, 0, 1))))
    method, band, fraction, n_heads, draw, level = zip(*rows, strict=True)
    accuracy = (rng.uniform(size=(len(rows), n)) < np.array(level)[:, None]).astype(float)
    logit_diff = 9 * np.array(level)[:, None] - 2 + rng.normal(0, 2, accuracy.shape)
    names = {"method": method, "band": band, "fraction": fraction, "n_heads": n_heads, "draw": draw}
    effects, tests, seen = [], [], set()
    for m, b, f, k, _, lev in rows[1:]:
        if (m, b, f) not in seen:
            seen.add((m, b, f))
            drop = {"mean": 0.98 - lev, "low": 0.93 - lev, "high": 1.03 - lev}
            effects.append(
                {
                    "method": m,
                    "band": b,
                    "fraction": f,
                    "n_heads": k,
                    "draws": draws,
                    "accuracy": {"mean": lev, "low": max(0.0, lev - 0.05), "high": min(1.0, lev + 0.05)},
                    "accuracy_drop": drop,
                    "logit_diff_drop": drop,
                }
            )
            if b == "top":
                tests.append(
                    {
                        "method": m,
                        "fraction": f,
                        "n_heads": k,
                        "statistic": 0.5,
                        "primary": (m, f) == ("mean", 0.05),
                        "p_value": 0.0234,
                        "p_samples": 0.0123,
                        "p_sets": 0.0234,
                        "p_adjusted": 0.0456,
                    }
                )
    return ablation_dataset(accuracy, logit_diff, **names), effects, tests


def _looks(rng: np.random.Generator, place: Path, ranking: list, pictures: int, question: str, n: int = 2) -> None:
    size, tokens = SIDE // CELLS, CELLS * CELLS * pictures
    shown = ranking[:4] + ranking[-4:] + ranking[:: -(-len(ranking) // 10)]
    attention, facts = np.zeros((n, len(shown), tokens)), []
    cells = [(k, r, c) for k in range(pictures) for r in range(CELLS) for c in range(CELLS)]
    rect = np.array([[c * size, r * size, (c + 1) * size, (r + 1) * size] for _, r, c in cells], dtype=float)
    image = np.array([k for k, _, _ in cells])
    for i in range(n):
        colour = list(COLOURS)[i % len(COLOURS)]
        target = pictures // 2
        box = [2 * size + 3 * i, 3 * size, 4 * size + 3 * i, 5 * size]
        names = []
        for k in range(pictures):
            noise = rng.integers(90, 190, (14, 14, 3), dtype=np.uint8)
            picture = Image.fromarray(noise).resize((SIDE, SIDE))
            ImageDraw.Draw(picture).rectangle(box, outline=COLOURS[colour] if k == target else "#888", width=3)
            ImageDraw.Draw(picture).text((box[0] + 9, box[1] + 8), str(3 + k), fill="white")
            names.append(f"map{i}_{k}.png")
            picture.save(place / names[-1])
        inside = (
            (image == target)
            & (rect[:, 0] < box[2])
            & (rect[:, 2] > box[0])
            & (rect[:, 1] < box[3])
            & (rect[:, 3] > box[1])
        )
        for s, (_, _, score) in enumerate(shown):
            attention[i, s] = rng.dirichlet(np.full(tokens, 0.3)) * 0.2
            attention[i, s, inside] += score / inside.sum() * rng.uniform(0.8, 1, inside.sum())
            attention[i, s, 0] = 0.9  # a sink in the corner
        text = question.replace("{colour}", colour)
        facts.append(
            {
                "question": text,
                "answer": "5",
                "prediction": "5" if i == 0 else "8",
                "pictures": names,
                "evidence": [[target, *box]],
            }
        )
    bands = ["top"] * 4 + ["bottom"] * 4 + ["tenth"] * (len(shown) - 8)
    dataset = maps_dataset(
        attention,
        np.repeat(rect[None], n, 0),
        np.repeat(image[None], n, 0),
        facts,
        [ShownHead(*head, band, ram) for (*head, ram), band in zip(shown, bands, strict=True)],
    )
    corner = np.zeros(attention.shape, dtype=np.int8)
    corner[..., 0] = 1
    dataset = dataset.assign(sink=(dataset["attention"].dims, corner))
    save(dataset, place / "maps.nc")


def fabricated_sample():
    """A question about one picture, with a counterfactual whose evidence is another colour."""
    pictures = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("#335577", "#775533")]
    for picture in pictures:
        ImageDraw.Draw(picture).rectangle((28, 42, 55, 69), fill="#e23b3b", outline="white")
    box = (Box(28, 42, 56, 70),)
    other = Sample("Which digit?", "7", images=(pictures[1],), evidence=box)
    return Sample("Which <digit>?", "5", images=(pictures[0],), evidence=box, id="one", counterfactual=other)


def fabricated_circuit():
    """Evidence -> L0H2 -> an MLP and L1H3 -> logits, with a head that works against the answer."""
    found = (
        Edge("L1H3", "logits", 0.9, 0.7, 1.0, 0.001),
        Edge("L1H0", "logits", -0.2, -0.3, -0.1, 0.01),
        Edge("L0H2", "L1K3.v", 0.8, 0.6, 0.9, 0.002, "question"),
        Edge("L0H2", "mlp.0", 0.3, 0.2, 0.4, 0.004, "question"),
        Edge("mlp.0", "L1H3.q", 0.1, 0.05, 0.15, 0.03, "template"),
        Edge("embed:evidence", "L0K2.v", 0.9, 0.8, 1.0, 0.001),
        Edge("embed:picture", "L1H0.q", 0.05, 0.02, 0.08, 0.04),
    )
    return Circuit("toy <b>", "logits", "noise", 16, (1, 1), found)


def fabricated_grid(direction: str = "denoise") -> xr.Dataset:
    """Patching over two layers and 4 x 4 cells, the question and the last token, on five examples."""
    regions = [f"{r},{c}" for r in range(4) for c in range(4)] + ["question", "last"]
    effect = np.random.default_rng(0).normal(0, 0.02, (5, 2, len(regions)))
    effect[:, 0, 5] += 0.9
    effect[:, 1, -1] -= 0.4
    dims = {"example": np.arange(5), "layer": [0, 1], "region": regions}
    attrs = {"model": "toy", "point": "hook_resid_pre", "direction": direction, "zero": "no effect"}
    return xr.Dataset({"effect": (tuple(dims), effect)}, dims, attrs)


def fabricated_attention() -> xr.DataArray:
    """Attention of three heads in two layers between six groups, one of which tries to end the script."""
    names = ["<user>", "image 0,0", "image 0,1", "</script><b>", " red", "?"]
    pattern = np.tril(np.random.default_rng(0).uniform(size=(2, 3, 6, 6)))
    pattern /= pattern.sum(-1, keepdims=True)
    dims = {"layer": [0, 3], "head": [0, 1, 2], "query": names, "key": names}
    return xr.DataArray(pattern, dims, tuple(dims))


def fabricated_maps() -> xr.Dataset:
    """What two heads attend to in ``fabricated_sample``: one at the evidence, one at the first token."""
    size = SIDE // 4
    rect = np.array([[c * size, r * size, (c + 1) * size, (r + 1) * size] for r in range(4) for c in range(4)], float)
    attention = np.full((1, 2, 16), 0.01)
    attention[0, 0, 5], attention[0, 1, 0] = 0.64, 0.3
    sample = fabricated_sample()
    facts = {"question": sample.question, "answer": sample.answer, "prediction": "5", "pictures": ["map0_0.png"]}
    return maps_dataset(
        attention, rect[None], np.zeros((1, 16), int), [{**facts, "evidence": [[0, 28, 42, 56, 70]]}],
        [ShownHead(0, 2, "top", 0.7), ShownHead(1, 3, "bottom", 0.01)],
    )  # fmt: skip
