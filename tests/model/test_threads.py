"""Threads that share a model: each gets the numbers it gets alone, and none waits for ever."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mech.data.haystacks import haystacks
from mech.errors import ExperimentError
from mech.experiments.metrics import LogitDiff
from mech.experiments.patching.activation import activation_patching
from mech.interventions import Ablate, Scale, intervene
from mech.model import HookedMLLM, turns

POINT = "blocks.1.hook_mlp_out"


@pytest.fixture(scope="module")
def model():
    return HookedMLLM.from_pretrained("reference:llava-s")


@pytest.fixture(scope="module")
def inputs(model):
    return model.inputs_of(haystacks("grounding", 1, seed=3)[0])


def silent(value, hook):
    return value * 0


def hooked(model, inputs):
    return model.run_with_hooks(inputs, fwd_hooks=[(POINT, silent)])


def cached(model, inputs):
    return model.run_with_cache(inputs, names_filter=[POINT, "blocks.1.attn.hook_pattern"])[1][POINT]


def ablated(model, inputs):
    with intervene(model, Ablate(heads=[(2, 0), (2, 1)], to="zero")) as without:
        return without(inputs)


def written(model, inputs):
    with intervene(model, Scale([(0, 2)], 3.0)) as louder:
        return louder.generate(inputs, max_new_tokens=2)


def nested(model, inputs):
    """A hook that runs the model itself, as it is, inside another run."""
    inner, depth = [], []

    def run_again(value, hook):
        depth.append(hook)
        if len(depth) == 1:
            inner.append(model(inputs))
        return value * len(depth)

    with model.hooks([(POINT, run_again)]):
        return model(inputs) + inner[0]


def observed(model, inputs):
    with model.attending(lambda call: call.z * 2 if call.layer == 3 else None):
        return model(inputs)


KINDS = (HookedMLLM.__call__, hooked, cached, ablated, written, nested, observed)


@torch.no_grad()
def test_four_threads_get_what_each_gets_alone(model, inputs):
    alone = [kind(model, inputs) for kind in KINDS]
    assert not torch.equal(alone[0], alone[1]) and not torch.equal(alone[0], alone[3])

    @torch.no_grad()
    def work(seed):
        order = torch.randperm(len(KINDS) * 5, generator=torch.Generator().manual_seed(seed)) % len(KINDS)
        return [(i, torch.equal(KINDS[i](model, inputs), alone[i])) for i in order.tolist()]

    with ThreadPoolExecutor(4) as pool:
        found = [one for part in pool.map(work, range(4)) for one in part]
    assert len(found) == 140 and all(same for _, same in found), [KINDS[i].__name__ for i, same in found if not same]
    assert torch.equal(model(inputs), alone[0]) and not any(point.fwd_hooks for point in model.hook_dict.values())


@torch.no_grad()
def test_plain_runs_carry_nothing_of_hooks_beside_them(model, inputs):
    plain, without = model(inputs), hooked(model, inputs)
    with ThreadPoolExecutor(2) as pool:
        a = pool.submit(lambda: [torch.equal(model(inputs), plain) for _ in range(60)])
        b = pool.submit(lambda: [torch.equal(hooked(model, inputs), without) for _ in range(60)])
        assert a.result() == b.result() == [True] * 60


def test_whole_experiments_run_beside_one_another(model):
    samples = haystacks("grounding", 3, seed=5)
    metrics = [LogitDiff(sample.answer, sample.counterfactual.answer) for sample in samples]
    alone = [activation_patching(model, sample, None, metric) for sample, metric in zip(samples, metrics, strict=True)]
    with ThreadPoolExecutor(3) as pool:
        beside = list(
            pool.map(lambda sample, metric: activation_patching(model, sample, None, metric), samples, metrics)
        )
    assert all(one.equals(other) for one, other in zip(alone, beside, strict=True))


@torch.no_grad()
def test_an_exception_leaves_the_model_to_the_next_thread(model, inputs):
    def broken(value, hook):
        raise RuntimeError("in the hook")

    def fail():
        with pytest.raises(RuntimeError, match="in the hook"):
            model.run_with_hooks(inputs, fwd_hooks=[(POINT, broken)])
        with pytest.raises(KeyError), model.hooks([(POINT, silent)]):
            raise KeyError
        return True

    plain = model(inputs)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(fail).result(timeout=30)
        assert torch.equal(pool.submit(model, inputs).result(timeout=30), plain)
    assert torch.equal(model(inputs), plain)


@torch.no_grad()
def test_a_block_that_waits_for_another_thread_is_an_error_and_no_standstill(model, inputs, monkeypatch):
    monkeypatch.setattr(turns, "PATIENCE", 0.2)
    with ThreadPoolExecutor(1) as pool:
        with (
            model.hooks([(POINT, silent)]),
            pytest.raises(ExperimentError, match=r"kept hooks open(.|\n)*its own model"),
        ):
            pool.submit(model, inputs).result(timeout=30)
        assert torch.equal(pool.submit(model, inputs).result(timeout=30), model(inputs))


@torch.no_grad()
def test_a_long_run_is_waited_for(model, inputs, monkeypatch):
    monkeypatch.setattr(turns, "PATIENCE", 0.01)
    started, go_on = threading.Event(), threading.Event()

    def slow(value, hook):
        started.set()
        assert go_on.wait(30)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(model.run_with_hooks, inputs, fwd_hooks=[(POINT, slow)])
        assert started.wait(30)
        second = pool.submit(model, inputs)
        with pytest.raises(TimeoutError):
            second.result(timeout=0.3)
        go_on.set()
        assert torch.equal(first.result(30), second.result(30))


@torch.no_grad()
def test_a_block_may_be_closed_by_another_thread(model, inputs):
    block = model.hooks([(POINT, silent)])
    block.__enter__()
    closing = threading.Thread(target=block.__exit__, args=(None, None, None))
    closing.start()
    closing.join(30)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(model, inputs).result(timeout=30), model(inputs))


def test_turns_are_not_copied():
    with turns.Turns().taken():
        taken = turns.Turns()
        with taken.taken(), copy.deepcopy(taken).taken():
            assert copy.deepcopy(taken)._depth == 0
