"""On a GPU: the laws in its precisions, kernels against their definition, sweeps whole and where memory runs out.

pytest -m gpu          # a few minutes on one card; what needs two says so where there is one
"""

import numpy as np
import pytest
import torch
from pairs import METRIC, pair

import mech
from mech.model.attention import AttentionCall
from mech.model.check.laws import LAWS, make_batches
from mech.model.partial.room import SmallerBatches
from mech.model.partial.shared_keys import over_shared, written_out
from mech.reference import tiny, tiny_processors
from mech.sparse.kernels import by_definition, split_heads
from mech.sparse.masks import Near
from mech.sparse.plan import Plan
from mech.sparse.policy import Policy

pytestmark = pytest.mark.gpu
CLOSE = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def opened(name, dtype=torch.float32):
    return mech.HookedMLLM.from_hf(tiny.model(name).to("cuda", dtype), tiny_processors.processor(name), name=name)


def failures(model):
    with torch.no_grad():
        batches = make_batches(model)
        return [f"{law.__name__} {one.where}: {one.says}" for law in LAWS.values() for one in law(model, batches)
                if one.ok is False]  # fmt: skip


@pytest.mark.parametrize("name", tiny.NAMES)
def test_laws_on_a_card(name):
    assert not failures(opened(name))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_laws_in_bfloat16(name):
    if not torch.cuda.is_bf16_supported():
        pytest.skip("a card without bfloat16")
    assert not failures(opened(name, torch.bfloat16))


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_laws_with_layers_on_two_devices(name, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tiny.model(name).save_pretrained(tmp_path)
    tiny_processors.processor(name).save_pretrained(tmp_path)
    model = mech.HookedMLLM.from_pretrained(tmp_path, device_map="balanced")
    assert len({p.device for p in model.hf_model.parameters()}) == 2 and not failures(model)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(8, 8, 64), (8, 2, 128), (4, 1, 80)])
@pytest.mark.parametrize("rows", [1, 16])
def test_attention_to_shared_keys(heads, kv_heads, width, rows, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(40, heads, rows, width, device="cuda", generator=generator)
    k, v = torch.randn(2, kv_heads, 600, width, device="cuda", generator=generator)
    own = torch.randn(2, 40, kv_heads, rows, width, device="cuda", generator=generator)
    seen = torch.arange(600 + rows, device="cuda") <= torch.arange(600, 600 + rows, device="cuda")[:, None]
    expected = written_out(q, k, v, tuple(own), seen, width**-0.5)
    found = over_shared(q.to(dtype), k.to(dtype), v.to(dtype), tuple(own.to(dtype)), width**-0.5)
    torch.testing.assert_close(found.float(), expected, atol=CLOSE[dtype], rtol=CLOSE[dtype])


@pytest.mark.filterwarnings("ignore::mech.sparse.card.choice.Fallback")  # single precision
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_kernels_of_local_heads_are_their_definition(kv_heads, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(1, 8, 3000, 64, device="cuda", generator=generator).to(dtype)
    k, v = torch.randn(2, 1, kv_heads, 3000, 64, device="cuda", generator=generator).to(dtype)
    near = Near(Policy((), 16, 256), torch.zeros(1, dtype=torch.long), torch.tensor([3000]))
    call = AttentionCall("text", 0, q, k, v, q.transpose(1, 2), None, 64**-0.5, True, 0)
    dense = torch.arange(8) < 8 // kv_heads
    found = split_heads(call, near, Plan.of(dense, kv_heads))  # the plan was made on the CPU
    expected = by_definition(call, near, dense)
    torch.testing.assert_close(found, expected, atol=CLOSE[dtype], rtol=CLOSE[dtype])


@pytest.mark.parametrize("positions", ["last", "question", "image"])
def test_a_sweep_is_its_literal_twin(positions):
    model = opened("qwen3_vl")
    found, literal = (
        mech.activation_patching(model, *pair(model), METRIC, positions=positions, method=method)
        for method in ("wavefront", "literal")
    )
    np.testing.assert_allclose(found.metric, literal.metric, atol=2e-3)


def test_a_sweep_that_does_not_fit_goes_on_in_halves():
    """The card is filled up, but for what a few of the variants need."""
    model = opened("llava")
    run = lambda: mech.activation_patching(model, *pair(model), METRIC, positions="all")  # noqa: E731
    right = run()
    torch.cuda.reset_peak_memory_stats()
    run()
    needed = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + needed // 3) / total)
        with pytest.warns(SmallerBatches):
            found = run()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    np.testing.assert_allclose(found.metric, right.metric, atol=2e-3)
