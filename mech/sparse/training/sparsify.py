"""Sparsity for your own model: gates, and LoRA on frozen weights, learned from your samples.

    found = mech.sparsify(model, samples, window=256, target=0.02)
    print(found)                                   # 2 of 24 KV heads stay dense, 0.012 nats from the dense model
    with found.serve(model) as fast:               # adapter merged, other heads local; the model as before afterwards
        fast.generate_text(inputs, max_new_tokens=32)
    found.save("sparse")                           # policy.json for localize, adapter_*.* as PEFT writes them

The model is its own teacher: gates and adapter have to preserve what the dense model predicts at the answers. So the
samples need answers but no evidence. The objective is that of ``objectives``: as few open gates as a loss allows.

Gates alone take a few dozen samples. An adapter that makes up for missing heads takes more: it is trained on what the
samples show, so they should cover the lengths that will be served. Whether the result holds on other samples is not
measured here: keep some for testing, and evaluate the model that ``serve`` gives.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mech.arguments import Amount, Count, Positive, Seed, Whole, checked
from mech.data.samples import Samples, SomeSamples
from mech.errors import ExperimentError
from mech.experiments.gradients import still
from mech.experiments.metrics import Quiz, answer_logits, quiz
from mech.experiments.ranking.ranking import Ranking, head_count
from mech.files import make_folder
from mech.identity import weight_digest
from mech.model import HookedMLLM
from mech.sparse.groups import expanded
from mech.sparse.localize import Localized, check_question, localize
from mech.sparse.policy import Policy
from mech.sparse.training.loop import Batch, SparseTraining, refuse_without_groups
from mech.sparse.training.lora import CONFIG, Lora
from mech.sparse.training.objectives import OBJECTIVES, Objective

POLICY = "policy.json"
Logits = list[Float[Tensor, "token vocab"]]
Served = tuple[Policy, float, float]  # with its divergence and agreement


@dataclass(frozen=True, eq=False, repr=False)
class Sparsified:
    """The result of ``sparsify``.

    Attributes:
        policy: for ``localize``.
        adapter: the LoRA weights; None for gates alone.
        ranking: key/value heads by their final gate; every query head has the gate of its group.
        loss: divergence of the served model's predictions of the answers from the dense model's, in nats per token.
        agreement: the share of samples on which the served model predicts every token of the answer as the dense one.
        n_kv_heads: how many key/value heads stay dense, out of how many.
        curve: the training curve.
    """

    policy: Policy
    adapter: Lora | None
    ranking: Ranking
    loss: float
    agreement: float
    n_kv_heads: tuple[int, int]
    curve: list[dict[str, float]] = field(default_factory=list)

    @contextmanager
    def serve(self, model: HookedMLLM) -> Iterator[Localized]:
        """While open, the model has the adapter merged and runs under the policy; afterwards it is restored."""
        with ExitStack() as opened:
            if self.adapter is not None:
                opened.enter_context(self.adapter.merged(model))
            yield opened.enter_context(localize(model, self.policy))

    def save(self, folder: str | Path) -> Path:
        """``policy.json`` for ``Policy.from_json``, and the adapter as PEFT writes it.

        Raises:
            OutputError: the folder cannot be written.
        """
        folder = Path(folder)
        make_folder(folder)
        self.policy.to_json(folder / POLICY)
        if self.adapter is not None:
            self.adapter.save(folder)
        return folder

    def __repr__(self) -> str:
        kept, of = self.n_kv_heads
        beside = "" if self.adapter is None else f", with LoRA of rank {self.adapter.rank}"
        return (
            f"Sparsified({kept} of {of} KV heads stay dense{beside}; {self.loss:.3f} nats from the dense model, whose "
            f"answers it gives to {self.agreement:.0%} of these samples)"
        )


@checked
def sparsify(
    model: HookedMLLM,
    samples: SomeSamples,
    *,
    sinks: Whole = 4,
    window: Count = 256,
    target: Positive | None = 0.02,
    strength: Positive | None = None,
    at_most: Amount | None = None,
    rank: Whole = 8,
    steps: Count = 120,
    batch_size: Count = 4,
    rate: Positive = 1e-3,
    seed: Seed = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Sparsified:
    """Learn which key/value heads can be local, and an adapter that makes up for it.

    ``loss = KL(dense || sparse) + strength * expected share of open gates``, with the divergence averaged over the
    tokens of the answers. With a ``target`` the strength is adapted so that the divergence reaches it (see
    ``Strength``). In the final two fifths of the steps gates are 0 or 1 and only the adapter learns. If so few heads
    may stay dense that sets of them can be tried (``at_most`` times the number of KV heads <= 64), the best ones are
    chosen first and the adapter learns under that policy in every step. In the end as few heads stay dense as the
    target allows, highest gates first.

    Unit: nats per token of the answer.

    Args:
        model: a hooked model; left unchanged.
        samples: samples with answers that are longer than sinks and window; keep those you test on apart.
        sinks, window: what a local head sees, as in ``Policy``.
        target: the largest acceptable divergence.
        strength: instead of a target, a constant weight of the penalty; the divergence is then not bounded.
        at_most: the largest number, or share, of key/value heads that may stay dense.
        rank: rank of the adapter; 0 for gates alone.
        steps: steps of Adam.
        batch_size: samples per step.
        rate: peak learning rate of the adapter.
        seed: seed of the order of samples, the gates' noise, and the adapter.
        progress: called with (steps done, total steps).

    Raises:
        ExperimentError: neither target nor strength, or both; samples within sinks and window; a question longer than
            the window; a target that cannot be met (the message gives the best value reached).
        UnsupportedModel: layers that differ in their number of key/value heads, or share keys and values; with an
            adapter, weights that are quantized or already adapted.

    Cost: one dense forward per sample; ``steps`` times ``batch_size`` forward and backward passes, with dense and local
    attention of all heads while gates are sampled and that of the served model afterwards; a few forwards per sample
    at the end.

    References: arXiv 2410.10819 (gates by KV head), 1712.01312 (hard-concrete gates), 2512.05865 (as few edges as a
    loss allows, with LoRA).
    """
    if (target is None) == (strength is None):
        raise ExperimentError(f"target={target}, strength={strength}", "one of the two", "strength=None, target=0.02")
    refuse_without_groups(model)
    samples, most = Samples(samples), len(model.cfg.attention_layers) * model.cfg.n_kv_heads
    limit = most if at_most is None else head_count(at_most, most, "at_most")
    with localize(model, Policy((), sinks, window)):  # refuses layers that share keys and values
        pass
    samples = by_length(model, samples, sinks, window)
    adapter = Lora.fresh(model, rank, seed) if rank else None
    objective = OBJECTIVES["constrained"] if strength is None else replace(OBJECTIVES["gates"], strength=strength)
    objective = replace(objective, target=target, warm_up=min(objective.warm_up, steps // 8))
    with still(model):
        questions = quiz(model, samples, batch_size)
        teacher = _said(model, questions)
        training = _training(model, questions, teacher, adapter, objective, Policy((), sinks, window), limit,
                             steps=steps, rate=rate, seed=seed)  # fmt: skip
        with ExitStack() as stack:
            if adapter is not None:
                stack.enter_context(adapter.attached(model))
            training.run(progress=progress)
        return _settled(training, questions, teacher, adapter, samples)


def by_length(model: HookedMLLM, samples: Samples, sinks: int, window: int) -> Samples:
    """The samples from shortest to longest, so that those of a batch have similar lengths and little padding.

    Raises:
        ExperimentError: a sample within sinks and window, where a local head loses nothing; a question longer than the
            window.
    """
    layouts = [model.inputs_of(sample, answer=True).layout for sample in samples]
    check_question(Policy((), sinks, window), layouts)
    lengths = [len(layout) for layout in layouts]
    if min(lengths) <= sinks + window:
        raise ExperimentError(
            f"a sample of {min(lengths)} tokens, which lies within {sinks} sinks and a window of {window}",
            "samples that are longer, so that a local head loses something", "make the window smaller",
        )  # fmt: skip
    return Samples([samples[i] for i in np.argsort(lengths, kind="stable").tolist()])


@torch.no_grad()
def _said(model: Callable[..., Tensor], questions: Quiz) -> Logits:
    """Log-probabilities of the answer tokens, one tensor per sample."""
    return [said.log_softmax(-1) for said in answer_logits(model, questions)]


def _divergence(found: Logits, wanted: Logits) -> Float[Tensor, " token"]:
    """``KL(wanted || found)`` for each token."""
    parts = [(there.exp() * (there - here)).sum(-1) for here, there in zip(found, wanted, strict=True)]
    return torch.cat(parts)


def _agree(found: Logits, wanted: Logits) -> float:
    same = [torch.equal(here.argmax(-1), there.argmax(-1)) for here, there in zip(found, wanted, strict=True)]
    return sum(same) / len(same)


def _training(
    model: HookedMLLM, questions: Quiz, teacher: Logits, adapter: Lora | None, objective: Objective, policy: Policy,
    limit: int, *, steps: int, rate: float, seed: int,
) -> SparseTraining:  # fmt: skip
    starts = np.cumsum([0, *map(len, questions.batches)])

    def batch(step: int) -> Batch:
        turn, place = divmod(step, len(questions.batches))
        index = int(np.random.default_rng([seed, turn]).permutation(len(questions.batches))[place])
        mine = teacher[starts[index] : starts[index + 1]]
        return Batch(questions.batches[index], partial(_loss, model, questions.batch(index), mine))

    return SparseTraining(
        model, objective, policy, batch, {} if adapter is None else adapter.weights, steps=steps,
        settle=0 if adapter is None else 2 * steps // 5, rate=rate, most=limit, seed=seed,
    )  # fmt: skip


def _loss(model: HookedMLLM, questions: Quiz, teacher: Logits) -> tuple[Tensor, float]:
    found = [said.log_softmax(-1) for said in answer_logits(model, questions)]
    return _divergence(found, teacher).mean(), _agree(found, teacher)


def _settled(
    training: SparseTraining, questions: Quiz, teacher: Logits, adapter: Lora | None, samples: Samples
) -> Sparsified:
    """The policy with as many of the highest gates open as the target needs, evaluated as ``localize`` serves it."""
    model, policy = training.model, training.policy
    layers, groups = model.cfg.attention_layers, model.cfg.n_kv_heads
    value = training.gates.log_alpha.detach().cpu().double().numpy()
    order = [(layers[i // groups], i % groups) for i in np.argsort(-value, axis=None, kind="stable").tolist()]
    limit, target = training.most or len(order), training.objective.target

    def served(n: int) -> Served:
        dense = Policy(expanded(order[:n], model.cfg), policy.sinks, policy.window)
        with localize(model, dense) as fast:
            found = _said(fast, questions)
        return dense, float(_divergence(found, teacher).mean()), _agree(found, teacher)

    with ExitStack() as stack:
        if adapter is not None:
            stack.enter_context(adapter.merged(model))
        best = _fewest(served, int(training.gates.chosen().sum()), limit, target)
    if target is not None and best[1] > target:
        raise ExperimentError(
            f"target={target:g} nats with at most {limit} of {len(order)} dense KV heads",
            f"at least {best[1]:.3g}: the best that {training.steps} steps reached",
            "raise target or at_most, or give more steps",
        )
    ids = tuple(sample.id for sample in samples if sample.id)
    ranking = Ranking(np.repeat(value, model.cfg.n_heads // groups, axis=1), None, "gate", str(model.name),
                      ", ".join(samples.domains), ids, layers, weight_digest(model) or "")  # fmt: skip
    kept = len(best[0].dense_heads) * groups // model.cfg.n_heads
    return Sparsified(best[0], adapter, ranking, best[1], best[2], (kept, len(order)), training.curve)


def _fewest(served: Callable[[int], Served], n: int, limit: int, target: float | None) -> Served:
    """The smallest number of open gates that meets the target, or what comes closest; ``n`` without a target.

    From the ``n`` that training left open it goes up until the target is met, and then bisects below.
    """
    found = best = served(n)
    if target is None:
        return found
    missed = -1
    while found[1] > target and n < limit:
        missed, n = n, min(limit, n + max(1, n // 4))
        found = served(n)
        best = min(best, found, key=lambda one: one[1])
    while best[1] <= target and n - missed > 1:
        middle = (missed + n) // 2
        found = served(middle)
        if found[1] <= target:
            n, best = middle, found
        else:
            missed = middle
    return best


def load_sparsified(folder: str | Path) -> tuple[Policy, Lora | None]:
    """The policy and the adapter that ``Sparsified.save`` wrote.

    Raises:
        OutputError: the folder does not exist or does not hold them.
    """
    folder = Path(folder)
    return Policy.from_json(folder / POLICY), Lora.load(folder) if (folder / CONFIG).exists() else None
