"""Causal head gating: gates fitted under pressure to open or to close show which heads help and which hinder.

    found = mech.causal_head_gating(model, find)
    found["facilitating"], found["interfering"], found["irrelevant"]
    ranking = mech.rank_heads(found, "gating")          # facilitating minus interfering

Every head's output is multiplied by a gate between 0 and 1. The model is frozen, and the gates are fitted to make the
right answer likely. This is done twice: under pressure to open, only gates of heads that *interfere* close; under
pressure to close, only gates of heads that *facilitate* stay open. A head whose gate is open in the first fit and shut
in the second is *irrelevant*. Unlike attention scores this needs no evidence, and unlike ablation it fits all heads
together.

This is not a test. Of two redundant heads, either may be called irrelevant.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mech.arguments import Count, Positive, Progress, Seed, checked
from mech.axes import EXAMPLE, HEAD, LAYER
from mech.data.samples import Samples, SomeSamples
from mech.errors import ExperimentError
from mech.experiments.gradients import still
from mech.experiments.metrics import Quiz, quiz
from mech.model import AttentionCall, HookedMLLM
from mech.model.turns import alone
from mech.results import provenance
from mech.scale.measures import in_one_piece

SOURCE = "causal head gating, arXiv 2505.13737; gates start half open in both fits, and the pressure is their mean"
UNIT = "gate, 0 to 1"


@checked
@in_one_piece("gating")
@alone
def causal_head_gating(
    model: HookedMLLM,
    samples: SomeSamples,
    *,
    pressure: Positive = 0.1,
    steps: Count = 40,
    rate: Positive = 0.3,
    n_fits: Count = 4,
    batch_size: Count = 8,
    seed: Seed = 0,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Which heads facilitate the right answer, which interfere with it, and which do neither.

    ``loss = NLL of the answer - sign * pressure * mean over heads of g``, where z of every head is multiplied by its
    gate ``g``. Fitted by Adam from ``g = 0.5``, for sign +1 (open, ``g+``) and -1 (shut, ``g-``).
    ``facilitating = g-``, ``interfering = 1 - g+``, ``irrelevant = g+ (1 - g-)`` and
    ``gating = facilitating - interfering``.

    Sign: ``gating`` is positive if the head helps, negative if it hinders. Unit: gate, 0 to 1.

    Args:
        model: a hooked model; it is left unchanged.
        samples: samples with answers, other than those that test the heads.
        pressure: weight of the mean gate: a head worth less than ``pressure`` divided by the number of heads, in nats
            of the answer, is irrelevant.
        steps, rate: steps and learning rate of the optimiser for each fit; it optimises the logits of the gates.
        n_fits, seed: the samples are split into this many disjoint parts, fitted separately to give an interval.
        batch_size: samples per forward.
        progress: called with (steps done, steps in total).

    Returns:
        ``facilitating``, ``interfering``, ``irrelevant`` and ``gating`` over (example, layer, head), where each example
        is one fit; their means are the scores. ``attrs["samples"]`` has the ids of all samples.

    Raises:
        ExperimentError: no samples, or a sample without an answer.

    Cost: for each sample, twice ``steps`` forwards and backwards; the vision stack runs once.

    References: arXiv 2505.13737.
    """
    samples = Samples(samples)
    if not len(samples):
        raise ExperimentError("no samples", "some with answers", "use mech.haystacks")
    order = np.random.default_rng(seed).permutation(len(samples))
    parts = [[samples[int(i)] for i in part] for part in np.array_split(order, min(n_fits, len(samples)))]
    quizzes = [quiz(model, part, batch_size) for part in parts]
    total, done = 2 * steps * len(quizzes), 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    opened, shut = (
        np.stack([_fitted(model, questions, sign * pressure, steps, rate, tick) for questions in quizzes])
        for sign in (1, -1)
    )
    values = {"facilitating": shut, "interfering": 1 - opened, "irrelevant": opened * (1 - shut),
              "gating": shut - (1 - opened)}  # fmt: skip
    about = {"unit": UNIT, "source": SOURCE, "definition": "gates fitted to the answer, pressed open and shut"}
    coords = {EXAMPLE: [f"fit {i}" for i in range(len(parts))], LAYER: list(model.cfg.attention_layers),
              HEAD: np.arange(model.cfg.n_heads)}  # fmt: skip
    return xr.Dataset(
        {name: ((EXAMPLE, LAYER, HEAD), value, about) for name, value in values.items()}, coords,
        {
            "kind": "gating", "model": model.name, "domain": ", ".join(samples.domains),
            "samples": [sample.id or str(i) for i, sample in enumerate(samples)],
            "provenance": provenance(model, samples, seed=seed, pressure=pressure, steps=steps, rate=rate),
        },
    )  # fmt: skip


def _fitted(
    model: HookedMLLM, questions: Quiz, pressure: float, steps: int, rate: float, tick: Callable[[], None]
) -> Float[np.ndarray, "layer head"]:
    """The gates of one fit: pressure to open if ``pressure`` is positive, to close if it is negative."""
    layers = model.cfg.attention_layers
    logits = torch.zeros(len(layers), model.cfg.n_heads, device=model.device, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=rate)
    place = {layer: i for i, layer in enumerate(layers)}

    def gate(call: AttentionCall) -> Tensor | None:
        return call.z * torch.sigmoid(logits[place[call.layer]])[:, None].to(call.z)

    with still(model), model.attending(gate):
        for _ in range(steps):
            optimiser.zero_grad()
            (-pressure * torch.sigmoid(logits).mean()).backward()
            for index in range(len(questions.batches)):
                (_surprise(model, questions.batch(index)) / len(questions)).backward()
            optimiser.step()
            tick()
    return torch.sigmoid(logits).detach().double().cpu().numpy()


def _surprise(model: HookedMLLM, questions: Quiz) -> Float[Tensor, ""]:
    """The sum over samples of the negative log-probability of the whole answer."""
    (batch,), (pictures,) = questions.batches, questions.pictures
    keep = max(map(len, questions.answers)) + 1
    said = model(batch, logits_to_keep=keep, mm_encoder_outputs=dict(pictures)).float().log_softmax(-1)
    likely = [_of_answer(row, answer) for row, answer in zip(said, questions.answers, strict=True)]
    return -torch.stack(likely).sum()


def _of_answer(said: Float[Tensor, "kept vocab"], answer: Sequence[int]) -> Float[Tensor, ""]:
    # Rows end with the answer; each token is predicted one row earlier.
    rows = said[len(said) - len(answer) - 1 : len(said) - 1]
    return rows[range(len(answer)), list(answer)].sum()
