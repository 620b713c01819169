"""Redirection: heads pulled towards a region, against scores written by a hook and against planted circuits."""

from dataclasses import replace

import pytest
import torch
from tiny_models import opened

import mech
from mech.data.samples import Distractor
from mech.errors import ExperimentError, RegionError
from mech.experiments.ablation.redirected import redirection_table
from mech.experiments.ablation.redirection import redirection
from mech.interventions import PerRow, Redirect, intervene
from mech.model import HookedMLLM
from mech.reference import planted, tiny, tiny_processors

HEADS = [(1, 0), (1, 3)]


def pulled_by_hook(keys, bias, rows=slice(None)):
    """The definition: a number added to the scores of two heads."""

    def hook(scores, hook):
        for _, head in HEADS:
            scores[:, head, rows][..., : len(keys)] += bias * keys.to(scores)
        return scores

    return [("blocks.1.attn.hook_attn_scores", hook)]


@pytest.mark.parametrize("name", [name for name in tiny.NAMES if name != "mllama"])
def test_it_is_a_bias_before_the_softmax(name):
    model = opened(name)
    if 1 not in model.cfg.attention_layers:
        pytest.skip("layer 1 has no heads")
    inputs = model.inputs("What is shown here?", [tiny_processors.noise(24, 24)])
    keys = torch.zeros(len(inputs.layout.kind))
    keys[torch.as_tensor(inputs.layout.positions("image"))] = 1
    with intervene(model, Redirect(HEADS, "image", 2.5)) as redirected:
        found = redirected(inputs)
    expected = model.run_with_hooks(inputs, fwd_hooks=pulled_by_hook(keys, 2.5))
    assert (found - model(inputs)).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_every_row_of_a_batch_has_its_own_region():
    model = opened("qwen2_5_vl")
    rows = [model.inputs("What is shown here?", [tiny_processors.noise(24, 24, seed)]) for seed in (0, 1)]
    cells = list(rows[0].layout.cells(2, 2).values())
    with intervene(model, Redirect(HEADS, PerRow((cells[0], cells[3])), 3.0)) as both:
        found = both(model.collate(rows))
    for row, cell, logits in zip(rows, (cells[0], cells[3]), found, strict=True):
        with intervene(model, Redirect(HEADS, cell, 3.0)) as one:
            torch.testing.assert_close(one(row)[0], logits, atol=1e-5, rtol=1e-4)


def test_generation_with_a_cache_is_pulled_at_every_token():
    model = opened("llava")
    inputs = model.inputs("What is shown here?", [tiny_processors.noise(24, 24)])
    keys = torch.zeros(len(inputs.layout.kind))
    keys[torch.as_tensor(inputs.layout.positions("image"))] = 1
    with intervene(model, Redirect(HEADS, "image", -4.0)) as redirected:
        found = redirected.generate(inputs, max_new_tokens=6)
    with model.hooks(pulled_by_hook(keys, -4.0)):
        expected = model.generate(inputs, max_new_tokens=6)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("family", planted.FAMILIES)
def test_a_planted_head_decides_where_the_answer_comes_from(family):
    key = planted.circuit("roles", family)
    model = HookedMLLM.from_hf(key.model, key.processor)
    ranking = mech.rank_heads(mech.retrieval_attention_mass(model, key.samples(4, seed=1)))
    assert ranking.top(1)[0] == key.truth.heads["retrieval"]
    found = redirection(model, key.samples(6), ranking, heads=1, bias=(1.0, 1000.0), n_random=3)
    weak, strong = (found.sel(bias=bias) for bias in (1.0, 1000.0))
    top, random, every = (strong.isel(set=(found.band == band).values) for band in ("top", "random", "all"))
    # The head now reads the other cell as it read the evidence: the same logits for the other answer.
    assert top.redirected.min() == 1 and top.kept.max() == 0
    assert abs(top.logit_diff - key.truth.logit_diff[0]).max() < 1e-4
    assert every.redirected.min() == 1 and random.redirected.max() == 0
    assert not any(str(ranking.top(1)[0]) in heads.split() for heads in random["heads"].values)
    assert weak.redirected.max() == 0 and found.plain_redirected.max() == 0 and found.plain_kept.min() == 1
    table = {(row["band"], row["bias"]): row for row in redirection_table(found)}
    assert table["top", 1000.0]["redirected"] == 1 and table["top", 1000.0]["redirected_low"] < 1
    assert "pulled" in mech.view(found).body


def test_the_top_heads_of_a_trained_model_choose_the_evidence():
    model = HookedMLLM.from_pretrained("reference:llava-s")
    find, test = mech.haystacks("grounding", n=24, seed=0).split(0.5)
    ranking = mech.rank_heads(mech.retrieval_attention_mass(model, find))
    found = mech.redirection(model, test, ranking, heads=4, bias=(16.0,), bands=("top", "random"), n_random=3)
    share = {row["band"]: row["redirected"] for row in mech.redirection_table(found)}
    assert share["top"] > 0.8 and share["random"] < 0.2
    with pytest.raises(ExperimentError, match="missing values"):
        mech.redirection_table(found.where(found.example != found.example[0]))


@pytest.mark.parametrize("domain", ["grounding", "documents", "pages", "video"])
def test_distractors_of_haystacks_lie_apart_and_answer_in_another_way(domain):
    model = HookedMLLM.from_pretrained("reference:qwen-s")
    for sample in mech.haystacks(domain, 8, seed=2):
        regions = [distractor.region for distractor in sample.distractors]
        assert regions and len(set(map(repr, regions))) == len(regions)
        assert all(distractor.answer != sample.answer for distractor in sample.distractors)
        layout = model.inputs_of(sample).layout
        evidence = set(layout.positions(sample.evidence).tolist())
        assert not any(evidence & set(layout.positions(region, coverage=0.3).tolist()) for region in regions)


def test_what_cannot_be_pulled_is_refused_before_any_forward(monkeypatch):
    key = planted.circuit("roles")
    model = HookedMLLM.from_hf(key.model, key.processor)
    ranking = mech.rank_heads(mech.retrieval_attention_mass(model, key.samples(2, seed=1)))
    monkeypatch.setattr(HookedMLLM, "forward", lambda *_, **__: pytest.fail("a forward was run"))
    samples = key.samples(2)
    for bias in (float("nan"), float("inf"), 70_000.0):
        with pytest.raises(ExperimentError, match=r"bias=(.|\n)*between -65504 and 65504"):
            Redirect(HEADS, "image", bias)
    with pytest.raises(ExperimentError, match="at least one"):
        Redirect([], "image", 1.0).check(model)
    with (
        pytest.raises(ExperimentError, match="3 rows, but inputs of 1"),
        intervene(model, Redirect(HEADS, PerRow(("image",) * 3), 1.0)) as redirected,
    ):
        redirected(key.clean)
    far = replace(samples[0], distractors=(Distractor(mech.Box(500, 500, 510, 510), "x"),))
    with pytest.raises(RegionError):
        redirection(model, [far], ranking)
    for wrong, says in (
        ([replace(samples[0], distractors=())], "samples that name regions"),
        ([replace(samples[0], distractors=(Distractor(mech.Box(0, 0, 9, 9), samples[0].answer),))], "another answer"),
        ([], "at least one"),
    ):
        with pytest.raises(ExperimentError, match=says):
            redirection(model, wrong, ranking)
    with pytest.raises(ExperimentError, match="use 'bottom'"):
        redirection(model, samples, ranking, bands=("botom",))
    with pytest.raises(ExperimentError, match="different numbers"):
        redirection(model, samples, ranking, bias=(1.0, 1.0))
