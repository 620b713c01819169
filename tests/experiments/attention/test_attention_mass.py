"""The attention mass of every query: equal to the full pattern summed over the sets, whatever the mask."""

import numpy as np
import pytest
import torch

from mech.errors import ExperimentError, InputError
from mech.experiments.attention.mass import attention_mass
from mech.model import HookedMLLM, KeySums
from mech.reference import tiny, tiny_processors

PICTURES = [tiny_processors.noise(16, 16, seed) for seed in range(2)]
# Shared key/value heads, windows of vision and text, image tokens that see each other, per-layer windows.
NAMES = ("llava", "qwen2_5_vl", "gemma3", "cohere2_vision")


@pytest.fixture(scope="module", params=NAMES)
def opened(request):
    model = HookedMLLM.from_hf(tiny.model(request.param), tiny_processors.processor(request.param))
    rows = [model.inputs("Which digit?", images=PICTURES), model.inputs("What is it?", images=PICTURES[:1])]
    return model, model.collate(rows)


def patterns(model, inputs):
    """The slow twin: every layer's whole pattern."""
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=names)
    return torch.stack([cache[name] for name in names], dim=1)


def test_the_mass_of_every_query_is_the_pattern_summed_over_the_sets(opened):
    model, inputs = opened
    sets = {"image": "image", "text": "text", "question": "question", "last": "last"}
    mass = attention_mass(model, inputs, sets)
    pattern = patterns(model, inputs)
    assert mass.dims == ("example", "layer", "head", "query_pos", "set")
    real = inputs.tensors["attention_mask"].bool()
    for row, layout in enumerate(inputs.layouts):
        for name, where in sets.items():
            expected = pattern[row][..., torch.as_tensor(layout.positions(where))].sum(-1)[..., real[row]]
            found = mass.sel(set=name).values[row][..., real[row].numpy()]
            np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
        assert (mass.values[row][..., ~real[row].numpy(), :] == 0).all()
        whole = mass.sel(set="image").values[row] + mass.sel(set="text").values[row]
        np.testing.assert_allclose(whole[..., real[row].numpy()], 1, atol=1e-5)


def test_means_over_queries_and_sets_of_each_row(opened):
    model, inputs = opened
    each = [{"first": layout.positions("image")[:2]} for layout in inputs.layouts]
    mean = attention_mass(model, inputs, each, queries="question")
    every = attention_mass(model, inputs, each)
    for row, layout in enumerate(inputs.layouts):
        rows = every.values[row][:, :, layout.positions("question")]
        np.testing.assert_allclose(mean.values[row], rows.mean(2), atol=1e-6)
    assert mean.dims == ("example", "layer", "head", "set")


def test_what_is_carried_beside_hooked_patterns_and_other_observers(opened):
    model, inputs = opened
    batch, keys = inputs.shape
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(batch, keys, columns, generator=generator) for columns in (1, 9))
    seen = {}

    def keep(name):
        return lambda call: seen.update({(name, call.layer): call.carried})

    carry = KeySums(first, keep("first")), KeySums(second, keep("second"))
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    with torch.no_grad(), model.attending(carry[0]), model.attending(carry[1]), model.attending(keep("plain")):
        logits, cache = model.run_with_cache(inputs, names_filter=names)
    with torch.no_grad():
        plain = model(inputs)
    real = inputs.tensors["attention_mask"].bool()
    torch.testing.assert_close(logits[real], plain[real], atol=2e-4, rtol=1e-4)
    for layer in range(model.cfg.n_layers):
        assert seen["plain", layer] is None
        for name, columns in (("first", first), ("second", second)):
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
            expected = torch.einsum("bhqk,bkc->bqhc", pattern, columns)
            torch.testing.assert_close(seen[name, layer][real], expected[real], atol=1e-5, rtol=1e-4)


def test_carrying_moves_the_logits_by_rounding_alone(opened):
    model, inputs = opened
    real = inputs.tensors["attention_mask"].bool()
    with torch.no_grad():
        before = model(inputs)
        with model.attending(KeySums(torch.ones(*inputs.shape, 3), lambda call: None)):
            after = model(inputs)
    torch.testing.assert_close(after[real], before[real], atol=1e-5 * float(before.abs().max()), rtol=0)


def test_sets_that_cannot_be_are_refused(opened):
    model, inputs = opened
    for sets in ({}, [{"image": "image"}], [{"a": "image"}, {"b": "image"}]):
        with pytest.raises(ExperimentError, match="sets"):
            attention_mass(model, inputs, sets)
    with (
        pytest.raises(InputError, match="for every key"),
        model.attending(KeySums(torch.ones(1, 3, 1), lambda call: None)),
    ):
        model(inputs)
