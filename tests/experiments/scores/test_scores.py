"""Every score against its definition, written out in loops over the full pattern, one sample at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import ndimage
from tiny_models import opened

import mech
from mech.data.haystacks import haystacks
from mech.data.samples import Distractor, Sample, Samples
from mech.errors import ExperimentError
from mech.experiments.findings.sentences import _scores
from mech.experiments.findings.summary import summarise_scores
from mech.experiments.ranking.ranking import rank_heads
from mech.experiments.ranking.selection import elbow_count
from mech.experiments.scores.localization import spatial_entropy
from mech.experiments.scores.measure import PUBLISHED, REGION_DRAWS, Pass, Score, head_scores, passes
from mech.experiments.scores.ram import retrieval_attention_mass
from mech.experiments.scores.reading import prepared
from mech.model import HookedMLLM
from mech.model.points import hooked
from mech.reference import planted, tiny, tiny_processors
from mech.results import load, save
from mech.views.agreement import domain_agreement

# Windows of vision, image tokens that see each other, prefixes, layers without heads, a memory, windows and M-RoPE.
FAMILIES = ("llava", "qwen2_5_vl", "gemma3", "paligemma", "qwen3_5", "lfm2_vl", "mllama")
SINK = 2.0  # so low that tiny random models have sinks
SCORES = {
    **{name: score for name, score in PUBLISHED.items() if score.reduce != "entropy"},
    **{f"{reduce}/size": Score(reduce=reduce, calibrate="size") for reduce in ("sum", "mean", "hit", "hit_size")},
    "share/size": Score("last", "share", calibrate="size"),
    "share/distractors": Score("last", "share", calibrate="distractors"),
    "values": Score("last", "value_norm"),
    "values/size": Score("answer", "value_norm", calibrate="size"),
    "random": Score(calibrate="random"),
    "shifted": Score("answer", "mean", calibrate="shifted"),
    "answer/null": Score("answer", calibrate="null_question"),
    "other": Score(calibrate="other_question"),
    "frequency": Score(aggregate="frequency", top=3),
    "all": Score(aggregate="frequency", top=10**6),
    "hits/frequency": Score("last", "hit", "frequency", top=3),
}
SINKS = {"sinks": Score("last", calibrate="no_sinks"), "hit/sinks": Score(reduce="hit", calibrate="no_sinks")}


def asked():
    questions = ("Which digit is red?", "Which digit is in the red frame?", "Which?")
    apart = (Distractor(mech.Box(1, 1, 14, 14), "1"), Distractor(mech.Box(1, 1, 31, 14), "5"))
    return Samples(
        Sample(
            text,
            "7 2",
            images=(tiny_processors.noise(32, 32, i),),
            evidence=(mech.Box(17, 17, 31, 31),),
            id=str(i),
            distractors=apart[: 1 + i % 2],
        )
        for i, text in enumerate(questions)
    )


class Twin:
    """One sample, slowly: the whole pattern of every layer, and loops."""

    def __init__(self, model, sample, answer=""):
        inputs = model.inputs_of(replace(sample, answer=answer), answer=bool(answer))
        self.layout, self.visual = inputs.layout, inputs.layout.visual
        self.layers = model.cfg.attention_layers
        names = [f"blocks.{layer}.{p}" for layer in self.layers for p in ("attn.hook_pattern", "attn.hook_v")]
        names = [n for n in names if n in model.points()] + [f"blocks.{layer}.hook_resid_pre" for layer in self.layers]
        with torch.no_grad():
            _, self.cache = model.run_with_cache(inputs, names_filter=names)
        self.crossing = self.layout.memory is not None
        self.sample = sample

    def rows(self, queries):
        if queries in ("answer", "generated"):
            return [p - 1 for p in self.layout.spans["answer"]]
        return list(self.layout.positions(queries))

    def score(self, score, null=None):
        rows, image = self.rows(score.queries), list(self.visual.positions("image"))
        evidence = image if score.on == "image" else list(self.visual.positions(self.sample.evidence))
        parts = [self.part(k, evidence) for k in range(len(rows))] if score.on == "parts" else [evidence] * len(rows)
        found = []
        for layer in self.layers:
            pattern = self.cache[f"blocks.{layer}.attn.hook_pattern"][0].double().numpy()
            if self.crossing and pattern.shape[2] != len(self.visual):
                found.append(np.zeros(len(pattern)))
                continue
            values = self.cache[f"blocks.{layer}.attn.hook_v"][0].double().norm(dim=-1).numpy()
            if score.calibrate == "no_sinks":
                state = self.cache[f"blocks.{layer}.hook_resid_pre"][0].double()
                sinks = state.abs().amax(-1) >= SINK * state.pow(2).mean(-1).sqrt()
                assert sinks.any() and not sinks.all()
                pattern[..., sinks.numpy()] = 0
            heads = []
            for head, attention in enumerate(pattern):
                norm = values[:, head // (len(pattern) // values.shape[1])]
                total = 0.0
                for row, evidence in zip(rows, parts, strict=True):
                    seen = attention[row]
                    value = self.reduce(score.reduce, seen, evidence, image, norm)
                    if score.calibrate == "size":
                        even = (seen > 0) / (seen > 0).sum()
                        kind = {"hit": "sum", "hit_size": "mean"}.get(score.reduce, score.reduce)
                        value -= self.reduce(kind, even, evidence, image, norm)
                    if score.calibrate == "distractors":
                        apart = [list(self.visual.positions(one.region)) for one in self.sample.distractors]
                        value -= np.mean([self.reduce(score.reduce, seen, one, image, norm) for one in apart])
                    if score.calibrate == "shifted":
                        elsewhere = [
                            image[(image.index(y) + self.half(evidence, image)) % len(image)] for y in evidence
                        ]
                        value -= self.reduce(score.reduce, seen, elsewhere, image, norm)
                    total += value / len(rows)
                heads.append(total)
            found.append(np.array(heads))
        return np.array(found)

    def part(self, k, evidence):
        """The evidence of the answer's token ``k``, found character by character."""
        at = self.layout.spans["answer"]
        before = sum(len(self.layout.tokens[p]) for p in at[:k])
        own = set()
        for character in range(before, before + len(self.layout.tokens[at[k]])):
            for span in self.sample.spans:
                if span.start <= character < span.stop:
                    own |= set(self.visual.positions(span.evidence).tolist())
        return sorted(own) or evidence

    @staticmethod
    def reduce(kind, seen, evidence, image, norm):
        mass = sum(seen[y] for y in evidence)
        if kind == "sum":
            return mass
        if kind == "mean":
            return mass / len(evidence)
        if kind == "share":
            visual = sum(seen[y] for y in image)
            return mass / visual if visual > 0 else 0.0  # a window may hold no visual token
        if kind == "value_norm":
            return sum(seen[y] * norm[y] for y in evidence) / sum(seen[y] * norm[y] for y in range(len(seen)))
        hit = float(int(seen.argmax()) in evidence)
        return hit if kind == "hit" else hit / len(evidence)

    @staticmethod
    def half(evidence, image):
        """The step nearest to half of the ring that leaves no token where one was."""
        n, places = len(image), {image.index(y) for y in evidence}
        free = [step for step in range(n) if not any((p + step) % n in places for p in places)]
        return min(free, key=lambda step: abs(step - n / 2))

    def each(self):
        """The mean attention of the question on each evidence token: [layer, head, token]."""
        evidence, found = self.visual.positions(self.sample.evidence), []
        for layer in self.layers:
            pattern = self.cache[f"blocks.{layer}.attn.hook_pattern"][0].double().numpy()
            mean = pattern[:, self.rows("question")].mean(1)
            reached = not self.crossing or mean.shape[1] == len(self.visual)
            found.append(mean[:, evidence] if reached else np.zeros((len(mean), len(evidence))))
        return np.array(found)


def slow(model, sample, score, said):
    """A score by its definition; None for one that this twin does not know."""
    text = {"answer": sample.answer, "generated": said}.get(score.queries, "")
    nowhere = replace(sample, question="N/A")
    if score.reduce == "trimmed":
        each = Twin(model, sample).each() - Twin(model, nowhere).each()
        low = each.mean(-1, keepdims=True) - 2 * each.std(-1, keepdims=True)
        return np.where(each < low, 0, each).sum(-1)
    found = Twin(model, sample, text).score(score)
    if score.calibrate == "other_question":
        others = [other.question for other in asked()]
        found = found - Twin(model, replace(sample, question=others[(others.index(sample.question) + 1) % 3])).score(
            score
        )
    if score.calibrate == "null_question":
        found = found - Twin(model, nowhere, text).score(score)
    if score.aggregate == "frequency":
        found = np.array([[sum(found.ravel() >= value) <= score.top for value in row] for row in found]).astype(float)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_every_score_is_its_definition_in_loops(name):
    model, samples = opened(name), asked()
    scores = SCORES if name == "mllama" else {**SCORES, **SINKS}
    try:
        said = [model.generate_text(model.inputs_of(sample), max_new_tokens=3)[0] for sample in samples]
    except mech.MechError:
        said = []
    if not all(said):
        scores = {key: score for key, score in scores.items() if score.queries != "generated"}
    found = head_scores(model, samples, scores, batch_size=2, sink_tau=SINK, max_new_tokens=3)
    assert set(found) == set(scores)
    assert list(found["layer"].values) == list(model.cfg.attention_layers)
    for key, score in scores.items():
        if score.calibrate == "random":
            continue
        for i, sample in enumerate(samples):
            expected = slow(model, sample, score, said[i] if said else "")
            np.testing.assert_allclose(found[key].values[i], expected, atol=1e-5, err_msg=f"{key}, sample {i}")


@pytest.mark.parametrize(("name", "domain"), [("llava-s", "documents"), ("qwen-s", "video")])
def test_each_token_of_an_answer_is_scored_on_its_own_evidence(name, domain):
    """A sentence: its name and its digits have places of their own, the words between them all of the evidence."""
    model, samples = HookedMLLM.from_pretrained(f"reference:{name}"), haystacks(domain, 3, seed=1, answer="sentence")
    scores = {
        "mass": Score("answer", on="parts"),
        "hit": Score("answer", "hit_size", on="parts"),
        "norm": Score("answer", "value_norm", calibrate="size", on="parts"),
        "whole": Score("answer"),
    }
    found = head_scores(model, samples, scores, batch_size=2)
    for key, score in scores.items():
        for i, sample in enumerate(samples):
            expected = Twin(model, sample, sample.answer).score(score)
            np.testing.assert_allclose(found[key].values[i], expected, atol=3e-6, err_msg=f"{key}, sample {i}")
    assert not np.allclose(found["mass"], found["whole"], atol=1e-3)
    assert all(len(one.spans) == 4 for one in samples)


def test_random_regions_have_the_size_and_shape_of_the_evidence_and_none_of_its_tokens():
    model = HookedMLLM.from_pretrained("reference:llava-s")
    samples = haystacks("documents", 3, seed=1)
    found = head_scores(model, samples, {"random": Score(calibrate="random"), "ram": Score()}, seed=5)
    again = head_scores(model, samples, {"random": Score(calibrate="random")}, seed=5)
    other = head_scores(model, samples, {"random": Score(calibrate="random")}, seed=6)
    np.testing.assert_allclose(found["random"], again["random"], atol=1e-6)
    assert not np.allclose(found["random"], other["random"], atol=1e-4)
    for i, sample in enumerate(samples):
        row = prepared(model.inputs_of(sample), sample.evidence, REGION_DRAWS, [5, i])
        attention = mech.attention_from(model, row.inputs)[0].numpy()
        mass = np.mean([attention[..., region].sum(-1) for region in row.random], axis=0)
        expected = attention[..., row.evidence].sum(-1) - mass
        np.testing.assert_allclose(found["random"].values[i], expected, atol=1e-6)
        assert len(row.random) == REGION_DRAWS
        for region in (*row.random, row.shifted):
            assert len(region) == len(row.evidence) and not set(region) & set(row.evidence)
            assert set(region) <= set(row.inputs.layout.positions("image"))


def test_regions_elsewhere_stay_in_the_views_of_a_picture_that_is_cut_into_tiles():
    model = opened("llava_next")
    row = prepared(model.inputs_of(asked()[0]), asked()[0].evidence, REGION_DRAWS, [0])
    view = row.inputs.layout.view
    assert {0, 1} <= set(np.minimum(view[row.evidence], 1))
    for region in (*row.random, row.shifted):
        assert not set(region) & set(row.evidence)
        assert (view[region] == 0).sum() == (view[row.evidence] == 0).sum()
        assert len(set(region)) == len(row.evidence)


@pytest.mark.parametrize("name", [name for name in tiny.NAMES if name not in FAMILIES])
def test_every_family_has_every_score_and_one_ram(name):
    """The right answer behind the prompt changes nothing that the question's rows see, whatever the mask."""
    model, samples = opened(name), asked()
    chosen = {key: score for key, score in PUBLISHED.items() if score.queries != "generated"}
    found = head_scores(model, samples, {**chosen, "shifted": Score(calibrate="shifted")}, batch_size=2)
    assert "question + answer" in found.attrs["passes"] and all(np.isfinite(found[key]).all() for key in found)
    np.testing.assert_allclose(found["ram"], retrieval_attention_mass(model, samples)["ram"], atol=1e-5)


def test_ram_is_one_and_the_same_whoever_asks():
    model = HookedMLLM.from_pretrained("reference:qwen-s")
    samples = haystacks("video", 4, seed=3)
    ram = retrieval_attention_mass(model, samples)
    alone = head_scores(model, samples)
    beside = head_scores(model, samples, ("ram", "vision_mass", "visual_retrieval"))
    np.testing.assert_allclose(alone["ram"], ram["ram"], atol=1e-6)
    np.testing.assert_allclose(beside["ram"], ram["ram"], atol=1e-6)
    np.testing.assert_allclose(beside["vision_mass"], ram["vision_mass"], atol=1e-6)
    assert rank_heads(beside).heads == rank_heads(ram).heads


@pytest.mark.parametrize("family", planted.FAMILIES)
def test_planted_heads_score_as_they_were_planted(family):
    key = planted.circuit("roles", family)
    model = HookedMLLM.from_hf(key.model, key.processor)
    found = head_scores(model, [key.sample], ("ram", "mm_retrieval", "vera", "vision_mass"))
    np.testing.assert_allclose(found["ram"].values[0], key.truth.ram, atol=2e-5)
    retrieval, sink = key.truth.heads["retrieval"], key.truth.heads["sink"]
    for name in ("mm_retrieval", "vera"):
        assert rank_heads(found, name).heads[0] == retrieval, name
        assert abs(found[name].values[0][sink]) < 0.2 if name == "mm_retrieval" else True


def test_localization_heads_are_chosen_by_elbow_entropy_and_frequency():
    model = HookedMLLM.from_pretrained("reference:llava-s")
    samples = haystacks("pages", 4, seed=2)
    found = head_scores(model, samples, {"localization": replace(PUBLISHED["localization"], top=4)})["localization"]
    entropy, mass = [], []
    for sample in samples:
        inputs = model.inputs_of(sample)
        layout = inputs.layout
        attention = mech.attention_from(model, inputs, "last")[0].numpy()
        visual = layout.positions("image")
        mass.append(attention[..., visual].sum(-1))
        mean = attention[..., visual].mean(-1)
        values = np.zeros(attention.shape[:2])
        for layer, head in np.ndindex(values.shape):
            shares = []
            for picture in range(len(layout.images)):
                grid = np.zeros(layout.grid(picture))
                for position in layout.positions("image", image=picture):
                    value = attention[layer, head, position]
                    grid[layout.row[position], layout.col[position]] = value * (value >= mean[layer, head])
                labels, count = ndimage.label(grid, np.ones((3, 3)))
                shares += [grid[labels == i].sum() for i in range(1, count + 1)]
            p = np.array(shares) / sum(shares)
            values[layer, head] = -(p * np.log(p)).sum()
        entropy.append(values)
    looking = np.mean(mass, axis=0)
    kept = np.sort(looking.ravel())[::-1][: elbow_count(looking.ravel())].min()
    for i in range(len(samples)):
        values = np.where(looking >= kept, entropy[i], np.inf)
        expected = np.zeros(values.size)
        expected[np.argsort(values, axis=None, kind="stable")[:4]] = 1
        np.testing.assert_array_equal(found.values[i].ravel(), expected)


def test_entropy_is_zero_for_one_place_and_grows_with_places():
    layout = HookedMLLM.from_pretrained("reference:llava-s").inputs_of(haystacks("grounding", 1)[0]).layout
    rows, cols = layout.grid()
    one, two = np.zeros((2, rows, cols))
    one[:2, :2] = 1
    two[0, 0] = two[-1, -1] = 1
    found = spatial_entropy(np.stack([one.ravel(), two.ravel()]), layout)
    np.testing.assert_allclose(found, [0, np.log(2)], atol=1e-12)


def test_passes_are_shared_and_are_what_is_run(monkeypatch):
    assert list(passes("ram")) == [Pass("question", "")]
    assert list(passes(("ram", "vera", "vision_mass"))) == [Pass("question", "")]
    assert list(passes(("ram", "visual_retrieval", "mm_retrieval"))) == [
        Pass("question", "answer"),
        Pass("null question", ""),
    ]
    assert list(passes(tuple(PUBLISHED))) == [
        Pass("question", "answer"), Pass("question", "generated"), Pass("null question", ""),
    ]  # fmt: skip
    runs = []
    forward = HookedMLLM.forward
    monkeypatch.setattr(HookedMLLM, "forward", lambda self, *a, **k: (runs.append(1), forward(self, *a, **k))[1])
    model = HookedMLLM.from_pretrained("reference:llava-s")
    looked = []
    handle = model.hf_model.model.vision_tower.register_forward_hook(lambda *_: looked.append(1))
    found = head_scores(model, haystacks("grounding", 5), ("ram", "sparse_mm", "qr_head"), batch_size=2)
    handle.remove()
    assert len(looked) == 3, "pictures are read once for all passes of a batch"
    assert found.attrs["passes"] == ["question + answer", "null question"] and len(runs) == 2 * 3
    assert found["qr_head"].attrs["passes"] == found.attrs["passes"]
    for name in found:
        assert found[name].attrs["unit"] and found[name].attrs["definition"] and "arXiv" in found[name].attrs["source"]
    assert not hooked(model.hook_dict.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Score("questions"), "use 'question'"),
        (lambda: Score(reduce="max"), "reduce='max'"),
        (lambda: Score(reduce="trimmed", calibrate="size"), "no null but a question"),
        (lambda: Score(on="image", calibrate="shifted"), "evidence, the same for all rows"),
        (lambda: Score(on="parts"), "what has parts is the right answer"),
        (lambda: Score("answer", "trimmed", on="parts"), "trimmed over all rows"),
        (lambda: Score(reduce="entropy"), 'on="image"'),
        (lambda: Score(top=1.0), "top=1.0"),
        (lambda: passes("rma"), "use 'ram'"),
        (lambda: passes(()), "no scores"),
    ],
)
def test_scores_that_cannot_be_are_refused(make, message):
    with pytest.raises(ExperimentError, match=message):
        make()


def test_samples_that_cannot_be_scored_are_refused_before_any_forward(monkeypatch):
    model = HookedMLLM.from_pretrained("reference:llava-s")
    monkeypatch.setattr(HookedMLLM, "forward", lambda *_, **__: pytest.fail("a forward was run"))
    sample = haystacks("grounding", 1)[0]
    pages = haystacks("pages", 1)[0]
    every = replace(pages, evidence=(mech.Pages(*range(len(pages.images))),))
    for samples, scores, message in (
        ([], "ram", "at least one"),
        ([replace(sample, evidence=())], "ram", "'ram' needs"),
        ([replace(sample, answer=" ")], "sparse_mm", "no answer"),
        ([replace(sample, evidence=())], "sparse_mm", "no evidence"),
        ([every], {"shifted": Score(calibrate="shifted")}, "no room"),
        ([sample, sample], {"other": Score(calibrate="other_question")}, "2 samples that ask the same"),
    ):
        with pytest.raises(ExperimentError, match=message):
            head_scores(model, samples, scores)
    monkeypatch.setattr(HookedMLLM, "generate_text", lambda self, inputs, **_: [""] * len(inputs))
    with pytest.raises(ExperimentError, match="nothing was generated for 1 samples"):
        head_scores(model, [sample], "retrieval_head")


def test_scores_are_saved_and_come_back_with_what_they_mean(tmp_path):
    model = HookedMLLM.from_pretrained("reference:llava-s")
    found = head_scores(model, haystacks("grounding", 2), ("ram", "mm_retrieval"))
    again = load(save(found, tmp_path / "scores.nc"))
    assert np.array_equal(again["mm_retrieval"].values, found["mm_retrieval"].values)
    assert again["mm_retrieval"].attrs == found["mm_retrieval"].attrs
    assert again.attrs["passes"] == found.attrs["passes"] == ["question", "null question"]
    assert rank_heads(again, "mm_retrieval").heads == rank_heads(found, "mm_retrieval").heads


def test_the_agreement_of_scores_is_summed_up_told_and_drawn():
    """Scores whose top heads are not RAM's are named; a score that is nothing anywhere draws no interval."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 0.1, (12, 4, 5))
    base[:, 0, :2] += 1
    other = rng.uniform(0, 0.1, (12, 4, 5))
    other[:, 3, :2] += 1
    values = {"ram": base, "vera": 2 * base, "qr_head": other, "vision_mass": other, "retrieval_head": base * 0}
    found = summarise_scores(xr.Dataset({name: (("example", "layer", "head"), v) for name, v in values.items()}))
    assert found["names"] == list(values) and found["n_top"] == 1
    assert found["jaccard"][0][:3] == [1, 1, 0] and found["spearman"][0][1] == pytest.approx(1)
    assert found["spearman_low"][0][2] <= found["spearman"][0][2] <= found["spearman_high"][0][2]
    (kind, text, against), *more = _scores({"scores": found, "n_find": 12}, 20)
    assert kind == "scores" and not more and not against
    assert "qr_head 0.00" in text and "vera" not in text and "vision_mass" not in text
    assert list(_scores({}, 20)) == []
    shown = domain_agreement({**found, "spearman_low": [[None] * 5] * 5}, "score")
    assert shown.count("<tr>") == 2 * 6 and "whole score maps" in shown and " to " in shown
