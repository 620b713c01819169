"""The step of fixed shapes: the growing cache's tokens and logits, at the same place, without a look from the host."""

import warnings

import pytest
import torch
from graphs import Record, Stream, Waits, stand_in

import mech
from mech.errors import ExperimentError
from mech.model import HookedMLLM
from mech.reference import tiny
from mech.reference.tiny_processors import noise, processor
from mech.sparse.localize import Localized
from mech.sparse.policy import Policy, StillDense
from mech.sparse.step.loop import Uncaptured

QUESTIONS = ("Which digit is red?", "Which is red?")
OTHER_STATES = ("qwen3_5", "qwen3_5_moe", "lfm2_vl", "mllama")  # layers that keep more than keys of their own heads
CAN = [name for name in tiny.NAMES if name not in ("gemma4", *OTHER_STATES)]
NEW = 14


@pytest.fixture(scope="module")
def models():
    made = {}

    def get(name):
        if name not in made:
            made[name] = HookedMLLM.from_hf(tiny.model(name), processor(name), name=name)
        return made[name]

    return get


@pytest.fixture(autouse=True)
def quiet():
    """That short runs are dense is not what these tests are about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StillDense)
        yield


@pytest.fixture
def card(monkeypatch):
    """Steps are captured, by the stand-in."""
    stand_in(monkeypatch)
    monkeypatch.setattr(Localized, "captures", property(lambda self: True))


def batch(model):
    """Two rows of different lengths, padded on the left."""
    rows = [model.inputs(q, images=[noise(*size)]) for q, size in zip(QUESTIONS, ((40, 24), (24, 24)), strict=True)]
    return model.collate(rows)


def ids(model, length, rows=1, seed=0):
    drawn = torch.randint(200, 240, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": drawn % model.cfg.vocab}


def policy(model, phase="both", keep_text=False, sinks=2):
    """One dense head in the first layer that has heads, two of four in the others: whole, mixed and local KV groups."""
    layers = model.cfg.attention_layers
    heads = [(layer, head) for layer in layers for head in ((0,) if layer == layers[0] else (1, 2))]
    return Policy(heads, sinks, 6, keep_text, phase)


def generated(model, chosen, inputs, graph, **options):
    with mech.localize(model, chosen, graph=graph) as fast:
        return fast.generate(inputs, **{"max_new_tokens": NEW, **options}), fast.decoding


def same(model, chosen, inputs, graph=True, how="step", **options):
    """Generates both ways, compares, and gives the tokens."""
    expected, _ = generated(model, chosen, inputs, False, **options)
    found, decoding = generated(model, chosen, inputs, graph, **options)
    assert decoding == how and torch.equal(found, expected)
    return found


# -- a graph holds it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAN)
def test_a_step_that_was_captured_once_writes_what_the_loop_writes(models, card, name):
    """Captured at position 3 of an empty cache, replayed behind a padded batch and behind one row."""
    model = models(name)
    same(model, policy(model), batch(model), "auto", "captured")
    one = model.inputs(QUESTIONS[0], images=[noise(40, 24)])
    same(model, policy(model, keep_text=True), one, "auto", "captured")


@pytest.mark.parametrize("name", ["llava", "gemma3", "llama4"])
def test_text_that_rows_of_a_batch_keep(models, card, name):
    same(models(name), policy(models(name), keep_text=True), batch(models(name)), "auto", "captured")


@pytest.mark.parametrize("name", ["llava", "gemma3", "llama4"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_phases_of_a_captured_step(models, card, name, phase):
    same(models(name), policy(models(name), phase), batch(models(name)), "auto", "captured")


def test_one_capture_serves_later_prompts_and_nothing_moves(models, card):
    model = models("qwen2_5_vl")
    chosen = policy(model)
    with mech.localize(model, chosen) as fast:
        fast.generate(ids(model, 40), max_new_tokens=NEW)
        step = fast.step
        assert step.captured
        places = [x.data_ptr() for x in tensors_of(step)]
        sizes = [x.shape for x in tensors_of(step)]
        found = [fast.generate(ids(model, length, seed=1), max_new_tokens=9) for length in (25, 60, 2)]
        assert fast.step is step and step._run.graph.replays == NEW - 1 + 3 * 8
        assert [x.data_ptr() for x in tensors_of(step)] == places and [x.shape for x in tensors_of(step)] == sizes
        fast.generate(ids(model, 40, rows=2), max_new_tokens=2)
        assert fast.step is not step  # another batch
    assert fast.step is None
    for one, length in zip(found, (25, 60, 2), strict=True):
        assert torch.equal(one, generated(model, chosen, ids(model, length, seed=1), False, max_new_tokens=9)[0])


def tensors_of(step):
    clock = step.cache.clock
    stores = [x for layer in step.cache.layers for store in layer.stores() for x in (store.k, store.v)]
    inputs = [x for x in step.inputs.values() if isinstance(x, torch.Tensor)]
    return [clock.position, clock.first, clock.pins, clock.next_pin, *stores, *inputs]


def test_weights_that_moved_are_captured_anew(models, card):
    model = HookedMLLM.from_hf(tiny.model("llava"), processor("llava"))
    with mech.localize(model, policy(model)) as fast:
        fast.generate(ids(model, 30), max_new_tokens=3)
        step, head = fast.step, model.hf_model.lm_head
        head.weight = torch.nn.Parameter(head.weight.detach().clone() * -1)
        found = fast.generate(ids(model, 30), max_new_tokens=9)
        assert fast.step is not step
    assert torch.equal(found, generated(model, policy(model), ids(model, 30), False, max_new_tokens=9)[0])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "llama4", "paligemma2"])
@pytest.mark.parametrize("padded", [False, True])
def test_everything_a_step_reads_lies_on_its_device(models, name, padded):
    """On the meta device a number that is looked up, or a tensor from the CPU, is an error."""
    model = HookedMLLM.from_hf(tiny.model(name), processor(name))
    inputs = batch(model) if padded else ids(model, 30)
    with mech.localize(model, policy(model, keep_text=padded and name == "llava"), graph=True) as fast:
        fast.generate(inputs, max_new_tokens=NEW)
        step, clock = fast.step, fast.step.cache.clock
        model.hf_model.to("meta")
        step.inputs = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in step.inputs.items()}
        for holder in (clock, *(store for layer in step.cache.layers for store in layer.stores())):
            for name, value in vars(holder).items():
                if isinstance(value, torch.Tensor):
                    setattr(holder, name, value.to("meta"))
        for layer in step.cache.layers:
            layer.plan = layer.plan.to(torch.device("meta"))
        fast.run_on(step.cache)
        with torch.no_grad(), model._attached(), Record() as record:
            logits = step.forward()
    assert logits.device.type == "meta" and len(record.calls) > 100


def test_the_stand_in_refuses_what_a_graph_cannot_hold():
    x = torch.arange(3)
    for waits in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: bool(x.any()), lambda: x.to("meta")):
        with pytest.raises(Waits), Record():
            waits()
    with Record() as record:
        total = x * 2
        x += 1
    record.replay()
    assert x.tolist() == [2, 3, 4] and total.tolist() == [2, 4, 6]


def test_what_cannot_be_captured_runs_uncaptured_and_says_so(models, card, monkeypatch):
    def refuse(graph, capture_error_mode):
        raise RuntimeError("operation not permitted when stream is capturing")

    back = []
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "set_stream", back.append)
    stream = Stream()
    with pytest.warns(Uncaptured, match="not permitted when stream is capturing"):
        same(models("llava"), policy(models("llava")), batch(models("llava")), "auto", "step")
    assert back == [stream]  # or all that follows would run where the capture was


# -- every way of generating -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "gemma3", "llama4"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_prompt_in_chunks(models, name, chunk):
    same(models(name), policy(models(name)), ids(models(name), 40), prefill_chunk_size=chunk)


@pytest.mark.parametrize("name", ["llava", "llama4"])
@pytest.mark.parametrize("keep_text", [False, True])
def test_prompts_shorter_than_sinks_and_window(models, name, keep_text):
    """Sinks that are still to be written, and a ring that has not come round."""
    model = models(name)
    inputs = batch(model) if keep_text else ids(model, 2)
    same(model, policy(model, keep_text=keep_text, sinks=5), inputs, max_new_tokens=20)
    if not keep_text:
        same(model, Policy((), 5, 64), inputs, max_new_tokens=3)  # all of it within reach


def test_padding_on_the_right(models):
    model = models("llava")
    given = ids(model, 20, rows=2)
    given["attention_mask"] = torch.ones(2, 20, dtype=torch.long)
    given["attention_mask"][1, 14:] = 0
    same(model, policy(model), given)


def test_several_images_and_a_video(models):
    model = models("qwen2_5_vl")
    same(model, policy(model), model.inputs(QUESTIONS[0], images=[noise(40, 24), noise(24, 24)]))
    same(model, policy(model), model.inputs(QUESTIONS[0], video=[noise(24, 24)] * 4))


def test_sampling_penalties_and_several_answers(models):
    model = models("llava")
    for options in (
        {"do_sample": True}, {"repetition_penalty": 1.5}, {"do_sample": True, "num_return_sequences": 3, "top_k": 5},
        {"min_new_tokens": 4}, {"max_new_tokens": 1},
    ):  # fmt: skip
        found = []
        for graph in (False, True):
            torch.manual_seed(0)
            found.append(generated(model, policy(model), batch(model), graph, **options)[0])
        assert torch.equal(*found)


def test_rows_that_end_are_padded_and_the_last_one_stops_it(models, monkeypatch):
    model = models("llava")
    plain = generated(model, policy(model), batch(model), False, max_new_tokens=24)[0]
    for eos in (int(plain[0, 2]), int(plain[1, 5]), [int(plain[0, 1]), int(plain[1, 11])], int(plain[0, 0])):
        found = same(model, policy(model), batch(model), max_new_tokens=24, eos_token_id=eos)
        assert found.shape[1] <= 24
    both = [int(plain[0, 1]), int(plain[1, 1])]
    assert same(model, policy(model), batch(model), max_new_tokens=24, eos_token_id=both).shape[1] <= 2


def test_whether_all_have_ended_is_asked_rarely(models, card):
    model = models("llava")
    first = generated(model, policy(model), ids(model, 30), False)[0][0, 0]
    with mech.localize(model, policy(model)) as fast:
        fast.generate(ids(model, 30), max_new_tokens=200, eos_token_id=int(first))
        assert fast.step._run.graph.replays == 7  # one token, and seven that were written in vain


@pytest.mark.parametrize(
    "options, why",
    [({"num_beams": 2}, "several hypotheses"), ({"max_time": 100.0}, "MaxTimeCriteria"),
     ({"return_dict_in_generate": True}, "outputs other than tokens")],
)  # fmt: skip
def test_what_the_host_decides_stays_in_the_loop_and_says_so_once(models, options, why):
    model = models("llava")
    expected = generated(model, policy(model), batch(model), False, **options)[0]
    with mech.localize(model, policy(model), graph=True) as fast:
        with pytest.warns(Uncaptured, match=why):
            found = fast.generate(batch(model), max_new_tokens=NEW, **options)
        assert fast.decoding == "loop"
        fast.generate(batch(model), max_new_tokens=NEW, **options)  # no warning, which would be an error
    tokens = [x if isinstance(x, torch.Tensor) else x.sequences for x in (found, expected)]
    assert torch.equal(*tokens)


def test_hooks_are_not_passed_over(models):
    model = models("llava")
    seen = []
    with (
        mech.localize(model, policy(model), graph=True) as fast,
        model.hooks([("blocks.1.attn.hook_z", lambda z, hook: seen.append(z.shape[1]))]),
        pytest.warns(Uncaptured, match="hooks listen"),
    ):
        fast.generate(ids(model, 30), max_new_tokens=4)
    assert seen == [30, 1, 1, 1]


@pytest.mark.parametrize("name", OTHER_STATES)
def test_layers_with_states_of_their_own_stay_in_the_loop(models, name):
    model = models(name)
    expected, _ = generated(model, policy(model), batch(model), False)
    with pytest.warns(Uncaptured, match="something other than the keys"):
        found, decoding = generated(model, policy(model), batch(model), True)
    assert decoding == "loop" and torch.equal(found, expected)


# -- what it is made of ------------------------------------------------------------------------------------------------


def test_the_dense_twin_is_the_idle_model_from_stores_of_fixed_size(models):
    for name in ("llava", "gemma3", "qwen2_5_vl"):
        model = models(name)
        inputs = batch(model)
        plain, tokens = model(inputs), model.generate(inputs, max_new_tokens=NEW)
        with mech.dense_static(model, graph=True) as dense:
            assert torch.equal(dense(inputs), plain)
            assert torch.equal(dense.generate(inputs, max_new_tokens=NEW), tokens) and dense.decoding == "step"
            assert all(layer.local is None for layer in dense.step.cache.layers)


def test_stores_are_as_large_as_they_say(models):
    model = models("llava")
    with mech.localize(model, dense_heads=[(0, 0)], sinks=4, window=32, graph=True) as fast:
        fast.generate(ids(model, 1500), max_new_tokens=4)
        assert fast.nbytes == 2 * 8 * 4 * (1536 + (3 * 2 - 1) * (4 + 32))  # d_head 8 in four bytes; room for 6 x 256


def test_a_token_more_than_there_is_room_for_is_refused(models):
    model = models("llava")
    with mech.localize(model, policy(model), graph=True) as fast:
        fast.generate(ids(model, 250), max_new_tokens=6)
        step = fast.step
        assert step.left == 256 - 250 - 5
        step.left = 0
        with pytest.raises(ExperimentError, match="more than the 256 reserved positions"):
            step(torch.tensor([[5]]))


def test_on_a_cpu_the_growing_cache_stays(models):
    _, decoding = generated(models("llava"), policy(models("llava")), ids(models("llava"), 30), "auto")
    assert decoding == "loop"
    with pytest.raises(ExperimentError, match="graph"):
        mech.localize(models("llava"), policy(models("llava")), graph="always")
