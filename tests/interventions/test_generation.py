"""Interventions in every way of running a prompt: recomputed, in pieces, in beams, with other caches, with drafts.

The reference is generation with a plain cache, whose steps `mech check` holds to full recomputation.
"""

import pytest
import torch
from tiny_models import opened
from transformers import DynamicCache

import mech
from mech.errors import ExperimentError, InputError, MechError, UnsupportedModel
from mech.interventions import Ablate, Knockout, Patch, Scale, intervene
from mech.model.check.trial import special_tokens
from mech.reference import tiny, tiny_processors

LOOKS_AHEAD = ("gemma3", "paligemma", "paligemma2", "gemma4_large")
WHOLE = ("llama4", "mllama")  # pictures that cannot be encoded before the prompt is read
SLIDING = ("llava_mistral", "gemma3", "gemma4", "cohere2_vision")
TOKENS = 3


def inputs_of(model, seed=0, question="What is in the picture?"):
    return model.inputs(question, images=[tiny_processors.noise(24, 20, seed)])


def asked(model, tokens=TOKENS):
    """So many tokens, none of them a placeholder: a random model may well say that there is a picture."""
    return {"max_new_tokens": tokens, "min_new_tokens": tokens, "suppress_tokens": sorted(special_tokens(model))}


def own_layer(model):
    """The last layer whose keys are positions and are its own."""
    live = set(model.points())
    return max(layer for layer in model.cfg.attention_layers
               if layer not in model.cfg.cross_layers and f"blocks.{layer}.attn.hook_v" in live)  # fmt: skip


def logits_of(model, run, inputs, **options):
    """The logits of every token that `run` generates."""
    last = []
    with model.hooks([("ln_final.hook_normalized", lambda value, hook: last.append(value[:, -1].clone()))]):
        run.generate(inputs, **asked(model), **options)
    return torch.stack(last[-TOKENS:]) @ model.W_U


def specs_of(model):
    """Every place and phase at which specs are told apart, each visible in the logits."""
    layer, other = own_layer(model), inputs_of(model, seed=1)
    found = [
        Ablate("hook_mlp_out", layers=[0], to="zero", positions="question", phase="prefill"),
        Ablate("hook_mlp_out", layers=[layer], to="zero", phase="decode"),
        Patch("hook_resid_post", other, layers=[0], positions="last"),
        Patch("attn.hook_z", other, heads=[(layer, 0)], positions="all"),
        Patch("attn.hook_v", other, heads=[(layer, 0)]),
        Patch("attn.hook_attn_scores", other, heads=[(layer, 1)]),
        Patch("attn.hook_pattern", other, heads=[(layer, 2)], positions="last"),
        Ablate(heads=[(layer, 3)], to="uniform"),
        Scale([(layer, 2)], 2.0, phase="decode"),
    ]
    if not model.cfg.cross_layers:  # else no position of the sequence is an image's
        found += [
            Patch("hook_embed", other, positions="image"),
            Ablate(heads=[(layer, 1)], to="zero", positions="image"),
        ]
    return found


def close(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", tiny.NAMES)
def test_recomputed_and_chunked_generation_give_what_a_cache_gives(name):
    model = opened(name)
    inputs = inputs_of(model)
    with intervene(model, *specs_of(model)) as run:
        expected = logits_of(model, run, inputs)
        assert (expected[:, 0] - logits_of(model, model, inputs)[:, 0]).abs().amax(1).min() > 1e-2
        close(logits_of(model, run, inputs, use_cache=False), expected)
        if name in (*LOOKS_AHEAD, *WHOLE):
            with pytest.raises(MechError, match=r"attend to later ones|for pictures of"):
                logits_of(model, run, inputs, prefill_chunk_size=7)
        else:
            close(logits_of(model, run, inputs, prefill_chunk_size=7), expected)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "mllama"])
@pytest.mark.parametrize("to", ["paper", "mean", "resample"])
def test_ablations_that_depend_on_the_whole_prompt(name, to):
    model = opened(name)
    layer, inputs = own_layer(model), inputs_of(model)
    reference = mech.haystacks("grounding", n=2, seed=0) if to != "paper" else None
    with intervene(model, Ablate(heads=[(layer, 0), (layer, 2)], to=to, reference=reference)) as run:
        expected = logits_of(model, run, inputs)
        close(logits_of(model, run, inputs, use_cache=False), expected)
        if to == "paper" or name in LOOKS_AHEAD:
            with pytest.raises(ExperimentError, match="in chunks"):
                logits_of(model, run, inputs, prefill_chunk_size=7)
        elif name not in WHOLE:
            close(logits_of(model, run, inputs, prefill_chunk_size=7), expected)


def test_a_cache_that_was_filled_before_is_refused(no_forward):
    """Nobody knows what was done to the positions in it, nor which of the prompt they are."""
    model = no_forward
    inputs, row = inputs_of(model), torch.zeros(1, 2, 20, 8)
    cache = DynamicCache(config=model.hf_model.config.get_text_config())
    cache.update(row, row, 0)
    with intervene(model, Ablate("hook_mlp_out", layers=[0], to="zero")) as run:
        for call in (run, run.run_with_cache, run.generate, run.generate_text):
            with pytest.raises(ExperimentError, match="a cache that has read 20 positions"):
                call(inputs, past_key_values=cache)


@pytest.fixture
def no_forward(monkeypatch):
    model = opened("llava")

    def forward(*args, **options):
        raise AssertionError("a forward has run")

    monkeypatch.setattr(model.hf_model, "forward", forward)
    return model


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "mllama"])
def test_beams_and_samples_are_those_of_recomputation(name):
    """Two rows, the shorter one padded; each continued several times."""
    model = opened(name)
    rows = [inputs_of(model), inputs_of(model, 1, "What?")]
    options = asked(model, 4)
    with intervene(model, *specs_of_any_length(model)) as run:
        both = model.collate(rows)
        beams = run.generate(both, num_beams=3, **options)
        assert torch.equal(beams, run.generate(both, num_beams=3, use_cache=False, **options))
        assert torch.equal(beams[:1], run.generate(rows[0], num_beams=3, **options))
        drawn = []
        for cached in (True, False):
            torch.manual_seed(0)
            sampled = run.generate(both, do_sample=True, num_return_sequences=2, use_cache=cached, **options)
            drawn.append(sampled)
        assert torch.equal(*drawn) and len(drawn[0]) == 4


def specs_of_any_length(model):
    return [spec for spec in specs_of(model) if not isinstance(spec, Patch)]


@pytest.mark.parametrize("name", SLIDING)
def test_long_generation_over_windows(name):
    """Three windows of tokens behind the prompt: the first keys are long gone from the caches of windowed layers."""
    model = opened(name)
    inputs, options = inputs_of(model), asked(model, 24)
    seen = []
    with intervene(model, *specs_of_any_length(model), Knockout("text", "question", layers=[1])) as run:
        for cached in (True, False):
            with model.hooks([("ln_final.hook_normalized", lambda value, hook: seen.append(value[:, -1].clone()))]):
                run.generate(inputs, use_cache=cached, **options)
    close(torch.stack(seen[:24]), torch.stack(seen[24:]))


@pytest.mark.parametrize("name", [name for name in tiny.NAMES if name != "paligemma2"])
def test_a_static_cache(name):
    model = opened(name)
    inputs = inputs_of(model)
    with intervene(model, *specs_of(model)) as run:
        close(logits_of(model, run, inputs, cache_implementation="static"), logits_of(model, run, inputs))


@pytest.mark.parametrize("name", ["llava", "llava_mistral", "qwen2_5_vl", "gemma3"])
def test_drafts_change_nothing(name):
    model = opened(name)
    options = asked(model, 12)
    with intervene(model, *specs_of_any_length(model)) as run:
        inputs = inputs_of(model)
        drafted = run.generate(inputs, assistant_model=tiny.model(name, seed=1), **options)
        assert torch.equal(drafted, run.generate(inputs, **options))
    text = model.inputs("What is in in in in in in the picture?")
    with intervene(model, Ablate("hook_mlp_out", layers=[0], to="zero", positions="text")) as run:
        assert torch.equal(run.generate(text, prompt_lookup_num_tokens=3, **options), run.generate(text, **options))


def test_a_hook_that_runs_the_model_while_it_generates():
    """The step that is going on keeps its positions: what is ablated in the prompt stays out of what is written."""
    model = opened("llava")
    inputs, inside = inputs_of(model), []

    def again(value, hook):
        if not inside:
            inside.append(True)
            model(inputs)
            inside.clear()

    spec = Ablate("hook_mlp_out", layers=[1], to="zero", phase="prefill")
    with intervene(model, spec) as run:
        expected = logits_of(model, run, inputs)
        with model.hooks([("blocks.0.hook_resid_pre", again)]):
            last = []

            def keep(value, hook):
                if not inside:
                    last.append(value[:, -1].clone())

            with model.hooks([("ln_final.hook_normalized", keep)]):
                run.generate(inputs, **asked(model))
    close(torch.stack(last) @ model.W_U, expected)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_logits_to_keep(name):
    model = opened(name)
    inputs = inputs_of(model)
    with torch.no_grad(), intervene(model, *specs_of_any_length(model)[:2:2]) as run:
        close(run(inputs, logits_to_keep=2), run(inputs)[:, -2:])


@pytest.mark.parametrize(
    "options, says",
    [
        ({"cache_implementation": "offloaded"}, "on the CPU"),
        ({"cache_implementation": "offloaded_static"}, "on the CPU"),
        ({"cache_implementation": "quantized"}, "would be rounded"),
        ({"prompt_lookup_num_tokens": 3}, "drafts placeholders"),
        ({"assistant_early_exit": 1}, "for a multimodal model"),
        ({"prefill_chunk_size": 7, "use_cache": False}, "use_cache=False"),
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "inputs_embeds"),
        ({"assistant_model": "wrapper"}, "assistant_model of type HookedMLLM"),
    ],
)
def test_what_cannot_be_run_is_refused_before_a_forward(no_forward, options, says):
    model = no_forward
    if "assistant_model" in options:
        options = {"assistant_model": model}
    with pytest.raises((InputError, UnsupportedModel), match=says) as error:
        model.generate(inputs_of(model), **options)
    assert error.value.do


@pytest.mark.parametrize(
    "name, options, says",
    [
        *((name, {"prefill_chunk_size": 7}, "attend to later ones") for name in LOOKS_AHEAD),
        *((name, {"prefill_chunk_size": 7}, "for pictures of") for name in WHOLE),
        ("paligemma2", {"cache_implementation": "static"}, "sliding-window"),
        ("mllama", {"assistant_model": tiny.model("llava")}, "for mllama with pictures"),
    ],
)
def test_what_single_families_cannot_run(name, options, says):
    model = opened(name)
    with pytest.raises((InputError, UnsupportedModel), match=says) as error:
        model.generate(inputs_of(model), **options)
    assert error.value.do


def test_a_prompt_without_pictures_may_be_read_in_chunks():
    model = opened("gemma3")
    inputs = model.inputs("What is in the picture?")
    close(logits_of(model, model, inputs, prefill_chunk_size=7), logits_of(model, model, inputs))
