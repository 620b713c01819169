"""lmms-eval's tasks as samples, and mech's models in it: by its contract, and against the package where it is."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import mech
from mech.data.lmms_tasks import each_sample, lmms_samples
from mech.errors import ExperimentError, InputError, OutputError
from mech.lmms import read_recipe, write_recipe
from mech.sparse.policy import Policy


class LocalTask:
    """What is asked of a task of lmms-eval 0.7."""

    def __init__(self, samples, **changes):
        self.config = SimpleNamespace(task="digits")
        self.eval_docs = [
            {"image": s.images[0], "question": f"<image>\n{s.question}", "answer": s.answer, "box": s.evidence[0]}
            | changes
            for s in samples
        ]

    def doc_to_visual(self, doc):
        return [doc["image"]]

    def doc_to_text(self, doc):
        return doc["question"]

    def doc_to_target(self, doc):
        return doc["answer"]


@pytest.fixture(scope="module")
def samples():
    return mech.haystacks("grounding", n=5, seed=2)


def test_documents_become_samples(samples):
    given = lmms_samples(LocalTask(samples), 4, evidence=lambda doc: (doc["box"],))
    assert [one.id for one in given] == [f"digits/{i}" for i in range(4)] and given.domains == ("digits",)
    for one, other in zip(given, samples, strict=False):
        assert (one.question, one.answer, one.evidence) == (other.question, other.answer, other.evidence[:1])
        assert one.images[0].tobytes() == other.images[0].convert("RGB").tobytes()
    assert len(lmms_samples(LocalTask(samples))) == 5 and not next(each_sample(LocalTask(samples))).evidence
    several = lmms_samples(LocalTask(samples, answer=["seven", "7"]), 1)
    assert several[0].answer == "seven"


@pytest.mark.parametrize(("changes", "said"), [({"image": "clip.mp4"}, "str"), ({"answer": ""}, "the answer ''")])
def test_documents_that_are_no_samples_are_refused(samples, changes, said):
    with pytest.raises(InputError, match=said):
        lmms_samples(LocalTask(samples, **changes))
    with pytest.raises(InputError, match="a task of lmms-eval"):
        lmms_samples(object())


def test_arguments_name_what_a_recipe_says(tmp_path):
    recipes = (
        {"policy": Policy([(0, 1)], window=8)}, {"policy": Policy([(0, 2)], window=8)},
        {"ablate": mech.Ablate(heads=[(0, 1)], to="zero")}, {},
    )  # fmt: skip
    args = [write_recipe(tmp_path / f"{i}.json", "reference:llava-s", **one) for i, one in enumerate(recipes)]
    shas = [dict(part.split("=") for part in one.split(","))["recipe_sha"] for one in args]
    assert len(set(shas)) == 4 and all(sha.startswith("sha-") for sha in shas)
    assert [tuple(head) for head in read_recipe(tmp_path / "0.json", shas[0]).policy.dense_heads] == [(0, 1)]
    assert read_recipe(tmp_path / "2.json", shas[2]).ablate.to == "zero"
    with pytest.raises(OutputError, match="recipe_sha") as error:
        read_recipe(tmp_path / "0.json", shas[1])  # answers of the other recipe would be replayed
    assert shas[0] in error.value.do
    (tmp_path / "0.json").write_text(json.dumps({"policy": {"dense_heads": 3}}))
    with pytest.raises(OutputError, match="cannot be read"):
        read_recipe(tmp_path / "0.json", shas[0])


def test_recipes_that_cannot_be_followed_are_refused(tmp_path):
    both = {"policy": Policy(), "ablate": mech.Ablate(heads=[(0, 1)], to="zero")}
    with pytest.raises(ExperimentError, match="one of the two"):
        write_recipe(tmp_path / "a.json", "reference:llava-s", **both)
    mean = mech.Ablate(heads=[(0, 1)], to="mean", reference=mech.haystacks("grounding", n=2, seed=0))
    with pytest.raises(ExperimentError, match="zero, uniform, paper"):
        write_recipe(tmp_path / "a.json", "reference:llava-s", ablate=mean)
    with pytest.raises(OutputError, match="comma"):
        write_recipe(tmp_path / "a,b.json", "reference:llava-s")


def test_the_entry_point_is_declared():
    text = (Path(mech.__file__).parents[1] / "pyproject.toml").read_text()
    assert '[project.entry-points."lmms_eval.models"]\nmech = "mech.lmms:manifest"' in text


TASK = """
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
task: mech_digits
test_split: test
output_type: generate_until
doc_to_visual: !function digits.visual
doc_to_text: "{{question}}"
doc_to_target: answer
generation_kwargs: {max_new_tokens: 4, until: ["\\n"], do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}
"""
VISUAL = "from PIL import Image\n\n\ndef visual(doc):\n    return [Image.open(doc['image'])]\n"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # lmms-eval's own, and those of what it brings
def test_lmms_eval_asks_ablated_and_localized_models(tmp_path):
    pytest.importorskip("lmms_eval.evaluator", reason="lmms-eval is no dependency of mech", exc_type=ImportError)
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager, get_task_dict

    from mech.lmms import manifest

    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    samples = mech.haystacks("grounding", n=12, seed=5)
    rows = []
    for i, sample in enumerate(samples):
        sample.images[0].save(tmp_path / f"{i}.png")
        rows.append({"image": str(tmp_path / f"{i}.png"), "question": sample.question, "answer": sample.answer})
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mech_digits.yaml").write_text(TASK % (tmp_path / "rows.json"))
    (tmp_path / "digits.py").write_text(VISUAL)
    tasks = TaskManager(include_path=str(tmp_path))
    given = lmms_samples(get_task_dict(["mech_digits"], tasks)["mech_digits"])
    assert [one.question for one in given] == [one.question for one in samples]

    def accuracy(args):
        found = simple_evaluate(
            model="mech", model_args=args, tasks=["mech_digits"], task_manager=tasks, batch_size=1, log_samples=False,
            bootstrap_iters=0,
        )  # fmt: skip
        return found["results"]["mech_digits"]["exact_match,none"]

    model = mech.HookedMLLM.from_pretrained("reference:llava-s")
    heads = mech.rank_heads(mech.retrieval_attention_mass(model, mech.haystacks("grounding", n=16, seed=1)))
    own = [model.generate_text(model.inputs_of(one), max_new_tokens=4)[0] == one.answer for one in samples]
    whole = accuracy(write_recipe(tmp_path / "0.json", "reference:llava-s"))
    assert whole == pytest.approx(sum(own) / 12) and whole > 0.8
    without = mech.Ablate(heads=heads.top(8), to="zero")
    assert accuracy(write_recipe(tmp_path / "1.json", "reference:llava-s", ablate=without)) < whole - 0.3
    few, nothing = (Policy(some, sinks=4, window=16) for some in (heads.top(24), ()))
    kept, lost = (accuracy(write_recipe(tmp_path / f"{i}.json", "reference:llava-s", policy=policy))
                  for i, policy in enumerate((few, nothing), start=2))  # fmt: skip
    assert lost < kept
