"""What a sweep asks of a card: so many kernels for a layer whatever the number of variants, and no wait in between."""

import pytest
import torch
from cards import Cards
from pairs import METRIC, pair

import mech
from mech.model import HookedMLLM
from mech.model.partial import shared_keys
from mech.model.partial.cached_run import cached_run
from mech.model.partial.continuation import Continuation
from mech.reference import tiny, tiny_processors


@pytest.fixture
def card(monkeypatch):
    """A card on which attention that is called by name is one kernel, as on a real one."""
    stock = shared_keys._kernel
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    monkeypatch.setattr(shared_keys, "_kernel", lambda q, v: fused if q.device.type == "card" else stock(q, v))
    with Cards() as watched:
        yield watched


def opened(name="qwen3_vl"):
    return HookedMLLM.from_hf(tiny.model(name).to("card:0"), tiny_processors.processor(name), name=name)


def cost(watched, run):
    """Kernels, waits for the card, and copies to it that were waited for."""
    for counted in (watched.launched, watched.waits, watched.sent):
        counted.clear()
    run()
    kernels = sum(count for name, count in watched.launched.items() if "_unsafe_view" not in name)
    return kernels, watched.waits.total(), watched.sent.total()


def inputs(model):
    return pair(model, questions=("What is shown here?",))


def continued(model):
    clean, _ = inputs(model)
    last = len(clean.layout) - 1
    return Continuation(model, cached_run(model, clean, [last]), 0, torch.tensor([last])), last


@pytest.mark.parametrize("rows", [1, 4])
def test_a_layer_starts_as_many_kernels_for_any_number_of_variants(card, rows):
    row, last = continued(opened())

    def layer(variants, first):
        x = row.stream(1)[None, first:].repeat(variants, 1, 1)
        return cost(card, lambda: row.run(1, x, torch.arange(first, last + 1)))

    plain, few, many = layer(8, 0), layer(8, last + 1 - rows), layer(64, last + 1 - rows)
    assert few == many and plain[1:] == many[1:] == (0, 0)
    assert plain[0] < many[0] <= plain[0] + 10  # attention to shared keys, and the merge of both


@pytest.mark.parametrize("point, most", [("attn.hook_z", 3), ("hook_resid_pre", 3), ("attn.hook_q", 3.5)])
@pytest.mark.parametrize("positions", ["last", "image"])
def test_a_sweep_starts_no_more_kernels_than_three_forwards(card, point, most, positions):
    """Of all heads, both captures included; and it reads back as often whatever is patched where."""
    model = opened()
    clean, corrupted = inputs(model)
    forward, *_ = cost(card, lambda: model(clean, logits_to_keep=1))
    over = ("layer", "head") if point == "attn.hook_z" else ("layer",)
    options = {"point": point, "over": over, "positions": positions}
    kernels, _, sent = cost(card, lambda: mech.activation_patching(model, clean, corrupted, METRIC, **options))
    assert kernels <= (most + (positions == "image") / 2) * forward
    assert card.waits["aten._local_scalar_dense.default"] <= 40 and sent <= 20
