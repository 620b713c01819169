"""The training loop for sparsity: whole models (the experiment), or gates and LoRA on a frozen one (``sparsify``).

    training = SparseTraining(model, OBJECTIVES["gates"], Policy((), 4, 16), batch, weights, steps=300)
    training.run(Path("state.pt"))          # resumes from there if it was stopped
    training.dense_heads()                  # what its gates chose

With gates there are two stages. In the first, gates are sampled and trained together with the weights. In the final
``settle`` steps every gate is 0 or 1, and the weights adapt to exactly the policy that will be served, running the
attention of ``localize``; if the objective has a target, more gates close while the loss leaves room, cheapest first,
each tried on a batch. If only a few gates may stay open, the first stage is skipped: there are few enough sets to try
them all, and weights trained with more open gates would have to unlearn what they learned.

Every random number depends only on the seed and the step, so a training that was stopped and resumed gives the same
weights as one that ran through, bit for bit on one machine.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mech.errors import UnsupportedModel
from mech.experiments.ranking.ranking import Heads
from mech.inputs import Inputs
from mech.model import HookedMLLM
from mech.reference.smol.adapter import Adapters
from mech.reference.smol.steps import Checkpoint, learning_rate
from mech.sparse.groups import expanded
from mech.sparse.localize import Localized, localize
from mech.sparse.policy import Policy
from mech.sparse.training.hard_concrete import HardConcrete
from mech.sparse.training.mixture import far_mass, gated
from mech.sparse.training.objectives import Objective, Strength, spread

EVERY = 20  # steps between entries of the curve, and between checkpoints
PATIENCE = 6  # steps the weights get to recover from gates that closed, before more gates close
ALONE, PROBES = 64, 4  # most sets tried when few gates may stay open, and the batches each is tried on
TRIED = 16  # how many of the lowest open gates are tried before some of them close
REST = 1 / 3  # final share of the settling steps, in which no gate closes


@dataclass(frozen=True, eq=False)
class Batch:
    """What one step learns from.

    Attributes:
        inputs: the inputs, from which the masks of local heads are made.
        loss: runs the model on them; returns the task loss in nats and a figure for the curve, such as accuracy.
    """

    inputs: Inputs
    loss: Callable[[], tuple[Float[Tensor, ""], float]]


@dataclass
class SparseTraining:
    """One training run: its settings and its current state.

    Attributes:
        model: a hooked model; freezing everything outside ``weights`` is up to the caller.
        objective: the penalty added to the task loss.
        policy: sinks and window of local heads; its dense heads are ignored.
        batch: what each step learns from.
        weights: the parameters that are trained besides the gates.
        steps, settle: number of steps, and how many of them at the end run with gates of 0 and 1 (all of them if only
            a few gates may stay open).
        rate, gate_rate: Adam's peak learning rate for the weights, and its constant rate for the gates.
        most: the largest number of key/value heads whose gates may stay open at the end.
        seed: seed of the gates' noise.
    """

    model: HookedMLLM
    objective: Objective
    policy: Policy
    batch: Callable[[int], Batch]
    weights: Mapping[str, nn.Parameter]
    steps: int
    settle: int = 0
    rate: float = 5e-4
    gate_rate: float = 0.15
    most: int | None = None
    seed: int = 0
    gates: HardConcrete = field(init=False)
    strength: Strength = field(init=False)
    curve: list[dict[str, float]] = field(init=False, default_factory=list)

    def __post_init__(self):
        cfg = self.model.cfg
        refuse_without_groups(self.model)
        self.gates = HardConcrete(len(cfg.attention_layers), cfg.n_kv_heads).to(self.model.device)
        self.strength = Strength(self.objective)
        if self.weights and self.has_gates and self._few():
            self.settle = self.steps
        groups = [{"params": list(self.weights.values())}, {"params": list(self.gates.parameters())}]
        self._optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.98), weight_decay=0.0)

    @property
    def has_gates(self) -> bool:
        """Whether the objective trains gates."""
        return self.objective.penalty == "gates"

    def run(self, checkpoint: Path | None = None, progress: Callable[[int, int], None] | None = None) -> None:
        """Run the remaining steps, resuming from ``checkpoint`` if it exists; it is written every ``EVERY`` steps."""
        parts = {"weights": Adapters(self.weights), "gates": self.gates, "optimizer": self._optimizer}
        kept = None if checkpoint is None else Checkpoint(checkpoint, **parts, strength=self.strength)
        figures: list[dict[str, float]] = []
        for step in range(kept.step if kept else 0, self.steps):
            figures.append(self.step(step))
            if (step + 1) % EVERY == 0 or step + 1 == self.steps:
                entry = {name: mean(one[name] for one in figures) for name in figures[0]}
                entry |= {"open": int(self.gates.chosen().sum())} if self.has_gates else {}
                self.curve.append({"step": step + 1, **entry})
                if kept:
                    kept.save(step + 1, **entry)
                figures.clear()
            if progress:
                progress(step + 1, self.steps)
        self.curve = kept.curve if kept else self.curve
        if self.has_gates and not self.settle and self.steps:
            self._limit(self.steps, self.batch(self.steps))

    def step(self, step: int) -> dict[str, float]:
        """One step; returns ``task``, ``figure``, ``penalty`` and ``strength``."""
        batch, searching = self.batch(step), step < self.steps - self.settle
        if step == self.steps - self.settle and self.has_gates:
            self._limit(step, batch)
        task, figure, penalty = self._forward(batch, step, searching)
        strength = self.strength.at(step) if searching else 0.0
        for group, rate in zip(self._optimizer.param_groups, self._rates(step), strict=True):
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        (task + strength * penalty if strength else task).backward()
        torch.nn.utils.clip_grad_norm_(list(self.weights.values()), 1.0)
        self._optimizer.step()
        self.strength.seen(task.item())
        if not searching:
            self._close(step, batch)
        return {"task": task.item(), "figure": figure, "penalty": float(penalty.detach()), "strength": strength}

    def _rates(self, step: int) -> list[float]:
        weights = learning_rate(step, self.steps, self.rate, warm_up=10, least=0.05)
        return [weights, self.gate_rate] if self.weights else [self.gate_rate]

    def _forward(self, batch: Batch, step: int, searching: bool) -> tuple[Tensor, float, Tensor]:
        """The task loss under the objective, its figure, and the penalty."""
        if self.has_gates and not searching:
            with self._served():
                return *batch.loss(), self.gates.chosen().float().mean()
        if self.has_gates:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            with gated(self.model, batch.inputs, self.policy, self.gates.draw(len(batch.inputs), generator)):
                return *batch.loss(), self.gates.open_probability().mean()
        if self.objective.penalty == "none":
            return *batch.loss(), torch.zeros(())
        with far_mass(self.model, batch.inputs, self.policy) as found:
            loss = batch.loss()
        mass = torch.stack(found)
        return *loss, mass.mean() if self.objective.penalty == "far" else spread(mass)

    def _limit(self, step: int, batch: Batch) -> None:
        """Enforce ``most`` as settling begins, and restart the running mean of the loss."""
        self.strength.forget()
        if self.most is not None and self._few():
            self._keep(self.most, self._probes(step, batch))
        while self.most is not None and (over := int(self.gates.chosen().sum()) - self.most) > 0:
            places = self._cheapest(batch)
            self.gates.close([place for place, _ in places[: max(1, min(over, len(places) // 2))]])

    def _probes(self, step: int, batch: Batch) -> list[Batch]:
        """The batch of a step and those of the next ones: one alone says too little about what closing a gate costs."""
        return [batch, *(self.batch(step + i) for i in range(1, PROBES))]

    def _cost(self, batches: Sequence[Batch], places: Sequence[tuple[int, int]]) -> float:
        """The increase of the task loss when these gates are closed, mean over batches."""
        return mean(self._closed(batch, places) - self._closed(batch) for batch in batches)

    def _few(self) -> bool:
        """Whether so few gates may stay open that it is affordable to try the sets of them."""
        n_open = int(self.gates.chosen().sum())
        return self.most is not None and self.most < n_open and self.most * n_open <= ALONE

    def _keep(self, most: int, batches: Sequence[Batch]) -> None:
        """Close all but the gates that do best on their own, chosen greedily.

        Closing the cheapest gate again and again would not find them: of heads that back each other up, each is free to
        close until the last one is gone.
        """
        places = [(i, group) for i, group in self.gates.chosen().nonzero().tolist()]
        if len(places) <= most:
            return
        for _ in range(most):
            loss = {
                place: mean(self._closed(batch, [one for one in places if one != place]) for batch in batches)
                for place in places
            }
            places.sort(key=lambda place: loss[place], reverse=True)
            places.pop()
        self.gates.close(places)

    def _close(self, step: int, batch: Batch) -> None:
        """Close more gates if the loss is within its target and the weights have time left to recover."""
        target, settled = self.objective.target, step - (self.steps - self.settle) + 1
        due = settled % PATIENCE == 0 and settled <= (1 - REST) * self.settle
        if not (self.has_gates and target is not None and due and self.strength.mean <= target):
            return
        room, places = target - self.strength.mean, self._cheapest(batch)
        n = int((np.cumsum([max(0.0, cost) for _, cost in places]) <= room).sum())
        batches, chosen = self._probes(step, batch) if n else [], [place for place, _ in places]
        while n and self._cost(batches, chosen[:n]) > room:  # on one batch, or one by one, they may cost less
            n //= 2
        self.gates.close(chosen[:n])

    def _cheapest(self, batch: Batch) -> list[tuple[tuple[int, int], float]]:
        """The lowest open gates with the increase of the task loss when each is closed alone; cheapest first."""
        chosen = self.gates.chosen()
        order = self.gates.log_alpha.detach().masked_fill(~chosen, torch.inf).flatten().argsort(stable=True)
        places = [divmod(index, chosen.shape[1]) for index in order[: min(TRIED, int(chosen.sum()))].tolist()]
        base = self._closed(batch)
        return sorted(((place, self._closed(batch, [place]) - base) for place in places), key=lambda one: one[1])

    @torch.no_grad()
    def _closed(self, batch: Batch, places: Sequence[tuple[int, int]] = ()) -> float:
        """The task loss with gates of 0 and 1 and these closed as well."""
        with self._served(places):
            return batch.loss()[0].item()

    def _served(self, closed: Sequence[tuple[int, int]] = ()) -> Localized:
        """The model under the policy of gates of 0 and 1, some more of them closed."""
        return localize(self.model, replace(self.policy, dense_heads=self.dense_heads(closed)))

    def dense_heads(self, closed: Sequence[tuple[int, int]] = ()) -> Heads:
        """The query heads of all key/value heads whose gates are open, leaving out those in ``closed``."""
        layers, chosen = self.model.cfg.attention_layers, self.gates.chosen()
        for place in closed:
            chosen[place] = False
        return expanded([(layers[i], group) for i, group in chosen.nonzero().tolist()], self.model.cfg)


def refuse_without_groups(model: HookedMLLM) -> None:
    """Refuse models whose key/value heads do not form a grid of layers and heads.

    Raises:
        UnsupportedModel: no layer with attention heads, or layers that differ in their number of key/value heads.
    """
    counts = {model.cfg.kv_heads[layer] for layer in model.cfg.attention_layers}
    if len(counts) != 1:
        what = f"layers of {sorted(counts)} key/value heads" if counts else "no layer with attention heads"
        raise UnsupportedModel(
            f"{model.name} ({model.cfg.family}), with {what}, to be trained for sparsity",
            "as many key/value heads in every attention layer", "choose the dense heads of a policy by a ranking",
        )  # fmt: skip
