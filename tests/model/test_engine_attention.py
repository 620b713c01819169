"""What an observer of attention is given: exact rows, the layer's true mask, and the power to replace z.

That edits act in every step of a generation as in one forward over all of it is for ``test_check.py``.
"""

import pytest
import torch
from tensors import FEW, placeholder, tensors

from mech.errors import MechError, PointError
from mech.model import HookedMLLM
from mech.model.attention import attention
from mech.reference import tiny

ROWS = ((2, 5), (1, 3), (0, 6))


@pytest.fixture(params=FEW)
def family(request):
    return request.param


def eager_attentions(family, batch):
    hf_model = tiny.model(family)
    hf_model.set_attn_implementation("eager")
    with torch.no_grad():
        return hf_model(**batch, output_attentions=True).attentions


def observed(model, batch, positions, stack="text"):
    calls = {}
    with torch.no_grad(), model.attending(lambda call: calls.update({call.layer: call}), stack=stack):
        logits = model(batch)
    return logits, calls, {layer: call.rows(positions) for layer, call in calls.items()}


@pytest.mark.parametrize("rows", [((1, 5),), ROWS], ids=["one row", "left padding, several images"])
def test_rows_equal_eager_attention_and_observing_changes_nothing(family, rows):
    batch = tensors(family, rows)
    eager = eager_attentions(family, batch)
    model = HookedMLLM.from_hf(tiny.model(family))
    length = batch["input_ids"].shape[1]
    positions = [length - 1, length - 4, 2]
    logits, calls, attention = observed(model, batch, positions)
    assert torch.equal(logits, model(batch))
    assert sorted(calls) == list(range(tiny.LAYERS))
    seen = batch["attention_mask"].bool()[:, positions]
    for layer, rows_of_layer in attention.items():
        expected = eager[layer][:, :, positions]
        assert rows_of_layer.shape == (len(rows), tiny.HEADS, len(positions), length)
        difference = (rows_of_layer - expected).abs().amax((1, 3))
        assert difference[seen].max() < 1e-5
        assert rows_of_layer.transpose(1, 2)[~seen].abs().sum() == 0


def test_a_call_is_consistent_with_the_points(family):
    model, batch = HookedMLLM.from_hf(tiny.model(family)), tensors(family, ROWS)
    _, calls, _ = observed(model, batch, [-1])
    with torch.no_grad():
        _, cache = model.run_with_cache(batch)
    for layer, call in calls.items():
        assert call.stack == "text" and call.query_start == 0
        assert call.k.shape[1] == call.v.shape[1] == tiny.KV_HEADS
        for name, tensor in (("rot_q", call.q.transpose(1, 2)), ("rot_k", call.k.transpose(1, 2)), ("z", call.z)):
            torch.testing.assert_close(tensor, cache[f"blocks.{layer}.attn.hook_{name}"], atol=2e-5, rtol=1e-4)
        every = range(call.q.shape[2])
        torch.testing.assert_close(call.rows(every), cache[f"blocks.{layer}.attn.hook_pattern"], atol=1e-5, rtol=1e-4)


def test_visible_is_causal_padded_and_counts_from_the_end_too(family):
    model, batch = HookedMLLM.from_hf(tiny.model(family)), tensors(family, ROWS)
    length, real = batch["input_ids"].shape[1], batch["attention_mask"].bool()
    expected = torch.ones(length, length, dtype=torch.bool).tril()[None, None] & real[:, None, None, :]
    if family == "gemma3":  # the visual tokens of one image see each other
        visual = batch["input_ids"] == placeholder(family)
        image = (~visual).cumsum(-1)
        expected |= (visual[:, :, None] & visual[:, None] & (image[:, :, None] == image[:, None]))[:, None]
    _, calls, _ = observed(model, batch, [-1])
    assert torch.equal(calls[1].visible(range(length)), expected)
    assert torch.equal(calls[1].visible([-1, 0]), expected[:, :, [length - 1, 0]])
    whole = tensors(family)
    _, calls, _ = observed(model, whole, [-1])
    if family == "gemma3":
        return
    assert calls[1].mask is None and calls[1].causal
    assert torch.equal(calls[1].visible([-2])[0, 0, 0], torch.arange(calls[1].k.shape[2]) < calls[1].k.shape[2] - 1)


def test_an_additive_mask_is_a_bias_and_a_limit():
    model, batch = HookedMLLM.from_hf(tiny.model("llava")), tensors("llava")
    length = batch["input_ids"].shape[1]
    bias = torch.zeros(1, 1, length, length).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    bias[..., 2] += 3.0
    batch["attention_mask"] = bias
    _, calls, attention = observed(model, batch, range(length))
    assert torch.equal(calls[0].visible(range(length))[0, 0], bias[0, 0] > -1)
    with torch.no_grad():
        logits, cache = model.run_with_cache(batch, names_filter=lambda name: "pattern" in name)
    torch.testing.assert_close(logits, model(batch).detach(), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(attention[0], cache["blocks.0.attn.hook_pattern"])


def test_replacing_z_equals_writing_hook_z(family):
    model, batch = HookedMLLM.from_hf(tiny.model(family)), tensors(family, ROWS)

    def without(z):
        z = z.clone()
        z[:, :, 1] = 0
        return z

    order = []

    def observer(call):
        order.append("observer")
        return without(call.z) if call.layer == 1 else None

    def hook(z, hook):
        order.append("hook")
        assert z[:, :, 1].abs().sum() == 0

    with torch.no_grad():
        expected = model.run_with_hooks(batch, fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: without(z))])
        with model.attending(observer):
            replaced = model.run_with_hooks(batch, fwd_hooks=[("blocks.1.attn.hook_z", hook)])
    assert torch.equal(replaced, expected) and not torch.equal(expected, model(batch))
    assert order == ["observer", "observer", "hook", "observer"]


def test_hooks_and_observers_act_in_every_step_of_generate(family):
    batch = tensors(family, ROWS)
    model = HookedMLLM.from_hf(tiny.model(family))
    free = model.generate(batch, max_new_tokens=6)
    steps = []

    def zero_heads(z):
        z = z.clone()
        z[:, :, :2] = 0
        return z

    def observer(call):
        if call.layer != 1:
            return None
        steps.append((call.q.shape[2], call.k.shape[2], call.query_start))
        if call.query_start:  # a decoded token sees everything but the padding
            real = torch.nn.functional.pad(batch["attention_mask"].bool(), (0, call.k.shape[2] - length), value=True)
            assert torch.equal(call.visible([0])[:, 0, 0], real)
        torch.testing.assert_close(call.rows([-1]).sum(-1), torch.ones(len(ROWS), tiny.HEADS, 1))
        return zero_heads(call.z)

    length = batch["input_ids"].shape[1]
    with model.attending(observer):
        attended = model.generate(batch, max_new_tokens=6)
    assert steps == [(length, length, 0)] + [(1, length + step, length + step - 1) for step in range(1, 6)]
    with model.hooks([("blocks.1.attn.hook_z", lambda z, hook: zero_heads(z))]):
        hooked = model.generate(batch, max_new_tokens=6)
    assert torch.equal(attended, hooked) and not torch.equal(hooked, free)


def test_the_vision_stack_can_be_observed_and_changed(family):
    model, batch = HookedMLLM.from_hf(tiny.model(family)), tensors(family, ROWS)
    clean = model(batch).detach()
    logits, calls, attention = observed(model, batch, [0, 1], stack="vision")
    torch.testing.assert_close(logits, clean, atol=2e-5, rtol=1e-4)
    live = {int(name.split(".")[2]) for name in model.points() if name.startswith("vision.")}
    assert set(calls) == live and all(call.stack == "vision" and not call.causal for call in calls.values())
    torch.testing.assert_close(attention[0].sum(-1), torch.ones(attention[0].shape[:-1]))
    with model.attending(lambda call: call.z * 0, stack="vision"), torch.no_grad():
        assert (model(batch) - clean).abs().max() > 1e-3
    assert torch.equal(model(batch), clean)


def test_what_an_observer_returns_is_checked():
    model, batch = HookedMLLM.from_hf(tiny.model("llava")), tensors("llava")
    with (
        model.attending(lambda call: call.z[:, :1] if call.layer == 2 else None),
        pytest.raises(PointError, match="attending, text layer 2' returned the shape"),
    ):
        model(batch)
    with pytest.raises(MechError, match="'text' or 'vision'"), model.attending(lambda call: None, stack="audio"):
        pass


def test_observers_nest_and_each_sees_what_the_one_before_left():
    model, batch = HookedMLLM.from_hf(tiny.model("llava")), tensors("llava")
    seen = []
    with model.attending(lambda call: torch.ones_like(call.z)), model.attending(lambda call: seen.append(call.z)):
        model(batch)
    assert len(seen) == tiny.LAYERS and all(bool((z == 1).all()) for z in seen)


def test_a_softcap_is_exact_however_it_is_computed():
    """Gemma2's scores are ``c tanh(scores / c)``: SDPA refuses them, so the oracle is eager."""
    batch = tensors("paligemma2", ROWS)
    eager = eager_attentions("paligemma2", batch)
    hf_model = tiny.model("paligemma2")
    for layer in hf_model.model.language_model.layers:
        layer.self_attn.attn_logit_softcapping = 0.5
    with torch.no_grad():
        capped = hf_model(**batch, output_attentions=True)
    model = HookedMLLM.from_hf(hf_model)
    real, length = batch["attention_mask"].bool(), batch["input_ids"].shape[1]
    logits, _, rows = observed(model, batch, range(length))
    with torch.no_grad():
        hooked, cache = model.run_with_cache(batch, names_filter="blocks.1.attn.hook_pattern")
    expected = capped.attentions[1]
    assert (expected - eager[1]).abs().max() > 1e-2
    for got in (rows[1], cache["blocks.1.attn.hook_pattern"]):
        assert (got - expected).transpose(1, 2)[real].abs().max() < 1e-5
    for got in (model(batch), logits, hooked):
        torch.testing.assert_close(got[real], capped.logits[real], atol=2e-5, rtol=1e-4)


def test_sinks_take_their_share_however_attention_is_computed():
    """A sink is one more key with a logit of its own and no value; SDPA would ignore it without a word."""
    model = HookedMLLM.from_hf(tiny.model("llava"))
    module, record = next(pair for pair in model._layers if pair[1].stack == "text")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 6, tiny.D_HEAD, generator=generator) for heads in (4, 2, 2))
    sinks = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * tiny.D_HEAD**-0.5
    scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    pattern = torch.softmax(torch.cat([scores, sinks.view(1, 4, 1, 1).expand(2, 4, 6, 1)], -1), -1)[..., :-1]
    expected = (pattern @ v.repeat_interleave(2, 1)).transpose(1, 2)
    seen = []
    idle, _ = attention(module, q, k, v, None, scaling=tiny.D_HEAD**-0.5, s_aux=sinks)
    record.observers.append(lambda call: seen.append(call.rows(range(6))))
    record.active = True
    observed_z, _ = attention(module, q, k, v, None, scaling=tiny.D_HEAD**-0.5, s_aux=sinks)
    torch.testing.assert_close(idle, expected)
    torch.testing.assert_close(observed_z, expected)
    torch.testing.assert_close(seen[0], pattern)
