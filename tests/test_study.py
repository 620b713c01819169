"""The study, end to end on a small scale: complete, resumable to the same bytes of numbers, refusing early."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import mech
from mech import study as module
from mech.data.haystacks import haystacks
from mech.data.regions import Box
from mech.data.samples import Samples
from mech.errors import ExperimentError, InputError, OutputError, UnsupportedModel
from mech.results import Study
from mech.settings import default_domains, default_settings
from mech.study import DEFAULT_MODELS, Settings, longest, study

SMALL = Settings(
    n_find=6, n_test=6, n_maps=1, n_causal=2, n_gating=2, n_random=2, fractions=(1, 0.05), other_fractions=(0.05,),
    shares=(0.05,), n_other=4, n_order=6, n_sets=2, n_long=12, batch_size=6,
)  # fmt: skip
WHAT = dict(models=["reference:llava-s"], domains=["grounding", "documents"], settings=SMALL)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return study(folder, **WHAT)


def numbers(folder):
    summary = json.loads((folder / "summary.json").read_text())
    return {key: summary[key] for key in ("models", "scales", "findings")} | {"sparse": unmeasured(summary)}


def unmeasured(summary):
    """The sparse section without what was timed: that is of its moment."""
    timed = ("speed", "recommended")
    return {m: {k: v for k, v in facts.items() if k not in timed} for m, facts in summary["acceleration"].items()}


def test_a_study_leaves_results_a_summary_and_a_report(finished):
    folder = finished.parent
    assert finished.name == "report.html" and finished.stat().st_size > 800_000
    place = Study(folder)
    for domain in WHAT["domains"]:
        assert all(place.done(f"llava-s/{domain}/{kind}") for kind in ("ram", "ablation", "maps", "scores", "causal"))
    effects = place.get("llava-s/grounding/ablation")
    assert set(effects["method"].values) == {"none", "mean", "zero", "resample", "uniform", "paper"}
    assert (effects["band"] == "by vision_mass").sum() == 1 and "vision heads" in finished.read_text()
    facts = json.loads((folder / "summary.json").read_text())["models"]["llava-s"]
    assert len(facts["domains"]["grounding"]["ranking"]) == facts["n_layers"] * facts["n_heads"] == 48
    assert facts["agreement"]["domains"] == ["grounding", "documents"]
    assert sum(map(len, facts["domains"]["grounding"]["causal"]["quadrants"].values())) == 48
    assert finished.read_text().count("Does attention imply causal effect?") == 2
    assert finished.read_text().count("Do other published scores name the same heads?") == 2
    agreed = facts["domains"]["grounding"]["scores"]
    assert len(agreed["names"]) == len(agreed["spearman"]) == 13
    assert {"gaze", "contrastive", "facilitating", "interfering"} <= set(agreed["names"])
    assert agreed["jaccard_low"][0][1] <= agreed["jaccard"][0][1] <= agreed["jaccard_high"][0][1]
    record = mech.HeadRecord.from_json(folder / "llava-s/grounding/heads.json")
    assert set(record.scores) == {*agreed["names"], "gating"} - {"facilitating", "interfering"}
    assert record.ranking("ram").top(3) == mech.rank_heads(place.get("llava-s/grounding/ram")).top(3)
    assert 0 < record.scores["ram"].null["even"].max() < record.scores["ram"].ranking.mean.max()
    maps = place.get("llava-s/grounding/maps")
    assert (maps["shown_band"] == "tenth").sum() == 10 and "sink" in maps and 'class="tenths"' in finished.read_text()
    sparse = json.loads((folder / "summary.json").read_text())["acceleration"]["llava-s"]
    assert all(point["heads"].startswith("L") for point in sparse["curve"] if point["choice"] == "ram")
    assert sparse["domain"] in WHAT["domains"] and sparse["speed"] and 'id="sparse"' in finished.read_text()
    find, test = (set(place.get(f"llava-s/grounding/{kind}")["example"].values) for kind in ("ram", "ablation"))
    assert find | test == {sample.id for sample in haystacks("grounding", 12, SMALL.seed)}
    assert len(find) == len(test) == 6


def test_a_killed_study_goes_on_and_ends_in_the_same_numbers(finished, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    calls = []

    def dying(what, done, total):
        calls.append(what)
        if len(calls) == 17:
            raise Killed

    with pytest.raises(Killed):
        study(tmp_path, progress=dying, **WHAT)
    assert not (tmp_path / "summary.json").exists()
    counted, measure = [], module.retrieval_attention_mass
    monkeypatch.setattr(module, "retrieval_attention_mass", lambda *a, **o: (counted.append(1), measure(*a, **o))[1])
    study(tmp_path, **WHAT)
    assert len(counted) == 1  # that of the domain that had not begun
    ours, theirs = numbers(tmp_path), numbers(finished.parent)
    for found in (ours, theirs):
        found["findings"] = [f for f in found["findings"] if f["kind"] not in ("faster", "slower")]
    assert ours == theirs
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nc")}
    damaged = {tmp_path / "llava-s" / name for name in damage(tmp_path / "llava-s")}
    study(tmp_path, **WHAT)
    assert {path for path in before if path.stat().st_mtime_ns != before[path]} == damaged  # and nothing else anew
    assert numbers(tmp_path)["models"] == theirs["models"]
    assert (tmp_path / "llava-s/grounding/map0_0.png").read_bytes().startswith(b"\x89PNG")


def damage(folder):
    """Damage a few results in different ways, and a picture; returns which results."""
    with h5py.File(folder / "grounding/ram.nc", "r+") as opened:
        opened.attrs["provenance"] = "{"
    whole = bytearray((folder / "documents/scores.nc").read_bytes())
    whole[len(whole) // 3] ^= 1
    (folder / "documents/scores.nc").write_bytes(whole)
    cut_off = folder / "acceleration/speed.nc"
    cut_off.write_bytes(cut_off.read_bytes()[:-20])
    (folder / "grounding/map0_0.png").write_bytes(b"damaged")
    return ["grounding/ram.nc", "documents/scores.nc", "acceleration/speed.nc"]


def test_a_domain_can_be_added_and_another_setting_is_refused(finished):
    with pytest.raises(OutputError, match="n_find"):
        study(finished.parent, **{**WHAT, "settings": Settings(n_find=7)})


def test_what_cannot_be_studied_is_refused(tmp_path):
    with pytest.raises(ExperimentError, match="add a Qwen-VL model"):
        study(tmp_path / "a", ["reference:llava-s"], ["video"], settings=SMALL)
    with pytest.raises(ExperimentError, match="use 'grounding'"):
        study(tmp_path / "a", ["reference:llava-s"], ["groundng"], settings=SMALL)
    with pytest.raises(ExperimentError, match="each with its own name"):
        study(tmp_path / "a", ["reference:llava-s", "llava-s"], settings=SMALL)
    with pytest.raises(UnsupportedModel, match="reference:llava-s"):
        study(tmp_path / "b", ["reference:llava-x"], settings=SMALL)
    with pytest.raises(ExperimentError, match="at least four"):
        study(tmp_path / "c", ["reference:llava-s"], data=Samples(haystacks("pages", 2)), settings=SMALL)
    assert not list(tmp_path.iterdir())  # a call that was refused keeps out no other


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_random", 0),
        ("n_random", 2.5),
        ("n_random", True),
        ("batch_size", 0),
        ("batch_size", -1),
        ("seed", -1),
        ("n_find", 1),
        ("n_causal", -1),
        ("fractions", ()),
        ("fractions", (1.5,)),
        ("fractions", (0,)),
        ("shares", (float("nan"),)),
        ("methods", ("men",)),
        ("methods", ()),
    ],
)
def test_settings_that_mean_nothing_are_refused(name, value):
    with pytest.raises(ExperimentError) as error:
        replace(SMALL, **{name: value})
    assert error.value.expected and error.value.do
    assert replace(SMALL, shares=()).shares == ()  # leaves sparse inference out


def test_results_of_other_weights_are_not_mixed_in(finished, tmp_path, monkeypatch):
    folder = tmp_path / "study"
    shutil.copytree(finished.parent, folder)
    opened = module.HookedMLLM.from_pretrained

    def retrained(name, **options):
        model = opened(name, **options)
        with torch.no_grad():
            model.hf_model.lm_head.weight.mul_(1.01)
        return model

    monkeypatch.setattr(module.HookedMLLM, "from_pretrained", retrained)
    with pytest.raises(OutputError, match="other weights of llava-s"):
        study(folder, **WHAT)


@pytest.mark.parametrize(
    ("name", "short"),
    [("reference:llava-m", "llava-m"), ("Qwen/Qwen3-VL-4B-Instruct", "Qwen--Qwen3-VL-4B-Instruct"), ("./", None)],
)
def test_a_models_name_is_a_folder(name, short):
    assert module.short_name(name) == (short or Path.cwd().name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written"):
        study(tmp_path / "study", **WHAT)


def test_a_file_in_the_way_is_refused_before_any_work(tmp_path):
    (tmp_path / "study").write_text("mine")
    with pytest.raises(OutputError):
        study(tmp_path / "study", **WHAT)
    assert (tmp_path / "study").read_text() == "mine"


def test_samples_of_ones_own_are_studied(tmp_path):
    own = haystacks("pages", 12, seed=77)
    page = study(tmp_path, ["reference:llava-s"], data=own, settings=replace(SMALL, shares=()))
    facts = json.loads((page.parent / "summary.json").read_text())["models"]["llava-s"]["domains"]
    assert list(facts) == ["pages"] and np.isfinite(facts["pages"]["size_null"])


@pytest.mark.parametrize("right", [True, False], ids=["the evidence", "an empty corner"])
def test_samples_without_a_counterfactual_are_patched_from_blanked_evidence(tmp_path, right):
    lone = [replace(sample, counterfactual=None) for sample in haystacks("grounding", 12, seed=78)]
    if not right:  # nothing hangs on it
        lone = [replace(sample, evidence=(Box(0, 0, 1, 1),)) for sample in lone]
    page = study(tmp_path, ["reference:llava-s"], data=Samples(lone), settings=replace(SMALL, n_causal=6, shares=()))
    facts = json.loads((page.parent / "summary.json").read_text())["models"]["llava-s"]["domains"]["grounding"][
        "causal"
    ]
    assert ("when their evidence is blanked" in facts.get("reason", "")) is not right
    assert ("the corrupted runs see the evidence in the picture" in page.read_text()) is right
    assert not right or ("mean colour" in facts["corruption"] and 2 <= facts["n_test"] <= 6)


def test_samples_without_evidence_are_refused_before_a_model_is_opened(tmp_path):
    blind = Samples([replace(sample, evidence=()) for sample in haystacks("grounding", 8)])
    with pytest.raises(ExperimentError, match="8 samples have no evidence"):
        study(tmp_path, ["no/such-model"], data=blind, settings=SMALL)


def test_a_domain_must_be_a_name_for_a_folder(tmp_path):
    odd = Samples([replace(sample, domain="Report / News") for sample in haystacks("grounding", 8)])
    with pytest.raises(InputError, match="a folder name"):
        study(tmp_path, ["reference:llava-s"], data=odd, settings=SMALL)


def test_a_large_reference_model_has_sizes_of_its_own():
    """Sizes go with the one model that has them; what is long is as many pages as they say."""
    small, smol = default_settings(DEFAULT_MODELS), default_settings(["reference:smol"])
    assert small == Settings() and small.n_test >= 100 and default_domains(DEFAULT_MODELS) is None
    assert smol.n_test < small.n_test and smol.pages == 8
    assert default_domains(["reference:smol"]) == ("documents", "grounding")
    assert [smol.of_domain(place).n_causal for place in range(3)] == [smol.n_causal, 0, 0]
    assert [small.of_domain(place) for place in range(3)] == [small] * 3
    assert default_settings(["reference:smol", "reference:llava-s"]) == Settings()
    samples = longest(None, {}, replace(smol, n_long=2))  # no model is asked
    assert [len(sample.images) for sample in samples] == [8, 8]
