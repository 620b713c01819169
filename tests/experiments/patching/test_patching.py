"""Activation patching: the fast sweep against a forward for every cell, the laws, and what is refused."""

import itertools

import numpy as np
import pytest
import torch
from pairs import METRIC, QUESTIONS, axes, opened, pair

from mech.data.haystacks import haystacks
from mech.data.regions import Box
from mech.errors import ExperimentError, InputError, PointError
from mech.experiments.metrics import KL, LogitDiff, LogProb, Probability, Rank
from mech.experiments.patching import sweeps
from mech.experiments.patching.activation import activation_patching
from mech.experiments.patching.plan import POINTS
from mech.model import HookedMLLM
from mech.model.partial.continuation import Continuation
from mech.reference import planted, tiny_processors
from mech.results import load, save

FAMILIES = ("llava", "llava_mistral", "qwen3_vl", "gemma3", "paligemma2", "glm4v", "qwen3_vl_moe")
LITERAL = {"gemma4": "shared_kv_states", "qwen3_5": "calls attention 0 times"}


def both_ways(model, *args, **options):
    fast = activation_patching(model, *args, method="wavefront", **options)
    slow = activation_patching(model, *args, method="literal", **options)
    assert (fast.algorithm, slow.algorithm) == ("wavefront", "literal")
    for name in ("metric", "clean", "corrupted"):
        scale = float(abs(slow.metric).max())
        np.testing.assert_allclose(
            fast[name], slow[name], atol=scale * (1e-10 if model.dtype == torch.float64 else 1e-5), rtol=0
        )
    return fast


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return opened(request.param)


@pytest.mark.parametrize("positions", ["last", "image"])
@pytest.mark.parametrize("point", ["attn.hook_z", "attn.hook_v", "hook_resid_post"])
def test_a_sweep_is_a_forward_for_every_cell(family, point, positions):
    found = both_ways(family, *pair(family), METRIC, point=point, over=axes(point), positions=positions)
    assert abs(found.effect).max() > 0.01


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("point", POINTS)
def test_at_every_point_and_in_both_directions(llava, point, direction):
    both_ways(
        llava, *pair(llava), METRIC, point=point, over=axes(point), positions="question", direction=direction,
        layers=[0, 2],
    )  # fmt: skip


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl"])
def test_several_images(name):
    model = opened(name)
    both_ways(model, *pair(model, QUESTIONS[:1], pictures=2), METRIC, positions="image")


def test_a_video():
    model = opened("qwen3_vl")
    frames = [[tiny_processors.noise(24, 24, seed + i) for i in range(4)] for seed in (0, 50)]
    clean, corrupted = (model.inputs(QUESTIONS[0], video=video) for video in frames)
    both_ways(model, clean, corrupted, METRIC, over=("layer", "head"), positions="question")


def test_bf16_within_its_own_rounding():
    model = opened("llava", torch.bfloat16)
    fast, slow = (
        activation_patching(model, *pair(model), METRIC, positions="question", method=method)
        for method in ("wavefront", "literal")
    )
    assert abs(fast.metric - slow.metric).max() < 0.1 * abs(slow.clean - slow.corrupted).max()


@pytest.mark.parametrize("metric", [LogProb(300), Probability(300), Rank(300), KL()], ids=repr)
def test_every_metric_reads_the_same_either_way(llava, metric):
    found = both_ways(llava, *pair(llava), metric, positions="all")
    if isinstance(metric, KL):
        assert abs(found.clean).max() < 1e-12 and (found.corrupted > 0).all()


def test_a_longer_answer_is_read_where_it_is_taught(llava):
    clean, corrupted = (
        llava.inputs(QUESTIONS[0], [tiny_processors.noise(24, 24, seed)], answer="seven") for seed in (0, 50)
    )
    for metric in (LogProb("seven"), LogitDiff("seven", "sevty")):
        both_ways(llava, clean, corrupted, metric, positions="question")
    bare = [llava.inputs(QUESTIONS[0], [tiny_processors.noise(24, 24, seed)]) for seed in (0, 50)]
    with pytest.raises(ExperimentError, match="hold 0 tokens of it"):
        activation_patching(llava, *bare, LogProb("seven"))


def test_over_positions_and_regions(llava):
    clean, corrupted = pair(llava, QUESTIONS[:1])
    each = both_ways(
        llava, clean, corrupted, METRIC, point="hook_resid_pre", over=("position", "layer"), positions="image"
    )
    assert each.metric.dims == ("example", "position", "layer")
    assert list(each.position) == list(clean.layout.positions("image"))
    regions = [Box(0, 0, 12, 24), Box(12, 0, 24, 24), "question", [int(each.position[3])]]
    some = both_ways(llava, clean, corrupted, METRIC, point="hook_resid_pre", over=("layer", "region"), regions=regions)
    np.testing.assert_allclose(some.metric[0, :, 3], each.metric[0, 3], atol=1e-9)
    assert some.region[2] == "question"


def test_over_the_cells_of_a_picture_and_the_words_of_a_question(llava):
    clean, corrupted = pair(llava, QUESTIONS[1:])
    cells, words = clean.layout.cells(2, 2), clean.layout.words()
    assert sorted(itertools.chain(*cells.values())) == clean.layout.positions("image").tolist()
    assert cells["0,1"] == clean.layout.positions(Box(12, 0, 24, 12)).tolist()
    assert " ".join(words) == QUESTIONS[1]
    assert list(itertools.chain(*words.values())) == clean.layout.positions("question").tolist()
    options = {"point": "hook_resid_pre", "over": ("layer", "region")}
    found = both_ways(llava, clean, corrupted, METRIC, regions=cells | words, **options)
    assert list(found.region) == [*cells, *words] and abs(found.effect.sel(region="0,1")).max() > 1e-6


def test_screening_patches_the_cells_with_the_largest_estimates(llava):
    options = {"point": "hook_resid_pre", "over": ("layer", "position"), "positions": "image"}
    both = pair(llava, QUESTIONS[:1])
    exact = activation_patching(llava, *both, METRIC, **options)
    some = activation_patching(llava, *both, METRIC, method="screened", confirm=5, **options)
    assert int(some.confirmed.sum()) == 5
    np.testing.assert_allclose(some.effect.where(some.confirmed), exact.effect.where(some.confirmed), atol=1e-9)
    assert np.isnan(some.effect.where(~some.confirmed)).all()
    chosen = abs(some.estimate).where(some.confirmed)
    assert float(chosen.min()) >= float(abs(some.estimate).where(~some.confirmed).max())
    with pytest.raises(ExperimentError, match="gradient"):
        activation_patching(llava, *both, Rank(300), method="screened", **options)


def test_estimates_become_exact_as_the_two_runs_meet(llava):
    clean, _ = pair(llava, QUESTIONS[:1])
    noise = torch.randn(clean.tensors["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
    near = clean.tensors["pixel_values"] + 1e-4 * noise
    corrupted = type(clean)({**clean.tensors, "pixel_values": near}, clean.layouts)
    for direction in ("denoise", "noise"):
        found = activation_patching(
            llava, clean, corrupted, METRIC, method="screened", confirm=12, direction=direction, positions="image"
        )
        assert int(found.confirmed.sum()) == found.confirmed.size
        np.testing.assert_allclose(found.estimate, found.effect, atol=2e-3)


@pytest.mark.parametrize("name", LITERAL)
def test_where_it_cannot_be_run_on_each_cell_is_a_forward(name):
    model = opened(name)
    found = activation_patching(model, *pair(model), METRIC, point="hook_resid_post", over=("layer",))
    assert found.algorithm == "literal" and LITERAL[name] in found.reason
    np.testing.assert_allclose(found.effect[:, -1], 1, atol=1e-9)  # the last stream is all there is
    with pytest.raises(ExperimentError, match=LITERAL[name]):
        activation_patching(model, *pair(model), METRIC, method="wavefront")


@pytest.mark.parametrize("positions", ["last", "image"])
@pytest.mark.parametrize("few", [0, 64])
def test_a_model_that_is_run_on_wrongly_is_found_out(llava, positions, few, monkeypatch):
    """An unchanged variant that does not give the kept run's logits, beside the others or by itself, ends it."""
    finish = Continuation.finish
    monkeypatch.setattr(sweeps, "FEW", few)
    monkeypatch.setattr(Continuation, "finish", lambda self, x, rows: finish(self, x, rows).roll(1, -1))
    done = []
    found = activation_patching(
        llava, *pair(llava), METRIC, positions=positions, layers=[0, 2], progress=lambda n, total: done.append(n)
    )
    assert found.algorithm == "literal" and "differs from it by" in found.reason
    assert done == [*range(1, found.effect.size + 1)]
    monkeypatch.undo()
    right = activation_patching(llava, *pair(llava), METRIC, positions=positions, layers=[0, 2], method="literal")
    np.testing.assert_array_equal(found.metric, right.metric)


def test_vision_and_projector_points(llava):
    clean, corrupted = pair(llava)
    tower = activation_patching(llava, clean, corrupted, METRIC, point="vision.hook_resid_pre", over=("layer",))
    np.testing.assert_allclose(tower.effect[:, 0], 1, atol=1e-9)
    heads = activation_patching(llava, clean, corrupted, METRIC, point="vision.attn.hook_z", layers=[0])
    assert heads.sizes["head"] == llava.cfg.vision_heads and abs(heads.effect).max() > 1e-6
    joined = activation_patching(llava, clean, corrupted, METRIC, point="projector.hook_out", over=())
    np.testing.assert_allclose(joined.effect, 1, atol=1e-9)
    places = clean.layouts[0].positions("image")[:2]
    for point in ("projector.hook_out", "hook_embed"):
        options = {"over": ("region",), "regions": ["image", places]}
        ours = activation_patching(llava, clean, corrupted, METRIC, point=point, **options)
        entry = activation_patching(llava, clean, corrupted, METRIC, point="hook_resid_pre", layers=[0], **options)
        np.testing.assert_allclose(ours.metric, entry.metric, atol=1e-9)


# -- laws -------------------------------------------------------------------------------------------------------------


def test_a_run_patched_into_itself_changes_nothing(llava):
    clean, _ = pair(llava)
    for point in ("attn.hook_z", "hook_resid_mid", "attn.hook_k"):
        found = activation_patching(llava, clean, clean, METRIC, point=point, over=axes(point))
        np.testing.assert_allclose(found.metric, found.clean.broadcast_like(found.metric), atol=1e-9)
        assert np.isnan(found.effect).all()  # there is no gap to have a share of


def test_patching_everything_is_the_other_run(llava):
    for direction in ("denoise", "noise"):
        found = activation_patching(
            llava, *pair(llava), METRIC, point="hook_resid_pre", over=("layer",), direction=direction
        )
        np.testing.assert_allclose(found.effect, 1, atol=1e-9)


def test_all_heads_of_a_layer_are_its_attention(llava):
    z, out = (
        activation_patching(llava, *pair(llava), METRIC, point=point, over=("layer",), positions="question")
        for point in ("attn.hook_z", "hook_attn_out")
    )
    np.testing.assert_allclose(z.metric, out.metric, atol=1e-9)


def test_several_layers_at_once(llava):
    clean, corrupted = pair(llava)
    found = activation_patching(llava, clean, corrupted, METRIC, point="hook_attn_out", over=())
    assert found.reason == "several layers are patched at once"
    one = activation_patching(llava, clean, corrupted, METRIC, point="hook_attn_out", over=(), layers=[1])
    assert one.algorithm == "wavefront"
    by_layer = activation_patching(llava, clean, corrupted, METRIC, point="hook_attn_out", over=("layer",))
    np.testing.assert_allclose(one.metric, by_layer.metric.sel(layer=1), atol=1e-9)


@pytest.mark.parametrize("name", planted.NAMES)
def test_the_planted_heads_have_their_planted_effects(name):
    known = planted.circuit(name)
    model = HookedMLLM.from_hf(known.model, known.processor)
    metric = LogitDiff(known.sample.answer, known.sample.counterfactual.answer)
    for direction in ("denoise", "noise"):
        found = activation_patching(model, known.clean, known.corrupted, metric, direction=direction)
        expected = np.zeros((found.sizes["layer"], found.sizes["head"]))
        for roles, effect in known.truth.effects.items():
            if len(roles) == 1:
                change = effect.recovered if direction == "denoise" else effect.lost
                expected[known.truth.heads[roles[0]]] = change
        np.testing.assert_allclose(found.effect[0], expected, atol=1e-4)


def test_lists_and_samples_are_examples(tmp_path):
    model = HookedMLLM.from_pretrained("reference:llava-s")
    samples = haystacks("grounding", 3, seed=5)
    metric = LogitDiff([s.answer for s in samples], [s.counterfactual.answer for s in samples])
    options = {"point": "hook_resid_post", "over": ("layer",), "positions": "last"}
    found = activation_patching(model, samples, None, metric, **options)
    assert found.effect.dims == ("example", "layer") and found.sizes["example"] == 3
    for i, sample in enumerate(samples):
        alone = activation_patching(
            model, model.inputs_of(sample), model.inputs_of(sample.counterfactual),
            LogitDiff(sample.answer, sample.counterfactual.answer), **options,
        )  # fmt: skip
        np.testing.assert_allclose(found.metric[i], alone.metric[0], atol=1e-4)
    assert found.provenance["data"]["n"] == 3
    assert load(save(found, tmp_path / "patching.nc")).identical(found)


def test_a_sweep_costs_a_few_forwards(llava):
    seen = []
    found = activation_patching(
        llava, *pair(llava), METRIC, positions="last", progress=lambda done, total: seen.append((done, total))
    )
    cells = found.effect.size
    assert 2 < found.forwards < 4 and seen == [(i + 1, cells) for i in range(cells)]


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_layouts_that_differ_are_refused_with_the_first_difference(llava):
    clean, corrupted = (llava.inputs(question, [tiny_processors.noise(24, 24, 0)]) for question in QUESTIONS)
    with pytest.raises(InputError, match="first at position") as refused:
        activation_patching(llava, clean, corrupted, METRIC)
    at = next(i for i, (a, b) in enumerate(zip(clean.layout.tokens, corrupted.layout.tokens, strict=False)) if a != b)
    for text in (f"position {at}", repr(clean.layout.tokens[at]), repr(corrupted.layout.tokens[at])):
        assert text in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"point": "hook_zz"}, "point='hook_zz'"),
        ({"over": ("layer", "head"), "point": "hook_resid_post"}, "different axes"),
        ({"over": ("layer", "head"), "point": "attn.hook_v"}, "kv_head"),
        ({"over": ("layer", "region")}, "regions"),
        ({"regions": ["image"]}, "regions"),
        ({"direction": "backwards"}, "direction"),
        ({"method": "fast"}, "method"),
        ({"method": "screened", "confirm": 0}, "confirm=0"),
        ({"layers": [7]}, "layers from 0 to 2"),
        ({"over": ("layer", "position"), "positions": "question", "point": "hook_resid_pre"}, "whose positions differ"),
        ({"point": "vision.attn.hook_z", "positions": "image"}, "vision stack"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_forward(llava, options, message, monkeypatch):
    clean, corrupted = pair(llava)
    monkeypatch.setattr(HookedMLLM, "forward", lambda *args, **kwargs: pytest.fail("a forward was run"))
    with pytest.raises(ExperimentError, match=message):
        activation_patching(llava, clean, corrupted, METRIC, **options)


def test_a_vision_layer_behind_the_features_is_refused():
    model = opened("llava")
    with pytest.raises(PointError, match="feature layer"):
        activation_patching(model, *pair(model), METRIC, point="vision.attn.hook_z", layers=[2])


def test_answers_that_are_the_same_are_refused(llava):
    with pytest.raises(ExperimentError, match="do not differ"):
        activation_patching(llava, *pair(llava), LogitDiff(7, 7))
