"""The same scenes shown and written out: what the top heads share, and what layers alone would explain."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch
from pages import Page

from mech import HookedMLLM, haystacks, modality_table, modality_transfer, retrieval_attention_mass, view
from mech.data.samples import Samples
from mech.errors import ExperimentError
from mech.experiments.scores.modality import KEPT, NEITHER, RECRUITED, TEXT_ONLY, matched_overlap, top_heads

K = 6


@pytest.fixture(scope="module")
def model():
    return HookedMLLM.from_pretrained("reference:llava-s")


@pytest.fixture(scope="module")
def samples():
    return tuple(haystacks("documents", 8, seed=3, form=form) for form in ("pictures", "text"))


@pytest.fixture(scope="module")
def swapped():
    """The same weights, with two heads of every layer in each other's place."""
    model = HookedMLLM.from_pretrained("reference:llava-s")
    for layer in model.hf_model.model.language_model.layers:
        attention, d = layer.self_attn, model.cfg.d_head
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            rows = linear.weight.data
            rows[:d], rows[d : 2 * d] = rows[d : 2 * d].clone(), rows[:d].clone()
        columns = attention.o_proj.weight.data
        columns[:, :d], columns[:, d : 2 * d] = columns[:, d : 2 * d].clone(), columns[:, :d].clone()
    return model


@pytest.fixture(scope="module")
def found(model, samples, swapped):
    return modality_transfer(model, *samples, swapped, k=K, n_resamples=200, batch_size=4)


def test_scores_are_those_of_each_form_and_model(found, model, samples, swapped):
    for reading, one, shown in (
        ("pictures", model, samples[0]), ("text", model, samples[1]), ("base text", swapped, samples[1]),
    ):  # fmt: skip
        ram = retrieval_attention_mass(one, shown)["ram"].values
        assert np.allclose(found["score"].sel(reading=reading).values, ram, atol=1e-5)


def test_two_heads_that_change_places_are_seen_to_have_moved(found):
    """A base that is the same function with heads 0 and 1 exchanged: the maps agree once they are put back."""
    mine, theirs = (found["score"].sel(reading=reading).values for reading in ("pictures", "base pictures"))
    order = [1, 0, *range(2, mine.shape[-1])]
    assert np.allclose(mine, theirs[..., order], atol=1e-4) and not np.allclose(mine, theirs, atol=1e-2)
    tops = top_heads(mine.mean(0), K), top_heads(theirs.mean(0), K)
    at = dict(reading="pictures", other="base pictures")
    assert found["shared"].sel(at) == (tops[0] & tops[1]).sum()
    same = dict(reading="pictures", other="pictures")
    assert found["shared"].sel(same) == K and found["within"].sel(same) == pytest.approx(1)
    assert found["within"].sel(at) < 0.99


def test_origins_and_the_table_say_of_which_top_sets_a_head_is(found):
    on, had = (top_heads(found["score"].sel(reading=r).values.mean(0), K) for r in ("pictures", "base text"))
    origin = found["origin"].values
    assert ((origin == KEPT) == (on & had)).all() and ((origin == RECRUITED) == (on & ~had)).all()
    assert ((origin == TEXT_ONLY) == (~on & had)).all() and ((origin == NEITHER) == ~(on | had)).all()
    table = modality_table(found)
    assert len(table) == (on | had).sum() and [row["pictures rank"] for row in table[:K]] == list(range(1, K + 1))
    assert {row["head"] for row in table[:K]} == {f"L{i}H{j}" for i, j in np.argwhere(on)}


def test_the_null_exchanges_heads_within_layers():
    """Against every way of choosing as many heads in each layer, counted one by one."""
    rng = np.random.default_rng(0)
    a, b = (np.array([rng.permutation([1] * n + [0] * (5 - n)) for n in counts], dtype=bool)
            for counts in ((2, 0, 1), (3, 2, 1)))  # fmt: skip
    shared = [
        sum(len({*one} & {*np.flatnonzero(row)}) for one, row in zip(chosen, b, strict=True))
        for chosen in ((x, (), z) for x in combinations(range(5), 2) for z in combinations(range(5), 1))
    ]
    expected, p = matched_overlap(a, b)
    assert expected == pytest.approx(np.mean(shared))
    assert p == pytest.approx(np.mean(np.array(shared) >= (a & b).sum()))


def shown(drawn):
    """Words and charts of a view's page."""
    page = Page(drawn.html())
    return page.text + json.dumps(page.charts)


def test_intervals_hold_the_estimate_and_the_matrix_is_symmetric(found):
    assert (found["shared_low"] <= found["shared"]).all() and (found["shared"] <= found["shared_high"]).all()
    for name in ("shared", "expected", "p", "within"):
        values = found[name].values
        assert np.allclose(values, values.T)


def test_without_a_base_text_is_compared_as_the_model_reads_it_now(model, samples):
    found = modality_transfer(model, *samples, k=K, n_resamples=50, score="visual_retrieval")
    assert found["reading"].values.tolist() == ["pictures", "text"] and found.attrs["base"] == ""
    assert found.attrs["unit"] == "attention mass" and found.attrs["score"] == "visual_retrieval"
    drawn = shown(view(found))
    assert "scenes as text. In colour" in drawn and "on pictures only" in drawn


def test_the_view_names_the_base_and_every_reading(found):
    drawn = shown(view(found))
    assert "before tuning" in drawn
    assert all(name in drawn for name in ("base text", "base pictures", "by layers alone"))


def test_forms_that_do_not_belong_together_are_refused_before_any_forward(model, samples):
    pictures, text = samples
    with torch.no_grad(), pytest.raises(ExperimentError, match="differ first at 0"):
        modality_transfer(model, pictures, Samples(list(text)[::-1]))
    with pytest.raises(ExperimentError, match="pictures among the text"):
        modality_transfer(model, pictures, pictures)
    with pytest.raises(ExperimentError, match="a base of another shape"):
        modality_transfer(model, pictures, text, HookedMLLM.from_pretrained("reference:llava-m"))
