"""Lenses against what they claim: parts sum to the logits in every family, and planted heads say what was planted."""

import numpy as np
import pytest
import torch

import mech
from mech.errors import ExperimentError, InputError, RegionError, UnsupportedModel
from mech.experiments.attribution.lenses import logit_lens, ov_reading
from mech.experiments.attribution.logits import PARTS, logit_attribution
from mech.experiments.metrics import LogitDiff, LogProb
from mech.model import HookedMLLM
from mech.reference import planted, tiny, tiny_processors
from mech.reference.planted import planting

RIGHT, WRONG = 101, 103
METRIC = LogitDiff(RIGHT, WRONG)
# Plain, DeepStack, post-norms and windows, parallel blocks, layer scalars, no q-k-v split, MoE.
FAMILIES = ("llava", "qwen3_vl", "gemma3", "cohere2_vision", "gemma4_large", "llava_phi3", "glm4v_moe")


@pytest.fixture(scope="module")
def opened():
    known = {}

    def get(name):
        if name not in known:
            model = HookedMLLM.from_hf(tiny.model(name), tiny_processors.processor(name), name=name)
            known[name] = model, model.inputs("Which digit is it?", images=[tiny_processors.noise(16, 16, 0)])
        return known[name]

    return get


@pytest.fixture(scope="module")
def mover():
    key = planted.circuit("mover")
    return key, HookedMLLM.from_hf(key.model, key.processor)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_parts_of_every_family_sum_to_what_it_says(opened, name):
    model, row = opened(name)
    split = not (model.family.text.gated or model.cfg.cross_layers)
    found = logit_attribution(model, row, METRIC, sources={"image": "image", "text": "text"} if split else None)
    with torch.no_grad():
        logits = model(row)[0, -1].double()
    cap = found.attrs["softcap"]
    plain = logits if cap is None else cap * torch.atanh(logits / cap)
    expected = float(plain[RIGHT] - plain[WRONG])
    np.testing.assert_allclose(found["total"], [expected], atol=2e-5 * float(plain.abs().max()))
    np.testing.assert_allclose(found["logit_diff"], [float(logits[RIGHT] - logits[WRONG])], atol=1e-5)
    has_heads = [layer in model.cfg.attention_layers for layer in range(model.cfg.n_layers)]
    assert (~np.isnan(found["heads"].values[0]).any(1) == has_heads).all()
    assert abs(found["heads"]).max() > 1e-3 and abs(found["mlps"]).max() > 1e-3
    if split:
        np.testing.assert_allclose(found["by_source"].sum("set", skipna=False), found["heads"], atol=3e-6)
    if name not in ("gemma4",):  # it adds the embeddings of its tokens again in every layer
        assert abs(found["rest"]).max() < 1e-5


def test_a_heads_part_is_its_result_through_the_frozen_norm(opened):
    model, row = opened("llava")
    found = logit_attribution(model, row, METRIC)
    with torch.no_grad():
        _, cache = model.run_with_cache(row)
    results, labels = cache.stack_head_results(return_labels=True)
    expected = cache.logit_attrs(results, RIGHT, WRONG)[:, 0, -1].reshape(model.cfg.n_layers, -1)
    assert labels[1] == "L0H1"
    np.testing.assert_allclose(found["heads"][0], expected.detach(), atol=1e-6)
    mlps = torch.stack([cache["mlp_out", layer] for layer in range(model.cfg.n_layers)])
    np.testing.assert_allclose(found["mlps"][0], cache.logit_attrs(mlps, RIGHT, WRONG)[:, 0, -1].detach(), atol=1e-6)


def test_an_answer_is_asked_for_where_it_parts_from_the_wrong_one(opened):
    model, _ = opened("llava")
    picture = tiny_processors.noise(16, 16, 0)
    wrong = mech.Sample("Which?", "7 3", images=(picture,))
    sample = mech.Sample("Which?", "7 2", images=(picture,), counterfactual=wrong)
    said, others = model.processor.answer_ids("7 2"), model.processor.answer_ids("7 3")
    fork = next(i for i, (a, b) in enumerate(zip(said, others, strict=True)) if a != b)
    assert fork > 0
    found = logit_attribution(model, sample)
    row = model.inputs_of(sample, answer=True)
    with torch.no_grad():
        logits = model(row)[0, row.layout.spans["answer"][fork] - 1]
    assert found["total"].item() == pytest.approx(float(logits[said[fork]] - logits[others[fork]]), abs=1e-5)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_half_precision_within_its_own_rounding(name):
    model = HookedMLLM.from_hf(tiny.model(name).to(torch.bfloat16), tiny_processors.processor(name))
    row = model.inputs("Which digit is it?", images=[tiny_processors.noise(16, 16, 0)])
    found = logit_attribution(model, row, METRIC, sources={"image": "image", "text": "text"})
    with torch.no_grad():
        size = float(model(row)[0, -1].float().abs().max())
    np.testing.assert_allclose(found["total"], found["logit_diff"], atol=0.03 * size)
    np.testing.assert_allclose(found["by_source"].sum("set"), found["heads"], atol=0.03 * size)
    assert np.isfinite(ov_reading(model, [(0, 1)], row)["logit"]).all()
    assert (logit_lens(model, row)["probability"] <= 1).all()


def test_what_later_layers_do_to_the_whole_stream_is_counted(opened):
    """Gemma 4 multiplies the stream in every layer; published checkpoints do not multiply by one."""
    model, row = opened("gemma4_large")
    blocks = model.hf_model.model.language_model.layers
    before = [block.layer_scalar.clone() for block in blocks]
    try:
        for factor, block in zip((0.5, 1.5, 0.7), blocks, strict=True):
            block.layer_scalar.fill_(factor)
        found = logit_attribution(model, row, METRIC)
        assert abs(found["rest"]).max() < 1e-5 < abs(found["heads"]).min()
        np.testing.assert_allclose(found["total"], found["logit_diff"], atol=1e-5)
    finally:
        for block, value in zip(blocks, before, strict=True):
            block.layer_scalar.copy_(value)


def test_the_planted_mover_says_all_of_it_and_takes_it_from_the_word(mover):
    key, model = mover
    samples = key.samples(3)
    sources = {"word": [int(key.clean.layout.positions("question")[0])], "picture": "image"}
    found = logit_attribution(model, samples, sources=sources)
    heads = found["heads"].values
    at = (slice(None), *key.truth.heads["mover"])
    np.testing.assert_allclose(heads[at], key.truth.logit_diff[0], atol=1e-3)
    others = heads.copy()
    others[at] = 0
    assert abs(others).max() < 1e-3, "the retrieval head is necessary and says nothing itself"
    np.testing.assert_allclose(found["by_source"].sel(set="word").values[at], heads[at], atol=1e-3)
    assert abs(found["by_source"].sel(set="picture")).max() < 1e-3
    assert list(found["example"].values) == [sample.id for sample in samples]
    assert found["heads"].attrs == {"unit": LogitDiff.unit, "sign": "more: speaks for the answer"}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_head_writes_for_each_key_weighted_by_its_attention_is_its_part(opened, name):
    model, row = opened(name)
    layer = model.cfg.attention_layers[-2]
    heads = [(layer, head) for head in range(model.cfg.n_heads)]
    found = ov_reading(model, heads, row, positions="all", track=[RIGHT, WRONG])
    with torch.no_grad():
        _, cache = model.run_with_cache(row, names_filter=[f"blocks.{layer}.attn.hook_pattern"])
    looked = cache[f"blocks.{layer}.attn.hook_pattern"][0, :, -1].numpy()
    logit = found["tracked_logit"].values[0]
    np.testing.assert_allclose(
        np.einsum("hk,hk->h", looked, logit[..., 0] - logit[..., 1]),
        logit_attribution(model, row, METRIC)["heads"].sel(layer=layer)[0], atol=1e-5,
    )  # fmt: skip
    assert (np.diff(found["logit"].values, axis=-1) <= 0).all()
    assert list(found["sender"].values) == [f"L{layer}H{head}" for _, head in heads]


def test_a_planted_retrieval_head_says_the_fill_of_every_cell_it_could_look_at():
    key = planted.circuit("roles")
    model = HookedMLLM.from_hf(key.model, key.processor)
    found = ov_reading(model, [key.truth.heads["retrieval"], key.truth.heads["sink"]], key.sample, k=1)
    retrieval, sink = found["sender"].values
    pixels = np.asarray(key.sample.images[0].convert("RGB"))
    said = found.sel(sender=retrieval).isel(example=0, place=0)
    coloured = 0
    for cell in said.transpose("position", ...).position:
        one = said.sel(position=cell)
        fill = pixels[planting.CELL * int(one["row"]) + 4, planting.CELL * int(one["col"]) + 6]
        if 128 in fill:  # a grey half is no colour
            assert abs(float(one["logit"])) < 1e-2
            continue
        coloured += 1
        red, green, blue = fill > 128
        assert str(one["word"].values) == planting.COLOURS[4 * red + 2 * green + blue]
        assert float(one["logit"]) == pytest.approx(planting.LOGIT, abs=1e-2)
    assert coloured > 2
    assert abs(found["logit"].sel(sender=sink)).max() < 1e-2, "the sink head writes where nobody reads"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_lens_of_the_last_layer_is_what_the_model_says(opened, name):
    model, row = opened(name)
    found = logit_lens(model, row, "text", track=[RIGHT], k=3)
    with torch.no_grad():
        said = model(row)[0].float().softmax(-1)[row.layout.positions("text")]
    np.testing.assert_allclose(found["tracked_probability"].values[0, -1, :, 0], said[:, RIGHT], atol=1e-6)
    best = said.topk(3)
    np.testing.assert_allclose(found["probability"].values[0, -1], best.values, atol=1e-6)
    assert found["word"].values[0, -1, 0, 0] == model.tokenizer.decode([int(best.indices[0, 0])])
    rank = (said > said[:, [RIGHT]]).sum(-1)
    assert found["tracked_rank"].values[0, -1, :, 0].tolist() == rank.tolist()
    assert list(found["layer"].values) == list(range(model.cfg.n_layers + 1))


def test_the_lens_of_a_layer_is_its_stream_through_the_final_norm():
    model = HookedMLLM.from_pretrained("reference:llava-s")
    samples = mech.haystacks("grounding", 2, seed=0)
    answers = [sample.answer for sample in samples]
    found = logit_lens(model, samples, layers=[0, 3], track=answers, k=2)
    inputs = model.inputs_of(samples[1])
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=["blocks.3.hook_resid_pre"])
        where = inputs.layout.positions("image")
        logits = (model.norm(model.cfg.n_layers)(cache["resid_pre", 3][0, where]) @ model.W_U).softmax(-1)
    token = model.to_single_token(answers[1])
    np.testing.assert_allclose(found["tracked_probability"].values[1, 1, :, 1], logits[:, token], atol=1e-5)
    assert found["row"].values.max() == inputs.layout.grid()[0] - 1
    assert list(found["example"].values) == [sample.id for sample in samples]
    # What the tower gives is read as words from the start: it was drawn to their embeddings when it was trained.
    evidence = np.isin(found["position"], inputs.layout.positions(samples[1].evidence))
    assert found["tracked_rank"].values[1, :, evidence, 1].min() <= 1


def test_strings_are_read_by_their_embeddings(opened):
    tiny_model, _ = opened("llava")
    layer, head, word = 1, 2, "a"
    said = ov_reading(tiny_model, [(layer, head)], [word], track=[RIGHT])
    text = tiny_model.hf_model.model.language_model
    with torch.no_grad():
        token = tiny_model.to_single_token(word)
        block = text.layers[layer]
        value = block.self_attn.v_proj(block.input_layernorm(text.embed_tokens.weight[token]))
        group = head * tiny_model.cfg.n_kv_heads // tiny_model.cfg.n_heads
        z = torch.zeros(tiny_model.cfg.n_heads, tiny_model.cfg.d_head)
        z[head] = value.reshape(-1, tiny_model.cfg.d_head)[group]
        logits = text.norm(block.self_attn.o_proj(z.flatten())) @ tiny_model.W_U
    assert said["tracked_logit"].item() == pytest.approx(float(logits[RIGHT]), abs=1e-5)
    assert said["own_rank"].item() == int((logits > logits[token]).sum())
    assert said["word"].values[0, 0, 0, 0] == tiny_model.tokenizer.decode([int(logits.argmax())])


def test_nothing_lingers(opened):
    model, row = opened("llava")
    before = model(row)
    logit_lens(model, row)
    ov_reading(model, [(0, 0)], row)
    logit_attribution(model, row, METRIC, sources={"image": "image"})
    assert model(row).equal(before)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda m, r: logit_attribution(m, r, LogProb(RIGHT)), ExperimentError, "mech.LogitDiff, which is linear"),
        (lambda m, r: logit_attribution(m, r), ExperimentError, "without a counterfactual"),
        (lambda m, r: logit_attribution(m, [], METRIC), ExperimentError, "at least one example"),
        (lambda m, r: logit_attribution(m, r, METRIC, sources=[{}, {}]), ExperimentError, "2 sources for 1 examples"),
        (lambda m, r: logit_attribution(m, r, METRIC, sources={"a": "imge"}), RegionError, "use 'image'"),
        (lambda m, r: logit_lens(m, r, layers=[9]), ExperimentError, "use 3 for the output of the last layer"),
        (lambda m, r: logit_lens(m, r, k=0), ExperimentError, "k=0"),
        (lambda m, r: logit_lens(m, r, track="two words"), InputError, "a string of one token"),
        (lambda m, r: logit_lens(m, []), ExperimentError, "nothing to read"),
        (lambda m, r: logit_lens(m, m.collate([r, r])), ExperimentError, "one row at a time"),
        (lambda m, r: logit_lens(m, [r, m.inputs("Which?", images=[tiny_processors.noise(16, 16, 0)])], "last"),
         ExperimentError, "the same positions"),
        (lambda m, r: ov_reading(m, [], r), ExperimentError, "ranking.top"),
        (lambda m, r: ov_reading(m, [(0, 99)], r), ExperimentError, "0 and head 99|head 99"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_before_any_forward(opened, monkeypatch, run, error, message):
    model, row = opened("llava")
    monkeypatch.setattr(HookedMLLM, "forward", lambda *_, **__: pytest.fail("a forward was run"))
    with pytest.raises(error, match=message):
        run(model, row)


@pytest.mark.parametrize(("name", "why"), [("qwen3_5", "a gate after its values"), ("mllama", "in a memory")])
def test_heads_that_cannot_be_split_by_token_are_refused(opened, name, why):
    model, row = opened(name)
    with pytest.raises(UnsupportedModel, match=why):
        ov_reading(model, [(model.cfg.attention_layers[0], 0)], row, positions="text")
    with pytest.raises(UnsupportedModel, match=why):
        logit_attribution(model, row, METRIC, sources={"text": "text"})
    assert set(PARTS) <= set(logit_attribution(model, row, METRIC))
