"""Choices of dense heads at equal budget: sets, gates, reach, the measured settings, what is said of them, the view."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from pages import Page
from typer.testing import CliRunner

import mech
from mech.errors import ExperimentError, InputError
from mech.experiments.findings import acceleration as said
from mech.experiments.ranking.ranking import Head, Ranking
from mech.reference import tiny, tiny_processors
from mech.results import Study, load, save
from mech.sparse.dynamic import Dynamic, chosen, localize_dynamic, reach, reach_of
from mech.sparse.frontier.acceleration import (
    CHOICES,
    Grid,
    Local,
    acceleration,
    local_for,
    measured,
    settings,
    timed,
)
from mech.sparse.frontier.timing import speed, taking_turns
from mech.sparse.gates import learned_gates
from mech.sparse.groups import expanded, grouped, lowest_groups
from mech.sparse.localize import localize
from mech.sparse.policy import Policy

WINDOW = 24


@pytest.fixture(scope="module")
def model():
    return mech.HookedMLLM.from_pretrained("reference:qwen-s")  # four KV heads for eight query heads


@pytest.fixture(scope="module")
def halves():
    return mech.haystacks("pages", 16, seed=11).split(0.5)


@pytest.fixture(scope="module")
def ram(model, halves):
    return mech.rank_heads(mech.retrieval_attention_mass(model, halves[0]))


@pytest.fixture(scope="module")
def found(model, halves):
    find, test = halves
    options = dict(choices=("ram", "bottom", "random", "reach", "dynamic"), shares=(2, 0.25), n_random=2, turns=1)
    return acceleration(model, test, find=find, window=WINDOW, batch_size=8, **options)


# Sets


def test_a_group_is_as_good_as_its_best_head_and_goes_as_a_whole(model, ram):
    groups = grouped(ram, model.cfg)
    assert groups.mean.shape == (6, 4) and groups.n_heads == 4
    np.testing.assert_allclose(groups.mean[2, 3], max(ram.mean[2, 6:8]))
    assert expanded([(1, 2)], model.cfg) == (Head(1, 4), Head(1, 5))
    assert len(lowest_groups(ram, model.cfg, 3)) == 6 * 3 * 2
    with pytest.raises(ExperimentError, match="as this qwen2_5_vl model has"):
        grouped(Ranking(np.zeros((3, 4))), model.cfg)


def test_every_choice_costs_the_same_at_one_share(model, ram):
    named = {name: ram for name in ("ram", "vision", "causal", "gates", "reach")}
    todo = settings(model, named, Grid(CHOICES, (1, 0.25), 3))
    assert [one.choice for one in todo[:2]] == ["dense", "window"]
    assert len(todo) == 2 + 2 * (len(CHOICES) + 2) and len(set(todo)) == len(todo)
    for share in {one.share for one in todo[2:]}:
        budgets = {
            Policy(one.heads, window=WINDOW).budgets(model.cfg, 130)
            for one in todo[2:]
            if one.share == share and one.choice != "dynamic"
        }
        assert len(budgets) == 1
    top, bottom = (
        next(one for one in todo if one.choice == name and one.n_kv_heads == 1) for name in ("ram", "bottom")
    )
    assert set(top.heads) & set(ram.top(1)) and not set(bottom.heads) & set(ram.top(20))
    assert list(timed(todo)) == [0.0, 1 / 24, 6 / 24] and timed(todo)[1 / 24] == top.heads


# Which heads


@torch.no_grad()
def test_reach_is_the_change_that_confining_a_head_makes_at_the_question(model, halves):
    """Against the definition: the head's output under ``localize``, everything below it dense."""
    inputs = model.inputs_of(halves[1][0])
    scores = reach_of(model, inputs, window=WINDOW)
    rows = inputs.layout.positions("question")
    name = "blocks.0.attn.hook_result"
    dense = model.run_with_cache(inputs, names_filter=[name])[1][name][0, rows]
    with localize(model, window=WINDOW) as fast:
        local = fast.run_with_cache(inputs, names_filter=[name])[1][name][0, rows]
    torch.testing.assert_close(scores[0], (dense - local).norm(dim=-1).amax(0), rtol=1e-4, atol=1e-4)


def test_reach_of_the_first_layers_runs_no_more_than_those(model, halves):
    inputs = model.inputs_of(halves[1][0])
    layers: list[int] = []
    with model.attending(lambda call: layers.append(call.layer)):
        some = reach_of(model, inputs, window=WINDOW, layers=2)
    assert layers == [0, 1, 2]  # the third is where it stops
    torch.testing.assert_close(some[:2], reach_of(model, inputs, window=WINDOW)[:2])
    assert not some[2:].any()
    data = reach(model, halves[0][:2], window=WINDOW, layers=2)
    assert data["reach"].dims == ("example", "layer", "head") and data.attrs["layers"] == 2
    with pytest.raises(ExperimentError, match="1 to 6"):
        reach_of(model, inputs, layers=9)
    with pytest.raises(InputError, match="a batch of 2 rows"):
        reach_of(model, model.collate([inputs, inputs]))


@torch.no_grad()
def test_a_dynamic_model_is_the_model_localized_for_this_input(model, halves):
    fast = localize_dynamic(model, 3, window=WINDOW)
    for sample in halves[1][:2]:
        inputs = model.inputs_of(sample)
        policy = fast.policy(inputs)
        assert len(policy.dense_heads) == 6
        with localize(model, policy) as by_hand:
            wanted, text = by_hand(inputs), by_hand.generate_text(inputs, max_new_tokens=2)
        assert torch.equal(fast(inputs), wanted) and fast.generate_text(inputs, max_new_tokens=2) == text
    assert model.localized is None and "3 KV heads" in repr(fast)
    best = chosen(model, np.eye(6, 8), 1, Policy(window=WINDOW)).dense_heads
    assert best == (Head(0, 0), Head(0, 1))
    with pytest.raises(ExperimentError, match="an int from 1 to 24"):
        localize_dynamic(model, 25)


def test_gates_close_where_the_window_is_enough_and_leave_no_trace(halves):
    model = mech.HookedMLLM.from_pretrained("reference:llava-s")
    before = {name: value.clone() for name, value in model.hf_model.state_dict().items()}
    ranking = learned_gates(model, halves[0], window=WINDOW, steps=16, batch_size=4)
    assert ranking.mean.shape == (6, 8) and ranking.mean.min() >= 0 and ranking.mean.max() <= 1
    # The one head of layer 0 that reads the name of the page cannot be spared; most can.
    assert Head(0, 2) in ranking.top(3) and (ranking.mean < 0.5).mean() > 0.6
    assert all(torch.equal(value, before[name]) for name, value in model.hf_model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.hf_model.parameters())
    again = learned_gates(model, halves[0], window=WINDOW, steps=2)
    np.testing.assert_array_equal(again.mean, learned_gates(model, halves[0], window=WINDOW, steps=2).mean)
    with pytest.raises(ExperimentError, match="within 4 sinks and a window of 256"):
        learned_gates(model, halves[0])


def test_open_gates_are_the_dense_model_and_gates_share_their_group():
    """Softcaps and sliding windows too: without pressure nothing moves, so every gate stays where it was."""
    model = mech.HookedMLLM.from_hf(tiny.model("paligemma2"), tiny_processors.processor("paligemma2"))
    samples = [replace(one, images=(one.images[0].resize((16, 16)),)) for one in mech.haystacks("grounding", 2)]
    ranking = learned_gates(model, samples, sinks=1, window=8, steps=3, sparsity=0.0)
    assert (ranking.mean[:, 0] == ranking.mean[:, 1]).all()
    np.testing.assert_allclose(ranking.mean, 1.0, atol=1e-6)


# The experiment


def test_settings_are_measured_as_localize_runs_them(model, halves, ram, found):
    assert found["accuracy"].dims == ("condition", "example") and found.sizes["example"] == 8
    assert list(found["example"].values) == [sample.id for sample in halves[1]]
    here = (found["choice"] == "ram") & (found["n_kv_heads"] == 2)
    heads = expanded(grouped(ram, model.cfg).top(2), model.cfg)
    row = found["logit_diff"].values[here.values][0]
    for i in (0, 5):
        sample = halves[1][i]
        with localize(model, dense_heads=heads, window=WINDOW) as fast, torch.no_grad():
            logits = fast(model.inputs_of(sample))[0, -1]
        right, wrong = (model.processor.answer_ids(text)[0] for text in (sample.answer, sample.counterfactual.answer))
        assert row[i] == pytest.approx(float(logits[right] - logits[wrong]), abs=1e-3)
    budget = Policy(heads, window=WINDOW).budgets(model.cfg, found.attrs["length"])
    assert found["kv_bytes"].values[here.values][0] == pytest.approx(budget.kv_bytes)
    # A rank that looks and a set that does not: the window matters at this length.
    kept = found["accuracy"].mean("example").values
    assert kept[0] > 0.8 and kept[here.values][0] > kept[1] + 0.3


def test_speed_is_measured_for_every_share_beside_its_bounds(found):
    assert found["timed"].values.tolist() == [0.0, 2 / 24, 6 / 24]
    assert found["prefill_speed"].dims == ("timed", "turn") and (found["prefill_speed"] > 0).all()
    assert (found["decode_bound"].diff("timed") < 0).all() and (found["kv_measured"].diff("timed") > 0).all()
    assert found["kv_measured"][0] < 0.4 and found.attrs["timed_tokens"] > 100


def test_dynamic_settings_are_each_inputs_own(model, halves, found):
    here = ((found["choice"] == "dynamic") & (found["n_kv_heads"] == 2)).values
    fast = localize_dynamic(model, 2, window=WINDOW)
    assert isinstance(fast, Dynamic)
    sample = halves[1][3]
    with torch.no_grad():
        logits = fast(model.inputs_of(sample))[0, -1]
    right, wrong = (model.processor.answer_ids(text)[0] for text in (sample.answer, sample.counterfactual.answer))
    assert found["logit_diff"].values[here][0, 3] == pytest.approx(float(logits[right] - logits[wrong]), abs=1e-3)


def test_what_would_say_nothing_is_refused_before_any_forward(model, halves):
    find, test = halves
    with pytest.raises(ExperimentError, match="rank the heads"):
        acceleration(model, test, find=test)
    with pytest.raises(ExperimentError, match="every head attends to everything"):
        acceleration(model, test, find=find, window=500)
    with pytest.raises(ExperimentError, match="use 'causal'"):
        acceleration(model, test, find=find, choices=("casual",))
    with pytest.raises(ExperimentError, match="of 3 x 4 heads"):
        acceleration(model, test, find=find, rankings={"ram": Ranking(np.zeros((3, 4)))})
    window = local_for(model, test).window
    assert window % 8 == 0 and 16 <= window <= 32


def test_a_result_comes_back_from_a_file(found, tmp_path):
    save(found, tmp_path / "sparse.nc")
    assert said.summarise(load(tmp_path / "sparse.nc")) == said.summarise(found)


def test_a_study_that_was_killed_goes_on(model, halves, tmp_path, monkeypatch):
    from mech.sparse.frontier import resumable

    class Killed(BaseException):
        pass

    find, test = halves
    grid = Grid(shares=(2,), n_random=2, batch_size=8)
    local = Local(window=WINDOW, n_causal=1, gate_steps=1)

    def dying(what, done, total):
        if what.endswith("settings") and done == 5:
            raise Killed

    with Study(tmp_path, {}) as results:
        with pytest.raises(Killed):
            resumable.acceleration_in(results, "m/acceleration", model, (find, test), local, grid, dying)
        monkeypatch.setattr(resumable, "ranked", None)  # it is not asked again
        seen = []
        tell = lambda *now: seen.append(now)  # noqa: E731
        whole = resumable.acceleration_in(results, "m/acceleration", model, (find, test), local, grid, tell)
        assert [done for what, done, _ in seen if what.endswith("settings")] == list(
            range(6, whole.sizes["condition"] + 1)
        )
        again = resumable.joined(results, "m/acceleration")
        xr.testing.assert_equal(whole, again)
    assert set(whole["choice"].values) == {"dense", "window", *CHOICES}
    alone = settings(model, {"ram": whole_ram(model, find)}, Grid(("ram",), (2,), 1))[2:]
    fresh = next(iter(measured(model, test, alone, local)))
    row = whole["logit_diff"].values[(whole["choice"] == "ram").values]
    np.testing.assert_allclose(row, fresh["logit_diff"].values, atol=1e-3)


def whole_ram(model, find):
    return mech.rank_heads(mech.retrieval_attention_mass(model, find))


# What is said of it


def fabricated(n=60, draws=80, **accuracy):
    """A result in which sets keep these shares of the answers; every choice at three sizes."""
    rows, shares = [("dense", 1.0, 100, 0, 1.0), ("window", 0.0, 0, 0, accuracy.pop("window", 0.2))], (0.05, 0.1, 0.2)
    for share in shares:
        for choice in ("ram", "causal", "vision", "reach", "dynamic"):
            rows.append((choice, share, round(100 * share), 0, accuracy.get(choice, 1.0)))
        rows += [("random", share, round(100 * share), draw, accuracy.get("random", 0.25)) for draw in range(draws)]
    choice, share, groups, draw, right = map(np.array, zip(*rows, strict=True))
    # The first answers are the wrong ones, in other places for every draw.
    at = (np.arange(n)[None] + 7 * draw.astype(int)[:, None]) % n
    values = (at >= np.round((1 - right[:, None]) * n)).astype(float)
    speeds = {name: (("timed", "turn"), np.full((4, 3), accuracy.get(name, 1.5)))
              for name in ("prefill_speed", "decode_speed", "decode_speed_default")}  # fmt: skip
    once = {name: ("timed", np.full(4, 2.0)) for name in ("kv_measured", "prefill_bound", "decode_bound")}
    coords = {"choice": choice, "share": share, "n_kv_heads": groups, "draw": draw,
              "flops": 0.1 + 0.9 * share, "kv_bytes": 0.1 + 0.9 * share}  # fmt: skip
    return xr.Dataset(
        {"accuracy": (("condition", "example"), values), **speeds, **once},
        {**{name: ("condition", value) for name, value in coords.items()}, "timed": [0.0, *shares]},
        {"length": 1000, "sinks": 4, "window": 64, "n_kv_heads": 100, "domain": "pages", "kind": "acceleration"},
    )


def kinds(data):
    return {kind: (text, against) for kind, text, against in said.sentences(said.summarise(data))}


def test_the_recommended_setting_is_the_smallest_that_surely_keeps_accuracy():
    facts = said.summarise(fabricated(ram=1.0))
    best = facts["recommended"]
    assert best["choice"] == "ram" and best["n_kv_heads"] == 5 and best["speed"]["prefill"]["mean"] == 1.5
    # No answer of 60 lost is no proof that none would be.
    assert best["loss"]["mean"] == 0 and 0.03 < best["loss"]["high"] < 0.1
    assert said.summarise(fabricated(ram=1.0), margin=0.04)["recommended"] is None
    assert said.summarise(fabricated(ram=0.95))["recommended"] is None  # three lost: its interval passes ten points
    assert said.summarise(fabricated(ram=0.5))["enough"]["causal"] == 0.05
    alone = said.summarise(fabricated(window=1.0))["recommended"]
    assert alone["choice"] == "window" and alone["n_kv_heads"] == 0


def test_sentences_turn_with_the_numbers():
    agreeing = kinds(fabricated())
    assert set(agreeing) == {"sparse", "dense wins", "no input", "faster"} and not any(
        against for _, against in agreeing.values()
    )
    assert "5 of 100 KV heads (5%)" in agreeing["sparse"][0] and "0 of 80 random sets" in agreeing["dense wins"][0]
    few = kinds(fabricated(draws=4))  # sure on these samples, and four sets are no claim
    assert "dense wins" not in few and "p = 0.200 over sets" in few["dense draws"][0]
    useless = kinds(fabricated(ram=0.25))
    assert useless["not sparse"][1] and useless["dense draws"][1]
    assert "by causal effect" in useless["dense beaten"][0] or "by reach" in useless["dense beaten"][0]
    paying = kinds(fabricated(reach=0.5))
    assert "50%, a difference of 50 points" in paying["input"][0] and "no input" not in paying
    assert "not shown to pay" in kinds(fabricated(dynamic=0.98))["no input"][0]
    assert kinds(fabricated(vision=0.3))["dense others"][0].startswith("Dense heads chosen by attention on all visual")
    window = kinds(fabricated(window=1.0))
    assert window["window"][1] and "dense wins" not in window  # nothing to win
    assert "slower" in kinds(fabricated(prefill_speed=0.6))
    weak = fabricated()
    weak["accuracy"][:, 6:] = 0.0
    weak["accuracy"][:, :6] = 1.0
    assert not kinds(weak)
    assert all(kind in said.KINDS for data in (agreeing, useless, window) for kind in data)


def test_p_values_are_corrected_over_all_sizes():
    facts = said.summarise(fabricated(ram=0.6, random=0.55))
    assert len(facts["against_random"]) == 3 and len(facts["against_ram"]) == 3 * 4
    assert all(test["p_value"] <= test["p_adjusted"] <= 1 for test in facts["against_random"] + facts["against_ram"])


def test_the_view_draws_every_choice_and_the_star(found, tmp_path):
    page = mech.view(fabricated()).save(tmp_path / "frontier.html").read_text()
    assert "Recommended:" in page and page.count('class="plot"') == 3
    assert "star-open" in json.dumps(Page(page).charts)
    assert all(name in page for name in ("RAM", "causal effect", "window alone", "attention on all visual tokens"))
    assert "No recommended setting" in mech.view(fabricated(ram=0.3)).html()
    assert mech.view(found.drop_dims("timed")).html().count('class="plot"') == 1


def test_the_dense_heads_are_named_under_the_mouse():
    data = fabricated()
    names = np.where(data["share"] < 0.1, "L0H1 L2H3", " ".join(f"L1H{i}" for i in range(20)))
    data = data.assign_coords(heads=("condition", np.where(data["choice"] == "dynamic", "", names)))
    told = [text for trace in Page(mech.view(data).html()).charts[0]["data"] for text in trace.get("text", ())]
    by_ram = [text for text in told if text.startswith("<b>RAM</b>")]
    assert by_ram[0].endswith("<br>dense: L0H1, L2H3") and by_ram[1].endswith("L1H15 and 4 more")
    assert "L1H3,<br>L1H4" in by_ram[1]
    assert not any("dense:" in text for text in told if "random sets" in text or "anew" in text), "no set of its own"


def test_turns_alternate_and_a_speed_is_a_ratio_within_a_turn():
    order: list[str] = []
    times = taking_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, turns=2)
    assert order == ["a", "b", "b", "a", "a", "b"] and len(times["a"]) == 2
    assert speed({"a": np.array([2.0, 4.0]), "b": np.array([1.0, 1.0])}, "a", "b") == {
        "mean": 3.0,
        "low": 2.0,
        "high": 4.0,
    }


def test_the_command_line(tmp_path):
    from mech.cli import app

    run = CliRunner()
    options = ["accelerate", "--samples", "16", "--choice", "ram", "--choice", "random", "--share", "2", "--quiet"]
    told = run.invoke(app, [*options, "--out", str(tmp_path / "a.html"), "--n-random", "1"])
    assert told.exit_code == 0, told.output
    assert "chosen by" in told.stdout and (tmp_path / "a.html").stat().st_size > 500_000
    facts = json.loads(run.invoke(app, [*options, "--json", "--window", "30"]).stdout)
    assert facts["window"] == 30 and {one["choice"] for one in facts["curve"]} == {"ram", "random"}
    for wrong, says in (
        (["--samples", "4"], "at least 16"), (["--out", "a.txt"], "ends in .nc, .html"),
        (["--margin", "2"], "margin"),
        (["--choice", "ramm"], "use 'ram'"), (["--data", "x.jsonl", "--pictures", "4"], "one of the two"),
    ):  # fmt: skip
        assert says in str(run.invoke(app, ["accelerate", *wrong]).exception)


def test_the_legend_can_draw_every_choice():
    from mech.views.frontier import _DASHES, _SHAPES, LINES, NAMES

    for choice in set(CHOICES) - {"random"}:
        _, symbol, dash = LINES[choice]
        assert symbol in _SHAPES and dash in _DASHES and NAMES[choice]
