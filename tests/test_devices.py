"""Every public function that runs a model, on a model whose layers lie on two cards: no index is left on the CPU.

The cards are those of ``tests/support/cards.py``: torch's rules about devices, without a device. What they compute has
to equal what the CPU does.
"""

import inspect
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import xarray as xr
from cards import Cards, spread
from right_calls import calls
from right_calls.given import Given

import mech
from mech.model.attention import AttentionCall
from mech.model.check.laws import LAWS, make_batches
from mech.model.check.running import unwrapping
from mech.reference import tiny, tiny_processors
from mech.sparse.kernels import by_definition, split_heads
from mech.sparse.masks import Near
from mech.sparse.plan import Plan
from mech.sparse.policy import Policy

NAME = "reference:qwen-s"
# Few draws and short answers, wherever a function takes such an argument.
SMALL = {
    "n_random": 2, "n_boot": 20, "n_paths": 1, "steps": 2, "n_resamples": 20, "n_permutations": 99, "turns": 0,
    "max_new_tokens": 2, "fractions": (0.2,), "shares": (0.25,), "choices": ("ram", "random"), "confirm": 4,
    "max_nodes": 2, "window": 16, "sinks": 1,
}  # fmt: skip
# They take the name of a model or need no forward; are made of others that are run here, and long; or train weights,
# which have to be nn.Parameters themselves; or cannot prune this architecture; or work
# on the maps that another one returned.
NO_RUN = {"rank_heads", "check_samples", "causal_report", "trace_circuit", "head_record"}
NO_RUN |= {"sparsify", "prune_heads", "with_sinks", "without_sinks"}


def localized(model, inputs):
    with mech.localize(model, dense_heads=[(0, 0), (1, 2)], sinks=1, window=16) as fast:
        logits = fast(inputs)
        fast.generate(inputs, max_new_tokens=3)
    return logits


def dynamic(model, inputs):
    fast = mech.localize_dynamic(model, 2, sinks=1, window=16)
    fast.generate(inputs, max_new_tokens=2)
    return fast(inputs)


def changed(model, folder):
    """What is passed in place of, or beside, the arguments that ``right_calls`` knows."""
    many = mech.haystacks("grounding", n=12, seed=0)
    inputs = model.inputs_of(many[0])
    texts = mech.haystacks("grounding", n=2, seed=3, form="text")
    pictures = mech.haystacks("grounding", n=2, seed=3)
    return {
        "HookedMLLM.add_hook": {"hook": lambda value, hook: None},
        "HookedMLLM.attending": {"fn": lambda call: None},
        "HookedMLLM.collate": {"rows": [inputs, model.inputs_of(many[1])]},
        "HookedMLLM.encode_pictures": {"inputs": inputs},
        "HookedMLLM.select": {"names": "hook_embed"},
        "localize": {"function": lambda model, **_: localized(model, inputs)},
        "localize_dynamic": {"function": lambda model, **_: dynamic(model, inputs)},
        "modality_transfer": {"pictures": pictures, "text": texts},
        "published_claims": {"samples": many[:8], "only": ["boundary-tags"]},
        "retrieval_test": {"samples": many},
    }


def runs(model, folder):
    """name -> a call that runs the model, cheaply."""
    found, other = {}, changed(model, folder)
    for name, call in calls(Given(model, folder)).items():
        bound = name.startswith("HookedMLLM.") and name != "HookedMLLM.from_pretrained"
        if not (bound or name.endswith(", run") or call.kinds.get("model") == "model" or name == "without_pictures"):
            continue
        small = {key: value for key, value in SMALL.items() if key in call.kinds and key not in call.right}
        given = {**call.right, **small, **other.get(name, {})}
        function = given.pop("function", call.function)
        found[name] = partial(function, **given)
    for name in {"pruning_report", *NO_RUN} & found.keys():
        del found[name]
    return found


def numbers(result):
    """The floating point numbers of a result, on the CPU."""
    if isinstance(result, torch.Tensor):
        return [result.detach().cpu().double().numpy()] if result.is_floating_point() else []
    if isinstance(result, xr.DataArray):
        result = result.to_dataset(name="result")
    if isinstance(result, xr.Dataset):
        return [x.values.astype(float) for x in result.data_vars.values() if x.dtype.kind == "f"]
    if hasattr(result, "dataset"):
        return numbers(result.dataset)
    return []


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The calls on the CPU, and the same on cards, while those can be named."""
    model = mech.HookedMLLM.from_pretrained(NAME, device="cpu")
    here = runs(model, tmp_path_factory.mktemp("here"))
    with Cards():
        other = mech.HookedMLLM.from_pretrained(NAME, device="cpu")
        elsewhere = mech.HookedMLLM.from_hf(spread(other.unwrap()), other.processor, name=NAME)
        yield here, runs(elsewhere, tmp_path_factory.mktemp("there"))


def test_every_public_function_of_a_model_is_run(both):
    asked = {name for name in mech.__all__ if inspect.isfunction(one := getattr(mech, name))
             and "model" in inspect.signature(one).parameters}  # fmt: skip
    assert asked - NO_RUN - {"pruning_report"} <= set(both[0])


def test_a_tensor_left_on_the_cpu_shows():
    with Cards():
        there, here = torch.ones(3, device="card:1"), torch.ones(3)
        places = here.long()
        for mixed in (lambda: there + here, lambda: there + here.to("card:0"), lambda: there.where(here > 0, 1.0),
                      lambda: there.index_select(0, places)):  # fmt: skip
            with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
                mixed()
        with pytest.raises(TypeError, match="can't convert card:1"):
            there.numpy()
        with pytest.raises(RuntimeError, match="device type for generator"):
            torch.randn(3, device="card", generator=torch.Generator())
        assert (there * torch.tensor(2.0))[torch.tensor([0, 2])].tolist() == [2, 2]  # what torch allows


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
def test_laws_hold_with_layers_on_two_cards(name):
    """Every law of ``mech check``; DeepStack writes into layers of one card, and Gemma ties its embeddings."""
    with Cards(), torch.no_grad():
        model = mech.HookedMLLM.from_hf(spread(tiny.model(name)), tiny_processors.processor(name), name=name)
        batches = make_batches(model)
        for law in (*LAWS.values(), unwrapping):
            wrong = [f"{one.where}: {one.says}" for one in law(model, batches) if one.ok is False]
            assert not wrong, f"{law.__name__}: {wrong}"


def test_split_heads_moves_a_plan_that_was_made_on_the_cpu():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 40, 8, generator=generator) for heads in (4, 2, 2))
    dense = torch.tensor([True, False, False, False])
    near = Near(Policy((), 1, 8), torch.zeros(1, dtype=torch.long), torch.tensor([40]))
    call = AttentionCall("text", 0, q, k, v, q.transpose(1, 2), None, 8**-0.5, True, 0)
    expected = split_heads(call, near, Plan.of(dense, 2))
    with Cards():
        there = replace(call, **{name: getattr(call, name).to("card") for name in "qkvz"})
        found = split_heads(there, near, Plan.of(dense, 2))
        assert found.device.type == "card"
        torch.testing.assert_close(found.cpu(), expected)
        torch.testing.assert_close(by_definition(there, near, dense).cpu(), expected)


@pytest.mark.slow
def test_public_functions_on_two_cards(both, subtests):
    here, there = both
    for name in there:
        with subtests.test(name):
            expected, found = numbers(here[name]()), numbers(there[name]())
            for one, other in zip(expected, found, strict=True):
                np.testing.assert_allclose(other, one, atol=2e-3, rtol=2e-2)
