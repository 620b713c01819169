"""What a run may be asked: TransformerLens' keywords as they mean there, the model's own tensors, and nothing else."""

import functools

import pytest
import tiny_models
import torch
from tensors import FEW
from transformer_lens.utilities import Slice, lm_cross_entropy_loss

from mech.errors import InputError, PointError
from mech.model import HookedMLLM
from mech.model.points import dims_of
from mech.reference import tiny, tiny_processors

PICTURE = tiny_processors.noise(16, 16)
LAST = f"blocks.{tiny.LAYERS - 1}.hook_resid_post"


opened = functools.cache(tiny_models.opened)


@functools.cache
def batch_of(name):
    """Two rows of different lengths with a picture each."""
    model = opened(name)
    rows = [model.inputs(question, images=[PICTURE]) for question in ("Which digit is in the frame?", "What?")]
    return model.collate(rows)


def fused(point):
    """All points but those that make a layer compute attention step by step, with another rounding."""
    return "scores" not in point and "pattern" not in point


def words_alone():
    """Two rows of text, padded on the left: what TransformerLens knows."""
    ids = torch.randint(100, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def no_forward(monkeypatch):
    def forward(*args, **kwargs):
        raise AssertionError("a forward has run")

    monkeypatch.setattr(opened("llava").hf_model, "forward", forward)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_run_stops_at_a_layer_with_the_stream_that_enters_it(name):
    model, batch = opened(name), batch_of(name)
    streams = [f"blocks.{layer}.hook_resid_pre" for layer in range(tiny.LAYERS)]
    with torch.no_grad():
        _, cache = model.run_with_cache(batch, names_filter=[*streams, LAST])
        streams.append(LAST)
        for stop in range(-tiny.LAYERS, tiny.LAYERS + 1):
            layer = stop if stop >= 0 else tiny.LAYERS + stop
            stream, some = model.run_with_cache(batch, names_filter=fused, stop_at_layer=stop)
            assert torch.equal(stream, cache[streams[layer]])
            ran = {int(point.split(".")[1]) for point in some if point.startswith("blocks.")}
            assert ran == set(range(layer)) and "ln_final.hook_normalized" not in some and "hook_embed" in some
    assert not model.list_hooks() and not any(block._forward_pre_hooks for block in model.hf_model.modules())


def test_hooks_act_on_a_run_that_stops_and_points_behind_it_are_refused(no_forward, monkeypatch):
    model, batch = opened("llava"), batch_of("llava")
    with pytest.raises(PointError, match="stops at layer 1"):
        model.run_with_cache(batch, names_filter=["blocks.1.attn.hook_z"], stop_at_layer=1)
    for options in ({"stop_at_layer": 4}, {"stop_at_layer": True}, {"stop_at_layer": 1.0},
                    {"stop_at_layer": 1, "return_type": "loss"}, {"stop_at_layer": 1, "use_cache": True}):  # fmt: skip
        with pytest.raises(InputError, match="stop_at_layer"):
            model(batch, **options)
    monkeypatch.undo()
    doubled = model.run_with_hooks(
        batch, fwd_hooks=[("blocks.0.hook_resid_post", lambda value, hook: 2 * value)], stop_at_layer=1
    )
    torch.testing.assert_close(doubled, 2 * model(batch, stop_at_layer=1))
    assert torch.isfinite(model(batch)).all()


@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_loss_is_that_of_transformerlens_over_the_tokens_of_text(name):
    model, batch = opened(name), batch_of(name)
    with torch.no_grad():
        text = words_alone()
        if name == "mllama":  # its text stack wants to know that nothing is looked at
            text = batch.tensors
        logits, loss = model(text, return_type="both")
        ids, mask = text["input_ids"], text["attention_mask"]
        each = lm_cross_entropy_loss(logits, ids, mask, per_token=True)
        shown = ids[:, 1:] == model.hf_model.config.image_token_id
        if name != "mllama":
            assert not shown.any()
            torch.testing.assert_close(loss, lm_cross_entropy_loss(logits, ids, mask))
        torch.testing.assert_close(model(text, return_type="loss", loss_per_token=True), each * ~shown)
        assert torch.equal(model(text), logits) and model(text, return_type=None) is None
        seen, with_pictures = model(batch, return_type="both")
        rows = [
            -seen[row, at - 1].log_softmax(-1)[batch.tensors["input_ids"][row, at]]
            for row, layout in enumerate(batch.layouts)
            for at in range(1, len(layout))
            if layout.tokens[at - 1] and batch.tensors["attention_mask"][row, at - 1]
            and batch.tensors["input_ids"][row, at] != model.hf_model.config.image_token_id
        ]  # fmt: skip
        torch.testing.assert_close(with_pictures, torch.stack(rows).mean())


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("where", [-1, (2, 5), [0, 3]], ids=str)
def test_a_cache_of_some_positions_is_a_piece_of_the_whole(name, where):
    model, batch = opened(name), batch_of(name)
    with torch.no_grad():
        _, whole = model.run_with_cache(batch)
        _, some = model.run_with_cache(batch, pos_slice=where)
    assert list(some) == list(whole)
    cut = Slice.unwrap(where)
    for point, value in whole.items():
        dims = dims_of(point).split()
        of_memory = [f"blocks.{layer}.attn.hook_{letter}" for layer in model.cfg.cross_layers for letter in "kv"]
        axis = next((at for at, dim in enumerate(dims) if dim in ("pos", "query_pos")), None)
        if axis is None or point.startswith("vision") or point in of_memory:
            assert torch.equal(some[point], value)
        else:
            assert torch.equal(some[point], cut.apply(value, dim=axis)) and some[point].ndim == value.ndim


@pytest.mark.parametrize("name", FEW)
def test_gradients_in_a_cache_are_those_of_backward_hooks_and_leave_no_other(name):
    model, batch = opened(name), batch_of(name)
    theirs = {}

    def keep(slope, hook):
        theirs[f"{hook.name}_grad"] = slope.clone()

    points = [point for point in model.select(None) if not point.startswith("vision")]
    with model.hooks(bwd_hooks=[(point, keep) for point in points]):
        model(batch, return_type="loss").backward()
    model.hf_model.zero_grad(set_to_none=True)
    loss, cache = model.run_with_cache(batch, names_filter=points, incl_bwd=True, return_type="loss")
    assert {point for point in cache if point.endswith("_grad")} == set(theirs) and loss.ndim == 0
    for point, slope in theirs.items():
        torch.testing.assert_close(cache[point], slope, atol=1e-7, rtol=1e-5)
    assert all(parameter.grad is None for parameter in model.hf_model.parameters())


def test_a_gradient_or_positions_that_are_not_there_are_refused(no_forward):
    model, batch = opened("llava"), batch_of("llava")
    for options, match in (
        ({"incl_bwd": True}, "return_type='loss'"),
        ({"incl_bwd": True, "return_type": "loss", "loss_per_token": True}, "a single loss"),
        ({"pos_slice": 500}, "pos_slice=500"),
        ({"pos_slice": (500, 600)}, "pos_slice"),
        ({"pos_slice": "last"}, "pos_slice='last'"),
        ({"remove_batch_dim": True}, "remove_batch_dim with 2 rows"),
    ):
        with pytest.raises(InputError, match=match):
            model.run_with_cache(batch, **options)
    with pytest.raises(InputError, match="where nothing requires a gradient"), torch.no_grad():
        model.run_with_cache(batch, incl_bwd=True, return_type="loss")


UNKNOWN = {
    "name_filter": "use 'names_filter'",
    "atention_mask": "use 'attention_mask'",
    "pixel_value": "use 'pixel_values'",
    "return_typ": "use 'return_type'",
    "stop_at_layr": "use 'stop_at_layer'",
    "prepend_bos": "mech.inputs.encode",
    "padding_side": "model.collate",
    "start_at_layer": "hook_resid_pre",
    "past_kv_cache": "past_key_values",
    "output_attentions": "hook_pattern",
    "output_hidden_states": "hook_resid_post",
    "labels": "return_type='loss'",
    "return_dict": "leave it out",
    "image_grid_thw": "choose from",
}


@pytest.mark.parametrize("unknown", UNKNOWN)
@pytest.mark.parametrize("run", ["__call__", "run_with_cache", "run_with_hooks"])
def test_keywords_that_nobody_takes_are_refused_with_what_to_use(no_forward, run, unknown):
    model, batch = opened("llava"), batch_of("llava")
    with pytest.raises(InputError, match=unknown) as error:
        getattr(model, run)(batch, **{unknown: [1]})
    assert UNKNOWN[unknown] in str(error.value)
    assert not model.list_hooks()


def test_what_the_model_takes_is_passed_on_and_caching_keywords_are_named(no_forward, monkeypatch):
    model, batch = opened("llava"), batch_of("llava")
    with pytest.raises(InputError, match=r"use model\.run_with_cache"):
        model(batch, names_filter="hook_embed")
    with pytest.raises(InputError, match="'logits', 'loss', 'both' or None"):
        model(batch, return_type="logit")
    with pytest.raises(InputError, match="a loss"):
        model(batch, loss_per_token=True)
    with pytest.raises(InputError, match="logits_to_keep"):
        model(batch, return_type="loss", logits_to_keep=1)
    monkeypatch.undo()
    assert model(batch, logits_to_keep=1, output_attentions=False, labels=None).shape[1] == 1
    _, plain = model.run_with_cache(batch, names_filter="hook_embed", return_cache_object=False)
    assert type(plain) is dict and list(plain) == ["hook_embed"]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_visual_tokens_without_pixels_and_tensors_of_another_length_are_refused(name, monkeypatch):
    model, batch = opened(name), batch_of(name)
    monkeypatch.setattr(model.hf_model, "forward", None)
    tensors = batch.tensors
    blind = {key: value for key, value in tensors.items() if not key.startswith("pixel_values")}
    nan = tensors["pixel_values"].clone()
    nan.flatten()[3] = float("nan")
    short = {**tensors, "attention_mask": tensors["attention_mask"][:, 1:]}
    beyond = tensors["input_ids"].clone()
    beyond[0, -1] = model.hf_model.get_input_embeddings().weight.shape[0]
    below = tensors["input_ids"].clone()
    below[0, -1] = -5
    for given, match in (
        (blind, "no pixel_values"),
        ({**blind, "pixel_value": tensors["pixel_values"]}, "use 'pixel_values'"),
        (short, "attention_mask of shape"),
        ({**tensors, "pixel_values": nan}, "pixel_values with nan"),
        ({**tensors, "input_ids": beyond}, "the token"),
        ({**tensors, "input_ids": below}, "the token -5"),
        ({**tensors, "input_ids": tensors["input_ids"][0]}, r"input_ids of shape"),
        ({**words_alone(), "pixel_values": tensors["pixel_values"]}, "no visual token"),
    ):
        for run in (model, model.generate):
            with pytest.raises(InputError, match=match):
                run(given)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_pictures_that_are_encoded_already_take_the_place_of_pixels(name):
    model, batch = opened(name), batch_of(name)
    with torch.no_grad():
        blind, seen = model.encode_pictures(batch)
        torch.testing.assert_close(model(blind, mm_encoder_outputs=seen), model(batch))
        torch.testing.assert_close(model(batch, mm_encoder_outputs={}), model(batch))
    with pytest.raises(InputError, match="no pixel_values"):
        model(blind)


def test_inputs_of_another_model_are_refused_and_those_of_its_own_processor_are_not():
    llava, qwen = opened("llava"), opened("qwen2_vl")
    for one, other in ((llava, qwen), (qwen, llava), (llava, opened("llava_onevision"))):
        with pytest.raises(InputError, match="inputs of another model"):
            one(other.inputs("What?", images=[PICTURE]))
    with pytest.raises(InputError, match="different models"):
        llava.collate([llava.inputs("What?", images=[PICTURE]), qwen.inputs("What?", images=[PICTURE])])
    again = HookedMLLM.from_hf(tiny.model("llava"), tiny_processors.processor("llava"))
    assert torch.equal(again(batch_of("llava")), llava(batch_of("llava")))
