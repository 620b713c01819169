"""``model.W_O[3, 5]`` and its like: TransformerLens' names, shapes and values, read off the stock model."""

import pytest
import torch
from torch import nn
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from mech.errors import UnsupportedModel
from mech.model import HookedMLLM
from mech.model.check.laws import make_batches
from mech.model.check.projections import weights
from mech.reference import tiny, tiny_processors

HEADS, KV, D, D_HEAD, MLP = tiny.HEADS, tiny.KV_HEADS, tiny.D_MODEL, tiny.D_HEAD, tiny.D_MLP
ATTENTION = {
    "W_Q": (HEADS, D, D_HEAD), "W_K": (KV, D, D_HEAD), "W_V": (KV, D, D_HEAD), "W_O": (HEADS, D_HEAD, D),
    "b_Q": (HEADS, D_HEAD), "b_K": (KV, D_HEAD), "b_V": (KV, D_HEAD), "b_O": (D,),
}  # fmt: skip
FEED_FORWARD = {"W_in": (D, MLP), "W_gate": (D, MLP), "W_out": (MLP, D), "b_in": (MLP,), "b_out": (D,)}
# Why a family's layers cannot be stacked, by the kind of weight.
APART = {
    "qwen3_5": {"attn": "layer 0 has no heads"},
    "qwen3_5_moe": {"attn": "layer 0 has no heads", "mlp": "layer 0 has a mixture of experts"},
    "lfm2_vl": {"attn": "layer 0 has no heads"},
    "gemma4": {"attn": "layer 1 has other sizes than layer 0"},
    "gemma4_large": {"attn": "layer 1 has other sizes than layer 0"},
    "qwen3_vl_moe": {"mlp": "layer 0 has a mixture of experts"},
    "glm4v_moe": {"mlp": "layer 2 has a mixture of experts"},
    "llama4": {"mlp": "layer 2 has a mixture of experts"},
}


def wrapped(name):
    return HookedMLLM.from_hf(tiny.model(name), tiny_processors.processor(name), name=name)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_weights_are_those_the_model_multiplies_by_and_stack_or_say_why_not(name):
    model = wrapped(name)
    with torch.no_grad():
        found = list(weights(model, make_batches(model, full=True)))
    assert not [f"{one.where}: {one.says}" for one in found if not one.ok]
    assert {"W_U", "W_E"} <= {one.where for one in found}
    kv, d_mlp = model.cfg.n_kv_heads, model.cfg.d_mlp
    for part, shapes in (("attn", ATTENTION), ("mlp", FEED_FORWARD)):
        for weight, shape in shapes.items():
            if part in APART.get(name, {}):
                says = f"{weight} of all layers of {name}, whose {APART[name][part]}"
                with pytest.raises(UnsupportedModel, match=says):
                    getattr(model, weight)
                continue
            own = (kv, *shape[1:]) if weight[2] in "KV" else tuple(d_mlp if size == MLP else size for size in shape)
            stacked, of_layer = getattr(model, weight), getattr(getattr(model.blocks[1], part), weight, None)
            assert stacked.shape == (model.cfg.n_layers, *own), weight
            assert torch.equal(stacked[1], torch.zeros(own) if of_layer is None else of_layer)
    assert model.W_E.shape[1] == D and model.W_U.shape == (D, len(model.b_U))


def test_blocks_are_views_of_the_stock_weights():
    model = wrapped("llava")
    layer = model.hf_model.model.language_model.layers[1]
    for view, stock in (
        (model.blocks[1].attn.W_O, layer.self_attn.o_proj), (model.blocks[1].attn.W_K, layer.self_attn.k_proj),
        (model.blocks[1].mlp.W_in, layer.mlp.up_proj), (model.blocks[1].mlp.W_out, layer.mlp.down_proj),
        (model.W_U, model.hf_model.lm_head), (model.W_E, model.hf_model.get_input_embeddings()),
    ):  # fmt: skip
        assert view.untyped_storage().data_ptr() == stock.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_shapes_and_values_are_those_of_transformer_lens(name):
    stock, ours = tiny.model(name), wrapped(name)
    theirs = build_bridge_from_module(stock, type(stock).__name__, hf_config=stock.config)
    for weight in (*(one for one in (*ATTENTION, *FEED_FORWARD) if one.startswith("W_")), "W_U", "b_U"):
        assert torch.equal(getattr(ours, weight), getattr(theirs, weight)), weight
    # What a token adds to the stream: Gemma scales it, the bridge leaves that out.
    scale = D**0.5 if name == "gemma3" else 1.0
    torch.testing.assert_close(ours.W_E, theirs.W_E * scale)


def test_quantized_weights_are_refused_by_name():
    hf = tiny.model("llava")
    up = hf.model.language_model.layers[1].mlp.up_proj
    up.weight = nn.Parameter(up.weight.detach().to(torch.int8), requires_grad=False)
    model = HookedMLLM.from_hf(hf, name="tiny")
    with pytest.raises(UnsupportedModel, match="W_in of all layers of tiny, whose layer 1 has quantized weights"):
        _ = model.W_in
    assert model.blocks[1].mlp.W_in is None and model.W_out.shape == (3, MLP, D)
