"""Path patching: the walk against whole forwards and against plain Hugging Face, the laws, the answer keys."""

import copy

import numpy as np
import pytest
import torch
from pairs import METRIC, QUESTIONS, opened, pair
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformer_lens.patching import get_act_patch_direct_path
from transformers import LlavaForConditionalGeneration

from mech.errors import ExperimentError
from mech.experiments.metrics import KL, LogitDiff
from mech.experiments.patching.activation import activation_patching
from mech.experiments.paths.ends import Node, Part
from mech.experiments.paths.path_patching import Pair, path_patching
from mech.experiments.paths.walk import Walk
from mech.inputs import TEXT, Inputs, TokenLayout
from mech.model import HookedMLLM
from mech.model.named.norms import frozen_norm
from mech.reference import planted, tiny

FREEZES = [("attention", "mlp"), ("attention",), (), ("attention", "mlp", "norm")]
SENDERS = {"early": (0, 1), "mlp": "mlp.0", "embed": "embed", "several": [(0, 2), (1, 2), "mlp.1"], "late": (2, 0)}
RECEIVERS = {"logits": "logits", "q": "L2H1.q", "v": "L1K0.v", "mlp": "mlp.2", "several": ["L1H0.q", "L2K1.k", "mlp.1"]}


def both_ways(model, *args, close=1e-10, **options):
    walk = path_patching(model, *args, method="walk", **options)
    slow = path_patching(model, *args, method="literal", **options)
    assert (walk.algorithm, slow.algorithm) == ("walk", "literal")
    np.testing.assert_allclose(walk.metric, slow.metric, atol=close * float(abs(slow.metric).max()), rtol=0)
    return walk


@pytest.mark.parametrize("freeze", FREEZES, ids=str)
@pytest.mark.parametrize("name", ["llava", "gemma3", "cohere2_vision", "qwen3_vl"])
def test_the_walk_is_whole_forwards(name, freeze):
    model = opened(name)
    found = both_ways(model, *pair(model), METRIC, senders=SENDERS, receivers=RECEIVERS, freeze=freeze)
    assert np.isnan(found.effect.sel(sender="late", receiver="q")).all()
    assert (abs(found.effect).max(("example", "sender")) > 1e-6).all()


@pytest.mark.parametrize("name", ["llava", "gemma3", "cohere2_vision", "qwen3_vl", "scaled"])
@pytest.mark.parametrize("freeze", [("attention", "mlp"), ("attention", "mlp", "norm")], ids=str)
def test_single_senders_are_added_to_the_stream_unless_a_layer_scales_it(name, freeze, monkeypatch):
    model = opened("llava" if name == "scaled" else name)
    added = []
    run = Walk._direct_run
    monkeypatch.setattr(Walk, "_direct_run", lambda *args: (added.append(1), run(*args))[1])
    if name == "scaled":
        model.hf_model.model.language_model.layers[1].register_forward_hook(lambda module, args, out: 0.5 * out)
    places = {"all": "all", "picture": "image", "last": "last"}
    senders = ["mlp.0", (0, 1), "embed", (1, 2), "mlp.1", (2, 0)]
    receivers = ["logits", "L2H1.q", "L1K0.v", "L2K1.k", "mlp.2", "L0H0.q", "mlp.0"]
    found = both_ways(
        model, *pair(model), METRIC, senders=senders, receivers=receivers, freeze=freeze, regions=places,
        receiver_regions={"all": "all", "last": "last"},
    )  # fmt: skip
    assert bool(added) == (name != "scaled")
    assert (abs(found.effect).sel(region="all", receiver_region="all").max(("example", "sender")) > 1e-6).all()


def cost_of_the_next_receiver(llava):
    clean, corrupted = pair(llava, QUESTIONS[:1])
    kept = Pair.of(llava, clean, corrupted, METRIC, "denoise", 0)
    kept.run([Node("head", 0, 1), Node("mlp", 0)])
    everywhere = torch.ones(1, len(clean.layouts[0]), dtype=torch.bool)
    senders = [Part((node,), everywhere) for node in (Node("head", 0, 1), Node("mlp", 0))]
    costs = []
    for _ in range(3):
        before = kept.forwards
        kept.metric(senders, [Part((Node("q", 2, 1),), everywhere)], frozenset(("attention", "mlp")))
        costs.append(kept.forwards - before)
    assert costs[1] == costs[2]  # the first looks whether layers pass on what is added
    return costs[1]


def test_what_senders_add_is_kept_for_the_next_receiver(llava, monkeypatch):
    within = cost_of_the_next_receiver(llava)
    monkeypatch.setattr("mech.experiments.paths.walk.CARRIED", 0)
    assert within < cost_of_the_next_receiver(llava)


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_vl"])
def test_with_everything_frozen_what_a_group_does_is_the_sum(name):
    model = opened(name)
    alone = ["embed", "mlp.0", (0, 1), "mlp.1", (1, 2)]
    found = both_ways(
        model, *pair(model), METRIC, senders={"all": alone, **{str(s): [s] for s in alone}},
        freeze=("attention", "mlp", "norm"),
    )  # fmt: skip
    moved = found.metric - found.corrupted
    np.testing.assert_allclose(moved[:, 0], moved[:, 1:].sum("sender"), rtol=1e-9, atol=1e-12)
    assert (abs(moved).sel(sender=["all", "mlp.1", "(1, 2)"]).max("example") > 1e-9).all()


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_several_images_and_grouped_keys(direction):
    model = opened("qwen2_5_vl")
    assert model.cfg.n_kv_heads < model.cfg.n_heads
    both_ways(
        model, *pair(model, QUESTIONS[:1], pictures=2), METRIC, senders=SENDERS, receivers=RECEIVERS,
        direction=direction, positions="question", receiver_positions="question",
    )  # fmt: skip


def test_in_single_precision():
    model = opened("llava", torch.float32)
    both_ways(model, *pair(model), METRIC, close=1e-5, senders=SENDERS, receivers=RECEIVERS)


def test_bf16_within_its_own_rounding():
    model = opened("llava", torch.bfloat16)
    walk, slow = (
        path_patching(model, *pair(model), METRIC, senders=SENDERS, receivers=RECEIVERS, method=method)
        for method in ("walk", "literal")
    )
    assert abs(walk.metric - slow.metric).max() < 0.1 * abs(slow.clean - slow.corrupted).max()


def test_regions_of_both_ends(llava):
    both = pair(llava, QUESTIONS[:1])
    places = {"picture": "image", "question": "question", "last": "last"}
    options = {"senders": ["embed", (0, 1)], "receivers": ["L2H1.q", "logits"], "freeze": ("attention",)}
    found = both_ways(llava, *both, METRIC, regions=places, receiver_regions=places, **options)
    assert found.effect.dims == ("example", "sender", "receiver", "region", "receiver_region")
    alone = path_patching(llava, *both, METRIC, positions="question", receiver_positions="question", **options)
    np.testing.assert_allclose(alone.metric, found.metric.sel(region="question", receiver_region="question"))
    # With attention frozen nothing moves between positions.
    apart = found.effect.sel(receiver="L2H1.q", region="picture", receiver_region="question")
    np.testing.assert_allclose(apart, 0, atol=1e-12)
    np.testing.assert_allclose(found.effect.sel(receiver="logits", region="picture"), 0, atol=1e-12)


def test_against_plain_hugging_face(llava):
    """L0H1 into the query of L2H2, attention frozen: two forwards with torch's own hooks and nothing of ours."""
    clean, corrupted = pair(llava, QUESTIONS[:1])
    hf = tiny.model("llava").double()
    layers, d = hf.model.language_model.layers, tiny.D_HEAD
    seen = {}

    def run(inputs, hooks):
        handles = [(m.register_forward_pre_hook(f) if pre else m.register_forward_hook(f)) for m, f, pre in hooks]
        with torch.no_grad():
            logits = hf(**inputs.tensors).logits[0, -1]
        for handle in handles:
            handle.remove()
        return float(logits[300] - logits[301])

    def keep(name, module, pre):
        return (module, lambda m, args, out=None: seen.update({name: (args[0] if pre else out).clone()}), pre)

    def attention(i):
        return layers[i].self_attn.o_proj

    run(clean, [keep("z", attention(0), True)])
    mine = seen["z"]
    run(corrupted, [keep("z", attention(0), True), *(keep(i, attention(i), False) for i in (1, 2))])
    theirs, frozen = seen["z"], {i: seen[i] for i in (1, 2)}
    mixed = theirs.clone()
    mixed[..., d : 2 * d] = mine[..., d : 2 * d]
    path = [(attention(0), lambda m, args: (mixed,), True)]
    path += [(attention(i), lambda m, args, out, i=i: frozen[i], False) for i in (1, 2)]
    run(corrupted, [*path, keep("q", layers[2].self_attn.q_proj, False)])
    query = seen["q"]

    def receive(module, args, out):
        out = out.clone()
        out[..., 2 * d : 3 * d] = query[..., 2 * d : 3 * d]
        return out

    expected = run(corrupted, [(layers[2].self_attn.q_proj, receive, False)])
    found = path_patching(llava, clean, corrupted, METRIC, senders=[(0, 1)], receivers=["L2H2.q"])
    assert found.metric.item() == pytest.approx(expected, abs=1e-10)
    assert abs(found.effect.item()) > 1e-6


@pytest.mark.parametrize("letter", ["q", "k", "v"])
def test_against_transformerlens(letter):
    """Their direct path into every later head (grouped keys are refused there, and pictures not taken)."""
    config = copy.deepcopy(tiny.model("llava").config)
    config.text_config.num_key_value_heads = tiny.HEADS
    torch.manual_seed(0)
    hf = LlavaForConditionalGeneration(config).eval().double()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.mul_(3)
    bridge = build_bridge_from_module(copy.deepcopy(hf), "LlavaForConditionalGeneration", hf_config=config)
    model, n = HookedMLLM.from_hf(hf), 12
    ids = torch.randint(300, 400, (1, n), generator=torch.Generator().manual_seed(0))
    others = ids.clone()
    others[0, 3:6] += 7
    nowhere = np.full(n, -1)
    layout = TokenLayout(
        kind=np.full(n, TEXT), image=nowhere, frame=nowhere, row=nowhere, col=nowhere, view=nowhere,
        rect=np.full((n, 4), np.nan), tokens=("",) * n, spans={}, images=(),
    )  # fmt: skip
    clean, corrupted = (
        Inputs({"input_ids": given, "attention_mask": torch.ones_like(given)}, (layout,)) for given in (ids, others)
    )
    caches = [bridge.run_with_cache(given, use_cache=False)[1] for given in (ids, others)]
    theirs = get_act_patch_direct_path(
        bridge, others, *caches, lambda logits: logits[0, -1, 300] - logits[0, -1, 301], 0, 1, letter, verbose=False
    )
    side = "H" if letter == "q" else "K"
    receivers = [f"L{layer}{side}{head}.{letter}" for layer in (1, 2) for head in range(4)]
    ours = both_ways(
        model, clean, corrupted, METRIC, senders=[(0, 1)], receivers=receivers, freeze=("attention", "mlp")
    )
    # They keep their results in single precision.
    np.testing.assert_allclose(ours.metric[0, 0], theirs[1:].reshape(-1), rtol=1e-5, atol=1e-6)
    assert (abs(ours.metric - ours.corrupted) > 1e-5).any()


# -- laws -------------------------------------------------------------------------------------------------------------


def test_with_nothing_frozen_it_is_activation_patching(llava):
    both = pair(llava)
    for direction in ("denoise", "noise"):
        heads = activation_patching(llava, *both, METRIC, direction=direction)
        senders = [(layer, head) for layer in range(3) for head in range(4)]
        paths = path_patching(llava, *both, METRIC, senders=senders, freeze=(), direction=direction)
        np.testing.assert_allclose(paths.metric[:, :, 0].values, heads.metric.values.reshape(2, -1), atol=1e-9)
        whole = path_patching(llava, *both, METRIC, senders=["embed"], freeze=(), direction=direction)
        np.testing.assert_allclose(whole.effect, 1, atol=1e-9)


def test_with_everything_frozen_senders_add_up_to_the_final_stream(llava):
    both = pair(llava)
    every = ["embed", *(f"mlp.{i}" for i in range(3)), *((i, h) for i in range(3) for h in range(4))]
    options = {"freeze": ("attention", "mlp", "norm")}
    single = path_patching(llava, *both, METRIC, senders=every, **options)
    joint = path_patching(llava, *both, METRIC, senders={"all": every, "some": every[1:5]}, **options)
    moved = single.metric - single.corrupted
    np.testing.assert_allclose(moved.sum("sender")[:, 0], (joint.metric - joint.corrupted).sel(sender="all")[:, 0])
    some = (joint.metric - joint.corrupted).sel(sender="some")[:, 0]
    np.testing.assert_allclose(moved[:, 1:5].sum("sender")[:, 0], some)
    # With live norms the whole stream is the other run's.
    live = path_patching(llava, *both, METRIC, senders={"all": every}, freeze=("attention", "mlp"))
    np.testing.assert_allclose(live.effect, 1, atol=1e-9)


def test_the_direct_path_with_a_frozen_norm_is_logit_attribution(llava):
    clean, corrupted = pair(llava, QUESTIONS[:1])
    point = "blocks.1.attn.hook_z"
    theirs = llava.run_with_cache(clean, names_filter=point)[1][point][0, -1, 2]
    _, cache = llava.run_with_cache(corrupted, names_filter=[point, "blocks.2.hook_resid_post"])
    change = (theirs - cache[point][0, -1, 2]) @ llava.blocks[1].attn.W_O[2]
    normed = frozen_norm(llava.norm(3), cache["blocks.2.hook_resid_post"][0, -1:])(change)[0]
    expected = float((normed @ (llava.W_U[:, 300] - llava.W_U[:, 301])).detach())
    found = path_patching(llava, clean, corrupted, METRIC, senders=[(1, 2)], freeze=("attention", "mlp", "norm"))
    assert float((found.metric - found.corrupted)[0, 0, 0]) == pytest.approx(expected, abs=1e-9)


def test_a_run_against_itself_changes_nothing(llava):
    clean, _ = pair(llava)
    found = path_patching(llava, clean, clean, METRIC, senders=SENDERS, receivers=RECEIVERS)
    moved = (found.metric - found.clean).values
    np.testing.assert_allclose(moved[~np.isnan(moved)], 0, atol=1e-9)
    assert np.isnan(found.effect).all()  # there is no gap to have a share of


@pytest.mark.parametrize("family", planted.FAMILIES)
@pytest.mark.parametrize("name", planted.NAMES)
def test_planted_paths_have_their_planted_effects(name, family):
    if name == "k_composition" and family != "llava":
        pytest.skip("its distances are 1-D")
    known = planted.circuit(name, family)
    model = HookedMLLM.from_hf(known.model, known.processor)
    group = model.cfg.n_heads // model.cfg.n_kv_heads
    wrong = known.sample.counterfactual.answer
    metric = LogitDiff(known.sample.answer, wrong)
    heads = {role: head for role, head in known.truth.heads.items()}
    receivers = {"mlp.1": "mlp.1", "logits": "logits"}
    for role, (layer, head) in heads.items():
        if layer == 1:
            receivers |= {f"{role}.q": f"L1H{head}.q"}
            receivers |= {f"{role}.{letter}": f"L1K{head // group}.{letter}" for letter in "kv"}
    for direction in ("denoise", "noise"):
        found = path_patching(
            model, known.clean, known.corrupted, metric, senders=heads, receivers=receivers,
            freeze=("attention", "mlp"), direction=direction,
        ).effect[0]  # fmt: skip
        for role in heads:
            for end in receivers:
                value = float(found.sel(sender=role, receiver=end))
                if np.isnan(value):
                    assert heads[role][0] == 1 and end[-2:] in (".q", ".k", ".v")
                    continue
                effect = known.truth.edges.get((role, end), planted.NOTHING)
                expected = effect.recovered if direction == "denoise" else effect.lost
                assert value == pytest.approx(expected, abs=1e-3), (role, end, direction)


# -- what it costs, where it cannot walk, and what is refused ---------------------------------------------------------


def test_direct_paths_of_all_heads_cost_about_two_forwards(llava):
    senders = [(layer, head) for layer in range(3) for head in range(4)]
    found = path_patching(llava, *pair(llava), METRIC, senders=senders)
    assert 2 < found.forwards < 3.5


@pytest.mark.parametrize(("name", "reason"), [("gemma4", "shared_kv_states"), ("qwen3_5", "attention 0 times")])
def test_where_it_cannot_walk_each_path_is_forwards(name, reason):
    model = opened(name)
    both = pair(model, QUESTIONS[:1])
    last = model.cfg.n_layers - 1
    found = path_patching(model, *both, METRIC, senders=[f"mlp.{last}"], freeze=("attention", "mlp"))
    assert found.algorithm == "literal" and reason in found.reason
    there = activation_patching(model, *both, METRIC, point="hook_mlp_out", over=("layer",), layers=[last])
    np.testing.assert_allclose(found.metric[:, 0], there.metric, atol=1e-9)
    with pytest.raises(ExperimentError, match=reason):
        path_patching(model, *both, METRIC, senders=["embed"], method="walk")


def test_other_metrics(llava):
    found = both_ways(llava, *pair(llava), KL(), senders=[(1, 0)], direction="noise")
    assert (found.metric > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"senders": ["L9H0"]}, "layers below 3"),
        ({"senders": ["logits"]}, "check which end"),
        ({"senders": ["hed"]}, "senders: 'hed'"),
        ({"senders": []}, "at least one"),
        ({"receivers": ["L1H0.k"]}, "'L1K0.k'"),
        ({"receivers": ["L1H0"]}, "receivers"),
        ({"receivers": {"two": ["logits", "mlp.1"]}}, "joins the logits"),
        ({"freeze": ("heads",)}, r"freeze=\('heads',\)"),
        ({"regions": {}}, "at least one region"),
        ({"direction": "up"}, "direction"),
        ({"method": "fast"}, "method"),
    ],
)
def test_refusals_come_before_any_forward(llava, options, message, monkeypatch):
    both = pair(llava)
    monkeypatch.setattr(llava, "forward", None)
    with pytest.raises(ExperimentError, match=message):
        path_patching(llava, *both, METRIC, **{"senders": [(0, 0)], **options})
