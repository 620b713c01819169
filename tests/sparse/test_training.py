"""Training for sparsity: objectives, gates and attention against their definitions, a training that goes on, LoRA."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import mech
from mech.errors import ExperimentError, OutputError, UnsupportedModel
from mech.model import HookedMLLM
from mech.reference import tiny
from mech.reference.tiny_processors import noise, processor
from mech.sparse.policy import Policy
from mech.sparse.training import hard_concrete
from mech.sparse.training.hard_concrete import HardConcrete
from mech.sparse.training.loop import Batch, SparseTraining, refuse_without_groups
from mech.sparse.training.lora import Lora, projections
from mech.sparse.training.mixture import far_mass, final_states, gated
from mech.sparse.training.objectives import OBJECTIVES, Objective, Strength, spread

POLICY = Policy((), sinks=2, window=6)
QUESTIONS = ("Which digit is red?", "Which is red?")


def hooked(name="llava"):
    return HookedMLLM.from_hf(tiny.model(name), processor(name), name=name)


def batch(model):
    """Two rows of different lengths, padded on the left."""
    rows = [model.inputs(q, images=[noise(*size)]) for q, size in zip(QUESTIONS, ((40, 24), (24, 24)), strict=True)]
    return model.collate(rows)


# Gates and what they mix


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl", "paligemma2"])
def test_gates_of_0_and_1_are_what_localize_serves(name):
    model = hooked(name)
    inputs, layers = batch(model), model.cfg.attention_layers
    groups, per_group = model.cfg.n_kv_heads, model.cfg.n_heads // model.cfg.n_kv_heads
    open_gates = torch.rand(len(layers), groups, generator=torch.Generator().manual_seed(1)) > 0.5
    dense = [(layers[i], g * per_group + k) for i, g in open_gates.nonzero().tolist() for k in range(per_group)]
    real = inputs.tensors["attention_mask"].bool()
    with torch.no_grad():
        with mech.localize(model, Policy(dense, POLICY.sinks, POLICY.window)) as fast:
            served = fast(inputs)[real]
        with gated(model, inputs, POLICY, open_gates.float()):
            trained = model(inputs)[real]
        with gated(model, inputs, POLICY, open_gates.float().expand(len(inputs), -1, -1)):
            by_row = model(inputs)[real]
        with gated(model, inputs, POLICY, torch.ones(len(layers), groups)):
            whole = model(inputs)[real]
        plain = model(inputs)[real]
    scale = plain.abs().max()
    torch.testing.assert_close(trained / scale, served / scale, atol=1e-5, rtol=0)
    assert torch.equal(by_row, trained) and not torch.allclose(served / scale, plain / scale, atol=1e-3)
    torch.testing.assert_close(whole / scale, plain / scale, atol=1e-6, rtol=0)


def test_far_mass_is_what_lies_outside_of_sinks_and_window():
    model = hooked()
    inputs = batch(model)
    with torch.no_grad(), far_mass(model, inputs, POLICY) as found:
        model(inputs)
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    _, cache = model.run_with_cache(inputs, names_filter=names)
    mask = inputs.tensors["attention_mask"]
    literal, rows = torch.zeros(model.cfg.n_layers, model.cfg.n_heads), 0
    for i in range(len(mask)):
        first = int(mask[i].argmax())
        for x in range(first, mask.shape[1]):
            rows += 1
            for y in range(first + POLICY.sinks, x - POLICY.window + 1):
                literal += torch.stack([cache[name][i, :, x, y] for name in names])
    torch.testing.assert_close(torch.stack(found), literal / rows, atol=1e-6, rtol=0)


def test_hard_concrete_draws_are_open_as_often_as_is_said():
    gates = HardConcrete(1, 3)
    with torch.no_grad():
        gates.log_alpha.copy_(torch.tensor([[-2.0, 0.0, 2.0]]))
    drawn = gates.draw(4000, torch.Generator().manual_seed(0))
    assert drawn.min() == 0 and drawn.max() == 1
    torch.testing.assert_close((drawn > 0).float().mean(0), gates.open_probability().detach(), atol=0.03, rtol=0)
    u = torch.rand(4000, 1, 3, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    literal = torch.sigmoid(((u / (1 - u)).log() + gates.log_alpha) / hard_concrete.SHARPNESS) * 1.2 - 0.1
    torch.testing.assert_close(drawn, literal.clamp(0, 1))
    assert gates.chosen().tolist() == [[False, True, True]] and gates.value()[0, 0] == gates.value()[0, 0].clamp(0, 1)


# Objectives


def test_spread_is_1_when_even_and_0_when_one_head_has_all():
    assert spread(torch.full((2, 4), 0.3)).item() == pytest.approx(1)
    assert spread(torch.eye(4)[:1]).item() == pytest.approx(0, abs=1e-6)
    share = torch.tensor([[0.5, 0.25], [0.25, 0.0]])
    assert spread(7 * share).item() == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(4)) / math.log(4))


def test_the_strength_falls_while_the_target_is_missed_and_rises_while_there_is_room():
    objective = Objective("gates", strength=0.1, target=0.02, warm_up=0)
    for task, moves in ((0.5, -1), (0.021, -1), (0.019, 1), (0.0, 1), (0.02, 0)):
        strength = Strength(objective)
        strength.seen(task)
        assert np.sign(round(strength.at(5) - 0.1, 9)) == moves, task
    for task, end in ((9.0, Strength.LEAST), (0.0, Strength.MOST)):
        for _ in range(1000):
            strength.seen(task)
        assert strength.at(5) == end
    constant = Strength(OBJECTIVES["gates"])
    constant.seen(9.0)
    assert constant.at(10**6) == OBJECTIVES["gates"].strength and constant.at(0) < constant.at(1) < constant.at(999)
    assert Strength(OBJECTIVES["control"]).at(99) == 0


@pytest.mark.parametrize(
    "given", [{"penalty": "l0"}, {"strength": -1.0}, {"target": 0.0}, {"strength": math.nan}, {"warm_up": -1}]
)
def test_objectives_that_cannot_be_are_refused(given):
    with pytest.raises(ExperimentError):
        Objective(**{"penalty": "gates", **given})


# The loop


def training(model, objective, steps=8, settle=0):
    torch.manual_seed(0)
    weights = {
        name: parameter
        for name, parameter in model.hf_model.named_parameters()
        if "language_model.layers" in name and parameter.ndim == 2
    }
    inputs = batch(model)

    def loss():
        return final_states(model, inputs)[:, -1].square().mean(), 1.0

    return SparseTraining(
        model, objective, POLICY, lambda step: Batch(inputs, loss), weights, steps=steps, settle=settle, rate=1e-3
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_pulls_at_the_weights_and_only_gates_at_gates(name):
    model = hooked()
    run = training(model, replace(OBJECTIVES[name], warm_up=1, strength=1.0))
    figures = run.step(0)
    moved = [parameter.grad for parameter in run.weights.values()]
    assert all(torch.isfinite(grad).all() for grad in moved) and any(grad.abs().max() > 0 for grad in moved)
    assert (run.gates.log_alpha.grad is not None) == run.has_gates
    if run.has_gates:
        assert (run.gates.log_alpha.grad != 0).all()
    assert (figures["penalty"] > 0) == (name != "control") == (figures["strength"] > 0)


def test_a_penalty_alone_closes_gates_and_draws_attention_near():
    for name in ("gates", "far"):
        model = hooked()
        run = training(model, replace(OBJECTIVES[name], strength=100.0, warm_up=0), steps=30)
        before = run.step(0)["penalty"]
        run.run()
        assert run.curve[-1]["penalty"] < 0.7 * before, name


@pytest.mark.parametrize("name", ["constrained", "far"])
def test_a_training_that_was_stopped_goes_on_to_the_same_bits(name, tmp_path, monkeypatch):
    monkeypatch.setattr("mech.sparse.training.loop.EVERY", 2)
    objective = replace(OBJECTIVES[name], warm_up=2)
    whole = training(hooked(), objective, settle=3)
    whole.run()
    stopped = training(hooked(), objective, steps=8, settle=3)

    def until(done, total):
        if done == 5:  # the checkpoint is of step 4
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.run(tmp_path / "state.pt", until)
    again = training(hooked(), objective, settle=3)
    again.run(tmp_path / "state.pt")
    assert all(torch.equal(whole.weights[key], again.weights[key]) for key in whole.weights)
    assert torch.equal(whole.gates.log_alpha, again.gates.log_alpha)
    assert [entry["task"] for entry in again.curve] == [round(entry["task"], 4) for entry in whole.curve]


def test_settled_gates_no_longer_move_and_a_limit_holds(monkeypatch):
    monkeypatch.setattr("mech.sparse.training.loop.ALONE", 0)
    run = training(hooked(), replace(OBJECTIVES["gates"], strength=1.0), steps=4, settle=2)
    run.most = 3
    run.step(0)
    before, costs = run.gates.log_alpha.detach().clone(), dict(run._cheapest(run.batch(2)))
    run.step(2)
    assert int(run.gates.chosen().sum()) == 3 and len(run.dense_heads()) == 3 * run.model.cfg.n_heads // groups(run)
    kept = run.gates.chosen()
    assert torch.equal(run.gates.log_alpha[kept], before[kept])  # no noise, no steps
    first = min(costs, key=costs.get)
    assert not kept[first]


@pytest.mark.parametrize(("target", "some"), [(1e9, True), (1e-9, False)])
def test_gates_go_on_closing_only_while_the_loss_is_within_its_target(target, some):
    run = training(hooked(), replace(OBJECTIVES["constrained"], target=target), steps=9, settle=9)
    run.run()
    assert bool((~run.gates.chosen()).any()) == some


def test_what_closes_is_what_costs_least_and_fits_into_the_room(monkeypatch):
    run = training(hooked(), replace(OBJECTIVES["constrained"], target=1.0), steps=9, settle=9)
    inputs = run.batch(0).inputs

    def loss(*closed):
        gates = torch.ones_like(run.gates.log_alpha)
        for place in closed:
            gates[place] = 0
        with torch.no_grad(), gated(run.model, inputs, POLICY, gates):
            return float(run.batch(0).loss()[0])

    costs = run._cheapest(run.batch(0))
    assert all(loss(place) - loss() == pytest.approx(cost, abs=1e-7) for place, cost in costs)
    assert [cost for _, cost in costs] == sorted(cost for _, cost in costs)
    # Two that stand in for one another cost nothing alone, and all of the room together.
    single = {(0, 0): 0.0, (0, 1): 0.0, (1, 0): 0.2, (1, 1): 5.0}
    monkeypatch.setattr(run, "_cheapest", lambda batch: list(single.items()))
    monkeypatch.setattr(
        run, "_closed", lambda _, places=(): 1 + sum(single[p] for p in places) + 9 * ({(0, 0), (0, 1)} <= set(places))
    )
    run.strength.mean = 0.5
    run._close(5, run.batch(0))
    assert (~run.gates.chosen()).nonzero().tolist() == [[0, 0]]
    run.strength.mean = 1.1
    run._close(5, run.batch(0))
    assert int((~run.gates.chosen()).sum()) == 1


@pytest.mark.parametrize(("alone", "kept", "loss"), [(64, [[1, 1]], 1), (0, [[0, 1]], 3)])
def test_where_few_may_stay_open_those_stay_that_do_best_with_no_others(monkeypatch, alone, kept, loss):
    monkeypatch.setattr("mech.sparse.training.loop.ALONE", alone)
    run = training(hooked(), OBJECTIVES["constrained"], steps=9, settle=9)
    every = {(i, group) for i, group in run.gates.chosen().nonzero().tolist()}

    def closed(_, places=()):
        """(0, 0) and (0, 1) do it together and not alone; what (1, 1) does is not needed beside them."""
        still_open = every - set(places) - {tuple(place) for place in (~run.gates.chosen()).nonzero().tolist()}
        return 0 if {(0, 0), (0, 1)} <= still_open else 1 if (1, 1) in still_open else 3

    monkeypatch.setattr(run, "_closed", closed)
    run.most = 1
    run._limit(0, run.batch(0))
    assert run.gates.chosen().nonzero().tolist() == kept and closed(None) == loss


def test_where_few_may_stay_open_weights_learn_under_them_from_the_first_step():
    model = hooked()
    made = training(model, replace(OBJECTIVES["constrained"], target=1e-9), steps=3)
    few = SparseTraining(model, made.objective, POLICY, made.batch, made.weights, steps=3, settle=1, most=1)
    most = SparseTraining(model, made.objective, POLICY, made.batch, made.weights, steps=3, settle=1, most=made.most)
    assert (few.settle, most.settle) == (3, 1)
    figures = few.step(0)
    assert figures["strength"] == 0 and int(few.gates.chosen().sum()) == 1
    with torch.no_grad(), mech.localize(model, replace(POLICY, dense_heads=few.dense_heads())):
        assert few.batch(1).loss()[0].item() < figures["task"]


def test_gates_that_are_closed_later_stand_above_those_closed_before():
    gates = HardConcrete(1, 4)
    with torch.no_grad():
        gates.log_alpha.copy_(torch.tensor([[-4.0, 2.0, 0.5, 1.0]]))
    gates.close([(0, 2), (0, 3)])
    assert gates.log_alpha[0].argsort().tolist() == [0, 2, 3, 1] and gates.chosen().tolist() == [
        [False, True] + 2 * [False]
    ]


def groups(run):
    return run.model.cfg.n_kv_heads


def test_models_without_a_group_structure_are_refused(monkeypatch):
    model = hooked()
    refuse_without_groups(model)
    monkeypatch.setattr(model, "cfg", replace(model.cfg, kv_heads=(2, 4, 2)))
    with pytest.raises(UnsupportedModel, match=r"layers of \[2, 4\] key/value heads"):
        refuse_without_groups(model)
    monkeypatch.setattr(model, "cfg", replace(model.cfg, attention_layers=()))
    with pytest.raises(UnsupportedModel, match="no layer with attention heads"):
        refuse_without_groups(model)


# LoRA


@pytest.mark.parametrize("name", ["llava", "llava_phi3", "qwen3_vl"])
def test_an_adapter_does_the_same_attached_merged_and_in_peft(name, tmp_path):
    pytest.importorskip("peft")
    model = hooked(name)
    inputs, lora = batch(model), Lora.fresh(model, rank=2)
    with torch.no_grad():
        plain = model(inputs)
        with lora.attached(model):
            assert torch.equal(model(inputs), plain)  # B is zero
        for key, weight in lora.weights.items():
            if key.endswith("lora_B.weight"):
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(key))) / 5)
        with lora.attached(model):
            attached = model(inputs)
        with lora.merged(model):
            merged = model(inputs)
        assert torch.equal(model(inputs), plain) and not torch.allclose(attached, plain, atol=1e-3)
        torch.testing.assert_close(merged, attached, atol=1e-4, rtol=1e-4)
        again = Lora.load(lora.save(tmp_path / "adapter"))
        assert again.rank == 2 and all(torch.equal(again.weights[key], lora.weights[key]) for key in lora.weights)
        theirs = tiny.model(name)
        theirs.load_adapter(str(tmp_path / "adapter"))
        adapted = HookedMLLM.from_hf(theirs, processor(name), name=name)
        torch.testing.assert_close(adapted(inputs), attached, atol=1e-4, rtol=1e-4)


def test_adapters_of_other_models_and_broken_files_are_refused(tmp_path):
    other = Lora(2, {f"nowhere.lora_{side}.weight": nn.Parameter(torch.ones(2, 2)) for side in "AB"}, "other")
    with pytest.raises(UnsupportedModel, match="an adapter of other for llava"), other.merged(hooked("llava")):
        pass
    with pytest.raises(OutputError, match="holds no adapter"):
        Lora.load(tmp_path)
    model = hooked("llava")
    module = next(iter(projections(model).values()))
    module.weight = nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModel, match="plain weights in floating point"):
        Lora.fresh(model, rank=2)


def test_policies_are_written_and_read(tmp_path):
    policy = Policy([(1, 2), (0, 3)], sinks=3, window=17, keep_text=True, phase="decode")
    policy.to_json(tmp_path / "policy.json")
    assert Policy.from_json(tmp_path / "policy.json") == policy == Policy.from_json(policy.to_json())
    for text, says in (("[]", "not a policy"), ("{", "cannot be read"), ('{"window": 3}', "not a policy")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(OutputError, match=says):
            Policy.from_json(tmp_path / "bad.json")
    with pytest.raises(ExperimentError, match="phase"):
        Policy.from_json(policy.to_json() | {"phase": "never"})
