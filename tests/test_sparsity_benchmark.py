"""The experiment on training for sparsity runs from end to end: a run is trained, resumed, measured and shipped."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mech
from mech import reference
from mech.sparse.training.compared import MEASURES

ROOT = Path(__file__).parent.parent


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import sparsity
    import sparsity_measures

    small = replace(sparsity.SIZES["llava-s"], steps=3, batch=2)
    monkeypatch.setattr(sparsity, "SIZES", {"llava-s": small})
    for name, value in (("N_FIND", 6), ("N_TEST", 6), ("N_CAUSAL", 4), ("N_CIRCUIT", 2), ("COUNTS", (0, 1, 48))):
        monkeypatch.setattr(sparsity_measures, name, value)
    return sparsity


@pytest.mark.slow
def test_a_run_is_trained_measured_and_shipped(scripts, tmp_path, monkeypatch):
    scripts.train("llava-s", "0", "constrained 0.1", tmp_path)
    folder = tmp_path / scripts.run_name("llava-s", "0", "constrained 0.1")
    record = json.loads((folder / "run.json").read_text())
    assert record["curve"][-1]["step"] == 3 and len(record["log_alpha"]) == 6
    trained = load_file(folder / "weights.safetensors")
    assert all("language_model.layers" in name for name in trained)
    monkeypatch.setattr(scripts, "training_of", lambda *_: pytest.fail("it is there"))
    scripts.train("llava-s", "0", "constrained 0.1", tmp_path)

    scripts.measure(folder, tmp_path / "sparsity.json")
    (facts,) = json.loads((tmp_path / "sparsity.json").read_text())["runs"].values()
    assert facts["needed"]["ram"]["n"] in (0, 1, 48) and facts["accuracy"]["pages"]["mean"] > 0.5
    # Four samples cannot tell that a single head matters.
    unknown = {measure.name for measure in MEASURES if "80%" not in measure.name and measure.of(facts) is None}
    assert unknown == {"heads that are causal but do not attend"}

    shipped = tmp_path / "weights"
    (shipped / "llava-s").parent.mkdir()
    (shipped / "llava-s").symlink_to(reference.FOLDER / "llava-s")
    monkeypatch.setattr(scripts, "FOLDER", shipped)
    monkeypatch.setattr(scripts, "held_out_accuracy", lambda *_: 1.0)
    monkeypatch.setattr(scripts, "haystacks", lambda domain, n, seed, **given: mech.haystacks(domain, 2, seed, **given))
    scripts.ship("llava-s", "0", "constrained 0.1", tmp_path, "toy-sparse", tmp_path / "sparsity.json")
    monkeypatch.setattr(reference, "FOLDER", shipped)
    twin, origin = (mech.HookedMLLM.from_pretrained(f"reference:{name}") for name in ("toy-sparse", "llava-s"))
    before = dict(origin.hf_model.named_parameters())
    for name, value in twin.hf_model.named_parameters():
        assert torch.equal(value, trained[name].float() if name in trained else before[name]), name
    assert mech.Policy.from_json(reference.card("toy-sparse")["policy"]).window == 16
    assert reference.revisions("toy-sparse") == () and twin.name == "reference:toy-sparse"
