"""What cannot be used is refused before a forward, with what was given, what was expected and what to do."""

import json
import os
import shutil

import pytest
import torch
from tensors import placeholder, tensors
from transformers import (
    Dinov2Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3MoeConfig,
    VipLlavaConfig,
)

from mech.errors import InputError, MechError, PointError, UnsupportedModel
from mech.inputs import load_processor
from mech.model import HookedMLLM, loading
from mech.model.architectures.families import PartialSupport
from mech.reference import tiny, tiny_processors


@pytest.fixture(scope="module")
def model():
    return HookedMLLM.from_hf(tiny.model("llava"))


@pytest.fixture
def no_forward(model, monkeypatch):
    def forward(*args, **kwargs):
        raise AssertionError("a forward has run")

    monkeypatch.setattr(model.hf_model, "forward", forward)


BATCH = tensors("llava")


def keep(value, hook):
    return value


@pytest.mark.parametrize(
    "use",
    [
        lambda model, name: model.run_with_hooks(BATCH, fwd_hooks=[("blocks.0.attn.hook_q", keep), (name, keep)]),
        lambda model, name: model.run_with_hooks(BATCH, bwd_hooks=[(name, keep)], reset_hooks_end=False),
        lambda model, name: model.run_with_cache(BATCH, names_filter=name),
        lambda model, name: model.run_with_cache(BATCH, names_filter=["blocks.0.attn.hook_q", name]),
        lambda model, name: model.add_hook(name, keep),
        lambda model, name: model.hooks([(name, keep)]).__enter__(),
    ],
    ids=["run_with_hooks", "bwd_hooks", "cache one", "cache list", "add_hook", "hooks"],
)
def test_a_misspelt_point_gets_a_suggestion_before_any_forward(model, no_forward, use):
    with pytest.raises(PointError) as error:
        use(model, "blocks.1.attn.hook_zz")
    assert "no activation point is called 'blocks.1.attn.hook_zz'" in str(error.value)
    assert "Try: use 'blocks.1.attn.hook_z'" in str(error.value)
    assert not model.list_hooks()


def test_layers_behind_the_selected_feature_layer_are_refused_with_the_reason(model, no_forward):
    with pytest.raises(PointError) as error:
        model.run_with_cache(BATCH, names_filter=["vision.blocks.2.hook_resid_post"])
    assert "is not live" in str(error.value) and "the output of vision layer 1" in str(error.value)


def test_filters_that_match_nothing_are_refused(model, no_forward):
    with pytest.raises(PointError, match="matches no activation point"):
        model.run_with_cache(BATCH, names_filter=lambda name: "hook_zz" in name)
    with pytest.raises(PointError, match="matches no activation point"):
        model.run_with_hooks(BATCH, fwd_hooks=[(lambda name: False, keep)])
    with pytest.raises(PointError, match="empty"):
        model.run_with_cache(BATCH, names_filter=[])


def test_a_named_point_that_nothing_passes_is_an_error(model):
    text_only = tensors("llava", ((0, 4),))
    with pytest.raises(PointError, match=r"nothing passed through 'vision\.blocks\.0\.hook_resid_pre'"):
        model.run_with_cache(text_only, names_filter=["vision.blocks.0.hook_resid_pre"])
    _, cache = model.run_with_cache(text_only)
    assert "blocks.0.attn.hook_z" in cache and "vision.blocks.0.attn.hook_z" not in cache


@pytest.mark.parametrize(
    "point", ["attn.hook_q", "attn.hook_rot_k", "attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z",
              "attn.hook_result", "hook_resid_mid", "hook_resid_post", "mlp.hook_post"],
)  # fmt: skip
def test_a_return_of_the_wrong_shape_never_broadcasts(model, point):
    name = f"blocks.1.{point}"
    with pytest.raises(PointError) as error:
        model.run_with_hooks(BATCH, fwd_hooks=[(name, lambda value, hook: value[..., :1])])
    assert f"the hook at {name!r} returned the shape" in str(error.value) and "Expected: (1, " in str(error.value)
    with pytest.raises(PointError, match="returned float"):
        model.run_with_hooks(BATCH, fwd_hooks=[(name, lambda value, hook: 0.0)])
    assert torch.isfinite(model(BATCH)).all()


def test_remove_batch_dim_needs_one_row(model):
    with pytest.raises(InputError, match="remove_batch_dim with 2 rows"):
        model.run_with_cache(tensors("llava", ((1, 3), (1, 3))), remove_batch_dim=True)
    _, cache = model.run_with_cache(BATCH, names_filter="blocks.0.attn.hook_z", remove_batch_dim=True)
    assert cache["blocks.0.attn.hook_z"].ndim == 3


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("absent", ["mm_token_type_ids", "image_grid_thw"])
def test_tensors_that_would_silently_mean_something_else_are_refused(family, absent):
    model, batch = HookedMLLM.from_hf(tiny.model(family)), tensors(family)
    del batch[absent]
    for run in (model, model.generate):
        with pytest.raises(InputError, match=f"pixel_values without {absent}"):
            run(batch)


def test_no_tokens_and_no_processor(model):
    with pytest.raises(InputError, match="no input_ids"):
        model(pixel_values=BATCH["pixel_values"])
    with pytest.raises(InputError, match="inputs of type str"):
        model("What is this?")
    with pytest.raises(InputError, match="has no processor"):
        model.inputs("What is this?")


@pytest.mark.parametrize("other", ["qwen2_5_vl", "llava"])
def test_a_processor_of_another_model_is_refused_at_once(other):
    hf, processor = tiny.model("internvl"), tiny_processors.processor(other)
    with pytest.raises(UnsupportedModel, match=r"belongs to this checkpoint"):
        HookedMLLM.from_hf(hf, processor)
    HookedMLLM.from_hf(hf, tiny_processors.processor("internvl"))


def test_an_unknown_architecture_opens_with_text_points_where_its_layers_are_written_like_known_ones():
    stock = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=50,
                                         num_attention_heads=4, num_key_value_heads=2)).eval()  # fmt: skip
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        before = stock(ids).logits
    with pytest.warns(PartialSupport, match="'llama' has no row(.|\n)*with text points only"):
        model = HookedMLLM.from_hf(stock)
    with torch.no_grad():
        assert torch.equal(model(ids), before)
        edited = model.run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_pattern", lambda value, hook: value * 0)])
    assert not torch.equal(edited, before)
    assert not [name for name in model.points() if name.startswith(("vision.", "projector."))]
    with pytest.raises(InputError, match="has no processor"):
        model.inputs("What is this?")


def test_an_unknown_multimodal_architecture_takes_raw_tensors():
    config = VipLlavaConfig(
        vision_config=tiny.MODELS["llava"]().vision_config, text_config=tiny.MODELS["llava"]().text_config,
        image_token_index=placeholder("llava"), vision_feature_layers=[-2, 1],
    )  # fmt: skip
    hf_model = tiny.build(config)
    with torch.no_grad():
        before = hf_model(**BATCH).logits
        with pytest.warns(PartialSupport, match="'vipllava' has no row"):
            model = HookedMLLM.from_hf(hf_model)
        assert torch.equal(model(BATCH), before)
        _, cache = model.run_with_cache(BATCH)
    block = "blocks.1.hook_resid_"
    torch.testing.assert_close(cache[block + "mid"], cache[block + "pre"] + cache["blocks.1.hook_attn_out"])


def test_an_unknown_text_model_in_a_known_architecture_opens_with_all_points():
    config = tiny.MODELS["llava"]()
    text = {**config.text_config.to_dict(), "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config.text_config = Qwen3MoeConfig(**{key: value for key, value in text.items() if key != "model_type"})
    with pytest.warns(PartialSupport, match="the text model 'qwen3_moe' of this 'llava' model has no row"):
        model = HookedMLLM.from_hf(tiny.build(config))
    assert "vision.blocks.0.attn.hook_z" in model.points()
    with pytest.raises(PointError, match="mixture of experts"):
        model.select("blocks.0.mlp.hook_post")


def test_an_unknown_architecture_written_otherwise_gets_the_recipe():
    text = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=10))
    with pytest.raises(UnsupportedModel) as error:
        HookedMLLM.from_hf(text)
    assert "no family row for the architecture 'gpt2'" in str(error.value)
    assert "add a Row" in str(error.value) and "mech/model/architectures/rows.py" in str(error.value)


def test_a_known_family_over_an_unknown_tower_opens_without_vision_points():
    config = tiny.MODELS["llava"]()
    vision = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=16, patch_size=4)
    made = LlavaForConditionalGeneration(LlavaConfig(text_config=config.text_config, vision_config=vision))
    with pytest.warns(PartialSupport, match="the vision tower 'dinov2' of this 'llava' model has no row"):
        model = HookedMLLM.from_hf(made)
    assert "projector.hook_out" in model.points() and "blocks.0.attn.hook_z" in model.points()
    assert not [name for name in model.points() if name.startswith("vision.")]


# -- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny.model("llava").save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        HookedMLLM.from_pretrained(tmp_path / "absent")


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"has no config\.json"):
        HookedMLLM.from_pretrained(tmp_path)


def test_a_missing_shard(folder):
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    with pytest.raises(UnsupportedModel, match=f"lacks 1 of {len(shards)} weight files, first '{shards[1].name}'"):
        HookedMLLM.from_pretrained(folder)


@pytest.mark.parametrize("left", [0, 4, 20, -1])
def test_a_shard_that_was_cut_off(folder, left):
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:left])
    with pytest.raises(UnsupportedModel, match=rf"{shard.name} is cut off"):
        HookedMLLM.from_pretrained(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_a_json_file_that_was_cut_off(folder, file):
    path = folder / file
    path.write_text(path.read_text()[:40])
    with pytest.raises(UnsupportedModel, match=rf"{file} is cut off"):
        HookedMLLM.from_pretrained(folder)


DEEP = "[" * 100_000
MALFORMED = [
    *[("config.json", text) for text in ("[1]", "3", '"llava"', "null", DEEP, '{"a":' * 80 + "1" + "}" * 80, "\xff")],
    *[("model.safetensors.index.json", text) for text in ("[1]", "{}", '{"weight_map": 3}', DEEP)],
    *[("model.safetensors.index.json", json.dumps({"weight_map": {"a": name}})) for name in (3, "../x", "/etc/passwd")],
    ("generation_config.json", "[1]"),
    ("generation_config.json", '{"max_length": "x"'),
]


@pytest.mark.parametrize(("file", "text"), MALFORMED)
def test_a_file_that_is_not_what_it_is_called(folder, file, text):
    (folder / file).write_text(text, encoding="latin-1")
    with pytest.raises(UnsupportedModel, match=file):
        HookedMLLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("model_type", ["llava"]),
        ("model_type", {"a": 1}),
        ("text_config", 5),
        ("text_config", ["llama"]),
        ("text_config.hidden_size", "big"),
        ("text_config.hidden_size", -64),
        ("text_config.num_attention_heads", 0),
        ("text_config.num_attention_heads", 3),
        ("text_config.num_hidden_layers", 10**9),
        ("text_config.num_hidden_layers", None),
        ("text_config.vocab_size", -1),
        ("text_config.rope_parameters", {"rope_type": "no such"}),
        ("vision_config.patch_size", 0),
        ("vision_config.num_hidden_layers", "two"),
        ("image_token_index", "x"),
        ("vision_feature_layer", "last"),
        ("dtype", "float3"),
        ("auto_map", {"AutoConfig": "code.Config"}),
    ],
)
def test_a_config_that_contradicts_itself(folder, entry, value):
    """Refused, or opened where transformers does not need the entry; no error of another kind."""
    config = json.loads((folder / "config.json").read_text())
    inner = config
    *parts, last = entry.split(".")
    for part in parts:
        inner = inner[part]
    inner[last] = value
    (folder / "config.json").write_text(json.dumps(config))
    try:
        model = HookedMLLM.from_pretrained(folder)
    except MechError as error:
        assert isinstance(error, UnsupportedModel) and error.expected
    else:
        assert entry in ("image_token_index", "vision_feature_layer", "auto_map"), model


@pytest.mark.parametrize("header", [b"[1]", b"{}", b'{"a": 1}', b'{"a": {"data_offsets": [0, "x"]}}', b"[" * 10**5])
def test_a_shard_whose_header_is_none(folder, header):
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UnsupportedModel, match=shard.name if header != b"{}" else "no weights for"):
        HookedMLLM.from_pretrained(folder)


def test_a_pipe_is_no_file_of_a_checkpoint(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(UnsupportedModel, match=r"has no config\.json"):  # and nothing waits for somebody to write
        HookedMLLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[1]"),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'),
        ("processor_config.json", "[1]"),
        ("processor_config.json", DEEP),
        ("processor_config.json", '{"image_processor": 3}'),
        ("processor_config.json", '{"image_processor": {"image_processor_type": 3}}'),
        ("processor_config.json", '{"image_processor": {"image_processor_type": "None"}}'),
        ("preprocessor_config.json", "[1]"),
        ("chat_template.jinja", "{% if %}"),
    ],
)
def test_a_processor_that_is_malformed(tmp_path, file, text):
    """Refused when it is needed, or not read where another file says the same; no error of another kind."""
    model = HookedMLLM.from_pretrained("reference:llava-s")
    folder = shutil.copytree(loading.resolve("reference:llava-s"), tmp_path / "model")
    (folder / file).write_text(text)
    try:
        load_processor(folder, model.hf_model.config)
    except MechError as error:
        assert isinstance(error, UnsupportedModel) and error.expected
    else:
        assert file in ("preprocessor_config.json", "chat_template.jinja")


def test_weights_in_another_format_are_not_opened(folder):
    for shard in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        shard.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match="other weight formats are not opened"):
        HookedMLLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "size, more, message",
    [
        ("num_hidden_layers", -1, r"no place for 9 of its weights, first 'model\.language_model\.layers\.2"),
        ("num_hidden_layers", 1, r"no weights for 9 parameters, first 'model\.language_model\.layers\.3"),
        ("intermediate_size", 8, r"weights of .* cannot be opened"),
    ],
)
def test_weights_that_are_absent_or_of_other_shapes_are_not_filled_with_random_ones(folder, size, more, message):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][size] += more
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=message):
        HookedMLLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "kind, message", [("llama", "not a model of images and text"), ("martian", "cannot be opened")]
)
def test_an_unsupported_checkpoint_is_refused_before_its_weights_are_read(folder, kind, message, monkeypatch):
    from transformers import AutoModelForImageTextToText

    def opened(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", opened)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UnsupportedModel, match=message) as error:
        HookedMLLM.from_pretrained(folder)
    assert "add a Row" in str(error.value)


def test_a_hub_id_that_cannot_be_reached(monkeypatch):
    from transformers import AutoConfig

    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to the hub\nand so on")

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(UnsupportedModel, match="We couldn't connect to the hub") as error:
        HookedMLLM.from_pretrained("owner/model")
    assert "check the name and the network" in str(error.value)


def test_quantization_is_refused_where_it_cannot_be(folder, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"quantization='4bit' without bitsandbytes(.|\n)*pip install 'mech\[quant\]'"):
        HookedMLLM.from_pretrained(folder, quantization="4bit")
    with pytest.raises(InputError, match="quantization='2bit'"):
        HookedMLLM.from_pretrained(folder, quantization="2bit")
    with pytest.raises(InputError, match="device and device_map"):
        HookedMLLM.from_pretrained(folder, device="cpu", device_map="auto")


def test_quantized_heads_are_not_told_apart():
    hf_model = tiny.model("llava")
    o = hf_model.model.language_model.layers[1].self_attn.o_proj
    o.weight = torch.nn.Parameter(o.weight.detach().to(torch.int8), requires_grad=False)
    model = HookedMLLM.from_hf(hf_model)
    with pytest.raises(PointError, match="W_O is quantized"):
        model.select("blocks.1.attn.hook_result")
    assert model.blocks[1].attn.W_O is None and model.blocks[0].attn.W_O.shape == (4, 8, 32)
    assert "blocks.1.attn.hook_z" in model.points()


def test_dtype_and_device_map(folder):
    half = HookedMLLM.from_pretrained(folder, dtype=torch.bfloat16, device="cpu")
    assert half.dtype == torch.bfloat16
    mapped = HookedMLLM.from_pretrained(folder, device_map="cpu")
    assert torch.equal(mapped(BATCH), HookedMLLM.from_pretrained(folder, device="cpu")(BATCH))
