"""Learned gates: which key/value heads need the whole context, found by training one number per head (DuoAttention).

    ranking = mech.learned_gates(model, find, sinks=4, window=64, steps=40)
    mech.localize(model, dense_heads=ranking.top(0.05), sinks=4, window=64)

Every KV head gets a gate ``a`` between 0 and 1 and outputs ``a full + (1 - a) local``: its own attention, mixed with
its attention as a local head (sinks and window). The model is frozen and is its own teacher: the final hidden states
at the answer must stay the same while the mean of the gates is pushed towards 0. Heads that can be local without harm
close; those that stay open are the ones to keep dense. Samples need no evidence: only the positions of their answers
are used.

This is not a test. Gates show what a *joint* relaxation of all heads can spare; of two redundant heads one closes, and
which one depends on the seed.
"""

from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from mech.arguments import Count, Positive, Progress, Rule, Seed, Whole, checked
from mech.data.samples import Samples, SomeSamples
from mech.errors import ExperimentError
from mech.experiments.gradients import still
from mech.experiments.ranking.ranking import Ranking
from mech.identity import weight_digest
from mech.inputs import Inputs
from mech.model import HookedMLLM
from mech.sparse.policy import Policy
from mech.sparse.training.mixture import final_states, gated


@checked
def learned_gates(
    model: HookedMLLM,
    samples: SomeSamples,
    *,
    sinks: Whole = 4,
    window: Count = 256,
    steps: Count = 40,
    batch_size: Count = 2,
    rate: Positive = 0.1,
    sparsity: Annotated[float, Rule("a number of at least 0", lambda value: value >= 0)] = 0.1,
    seed: Seed = 0,
    progress: Progress | None = None,
) -> Ranking:
    """Rank heads by gates trained to close where the model does not need the whole context.

    ``loss = |H(a) - H|^2 / |H|^2 + sparsity * mean over heads of a``, where ``H`` and ``H(a)`` are the final hidden
    states of the dense and the gated model at the rows that predict the answer. Adam updates the gates alone, which
    start at 1 and are clamped between 0 and 1. A head's score is its KV head's gate averaged over the steps, so a gate
    that closes early scores lower than one that closes late, even if both end at 0.

    Sign: the higher, the more the answer needs the whole context in this head. Unit: gate, 0 to 1.

    Args:
        model: a hooked model; it is left unchanged.
        samples: samples other than those that test the heads.
        sinks, window: what a local head sees, as in ``Policy``.
        steps: optimiser steps.
        batch_size: samples per step.
        rate: the optimiser's learning rate.
        sparsity: weight of the gates' mean.
        seed: seed of the order of samples.
        progress: called with (steps done, steps in all).

    Raises:
        ExperimentError: no samples, no steps, or inputs that fit within sinks and window.

    Cost: per step ``batch_size`` dense forwards, and as many gated forward and backward passes. A gated forward
    computes every pair of positions twice and keeps them for the backward pass: train on a few thousand tokens.

    References: DuoAttention, arXiv 2410.10819. There the loss is the plain squared distance and training takes 2,000
    steps; here the distance is relative to the states, so that one ``sparsity`` fits models of every width.
    """
    samples = Samples(samples)
    policy = Policy((), sinks=sinks, window=window)
    layers, groups = model.cfg.attention_layers, model.cfg.n_kv_heads
    rows = [model.inputs_of(sample, answer=True).to("cpu") for sample in samples]
    shortest = min(int(row.tensors["attention_mask"].sum()) for row in rows)
    if shortest <= sinks + window:
        raise ExperimentError(
            f"a sample of {shortest} tokens, which lies within {sinks} sinks and a window of {window}",
            "longer samples, so that local heads lose something", "make the window smaller",
        )  # fmt: skip
    order = np.random.default_rng(seed)
    gates = torch.ones(len(layers), groups, device=model.device, requires_grad=True)
    optimiser = torch.optim.Adam([gates], lr=rate)
    total = torch.zeros(len(layers), groups)
    with still(model):
        for step in range(steps):
            chosen = order.choice(len(rows), min(batch_size, len(rows)), replace=False)
            inputs = model.collate([rows[i] for i in chosen]).to(model.device, model.dtype)
            asked = _asked(inputs)
            with torch.no_grad():
                wanted = final_states(model, inputs)[asked]
            with gated(model, inputs, policy, gates):
                found = final_states(model, inputs)[asked]
            harm = (found - wanted).square().sum() / wanted.square().sum()
            optimiser.zero_grad()
            (harm + sparsity * gates.mean()).backward()
            optimiser.step()
            with torch.no_grad():
                gates.clamp_(0, 1)
            total += gates.detach().cpu()
            if progress:
                progress(step + 1, steps)
    mean = (total / steps).repeat_interleave(model.cfg.n_heads // groups, dim=1).double().numpy()
    named = tuple(sample.id for sample in samples if sample.id)
    weights, domains = weight_digest(model) or "", ", ".join(samples.domains)
    return Ranking(mean, None, "gate", str(model.name), domains, named, layers, weights)


def _asked(inputs: Inputs) -> Tensor:
    """The rows that predict the answer's tokens, ``[batch pos]``."""
    chosen = torch.zeros(inputs.tensors["input_ids"].shape, dtype=torch.bool)
    for row, layout in enumerate(inputs.layouts):
        chosen[row, [position - 1 for position in layout.spans["answer"]]] = True
    return chosen.to(inputs.tensors["input_ids"].device)
