"""What is peculiar to single architectures: layers without heads, gates, shared keys, values made of keys, experts.

That every point of theirs is live and means what its table says is for the laws (``test_check.py``).
"""

import json

import numpy as np
import pytest
import torch

import mech
from mech.data.samples import Sample, Samples
from mech.errors import PointError
from mech.experiments.ablation.ablation import ablation
from mech.experiments.ranking.ranking import Ranking, rank_heads
from mech.experiments.scores.ram import retrieval_attention_mass
from mech.interventions import Ablate, intervene, reference_activations
from mech.reference.tiny_processors import noise

QUESTION = "Which digit is red?"


def asked(model):
    return model.inputs(QUESTION, images=[noise(40, 24)])


@pytest.mark.parametrize(
    "name, point, reason",
    [
        ("qwen3_5", "blocks.0.attn.hook_z", "linear attention: no heads"),
        ("lfm2_vl", "blocks.2.attn.hook_pattern", "a short convolution: no heads"),
        ("gemma4", "blocks.2.attn.hook_k", "keys and values of an earlier layer"),
        ("gemma4", "blocks.2.attn.hook_v", "keys and values of an earlier layer"),
        ("llama4", "blocks.2.mlp.hook_post", "mixture of experts"),
    ],
)
def test_a_point_that_a_layer_lacks_is_refused_with_the_reason(models, name, point, reason):
    with pytest.raises(PointError, match=reason):
        models(name).run_with_cache(asked(models(name)), names_filter=[point])


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_the_stream_of_layers_without_heads_is_there(models, name):
    model = models(name)
    assert model.cfg.attention_layers == (1,) and model.cfg.d_heads == (0, 8, 0)
    _, cache = model.run_with_cache(asked(model))
    for layer in range(3):
        pre, out, mid = (cache[f"blocks.{layer}.{p}"] for p in ("hook_resid_pre", "hook_attn_out", "hook_resid_mid"))
        torch.testing.assert_close(pre + out, mid)


def test_gated_attention_has_its_query_apart_from_the_gate_and_z_behind_it(models):
    model, kept = models("qwen3_5"), {}
    attn = model.hf_model.model.language_model.layers[1].self_attn
    handle = attn.q_proj.register_forward_hook(lambda module, args, output: kept.update(q=output))
    with model.attending(lambda call: kept.update(z=call.z)):
        _, cache = model.run_with_cache(asked(model), names_filter=["blocks.1.attn.hook_q", "blocks.1.attn.hook_z"])
    handle.remove()
    query, gate = kept["q"].unflatten(-1, (4, 16)).split(8, dim=-1)
    assert torch.equal(cache["blocks.1.attn.hook_q"], query)
    torch.testing.assert_close(cache["blocks.1.attn.hook_z"], kept["z"] * gate.sigmoid())


def test_values_made_of_keys_are_a_point_of_their_own_and_keys_write_both(models):
    model, inputs = models("gemma4_large"), asked(models("gemma4_large"))
    assert model.hf_model.model.language_model.layers[0].self_attn.v_proj is None
    names = [f"blocks.0.attn.hook_{point}" for point in ("rot_k", "v")]
    _, clean = model.run_with_cache(inputs, names_filter=names)
    with model.hooks([("blocks.0.attn.hook_k", lambda k, hook: k + 1)]):
        _, by_keys = model.run_with_cache(inputs, names_filter=names)
    assert all((by_keys[name] - clean[name]).abs().max() > 0.1 for name in names)
    with model.hooks([("blocks.0.attn.hook_v", lambda v, hook: v + 1)]):
        _, by_values = model.run_with_cache(inputs, names_filter=names)
    assert torch.equal(by_values[names[0]], clean[names[0]])
    torch.testing.assert_close(by_values[names[1]], clean[names[1]] + 1)


def test_shared_keys_written_in_one_layer_stay_there(models):
    """Layer 2 reads layer 1's keys: writing what it sees must not reach into layer 1, writing there reaches both."""
    model, inputs = models("gemma4"), asked(models("gemma4"))
    names = ["blocks.1.attn.hook_z", "blocks.2.attn.hook_rot_k"]
    _, clean = model.run_with_cache(inputs, names_filter=names)
    with model.hooks([("blocks.2.attn.hook_rot_k", lambda k, hook: k * 0)]):
        _, late = model.run_with_cache(inputs, names_filter=names)
    assert torch.equal(late[names[0]], clean[names[0]])
    with model.hooks([("blocks.1.attn.hook_k", lambda k, hook: k.flip(-1))]):
        _, early = model.run_with_cache(inputs, names_filter=names)
    assert not torch.equal(early[names[1]], clean[names[1]])


def test_rows_that_no_logit_is_asked_of_run_through_shared_layers_all_the_same(models):
    """transformers drops them there, and with them causality under a name of attention other than "sdpa"."""
    model, inputs, rows = models("gemma4"), asked(models("gemma4")), []
    whole = model(inputs)
    torch.testing.assert_close(model(inputs, logits_to_keep=5), whole[:, -5:])
    with model.hooks([("blocks.2.attn.hook_z", lambda z, hook: rows.append(z.shape[1]))]):
        model.generate(inputs, max_new_tokens=2, min_new_tokens=2)
    assert rows == [len(inputs.layout), 1]


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "llama4"])
def test_positions_are_known_where_the_cache_of_a_window_has_dropped_keys(models, name):
    model, seen = models(name), {}
    inputs = asked(model)

    def note(call):
        seen.setdefault(call.layer, []).append((call.query_start, call.k.shape[2]))

    with model.attending(note):
        model.generate(inputs, max_new_tokens=3, min_new_tokens=3)
    length = len(inputs.layout)
    for calls in seen.values():
        assert [start for start, _ in calls] == [0, length, length + 1]
    assert min(keys for calls in seen.values() for _, keys in calls[1:]) <= 8 < length, "no window dropped anything"


def test_experts_put_out_rows_of_the_batch(models):
    model = models("llama4")
    both = model.collate([asked(model), model.inputs(QUESTION, images=[noise(20, 20, 1)])])
    _, cache = model.run_with_cache(both, names_filter=["blocks.2.hook_mlp_out", "blocks.2.hook_resid_mid"])
    assert cache["blocks.2.hook_mlp_out"].shape == cache["blocks.2.hook_resid_mid"].shape


def test_a_projector_that_runs_image_by_image_is_one_point(models):
    model = models("lfm2_vl")
    inputs = model.inputs(QUESTION, images=[noise(40, 24), noise(16, 16, 1), noise(24, 40, 2)])
    _, cache = model.run_with_cache(inputs, names_filter="projector.hook_out")
    assert len(cache["projector.hook_out"]) == len(inputs.layout.positions("image"))
    assert "get_image_features" not in vars(model.hf_model.model), "the method is the class's own again"


SAMPLES = [
    Sample(QUESTION, "7", images=(noise(40, 24, k),), evidence=(mech.Box(2, 2, 20, 12),), id=str(k)) for k in range(5)
]


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_only_layers_with_heads_are_scored_ranked_and_ablated(models, name, tmp_path):
    model = models(name)
    ram = retrieval_attention_mass(model, Samples(SAMPLES[:3]))
    assert ram.layer.values.tolist() == [1] and ram.ram.shape == (3, 1, 4)
    ranking = rank_heads(ram)
    assert {head.layer for head in ranking.heads} == {1} and len(ranking) == 4
    assert {head.layer for heads in ranking.random(2, n_draws=3) for head in heads} == {1}
    assert ranking.stability(k=2).layer.values.tolist() == [1]
    again = Ranking.from_json(json.loads(json.dumps(ranking.to_json(tmp_path / "ranking.json"))))
    assert again.heads == ranking.heads and again.layers == (1,)
    np.testing.assert_array_equal(again.mean, ranking.mean)
    test, others = Samples(SAMPLES[3:4]), Samples(SAMPLES[4:])
    effects = ablation(model, test, ranking, to="mean", bands=("top", "random"), fractions=(0.25,), reference=others)
    assert "random" in effects.band.values


def test_mean_ablation_where_heads_have_several_sizes(models):
    model = models("gemma4")
    assert model.cfg.d_heads == (8, 16, 16)
    reference = reference_activations(model, SAMPLES[:2])
    inputs = model.inputs_of(SAMPLES[3])
    for layer, size in enumerate(model.cfg.d_heads):
        mean = reference.mean[:, layer, 1, :size]
        visual = torch.as_tensor(inputs.layout.kind == 1)

        def write(z, hook, mean=mean, visual=visual):
            z = z.clone()
            z[:, :, 1] = torch.where(visual[:, None], mean[1], mean[0])
            return z

        with torch.no_grad():
            expected = model.run_with_hooks(inputs, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", write)])
            with intervene(
                model, Ablate(heads=[(layer, 1)], to="mean", positions="all", reference=reference)
            ) as ablated:
                torch.testing.assert_close(ablated(inputs), expected, atol=1e-5, rtol=1e-4)


GRADIENTS = {
    "qwen3_5": ["blocks.1.attn.hook_q", "blocks.1.attn.hook_z", "blocks.0.hook_attn_out", "blocks.1.attn.hook_result"],
    "gemma4": ["blocks.0.attn.hook_v", "vision.blocks.1.attn.hook_v", "vision.blocks.1.attn.hook_result"],
    "gemma4_large": ["blocks.0.attn.hook_k", "blocks.1.hook_mlp_out"],
    "llama4": ["blocks.2.hook_mlp_out", "vision.blocks.0.hook_resid_pre"],
    "mllama": ["blocks.1.attn.hook_k", "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_pattern",
               "vision.blocks.3.hook_attn_out", "hook_embed"],
    "lfm2_vl": ["projector.hook_out", "blocks.0.hook_attn_out"],
}  # fmt: skip


@pytest.mark.parametrize("name, point", [(name, point) for name, points in GRADIENTS.items() for point in points])
def test_gradients_flow_through_unusual_points(models, name, point):
    """The gradient at a point is the derivative of the logits along a small write there."""
    model, kept = models(name), []
    inputs = asked(model)

    def keep(value, hook):
        value.retain_grad()
        kept.append(value)

    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(model.cfg.vocab, generator=generator) / model.cfg.vocab

    def score(*hooks):
        return (model.run_with_hooks(inputs, fwd_hooks=list(hooks))[0, -1].double() * weights).sum()

    with torch.enable_grad():
        score((point, keep)).backward()
    model.zero_grad(set_to_none=True)
    direction, step = kept[0].grad / kept[0].grad.norm(), 1e-2
    with torch.no_grad():
        high, low = (score((point, lambda v, hook, s=s: v + s * direction)) for s in (step, -step))
    measured, expected = (high - low) / (2 * step), (kept[0].grad * direction).sum().double()
    torch.testing.assert_close(measured, expected, rtol=5e-2, atol=1e-4)
