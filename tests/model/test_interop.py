"""TransformerLens users' habits: its cache methods and patching functions on our model, its bridge as an oracle."""

import numpy as np
import pytest
import torch
import transformer_lens.patching as tl_patching
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from mech.errors import MechError
from mech.model import HookedMLLM
from mech.reference import tiny, tiny_processors

PICTURES = [tiny_processors.noise(16, 16, seed) for seed in range(2)]


@pytest.fixture(scope="module")
def opened():
    """A model, a batch of two rows with images and padding, its logits and cache; made once for each name."""
    known = {}

    def get(name):
        if name not in known:
            model = HookedMLLM.from_hf(tiny.model(name), tiny_processors.processor(name))
            batch = model.collate(
                [model.inputs("Which digit?", images=PICTURES), model.inputs("What is it?", images=PICTURES[:1])]
            )
            with torch.no_grad():
                known[name] = (model, batch, *model.run_with_cache(batch))
        return known[name]

    return get


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=2e-5 * max(1.0, float(theirs.abs().max())), rtol=0)


# Plain, DeepStack, post-norms (Gemma), a centred norm before attention and MLP at once (Cohere).
FAMILIES = ("llava", "qwen3_vl", "gemma3", "cohere2_vision")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layer", [None, 1])
def test_the_parts_of_the_stream_sum_to_it(opened, name, layer):
    model, _, _, cache = opened(name)
    parts, labels = cache.decompose_resid(layer, return_labels=True)
    stream = cache["resid_post", -1] if layer is None else cache["resid_pre", layer]
    close(parts.sum(0), stream)
    assert ("remainder" in labels) == (name == "qwen3_vl")
    assert labels[:3] == ["embed", "0_attn_out", "0_mlp_out"] and len(parts) == len(labels)
    normed = cache.apply_ln_to_stack(parts, layer).sum(0)
    with torch.no_grad():
        close(normed, model.norm(model.cfg.n_layers if layer is None else layer)(stream))


@pytest.mark.parametrize("name", FAMILIES)
def test_logit_attributions_sum_to_the_logit(opened, name):
    _, _, logits, cache = opened(name)
    answers = torch.tensor([101, 103])
    parts = cache.decompose_resid()
    attributions = cache.logit_attrs(parts, answers)
    expected = torch.stack([logits[row, :, token] for row, token in enumerate(answers)])
    close(attributions.sum(0), expected)
    difference = cache.logit_attrs(parts, 101, 103)
    close(difference.sum(0), logits[..., 101] - logits[..., 103])
    last = cache.logit_attrs(cache.decompose_resid(pos_slice=-1), answers, pos_slice=-1)
    close(last, attributions[: len(last), :, -1])


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_head_results_and_neurons_sum_to_what_they_are_parts_of(opened, name):
    model, batch, _, _ = opened(name)
    with torch.no_grad():
        _, cache = model.run_with_cache(batch)
    heads, labels = cache.stack_head_results(return_labels=True)
    assert labels[:2] == ["L0H0", "L0H1"] and len(heads) == tiny.LAYERS * tiny.HEADS
    for layer in range(tiny.LAYERS):
        close(heads[layer * tiny.HEADS : (layer + 1) * tiny.HEADS].sum(0), cache["attn_out", layer])
    rest = cache.stack_head_results(incl_remainder=True)
    close(rest.sum(0), cache["resid_post", -1])
    neurons = cache.get_neuron_results(1)
    close(neurons.sum(-2), cache["mlp_out", 1])
    for expand in (True, False):
        parts = cache.get_full_resid_decomposition(expand_neurons=expand, pos_slice=-1)
        close(parts.sum(0), cache["resid_post", -1][:, -1])
    direction = torch.randn(tiny.D_MODEL, generator=torch.Generator().manual_seed(0))
    projected = cache.get_full_resid_decomposition(
        expand_neurons=False, apply_ln=True, pos_slice=-1, project_output_onto=direction
    )
    close(projected.sum(0), cache["ln_final.hook_normalized"][:, -1] @ direction)


def test_accumulated_streams_are_the_cached_ones_and_the_lens_of_the_last_is_the_logits(opened):
    model, _, logits, cache = opened("llava")
    streams, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels[:3] == ["0_pre", "0_mid", "1_pre"] and labels[-1] == "final_post"
    assert torch.equal(streams[1], cache["resid_mid", 0])
    with torch.no_grad():
        close(cache.accumulated_resid(apply_ln=True)[-1] @ model.W_U, logits)
    assert torch.equal(cache.stack_activation("z"), torch.stack([cache["z", layer] for layer in range(tiny.LAYERS)]))


def test_a_cache_of_one_row_without_its_batch_dimension(opened):
    model = opened("llava")[0]
    one = model.inputs("Which digit?", images=PICTURES[:1])
    with torch.no_grad():
        logits, cache = model.run_with_cache(one, remove_batch_dim=True)
    parts = cache.decompose_resid()
    assert parts.ndim == 3
    close(cache.logit_attrs(parts, 101, has_batch_dim=False).sum(0), logits[0, :, 101])


def test_what_cannot_be_right_is_refused_with_what_to_do(opened):
    gemma, moe, llava, hybrid = (opened(name)[3] for name in ("gemma3", "qwen3_vl_moe", "llava", "qwen3_5"))
    for call, match in (
        (gemma.stack_head_results, "between them and the stream"),
        (gemma.compute_head_results, "between them and the stream"),
        (hybrid.stack_head_results, "only layers"),
        (lambda: gemma.get_neuron_results(0), "post-norm"),
        (lambda: moe.get_neuron_results(0), "no experts"),
        (
            lambda: llava.stack_neuron_results(1, apply_ln=True, project_output_onto=torch.ones(32)),
            "project the result",
        ),
        (llava.logit_lens, "accumulated_resid"),
        (llava.compute_ssm_state, "state-space"),
        (lambda: llava["z", 7], "is not in the cache"),
        (lambda: llava.logit_attrs(llava.decompose_resid(), "two words here"), "a string of one token"),
    ):
        with pytest.raises(MechError, match=match):
            call()
    with pytest.raises(KeyError):
        llava["blocks.0.attn.hook_zz"]


@pytest.fixture(scope="module")
def pair(opened):
    """Clean and corrupted inputs that differ in their picture alone."""
    model = opened("llava")[0]
    clean, corrupted = (model.inputs("Is it?", images=[picture]) for picture in PICTURES)
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
    return model, clean, corrupted, cache


def metric(logits):
    return logits[0, -1, 101] - logits[0, -1, 103]


def patched(model, corrupted, cache, point, index):
    """The metric with ``index`` of a point taken from the clean run, through a hook of our own."""

    def patch(value, hook):
        value[index] = cache[hook.name][index]
        return value

    return metric(model.run_with_hooks(corrupted, fwd_hooks=[(point, patch)]))


@pytest.mark.filterwarnings("ignore")  # pandas and tqdm, inside TransformerLens
@pytest.mark.parametrize(
    ("function", "point", "index"),
    [
        ("get_act_patch_resid_pre", "hook_resid_pre", lambda pos: (slice(None), pos)),
        ("get_act_patch_resid_mid", "hook_resid_mid", lambda pos: (slice(None), pos)),
        ("get_act_patch_attn_out", "hook_attn_out", lambda pos: (slice(None), pos)),
        ("get_act_patch_mlp_out", "hook_mlp_out", lambda pos: (slice(None), pos)),
        ("get_act_patch_attn_head_out_all_pos", "attn.hook_z", lambda head: (slice(None), slice(None), head)),
        ("get_act_patch_attn_head_q_all_pos", "attn.hook_q", lambda head: (slice(None), slice(None), head)),
        ("get_act_patch_attn_head_v_all_pos", "attn.hook_v", lambda head: (slice(None), slice(None), head)),
        ("get_act_patch_attn_head_pattern_all_pos", "attn.hook_pattern", lambda head: (slice(None), head)),
    ],
)
def test_patching_functions_take_inputs_with_images(pair, function, point, index):
    model, _, corrupted, cache = pair
    with torch.no_grad():
        scores = getattr(tl_patching, function)(model, corrupted, cache, metric)
        expected = torch.empty_like(scores)
        for layer, cell in np.ndindex(*scores.shape):
            expected[layer, cell] = patched(model, corrupted, cache, f"blocks.{layer}.{point}", index(cell))
    assert torch.equal(scores, expected)
    assert (scores - metric(model(corrupted))).abs().max() > 1e-4
    size = tiny.KV_HEADS if "head_v" in function else tiny.HEADS
    assert scores.shape[1] == (size if "head" in function else corrupted.shape[1])


@pytest.mark.filterwarnings("ignore")
def test_path_patching_through_forks_we_do_not_have_is_refused(pair):
    model, _, corrupted, cache = pair
    with pytest.raises(MechError, match="path_patching"):
        tl_patching.get_act_patch_direct_path(model, corrupted, cache, cache, metric, 0, 0)


# Where TransformerLens' bridge is right in what it reads; it computes attention step by step. Not compared: rotated
# queries and keys (the bridge hooks the tables of the rotation, not what it rotates) and padding rows.
ORACLES = {
    "llava": "LlavaForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
}


@pytest.mark.parametrize("name", ORACLES)
def test_activations_equal_those_of_the_bridge(opened, name):
    _, batch, logits, cache = opened(name)
    stock = tiny.model(name)
    bridge = build_bridge_from_module(stock, ORACLES[name], hf_config=stock.config)
    given = {key: value for key, value in batch.tensors.items() if key != "input_ids"}
    with torch.no_grad():
        their_logits, theirs = bridge.run_with_cache(batch.tensors["input_ids"], **given, use_cache=False)
    real = batch.tensors["attention_mask"].bool()
    close(logits[real], their_logits[real])
    for layer in range(tiny.LAYERS):
        for point in ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "hook_resid_pre", "hook_resid_post"):
            key = f"blocks.{layer}.{point}"
            close(cache[key][real], theirs[key][real].reshape(cache[key][real].shape))
        pattern = f"blocks.{layer}.attn.hook_pattern"
        close(cache[pattern].transpose(1, 2)[real], theirs[pattern].transpose(1, 2)[real])
