"""The test of "there are retrieval heads": silent where there are none, at the rate it claims; not else."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from mech.data.haystacks import haystacks
from mech.errors import ExperimentError
from mech.experiments.ranking.agreement import agreement
from mech.experiments.ranking.ranking import Ranking
from mech.experiments.scores.measure import Score
from mech.experiments.scores.null_test import max_t, question_pairs, retrieval_test
from mech.experiments.scores.ram import retrieval_attention_mass
from mech.model import HookedMLLM
from mech.reference import planted

ALPHA, RUNS = 0.05, 8
FEW, MANY = 1 / 16, 120  # no p-value of four pairs of questions is smaller


@pytest.fixture(scope="module")
def trained():
    return HookedMLLM.from_pretrained("reference:llava-s")


def fresh(model, seed):
    torch.manual_seed(seed)
    return HookedMLLM.from_hf(type(model.hf_model)(model.hf_model.config).eval(), model.processor)


def blank(sample):
    pictures = tuple(Image.new(picture.mode, picture.size, "gray") for picture in sample.images)
    return replace(sample, images=pictures)


def turned(samples, field):
    """Every sample with the question, the evidence or the pictures of another one."""
    others = [*samples[1:], samples[0]]
    return [replace(sample, **{field: getattr(other, field)}) for sample, other in zip(samples, others, strict=True)]


def likely(rejections, runs, alpha=ALPHA):
    """Whether a test of size at most alpha rejects so often in more than one of a thousand repetitions."""
    return rejections <= stats.binom.ppf(0.999, runs, alpha)


def test_the_largest_of_many_heads_is_as_rarely_significant_as_claimed():
    rng, rejections = np.random.default_rng(0), 0
    for run in range(200):
        shared = rng.normal(size=(9, 1))  # heads are not independent, nor normal
        difference = (shared + rng.standard_t(3, size=(9, 30))) * rng.uniform(0.1, 10, 30)
        rejections += bool((max_t(difference, seed=run) <= ALPHA).any())
    assert likely(rejections, 200) and rejections > 1


def test_p_values_are_those_of_the_definition():
    rng = np.random.default_rng(1)
    difference = rng.normal(size=(5, 3)) + np.array([2.0, 0.0, -1.0])
    difference[:, 2] = 0
    found = max_t(difference)
    largest = []
    for flips in np.ndindex(*[2] * 5):
        flipped = difference * np.where(flips, -1, 1)[:, None]
        size = np.sqrt((flipped**2).sum(0))
        largest.append(max(flipped[:, h].sum() / size[h] if size[h] else 0.0 for h in range(3)))
    for head in range(3):
        size = np.sqrt((difference[:, head] ** 2).sum())
        t = difference[:, head].sum() / size if size else 0.0
        assert found[head] == pytest.approx(np.mean([value >= t - 1e-9 for value in largest]))
    many = max_t(np.abs(rng.normal(size=(20, 2))), n_permutations=99)
    assert many == pytest.approx([0.01, 0.01])


@pytest.mark.parametrize("domain", ["grounding", "documents"])
def test_trained_models_have_retrieval_heads_and_they_are_those_that_follow_the_question(trained, domain):
    found = retrieval_test(trained, haystacks(domain, 24, seed=0))
    assert found.attrs["heads"] and found.attrs["n_pairs"] >= 10
    for layer, head in found.attrs["heads"]:
        assert float(found["p_value"].sel(layer=layer, head=head)) <= ALPHA
        assert float(found["difference"].sel(layer=layer, head=head)) > 0


def test_the_planted_retrieval_head_is_found_and_no_other():
    key = planted.circuit("roles")
    model = HookedMLLM.from_hf(key.model, key.processor)
    found = retrieval_test(model, key.samples(40), alpha=FEW)  # of eight colours: four pairs of questions
    assert found.attrs["n_questions"] == 4 and found.attrs["smallest_p"] == 1 / 16
    assert found.attrs["heads"] == [list(key.truth.heads["retrieval"])]


def test_the_difference_is_the_gain_of_the_right_question(trained):
    samples = haystacks("grounding", 12, seed=3)
    found = retrieval_test(trained, samples, seed=4)
    gains = []
    for one, two in question_pairs(samples, seed=4):
        own = retrieval_attention_mass(trained, [one, two])["ram"].values.sum(0)
        crossed = [replace(one, question=two.question), replace(two, question=one.question)]
        gains.append((own - retrieval_attention_mass(trained, crossed)["ram"].values.sum(0)) / 2)
    np.testing.assert_allclose(found["difference"], np.mean(gains, axis=0), atol=1e-5)


def test_pairs_are_disjoint_and_ask_different_things():
    samples = haystacks("grounding", 15, seed=0)
    pairs = question_pairs(samples, seed=1)
    ids = [sample.id for pair in pairs for sample in pair]
    assert len(ids) == len(set(ids)) >= 12
    assert all(one.question != two.question for one, two in pairs)
    assert question_pairs([samples[0], samples[0]]) == []


NULLS = {
    "random weights": lambda model, samples, run: (fresh(model, run), samples),
    "blank images": lambda model, samples, run: (model, [blank(sample) for sample in samples]),
    "permuted questions": lambda model, samples, run: (model, turned(samples, "question")),
    # A label goes with its question, into another picture: within one it would be no null, see below.
    "shuffled labels": lambda model, samples, run: (model, turned(samples, "images")),
}


@pytest.mark.slow
@pytest.mark.parametrize("null", NULLS)
def test_where_nothing_can_be_retrieved_no_head_is_named_more_often_than_claimed(trained, null):
    rejections = 0
    for run in range(RUNS):
        model, samples = NULLS[null](trained, list(haystacks("grounding", 16, seed=100 + run)), run)
        rejections += bool(retrieval_test(model, samples, alpha=ALPHA, seed=run).attrs["heads"])
    assert likely(rejections, RUNS), f"{rejections} of {RUNS}"


@pytest.mark.slow
@pytest.mark.parametrize("null", ["random weights", "permuted questions", "shuffled labels"])
def test_the_rate_is_the_claimed_one_over_many_seeds_of_a_tiny_model(null):
    """A planted retrieval head finds what it is asked for: only because nothing it finds belongs to its question,
    or because it is random, may it go unnamed."""
    key = planted.circuit("roles")
    model = HookedMLLM.from_hf(key.model, key.processor)
    rejections = 0
    for run in range(MANY):
        other, samples = NULLS[null](model, asked_twice(key, run), run)
        rejections += bool(retrieval_test(other, samples, alpha=FEW, seed=run).attrs["heads"])
    assert likely(rejections, MANY, FEW), f"{rejections} of {MANY}"


def asked_twice(key, seed):
    """Two samples of each of the eight questions."""
    asked = {}
    for sample in key.samples(90, seed=seed):
        asked.setdefault(sample.question, []).append(sample)
    return [some[i] for i in (0, 1) for some in asked.values()]


def test_a_box_moved_within_its_picture_is_no_null():
    """Where it meets the right place, its own question gains by it; where it may not, only other questions do."""
    key = planted.circuit("roles")
    model = HookedMLLM.from_hf(key.model, key.processor)
    met, kept_away = [], []
    for run in range(10):
        samples = asked_twice(key, run)
        away = [next(o for o in samples if o.evidence != sample.evidence) for sample in samples]
        away = [replace(sample, evidence=other.evidence) for sample, other in zip(samples, away, strict=True)]
        for rows, gains in ((turned(samples, "evidence"), met), (away, kept_away)):
            found = retrieval_test(model, rows, alpha=FEW, seed=run)["difference"]
            gains.append(float(found.values[key.truth.heads["retrieval"]]))
    assert np.mean(met) > 0.1 and max(kept_away) < 1e-3 and min(kept_away) < -0.05


def test_shuffled_heads_agree_with_nothing_more_often_than_claimed():
    """Heads that lose their names between two rankings overlap as random sets do, however strong they are."""
    rng, rejections, overlaps = np.random.default_rng(0), 0, []
    for _ in range(200):
        mean = rng.exponential(size=(4, 8))
        shuffled = rng.permutation(mean.ravel()).reshape(mean.shape)
        found = agreement({"a": Ranking(mean), "b": Ranking(shuffled)}, k=6).sel(ranking="a", other="b")
        rejections += bool(found["overlap_p"] <= ALPHA)
        overlaps.append(float(found["jaccard"]))
    assert likely(rejections, 200)
    assert np.mean(overlaps) == pytest.approx(float(found["jaccard_null"]), abs=0.03)


def test_random_weights_beat_the_size_null_all_the_same(trained):
    """Why even attention is no null: a preference for pictures, or for what is near, is enough to exceed it."""
    rejections = 0
    for run in range(5):
        samples = haystacks("grounding", 24, seed=run)
        ram = retrieval_attention_mass(fresh(trained, run), samples)
        above = ram["ram"].values - ram["size_null"].values[:, None, None]
        rejections += bool((max_t(above.reshape(len(above), -1)) <= ALPHA).any())
    assert rejections >= 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "localization"}, 'use score="ram"'),
        ({"score": "visual_retrieval"}, 'use score="ram"'),
        ({"score": Score(aggregate="frequency")}, 'use score="ram"'),
        ({"score": "rma"}, "use 'ram'"),
        ({"samples": haystacks("grounding", 4)}, "give more samples"),
        ({"alpha": 1e-9}, "give more samples"),
    ],
)
def test_tests_that_could_not_reject_are_refused_before_any_forward(trained, monkeypatch, change, message):
    monkeypatch.setattr(HookedMLLM, "forward", lambda *_, **__: pytest.fail("a forward was run"))
    with pytest.raises(ExperimentError, match=message):
        retrieval_test(trained, **{"samples": haystacks("grounding", 16), **change})
