"""Token ids that are not in the vocabulary: refused before any forward, never counted from its end."""

import pytest
import torch

import mech
from mech.errors import InputError, MechError
from mech.model import HookedMLLM
from mech.reference import tiny, tiny_processors
from mech.reference.tiny_tokenizer import VOCAB

PICTURES = [tiny_processors.noise(16, 16, seed) for seed in range(2)]
WRONG = (-5, -1, VOCAB, 10**6)
NO_IDS = (True, 1.5)


@pytest.fixture(scope="module")
def model():
    return HookedMLLM.from_hf(tiny.model("llava"), tiny_processors.processor("llava"))


@pytest.fixture(scope="module")
def pair(model):
    return [model.inputs("Is it?", images=[picture]) for picture in PICTURES]


@pytest.fixture
def no_forward(model, monkeypatch):
    monkeypatch.setattr(model.hf_model, "forward", None)


@pytest.mark.parametrize("token", WRONG)
@pytest.mark.parametrize("metric", [mech.LogProb, mech.Probability, mech.Rank, lambda one: mech.LogitDiff(101, one)])
def test_a_metric_refuses_them(model, pair, no_forward, metric, token):
    clean, corrupted = pair
    for run in (
        lambda: mech.activation_patching(model, clean, corrupted, metric(token)),
        lambda: mech.path_patching(model, clean, corrupted, metric(token), senders=["L0H1"]),
        lambda: mech.attribution(model, clean, corrupted, metric(token)),
    ):
        with pytest.raises(InputError, match="the token"):
            run()


@pytest.mark.parametrize("token", NO_IDS)
@pytest.mark.parametrize("metric", [mech.LogProb, mech.Probability, mech.Rank, lambda one: mech.LogitDiff(101, one)])
def test_what_is_no_id_is_refused_where_it_is_written(model, pair, no_forward, metric, token):
    with pytest.raises(MechError, match=f"={token}"):
        metric(token)
    with pytest.raises(MechError, match=str(token)):
        mech.logit_lens(model, pair[0], track=[101, token])
    with pytest.raises(MechError, match=str(token)):
        model.tokens_to_residual_directions(token)


@pytest.mark.parametrize("token", WRONG)
def test_one_among_the_answers_is_refused_with_the_first(model, pair, no_forward, token):
    clean, corrupted = pair
    with pytest.raises(InputError, match="the token"):
        mech.activation_patching(model, [clean, clean], [corrupted, corrupted], mech.LogProb([101, token]))


@pytest.mark.parametrize("token", WRONG)
def test_lenses_and_residual_directions_refuse_them(model, pair, no_forward, token):
    for run in (
        lambda: mech.logit_lens(model, pair[0], track=[101, token]),
        lambda: mech.ov_reading(model, [(1, 0)], pair[0], track=[token]),
        lambda: model.tokens_to_residual_directions(token),
    ):
        with pytest.raises(InputError, match="the token"):
            run()


def test_residual_directions_of_a_tensor_of_ids(model):
    with pytest.raises(InputError, match="the token -5"):
        model.tokens_to_residual_directions(torch.tensor([101, -5]))
    ids = torch.tensor([101, 0, VOCAB - 1])
    assert torch.equal(model.tokens_to_residual_directions(ids), model.W_U[:, ids].T)
    assert torch.equal(model.tokens_to_residual_directions(101), model.W_U[:, 101])
