"""What leaves the process: caches are saved, pickled and copied without the model; models are copied, not pickled."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import save_file

import mech
from mech.errors import InputError, MechError, OutputError
from mech.model import HookedMLLM
from mech.model.cache import ActivationCache
from mech.reference import tiny, tiny_processors

PICTURE = tiny_processors.noise(16, 16)
SMALLEST = {"llava": "qwen3_vl", "gemma3": "llava"}  # a model, and one of other sizes


def wrapped(name):
    return HookedMLLM.from_hf(tiny.model(name), tiny_processors.processor(name), name=name)


@pytest.fixture(scope="module")
def model():
    return wrapped("llava")


@pytest.fixture(scope="module")
def cache(model):
    with torch.no_grad():
        return model.run_with_cache(model.inputs("Which digit?", images=[PICTURE]))[1]


def same(one, other):
    assert type(one) is type(other) is ActivationCache and list(one) == list(other)
    assert one.has_batch_dim == other.has_batch_dim
    for name, value in one.items():
        assert torch.equal(value, other[name]) and value.dtype == other[name].dtype


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_cache_comes_back_from_its_file_as_it_was(name, tmp_path):
    model = wrapped(name)
    with torch.no_grad():
        _, cache = model.run_with_cache(model.inputs("Which digit?", images=[PICTURE]))
    path = cache.save(tmp_path / "run.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]
    alone, beside = ActivationCache.load(path), ActivationCache.load(path, model)
    same(cache, alone)
    same(cache, beside)
    assert alone.model.name == name and alone.model.cfg == model.cfg
    assert torch.equal(alone["resid_post", -1], cache["resid_post", -1])
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(alone.decompose_resid(), cache.decompose_resid(), **close)
    parts = cache.decompose_resid(apply_ln=True, layer=None)
    torch.testing.assert_close(beside.decompose_resid(apply_ln=True, layer=None), parts, **close)
    with pytest.raises(MechError, match=r"cache\.model = model"):
        alone.decompose_resid(apply_ln=True)
    alone.model = model
    torch.testing.assert_close(alone.decompose_resid(apply_ln=True), parts, **close)


def test_views_half_precision_and_rows_without_a_batch_are_kept(model, cache, tmp_path):
    first = cache["blocks.0.hook_resid_pre"]
    views = ActivationCache({"whole": first, "half": first[:, :3], "turned": first.transpose(1, 2)}, model)
    same(views, ActivationCache.load(views.save(tmp_path / "views")))
    half = ActivationCache({"z": first.to(torch.bfloat16)[0]}, model, has_batch_dim=False)
    same(half, ActivationCache.load(half.save(str(tmp_path / "half"))))


def test_a_cache_is_pickled_and_copied_and_drags_no_model_along(model, cache):
    held = io.BytesIO()
    torch.save(cache, held)
    weights = sum(parameter.numel() * 4 for parameter in model.hf_model.parameters())
    stored = sum(value.numel() * value.element_size() for value in cache.values())
    assert held.tell() < stored + min(weights, 120_000)
    again = torch.load(io.BytesIO(held.getvalue()), weights_only=False)
    same(cache, again)
    same(cache, pickle.loads(pickle.dumps(cache)))
    assert again.model.name == "llava"
    with pytest.raises(MechError, match="stored without it"):
        again.logit_attrs(again.decompose_resid(), 101)
    copied = copy.deepcopy(cache)
    same(cache, copied)
    assert copied.model is model and copied["hook_embed"].data_ptr() != cache["hook_embed"].data_ptr()
    shallow = copy.copy(cache)
    shallow.cache_dict.pop("hook_embed")
    assert "hook_embed" in cache.cache_dict and shallow.model is model
    assert type(cache.apply_slice_to_batch_dim(0)) is ActivationCache


def test_files_that_hold_no_cache_are_refused(model, cache, tmp_path):
    path = cache.save(tmp_path / "run.safetensors")
    whole = path.read_bytes()
    other = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(2)}, other)
    cut, text = tmp_path / "cut.safetensors", tmp_path / "text.safetensors"
    cut.write_bytes(whole[: len(whole) // 2])
    text.write_text("{}")
    strange = tmp_path / "strange.safetensors"
    save_file({}, strange, {"kind": "mech activation cache 1", "about": '{"cfg": {"layers": 3}}'})
    for wrong in (tmp_path / "none", tmp_path, other, cut, text, strange):
        with pytest.raises(OutputError) as error:
            ActivationCache.load(wrong)
        assert str(error.value).count("\n") == 2
    with pytest.raises(OutputError, match="cannot be written"):
        cache.save(tmp_path / "no folder" / "run.safetensors")
    with pytest.raises(InputError, match="whose sizes differ"):
        ActivationCache.load(path, wrapped("gemma4_large"))


def test_inputs_samples_rankings_results_and_specs_are_pickled_and_copied(model):
    samples = mech.haystacks("grounding", n=3, seed=0)
    reference = mech.HookedMLLM.from_pretrained("reference:llava-s")
    mass = mech.retrieval_attention_mass(reference, samples)
    inputs = model.inputs("Which digit?", images=[PICTURE])
    kept = {
        "inputs": inputs, "layout": inputs.layout, "sample": samples[0], "samples": samples, "mass": mass,
        "ranking": mech.rank_heads(mass), "spec": mech.Ablate(heads=[(1, 0)], to="zero"),
        "metric": mech.LogProb("7"), "ablate": mech.Ablate(heads=[(1, 0)], to="mean", reference=samples),
        "lens": mech.logit_lens(reference, samples[0]),
    }  # fmt: skip
    for name, one in kept.items():
        for again in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
            assert type(again) is type(one) and repr(again) == repr(one), name
    with torch.no_grad():
        assert torch.equal(model(pickle.loads(pickle.dumps(inputs))), model(inputs))


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_deep_copy_of_a_model_is_a_model_of_its_own(name):
    model = wrapped(name)
    inputs = model.inputs("Which digit?", images=[PICTURE])
    with torch.no_grad():
        before = model(inputs)
        copied = copy.deepcopy(model)
        assert torch.equal(copied(inputs), before)
        half = [("blocks.1.hook_resid_post", lambda value, hook: value / 2)]
        hooked = model.run_with_hooks(inputs, fwd_hooks=half)
        assert torch.equal(copied.run_with_hooks(inputs, fwd_hooks=half), hooked) and not torch.equal(hooked, before)
        copied.W_U.zero_()
        assert torch.equal(model(inputs), before) and not copied(inputs).any()
        assert copied.points() == model.points() and copied.name == model.name


def test_a_model_is_not_pickled_but_says_what_to_save(model):
    for keep in (pickle.dumps, copy.copy, lambda one: torch.save(one, io.BytesIO())):
        with pytest.raises(MechError, match="save_pretrained"):
            keep(model)
