"""Attribution against what it estimates: exact patching near a run, explicit masks, linear models, planted circuits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pairs import METRIC, axes, opened, pair

from mech.errors import ExperimentError, PointError
from mech.experiments.attribution.edges import edge_attribution, top_edges
from mech.experiments.attribution.inputs import input_attribution
from mech.experiments.attribution.nodes import attribution
from mech.experiments.gradients import differentiate
from mech.experiments.metrics import LogitDiff, Rank
from mech.experiments.patching.activation import activation_patching
from mech.model import HookedMLLM
from mech.reference import planted, tiny_processors

FAMILIES = ("llava", "qwen3_vl", "gemma3")  # plain; grouped, M-RoPE, DeepStack; post-norms and windows
POINTS = ("attn.hook_z", "attn.hook_q", "attn.hook_rot_k", "attn.hook_v", "attn.hook_pattern", "hook_resid_post")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return opened(request.param)


@pytest.fixture(scope="module")
def linear():
    """Uniform attention, no feed-forward, no norms: logits are a linear map of the embeddings."""
    model = opened("llava_mistral")
    text = model.hf_model.model.language_model
    for layer in text.layers:
        layer.self_attn.q_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
        layer.input_layernorm = torch.nn.Identity()
    text.norm = torch.nn.Identity()
    return HookedMLLM.from_hf(model.unwrap(), tiny_processors.processor("llava_mistral"))


def near(run, other, share=1e-3):
    """The run with pixels a little on the way to another's: first order is all there is."""
    pixels = torch.lerp(run.tensors["pixel_values"], other.tensors["pixel_values"], share)
    return replace(run, tensors={**run.tensors, "pixel_values": pixels})


# -- nodes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", POINTS)
def test_near_a_run_the_estimate_is_the_effect(family, point):
    clean, corrupted = pair(family)
    given = (family, clean, near(clean, corrupted), METRIC)
    options = {"point": point, "over": axes(point), "direction": "noise"}
    found = attribution(*given, **options, check=4)
    exact = activation_patching(*given, **options)
    size = abs(exact.metric - exact.clean).max()
    assert abs(found.metric - exact.metric).max() < 0.02 * size
    np.testing.assert_allclose(found.clean, exact.clean)
    np.testing.assert_allclose(found.corrupted, exact.corrupted)
    if point != "hook_resid_post":  # all positions of it are the whole run, in every layer
        assert found.attrs["rank_correlation"] > 0.9
    assert found.sizes["check"] == min(4, int(np.prod([exact.sizes[axis] for axis in axes(point)])))


def test_the_check_is_exact_patching(llava):
    both = pair(llava)
    found = attribution(llava, *both, METRIC, over=("layer", "head", "region"), regions=["image", "question"])
    exact = activation_patching(llava, *both, METRIC, over=("layer", "head", "region"), regions=["image", "question"])
    for index, label in enumerate(found.cell.values):
        layer, head, region = (part.split(" ")[1] for part in str(label).split(", "))
        cell = {"layer": int(layer), "head": int(head), "region": region}
        np.testing.assert_allclose(found.exact[:, index], exact.effect.sel(cell), atol=1e-9)
        np.testing.assert_allclose(found.estimate[:, index], found.effect.sel(cell), atol=1e-12)


@pytest.mark.parametrize("over", [("region",), ("layer", "region")])
def test_at_embeddings_and_projected_features(llava, over):
    both = [llava.inputs("What is it?", [tiny_processors.noise(24, 24, seed)]) for seed in (0, 1)]
    point = "projector.hook_out" if over == ("region",) else "hook_resid_pre"
    regions = ["image", [0, 5], "question"] if point != "projector.hook_out" else ["image"]
    found = attribution(llava, *both, METRIC, point=point, over=over, regions=regions, check=0)
    whole = attribution(llava, *both, METRIC, point="hook_embed", over=("region",), regions=["image"], check=0)
    first = found.effect if over == ("region",) else found.effect.sel(layer=0)
    np.testing.assert_allclose(first.sel(region="image"), whole.effect.sel(region="image"), atol=1e-9)


@pytest.mark.parametrize("point", ["attn.hook_q", "attn.hook_k"])
def test_the_softmax_is_gone_through_exactly(family, point):
    """Against patterns that were made by literally writing queries or keys, and the slope at the pattern."""
    clean, corrupted = pair(family)
    found = attribution(family, clean, corrupted, METRIC, point=point, over=("layer", *axes(point)[1:], "region"),
                        regions=["image", "last"], direction="noise", check=0)  # fmt: skip
    name, pattern, head = f"blocks.1.{point}", "blocks.1.attn.hook_pattern", 1
    reads = [METRIC.reading(family, layout, 0).positions[0] for layout in clean.layouts]
    assert len(set(reads)) == 1  # left padding: every row ends at the same place

    def score(run):
        last = family(run, logits_to_keep=1)[:, 0]
        return last[:, 300] - last[:, 301]

    slopes = differentiate(family, clean, [pattern], score)
    with torch.no_grad():
        other = family.run_with_cache(corrupted, names_filter=[name])[1][name]
        for index, region in enumerate(["image", "last"]):

            def write(value, hook, region=region):
                for row, layout in enumerate(clean.layouts):
                    where = layout.positions(region)
                    value[row, where, head] = other[row, where, head]
                return value

            with family.hooks([(name, write)]):
                made = family.run_with_cache(clean, names_filter=[pattern])[1][pattern]
            wanted = ((made - slopes.values[pattern]) * slopes.slopes[pattern]).sum((1, 2, 3))
            estimate = (found.metric - found.clean).values[:, 1, head, index]
            np.testing.assert_allclose(estimate, wanted, atol=1e-8)
            assert abs(wanted).max() > 1e-8 or family.cfg.family == "gemma3"


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])  # tiles, windows
@pytest.mark.parametrize("point", ["attn.hook_z", "attn.hook_k"])
def test_in_the_vision_stack(name, point):
    model = opened(name)
    clean, other = (model.inputs("What?", [tiny_processors.noise(24, 24, seed)]) for seed in (1, 2))
    given = (model, clean, near(clean, other), METRIC)
    options = {"point": f"vision.{point}", "over": axes(point), "direction": "noise"}
    found, exact = attribution(*given, **options, check=0), activation_patching(*given, **options)
    assert abs(found.metric - exact.metric).max() < 0.02 * abs(exact.metric - exact.clean).max()


def test_a_path_at_the_point_sums_to_the_whole_layer(llava):
    both = pair(llava)
    exact = activation_patching(llava, *both, METRIC, over=("layer",)).effect

    def miss(steps):
        parts = attribution(llava, *both, METRIC, ig_steps=steps, path="point", check=0).effect
        # Effects are shares of the gap above the corrupted run's 0, so heads add up.
        return float(abs(parts.sum("head") - exact).max())

    assert miss(32) < 0.02
    assert miss(32) < miss(2)


def test_in_a_linear_model_estimates_are_effects(linear):
    both = pair(linear)
    for point in ("attn.hook_z", "attn.hook_v", "hook_resid_post"):
        options = {"point": point, "over": axes(point), "positions": "image"}
        found = attribution(linear, *both, METRIC, **options)
        exact = activation_patching(linear, *both, METRIC, **options, method="literal")
        np.testing.assert_allclose(found.effect, exact.effect, atol=1e-9)
        assert found.attrs["rank_correlation"] == pytest.approx(1)
    whole = attribution(linear, *both, METRIC, point="hook_embed", over=("region",), regions=["image"])
    np.testing.assert_allclose(whole.effect, 1, atol=1e-9)


def test_rows_of_a_batch_are_their_own(llava):
    clean, corrupted = pair(llava)
    alone = [
        [llava.inputs(q, [tiny_processors.noise(24, 24, seed + 10 * i)]) for i, q in
         enumerate(("What is shown here?", "Which digit is in the red frame?"))]
        for seed in (0, 50)
    ]  # fmt: skip
    together = attribution(llava, clean, corrupted, METRIC, positions="image", check=0)
    apart = attribution(llava, *alone, METRIC, positions="image", check=0)
    np.testing.assert_allclose(together.effect, apart.effect, atol=1e-6)


# -- edges ------------------------------------------------------------------------------------------------------------


def test_edges_out_of_a_node_sum_to_the_node(family):
    both = pair(family)
    edges = edge_attribution(family, *both, METRIC, ig_steps=0, check=0).effect.sum("receiver")
    heads = attribution(family, *both, METRIC, check=0).effect
    mlps = attribution(family, *both, METRIC, point="hook_mlp_out", over=("layer",), check=0).effect
    for layer in heads.layer.values:
        for head in heads["head"].values:  # norms compute in single precision
            one = edges.sel(sender=f"L{layer}H{head}")
            np.testing.assert_allclose(one, heads.sel(layer=layer, head=head), atol=2e-5)
    for layer in mlps.layer.values:
        np.testing.assert_allclose(edges.sel(sender=f"mlp.{layer}"), mlps.sel(layer=layer), atol=2e-5)


def test_near_a_run_an_edge_is_its_exact_effect(family):
    clean, corrupted = pair(family)
    found = edge_attribution(family, clean, near(clean, corrupted), METRIC, ig_steps=0, check=60, direction="noise")
    assert abs(found.exact - found.estimate).max() < 0.02 * abs(found.exact).max()
    assert found.attrs["forwards"] == 3 + 60


@pytest.mark.parametrize("receiver", ["L1H2.q", "L2K0.k", "L1K1.v", "mlp.1", "logits"])
def test_an_edge_is_the_gradient_of_its_mask(receiver):
    model = opened("internvl")  # grouped heads, biases
    model.hf_model.requires_grad_(False)
    clean, corrupted = pair(model)
    found = edge_attribution(model, clean, corrupted, METRIC, ig_steps=0, check=0, direction="noise",
                             senders=["L0H1"], receivers=[receiver])  # fmt: skip
    zs = [model.run_with_cache(run, names_filter=["blocks.0.attn.hook_z"])[1]["z", 0] for run in (clean, corrupted)]
    text = model.hf_model.model.language_model
    change = (zs[1] - zs[0])[:, :, 1] @ text.layers[0].self_attn.o_proj.weight[:, 8:16].T
    mask = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def added(module, args):
        return (args[0] + mask * change, *args[1:])

    if "K" in receiver or "H" in receiver:
        layer, head, letter = int(receiver[1]), int(receiver[3]), receiver[-1]
        block, seen = text.layers[layer], []

        def write(module, args, output):
            read, own = block.input_layernorm(seen[0] + mask * change), slice(head * 8, head * 8 + 8)
            whole = output.clone()
            whole[..., own] = torch.nn.functional.linear(read, module.weight, module.bias)[..., own]
            return whole

        handles = [
            block.register_forward_pre_hook(lambda module, args: seen.append(args[0])),
            getattr(block.self_attn, f"{letter}_proj").register_forward_hook(write),
        ]
    else:
        norm = text.norm if receiver == "logits" else text.layers[1].post_attention_layernorm
        handles = [norm.register_forward_pre_hook(added)]
    last = model(clean, logits_to_keep=1)[:, 0]
    for handle in handles:
        handle.remove()
    for row, value in enumerate(last[:, 300] - last[:, 301]):
        (slope,) = torch.autograd.grad(value, mask, retain_graph=True)
        # Noising: the change of the metric over what switching everything changes.
        wanted = float(slope) / float(found.corrupted[row] - found.clean[row])
        assert float(found.effect[row, 0, 0]) == pytest.approx(wanted, rel=1e-4, abs=1e-7)
        assert wanted != 0


def test_a_frozen_norm_is_linear_in_what_is_sent(llava):
    clean, corrupted = pair(llava)
    found = edge_attribution(llava, clean, corrupted, METRIC, ig_steps=0, check=0, norm="frozen", direction="noise",
                             receivers=["logits"])  # fmt: skip
    name, norm = "blocks.2.hook_resid_post", llava.hf_model.model.language_model.norm
    ours, theirs = (llava.run_with_cache(run, names_filter=[name])[1][name][:, -1] for run in (clean, corrupted))
    scale = ours.pow(2).mean(-1, keepdim=True).add(norm.variance_epsilon).rsqrt()
    weight = llava.hf_model.lm_head.weight
    wanted = ((theirs - ours) * scale * norm.weight) @ (weight[300] - weight[301])
    wanted = wanted.detach().numpy() / (found.corrupted - found.clean)
    np.testing.assert_allclose(found.effect.sum(("sender", "receiver")), wanted, rtol=1e-4)


def test_edges_of_a_linear_model_are_the_gap(linear):
    found = edge_attribution(linear, *pair(linear), METRIC, receivers=["logits"])
    np.testing.assert_allclose(found.effect.sum("sender").squeeze("receiver"), 1, atol=1e-9)
    assert np.nanmax(abs(found.exact - found.estimate)) < 1e-9


def test_edges_lead_forward_only(llava):
    found = edge_attribution(llava, *pair(llava), METRIC, ig_steps=1, check=0)
    missing = found.effect.isnull().all("example")
    assert missing.sel(sender="L1H0", receiver=["L1H0.q", "L0H0.q", "mlp.0"]).all()
    assert not missing.sel(sender="L1H0", receiver=["mlp.1", "L2K0.k", "logits"]).any()
    assert missing.sel(sender="mlp.1", receiver="mlp.1") and not missing.sel(sender="embed").any()
    best = top_edges(found, 5)
    sizes = [abs(effect) for _, _, effect in best]
    assert len(best) == 5 and sizes == sorted(sizes, reverse=True)


# -- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["visual", "pixels"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_completeness_gap_falls_with_steps(name, over):
    model = opened(name)
    inputs, other = (model.inputs("What is it?", [tiny_processors.noise(24, 24, seed)]) for seed in (3, 4))
    for baseline in ("mean", other):
        few, many = (
            input_attribution(model, inputs, METRIC, over=over, ig_steps=steps, baseline=baseline) for steps in (2, 48)
        )
        span = float(abs(many.metric - many.baseline))
        assert abs(many.attrs["completeness_gap"]) < 0.01 * span
        assert abs(many.attrs["completeness_gap"]) < abs(few.attrs["completeness_gap"])
        total = float(many.attribution.sum() + many.attrs["completeness_gap"])
        assert total == pytest.approx(float(many.metric - many.baseline))
    if over == "visual":
        assert many.pos.values.tolist() == inputs.layout.positions("image").tolist()


# -- planted circuits -------------------------------------------------------------------------------------------------


def opened_circuit(name, family="llava"):
    circuit = planted.circuit(name, family)
    metric = LogitDiff(circuit.sample.answer, circuit.sample.counterfactual.answer)
    given = (HookedMLLM.from_hf(circuit.model, circuit.processor), circuit.clean, circuit.corrupted, metric)
    return circuit.truth, given


@pytest.mark.parametrize(("name", "family"), [("mover", "llava"), ("gqa", "llava"), ("roles", "qwen2_5_vl")])
def test_value_paths_are_found(name, family):
    truth, given = opened_circuit(name, family)
    effect = attribution(*given).effect.isel(example=0)
    for role, head in truth.heads.items():
        assert float(effect[head]) == pytest.approx(truth.effects[role,].recovered, abs=1e-3)
    if name == "mover":
        sent = {(s, r): e for s, r, e in top_edges(edge_attribution(*given), 3)}
        assert sent["L0H0", "L1K0.v"] == pytest.approx(1, abs=1e-3)
        assert sent["L1H0", "logits"] == pytest.approx(1, abs=1e-3)


def test_the_largest_edges_are_checked(llava):
    found = edge_attribution(llava, *pair(llava), METRIC, check=6)
    best = {f"{sender} -> {receiver}" for sender, receiver, _ in top_edges(found, 40)}
    assert len(set(found.cell.values)) == 6 and len(best & set(found.cell.values[:3])) == 3


@pytest.mark.parametrize(("name", "point"), [("q_composition", "attn.hook_q"), ("k_composition", "attn.hook_k")])
def test_a_saturated_softmax_needs_the_fix(name, point):
    truth, given = opened_circuit(name)
    head = truth.heads["retrieval"]
    fixed, plain = (attribution(*given, point=point, over=axes(point), qk_fix=fix) for fix in (True, False))
    assert float(fixed.effect[0][head]) == pytest.approx(1, abs=1e-3)
    assert abs(plain.effect).max() < 1e-3
    assert float(plain.exact.max()) == pytest.approx(1, abs=1e-3)  # and its own check says so
    assert "exact 1, estimate" in plain.attrs["worst"]


# -- what is refused, and what is left behind -------------------------------------------------------------------------


def test_what_is_refused(llava):
    both = pair(llava)
    wide = opened("cohere2_vision")
    for call, words in (
        (lambda: attribution(llava, *both, Rank(300)), "without a gradient"),
        (lambda: edge_attribution(llava, *both, Rank(300)), "without a gradient"),
        (lambda: attribution(llava, *both, METRIC, path="point2"), "'embed' or 'point'"),
        (lambda: attribution(llava, *both, METRIC, ig_steps=-1), "ig_steps=-1"),
        (lambda: attribution(llava, *both, METRIC, point="projector.hook_out", over=()), "one row at a time"),
        (lambda: edge_attribution(llava, *both, METRIC, senders=["L0H9"]), "no sender is called 'L0H9'"),
        (lambda: edge_attribution(llava, *both, METRIC, norm="none"), "'live' or 'frozen'"),
        (lambda: edge_attribution(wide, *pair(wide), METRIC), "no hook_resid_mid"),
        (lambda: input_attribution(llava, both[0], METRIC), "2 rows"),
    ):
        with pytest.raises(ExperimentError, match=words):
            call()
    with pytest.raises(PointError):
        attribution(opened("gemma4"), *pair(llava), METRIC, point="attn.hook_k", layers=[2], over=())


def test_nothing_lingers(llava):
    both = pair(llava)
    parameters = list(llava.hf_model.parameters())
    for index, parameter in enumerate(parameters):
        parameter.requires_grad_(index % 2 == 0)
    with torch.no_grad():
        edge_attribution(llava, *both, METRIC, ig_steps=2, check=2)
        attribution(llava, *both, METRIC, point="attn.hook_k", over=("layer", "kv_head"))
        assert not torch.is_grad_enabled()

    def broken(run):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        differentiate(llava, both[0], ["hook_embed"], broken, modules={"a": llava.norm(0)}, attention=("text", ()))
    assert [p.requires_grad for p in parameters] == [i % 2 == 0 for i in range(len(parameters))]
    assert all(p.grad is None for p in parameters)
    assert not any(point.fwd_hooks or point.bwd_hooks for point in llava.hook_dict.values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llava.hf_model.model.language_model.modules()
                   if "capture" not in str(m._forward_hooks))  # fmt: skip
    assert not any(record.observers for _, record in llava._layers)
