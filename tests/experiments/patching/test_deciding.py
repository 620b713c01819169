"""The query at which a head decides: that of the exact sweep, drawn as it is; and what a study shows by fixed rules."""

import json

import numpy as np
import pytest
import xarray as xr

from mech.data.haystacks import haystacks
from mech.errors import ExperimentError
from mech.experiments.attention.maps import attention_maps
from mech.experiments.findings.chosen import known_necessary, necessary_blind, representative
from mech.experiments.metrics import LogitDiff
from mech.experiments.patching.activation import activation_patching
from mech.experiments.patching.deciding import deciding_queries
from mech.experiments.ranking.ranking import Ranking
from mech.model import HookedMLLM
from mech.views import view

HEADS = [(0, 2), (2, 2), (3, 0)]  # reads the colour; writes the answer; does nothing


@pytest.fixture(scope="module")
def model():
    return HookedMLLM.from_pretrained("reference:llava-s")


@pytest.fixture(scope="module")
def sample():
    return haystacks("grounding", 1, seed=0)[0]


@pytest.fixture(scope="module")
def known(model, sample):
    return deciding_queries(model, sample, HEADS)


def test_it_is_the_position_where_the_exact_sweep_loses_most(model, sample, known):
    layout = model.inputs_of(sample).layout
    positions = sorted({*layout.positions("question").tolist(), *layout.positions("last").tolist()})
    metric = LogitDiff(sample.answer, sample.counterfactual.answer)
    swept = activation_patching(
        model, [sample], None, metric, over=("layer", "head", "position"), layers=[0, 2], positions=positions,
        direction="noise",
    ).effect[0]  # fmt: skip
    for (layer, head), (position, lost) in zip(HEADS[:2], known[:2], strict=True):
        costs = swept.sel(layer=layer, head=head)
        assert int(costs.position[int(costs.argmax("position"))]) == position
        assert lost == pytest.approx(float(costs.max()), abs=1e-4) and lost > 0.1
    assert known[2] is None
    assert layout.tokens[known[0][0]].strip() in sample.question and known[1][0] == positions[-1]
    with pytest.raises(ExperimentError, match="without a counterfactual"):
        deciding_queries(model, haystacks("grounding", 1)[0].counterfactual, HEADS)


def test_the_picture_is_of_that_query_and_says_so(model, sample, known):
    ranking = Ranking(np.random.default_rng(0).random((6, 8)))
    found = attention_maps(model, [sample], ranking, bands={"top": HEADS}, deciding=[known])
    inputs = model.inputs_of(sample)
    _, cache = model.run_with_cache(inputs, names_filter="blocks.0.attn.hook_pattern")
    row = cache["blocks.0.attn.hook_pattern"][0, 2, known[0][0], inputs.layout.visual.positions("image")]
    np.testing.assert_allclose(found["attention"][0, 0, : len(row)], row.numpy(), atol=1e-6)
    mean = attention_maps(model, [sample], ranking, bands={"top": HEADS})
    np.testing.assert_allclose(found["attention"][0, 2], mean["attention"][0, 2], atol=1e-6)
    queries = json.loads(found.attrs["facts"])[0]["queries"]
    assert queries[0].endswith(f": {known[0][1]:.0%}") and queries[2] == "question"
    body = view(found, on=[sample]).body
    assert f"where it decides {known[0][1]:.0%}" in body and "from the question (mean)" in body
    with pytest.raises(ExperimentError, match="3 for each of 1 samples"):
        attention_maps(model, [sample], ranking, bands={"top": HEADS}, deciding=[known[:2]])


def test_what_is_shown_and_spared_follows_rules():
    dims, coords = ("layer", "head"), {"layer": [1, 4], "head": [0, 1]}
    blind, seeing = "causal, not attending", "attending and causal"
    patched = xr.Dataset(
        {
            "lost": (dims, [[0.2, 0.9], [0.6, 0.4]]), "lost_find": (dims, [[0.01, 0.9], [0.05, 0.0]]),
            "necessary": (dims, [[1, 1], [1, 0]]), "quadrant": (dims, [[blind, seeing], [blind, blind]]),
        },
        coords,
    )  # fmt: skip
    assert necessary_blind(patched, 2) == [(4, 0), (1, 0)] and necessary_blind(patched, 1) == [(4, 0)]
    assert known_necessary(patched) == [(1, 1), (4, 0)]
    assert known_necessary(None) == known_necessary(patched.drop_vars("lost_find")) == necessary_blind(None, 2) == []
    samples = haystacks("grounding", 9, seed=1)
    mass = np.zeros((9, 2, 2))
    mass[:, 1, 0] = [3, 8, 1, 0, 7, 2, 6, 5, 4]
    ram = xr.Dataset({"ram": (("example", *dims), mass)}, coords)
    assert [s.id for s in representative(samples, ram, [(4, 0)], 3)] == [samples[i].id for i in (2, 8, 4)]
    assert len(representative(samples, ram, [(4, 0)], 20)) == 9
