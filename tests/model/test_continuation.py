"""Running on from the middle: an unchanged variant is the kept run, from any layer and any row, and hooks see it so."""

import pytest
import torch

from mech.model import HookedMLLM
from mech.model.partial import shared_keys
from mech.model.partial.cached_run import NotResumable, cached_run, last_mlp_at
from mech.model.partial.continuation import Continuation
from mech.reference import tiny, tiny_processors

REFUSED = {
    "qwen3_5": "calls attention 0 times",
    "qwen3_5_moe": "calls attention 0 times",
    "lfm2_vl": "calls attention 0 times",
    "mllama": "cross_attention_states",
    "gemma4": "shared_kv_states",
    "gemma4_large": "shared_kv_states",
}
FAMILIES = [name for name in tiny.NAMES if name not in REFUSED]


# Grouped expert products, and attention with a softcap, exist in single precision only.
SINGLE = (*(name for name in tiny.NAMES if name.endswith("_moe")), "paligemma2", "gemma4_large")


def opened(name):
    hf = tiny.model(name)
    return HookedMLLM.from_hf(hf if name in SINGLE else hf.double(), tiny_processors.processor(name))


def batch(model):
    pictures = [tiny_processors.noise(24, 24, seed) for seed in (0, 1)]
    questions = ("What is shown here?", "Which digit is in the red frame?")
    return model.collate([model.inputs(q, [p]) for q, p in zip(questions, pictures, strict=True)])


def row_of(model, example=0, read=-1):
    inputs = batch(model)
    read += inputs.tensors["input_ids"].shape[1]
    return Continuation(model, cached_run(model, inputs, [read]), example, torch.tensor([read]))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_unchanged_variant_is_the_kept_run(name):
    model = opened(name)
    # llama4 turns its queries in single precision
    close = {"atol": 1e-4 if name in (*SINGLE, "llama4") else 1e-10, "rtol": 0}
    for example in (0, 1):
        row = row_of(model, example)
        row.faithful()
        first, stop = row.span(int(row.reads[0]) - 6)
        rows = torch.arange(first, stop)
        for start in range(len(row)):
            x = row.stream(start)[rows].expand(3, -1, -1)
            for layer in range(start, len(row) - 1):
                x = row.run(layer, x, rows)
                torch.testing.assert_close(x[1], row.stream(layer + 1)[rows], **close)
            x = row.finish(x, rows)
            logits = row.logits(x)[2]
            torch.testing.assert_close(logits, row.kept.logits[example], **close)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_run_on_says_why(name):
    model = opened(name)
    with pytest.raises(NotResumable, match=REFUSED[name]):
        cached_run(model, batch(model), [-1 + batch(model).tensors["input_ids"].shape[1]])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_mlp_runs_for_the_rows_that_are_read_and_their_logits_stay(name):
    model = opened(name)
    inputs = batch(model)
    length = inputs.tensors["input_ids"].shape[1]
    reads = [length - 3, length - 1]
    close = {"atol": 1e-4 if name in SINGLE else 1e-10, "rtol": 0}
    whole = model(inputs, logits_to_keep=torch.tensor(reads))
    run = cached_run(model, inputs, reads)
    torch.testing.assert_close(run.logits, whole, **close)
    known = run.last[0].isfinite().all(-1)
    assert known.nonzero()[:, 0].tolist() == reads


@pytest.mark.parametrize("point", ["blocks.2.mlp.hook_post", "blocks.2.hook_resid_post", "ln_final.hook_normalized"])
def test_who_listens_behind_the_last_mlp_sees_every_row(llava, point):
    inputs = batch(llava)
    with last_mlp_at(llava, [3]):
        narrow = llava.run_with_cache(inputs, names_filter=point, logits_to_keep=torch.tensor([3]))[1][point]
    torch.testing.assert_close(narrow, llava.run_with_cache(inputs, names_filter=point)[1][point], rtol=0, atol=0)
    torch.testing.assert_close(llava(inputs), llava(inputs), rtol=0, atol=0)  # and nothing stays behind


def test_a_hook_of_torchs_own_on_the_last_mlp_sees_every_row(llava):
    inputs, seen = batch(llava), []
    mlp = llava.hf_model.model.language_model.layers[-1].mlp
    handle = mlp.down_proj.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    try:
        cached_run(llava, inputs, [3])
    finally:
        handle.remove()
    assert seen == [inputs.tensors["input_ids"].shape[1]]


def test_a_stream_that_is_written_in_place_between_layers_is_refused(llava):
    handle = llava.hf_model.model.language_model.layers[1].register_forward_pre_hook(
        lambda module, args: (args[0].add_(1), None)[1]
    )
    try:
        with pytest.raises(NotResumable, match="after layer 0 is written in place"):
            row_of(llava)
    finally:
        handle.remove()


def test_small_chunks_change_nothing(llava, monkeypatch):
    row = row_of(llava)
    rows = torch.arange(*row.span(int(row.reads[0]) - 3))
    x = row.stream(0)[rows] + 0.1 * torch.randn(
        5, 1, row.kept.last.shape[-1], generator=torch.Generator().manual_seed(0)
    )
    whole = row.run(0, x, rows)
    row.kept.room.called = 2 * len(rows)
    monkeypatch.setitem(shared_keys.SCORES, "cpu", 100)
    monkeypatch.setattr(shared_keys, "_kernel", lambda q, v: None)
    torch.testing.assert_close(row.run(0, x, rows), whole)


def test_rows_that_attend_ahead_are_run_as_well():
    """A change in the middle of an image block that sees itself whole reaches the block's earlier rows."""
    model = opened("gemma3")
    row = row_of(model)
    image = batch(model).layouts[0].positions("image")
    assert row.span(int(image[5]))[0] <= image[0]
    assert row.span(int(image[-1]) + 1)[0] == image[-1] + 1


def test_only_rows_that_are_read_from_are_run(llava):
    row = row_of(llava, read=-4)
    assert row.span(row.kept.last.shape[1] - 9) == (row.kept.last.shape[1] - 9, row.kept.last.shape[1] - 3)


def test_a_model_with_hooks_is_refused_and_nothing_is_left(llava):
    with llava.hooks([("blocks.0.attn.hook_z", lambda z, hook: z)]), pytest.raises(NotResumable, match="hooks"):
        row_of(llava)
    row = row_of(llava)
    with pytest.raises(RuntimeError, match="size of tensor"):
        row.run(0, torch.zeros(1, 2, 3), torch.tensor([0, 1]))
    assert all(record.resume is None and not record.active for _, record in llava._layers)
    assert not any(module._forward_pre_hooks for module in llava.hf_model.modules())
