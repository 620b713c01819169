"""Every law holds for every family, and every law can fail: a model that is broken on purpose is found out by name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from laws import broken, failures, wrapped
from torch.utils.hooks import RemovableHandle
from transformers.masking_utils import AttentionMaskInterface

from mech.model import HookedMLLM, attention, hook_sites
from mech.model.architectures.rows import ROWS
from mech.model.check.laws import LAWS, make_batches
from mech.model.check.run import CALLED, check, family_table
from mech.model.check.running import unwrapping
from mech.reference import tiny

README = Path(__file__).parents[2] / "README.md"
# What has no meaning for a family, by the first word of the place; whatever else is left out is a failure.
INAPPLICABLE = {"llava_next": {"hook_embed"}, "llava_onevision": {"hook_embed"}, "mllama": {"hook_embed"}}


@pytest.fixture(scope="module", params=tiny.NAMES)
def bench(request):
    model = wrapped(request.param)
    return model, make_batches(model)


@pytest.mark.slow
@pytest.mark.parametrize("law", [*LAWS.values(), unwrapping], ids=lambda law: law.__name__)
def test_the_law_holds(bench, law):
    model, batches = bench
    with torch.no_grad():
        found = list(law(model, batches))
    assert found and not [f"{one.where}: {one.says}" for one in found if not one.ok and one.ok is not None]
    left_out = {one.where.split(":")[0] for one in found if one.ok is None}
    assert left_out <= INAPPLICABLE.get(model.name, set())


def test_a_dead_point_is_named(monkeypatch):
    attach = hook_sites.HookSite.attach
    dead = "blocks.2.hook_attn_out"
    nowhere = torch.nn.Identity()
    monkeypatch.setattr(
        hook_sites.HookSite,
        "attach",
        lambda site, point: attach(replace(site, module=nowhere) if site.point == dead else site, point),
    )
    for law in ("names", "liveness"):
        assert [one.where for one in failures(LAWS[law], wrapped())] == [dead]


def test_a_point_at_another_module_is_found():
    model = wrapped()
    layers = model.hf_model.model.language_model.layers
    broken(model, "blocks.2.attn.hook_z", module=layers[2].mlp.gate_proj)
    assert any("blocks.2.attn.hook_z" in one.where for one in failures(LAWS["meaning"], model))
    broken(model, "blocks.2.hook_attn_out", module=layers[0].self_attn)
    assert any("blocks.2.hook_resid_mid" in one.where for one in failures(LAWS["meaning"], model))


def test_a_stream_point_that_misses_the_skip_connection_is_found():
    found = failures(LAWS["meaning"], broken(wrapped(), "blocks.2.hook_resid_mid", side="in"))
    assert [one.where.split(":")[0] for one in found] == ["blocks.2.hook_resid_mid"]
    assert found[0].deviation > 1e-3 and f"{found[0].deviation:.1e}" in found[0].says


def test_explicit_attention_that_is_not_the_fused_one_is_found(monkeypatch):
    softmax = attention.softmax
    monkeypatch.setattr(attention, "softmax", lambda scores: softmax(1.01 * scores))
    found = failures(LAWS["parity"], wrapped())
    assert found and all("inside attention" in one.where for one in found)


def test_ignored_padding_is_found(monkeypatch):
    masks = AttentionMaskInterface._global_mapping
    monkeypatch.setitem(masks, attention.IMPLEMENTATION, lambda *args, **options: None)
    assert any("padded on the left" in one.where for one in failures(LAWS["padding"], wrapped()))
    assert any("idle logits, padded batch" in one.where for one in failures(LAWS["parity"], wrapped()))


def test_hooks_that_do_not_act_on_new_tokens_are_found(monkeypatch):
    fire = hook_sites.fire

    def skips(point, value):
        return value if value.shape[1] == 1 and "hook_z" in point.name else fire(point, value)

    monkeypatch.setattr(hook_sites, "fire", skips)
    assert any("final states" in one.where for one in failures(LAWS["generation"], wrapped()))


def test_hooks_left_behind_are_found(monkeypatch):
    model = wrapped()
    monkeypatch.setattr(RemovableHandle, "remove", lambda handle: None)
    found = failures(LAWS["cleanliness"], model)
    assert any("torch hooks" in one.says for one in found)


def test_a_layout_that_is_transposed_is_found():
    model = wrapped()
    inputs = type(model).inputs

    def turned(*args, **options):
        made = inputs(model, *args, **options)
        if len(made.layout.images) != 1:
            return made
        visual, rect = made.layout.positions("image"), made.layout.rect.copy()
        rect[visual] = rect[visual].reshape(4, 4, 4).swapaxes(0, 1).reshape(-1, 4)
        return replace(made, layouts=(replace(made.layout, rect=rect),))

    model.inputs = turned
    assert any(one.where.startswith("impulse") for one in failures(LAWS["geometry"], model))


def test_an_attention_implementation_that_is_not_restored_is_found(monkeypatch):
    assert not failures(unwrapping, wrapped())
    model = wrapped()
    monkeypatch.setattr(model.hf_model, "set_attn_implementation", lambda names: None)
    assert any("attention implementation" in one.where for one in failures(unwrapping, model))


def test_a_law_that_raises_fails_and_the_others_are_still_tried():
    model = wrapped()
    model.generate = lambda *args, **options: 1 / 0
    report = check(model)
    assert not report.ok and {law for law, _ in report.failures()} == {"generation", "cleanliness"}
    assert "ZeroDivisionError" in str(report) and report.cell("parity").startswith("ok")


def test_a_model_that_was_given_wrapped_stays_wrapped_and_one_without_processor_is_tried_on_text():
    model = HookedMLLM.from_hf(tiny.model("llava"))
    report = check(model)
    assert report.ok and report.cell("geometry") == "n/a" and "no processor" in str(report)
    model({"input_ids": torch.tensor([[5, 6]])})


def test_the_command_prints_a_table_and_json(mech, monkeypatch, tmp_path):
    monkeypatch.setattr(tiny, "NAMES", ("llava",))
    code, out, _ = mech("check", "--all", "-q")
    assert code == 0 and out.splitlines()[2].split()[:2] == ["llava", "ok"]
    assert all(law in out.splitlines()[1] for law in (*LAWS, "unwrapping"))
    model = wrapped()
    model.hf_model.save_pretrained(tmp_path)
    model.processor.tokenizer.save_pretrained(tmp_path)
    model.processor.image_processor.save_pretrained(tmp_path)
    code, out, _ = mech("check", str(tmp_path), "--json")
    (report,) = json.loads(out)
    assert code == 0 and report["ok"] and report["family"] == "llava" and report["failures"] == []


def test_the_command_fails_with_the_point_that_fails(mech, monkeypatch):
    monkeypatch.setattr(tiny, "NAMES", ("llava",))
    monkeypatch.setattr(attention, "softmax", lambda scores: torch.softmax(1.01 * scores, -1))
    code, out, _ = mech("check", "--all", "-q")
    assert code == 1 and "llava: parity FAILED at logits with the points inside attention" in out
    assert mech("check", "somewhere/else", "--all")[0] == 2


def test_the_readme_names_every_family(mech):
    assert mech("check")[1].strip() == family_table()
    text = " ".join(README.read_text(encoding="utf-8").split())
    assert all(CALLED[kind] in text for kind in ROWS) and f"| {len(ROWS)} `model_type`s" in text
