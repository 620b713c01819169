"""Heads found on one task and ablated on another, where it is known which matter; agreement of two trainings."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from mech.data.regions import Box
from mech.data.samples import Samples
from mech.errors import ExperimentError
from mech.experiments.ablation.transfer import transfer
from mech.experiments.ranking.agreement import agreement, scale_agreement, seed_agreement
from mech.experiments.ranking.ranking import Ranking, rank_heads
from mech.model import HookedMLLM
from mech.reference import planted
from mech.views import view

DIMS = ("example", "layer", "head")


@functools.cache
def opened(name):
    key = planted.circuit(name)
    return key, HookedMLLM.from_hf(key.model, key.processor, name=name)


def relabelled(samples, evidence, prefix):
    return Samples([replace(s, evidence=evidence, id=f"{prefix}-{s.id}") for s in samples])


@functools.cache
def crossed():
    """On "real" the evidence is what the retrieval head reads; on "other" it is a cell that nobody needs."""
    key, model = opened("roles")
    corner = (Box(0, 0, 4, 4),)
    tasks = [{"real": key.samples(n, seed), "other": relabelled(key.samples(n - 2, seed + 1), corner, "other"),
              "text": relabelled(key.samples(n, seed + 2), (), "text")} for n, seed in ((4, 10), (6, 20))]  # fmt: skip
    return key, transfer(model, *tasks, k=1, to="zero", n_random=6, batch_size=4)


def test_what_is_lost_is_known_for_every_pair_of_tasks():
    key, found = crossed()
    assert found["lost"].dims == ("found_on", "tested_on")
    assert list(found["found_on"].values) == ["real", "other"]  # "text" has no evidence: it finds no heads
    assert list(found["tested_on"].values) == ["real", "other", "text"]
    assert found["lost"].values.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert (found["lost_low"] <= found["lost"]).all() and (found["lost"] <= found["lost_high"]).all()
    expected = [key.truth.logit_diff[0], key.truth.zeroed["retrieval",], key.truth.logit_diff[0]]
    kept = found["logit_diff"].isel(condition=slice(0, 3)).mean("example")  # nan is left out
    assert kept.values == pytest.approx(np.array([expected] * 3), abs=1e-4)
    # What says nothing when it finds nothing does not answer in the form of the task either.
    assert found["in_form"].sel(tested_on="real").mean("example").values[:3].tolist() == [1, 0, 1]


def test_random_sets_are_the_same_for_every_task_and_their_cost_is_counted():
    _, found = crossed()
    random = found["accuracy"].where(found["band"] == "random", drop=True).mean("example")
    assert random.sizes["condition"] == 6 and set(random.values.ravel()) == {0, 1}
    assert (random == random.isel(tested_on=0)).all()
    assert found["random_lost"].values == pytest.approx([1 - float(random[0].mean())] * 3)
    as_bad = int((random[0] == 0).sum())  # the chain has two heads: either of them costs everything
    assert as_bad >= 1
    assert found["p"].values == pytest.approx(np.array([[(1 + as_bad) / 7] * 3, [1.0] * 3]))


def test_tasks_of_different_length_end_in_nan_and_name_their_examples():
    _, found = crossed()
    short = found.sel(tested_on="other")
    assert np.isnan(short["accuracy"].values[:, 4:]).all() and not np.isnan(short["accuracy"].values[:, :4]).any()
    assert [bool(name) for name in short["example_id"].values] == [True] * 4 + [False] * 2
    assert all(name.startswith("other-") for name in short["example_id"].values[:4])
    assert found.attrs["n_heads"] == 1 and found.attrs["method"] == "zero" and found.attrs["provenance"]


def test_a_transfer_shows_itself_with_intervals_and_chance():
    _, found = crossed()
    shown = view(found).body
    assert "Accuracy lost without 1 heads" in shown and "L1H0" in shown.partition("Accuracy lost")[2]
    assert shown.count("<tr>") == 3 + 3  # losses, and under them the heads found on each domain
    assert shown.count(f"chance {float(found['random_lost'][0]):.2f}") == shown.count("<td ") == 6
    assert "<td style=" in shown and " to 1.00" in shown and "0.00 to 0.00" not in shown


def test_rankings_of_ones_own_take_the_place_of_ram():
    key, model = opened("roles")
    mean = np.zeros((2, 4))
    mean[key.truth.heads["sink"]] = 1
    tasks = {"real": key.samples(3, 1)}, {"real": key.samples(3, 2)}
    found = transfer(model, *tasks, rankings={"sinks": Ranking(mean)}, k=1, to="zero", n_random=2)
    assert found["lost"].sel(found_on="sinks", tested_on="real") == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(test={"new": 3}), "the task 'new' is tested and has no samples in find"),
        (dict(test={"real": 1}), "1 examples of 'real'"),
        (dict(test={}), "test=(.|\n)*at least one"),
        (dict(find={"random": 3}, test={"random": 3}), "a task called 'random'"),
        (dict(n_random=1), "n_random=1"),
        (dict(seed=10), "are in find"),
        (dict(k=0), "k=0 in transfer"),
        (dict(evidence=False), "no task whose samples have evidence"),
        (dict(rankings={"a": Ranking(np.ones((3, 4)))}), "a ranking of 3 x 4 heads"),
        (dict(rankings={"a": Ranking(np.ones((2, 4)), model="another", weights="0f" * 32)}), "a ranking of another"),
    ],
)
def test_bad_requests_are_refused(changes, says):
    key, model = opened("roles")
    made = [
        {name: key.samples(n, seed) for name, n in changes.pop(which, {"real": 3}).items()}
        for which, seed in (("find", 10), ("test", changes.pop("seed", 20)))
    ]
    if not changes.pop("evidence", True):
        made[0] = {name: relabelled(samples, (), "") for name, samples in made[0].items()}
    with pytest.raises(ExperimentError, match=says):
        transfer(model, *made, **{"k": 1, "to": "zero", "n_random": 2, **changes})


# Two trainings


def trained(seed, n=40, shape=(4, 8)):
    """Scores of a model: three layers' worth of heads that follow what they see in the examples, the rest noise."""
    kinds = np.random.default_rng(0).uniform(0, 1, (3, n))  # what the examples are like, for every training alike
    rng = np.random.default_rng([seed, 1])
    values = rng.uniform(0, 0.05, (n, *shape))
    order = [rng.permutation(shape[1]) for _ in range(shape[0])]
    for kind, layer in enumerate((1, 1, 2)):
        values[:, layer, order[layer][kind]] += 0.3 + 0.2 * kind + 0.3 * kinds[kind]
    places = [(layer, int(order[layer][kind])) for kind, layer in enumerate((1, 1, 2))]
    return values, places


def ranked(values, model="m", examples=None):
    named = examples or [str(i) for i in range(len(values))]
    return rank_heads(xr.DataArray(values, {"example": named}, DIMS, "ram", {"model": model}))


def test_two_trainings_agree_in_all_but_the_numbers_of_their_heads():
    (one, places), (two, others) = trained(1), trained(2)
    a, b = ranked(one, "one"), ranked(two, "two")
    found = seed_agreement(a, b, k=3)
    for (layer, head), other in zip(places, others, strict=True):
        at = dict(layer=layer, head=head)
        assert (int(found.partner_layer.sel(at)), int(found.partner_head.sel(at))) == other
        assert float(found.similarity.sel(at)) > 0.9
    assert float(found.top_matched) == 1 and float(found.top_matched_null) == pytest.approx(3 / 32)
    assert float(found.same_examples) > 0.9 and float(found.same_examples_p) == pytest.approx(1 / 201)
    assert float(found.same_examples_null) < 0.7
    assert float(found.overlap) > 0.9 and float(found.overlap_p) < 0.05
    assert float(found.sorted_spearman) > float(found.sorted_spearman_null)
    # Head by head they have nothing to do with each other, though they are the same model twice.
    by_number = agreement({"a": ranked(one), "b": ranked(two)}, k=3)
    assert float(by_number.spearman[0, 1]) < 0.6 and float(by_number.jaccard[0, 1]) < 0.5


def test_a_renumbered_model_is_the_same_model():
    values, _ = trained(1)
    rng = np.random.default_rng(3)
    order = np.stack([rng.permutation(8) for _ in range(4)])
    renumbered = np.take_along_axis(values, order[None], axis=2)
    found = seed_agreement(ranked(values), ranked(renumbered), k=3)
    partner = np.take_along_axis(order, found.partner_head.values, axis=1)
    assert (found.partner_layer.values == np.arange(4)[:, None]).all() and (partner == np.arange(8)).all()
    assert found.similarity.values == pytest.approx(1) and float(found.sorted_spearman) == pytest.approx(1)
    assert float(found.overlap) == pytest.approx(1) and float(found.top_matched) == 1


def test_unrelated_trainings_are_called_alike_as_often_as_the_p_values_say():
    rng, small = np.random.default_rng(99), []
    for run in range(100):
        a, b = (ranked(rng.gamma(0.3, size=(12, 3, 4))) for _ in range(2))
        found = seed_agreement(a, b, k=2, n_permutations=19, seed=run)
        small.append([float(found[name]) <= 0.1 for name in ("overlap_p", "sorted_spearman_p", "same_examples_p")])
    assert (np.mean(small, axis=0) <= 0.2).all() and np.sum(small) > 0  # 0.1 expected; 0.2 is 3.3 standard errors off


def test_what_cannot_be_matched_is_left_out_or_refused():
    a, b = ranked(trained(1)[0]), ranked(trained(2)[0], examples=[f"other {i}" for i in range(40)])
    assert "same_examples" not in seed_agreement(a, b) and "overlap_p" in seed_agreement(a, b)
    assert "same_examples" not in seed_agreement(a, Ranking(b.mean, score="ram"))
    still = trained(2)[0]
    still[:, 0] = 0.5  # heads that never change: no correlation, and no warning
    assert float(seed_agreement(a, ranked(still)).similarity.sel(layer=0).max()) < 0.6
    with pytest.raises(ExperimentError, match="4 x 8 heads by 'ram' and 2 x 8 by 'ram'"):
        seed_agreement(a, ranked(trained(1)[0][:, :2]))
    with pytest.raises(ExperimentError, match="by 'vera'"):
        seed_agreement(a, Ranking(b.mean, score="vera"))
    with pytest.raises(ExperimentError, match="n_permutations=0"):
        seed_agreement(a, a, n_permutations=0)
    with pytest.raises(ExperimentError, match="seed_agreement"):
        agreement({"a": a, "b": ranked(trained(2)[0], "another")})


def test_depth_beats_its_null_where_a_layer_is_special_and_not_where_none_is():
    values, _ = trained(1)
    one = scale_agreement(ranked(values), ranked(trained(2, shape=(8, 16))[0]))
    assert float(one.overlap_null) < 0.75
    same = scale_agreement(ranked(values), ranked(trained(2)[0]))
    assert float(same.overlap) > float(same.overlap_null) and float(same.overlap_p) < 0.05
    chance = [
        scale_agreement(*(ranked(np.random.default_rng([run, i]).gamma(0.3, size=(3, 4, 8))) for i in (0, 1)),
                        n_permutations=19).overlap_p for run in range(100)
    ]  # fmt: skip
    assert np.mean([float(p) <= 0.1 for p in chance]) <= 0.2
