"""Traps of sparse inference, set on purpose: masks of a group's first head, and answers kept under the model's name."""

import itertools

import pytest
import torch

import mech
from mech.model import HookedMLLM
from mech.reference import tiny, tiny_processors
from mech.sparse import localize as localized
from mech.sparse.kernels import Plan
from mech.sparse.policy import Policy


@pytest.fixture(scope="module")
def model():
    return HookedMLLM.from_hf(tiny.model("llava"), tiny_processors.processor("llava"), name="tiny")


@pytest.fixture(scope="module")
def inputs(model):
    return model.inputs("Which?", [tiny_processors.noise(24, 24)])


def of_first_heads(heads, groups):
    """The trap: every query head of a group is masked as the group's first (FlashInfer's SM100 path does so)."""
    first = heads.reshape(groups, -1)[:, :1].expand(-1, len(heads) // groups).flatten()
    return PLAN(first, groups)


PLAN = Plan.of


def test_each_query_head_of_a_group_has_its_own_mask(model, inputs, monkeypatch):
    """Only the second head of a group is dense: the fused kernel against the pattern that each head is shown."""
    policy = Policy([(layer, 1) for layer in range(3)], sinks=1, window=6)
    assert model.cfg.n_heads == 2 * model.cfg.n_kv_heads
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(3)]

    def ways():
        with mech.localize(model, policy) as fast:
            fused = fast(inputs)
            with model.hooks([(name, lambda pattern, hook: pattern) for name in names]):
                return fused, fast(inputs)

    torch.testing.assert_close(*ways(), atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(localized.Plan, "of", staticmethod(of_first_heads))
    wrong, right = ways()
    assert (wrong - right).abs().max() > 1e-3


def test_a_policy_has_one_digest_and_no_other_policy_has_it():
    heads = [(0, 1), (2, 3), (1, 0), (2, 2), (0, 3), (1, 1)]
    policy = Policy(heads, window=32)
    assert policy.digest == Policy(heads[::-1], window=32).digest  # said in another order
    others = [Policy([*heads[:-1], (1, 2)], window=32), Policy(heads[:-1], window=32), Policy(heads, window=33)]
    others += [Policy(heads, sinks=5, window=32), Policy(heads, window=32, keep_text=True), Policy((), window=32)]
    others += [Policy(heads, window=32, phase=phase) for phase in ("prefill", "decode")]
    assert len({policy.digest, *(one.digest for one in others)}) == len(others) + 1
    for one, other in itertools.combinations([policy, *others], 2):
        assert repr(one) != repr(other)  # also where they differ in a head that is not shown


def test_a_response_cache_that_knows_the_policy_replays_no_dense_answer(model, inputs):
    """As evaluation harnesses do: answers are kept under the model's name and its arguments."""
    kept = {}

    def answered(arguments, run):
        key = (model.name, arguments, "document 1")
        if key not in kept:
            kept[key] = run(inputs)
        return kept[key]

    policy = Policy([(0, 0)], sinks=1, window=6)
    dense = answered("", model)
    with mech.localize(model, policy) as fast:
        assert torch.equal(answered("", fast), dense)  # the trap
        assert not torch.equal(answered(f"policy={policy.digest}", fast), dense)
