"""Models that people rebuild, wrap twice, spread, offload or put into something: the same numbers, or a refusal."""

import copy
import gc

import accelerate
import pytest
import torch
from tensors import tensors
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from mech.errors import UnsupportedModel
from mech.model import HookedMLLM
from mech.model.architectures.families import family_of, layers_of, part_at
from mech.model.check.laws import make_batches
from mech.model.check.points import liveness, names
from mech.model.check.projections import weights
from mech.model.check.trial import apart
from mech.model.hook_sites import attention_of
from mech.reference import tiny, tiny_processors


def wrapped(hf, name="llava"):
    return HookedMLLM.from_hf(hf, tiny_processors.processor(name), name=name)


def failures(model, *laws):
    with torch.no_grad():
        batches = make_batches(model)
        return [f"{one.where}: {one.says}" for law in laws for one in law(model, batches) if one.ok is False]


def projections(hf):
    """Every (module, name of a linear child) that a point of either stack is at."""
    family = family_of(hf)
    for stack in (family.text, family.vision):
        for layer in layers_of(hf, stack):
            attn, mlp = attention_of(layer, stack), getattr(layer, stack.mlp)
            for owner, path in ((attn, stack.q), (attn, stack.v), (attn, stack.o), (mlp, stack.down)):
                *above, last = path.split(".")
                owner = part_at(owner, ".".join(above)) if above else owner
                if type(getattr(owner, last, None)) is nn.Linear:
                    yield owner, last


def quantized():
    """A linear layer of which only whole numbers are kept."""
    linear = nn.Linear(32, 32, bias=False)
    linear.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    return linear


# -- rebuilt after wrapping -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.NAMES)
def test_points_are_found_anew_where_linears_were_replaced(name):
    hf = tiny.model(name)
    model = wrapped(hf, name)
    torch.manual_seed(0)
    for owner, path in list(projections(hf)):
        old = getattr(owner, path)
        setattr(owner, path, copy.deepcopy(old))
        getattr(owner, path).weight.data.mul_(torch.rand(old.out_features, 1) + 0.5)
    assert not failures(model, names, weights)


def test_resized_embeddings_stay_live():
    for name in ("llava", "mllama"):
        hf = tiny.model(name)
        model = wrapped(hf, name)
        more = hf.get_input_embeddings().num_embeddings + 8
        hf.resize_token_embeddings(more, mean_resizing=False)
        assert not failures(model, names, weights)
        assert (
            len(model.W_E) == more and model.cfg.vocab == model.W_U.shape[1] == hf.config.get_text_config().vocab_size
        )


def test_an_attention_module_that_was_swapped_is_listened_to():
    hf, batch = tiny.model("llava"), tensors("llava")
    model = wrapped(hf)
    layer = hf.model.language_model.layers[1]
    layer.self_attn = copy.deepcopy(layer.self_attn)
    layer.self_attn.config = hf.model.language_model.config
    layer.self_attn.o_proj.weight.data.mul_(2)
    assert not failures(model, names, weights, liveness)
    patterns = []
    with model.attending(lambda call: patterns.append(call.layer)):
        model(batch)
    assert patterns == [0, 1, 2]
    other = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    layer.self_attn = LlamaAttention(other, 1)
    with pytest.raises(UnsupportedModel, match="the new ones run another attention"):
        model(batch)


@pytest.mark.parametrize(
    "rebuild, says",
    [
        (lambda text: text.layers.__delitem__(2), "'blocks.2.attn.hook_attn_scores' is gone"),
        (lambda text: setattr(text.layers[1].self_attn, "o_proj", nn.Linear(64, 32)), "of another size"),
        (lambda text: setattr(text.layers[1].self_attn, "o_proj", nn.Identity()), "replaced by others"),
        (
            lambda text: setattr(text.layers[1].self_attn, "o_proj", quantized()),
            "is gone: layer 1: W_O is quantized",
        ),
    ],
    ids=["a layer less", "another size", "no linear", "quantized"],
)
def test_models_that_lost_a_point_are_refused_before_a_forward(rebuild, says, monkeypatch):
    hf, batch = tiny.model("llava"), tensors("llava")
    model = wrapped(hf)
    rebuild(hf.model.language_model)
    monkeypatch.setattr(hf, "forward", lambda *args, **kwargs: pytest.fail("a forward has run"))
    for run in (model, model.generate):
        with pytest.raises(UnsupportedModel, match=says) as error:
            run(batch)
        assert "unwrap() before you rebuild it" in str(error.value)


def test_a_projection_that_is_no_linear_map_is_refused_where_heads_are_told_apart():
    hf, batch = tiny.model("llava"), tensors("llava")
    model = wrapped(hf)

    class Bent(nn.Linear):
        def forward(self, x):
            return super().forward(x).relu()

    hf.model.language_model.layers[1].self_attn.o_proj = Bent(32, 32)
    seen = model.run_with_cache(batch, names_filter="blocks.1.attn.hook_z")[1]["blocks.1.attn.hook_z"]
    assert seen.shape[-2:] == (4, 8)
    for ask in (lambda: model.W_O, lambda: model.run_with_cache(batch, names_filter="blocks.1.attn.hook_result")):
        with pytest.raises(UnsupportedModel, match="a Bent, which is not a linear map"):
            ask()


def test_an_unchanged_model_is_not_wired_anew(monkeypatch):
    from mech.model import hook_sites

    model = wrapped(tiny.model("llava"))
    monkeypatch.setattr(hook_sites, "offered", lambda *args: pytest.fail("wired anew"))
    model(tensors("llava"))


# -- wrapped twice --------------------------------------------------------------------------------------------------


def chosen(hf):
    config = hf.config
    return [part._attn_implementation for part in (config, config.text_config, config.vision_config)]


@pytest.mark.parametrize("name", ["llava", "paligemma2", "qwen3_vl"])
@pytest.mark.parametrize("stock", ["eager", "sdpa"])
def test_unwrap_gives_back_what_was_there_before_the_first_wrapping(name, stock):
    hf = tiny.model(name)
    hf.set_attn_implementation({"text_config": "eager", "vision_config": stock})
    before = chosen(hf)
    first = wrapped(hf, name)
    with pytest.raises(UnsupportedModel, match="already wrapped"):
        wrapped(hf, name)
    del first
    gc.collect()
    assert chosen(hf) == before  # dropped without unwrap()
    second = wrapped(hf, name)
    assert second.unwrap() is hf and chosen(hf) == before
    third = wrapped(hf, name)
    second.unwrap()  # again: it holds nothing any more
    third.inputs("What?")
    with torch.no_grad():
        third(third.inputs("What?"))
        third.unwrap()
        out = hf(**wrapped(tiny.model(name), name).inputs("What?").tensors, output_attentions=True)
    assert all(pattern is not None and pattern.ndim == 4 for pattern in out.attentions)


def test_models_of_one_config_do_not_switch_each_other_back():
    hf = tiny.model("llava")
    before = chosen(hf)
    first, second = wrapped(hf), wrapped(type(hf)(hf.config).eval())
    inputs = first.inputs("What?")
    expected = first(inputs)
    del second
    gc.collect()
    assert first(inputs).equal(expected)
    third = wrapped(type(hf)(hf.config).eval())
    third.unwrap()
    assert first(inputs).equal(expected)
    first.unwrap()
    assert chosen(hf) == before


def test_what_somebody_chose_after_the_wrapper_was_dropped_stays():
    hf = tiny.model("llava")
    model = wrapped(hf)
    hf.set_attn_implementation("eager")
    del model
    gc.collect()
    assert chosen(hf) == ["eager"] * 3


def test_a_copy_of_a_wrapped_model_can_be_wrapped_and_is_sdpa_afterwards():
    model = wrapped(tiny.model("llava"))
    again = wrapped(copy.deepcopy(model.hf_model))
    assert torch.equal(again(tensors("llava")), model(tensors("llava")))
    assert chosen(again.unwrap()) == ["sdpa"] * 3


# -- offloaded ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "llava_phi3", "internvl", "mllama", "gemma4", "qwen3_5"])
def test_offloaded_layers_give_what_they_give_in_memory(name):
    hf, there = tiny.model(name), wrapped(tiny.model(name), name)
    for layer in layers_of(hf, there.family.text):
        accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
    model = wrapped(hf, name)
    assert not failures(model, weights)
    batch = there.inputs("What is shown here?")
    layer = there.cfg.attention_layers[-1]
    assert any(parameter.is_meta for parameter in hf.parameters())
    torch.testing.assert_close(model.blocks[layer].attn.W_O, there.blocks[layer].attn.W_O)
    name = f"blocks.{layer}.attn.hook_result"
    if layer not in model.cfg.cross_layers:  # they run with pictures alone
        with torch.no_grad():
            halved = [m.run_with_hooks(batch, fwd_hooks=[(name, lambda v, hook: v * 0.5)]) for m in (model, there)]
        assert apart(*halved) < 1e-5


@pytest.mark.parametrize("offload", [accelerate.cpu_offload, accelerate.disk_offload])
def test_a_wholly_offloaded_model(offload, tmp_path):
    hf, there, batch = tiny.model("llava"), wrapped(tiny.model("llava")), tensors("llava")
    offload(hf, *([tmp_path] if offload is accelerate.disk_offload else []), execution_device=torch.device("cpu"))
    model = wrapped(hf)
    assert model.device == torch.device("cpu")
    assert torch.equal(model(batch), there(batch)) and not failures(model, names, weights)
    torch.testing.assert_close(model.W_U, there.W_U)
    assert torch.equal(model.W_E, there.W_E)


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        hf = tiny.build(tiny.MODELS["llava"]())
    with pytest.raises(UnsupportedModel, match="is on the meta device, and nothing loads it"):
        HookedMLLM.from_hf(hf)


# -- inside of something --------------------------------------------------------------------------------------------


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_data_parallel_models_are_opened_and_given_back(group):
    hf, batch = tiny.model("llava"), tensors("llava")
    with torch.no_grad():
        expected = hf(**batch).logits
    for around in (nn.parallel.DistributedDataParallel(hf), nn.DataParallel(hf)):
        model = wrapped(around)
        assert torch.equal(model(batch), expected) and model.hf_model is hf
        assert model.unwrap() is around
    assert not failures(wrapped(hf), names)


def test_sharded_models_are_refused(group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sharded = fully_shard(tiny.model("llava"), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(UnsupportedModel, match="whose weights are spread over processes"):
        HookedMLLM.from_hf(sharded)
