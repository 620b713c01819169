"""``--data``: your own samples, or a published set, from the command line."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from mech.data.haystacks import haystacks
from mech.data.jsonl_writing import write_samples
from mech.data.samples import Samples


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    samples = haystacks("grounding", 12, seed=3) + haystacks("documents", 2, seed=3)
    return str(write_samples(samples, tmp_path_factory.mktemp("own"), "own.jsonl"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["rank", "--data", "refcoo"], "use 'refcoco'"),
        (["rank", "--data", "none.jsonl"], "cannot be read"),
        (["rank", "--data", "refcoco:many"], "write refcoco:200"),
        (["rank", "--data", "vstar:4"], "vstar without root="),
        (["rank", "--root", "x"], "--root without --data"),
        (["study", "--data", "none.jsonl"], "--data without --model"),
    ],
)
def test_what_is_no_data_is_refused(mech, words, says):
    code, out, err = mech(*words)
    assert code == 2 and says in err and not out


def test_rank_measures_on_samples_of_ones_own(mech, own):
    code, out, _ = mech("rank", "--data", own, "-d", "grounding", "--samples", "4", "--json")
    assert code == 0 and json.loads(out)["domain"] == "grounding" and len(json.loads(out)["heads"]) == 48
    code, out, _ = mech("rank", "--data", own, "--samples", "2", "--top", "2", "-q")
    assert code == 0 and "on grounding, documents: ram" in out and "4 samples" in out
    code, _, err = mech("rank", "--data", own, "-d", "grouding")
    assert code == 2 and "use 'grounding'" in err


def test_ablate_patch_and_paths_take_them_too(mech, own):
    words = ["--data", own, "-d", "grounding"]
    code, out, _ = mech("ablate", *words, "--samples", "12", "--n-random", "1", "--fraction", "1", "--json")
    assert code == 0 and {entry["n_heads"] for entry in json.loads(out)["ablation"]} == {1}
    code, out, _ = mech("patch", *words, "--samples", "1", "--json")
    assert code == 0 and len(json.loads(out)["cells"]) == 48
    code, out, _ = mech("paths", *words, "--samples", "1", "--sender", "L0H2", "--json")
    assert code == 0 and [cell["sender"] for cell in json.loads(out)["cells"]] == ["L0H2"]


def test_patching_without_counterfactuals_blanks_the_evidence(mech, tmp_path):
    lone = Samples([replace(sample, counterfactual=None) for sample in haystacks("grounding", 6, seed=9)])
    path = write_samples(lone, tmp_path)
    code, out, _ = mech("patch", "--data", str(path), "--samples", "6", "--direction", "noise", "--top", "2", "-q")
    assert code == 0 and "on grounding, evidence blanked: attn.hook_z" in out
    assert out.splitlines()[2].split()[:2] == ["0", "2"]  # the head that reads the colour, as with counterfactuals


def test_a_published_set_is_ranked_on_without_its_bad_records(mech, monkeypatch):
    import datasets

    good = {"answer": ["the red one"], "image": Image.new("RGB", (40, 30), "red"), "bbox": [4.0, 3.0, 20.0, 15.0]}
    rows = [{**good, "question_id": str(k)} for k in range(4)]
    rows[2]["bbox"] = [4.0, 3.0, 200.0, 15.0]
    asked = []

    def local(hub, *given, **options):
        asked.append(hub)
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", local)
    code, out, err = mech("rank", "--data", "refcoco:9", "--json")
    assert code == 0 and json.loads(out)["domain"] == "refcoco" and asked == ["lmms-lab/RefCOCO"]
    assert "mech: refcoco: 1 bad records skipped" in err
    rows = rows[2:3]
    code, _, err = mech("rank", "--data", "refcoco", "--json")
    assert code == 2 and "refcoco, record 0 (question_id = '2'), bbox: " in err


def test_data_checks_a_file(mech, own, tmp_path):
    code, out, _ = mech("data", own)
    assert code == 0 and "every line can be used" in out and "12 Box" in out and "96 x 96" in out
    code, out, _ = mech("data", own, "--json")
    found = json.loads(out)
    assert found["documents"] == {"samples": 2, "pictures": 2, "sizes": ["96 x 96"], "evidence": {"Box": 2},
                                  "without evidence": 0, "counterfactuals": 2}  # fmt: skip
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "?", "answer": "a"}\n{"question": "?"}\n')
    code, out, err = mech("data", str(bad))
    assert code == 2 and not out and "line 1, images" in err and "line 2, answer: missing" in err


def test_data_lists_the_published_sets_and_what_is_known_of_one(mech):
    code, out, _ = mech("data")
    assert code == 0 and "slidevqa" in out and "lmms-lab/RefCOCOg" in out
    assert len(json.loads(mech("data", "--json")[1])) == len(out.strip().splitlines()) - 2
    code, out, _ = mech("data", "visual-cot")
    assert code == 0 and "assumed" in out and "2403.16999" in out
    code, _, err = mech("data", "visualcot")
    assert code == 2 and "use 'visual-cot'" in err
