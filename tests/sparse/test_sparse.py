"""Localized models are exactly the dense model under per-head masks: every family, prefill and generation."""

import copy
import warnings

import pytest
import torch
from transformers.cache_utils import DynamicCache

import mech
from mech.errors import ExperimentError, UnsupportedModel
from mech.experiments.scores.ram import retrieval_attention_mass
from mech.interventions import Ablate, intervene
from mech.model import HookedMLLM
from mech.reference import tiny
from mech.reference.tiny_processors import noise, processor
from mech.sparse.policy import Policy, StillDense

QUESTIONS = ("Which digit is red?", "Which is red?")
CAN = [name for name in tiny.NAMES if name != "gemma4"]
PHASES = ("both", "prefill", "decode")


def batch(model, sizes=((40, 24), (24, 24))):
    """Two rows of different lengths, padded on the left."""
    rows = [model.inputs(q, images=[noise(*size)]) for q, size in zip(QUESTIONS, sizes, strict=True)]
    return model.collate(rows)


def policy(model, phase="both", keep_text=False, sinks=2):
    """One dense head in the first layer that has heads, two of four in the others: whole, mixed and local KV groups."""
    layers = model.cfg.attention_layers
    heads = [(layer, head) for layer in layers for head in ((0,) if layer == layers[0] else (1, 2))]
    return Policy(heads, sinks, 6, keep_text, phase)


@pytest.fixture(autouse=True)
def quiet():
    """Cross layers that stay dense, and questions of six tokens, are not what these tests are about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StillDense)
        yield


def shown(model, run):
    """Runs and checks: what a pattern hook sees is the definition, since ``stepwise`` asks for each head's mask."""
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in model.cfg.attention_layers]
    with model.hooks([(name, lambda pattern, hook: pattern) for name in names]):
        return run()


def close(found, expected, real):
    scale = expected[real].abs().max()
    torch.testing.assert_close(found[real] / scale, expected[real] / scale, atol=1e-5, rtol=0)


def written(model, fast, inputs, tokens):
    """Logits of each of some given tokens, fed one by one into the handle's cache."""
    cache, steps = fast.cache(), []
    options = {"past_key_values": cache, "use_cache": True}
    mask = inputs.tensors["attention_mask"]
    fast(inputs, **options)
    for index in range(tokens.shape[1]):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        given = model.hf_model.prepare_inputs_for_generation(
            torch.cat([inputs.tensors["input_ids"], tokens[:, : index + 1]], dim=1), attention_mask=mask,
            next_sequence_length=1, is_first_iteration=False, **options,
        )  # fmt: skip
        steps.append(fast(None, **{name: value for name, value in given.items() if value is not None})[:, -1])
    return torch.stack(steps, dim=1), cache


@pytest.mark.parametrize("name", CAN)
def test_every_family_is_exact_in_a_padded_batch(models, name):
    model = models(name)
    inputs = batch(model)
    real = inputs.tensors["attention_mask"].bool()
    for keep_text in (False, True):
        with mech.localize(model, policy(model, keep_text=keep_text)) as fast:
            expected = shown(model, lambda: fast(inputs))
            close(fast(inputs), expected, real)
            # A pattern hook keeps the whole cache and computes by definition.
            tokens = shown(model, lambda: fast.generate(inputs, max_new_tokens=9))
            assert torch.equal(fast.generate(inputs, max_new_tokens=9), tokens)


@pytest.mark.parametrize("name", ["llava", "gemma3", "llama4", "paligemma2", "lfm2_vl", "mllama"])
@pytest.mark.parametrize("phase", PHASES)
def test_logits_of_written_tokens_are_exact_far_past_the_window(models, name, phase):
    model = models(name)
    inputs = batch(model)
    if name == "mllama":
        inputs = model.collate([model.inputs(QUESTIONS[0], images=[noise(40, 24)])])
    tokens = torch.randint(200, 240, (len(inputs), 14), generator=torch.Generator().manual_seed(0))
    tokens = tokens % model.cfg.vocab
    for keep_text in (False, True):
        with mech.localize(model, policy(model, phase, keep_text)) as fast:
            found, cache = written(model, fast, inputs, tokens)
            expected, whole = shown(model, lambda: written(model, fast, inputs, tokens))
            close(found, expected, torch.ones(tokens.shape, dtype=torch.bool))
            assert cache.get_seq_length() == whole.get_seq_length()


def test_masks_of_hooked_heads_are_the_definition(models):
    model = models("llava")
    inputs = batch(model)
    with mech.localize(model, policy(model)) as fast:
        _, cache = fast.run_with_cache(inputs, names_filter=["blocks.1.attn.hook_pattern"])
        pattern = cache["blocks.1.attn.hook_pattern"]
    _, cache = model.run_with_cache(inputs, names_filter=["blocks.1.attn.hook_pattern"])
    dense = cache["blocks.1.attn.hook_pattern"] > 0
    length, padding = dense.shape[-1], int((inputs.tensors["attention_mask"][1] == 0).sum())
    for row in range(padding, length):
        for key in range(padding, length):
            far = key not in range(padding, padding + 2) and abs(row - key) >= 6
            for head in (0, 1):
                sees = dense[1, head, row, key] and (head == 1 or not far)
                assert (pattern[1, head, row, key] > 0) == sees, (row, key, head)


def test_all_heads_dense_changes_no_bit(models):
    for name in ("llava", "gemma3"):
        model = models(name)
        inputs = batch(model)
        heads = [(layer, head) for layer in range(3) for head in range(4)]
        plain, tokens = model(inputs), model.generate(inputs, max_new_tokens=8)
        with mech.localize(model, dense_heads=heads, sinks=2, window=2) as fast:
            assert torch.equal(fast(inputs), plain)
            assert torch.equal(fast.generate(inputs, max_new_tokens=8), tokens)


def test_phases_are_local_where_they_say(models):
    model = models("llava")
    inputs = model.inputs(QUESTIONS[0], images=[noise(24, 24)], answer="7 8 9")
    start = min(inputs.layout.spans["answer"])
    plain = model(inputs)
    logits = {}
    for phase in PHASES:
        with mech.localize(model, policy(model, phase)) as fast:
            logits[phase] = fast(inputs)
            expected = shown(model, lambda f=fast: f(inputs))
            close(logits[phase], expected, torch.ones(1, plain.shape[1], dtype=torch.bool))
    torch.testing.assert_close(logits["decode"][:, :start], plain[:, :start], atol=1e-5, rtol=1e-5)
    assert (logits["decode"][:, start:] - plain[:, start:]).abs().max() > 1e-3
    torch.testing.assert_close(logits["prefill"][:, :start], logits["both"][:, :start], atol=1e-4, rtol=1e-4)
    assert (logits["prefill"][:, start:] - logits["both"][:, start:]).abs().max() > 1e-3


@pytest.mark.parametrize("phase", PHASES)
def test_every_way_of_generating(models, phase):
    """Sampling, beams, several continuations, several images, video, chunks, a streamer: each like by definition."""
    model = models("qwen2_5_vl")
    inputs = batch(model)
    many = model.inputs(QUESTIONS[0], images=[noise(40, 24), noise(24, 24)])
    film = model.inputs(QUESTIONS[0], video=[noise(24, 24), noise(24, 24), noise(24, 24), noise(24, 24)])
    blind, seen = model.encode_pictures(inputs)
    streamed = []

    class Streamer:
        def put(self, value):
            streamed.append(value)

        def end(self):
            streamed.append(None)

    def ways():
        torch.manual_seed(0)
        yield fast.generate(inputs, max_new_tokens=9, do_sample=True)
        yield fast.generate(inputs, max_new_tokens=6, num_beams=2)
        torch.manual_seed(1)
        yield fast.generate(inputs, max_new_tokens=6, num_return_sequences=2, do_sample=True)
        yield fast.generate(many, max_new_tokens=9)
        yield fast.generate(film, max_new_tokens=9)
        yield fast.generate(blind, max_new_tokens=9, mm_encoder_outputs=dict(seen), prefill_chunk_size=8)
        yield fast.generate(many, max_new_tokens=5, streamer=Streamer())

    with mech.localize(model, policy(model, phase)) as fast:
        found = list(ways())
        expected = shown(model, lambda: list(ways()))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert streamed[-1] is None and len(streamed) > 5


@pytest.mark.parametrize("name", ["llava", "gemma3", "llama4"])
@pytest.mark.parametrize("keep_text", [False, True])
def test_other_caches_and_none_give_the_same(models, name, keep_text):
    """Hugging Face's default cache (windowed layers drop keys), a static one (longer than what was read), and none."""
    model = models(name)
    inputs = batch(model)
    with mech.localize(model, policy(model, keep_text=keep_text)) as fast:
        expected = fast.generate(inputs, max_new_tokens=9)
        theirs = DynamicCache(config=model.hf_model.config.get_text_config(decoder=True))
        assert torch.equal(fast.generate(inputs, max_new_tokens=9, past_key_values=theirs), expected)
        assert torch.equal(fast.generate(inputs, max_new_tokens=9, use_cache=False), expected)
        if name == "llava":
            assert torch.equal(fast.generate(inputs, max_new_tokens=9, cache_implementation="static"), expected)


@pytest.mark.parametrize("name", ["llava", "gemma3", "llama4", "qwen3_vl"])
@pytest.mark.parametrize("phase", ("both", "decode"))
@pytest.mark.parametrize("chunk", (1, 7, 64))
def test_a_prompt_in_chunks_is_the_prompt_at_once(models, name, phase, chunk):
    model = models(name)
    ids = torch.randint(200, 240, (1, 40), generator=torch.Generator().manual_seed(0)) % model.cfg.vocab
    with mech.localize(model, policy(model, phase)) as fast:
        expected = fast.generate({"input_ids": ids}, max_new_tokens=9)
        found = fast.generate({"input_ids": ids}, max_new_tokens=9, prefill_chunk_size=chunk)
    assert torch.equal(found, expected)


def test_the_cache_is_as_small_as_it_says(models):
    model = models("llava")
    ids = torch.randint(200, 240, (1, 1500), generator=torch.Generator().manual_seed(0)) % model.cfg.vocab
    few = Policy([(0, 0)], 4, 32)
    with mech.localize(model, few) as fast:
        assert fast.nbytes == 0
        fast.generate({"input_ids": ids}, max_new_tokens=4)
        per_key = 2 * 8 * 4  # keys and values of d_head 8 in four bytes
        length, reserve = 1503, 1500 + 1500 // 16
        assert fast.nbytes == per_key * (reserve + (3 * 2 - 1) * (4 + 32))
        share = fast.budgets(length).kv_bytes
        assert share == pytest.approx((length + 5 * 36) / (6 * length))
        assert fast.nbytes / (per_key * 6 * length) == pytest.approx(share, rel=0.06)
    whole = mech.localize(model, Policy(few.dense_heads, 4, 32, phase="prefill"))
    whole.generate({"input_ids": ids}, max_new_tokens=4)
    assert whole.nbytes == per_key * 6 * reserve
    whole.close()


def test_leaving_restores_the_model_also_after_an_exception(models):
    model = models("llava")
    inputs = batch(model)
    plain = model(inputs)
    with pytest.raises(RuntimeError, match="stop"), mech.localize(model, policy(model)):
        assert not torch.equal(model(inputs), plain)

        def stop(value, hook):
            raise RuntimeError("stop")

        with model.hooks([("blocks.2.hook_resid_post", stop)]):
            model.generate(inputs, max_new_tokens=3)
    assert torch.equal(model(inputs), plain)
    assert model.localized is None and all(record.head_mask is None for record in model.text_attention())
    fast = mech.localize(model, policy(model))
    fast.close()
    fast.close()
    with pytest.raises(ExperimentError, match="closed"):
        fast(inputs)


def test_experiments_see_the_localized_heads(models):
    """RAM, interventions and caches run on the model as it is: by definition and fast alike."""
    model = models("llava")
    samples = mech.haystacks("grounding", n=2, seed=0)
    inputs = batch(model)
    with mech.localize(model, policy(model)) as fast:
        with intervene(model, Ablate(heads=[(1, 0)], to="uniform")) as ablated:
            one = ablated(inputs)
            other = shown(model, lambda: ablated(inputs))
        real = inputs.tensors["attention_mask"].bool()
        close(one, other, real)
        assert (fast(inputs) - one).abs().max() > 1e-3
    with mech.localize(model, dense_heads=policy(model).dense_heads, sinks=2, window=28):
        local = retrieval_attention_mass(model, samples)["ram"]
    dense = retrieval_attention_mass(model, samples)["ram"]
    assert (local[:, 0, 0] == dense[:, 0, 0]).all() and (local[:, 0, 1:] != dense[:, 0, 1:]).any()


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_patching_and_the_causal_report_run_on_localized_heads():
    """They fall back to whole forwards, so the effect is that of a patch by hand in the localized model."""
    model = HookedMLLM.from_pretrained("reference:llava-s")
    find, test = mech.haystacks("grounding", n=4, seed=0).split(0.5)
    sample, ranking = test[0], mech.rank_heads(mech.retrieval_attention_mass(model, find))
    clean, corrupted = model.inputs_of(sample), model.inputs_of(sample.counterfactual)
    metric = mech.LogitDiff(sample.answer, sample.counterfactual.answer)
    right, wrong = (model.token_id(one.answer) for one in (sample, sample.counterfactual))
    (layer, head), name = ranking.heads[0], f"blocks.{ranking.heads[0].layer}.attn.hook_z"

    def from_clean(z, hook):
        z[:, :, head] = cache[name][:, :, head]
        return z

    with mech.localize(model, dense_heads=ranking.top(4), window=24):
        swept = mech.activation_patching(model, clean, corrupted, metric, point="attn.hook_z", over=("layer", "head"))
        _, cache = model.run_with_cache(clean, names_filter=[name])
        logits = model.run_with_hooks(corrupted, fwd_hooks=[(name, from_clean)])[0, -1]
        lost = mech.causal_report(model, test, ranking, find=find, method=None, n_random=1, n_paths=0).heads["lost"]
        path = mech.path_patching(model, clean, corrupted, metric, senders=[f"L{layer}H{head}"], receivers=["logits"])
        with pytest.raises(ExperimentError, match="the model is localized"):
            mech.activation_patching(model, clean, corrupted, metric, point="attn.hook_z", method="wavefront")
    found = swept["metric"].sel(layer=layer, head=head).item()
    assert found == pytest.approx((logits[right] - logits[wrong]).item(), abs=1e-4)
    assert swept.attrs["algorithm"] == "literal" and "localized" in swept.attrs["reason"]
    assert path.attrs["algorithm"] == "literal" and bool(lost.notnull().all())
    dense = mech.activation_patching(model, clean, corrupted, metric, point="attn.hook_z", over=("layer", "head"))
    assert abs(dense["metric"] - swept["metric"]).max() > 1e-2


def test_a_family_that_shares_keys_is_refused(models):
    with pytest.raises(UnsupportedModel, match="share keys and values"):
        mech.localize(models("gemma4"), window=8)
    assert models("gemma4").localized is None


def test_layers_that_attend_outside_say_that_they_stay_dense(models):
    with pytest.warns(StillDense, match="layer 1 attends to visual tokens outside"), mech.localize(models("mllama")):
        pass


def test_keys_that_are_changed_after_caching_are_refused(models):
    model = models("llava")
    ids = torch.randint(200, 240, (1, 30), generator=torch.Generator().manual_seed(0)) % model.cfg.vocab
    with mech.localize(model, policy(model)) as fast:
        cache = fast.cache()
        fast({"input_ids": ids}, past_key_values=cache, use_cache=True)
        update = cache.layers[1].update
        cache.layers[1].update = lambda k, v, *args: tuple(x * 1.0 for x in update(k, v, *args))
        with pytest.raises(UnsupportedModel, match="keys that layer 1 changes"):
            fast({"input_ids": ids[:, :1]}, past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("heads, message", [([(3, 0)], "layer 3"), ([(0, 4)], "head 4"), ([(0, -1)], "head -1")])
def test_heads_of_another_model_are_refused(models, heads, message):
    with pytest.raises(ExperimentError, match=message):
        mech.localize(models("llava"), dense_heads=heads)


def test_a_window_smaller_than_the_question_is_refused_before_the_forward(models):
    model = models("llava")
    inputs = model.inputs("Which digit is in the red frame on the left?", images=[noise(24, 24)])
    with mech.localize(model, window=3) as fast:
        with pytest.raises(ExperimentError, match="a question of"):
            fast(inputs)
        with pytest.raises(ExperimentError, match="a question of"):
            fast.generate(inputs)
    with mech.localize(model, window=3, keep_text=True) as fast:
        fast(inputs)


def test_a_context_within_reach_says_that_it_is_dense(models):
    model = models("llava")
    inputs = batch(model)
    plain = model(inputs)
    with mech.localize(model, sinks=4, window=64) as fast:
        with pytest.warns(StillDense, match="within 4 sinks and a window of 64"):
            logits = fast(inputs)
        close(logits, plain, inputs.tensors["attention_mask"].bool())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"window": 0}, "window=0"),
        ({"sinks": -1}, "sinks=-1"),
        ({"window": 2.5}, "window=2.5"),
        ({"phase": "prefil"}, "prefill"),
    ],
)
def test_policies_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ExperimentError, match=message):
        Policy(**options)


def test_other_contradictions_are_refused(models):
    model = models("llava")
    with pytest.raises(ExperimentError, match="a policy and window and phase"):  # not silently that of the policy
        mech.localize(model, Policy(), window=8, phase="both")
    with pytest.raises(ExperimentError, match="a policy and dense_heads"):
        mech.localize(model, Policy(), dense_heads=[(0, 0)])
    with mech.localize(model, window=6, keep_text=True) as fast:
        with pytest.raises(ExperimentError, match="already localized"):
            mech.localize(model, window=6)
        with pytest.raises(ExperimentError, match="plain tensors"):
            fast({"input_ids": torch.tensor([[5, 6, 7]])})


def test_a_split_cache_of_another_policy_is_refused(models):
    model = models("llava")
    inputs = model.inputs("Which digit?", images=[noise(16, 16, 0)])
    with mech.localize(model, dense_heads=[(0, 0)], window=16) as other:
        cache = other.cache()
    with mech.localize(model, dense_heads=[(1, 1)], window=16) as fast:
        own = fast.cache()
        copied = copy.deepcopy(own)  # as transformers reuses a prompt's cache
        assert torch.equal(fast(inputs, past_key_values=own), fast(inputs, past_key_values=copied))
        with pytest.raises(ExperimentError, match=r"a split cache of another policy"):
            fast(inputs, past_key_values=cache)


def test_a_split_cache_in_the_bare_model_is_refused():
    model = HookedMLLM.from_hf(tiny.model("llava"), processor("llava"))
    inputs = model.inputs("Which digit?", images=[noise(16, 16, 0)])
    with (
        mech.localize(model, dense_heads=[(0, 0)], window=16) as fast,
        pytest.raises(UnsupportedModel, match="bare Hugging Face model"),
    ):
        model.hf_model(**inputs.tensors, past_key_values=fast.cache(), use_cache=True)
