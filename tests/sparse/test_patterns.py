"""Policies as patterns of layers: the stock model under the pattern is the localized model, and what cannot be said."""

import json

import pytest
import torch
from tiny_models import opened

import mech
from mech.errors import ExperimentError, OutputError, UnsupportedModel
from mech.reference import tiny, tiny_processors
from mech.sparse.patterns import FULL, SLIDING, LayerPattern, nearest_layers

ABLE = ("llava_siglip", "llava_qwen3", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "internvl")
WINDOW = 12


def whole(layers, n_heads=tiny.HEADS):
    return [(layer, head) for layer in layers for head in range(n_heads)]


@pytest.mark.parametrize("name", ABLE)
def test_the_stock_model_under_a_pattern_is_the_localized_one(name):
    model = opened(name)
    inputs = model.inputs("What?", [tiny_processors.noise(24, 24, seed) for seed in (0, 1)])
    policy = mech.Policy(whole([1]), sinks=0, window=WINDOW)
    pattern = LayerPattern.of(policy, model)
    assert pattern.layer_types == (SLIDING, FULL, SLIDING) and pattern.sliding_window == WINDOW
    with mech.localize(model, policy) as fast:
        logits, text = fast(inputs), fast.generate(inputs, max_new_tokens=6)
    dense = model(inputs)
    stock = model.hf_model
    model.unwrap()
    other = type(stock)(pattern.apply(stock.config)).eval()
    other.load_state_dict(stock.state_dict())
    other.set_attn_implementation("sdpa")
    with torch.no_grad():
        found = other(**inputs.tensors).logits
        start = inputs.tensors["input_ids"].shape[1]
        written = other.generate(**inputs.tensors, max_new_tokens=6, do_sample=False)[:, start:]
    assert (logits - dense).abs().max() > 1e-3
    torch.testing.assert_close(found, logits, atol=2e-5, rtol=1e-4)
    assert written.tolist() == text.tolist()


def test_the_nearest_pattern_holds_as_many_groups():
    model = opened("qwen2_5_vl")
    one, both = [(2, 0), (2, 2)], [(0, 1), (1, 2), (2, 0), (2, 3)]  # query heads of two and of four KV groups
    near = nearest_layers(mech.Policy(one, sinks=4, window=WINDOW), model)
    assert near == mech.Policy(whole([2]), sinks=0, window=WINDOW)
    assert nearest_layers(mech.Policy(both, window=WINDOW), model).dense_heads == tuple(whole([0, 2]))
    assert LayerPattern.of(near, model).layer_types == (SLIDING, SLIDING, FULL)
    assert nearest_layers(mech.Policy(whole([0, 1]), window=WINDOW), model).dense_heads == tuple(whole([0, 1]))
    assert nearest_layers(mech.Policy([], window=WINDOW), model).dense_heads == ()


def test_a_pattern_is_saved_in_the_words_of_the_engines(tmp_path):
    pattern = LayerPattern.of(mech.Policy(whole([0]), sinks=0, window=5), opened("qwen2_5_vl"))
    record = json.loads(pattern.save(tmp_path / "new").read_text())
    assert record == {"layer_types": [FULL, SLIDING, SLIDING], "sliding_window": 5, "use_sliding_window": True}
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        pattern.save(tmp_path / "file")


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (mech.Policy(whole([0]), sinks=4), "sinks=4"),
        (mech.Policy(whole([0]), sinks=0, phase="prefill"), "phase='prefill'"),
        (mech.Policy(whole([0]), sinks=0, keep_text=True), "keep_text=True"),
        (mech.Policy([(2, 0), (2, 3)], sinks=0), "the nearest keeps layers 2"),
        (mech.Policy([(7, 0)], sinks=0), "layer 7"),
    ],
)
def test_what_no_pattern_says_is_refused_with_the_nearest(policy, says):
    with pytest.raises(ExperimentError, match=says):
        LayerPattern.of(policy, opened("qwen2_5_vl"))


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_5", "mllama"])
def test_architectures_without_a_pattern_of_their_own_are_refused(name):
    with pytest.raises(UnsupportedModel, match=r"mech\.localize"):
        LayerPattern.of(mech.Policy([], sinks=0), opened(name))
