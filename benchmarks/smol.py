"""Pictures and text on a pretrained language model: `reference:smol`, before and after it was tuned.

    python benchmarks/smol.py --samples 40 --out docs/smol.json

Writes the numbers of `docs/smol.md`: how many top heads pictures and text share, which of them attended to the evidence
of a text before the model had seen a picture, and what the heads of each form are worth on the other.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from mech import HookedMLLM, Score, haystacks, modality_table, modality_transfer, rank_heads, transfer
from mech.data.samples import Samples

SCORES = {"RAM (question rows)": "ram", "answer rows, evidence of each token": Score("answer", on="parts")}
PAIRS = (("pictures", "text"), ("pictures", "base text"), ("text", "base text"), ("pictures", "base pictures"))


def forms(domain: str, n: int, seed: int) -> dict[str, Samples]:
    """The same scenes with numbers of three digits, shown and written out."""
    return {form: haystacks(domain, n, seed, answer="number", form=form) for form in ("pictures", "text")}


def compared(found) -> dict:
    """The overlaps of one measurement, and the heads behind them."""
    names = ("shared", "shared_low", "shared_high", "expected", "p", "within")
    pairs = {
        f"{a} / {b}": {name: round(float(found[name].sel(reading=a, other=b)), 4) for name in names} for a, b in PAIRS
    }
    origin = {str(name): int((found["origin"] == name).sum()) for name in set(found["origin"].values.ravel())}
    return {"n_top": found.attrs["n_top"], "pairs": pairs, "origin": origin, "heads": modality_table(found)}


def ablated(model, find: dict[str, Samples], test: dict[str, Samples], base_text, n_random: int) -> dict:
    """What the top heads of pictures, of text, and of text before tuning are worth on both forms."""
    found = transfer(model, find, test, rankings=base_text, n_random=n_random)
    full, random = found["accuracy"].isel(condition=0).mean("example"), found["random_lost"]
    cells, tasks = ("lost", "lost_low", "lost_high", "p"), list(map(str, found["tested_on"].values))
    return {
        "accuracy": {task: float(full.sel(tested_on=task)) for task in tasks},
        "random_lost": {task: float(random.sel(tested_on=task)) for task in tasks},
        "lost": {
            str(row): {
                task: {name: round(float(found[name].sel(found_on=row, tested_on=task)), 4) for name in cells}
                for task in tasks
            }
            for row in found["found_on"].values
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Heads on pictures and on text, in reference:smol.")
    parser.add_argument("--domains", nargs="+", default=["documents"])
    parser.add_argument("--samples", type=int, default=40, help="scenes that find heads, and as many that test them")
    parser.add_argument("--random", type=int, default=10, help="random sets of heads")
    parser.add_argument("--out", type=Path, default=Path("docs/smol.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, base = (HookedMLLM.from_pretrained("reference:smol", revision=which) for which in (None, "base"))
    base.name = "reference:smol@base"
    results: dict = {"samples": given.samples, "heads": model.cfg.n_layers * model.cfg.n_heads, "domains": {}}
    for domain in given.domains:
        start, find, test = time.perf_counter(), forms(domain, given.samples, 0), forms(domain, given.samples, 1)
        here = results["domains"][domain] = {}
        measured = {
            name: modality_transfer(model, find["pictures"], find["text"], base, score=score, k=0.05)
            for name, score in SCORES.items()
        }
        here["shared"] = {name: compared(found) for name, found in measured.items()}
        of = measured["answer rows, evidence of each token"]["score"]
        rankings = {
            name: rank_heads(of.sel(reading=reading), model=model.name, domain=domain)
            for name, reading in (("pictures", "pictures"), ("text", "text"), ("text before tuning", "base text"))
        }
        given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        here["transfer"] = ablated(model, find, test, rankings, given.random)
        here["minutes"] = round((time.perf_counter() - start) / 60, 1)
        given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(domain, json.dumps(here["transfer"], indent=1), json.dumps(here["shared"], indent=1)[:3000], flush=True)


if __name__ == "__main__":
    main()
