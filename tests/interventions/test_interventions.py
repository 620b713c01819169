"""Ablation against its definitions: each method done once more by hand, with hooks or with plain arithmetic."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mech.data.haystacks import haystacks
from mech.errors import ExperimentError
from mech.inputs import encode
from mech.interventions import METHODS, Ablate, intervene, reference_activations
from mech.interventions.reference import kinds
from mech.model import HookedMLLM

HEADS = ((1, 0), (1, 5), (3, 2))
POINTS = ["blocks.1.attn.hook_z", "blocks.3.attn.hook_z"]


@pytest.fixture(scope="module", params=["llava-s", "qwen-s"])
def model(request):
    return HookedMLLM.from_pretrained(f"reference:{request.param}")


@pytest.fixture(scope="module")
def samples():
    return haystacks("grounding", 6, seed=11)


@pytest.fixture(scope="module")
def bank(model):
    return reference_activations(model, haystacks("grounding", 6, seed=12), batch_size=4)


@pytest.fixture(scope="module")
def inputs(model, samples):
    """Two questions of different length: the shorter one is padded."""
    rows = sorted((model.inputs_of(sample) for sample in samples), key=lambda row: len(row.layout))
    assert len(rows[0].layout) < len(rows[-1].layout)
    return model.collate([rows[0], rows[-1]])


def z_of(run, inputs):
    _, cache = run.run_with_cache(inputs, names_filter=POINTS)
    return {layer: cache[f"blocks.{layer}.attn.hook_z"] for layer in (1, 3)}


def test_the_mean_is_that_of_every_position_of_its_kind(model, bank):
    """Sample by sample and unbatched, as one would write it down."""
    values = [[], []]
    for sample in haystacks("grounding", 6, seed=12):
        row = model.inputs_of(sample)
        _, cache = model.run_with_cache(row, names_filter=["blocks.3.attn.hook_z"])
        for kind in (0, 1):
            values[kind].append(cache["blocks.3.attn.hook_z"][0, kinds(row.layout) == kind])
    for kind in (0, 1):
        together = torch.cat(values[kind])
        torch.testing.assert_close(bank.mean[kind, 3], together.mean(0), atol=1e-5, rtol=1e-4)
        # Every draw is one of the values that really occurred.
        distance = (bank.draws[kind, :, None, 3] - together[None]).abs().amax((2, 3)).amin(1)
        assert distance.max() < 1e-4


@pytest.mark.parametrize("to", METHODS)
def test_only_the_named_heads_change_and_a_hook_that_writes_the_same_gives_the_same(model, inputs, bank, to):
    spec = Ablate(heads=HEADS, to=to, reference=bank)
    with intervene(model, spec) as without:
        logits, ablated = without(inputs), z_of(without, inputs)
    clean = z_of(model, inputs)
    others = [head for head in range(model.cfg.n_heads) if head not in (0, 5)]
    real = torch.stack([kinds(layout) >= 0 for layout in inputs.layouts])
    torch.testing.assert_close(ablated[1][:, :, others][real], clean[1][:, :, others][real])
    assert (ablated[1][:, :, [0, 5]] - clean[1][:, :, [0, 5]])[real].abs().amax() > 1e-3

    def write(z, hook):
        layer = int(hook.name.split(".")[1])
        chosen = [head for at, head in HEADS if at == layer]
        z[:, :, chosen] = ablated[layer][:, :, chosen]
        return z

    by_hand = model.run_with_hooks(inputs, fwd_hooks=[(point, write) for point in POINTS])
    torch.testing.assert_close(logits[real], by_hand[real], atol=1e-5, rtol=1e-4)


def test_what_each_method_puts_there(model, inputs, bank):
    _, cache = model.run_with_cache(inputs, names_filter=["blocks.1.hook_resid_pre", "blocks.1.attn.hook_v"])
    group = model.cfg.n_heads // model.cfg.n_kv_heads
    value = cache["blocks.1.attn.hook_v"][:, :, 5 // group]
    kind = torch.stack([kinds(layout) for layout in inputs.layouts])
    found = {}
    for to in METHODS:
        with intervene(model, Ablate(heads=[(1, 5)], to=to, reference=bank)) as without:
            found[to] = z_of(without, inputs)[1][:, :, 5]
    for row in range(2):
        first = int((kind[row] < 0).sum())
        for position in range(first, kind.shape[1]):
            seen = value[row, first : position + 1]
            torch.testing.assert_close(found["zero"][row, position], torch.zeros(model.cfg.d_head))
            torch.testing.assert_close(found["mean"][row, position], bank.mean[kind[row, position], 1, 5])
            torch.testing.assert_close(found["uniform"][row, position], seen.mean(0), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found["paper"][row, position], value[row, first:].mean(0), atol=1e-5, rtol=1e-4)
            drawn = bank.draws[kind[row, position], :, 1, 5]
            assert (drawn - found["resample"][row, position]).abs().amax(1).min() < 1e-6


@pytest.mark.parametrize("to", ["uniform", "paper"])
def test_uniform_and_paper_are_edits_of_the_pattern(model, inputs, to):
    """`paper` sets the logits to 0 after the mask; `uniform` spreads the pattern over what the mask allows."""

    def spread(pattern, hook):
        real = torch.stack([kinds(layout) >= 0 for layout in inputs.layouts])
        allowed = (pattern[:, 5] > 0) if to == "uniform" else real[:, None, :].expand_as(pattern[:, 5])
        pattern[:, 5] = allowed / allowed.sum(-1, keepdim=True).clamp(min=1)
        return pattern

    expected = model.run_with_hooks(inputs, fwd_hooks=[("blocks.1.attn.hook_pattern", spread)])
    with intervene(model, Ablate(heads=[(1, 5)], to=to)) as without:
        torch.testing.assert_close(without(inputs)[:, -1], expected[:, -1], atol=1e-5, rtol=1e-4)


def test_rows_of_a_batch_do_not_touch_each_other(model, samples, bank):
    rows = [model.inputs_of(sample) for sample in samples[:3]]
    for to in METHODS:
        with intervene(model, Ablate(heads=HEADS, to=to, reference=bank)) as without:
            together = without(model.collate(rows))[:, -1]
            alone = torch.cat([without(row)[:, -1] for row in rows])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("to", METHODS)
@pytest.mark.parametrize("phase", ["both", "prefill", "decode"])
def test_generation_with_a_cache_is_recomputation_without_one(model, samples, bank, to, phase):
    """Four tokens are written with the cache; then all of it is read at once, and each must be the most likely."""
    sample = samples[0]
    prompt = model.processor.prompt(sample.question, images=1)
    with intervene(model, Ablate(heads=HEADS, to=to, phase=phase, reference=bank)) as without:
        ids = without.generate(model.inputs_of(sample), max_new_tokens=4, eos_token_id=None)[0]
        text = prompt + model.tokenizer.decode(ids)
        spans = {"question": (0, 1), "answer": (len(prompt), len(text))}
        row = encode(model.processor, text, sample.images, spans=spans)
        written = list(row.layout.spans["answer"])
        assert row.tensors["input_ids"][0, written].tolist() == ids.tolist()
        logits = without(row)[0]
    assert logits[[position - 1 for position in written]].argmax(-1).tolist() == ids.tolist()


@pytest.mark.parametrize("positions", ["question", "last", "image", "text"])
def test_positions_limit_where_heads_change(model, inputs, bank, positions):
    with intervene(model, Ablate(heads=[(1, 5)], to="zero", positions=positions)) as without:
        changed = (z_of(without, inputs)[1][:, :, 5] == 0).all(-1)
    for row, layout in enumerate(inputs.layouts):
        assert np.flatnonzero(changed[row] & (kinds(layout) >= 0)).tolist() == layout.positions(positions).tolist()


def test_nothing_is_left_behind(model, inputs, bank):
    before = model(inputs)
    spec = Ablate(heads=HEADS, to="zero")
    with intervene(model, spec) as without:
        assert not torch.equal(without(inputs), before)
        assert torch.equal(model(inputs), before)  # the model itself is not intervened on
    with pytest.raises(RuntimeError, match="stop"), intervene(model, spec):
        raise RuntimeError("stop")
    assert torch.equal(model(inputs), before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(heads=[(99, 0)], to="zero"), "a head of this model"),
        (dict(heads=[], to="zero"), "at least one"),
        (dict(heads=HEADS, to="men"), "use 'mean'"),
        (dict(heads=HEADS, to="mean"), "without reference"),
        (dict(heads=HEADS, to="zero", positions="questions"), "use 'question'"),
        (dict(heads=HEADS, to="zero", phase="decoding"), "use 'decode'"),
    ],
)
def test_what_cannot_be_run_is_refused_before_any_forward(model, monkeypatch, options, says):
    monkeypatch.setattr(HookedMLLM, "forward", lambda *_, **__: pytest.fail("a forward was run"))
    with pytest.raises(ExperimentError, match=says), intervene(model, Ablate(**options)):
        pass


@pytest.mark.parametrize("to", METHODS)
def test_half_precision_runs_and_agrees(model, samples, to):
    half = HookedMLLM.from_pretrained(model.name, dtype=torch.bfloat16)
    logits = {}
    for name, run in (("full", model), ("half", half)):
        with intervene(run, Ablate(heads=HEADS, to=to, reference=haystacks("grounding", 3, seed=12))) as without:
            logits[name] = without(run.inputs_of(samples[0]))[0, -1].float()
    assert torch.nn.functional.cosine_similarity(logits["full"], logits["half"], dim=0) > 0.98


def test_a_reference_of_another_model_is_refused(model, bank):
    other = replace(bank, mean=bank.mean[:, :2])
    with pytest.raises(ExperimentError, match="make them with"), intervene(model, Ablate(heads=HEADS, reference=other)):
        pass


def test_a_spec_that_changes_nothing_is_an_error(model, inputs):
    with (
        pytest.raises(ExperimentError, match="changed nothing"),
        intervene(model, Ablate(heads=HEADS, to="zero", phase="decode")) as without,
    ):
        without(inputs)


def test_a_spec_describes_itself_for_the_record(bank):
    record = Ablate(heads=HEADS, reference=bank).describe()
    assert record["heads"] == [[1, 0], [1, 5], [3, 2]] and record["reference"] == bank.digest


@pytest.mark.parametrize("to", METHODS)
def test_a_model_in_float64_is_ablated_in_float64(to):
    """Against the same sums written out: nothing on the way is rounded to float32."""
    double = HookedMLLM.from_pretrained("reference:llava-s", dtype=torch.float64)
    row = double.inputs_of(haystacks("grounding", 1, seed=11)[0])
    train = haystacks("grounding", 3, seed=12)
    # One by one: norms work in float32, so that another batch moves the eighth place.
    bank = reference_activations(double, train, batch_size=1) if to in ("mean", "resample") else None
    with intervene(double, Ablate(heads=HEADS, to=to, reference=bank)) as without:
        _, cache = without.run_with_cache(row, names_filter=["blocks.1.attn.hook_z", "blocks.1.attn.hook_v"])
    z, v = cache["blocks.1.attn.hook_z"][0, :, [0, 5]], cache["blocks.1.attn.hook_v"][0]
    assert z.dtype == torch.float64
    v = v.repeat_interleave(double.cfg.n_heads // v.shape[1], dim=1)[:, [0, 5]]
    kind = kinds(row.layout)
    if to == "zero":
        assert not z.any()
    elif to == "uniform":
        torch.testing.assert_close(z, v.cumsum(0) / torch.arange(1, len(v) + 1)[:, None, None], atol=1e-13, rtol=0)
    elif to == "paper":
        torch.testing.assert_close(z, v.mean(0).expand_as(z), atol=1e-13, rtol=0)
    elif to == "mean":
        assert torch.equal(z, bank.mean[kind][:, 1, [0, 5]])
    else:
        distance = (z[:, None] - bank.draws[kind][:, :, 1, [0, 5]]).abs().amax((2, 3))
        assert bool((distance.amin(1) == 0).all())
    if bank is not None:
        values = []
        for sample in train:
            other = double.inputs_of(sample)
            _, seen = double.run_with_cache(other, names_filter=["blocks.1.attn.hook_z"])
            values.append(seen["blocks.1.attn.hook_z"][0, kinds(other.layout) == 1])
        torch.testing.assert_close(bank.mean[1, 1], torch.cat(values).mean(0), atol=1e-12, rtol=0)
