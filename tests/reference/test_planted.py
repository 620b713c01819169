"""The answer key is right: every number of every planted circuit, by plain means (one hook, one run, one cell)."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from mech.errors import UnsupportedModel
from mech.experiments.scores.ram import retrieval_attention_mass
from mech.model import HookedMLLM
from mech.reference import planted
from mech.reference.planted.planting import HEADS, LAYERS

BOTH = [(name, family) for name in planted.NAMES for family in planted.FAMILIES]
HELD = [pair for pair in BOTH if pair != ("k_composition", "qwen2_5_vl")]
everywhere = pytest.mark.parametrize(("name", "family"), HELD)
CLOSE = 2e-5


@functools.cache
def opened(name, family="llava", dtype=torch.float32):
    key = planted.circuit(name, family, dtype)
    return key, HookedMLLM.from_hf(key.model, key.processor)


def runs(key, model):
    """Inputs and every activation of the clean and of the corrupted run."""
    caches = [model.run_with_cache(inputs, names_filter=lambda _: True)[1] for inputs in (key.clean, key.corrupted)]
    return (key.clean, key.corrupted), caches


@torch.no_grad()
def difference(key, model, inputs, hooks=()):
    """Logit of the clean answer minus that of the corrupted one, under hooks."""
    right, wrong = (key.processor.answer_ids(s.answer)[0] for s in (key.sample, key.sample.counterfactual))
    with model.hooks(list(hooks)):
        last = model(inputs)[0, -1]
    return float(last[right] - last[wrong])


def share(key, noised, denoised):
    """Two logit differences as an ``Effect``."""
    clean, corrupted = key.truth.logit_diff
    return (clean - noised) / (clean - corrupted), (denoised - corrupted) / (clean - corrupted)


def replaced(value, heads=None):
    """A hook that puts in a value, of some heads only."""

    def hook(activation, hook):
        if heads is None:
            return value
        activation = activation.clone()
        activation[:, :, heads] = value[:, :, heads]
        return activation

    return hook


def patched(heads, value_of):
    """Hooks that write z of some heads; ``value_of(point)`` is what is put in."""
    for layer in {layer for layer, _ in heads}:
        point = f"blocks.{layer}.attn.hook_z"
        yield point, replaced(value_of(point), [head for at, head in heads if at == layer])


@everywhere
def test_the_runs_say_what_is_stated(name, family):
    key, model = opened(name, family)
    for inputs, expected in zip((key.clean, key.corrupted), key.truth.logit_diff, strict=True):
        assert difference(key, model, inputs) == pytest.approx(expected, abs=CLOSE)
    assert key.clean.layout.tokens[0] == "<s>"
    assert len(key.clean.layout) == len(key.corrupted.layout)
    assert (key.clean.layout.kind == key.corrupted.layout.kind).all()
    assert key.clean.layout.spans == key.corrupted.layout.spans


@everywhere
def test_greedy_answers_are_right_in_any_scene(name, family):
    key, model = opened(name, family)
    samples = key.samples(6, seed=1)
    assert samples.digest() == key.samples(6, seed=1).digest() != key.samples(6, seed=2).digest()
    assert len({sample.answer for sample in samples}) > 1
    asked = [*samples, *(sample.counterfactual for sample in samples)]
    batch = model.collate([model.inputs_of(sample) for sample in asked])
    assert model.generate_text(batch, max_new_tokens=1) == [sample.answer for sample in asked]


@everywhere
def test_ram_of_every_head(name, family):
    key, model = opened(name, family)
    measured = retrieval_attention_mass(model, [key.sample])["ram"].values[0]
    np.testing.assert_allclose(measured, key.truth.ram, atol=1e-6)


@everywhere
def test_patching_one_head(name, family):
    key, model = opened(name, family)
    (clean, corrupted), (theirs, others) = runs(key, model)
    named = {where: key.truth.effects[role,] for role, where in key.truth.heads.items()}
    for where in [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]:
        noised = difference(key, model, clean, patched([where], others.__getitem__))
        denoised = difference(key, model, corrupted, patched([where], theirs.__getitem__))
        expected = named.get(where, planted.NOTHING)
        assert share(key, noised, denoised) == pytest.approx(expected, abs=CLOSE), where


def other_scene(key, model):
    """The same circuit on other pictures."""
    sample = key.samples(1, seed=3)[0]
    clean, corrupted = (model.inputs_of(s) for s in (sample, sample.counterfactual))
    return replace(key, sample=sample, clean=clean, corrupted=corrupted)


@pytest.mark.parametrize("scene", ["its own", "another"])
@everywhere
def test_patching_and_zeroing_sets(name, family, scene):
    key, model = opened(name, family)
    key = key if scene == "its own" else other_scene(key, model)
    (clean, corrupted), (theirs, others) = runs(key, model)
    for roles, expected in key.truth.effects.items():
        heads = [key.truth.heads[role] for role in roles]
        noised = difference(key, model, clean, patched(heads, others.__getitem__))
        denoised = difference(key, model, corrupted, patched(heads, theirs.__getitem__))
        assert share(key, noised, denoised) == pytest.approx(expected, abs=CLOSE), roles
    for roles, expected in key.truth.zeroed.items():
        heads = [key.truth.heads[role] for role in roles]
        zeroed = difference(key, model, clean, patched(heads, lambda point: torch.zeros_like(theirs[point])))
        assert zeroed == pytest.approx(expected, abs=CLOSE), roles


def along(key, model, path, base, own, other):
    """The logit difference of a run in which one direct path carries the other run's value: two runs, no algebra."""
    sender, receiver = path
    layer, head = key.truth.heads[sender]
    output = model.blocks[layer].attn.W_O[head]
    point = f"blocks.{layer}.attn.hook_z"
    delta = (other[point][:, :, head] - own[point][:, :, head]) @ output
    # What the sender adds to the stream, with all that could answer to it held.
    enters = "blocks.1.hook_resid_pre" if layer == 0 else "blocks.1.hook_resid_mid"
    changed = [(enters, replaced(own[enters] + delta))]
    attention = [("blocks.1.hook_attn_out", replaced(own["blocks.1.hook_attn_out"]))] if layer == 0 else []
    mlp = [("blocks.1.hook_mlp_out", replaced(own["blocks.1.hook_mlp_out"]))]
    if receiver == "logits":
        return difference(key, model, base, [*changed, *attention, *mlp])
    heads = None
    if receiver == "mlp.1":
        point, before = "blocks.1.hook_mlp_out", [*changed, *attention]
    else:
        role, letter = receiver.split(".")
        point, before = f"blocks.1.attn.hook_{letter}", changed
        group = HEADS // own[point].shape[2]
        heads = [key.truth.heads[role][1] // group]
    with model.hooks(before):
        received = model.run_with_cache(base, names_filter=point)[1][point]
    return difference(key, model, base, [(point, replaced(received, heads))])


@everywhere
def test_every_path(name, family):
    key, model = opened(name, family)
    (clean, corrupted), (theirs, others) = runs(key, model)
    later = [role for role, (layer, _) in key.truth.heads.items() if layer == 1]
    ends = ["mlp.1", "logits"]
    paths = {(role, end) for role in key.truth.heads for end in ends}
    paths |= {(s, f"{r}.{p}") for s in key.truth.heads if s not in later for r in later for p in "qkv"}
    assert set(key.truth.edges) <= paths
    for path in sorted(paths):
        noised = along(key, model, path, clean, theirs, others)
        denoised = along(key, model, path, corrupted, others, theirs)
        expected = key.truth.edges.get(path, planted.NOTHING)
        assert share(key, noised, denoised) == pytest.approx(expected, abs=CLOSE), path


@pytest.mark.parametrize("name", planted.NAMES)
def test_the_smallest_sets_follow(name):
    heads, truth = set(planted.circuit(name).truth.heads), planted.circuit(name).truth
    expected = {
        "and": ([{"left"}, {"right"}], [heads]),
        "or": ([heads], [{"left"}, {"right"}]),
        "backup": ([heads], [{"first"}]),
        "roles": ([{"retrieval"}], [{"retrieval"}]),
        "gqa": ([{"retrieval"}], [{"retrieval"}]),
    }.get(name, ([{head} for head in heads],) * 2)
    assert all(set(roles) in expected[0] for roles in truth.necessary) and len(truth.necessary) == len(expected[0])
    assert all(set(roles) in expected[1] for roles in truth.sufficient) and len(truth.sufficient) == len(expected[1])


@pytest.mark.parametrize("family", planted.FAMILIES)
@pytest.mark.parametrize("name", ["roles", "gqa"])
def test_the_heads_look_as_they_are_called(name, family):
    key, model = opened(name, family)
    pattern = model.run_with_cache(key.clean, names_filter="blocks.1.attn.hook_pattern")[1][
        "blocks.1.attn.hook_pattern"
    ]
    question = key.clean.layout.positions("question")
    retrieval, sink, even, recency = pattern[0][:, question]
    assert retrieval[:, key.clean.layout.positions(key.sample.evidence)].sum(-1) == pytest.approx(1, abs=1e-6)
    assert sink[:, 0] == pytest.approx(1, abs=1e-6)
    for row, evenly, near in zip(question, even, recency, strict=True):
        assert evenly[: row + 1] == pytest.approx(1 / (row + 1), abs=1e-6)
        assert (near[: row + 1].diff() > -1e-6).all() and near.argmax() == row


def test_of_a_group_one_query_head_retrieves():
    key, model = opened("gqa")
    assert (model.cfg.n_heads, model.cfg.n_kv_heads) == (4, 2)
    assert key.truth.heads["retrieval"][1] // 2 == key.truth.heads["sink"][1] // 2
    assert (key.truth.ram > 0.5).sum() == 1


def attributed(key, model, role):
    """Gradient at the corrupted run times the difference, at z of one head: the share that attribution sees."""
    _, (theirs, others) = runs(key, model)
    layer, head = key.truth.heads[role]
    point, seen = f"blocks.{layer}.attn.hook_z", []
    right, wrong = (key.processor.answer_ids(s.answer)[0] for s in (key.sample, key.sample.counterfactual))

    def watch(z, hook):
        seen.append(z.detach().requires_grad_())
        return seen[0]

    with model.hooks([(point, watch)]):
        last = model(key.corrupted)[0, -1]
    gradient = torch.autograd.grad(last[right] - last[wrong], seen)[0]
    clean, corrupted = key.truth.logit_diff
    return float((gradient * (theirs[point] - others[point]))[:, :, head].sum() / (clean - corrupted))


@pytest.mark.parametrize(
    ("name", "role", "seen"),
    [("mover", "mover", 1.0), ("mover", "retrieval", 1.0), ("and", "left", 0.0), ("q_composition", "carry", 0.0)],
)
def test_what_attribution_sees(name, role, seen):
    assert attributed(*opened(name), role) == pytest.approx(seen, abs=CLOSE)


def test_double_precision():
    key, model = opened("mover", dtype=torch.float64)
    assert model(key.clean).dtype == torch.float64
    assert difference(key, model, key.clean) == pytest.approx(key.truth.logit_diff[0], abs=CLOSE)


def test_what_there_is_not_is_refused():
    with pytest.raises(UnsupportedModel, match="'k_composition'"):
        planted.circuit("k_compositoin")
    with pytest.raises(UnsupportedModel, match="llava"):
        planted.circuit("k_composition", "qwen2_5_vl")
