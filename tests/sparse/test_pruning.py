"""Heads removed for good: exact against ablation, loaded by plain transformers, refused where no config can say it."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import opened
from transformers import AutoModelForImageTextToText

import mech
from mech.errors import ExperimentError, UnsupportedModel
from mech.interventions import Ablate, intervene, reference_activations
from mech.sparse.groups import lowest_groups
from mech.sparse.pruning.prune import prune_heads

MEAN = ("llava", "llava_qwen3", "qwen3_vl", "gemma3", "paligemma2", "cohere2_vision", "llama4", "idefics3")
ONLY_ZERO = ("llava_phi3", "llava_siglip", "mistral3", "lfm2_vl", "qwen3_5", "glm4v_moe")
NEITHER = ("qwen2_vl", "qwen2_5_vl", "glm4v", "mllama", "gemma4")


@pytest.fixture(scope="module")
def sample():
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    return mech.Sample(question="Which digit is in the red frame?", answer="3", images=(Image.fromarray(pixels),))


def one_group(model):
    """The first KV group of every layer, and one query head more in the first."""
    group = model.cfg.n_heads // model.cfg.n_kv_heads
    layers = model.cfg.attention_layers
    return [(layer, head) for layer in layers for head in range(group)] + [(layers[0], group)]


@torch.no_grad()
def worst(model, pruned, spec, sample):
    inputs = model.inputs_of(sample)
    with intervene(model, spec) as without:
        wanted = without(inputs)
    return float((pruned.model(inputs) - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", MEAN)
def test_a_mean_pruned_model_is_the_mean_ablated_one(name, sample):
    model = opened(name)
    heads, found = one_group(model), reference_activations(model, [sample])
    pruned = prune_heads(model, heads, to="mean", reference=found)
    everywhere = replace(found, mean=found.mean[:1].expand_as(found.mean))  # the mean of text, at all positions
    assert worst(model, pruned, Ablate(heads=heads, reference=everywhere), sample) < 1e-5
    assert pruned.shape.n_heads < model.cfg.n_heads and pruned.silent == 1
    # Not by accident: without the constant it is another model.
    assert worst(model, prune_heads(model, heads, to="zero"), Ablate(heads=heads, reference=everywhere), sample) > 1e-3


@pytest.mark.parametrize("name", [*MEAN[:2], *ONLY_ZERO])
def test_a_zero_pruned_model_is_the_zero_ablated_one(name, sample):
    model = opened(name)
    heads = one_group(model)
    assert worst(model, prune_heads(model, heads, to="zero"), Ablate(heads=heads, to="zero"), sample) < 1e-5


@pytest.mark.parametrize("name", ONLY_ZERO)
def test_a_class_without_an_output_bias_says_so(name, sample):
    with pytest.raises(UnsupportedModel, match='to="zero"'):
        prune_heads(opened(name), one_group(opened(name)), reference=[sample])


@pytest.mark.parametrize("name", NEITHER)
def test_a_class_that_cannot_have_fewer_heads_says_so(name):
    with pytest.raises(UnsupportedModel, match=r"Expected: (a class whose config|the same in all layers)"):
        prune_heads(opened(name), [(layer, 0) for layer in range(3)] + [(layer, 1) for layer in range(3)], to="zero")


def test_plain_transformers_loads_it_and_so_does_mech(tmp_path, sample):
    model = opened("llava")
    before = copy.deepcopy(model.hf_model.state_dict())
    pruned = mech.prune_heads(model, one_group(model), reference=[sample])
    folder = pruned.save(tmp_path / "smaller")
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(plain) is type(model.hf_model) and plain.config.text_config.num_attention_heads == 2
    inputs = model.inputs_of(sample)
    with torch.no_grad():
        wanted = pruned.model(inputs)
        assert torch.equal(plain(**inputs.tensors).logits, wanted)
        again = mech.HookedMLLM.from_pretrained(folder)
        assert torch.equal(again(again.inputs_of(sample)), wanted)
    # Generation too: the cache has the new shape.
    assert torch.equal(again.generate(inputs, max_new_tokens=4), pruned.model.generate(inputs, max_new_tokens=4))
    record = json.loads((folder / "pruning.json").read_text())
    assert record["to"] == "mean" and record["slots"]["1"] == [[2, 3]] and record["silent"] == 1
    assert all(torch.equal(value, model.hf_model.state_dict()[name]) for name, value in before.items())


def test_one_query_head_of_every_group_can_go(sample):
    """Grouped-query attention also shrinks by making groups narrower; the KV heads stay."""
    model = opened("llava")
    heads = [(layer, head) for layer in range(3) for head in (1, 2)]
    pruned = prune_heads(model, heads, to="zero")
    assert (pruned.shape.n_heads, pruned.shape.n_kv_heads, pruned.silent) == (2, 2, 0)
    assert worst(model, pruned, Ablate(heads=heads, to="zero"), sample) < 1e-5


def test_what_no_config_can_say_is_refused(sample):
    model = opened("llava")
    with pytest.raises(ExperimentError, match="layer 1 keeps a head in each of its 2 KV groups"):
        prune_heads(model, [(0, 0), (0, 1), (2, 0)], to="zero")
    with pytest.raises(ExperimentError, match="of this model"):
        prune_heads(model, [(7, 0)], to="zero")
    with pytest.raises(ExperimentError, match="without reference"):
        prune_heads(model, one_group(model))
    with pytest.raises(ExperimentError, match="'mean' or 'zero'"):
        prune_heads(model, one_group(model), to="resample", reference=[sample])


@pytest.fixture(scope="module")
def trained():
    return mech.HookedMLLM.from_pretrained("reference:llava-s")


def test_the_report_says_size_speed_and_accuracy(trained):
    find, test = mech.haystacks("grounding", 64, seed=5).split(0.5)
    ranking = mech.rank_heads(mech.retrieval_attention_mass(trained, find))
    heads = lowest_groups(ranking, trained.cfg, 2)
    assert len(heads) == 12 and not set(heads) & {h for layer in range(6) for h in _best(ranking, layer, 6)}
    pruned = mech.prune_heads(trained, heads, reference=find)
    found = mech.pruning_report(trained, pruned, test, turns=2)
    assert found.heads == (12, 48) and found.silent == 0
    # Four projections of 128 x 16 a head, less the biases that hold the means.
    assert found.parameters[0] - found.parameters[1] == 12 * 4 * 128 * 16 - 6 * (3 * 96 + 128)
    assert found.kv_bytes == (6 * 2 * 8 * 16 * 4, 6 * 2 * 6 * 16 * 4)
    assert found.accuracy[0]["mean"] > 0.9 and found.drop["mean"] < 0.4
    assert found.drop["mean"] == pytest.approx(found.accuracy[0]["mean"] - found.accuracy[1]["mean"])
    assert "12 of 48 heads gone: " in str(found) and "-25% of the cache" in str(found)
    with pytest.raises(ExperimentError, match="1 to 7"):
        lowest_groups(ranking, trained.cfg, 8)


def _best(ranking, layer, n):
    scores = ranking.mean[layer]
    return [(layer, int(head)) for head in scores.argsort(kind="stable")[::-1][:n]]
