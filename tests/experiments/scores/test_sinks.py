"""Sinks that were put there are found, and what they take away from RAM is what they hold."""

import numpy as np
import pytest

import mech
from mech.errors import ExperimentError
from mech.experiments.attention.maps import attention_from
from mech.experiments.scores.measure import Score, head_scores
from mech.experiments.scores.ram import retrieval_attention_mass
from mech.experiments.scores.sinks import KINDS, attention_sinks, sink_tokens, with_sinks, without_sinks
from mech.model import HookedMLLM
from mech.reference import planted, tiny, tiny_processors

DIM = 5


def asked(n=3):
    return mech.Samples(
        mech.Sample(
            "Which digit is red?" if i else "Which?", "7", images=(tiny_processors.noise(16, 16, i),),
            evidence=(mech.Box(0, 0, 7, 7),), id=str(i),
        )
        for i in range(n)
    )  # fmt: skip


@pytest.fixture
def model():
    """Massive activations from layer 1 on: in the first visual token, which is evidence, and in the last but one."""
    model = HookedMLLM.from_hf(tiny.model("llava"), tiny_processors.processor("llava"), name="tiny")

    def massive(stream, hook):
        left = stream.shape[1] - lengths["now"]
        stream[:, [left + 1, left + 3], DIM] += 1000
        return stream

    # Batches are padded on the left; one length at a time keeps the hook simple.
    lengths = {"now": 0}
    model.add_hook("blocks.1.hook_resid_pre", massive)
    model.lengths = lengths
    yield model
    model.reset_hooks()


def test_sinks_by_state_are_those_that_were_put_there(model):
    samples = asked(1)
    row = model.inputs_of(samples[0])
    model.lengths["now"] = len(row.layout)
    found = attention_sinks(model, samples, tau=5.0)
    sink = found["sink"].values[0]
    assert not sink[0].any(), "layer 0 comes before"
    for layer in (1, 2):
        assert np.flatnonzero(sink[layer]).tolist() == [1, 3]
    assert found["peak_dim"].values.tolist() == [-1, DIM, DIM]
    assert found["strength"].values[0, 1, 1] == pytest.approx(np.sqrt(model.cfg.d_model), rel=1e-2)
    evidence = row.layout.positions(samples[0].evidence)
    kinds = found["kind"].values[0]
    assert [KINDS[kinds[p] - 1] for p in (0, 1, 3)] == [
        "first", *("evidence" if p in evidence else "visual" if row.layout.kind[p] else "text" for p in (1, 3))
    ]  # fmt: skip
    none = attention_sinks(model, samples, tau=5.0, dims=[DIM + 1])
    assert not none["sink"].any() and sink_tokens(none)[0].startswith("No token is a sink (by state): the strongest")


@pytest.mark.parametrize("by", ["state", "attention"])
def test_ram_is_what_is_on_sinks_and_what_is_not(model, by):
    samples = asked(1)
    row = model.inputs_of(samples[0])
    model.lengths["now"] = len(row.layout)
    found = attention_sinks(model, samples, by=by, tau=5.0, share=0.08)
    ram = retrieval_attention_mass(model, samples)["ram"]
    np.testing.assert_allclose(found["ram"], ram, atol=1e-6)
    looked = attention_from(model, row)[0].numpy()
    evidence = row.layout.positions(samples[0].evidence)
    sink = found["sink"].values[0]
    assert sink.any() and not sink.all()
    if by == "attention":
        np.testing.assert_array_equal(sink, looked.mean(1) > 0.08)
        np.testing.assert_allclose(found["strength"].values[0], looked.mean(1), atol=1e-6)
    for layer in range(len(sink)):
        on = [p for p in evidence if sink[layer, p]]
        np.testing.assert_allclose(found["ram_on_sinks"][0, layer], looked[layer][:, on].sum(-1), atol=1e-6)
        np.testing.assert_allclose(found["sink_mass"][0, layer], looked[layer][:, sink[layer]].sum(-1), atol=1e-6)
    np.testing.assert_allclose(found["ram_without"] + found["ram_on_sinks"], found["ram"], atol=1e-6)
    assert mech.rank_heads(found, "ram_without").model == "tiny"
    if by == "state":
        same = head_scores(model, samples, {"no": Score(calibrate="no_sinks")}, sink_tau=5.0)["no"]
        np.testing.assert_allclose(found["ram_without"], same, atol=1e-6)


def test_batches_of_different_lengths_give_what_single_rows_give():
    model = HookedMLLM.from_hf(tiny.model("qwen3_vl"), tiny_processors.processor("qwen3_vl"))
    samples = asked(3)
    for options in ({"by": "attention", "share": 0.07}, {"tau": 2.0}):
        together = attention_sinks(model, samples, **options)
        for i, sample in enumerate(samples):
            alone = attention_sinks(model, [sample], **options).isel(example=0)
            length = alone.sizes["pos"]
            one = together.isel(example=i)
            for name in ("ram", "ram_on_sinks", "sink_mass"):
                np.testing.assert_allclose(one[name], alone[name], atol=1e-6)
            np.testing.assert_allclose(one["strength"].isel(pos=slice(length)), alone["strength"], atol=1e-5)
            assert np.isnan(one["strength"].isel(pos=slice(length, None))).all() and not one["kind"][length:].any()
            np.testing.assert_array_equal(one["sink"].isel(pos=slice(length)), alone["sink"])


def test_the_planted_sink_head_pays_the_first_token_and_no_ram_sits_there():
    key = planted.circuit("roles")
    model = HookedMLLM.from_hf(key.model, key.processor)
    found = attention_sinks(model, key.samples(3), by="attention", share=0.2)
    layer, head = key.truth.heads["sink"]
    assert found["sink_mass"].sel(layer=layer, head=head).values == pytest.approx(1, abs=1e-3)
    assert bool(found["sink"].sel(layer=layer, pos=0).all())
    retrieval = found.sel(dict(zip(("layer", "head"), key.truth.heads["retrieval"], strict=True)))
    assert retrieval["ram"].values == pytest.approx(1, abs=1e-3)
    said = sink_tokens(found)
    assert said[0] == "The first position is a sink in 100% of the examples (1.0 an example)."
    assert said[-1].endswith("of all RAM sits on sinks (by attention).")


def test_sinks_on_the_border_are_reported_and_can_be_left_out_of_maps():
    """Four by four visual tokens, twelve of them on the border; massive activations in a corner and in the middle."""
    model = HookedMLLM.from_hf(tiny.model("llava"), tiny_processors.processor("llava"), name="tiny")
    samples = asked(1)
    row = model.inputs_of(samples[0])
    visual = row.layout.positions("image")
    corner, middle = int(visual[3]), int(visual[5])

    def massive(stream, hook):
        if stream.shape[1] > middle:  # not of the token that is being generated
            stream[:, [corner, middle], DIM] += 1000
        return stream

    ranking = mech.rank_heads(retrieval_attention_mass(model, samples))
    with model.hooks([("blocks.1.hook_resid_pre", massive)]):
        maps = mech.attention_maps(model, samples, ranking, bands={"all": ranking.heads})
        found = attention_sinks(model, samples, tau=5.0)
    border = found["border"].values[0]
    assert border[visual].sum() == 12 and not border[np.setdiff1d(np.arange(len(border)), visual)].any()
    assert border[corner] and not border[middle]
    said = " ".join(sink_tokens(found))
    assert "50% of visual sinks lie on the border of their picture, 75% of visual tokens do." in said
    left = without_sinks(maps, model, samples, found)
    changed = (left["attention"] != maps["attention"]).values[0]
    late = maps["shown_layer"].values > 0
    assert not changed[~late].any(), "layer 0 comes before"
    assert np.flatnonzero(changed[late].any(0)).tolist() == [3, 5]
    assert (left["attention"].values[0][late][:, [3, 5]] == 0).all() and left.attrs["sinks"] == "left out"
    marked = with_sinks(maps, model, samples, found)
    assert ((marked["sink"] == 1) == (left["attention"] != maps["attention"])).all()
    assert marked["attention"].equals(maps["attention"]) and marked.attrs["sinks"] == "by state, threshold 5"
    with pytest.raises(ExperimentError, match="the same samples in all three"):
        without_sinks(maps, model, [*samples, *samples], found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"by": "states"}, "use 'state'"),
        ({"tau": 0}, "a finite number above 0"),
        ({"dims": [999]}, "leave dims out"),
        ({"by": "attention", "share": 1.0}, "share=1.0"),
        ({"samples": []}, "at least one"),
        ({"samples": [mech.Sample("Which?", "7", images=(tiny_processors.noise(16, 16, 0),))]}, "have no evidence"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_any_forward(model, monkeypatch, change, message):
    monkeypatch.setattr(HookedMLLM, "forward", lambda *_, **__: pytest.fail("a forward was run"))
    with pytest.raises(ExperimentError, match=message):
        attention_sinks(model, **{"samples": asked(), **change})
