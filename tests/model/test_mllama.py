"""Mllama: visual tokens in a memory outside the sequence, and experiments on the heads that attend to it."""

import numpy as np
import pytest
import torch
from transformers import MllamaProcessor

import mech
from mech.data.samples import Sample, Samples
from mech.errors import InputError, PointError, RegionError
from mech.experiments.attention.maps import attention_from
from mech.experiments.ranking.ranking import rank_heads
from mech.experiments.scores.ram import retrieval_attention_mass
from mech.inputs import IMAGE, PADDING, encode
from mech.interventions import Ablate, Knockout, intervene, reference_activations
from mech.model import HookedMLLM
from mech.reference import tiny
from mech.reference.tiny_processors import noise, processor
from mech.reference.tiny_tokenizer import token_id

CROSS, TILE, PER_TILE = 1, 16, 17
SIZES = [(16, 16), (32, 32), (64, 16), (13, 70), (5, 5), (200, 31), (33, 17)]
QUESTION = "Which digit is red?"


@pytest.fixture(scope="module")
def model():
    return HookedMLLM.from_hf(tiny.model("mllama"), processor("mllama"), name="mllama")


@pytest.fixture(scope="module")
def samples():
    """Evidence in the lower right of four tiles."""
    return Samples(
        Sample(QUESTION, "7", images=(noise(32, 32, seed),), evidence=(mech.Box(17, 17, 31, 31),), id=str(seed))
        for seed in range(4)
    )


@pytest.mark.parametrize("images", [1, 2, 3])
def test_inputs_are_those_of_the_hugging_face_processor(model, images):
    ours = model.processor
    theirs = MllamaProcessor(ours.image_processor, ours.tokenizer)
    shots = [noise(*size, seed) for seed, size in enumerate(SIZES[:images])]
    texts = [ours.prompt(QUESTION, images)]
    if images == 3:
        texts.append("<|begin_of_text|>A<|image|>B C<|image|><|image|>D E")
        texts.append("<|begin_of_text|><|image|><|image|>A B<|image|>")
    for text in texts:
        made = encode(ours, text, shots).tensors
        expected = theirs(images=[shots], text=[text], add_special_tokens=False, return_tensors="pt")
        assert set(made) == set(expected) - {"num_tiles"}
        for name, value in made.items():
            assert torch.equal(value, expected[name].to(value.dtype)), (name, text)


@pytest.mark.parametrize("size", SIZES)
def test_the_memory_has_a_place_for_every_key_and_boxes_find_their_tokens(model, size):
    layout = model.inputs(QUESTION, images=[noise(*size), noise(16, 16)]).layout
    memory = layout.memory
    assert layout.visual is memory and len(memory) == 2 * 4 * PER_TILE
    assert not layout.has_images and (layout.kind == 0).all(), "in the sequence everything is text"
    first = memory.kind[: 4 * PER_TILE].reshape(4, PER_TILE)
    assert (first == first[:, :1]).all() and set(np.unique(first)) <= {IMAGE, PADDING}
    assert np.isnan(memory.rect[::PER_TILE]).all(), "class tokens stand for no pixels"
    shown = np.flatnonzero(~np.isnan(memory.rect[:, 0]))
    assert len(shown)
    for position in shown:
        x0, y0, x1, y1 = memory.rectangle(position)
        assert 0 <= x0 < x1 <= memory.images[memory.image[position]][0]
        middle = ((x0 + x1) / 2, (y0 + y1) / 2)
        box = mech.Box(middle[0] - 0.01, middle[1] - 0.01, middle[0] + 0.01, middle[1] + 0.01, memory.image[position])
        assert memory.positions(box).tolist() == [position]


def test_regions_are_asked_of_the_memory(model):
    layout = model.inputs(QUESTION, images=[noise(16, 16)]).layout
    assert "memory" in repr(layout)
    with pytest.raises(RegionError, match=r"holds no visual tokens[\s\S]*layout.memory"):
        layout.positions(mech.Box(0, 0, 3, 3))
    with pytest.raises(InputError, match="pictures for a model with cross-attention"):
        model.collate([model.inputs(QUESTION, images=[noise(16, 16)]), model.inputs(QUESTION)])


def test_heads_of_cross_layers_attend_to_the_memory_alone(model, samples):
    inputs = model.collate([model.inputs_of(sample) for sample in samples])
    attention = attention_from(model, inputs)
    assert attention.shape == (4, 3, 4, 4 * PER_TILE)
    torch.testing.assert_close(attention[:, CROSS].sum(-1), torch.ones(4, 4))
    assert attention[:, [0, 2]].abs().sum() == 0
    ram = retrieval_attention_mass(model, samples)
    assert (ram.ram[:, [0, 2]] == 0).all() and (ram.ram[:, CROSS] > 0).all()
    np.testing.assert_allclose(ram.vision_mass[:, CROSS], 1, atol=1e-5)
    assert (ram.n_evidence == 16).all()
    np.testing.assert_allclose(ram.size_null, 16 / (4 * PER_TILE), atol=1e-6)
    evidence = inputs.layouts[0].memory.positions(samples[0].evidence)
    np.testing.assert_allclose(ram.ram[:, CROSS], attention[:, CROSS][..., evidence].sum(-1), atol=1e-6)
    batched = retrieval_attention_mass(model, samples, batch_size=1)
    np.testing.assert_allclose(batched.ram, ram.ram, atol=1e-6)


def planted():
    """Head 0 of the cross layer attends to the last of four tiles and at nothing else."""
    hf = tiny.model("mllama")
    vision, text = hf.model.vision_model, hf.model.language_model
    with torch.no_grad():
        for layer in vision.global_transformer.layers:
            layer.gate_attn.zero_()
            layer.gate_ffn.zero_()
        vision.post_tile_positional_embedding.gate.fill_(10.0)
        tiles = vision.post_tile_positional_embedding.embedding.weight.view(-1, 4, vision.hidden_size)
        tiles.zero_()
        tiles[:, 3, 5] = 1000.0
        projector = hf.model.multi_modal_projector
        projector.weight.zero_()
        projector.bias.zero_()
        projector.weight[0, 5], projector.bias[1] = 1.0, 100.0
        text.embed_tokens.weight[:, 0] = 50.0
        attn = text.layers[CROSS].cross_attn
        d_head = attn.head_dim
        attn.q_proj.weight[:d_head], attn.k_proj.weight[:d_head] = 0.0, 0.0
        attn.q_proj.weight[0, 0] = attn.k_proj.weight[0, 0] = attn.k_proj.weight[1, 1] = 1.0
        attn.q_norm.weight.fill_(50.0)
    return HookedMLLM.from_hf(hf, processor("mllama"), name="planted")


def test_a_planted_head_has_its_mass_on_its_tile_and_is_ranked_first(samples):
    model = planted()
    ram = retrieval_attention_mass(model, samples)
    patches = (PER_TILE - 1) / PER_TILE  # the tile's class token stands for no pixels
    np.testing.assert_allclose(ram.ram[:, CROSS, 0], patches, atol=2e-2)
    assert rank_heads(ram).top(1) == ((CROSS, 0),)
    memory = model.inputs_of(samples[0]).layout.memory
    attention = attention_from(model, model.inputs_of(samples[0]))[0, CROSS, 0].numpy()
    assert attention[memory.view == 4].sum() > 0.9999
    elsewhere = Samples([Sample(QUESTION, "7", images=samples[0].images, evidence=(mech.Box(1, 1, 15, 15),), id="x")])
    assert float(retrieval_attention_mass(model, elsewhere).ram[0, CROSS, 0]) < 1e-4


def edited(model, inputs, point, fn):
    with torch.no_grad():
        return model.run_with_hooks(inputs, fwd_hooks=[(f"blocks.{CROSS}.attn.{point}", fn)])


def test_ablations_of_a_cross_head_are_the_edits_they_stand_for(model, samples):
    inputs = model.inputs_of(samples[0])
    reference = reference_activations(model, samples[1:])
    question = inputs.layout.positions("question")

    def manual(value):
        def write(z, hook):
            z = z.clone()
            z[:, question, 2] = value if isinstance(value, float) else value.to(z)
            return z

        return edited(model, inputs, "hook_z", write)

    def evenly(pattern, hook):
        pattern = pattern.clone()
        seen = pattern[:, 2, question] > 0
        pattern[:, 2, question] = seen / seen.sum(-1, keepdim=True)
        return pattern

    expected = {
        "zero": manual(0.0),
        "mean": manual(reference.mean[0, CROSS, 2]),
        "uniform": edited(model, inputs, "hook_pattern", evenly),
        "paper": edited(model, inputs, "hook_pattern", evenly),  # every row of the question sees the whole memory
    }
    clean = model(inputs).detach()
    for to, wanted in expected.items():
        spec = Ablate(heads=[(CROSS, 2)], to=to, positions="question", reference=reference if to == "mean" else None)
        with intervene(model, spec) as ablated, torch.no_grad():
            torch.testing.assert_close(ablated(inputs), wanted, atol=2e-5, rtol=1e-4)
        assert (wanted - clean).abs().max() > 1e-3, to


def test_the_mean_over_samples_is_of_the_cross_heads_own_output(model, samples):
    reference = reference_activations(model, samples)
    zs = []
    for sample in samples:
        _, cache = model.run_with_cache(model.inputs_of(sample), names_filter=f"blocks.{CROSS}.attn.hook_z")
        zs.append(cache[f"blocks.{CROSS}.attn.hook_z"][0])
    torch.testing.assert_close(reference.mean[0, CROSS], torch.cat(zs).mean(0), atol=1e-5, rtol=1e-5)


def test_generation_under_an_ablation_is_full_recomputation(model, samples):
    inputs = model.inputs_of(samples[0])
    calls = []
    with model.attending(lambda call: calls.append((call.layer, call.query_start, call.cross, call.k.shape[2]))):
        model.generate(inputs, max_new_tokens=3, min_new_tokens=3)
    length = len(inputs.layout)
    assert [start for layer, start, *_ in calls if layer == CROSS] == [0, length, length + 1]
    assert all(cross == (layer == CROSS) for layer, _, cross, _ in calls)
    assert {keys for layer, *_, keys in calls if layer == CROSS} == {4 * PER_TILE}
    with intervene(model, Ablate(heads=[(CROSS, 0), (CROSS, 1)], to="zero", positions="all")) as ablated:
        generated = ablated.generate(inputs, max_new_tokens=4, min_new_tokens=4)
    tensors = dict(inputs.tensors)
    tensors["input_ids"] = torch.cat([tensors["input_ids"], generated[:, :-1]], 1)
    tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
    mask = tensors["cross_attention_mask"]
    tensors["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, 3, -1, -1)], 1)

    def zero(z, hook):
        z = z.clone()
        z[:, :, :2] = 0
        return z

    whole = edited(model, tensors, "hook_z", zero)
    assert torch.equal(whole[0, -4:].argmax(-1), generated[0])


def test_knocking_the_evidence_out_is_the_edit_of_the_pattern(model, samples):
    inputs = model.inputs_of(samples[0])
    question, evidence = inputs.layout.positions("question"), inputs.layout.memory.positions(samples[0].evidence)

    def without(pattern, hook):
        pattern = pattern.clone()
        rows = torch.as_tensor(question)
        kept = pattern[:, :, rows]
        kept[..., evidence] = 0
        pattern[:, :, rows] = kept / kept.sum(-1, keepdim=True)
        return pattern

    with intervene(model, Knockout(query="question", key=samples[0].evidence)) as cut, torch.no_grad():
        got = cut(inputs)
    torch.testing.assert_close(got, edited(model, inputs, "hook_pattern", without), atol=2e-5, rtol=1e-4)


def test_without_a_picture_the_cross_layers_are_skipped_and_say_so(model):
    inputs = model.inputs(QUESTION)
    assert inputs.layout.memory is None
    with pytest.raises(PointError, match=f"nothing passed through 'blocks.{CROSS}.attn.hook_z'"):
        model.run_with_cache(inputs, names_filter=[f"blocks.{CROSS}.attn.hook_z"])
    assert torch.equal(model(inputs), model.hf_model(**inputs.tensors, use_cache=False).logits), (
        "the rest is the stock model"
    )


def test_pixels_without_the_mask_are_refused(model):
    tensors = model.inputs(QUESTION, images=[noise(16, 16)]).tensors
    with pytest.raises(InputError, match="cross_attention_mask"):
        model({name: value for name, value in tensors.items() if name != "cross_attention_mask"})
    assert tensors["input_ids"][0].tolist().count(token_id("<|image|>")) == 1


def test_a_gate_that_is_closed_is_read_without_harm():
    model = HookedMLLM.from_hf(tiny.model("mllama"), processor("mllama"))
    with torch.no_grad():
        model.hf_model.model.language_model.layers[CROSS].cross_attn_attn_gate.zero_()
    inputs = model.inputs(QUESTION, images=[noise(16, 16)])
    logits, cache = model.run_with_cache(inputs, names_filter=f"blocks.{CROSS}.hook_attn_out")
    assert torch.equal(logits, model(inputs)) and cache[f"blocks.{CROSS}.hook_attn_out"].abs().max() == 0
