"""RAM against its definition: eager attention, every row and column written out, averaged and summed by hand."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from mech import reference
from mech.data.haystacks import haystacks
from mech.data.regions import Box
from mech.data.samples import Samples
from mech.errors import ExperimentError, RegionError
from mech.experiments.attention.maps import attention_from
from mech.experiments.ranking.ranking import rank_heads
from mech.experiments.scores.ram import retrieval_attention_mass
from mech.model import AttentionCall, HookedMLLM

CASES = [("llava-s", "grounding"), ("llava-s", "pages"), ("qwen-s", "documents"), ("qwen-s", "video")]


@pytest.fixture(scope="module")
def models():
    return {name: HookedMLLM.from_pretrained(f"reference:{name}") for name in ("llava-s", "qwen-s")}


@pytest.fixture(scope="module")
def eager():
    """The same checkpoints in plain transformers, which hands out its attention."""
    return {
        name: AutoModelForImageTextToText.from_pretrained(
            reference.path(name), attn_implementation="eager", dtype=torch.float32
        ).eval()
        for name in ("llava-s", "qwen-s")
    }


def by_definition(hf_model, inputs, positions, evidence):
    """mean over x in q of ( sum over y in evidence of A[x, y] ), layer by layer, head by head."""
    with torch.no_grad():
        attentions = hf_model(**inputs.tensors, output_attentions=True).attentions
    return np.array(
        [[float(np.mean([head[x, evidence].sum() for x in positions])) for head in layer[0]] for layer in attentions]
    )


@pytest.mark.parametrize(("name", "domain"), CASES)
def test_ram_is_what_eager_attention_gives_whatever_the_padding(models, eager, name, domain):
    # Questions of different length stand in one batch: shorter ones are padded.
    samples = haystacks(domain, 6, seed=1)
    model = models[name]
    scores = retrieval_attention_mass(model, samples, batch_size=4)
    lengths = {len(model.inputs_of(sample).layout) for sample in samples}
    assert len(lengths) > 1
    for i, sample in enumerate(samples):
        inputs = model.inputs_of(sample)
        question = inputs.layout.positions("question")
        for variable, keys in (("ram", sample.evidence), ("vision_mass", "image")):
            expected = by_definition(eager[name], inputs, question, inputs.layout.positions(keys))
            np.testing.assert_allclose(scores[variable].values[i], expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_same_masses_within_its_tolerance(models, dtype):
    samples = haystacks("grounding", 3, seed=9)
    half = HookedMLLM.from_pretrained("reference:llava-s", dtype=dtype)
    found, expected = (retrieval_attention_mass(model, samples)["ram"].values for model in (half, models["llava-s"]))
    np.testing.assert_allclose(found, expected, atol=0.05)
    assert found.max() > 0.1


def test_no_tensor_of_all_queries_by_all_keys_is_made(models, monkeypatch):
    """Only the question's rows of the attention are computed."""
    seen = []
    rows = AttentionCall.rows
    monkeypatch.setattr(AttentionCall, "rows", lambda call, at: (seen.append(len(at)), rows(call, at))[1])
    model = models["llava-s"]
    sample = haystacks("grounding", 1)[0]
    retrieval_attention_mass(model, [sample])
    layout = model.inputs_of(sample).layout
    assert seen == [len(layout.positions("question"))] * model.cfg.n_layers
    assert max(seen) < len(layout) / 3


def test_the_size_null_is_what_even_attention_would_score(models):
    sample = haystacks("documents", 1, seed=1)[0]
    model = models["llava-s"]
    layout = model.inputs_of(sample).layout
    question = layout.positions("question")
    scores = retrieval_attention_mass(model, [sample])
    assert int(scores["n_evidence"][0]) == 6
    assert float(scores["size_null"][0]) == pytest.approx(np.mean([6 / (x + 1) for x in question]))


def test_batches_do_not_matter_and_examples_keep_their_names(models):
    samples = haystacks("grounding", 6, seed=2)
    one, many = (retrieval_attention_mass(models["llava-s"], samples, batch_size=size) for size in (1, 6))
    np.testing.assert_allclose(one["ram"].values, many["ram"].values, atol=1e-6)
    assert list(one["example"].values) == [sample.id for sample in samples]
    assert rank_heads(one).examples == tuple(sample.id for sample in samples)


def test_the_attention_map_sums_to_one_and_to_the_ram(models):
    sample = haystacks("grounding", 1, seed=4)[0]
    model = models["qwen-s"]
    inputs = model.inputs_of(sample)
    attention = attention_from(model, inputs)[0]
    torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:2]))
    mass = attention[..., torch.as_tensor(inputs.layout.positions(sample.evidence))].sum(-1)
    np.testing.assert_allclose(mass.numpy(), retrieval_attention_mass(model, [sample])["ram"][0].values, atol=1e-6)


def test_evidence_that_cannot_be_found_is_refused_before_any_forward(models, monkeypatch):
    from dataclasses import replace

    model = models["llava-s"]
    monkeypatch.setattr(HookedMLLM, "forward", lambda *_, **__: pytest.fail("a forward was run"))
    sample = haystacks("grounding", 1)[0]
    with pytest.raises(ExperimentError, match="say where the evidence is"):
        retrieval_attention_mass(model, [sample, replace(sample, evidence=())])
    with pytest.raises(RegionError):
        retrieval_attention_mass(model, [replace(sample, evidence=(Box(90, 90, 200, 200),))])
    with pytest.raises(ExperimentError, match="at least one"):
        retrieval_attention_mass(model, Samples([]))


@pytest.mark.parametrize("name", ["llava-s", "qwen-s"])
def test_trained_heads_retrieve_far_beyond_chance_and_untrained_ones_do_not(models, name):
    samples = haystacks("grounding", 16, seed=8)
    trained = retrieval_attention_mass(models[name], samples)
    assert float(trained["ram"].mean("example").max()) > 5 * float(trained["size_null"].mean())
    torch.manual_seed(0)
    fresh = type(models[name].hf_model)(models[name].hf_model.config).eval()
    untrained = retrieval_attention_mass(HookedMLLM.from_hf(fresh, models[name].processor), samples)
    assert float(untrained["ram"].mean("example").max()) < 3 * float(untrained["size_null"].mean())
