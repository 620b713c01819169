"""What the laws do not say of points: gradients, results of heads, the sum of the stream, writes in place, the cache.

That every point fires, is live and means what the table in ``mech/model/points.py`` says is for ``test_check.py``.
"""

import pytest
import torch
from tensors import FEW, placeholder, tensors

from mech.errors import MechError
from mech.model import HookedMLLM
from mech.model.architectures.families import layers_of
from mech.reference import tiny

ROWS = ((2, 5), (1, 3))


@pytest.fixture(params=FEW, scope="module")
def bench(request):
    """A wrapped model that has run once, a padded batch with several images, its clean logits and all activations."""
    model, batch = HookedMLLM.from_hf(tiny.model(request.param), name=request.param), tensors(request.param, ROWS)
    with torch.no_grad():
        clean = model(batch)
        _, cache = model.run_with_cache(batch, names_filter=lambda name: True)
    return model, batch, clean, cache


def real(batch):
    return batch["attention_mask"].bool()


def noise(shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(model, batch, *hooks):
    with torch.no_grad():
        return model.run_with_hooks(batch, fwd_hooks=list(hooks))


def set_to(value):
    return lambda activation, hook: value


@pytest.mark.parametrize("bench", ["llava"], indirect=True)
def test_writes_in_place_count_as_writes(bench):
    model, batch, _, _ = bench

    def in_place(value, hook):
        value[:, -1] += 1

    def returned(value, hook):
        value = value.clone()
        value[:, -1] += 1
        return value

    for name in ("blocks.1.attn.hook_z", "blocks.1.hook_resid_post", "blocks.1.attn.hook_v", "hook_embed"):
        torch.testing.assert_close(run(model, batch, (name, in_place)), run(model, batch, (name, returned)))


@pytest.mark.parametrize("bench", ["llava"], indirect=True)
def test_a_cached_value_does_not_change_with_later_writes_in_place(bench):
    model, batch, _, cache = bench

    def zero(value, hook):
        value.zero_()

    names = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]
    with model.hooks([("blocks.1.hook_resid_pre", zero)]), torch.no_grad():
        _, seen = model.run_with_cache(batch, names_filter=names)
    assert seen["blocks.1.hook_resid_pre"].abs().sum() == 0
    torch.testing.assert_close(
        seen["blocks.0.hook_resid_post"], cache["blocks.0.hook_resid_post"], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("stack", ["text", "vision"])
def test_gradients_flow_through_every_point(bench, stack):
    """The gradient at a point is the derivative of the logits along a small write there."""
    family = bench[0].name
    if family == "qwen3_vl_moe":
        pytest.skip("the grouped matrix product of experts has no float64")
    model = HookedMLLM.from_hf(tiny.model(family).double())
    batch = {key: value.double() if value.is_floating_point() else value for key, value in bench[1].items()}
    weights = noise((real(batch).shape[1], tiny.VOCAB), seed=3).double() * real(batch)[..., None]
    prefix = f"{'vision.' if stack == 'vision' else ''}blocks.1."
    for name in (name for name in model.points() if name.startswith(prefix)):
        point, kept = name.removeprefix(prefix), []

        def keep(value, hook, kept=kept):
            value.retain_grad()
            kept.append(value)

        (model.run_with_hooks(batch, fwd_hooks=[(name, keep)]) * weights).sum().backward()
        # transformers' norms compute in float32 even here, so the step cannot be small
        direction, step = noise(kept[0].shape, seed=5).double(), 1e-3
        if point == "attn.hook_attn_scores":  # a masked score has no derivative
            direction = direction.masked_fill(torch.isneginf(kept[0]), 0.0)
        high, low = (
            (run(model, batch, (name, lambda value, hook, s=s, d=direction: value + s * d)) * weights).sum()
            for s in (step, -step)
        )
        measured, expected = (high - low) / (2 * step), (kept[0].grad * direction).sum()
        torch.testing.assert_close(expected, measured, rtol=3e-2, atol=1e-1, msg=f"{name}: {expected} {measured}")


@pytest.mark.parametrize("bench", ["llava"], indirect=True)
def test_backward_hooks_see_the_gradient(bench):
    model, batch, _, _ = bench
    seen = {}

    def save(grad, hook):
        seen[hook.name] = grad.clone()

    names = ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern"]
    with model.hooks(bwd_hooks=[(name, save) for name in names]):
        model(batch)[:, -1].sum().backward()
    model.zero_grad(set_to_none=True)
    assert set(seen) == set(names) and all(grad.abs().sum() > 0 for grad in seen.values())


def test_z_is_what_w_o_reads_and_result_is_its_split_by_head(bench):
    model, _, _, cache = bench
    for layer in range(tiny.LAYERS):
        z, result = cache[f"blocks.{layer}.attn.hook_z"], cache[f"blocks.{layer}.attn.hook_result"]
        block = model.hf_model.model.language_model.layers[layer]
        summed = z.flatten(2) @ block.self_attn.o_proj.weight.T
        torch.testing.assert_close(result[:, :, 2], z[:, :, 2] @ model.blocks[layer].attn.W_O[2])
        torch.testing.assert_close(result.sum(2), summed, atol=1e-5, rtol=1e-5)
        added = block.post_attention_layernorm(summed) if model.family.text.attn_out else summed
        torch.testing.assert_close(added, cache[f"blocks.{layer}.hook_attn_out"])


def test_the_same_edit_through_z_result_and_attn_out(bench):
    model, batch, _, cache = bench
    z = cache["blocks.1.attn.hook_z"].clone()
    z[:, 2:, 1] = noise(z[:, 2:, 1].shape)
    result = torch.einsum("bphd,hdm->bphm", z, model.blocks[1].attn.W_O)
    through_z = run(model, batch, ("blocks.1.attn.hook_z", set_to(z)))
    through_result = run(model, batch, ("blocks.1.attn.hook_result", set_to(result)))
    added = result.sum(2)
    if model.family.text.attn_out:
        added = model.hf_model.model.language_model.layers[1].post_attention_layernorm(added).detach()
    through_out = run(model, batch, ("blocks.1.hook_attn_out", set_to(added)))
    torch.testing.assert_close(through_result, through_z, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(through_out, through_z, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("bench", ["llava"], indirect=True)
def test_zero_scores_after_the_mask_attend_uniformly_even_to_the_future(bench):
    model, batch, _, _ = bench
    seen = {}
    run(
        model,
        batch,
        ("blocks.0.attn.hook_attn_scores", lambda scores, hook: torch.zeros_like(scores)),
        ("blocks.0.attn.hook_pattern", lambda pattern, hook: seen.update(pattern=pattern)),
    )
    length = real(batch).shape[1]
    torch.testing.assert_close(seen["pattern"], torch.full_like(seen["pattern"], 1 / length))


def test_rotated_queries_and_keys_make_the_scores(bench):
    _, _, _, cache = bench
    q, k = cache["blocks.1.attn.hook_rot_q"], cache["blocks.1.attn.hook_rot_k"].repeat_interleave(2, dim=2)
    scores, visible = cache["blocks.1.attn.hook_attn_scores"], cache["blocks.1.attn.hook_pattern"] > 0
    expected = torch.einsum("bqhd,bkhd->bhqk", q, k) * tiny.D_HEAD**-0.5
    torch.testing.assert_close(scores[visible], expected[visible], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stack", ["text", "vision"])
def test_what_an_mlp_puts_out_is_made_of_its_hidden_layer(bench, stack):
    model, _, _, cache = bench
    row, prefix = getattr(model.family, stack), f"{'vision.' if stack == 'vision' else ''}blocks.1."
    block = layers_of(model.hf_model, row)[1]
    made = block.get_submodule(f"{row.mlp}.{row.down}")(cache[f"{prefix}mlp.hook_post"])
    if row.mlp_out:
        made = block.get_submodule(row.mlp_out)(made)
    if row.mlp_gain:
        made = made * row.mlp_gain(block)
    torch.testing.assert_close(cache[f"{prefix}hook_mlp_out"], made, atol=1e-6, rtol=1e-5)


def test_the_stream_adds_up_and_what_is_added_between_layers_is_included(bench):
    model, batch, _, cache = bench
    visual = batch["input_ids"] == placeholder(model.name)
    for layer in range(tiny.LAYERS):
        block = f"blocks.{layer}."
        pre, post = (cache[block + f"hook_resid_{place}"] for place in ("pre", "post"))
        mid = pre + cache[block + "hook_attn_out"]
        if model.name != "cohere2_vision":
            torch.testing.assert_close(cache[block + "hook_resid_mid"], mid)
        added = (post - mid - cache[block + "hook_mlp_out"]).abs().amax(-1)
        deepstack = model.name.startswith("qwen3_vl") and layer < 2
        assert added[~visual].max() < 1e-5
        assert added[visual].min() > 1e-2 if deepstack else added[visual].max() < 1e-5
        if layer + 1 < tiny.LAYERS:
            assert torch.equal(post, cache[f"blocks.{layer + 1}.hook_resid_pre"])
    torch.testing.assert_close(cache["hook_embed"], cache["blocks.0.hook_resid_pre"], rtol=0, atol=0)
    logits = cache["ln_final.hook_normalized"] @ model.W_U
    torch.testing.assert_close(logits, model(batch).detach(), atol=5e-5, rtol=1e-4)


def test_windows_of_a_vision_layer_are_seen_as_one_layer():
    model, batch = HookedMLLM.from_hf(tiny.model("qwen2_5_vl")), tensors("qwen2_5_vl", ((3, 4),))
    with torch.no_grad():
        _, cache = model.run_with_cache(batch, names_filter=lambda name: name.startswith("vision.") and "attn" in name)
    windowed, full = ((cache[f"vision.blocks.{layer}.attn.hook_pattern"][0] > 0)[0] for layer in (0, 1))
    assert (windowed <= full).all() and windowed.sum() < full.sum()
    for layer in (0, 1, 2):
        pattern, v = (cache[f"vision.blocks.{layer}.attn.hook_{point}"] for point in ("pattern", "v"))
        z = cache[f"vision.blocks.{layer}.attn.hook_z"]
        torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", pattern, v), z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("feature_layer, live", [(-2, 2), (-1, 3), (1, 1), ([-2, 1], 2)])
def test_points_of_a_llava_tower_end_at_the_selected_layer(feature_layer, live):
    config = tiny.MODELS["llava"]()
    config.vision_feature_layer = feature_layer
    model = HookedMLLM.from_hf(tiny.build(config))
    batch = tensors("llava")
    clean = model(batch).detach()
    layers = {name.split(".")[2] for name in model.points() if name.startswith("vision.")}
    assert layers == {str(layer) for layer in range(live)}
    last = f"vision.blocks.{live - 1}.hook_resid_post"
    assert not torch.equal(run(model, batch, (last, lambda value, hook: value + noise(value.shape))), clean)


def test_half_precision_keeps_scores_wide_and_writes_exact():
    model, batch = HookedMLLM.from_hf(tiny.model("llava").to(torch.bfloat16)), tensors("llava")
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    clean = model(batch).detach()
    _, wide = model.run_with_cache(batch, names_filter="blocks.0.attn.hook_pattern")
    assert wide["blocks.0.attn.hook_pattern"].dtype == torch.float32
    names = ["blocks.1.hook_resid_mid", "blocks.1.attn.hook_result", "blocks.1.attn.hook_z"]
    _, cache = model.run_with_cache(batch, names_filter=names)
    for name in names:
        assert torch.equal(run(model, batch, (name, set_to(cache[name].float()))), clean)


def test_activation_cache_works_as_in_transformerlens(bench):
    model, _, _, cache = bench
    assert torch.equal(cache["z", 1], cache["blocks.1.attn.hook_z"])
    assert torch.equal(cache["resid_post", -1], cache["blocks.2.hook_resid_post"])
    if model.family.text.attn_out:
        with pytest.raises(MechError, match="stands between them and the stream"):
            cache.stack_head_results(layer=2)
        return
    stacked = cache.stack_head_results(layer=2)
    assert stacked.shape[0] == 2 * tiny.HEADS
    torch.testing.assert_close(stacked[tiny.HEADS + 3], cache["blocks.1.attn.hook_result"][:, :, 3])
    _, without = model.run_with_cache(tensors(model.name, ROWS), names_filter=lambda n: "hook_z" in n)
    torch.testing.assert_close(without.stack_head_results(layer=2), stacked, atol=1e-5, rtol=1e-5)
