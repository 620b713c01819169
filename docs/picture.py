"""The picture of the README, from a finished study: ``python docs/picture.py study`` writes ``docs/report.png``.

Three parts of the report as a figure: accuracy without about 5% of the heads in every place; for the first place the
RAM of every head; and where heads look.
"""

import json
import sys
from pathlib import Path

from mech.results import load, look_facts
from mech.views import View, curves, heatmap, overlay


def picture(study: Path) -> View:
    """The figure of a finished study."""
    models = json.loads((study / "summary.json").read_text(encoding="utf-8"))["models"]
    places = [study / model / domain for model, facts in models.items() for domain in facts["domains"]]
    found = {
        f"{place.parent.name} · {place.name}": curves.effects(load(place / "ablation.nc"), "accuracy")
        for place in places
    }
    first = places[0]
    looks = load(first / "looks.nc").isel(look=[0])
    looks.attrs["looks"] = json.dumps(look_facts(looks)[:1])
    key = curves.legend([effect for effects in found.values() for effect in effects])
    parts = {
        "Accuracy without about 5% of the heads (mean ablation)": key + curves.overview(found, "mean", 0.05),
        f"Which heads look at the evidence: {first.parent.name} on {first.name}": heatmap.map_and_ranks(
            heatmap.head_scores(load(first / "ram.nc"))
        ),
        "Where they look": overlay.look_articles(looks, first),
    }
    return View("", "".join(f"<h2>{name}</h2>{part}" for name, part in parts.items()))


if __name__ == "__main__":
    print(picture(Path(sys.argv[1])).save(Path(__file__).with_name("report.png"), width=1160, scale=0.95))
