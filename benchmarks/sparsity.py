"""Does training for sparsity buy efficiency and interpretability? Post-training of reference models, and what it gives.

    python benchmarks/sparsity.py train   --out training/sparsity      # resumable; one process on one core
    python benchmarks/sparsity.py measure --out training/sparsity      # resumable; mech/reference/sparsity.json
    python benchmarks/sparsity.py serve   --out training/sparsity      # speeds and trials of mech.sparsify: the same
    python benchmarks/sparsity.py ship    --out training/sparsity      # reference:llava-s-sparse
    make sparsity                                                      # all of it

Every run starts from a model that ships with `mech` and goes on with its own kind of conversations, under one objective
of `mech.sparse.training`. Runs of one seed see the same batches in the same order, the control among them. One domain
is left out of all, to be the new one.
"""

import argparse
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sparsity_measures import measured, smallest
from sparsity_served import BASE, RANKED_PAGES, TRIALS, rankings, speeds, trial
from torch import nn

from mech import HookedMLLM, Ranking, haystacks, localize
from mech.experiments.metrics import ask, quiz
from mech.inputs import Inputs
from mech.reference import CHANGED, FOLDER
from mech.reference.recipe import RECIPES, Recipe
from mech.reference.train import Marks, Shape, batch_of, held_out_accuracy
from mech.sparse.policy import Policy
from mech.sparse.training.loop import Batch, SparseTraining
from mech.sparse.training.mixture import final_states
from mech.sparse.training.objectives import OBJECTIVES, Objective


@dataclass(frozen=True)
class Size:
    """One size of model: where its seeds start, what they see, how long they train.

    Attributes:
        seeds: name of a seed -> the shipped model it starts from; two that start from one see other batches.
        domains: what is trained and tested on; ``new`` is tested only.
        longest: visual tokens of the longest scenes it trains on; 0 for scenes of the default length.
        pictures: domain -> how many pictures the scenes have that it is tested on, where it is not the default.
        longer: pages of scenes that are longer than any it was trained on.
        arms: what is run: the name of an objective -> how many of the seeds.
    """

    seeds: dict[str, str]
    domains: tuple[str, ...]
    new: str
    window: int
    steps: int
    arms: Mapping[str, int]
    batch: int = 8
    longest: int = 0
    longer: int = 9
    pictures: Mapping[str, int] = field(default_factory=dict)
    sinks: int = 4

    @property
    def main(self) -> str:
        """The domain that heads are found and tested on."""
        return "pages" if "pages" in self.domains else self.domains[0]


PILOTS = {"entropy 0.3": 1, "gates 0.2": 1}  # one seed, to choose the objectives that get three
SIZES = {
    "llava-s": Size(
        seeds={"0": "llava-s", "1": "llava-s-seed1", "2": "llava-s"}, domains=("documents", "pages"), new="grounding",
        window=16, steps=60, batch=6, longer=9,
        arms={"control": 3, "constrained 0.1": 3, "far 10": 3, "constrained 0.02": 3, "far 1": 3, **PILOTS},
    ),
    "qwen-long": Size(
        seeds={"0": "qwen-long", "1": "qwen-long", "2": "qwen-long"}, domains=("pages", "video"), new="documents",
        window=64, steps=240, batch=4, longest=288, longer=32, pictures={"pages": 8, "video": 36},
        arms={"control": 3, "constrained 0.1": 3, "one head": 3, "far 10": 3, "far 1": 3, **PILOTS},
    ),
}  # fmt: skip
ARMS: dict[str, Objective] = {
    "control": OBJECTIVES["control"],
    "constrained 0.1": replace(OBJECTIVES["constrained"], target=0.1),
    "far 10": replace(OBJECTIVES["far"], strength=10.0),
    "constrained 0.02": replace(OBJECTIVES["constrained"], target=0.02),
    "far 1": replace(OBJECTIVES["far"], strength=1.0),
    "entropy 0.3": OBJECTIVES["entropy"],
    "gates 0.2": replace(OBJECTIVES["gates"], strength=0.2),
    "one head": replace(OBJECTIVES["constrained"], target=0.1),
}
MOST = {"one head": 1}  # key/value heads whose gates may stay open in the end
SHIPPED = {"llava-s": ("0", "far 10"), "qwen-long": ("0", "one head")}


def recipe_of(size: Size, name: str, seed: str) -> Recipe:
    """What draws the conversations of a seed."""
    own = RECIPES[size.seeds[seed]]
    return replace(own, domains=size.domains, batch=size.batch, seed=1000 + int(seed), longest=size.longest,
                   steps=1, weights={})  # fmt: skip


def text_weights(model: HookedMLLM) -> dict[str, nn.Parameter]:
    """What is trained: the text stack's layers. Everything else is frozen, the vision stack among it."""
    chosen = {}
    for name, parameter in model.hf_model.named_parameters():
        parameter.requires_grad_("language_model" in name and ".layers." in name)
        if parameter.requires_grad:
            chosen[name] = parameter
    return chosen


def answer_loss(model: HookedMLLM, inputs: Inputs, marks: Marks) -> tuple[torch.Tensor, float]:
    """Cross-entropy of the answers of a conversation, and the share of full answers that are right."""
    ids, states = inputs.tensors["input_ids"], final_states(model, inputs)
    answer, full, end = marks.of(ids)
    rows, positions = (answer | end).nonzero(as_tuple=True)
    logits, target = model.hf_model.lm_head(states[rows, positions - 1]), ids[rows, positions]
    right = (logits.argmax(-1) == target)[full[rows, positions]].float().mean().item()
    return nn.functional.cross_entropy(logits, target), right


def training_of(name: str, seed: str, arm: str, steps: int | None = None) -> SparseTraining:
    """One run, ready to go."""
    size, objective = SIZES[name], ARMS[arm]
    model = HookedMLLM.from_pretrained(f"reference:{size.seeds[seed]}")
    recipe, marks = recipe_of(size, name, seed), Marks(model.processor.tokenizer)

    def batch(step: int) -> Batch:
        inputs = batch_of(model.processor, Shape.at(step, recipe), f"sparsity/{recipe.seed}/{step}")[0]
        return Batch(inputs, lambda: answer_loss(model, inputs, marks))

    steps = steps or size.steps
    return SparseTraining(
        model, objective, Policy((), size.sinks, size.window), batch, text_weights(model), steps=steps,
        settle=2 * steps // 5 if objective.penalty == "gates" else 0, most=MOST.get(arm), seed=int(seed),
    )  # fmt: skip


def run_name(name: str, seed: str, arm: str) -> str:
    return f"{name}.{seed}.{arm.replace(' ', '-')}"


def train(name: str, seed: str, arm: str, out: Path) -> None:
    """One run: weights (half precision) and ``run.json``, unless they are there."""
    folder = out / run_name(name, seed, arm)
    if (folder / "run.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    training = training_of(name, seed, arm)
    training.run(folder / "state.pt")
    save_file({key: value.detach().half() for key, value in training.weights.items()}, folder / "weights.safetensors")
    record = {"size": name, "seed": seed, "arm": arm, "start": SIZES[name].seeds[seed],
              "objective": asdict(training.objective), "steps": training.steps, "settle": training.settle,
              "sinks": training.policy.sinks, "window": training.policy.window, "curve": training.curve}  # fmt: skip
    if training.has_gates:
        record["dense_heads"] = [list(head) for head in training.dense_heads()]
        record["most"] = training.most
        record["log_alpha"] = training.gates.log_alpha.detach().tolist()
    (folder / "run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(folder.name, json.dumps(training.curve[-1]), record.get("dense_heads"), flush=True)


def opened(folder: Path) -> tuple[HookedMLLM, dict[str, Any]]:
    """The model of a run, and its record."""
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    model = HookedMLLM.from_pretrained(f"reference:{record['start']}")
    model.hf_model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
    model.name = f"{record['size']} {record['arm']} (seed {record['seed']})"
    return model, record


def measure(folder: Path, out: Path) -> None:
    """One run into the JSON, unless it is there."""
    found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"runs": {}}
    if folder.name in found["runs"] or not (folder / "run.json").exists():
        return
    began, (model, record) = time.perf_counter(), opened(folder)
    gates = None
    if "log_alpha" in record:
        per_group = model.cfg.n_heads // model.cfg.n_kv_heads
        mean = np.repeat(np.array(record["log_alpha"]), per_group, axis=1)
        gates = Ranking(mean, None, "gate", layers=model.cfg.attention_layers)
    size = SIZES[record["size"]]
    facts = measured(model, size, gates)
    found["runs"][folder.name] = record | facts | {"measured_minutes": round((time.perf_counter() - began) / 60, 1)}
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(folder.name, found["runs"][folder.name]["measured_minutes"], "min", flush=True)


def serve(name: str, out: Path, measures: Path) -> None:
    """Into the JSON what is not there yet: trials of ``mech.sparsify``, rankings, speeds."""
    found = json.loads(measures.read_text(encoding="utf-8"))
    part = found.setdefault("served", {}).setdefault(name, {"speed": [], "trials": {}, "rankings": {}})
    model = HookedMLLM.from_pretrained(f"reference:{name}")

    def write() -> None:
        measures.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    for what, given in TRIALS.items():
        if what not in part["trials"]:
            part["trials"][what] = trial(model, given, out / f"{name}.{what.replace(' ', '-')}")
            write()
    for pages in RANKED_PAGES:
        if str(pages) not in part["rankings"]:
            part["rankings"][str(pages)] = rankings(model, pages)
            write()
    if not part["speed"]:
        sets = {}
        for run in found["runs"].values():
            if run["size"] == name:
                heads = smallest(run["needed"])
                sets.setdefault(len(heads) / (model.cfg.n_layers * model.cfg.n_heads), heads)
        part["speed"] = speeds(model, dict(sorted(sets.items())), BASE)
        write()


def answered(fast: Any, model: HookedMLLM, size: Size, domain: str) -> float:
    """The share of 300 held-out questions, of the length that was trained on, that a served model answers."""
    questions = quiz(model, haystacks(domain, 300, 9, n_pictures=size.pictures.get(domain)))
    return round(float(ask(fast, questions)["accuracy"].mean()), 4)


def ship(name: str, seed: str, arm: str, out: Path, as_name: str, measures: Path) -> None:
    """A measured run as a reference model: the weights that changed, and a card with the smallest policy it needs."""
    folder, target = out / run_name(name, seed, arm), FOLDER / as_name
    model, record = opened(folder)
    facts = json.loads(measures.read_text(encoding="utf-8"))["runs"][folder.name]
    policy = Policy(smallest(facts["needed"]), record["sinks"], record["window"])
    domains = (*SIZES[name].domains, SIZES[name].new)
    accuracy = {domain: held_out_accuracy(model.hf_model, model.processor, domain) for domain in domains}
    with localize(model, policy) as fast:
        served = {domain: answered(fast, model, SIZES[name], domain) for domain in domains}
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "weights.safetensors", target / CHANGED)
    cfg = model.cfg
    card = {"name": as_name, "family": cfg.family, "layers": cfg.n_layers, "heads": cfg.n_layers * cfg.n_heads,
            "parameters": sum(p.numel() for p in model.hf_model.parameters()), "domains": list(domains),
            "seed": int(seed), "start": record["start"], "steps": record["steps"], "batch": SIZES[name].batch,
            "objective": record["objective"], "policy": policy.to_json(), "accuracy": accuracy,
            "served": served, "curve": record["curve"]}  # fmt: skip
    (target / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    print(as_name, accuracy, card["served"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train for sparsity, and measure what it gives.")
    parser.add_argument("what", choices=["train", "measure", "serve", "ship"])
    parser.add_argument("--size", default="llava-s", choices=SIZES)
    parser.add_argument("--seeds", nargs="+", choices=["0", "1", "2"], help="by default as the size says")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="by default all of the size")
    parser.add_argument("--out", type=Path, default=Path("training/sparsity"))
    parser.add_argument("--json", type=Path, default=Path("mech/reference/sparsity.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    size = SIZES[given.size]
    for arm in given.arms or size.arms:
        for seed in given.seeds or list(size.seeds)[: size.arms.get(arm)]:
            if given.what == "train":
                train(given.size, seed, arm, given.out)
            elif given.what == "measure":
                measure(given.out / run_name(given.size, seed, arm), given.json)
    if given.what == "serve":
        serve(given.size, given.out, given.json)
    elif given.what == "ship":
        ship(given.size, *SHIPPED[given.size], given.out, f"{given.size}-sparse", given.json)


if __name__ == "__main__":
    main()
