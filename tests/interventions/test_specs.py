"""Patch, Knockout, Scale, Custom and the ablation of layers and tokens: each done once more by hand, with hooks."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch

from mech.data.haystacks import haystacks
from mech.data.regions import Box
from mech.errors import ExperimentError, InputError, MechError, PointError, RegionError
from mech.inputs import encode
from mech.interventions import Ablate, Custom, Knockout, Patch, Scale, intervene, reference_activations
from mech.interventions.reference import kinds
from mech.interventions.specs import PATCHED
from mech.model import HookedMLLM

WITHOUT_REFERENCE = Ablate("hook_mlp_out", layers=[2], to="zero")


@pytest.fixture(scope="module", params=["llava-s", "qwen-s"])
def model(request):
    return HookedMLLM.from_pretrained(f"reference:{request.param}")


@pytest.fixture(scope="module")
def pair(model):
    """Two samples of one layout: the counterfactual shows another digit in the same place."""
    sample = haystacks("grounding", 1, seed=21)[0]
    return sample, model.inputs_of(sample), model.inputs_of(sample.counterfactual)


@pytest.fixture(scope="module")
def batch(model):
    """Two questions of different length: the shorter one is padded."""
    rows = sorted((model.inputs_of(s) for s in haystacks("grounding", 6, seed=11)), key=lambda row: len(row.layout))
    assert len(rows[0].layout) < len(rows[-1].layout)
    return model.collate([rows[0], rows[-1]])


def run(model, inputs, *specs):
    with intervene(model, *specs) as changed:
        return changed(inputs)


def real(inputs):
    return torch.stack([kinds(layout) >= 0 for layout in inputs.layouts])


@pytest.mark.parametrize("point", sorted(PATCHED))
def test_a_patch_is_a_hook_that_writes_the_other_run(model, pair, point):
    """At the question's positions; two heads where the point has any."""
    _, clean, other = pair
    where = clean.layout.positions("question" if point != "hook_embed" else "image")
    names = ["hook_embed"] if point == "hook_embed" else [f"blocks.{layer}.{point}" for layer in (1, 3)]
    _, source = model.run_with_cache(other, names_filter=names)

    def write(value, hook):
        new = source[hook.name]
        if point in ("attn.hook_pattern", "attn.hook_attn_scores"):
            value[:, [0, 1], where[:, None]] = new[:, [0, 1], where[:, None]]
        elif PATCHED[point]:
            value[:, where[:, None], [0, 1]] = new[:, where[:, None], [0, 1]]
        else:
            value[:, where] = new[:, where]
        return value

    expected = model.run_with_hooks(clean, fwd_hooks=[(name, write) for name in names])
    assert not torch.equal(expected, model(clean))
    heads = [(layer, head) for layer in (1, 3) for head in (0, 1)]
    options = dict(heads=heads) if PATCHED[point] else dict(layers=() if point == "hook_embed" else (1, 3))
    positions = "image" if point == "hook_embed" else "question"
    for given in (other, source):
        patch = Patch(point, given, positions=positions, **options)
        torch.testing.assert_close(run(model, clean, patch), expected, atol=1e-5, rtol=1e-4)


def test_the_whole_stream_of_another_run_is_the_other_run(model, pair):
    _, clean, other = pair
    for point in ("hook_resid_pre", "hook_resid_mid", "hook_resid_post"):
        found = run(model, clean, Patch(point, other, layers=[3]))
        torch.testing.assert_close(found, model(other), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(run(model, clean, Patch("attn.hook_z", clean, layers=[2])), model(clean))


def test_a_patch_from_another_layout_is_refused_with_the_first_difference(model, pair):
    sample, clean, _ = pair
    longer = model.inputs("Which digit is in the very red frame, if any?", images=sample.images)
    with pytest.raises(InputError, match="position"), intervene(model, Patch(source=longer, heads=[(0, 0)])) as patched:
        patched(clean)


@pytest.mark.parametrize("heads", [(), ((1, 0), (1, 5), (3, 2))])
def test_a_knockout_is_minus_infinity_before_the_softmax(model, batch, heads):
    spec = Knockout("question", "image", heads=heads, layers=() if heads else (1, 3))
    knocked = {1: [0, 5], 3: [2]} if heads else {1: slice(None), 3: slice(None)}

    def cut(scores, hook):
        for row, layout in enumerate(batch.layouts):
            query, key = layout.positions("question"), layout.positions("image")
            block = torch.zeros(scores.shape[-2:], dtype=torch.bool)
            block[query[:, None], key] = True
            heads = knocked[int(hook.name.split(".")[1])]
            scores[row, heads] = scores[row, heads].masked_fill(block, float("-inf"))
        return scores

    expected = model.run_with_hooks(
        batch, fwd_hooks=[(f"blocks.{layer}.attn.hook_attn_scores", cut) for layer in (1, 3)]
    )
    found = run(model, batch, spec)
    assert (found - model(batch))[real(batch)].abs().amax() > 1e-3
    torch.testing.assert_close(found[real(batch)], expected[real(batch)], atol=1e-4, rtol=1e-4)


def test_knocking_out_everything_leaves_nothing(model, pair):
    """A position that may attend to nothing puts out zero."""
    _, clean, _ = pair
    with intervene(model, Knockout("last", "all", layers=[2])) as cut:
        _, cache = cut.run_with_cache(clean, names_filter="blocks.2.attn.hook_z")
    assert torch.equal(cache["blocks.2.attn.hook_z"][0, -1], torch.zeros(model.cfg.n_heads, model.cfg.d_head))
    assert cache["blocks.2.attn.hook_z"][0, -2].abs().amax() > 0


def test_an_edge_that_is_not_there_cannot_be_cut(model, pair):
    with pytest.raises(ExperimentError, match="changed nothing"):
        run(model, pair[1], Knockout("image", "question", layers=[1]))  # the picture comes first: it sees no question


def test_scaling(model, batch):
    heads = [(1, 0), (3, 2)]
    zero = run(model, batch, Ablate(heads=heads, to="zero"))
    torch.testing.assert_close(run(model, batch, Scale(heads, 0.0)), zero)
    assert torch.equal(run(model, batch, Scale(heads, 1.0)), model(batch))

    def double(z, hook):
        z[:, :, [h for layer, h in heads if layer == int(hook.name.split(".")[1])]] *= 2
        return z

    expected = model.run_with_hooks(batch, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", double) for layer in (1, 3)])
    torch.testing.assert_close(
        run(model, batch, Scale(heads, 2.0))[real(batch)], expected[real(batch)], atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("point", ["hook_mlp_out", "hook_attn_out"])
@pytest.mark.parametrize("to", ["mean", "zero", "resample"])
def test_layers_are_ablated_as_heads_are(model, batch, point, to):
    reference = haystacks("grounding", 4, seed=12)
    bank = reference_activations(model, reference, point=point)
    name = f"blocks.2.{point}"
    with intervene(model, Ablate(point, layers=[2], to=to, reference=reference)) as without:
        logits = without(batch)
        _, cache = without.run_with_cache(batch, names_filter=name)
    kind = torch.stack([kinds(layout) for layout in batch.layouts])
    here = cache[name][real(batch)]
    if to == "zero":
        assert torch.equal(here, torch.zeros_like(here))
    elif to == "mean":
        torch.testing.assert_close(here, bank.mean[kind[real(batch)], 2])
    else:
        draws = bank.draws[kind[real(batch)], :, 2]
        assert (draws - here[:, None]).abs().amax(-1).amin(1).max() < 1e-6
        again = run(model, batch, Ablate(point, layers=[2], to=to, reference=bank))
        assert torch.equal(again, logits)
    expected = model.run_with_hooks(batch, fwd_hooks=[(name, lambda value, hook: cache[name])])
    torch.testing.assert_close(logits[real(batch)], expected[real(batch)], atol=1e-5, rtol=1e-4)


def test_the_mean_of_a_point_is_that_of_every_position_of_its_kind(model):
    samples = haystacks("grounding", 4, seed=12)
    bank = reference_activations(model, samples, point="hook_embed", batch_size=3)
    values = [[], []]
    for sample in samples:
        row = model.inputs_of(sample)
        _, cache = model.run_with_cache(row, names_filter="hook_embed")
        for kind in (0, 1):
            values[kind].append(cache["hook_embed"][0, kinds(row.layout) == kind])
    for kind in (0, 1):
        torch.testing.assert_close(bank.mean[kind, 0], torch.cat(values[kind]).mean(0), atol=1e-5, rtol=1e-4)


def test_visual_tokens_of_a_box_are_ablated(model, pair):
    sample, clean, _ = pair
    box = sample.evidence[0]
    spec = Ablate("hook_embed", positions=box, to="mean", reference=haystacks("grounding", 4, seed=12))
    with intervene(model, spec) as without:
        _, cache = without.run_with_cache(clean, names_filter="hook_embed")
    _, before = model.run_with_cache(clean, names_filter="hook_embed")
    changed = (cache["hook_embed"] - before["hook_embed"])[0].abs().amax(-1) > 0
    assert changed.nonzero().flatten().tolist() == clean.layout.positions(box).tolist()


@pytest.mark.parametrize(
    "spec", [Knockout("text", "image", layers=[1, 2]), Scale([(2, 1), (3, 0)], 0.3), WITHOUT_REFERENCE], ids=repr
)
def test_generation_with_a_cache_is_recomputation_without_one(model, pair, spec):
    sample = pair[0]
    prompt = model.processor.prompt(sample.question, images=1)
    with intervene(model, spec) as without:
        ids = without.generate(pair[1], max_new_tokens=4, eos_token_id=None)[0]
        text = prompt + model.tokenizer.decode(ids)
        row = encode(
            model.processor, text, sample.images, spans={"question": (0, 1), "answer": (len(prompt), len(text))}
        )
        written = list(row.layout.spans["answer"])
        assert row.tensors["input_ids"][0, written].tolist() == ids.tolist()
        logits = without(row)[0]
    assert logits[[position - 1 for position in written]].argmax(-1).tolist() == ids.tolist()


def test_the_last_position_is_each_written_one_in_turn(model, pair):
    """While decoding, "last" cuts the edges of every new token, as "all" does; of the prompt neither cuts any."""

    def written(*specs):
        steps = []
        record = Custom("blocks.2.attn.hook_z", lambda z, hook: steps.append(z.clone()) and None)
        with intervene(model, record, *specs) as changed:
            changed.generate(pair[1], max_new_tokens=3, eos_token_id=None)
        return steps

    free = written()
    last, everything = (written(Knockout(who, "question", layers=[2], phase="decode")) for who in ("last", "all"))
    assert torch.equal(last[0], free[0]) and last[1].shape[1] == 1
    assert not torch.equal(last[1], free[1])
    torch.testing.assert_close(last[1], everything[1])


def test_custom_runs_any_hook_and_specs_meet_in_their_order(model, pair):
    _, clean, _ = pair
    seen = []

    def keep(value, hook):
        seen.append(hook.name)

    custom = Custom(("blocks.1.hook_resid_post", "ln_final.hook_normalized"), keep)
    assert torch.equal(run(model, clean, custom), model(clean))
    assert seen == ["blocks.1.hook_resid_post", "ln_final.hook_normalized"]
    assert "keep" in custom.describe()["fn"]
    halved_then_off = run(model, clean, Scale([(1, 0)], 0.5), Ablate(heads=[(1, 0)], to="zero"))
    torch.testing.assert_close(halved_then_off, run(model, clean, Ablate(heads=[(1, 0)], to="zero")))
    doubled = run(model, clean, Scale([(1, 0)], 4.0), Scale([(1, 0)], 0.5))
    torch.testing.assert_close(doubled, run(model, clean, Scale([(1, 0)], 2.0)))


def test_nothing_is_left_behind_and_the_model_itself_is_not_changed(model, pair):
    _, clean, other = pair
    before = model(clean)
    with intervene(model, Patch(source=other, layers=[1]), WITHOUT_REFERENCE, Knockout(layers=[2])) as changed:
        assert not torch.equal(changed(clean), before)
        assert torch.equal(model(clean), before)
    assert torch.equal(model(clean), before)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_specs_are_frozen_and_describe_themselves():
    spec = Ablate("hook_embed", positions=[Box(1, 2, 3, 4)], to="zero")
    assert spec.describe()["positions"] == [repr(Box(1, 2, 3, 4))] and spec.describe()["kind"] == "Ablate"
    assert Knockout(layers=range(2, 4)).describe()["layers"] == [2, 3]
    assert Patch(heads=[(1, 2)]) == Patch(heads=((1, 2),)) and "source" not in repr(Patch(source={}))
    with pytest.raises(FrozenInstanceError):
        spec.to = "mean"


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        (lambda: Ablate("hook_mlp_out", to="zero"), ExperimentError, "without layers"),
        (lambda: Ablate("hook_mlp_out", layers=[99], to="zero"), ExperimentError, "layer 99"),
        (lambda: Ablate("hook_mlp_out", layers=[1], to="paper"), ExperimentError, "'mean' or 'zero' or 'resample'"),
        (lambda: Ablate("hook_resid_post", layers=[1], to="zero"), ExperimentError, "point="),
        (lambda: Patch(heads=[(0, 0)]), ExperimentError, "without source"),
        (lambda: Patch("hook_resid_pre", {}, heads=[(0, 0)]), ExperimentError, "has no heads"),
        (lambda: Patch("attn.hook_k", {}, heads=[(0, 99)]), ExperimentError, "kv_head 99"),
        (lambda: Patch("attn.hook_z", {}, layers=[1]), ExperimentError, "names_filter"),
        (lambda: Patch("attn.hook_zz", {}, layers=[1]), ExperimentError, "use 'attn.hook_z'"),
        (lambda: Knockout("question", "image", layers=[1], heads=[(0, 0)]), ExperimentError, "one of the two"),
        (lambda: Knockout("questions"), ExperimentError, "use 'question'"),
        (lambda: Scale([], 2.0), ExperimentError, "at least one head"),
        (lambda: Scale([(0, 0)], float("nan")), ExperimentError, "finite"),
        (lambda: Custom("blocks.1.hook_zz", print), PointError, "no activation point"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_before_any_forward(model, monkeypatch, spec, error, says):
    monkeypatch.setattr(HookedMLLM, "forward", lambda *_, **__: pytest.fail("a forward was run"))
    with pytest.raises(error, match=says), intervene(model, spec()):
        pass


def test_positions_that_the_inputs_lack_are_refused_before_the_forward(model, pair, monkeypatch):
    monkeypatch.setattr(HookedMLLM, "forward", lambda *_, **__: pytest.fail("a forward was run"))
    for where, error in (([9999], RegionError), (Box(0, 0, 5000, 5000), RegionError)):
        with pytest.raises(error), intervene(model, Scale([(0, 0)], 2.0, positions=where)) as scaled:
            scaled(pair[1])
    with pytest.raises(ExperimentError, match="specs='ablate'"), intervene(model, "ablate"):
        pass


@pytest.mark.parametrize("made", [np.asarray, torch.as_tensor, np.ndarray.tolist], ids=["numpy", "torch", "list"])
def test_a_boolean_mask_means_its_true_positions(model, pair, made):
    _, clean, other = pair
    visual = clean.layout.kind == 1
    layers, heads = np.arange(model.cfg.n_layers) == 2, np.zeros((model.cfg.n_layers, model.cfg.n_heads), dtype=bool)
    heads[2, 1] = heads[3, 0] = True
    meant = {"positions": "image", "heads": [(2, 1), (3, 0)], "layers": [2], "key": "image", "query": "question"}
    masks = {"positions": made(visual), "heads": made(heads), "layers": made(layers), "key": made(visual)}
    masks["query"] = made(np.isin(np.arange(len(visual)), clean.layout.positions("question")))
    for spec, words in (
        (lambda **said: Ablate(to="zero", **said), ("heads", "positions")),
        (lambda **said: Ablate("hook_attn_out", to="zero", **said), ("layers", "positions")),
        (lambda **said: Patch(source=other, **said), ("heads", "positions")),
        (lambda **said: Patch("hook_resid_post", other, **said), ("layers", "positions")),
        (lambda **said: Scale(factor=3.0, **said), ("heads", "positions")),
        (lambda **said: Knockout(**said), ("query", "key", "layers")),
        (lambda **said: Knockout(**said), ("query", "key", "heads")),
    ):
        by_mask = run(model, clean, spec(**{word: masks[word] for word in words}))
        by_word = run(model, clean, spec(**{word: meant[word] for word in words}))
        assert torch.equal(by_mask, by_word) and (by_mask - model(clean)).abs().max() > 0


def test_masks_of_another_row_or_model_are_refused_before_any_forward(model, pair, monkeypatch):
    monkeypatch.setattr(HookedMLLM, "forward", lambda *_, **__: pytest.fail("a forward was run"))
    short, of_rows = pair[1].layout.kind[1:] == 1, np.ones((2, model.cfg.n_heads), dtype=bool)
    with pytest.raises(RegionError, match="as a mask of"), intervene(model, Scale([(0, 0)], 2, positions=short)) as run:
        run(pair[1])
    for spec in (Ablate(heads=of_rows, to="zero"), Ablate("hook_mlp_out", layers=[True], to="zero")):
        with pytest.raises(ExperimentError, match="a mask of"), intervene(model, spec):
            pass


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Ablate(heads=[(0.5, 1)], to="zero"),
        lambda: Ablate("hook_mlp_out", layers=[1.5], to="zero"),
        lambda: Ablate("hook_mlp_out", layers=["0"], to="zero"),
        lambda: Ablate(heads=[(1, 0)], positions=[1.5], to="zero"),
        lambda: Ablate(heads=[(1, 0)], positions=[True, 2], to="zero"),
        lambda: Ablate(heads=[(1, 0)], to="zero", phase="anything"),
        lambda: Ablate(heads=[(1, 0)], to="resample", seed=(1, 2)),
        lambda: Ablate(heads=[(1, 0)], to="mean", reference=3),
        lambda: Patch(source=3, heads=[(1, 0)]),
        lambda: Scale([(1, 0)], True),
        lambda: Custom([], print),
        lambda: Custom("blocks.1.attn.hook_z", None),
        lambda: Scale([(1, 0)], 2.0, position="image"),
        lambda: Scale([(1, 0)]),
    ],
)
def test_what_means_something_else_is_refused_when_it_is_written(wrong):
    with pytest.raises(MechError, match=r"Expected: (.|\n)*Try: "):
        wrong()
