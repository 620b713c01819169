"""Every measurement that is cut into blocks, in any order and by two workers, gives what one process gives."""

import ast
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import mech
from mech.data.samples import Samples
from mech.experiments.ablation.bank import means_and_draws
from mech.experiments.findings.chosen import drawn
from mech.experiments.patching.blanked import per_sample_other_answers
from mech.experiments.patching.paired import patched_pairs
from mech.experiments.ranking.ranking import Head
from mech.experiments.scores.gating import causal_head_gating
from mech.interventions.counterfactuals import blanked
from mech.scale.folder import Folder
from mech.scale.models import recorded
from mech.scale.run import Run, driving
from mech.scale.work import Worker
from mech.sparse.dynamic import reach
from mech.sparse.frontier.acceleration import Local, gates_of, per_sample_lost
from mech.sparse.frontier.speed import speed_dataset
from mech.sparse.policy import Policy

ROOT = Path(mech.__file__).parent
BATCH = 2


def halves(n=10, seed=3):
    return mech.haystacks("grounding", n=n, seed=seed).split(0.5, 0)


def some_conditions(find):
    heads = mech.Ranking(np.arange(48.0).reshape(6, 8)[:, ::-1].copy())
    return mech.experiments.ablation.ablation.conditions(heads, to=("mean", "resample"), fractions=(2,), n_random=2)


def scores(model, find, test):
    names = ("ram", "vision_mass", "mm_retrieval", "localization", "retrieval_head")
    return mech.head_scores(model, test, names, batch_size=BATCH, seed=5)


def accelerated(model, find, test):
    options = dict(choices=("ram", "random", "dynamic"), shares=(0.1, 0.5), n_random=2, turns=0)
    return mech.acceleration(model, test, find=find, window=24, batch_size=BATCH, **options)


def transferred(model, find, test):
    pages = [mech.haystacks("documents", n=n, seed=seed) for n, seed in ((4, 7), (3, 8))]
    tasks = [{"grounding": one, "documents": other} for one, other in zip((find, test), pages, strict=True)]
    return mech.transfer(model, *tasks, k=2, n_random=2, batch_size=BATCH)


def patched(model, find, test):
    return patched_pairs(model, test[:3], direction="denoise", over=("layer",))


def causal(model, find, test):
    options = dict(n_random=1, n_boot=50, n_paths=1, method=None, batch_size=BATCH)
    return mech.causal_report(model, test[:3], find=find[:2], **options).dataset


CALLS = {
    "experiments.scores.ram:per_sample_masses":
        lambda model, find, test: mech.retrieval_attention_mass(model, test, batch_size=BATCH),
    "experiments.scores.measure:per_sample_scores": scores,
    "experiments.ablation.ablation:per_sample_answers":
        lambda model, find, test: mech.ablation(model, test, some_conditions(find), reference=find, batch_size=BATCH),
    "experiments.ablation.transfer:per_sample_forms": transferred,
    "experiments.patching.paired:per_sample_pairs": patched,
    "experiments.patching.blanked:per_sample_other_answers":
        lambda model, find, test: per_sample_other_answers(model, blanked(bare(test)), batch_size=1),
    "sparse.frontier.acceleration:asked_sparsely": accelerated,
    "sparse.frontier.acceleration:per_sample_lost":
        lambda model, find, test: per_sample_lost(model, test[:2], batch_size=1),
    "sparse.dynamic:per_sample_reach": lambda model, find, test: reach(model, test, window=24),
}  # fmt: skip
PIECES = {
    "experiments.ablation.bank:means_and_draws":
        lambda model, find, test: means_and_draws(model, find, batch_size=BATCH, seed=1),
    "experiments.causal.report:measured": causal,
    "experiments.scores.gating:causal_head_gating":
        lambda model, find, test: causal_head_gating(model, find, steps=2, n_fits=2),
    "experiments.scores.sinks:attention_sinks":
        lambda model, find, test: mech.attention_sinks(model, find, by="attention"),
    "scale.models:recorded": lambda model, find, test: recorded(model, Samples([]), files=[]),
    "sparse.frontier.acceleration:gates_of":
        lambda model, find, test: gates_of(model, find, local=Local(window=24, gate_steps=2), seed=0),
    "sparse.frontier.speed:timed_in_turns":  # bytes and bounds: times are of their moment
        lambda model, find, test: speed_dataset(
            model, test[0], {0.0: (), 0.1: (Head(1, 2),)}, Policy((), window=24), turns=1
        )[["kv_measured", "prefill_bound", "decode_bound"]].drop_attrs(deep=False),
    "experiments.findings.chosen:maps_of_bands":
        lambda model, find, test: drawn(model, test[:1], mech.Ranking(np.arange(48.0).reshape(6, 8)), None),
}  # fmt: skip


def bare(samples):
    return Samples([replace(sample, counterfactual=None) for sample in samples])


def marked(by):
    """The measurements of mech that are marked so, by name, as its sources say."""
    found = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            calls = [one.func.id for one in getattr(node, "decorator_list", ()) if isinstance(one, ast.Call)
                     and isinstance(one.func, ast.Name)]  # fmt: skip
            if by in calls:
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                found.add(f"{module}:{node.name}")
    return found


class Shuffled:
    """Two workers with a model each, that take all blocks in an order of chance."""

    works, workers, in_flight = True, 2, 10_000

    def __init__(self, folder, seed):
        self.folder, self.order = folder, random.Random(seed)
        self._both, self.by = [], []

    def ready(self, job, model):
        self._both = self._both or [Worker(self.folder, model=model), Worker(self.folder)]

    def run(self, tasks):
        held = list(tasks)
        self.order.shuffle(held)
        for i, task in enumerate(held, start=1):  # the one that opens a model of its own begins
            self.by.append(i % 2)
            yield self._both[i % 2].attempt(task)

    def close(self):
        pass


@pytest.fixture(scope="module")
def model():
    return mech.HookedMLLM.from_pretrained("reference:llava-s")


def undated(dataset):
    dataset.attrs["provenance"] = {**dataset.attrs.get("provenance", {}), "date": ""}
    return dataset


def test_no_measurement_is_forgotten():
    assert set(CALLS) == marked("per_sample") and set(PIECES) == marked("in_one_piece")


@pytest.mark.parametrize("name", [*CALLS, *PIECES])
def test_blocks_in_any_order_are_one_process_bit_for_bit(model, name, tmp_path):
    find, test = halves()
    call = CALLS.get(name) or PIECES[name]
    direct = call(model, find, test)
    folder = Folder(tmp_path)
    executor = Shuffled(folder, seed=len(name))
    with driving(Run(folder, executor, batches=1)):
        found = call(model, find, test)
    jobs = {Worker(folder).job(key)[0].measure.removeprefix("mech.") for key in set(folder.keys("jobs"))}
    assert name in jobs and set(executor.by) >= ({0, 1} if name in CALLS else {1})
    xr.testing.assert_identical(undated(found), undated(direct))
