"""The gradient of a metric at activation points, in one forward and one backward: the basis of attribution.

    found = differentiate(model, inputs, ["blocks.3.attn.hook_z"], score)
    found.slopes["blocks.3.attn.hook_z"]            # d metric / d activation, in the activation's shape

Parameters require no gradient while it runs, so the graph is kept only from the first named point on, without what only
weight gradients need: memory is about that of the activations after that point. Afterwards the parameters are as
before.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from mech.errors import ExperimentError
from mech.experiments.metrics import Reading
from mech.inputs import Inputs
from mech.model import AttentionCall, HookedMLLM
from mech.model.turns import alone

Score = Callable[[Inputs], Float[Tensor, " batch"]]
Edit = tuple[str, Callable[[Tensor, HookPoint], Tensor]]


@dataclass(eq=False)
class Slopes:
    """Activations and their gradients, from one forward and one backward.

    Attributes:
        values: activations by name; for a module, its input.
        slopes: gradient of the metrics' sum at each name (rows do not mix, so it is each row's own); for a module, at
            its output.
        calls: what the attention of each requested layer saw; ``slopes[layer]`` is then the gradient at its z.
        scores: the metric of every row.
    """

    values: dict[Any, Tensor] = field(default_factory=dict)
    slopes: dict[Any, Tensor] = field(default_factory=dict)
    calls: dict[int, AttentionCall] = field(default_factory=dict)
    scores: Tensor = field(default_factory=lambda: torch.zeros(0))


@alone
def differentiate(
    model: HookedMLLM,
    run: Inputs,
    names: Sequence[str],
    score: Score,
    *,
    edits: Sequence[Edit] = (),
    modules: Mapping[str, nn.Module] | None = None,
    attention: tuple[str, Sequence[int]] | None = None,
) -> Slopes:
    """Run the model and differentiate the metric at some places.

    Args:
        model: a hooked model.
        run: the inputs.
        names: activation points.
        score: runs inputs and returns the metric of every row.
        edits: hooks that change activations before they are read.
        modules: label -> a module whose output is differentiated at.
        attention: "text" or "vision", and layers: also differentiate at z inside their attention.

    Raises:
        ExperimentError: a metric without a gradient.

    Cost: one forward and one backward.
    """
    watched = _Watched()
    with ExitStack() as stack:
        stack.enter_context(still(model))
        stack.enter_context(model.hooks([*edits, *((name, watched.track) for name in names)]))
        if attention:
            tower, layers = attention
            stack.enter_context(model.attending(partial(watched.attend, layers), tower))
        for label, module in (modules or {}).items():
            handle = module.register_forward_hook(partial(watched.behind, label), prepend=True)
            stack.callback(handle.remove)
        scores = score(run)
        if not scores.requires_grad:
            raise _without_gradient("this metric")
        return watched.differentiated(scores)


class _Watched:
    """Values seen in a forward, and the leaves of zeros that were added to them."""

    def __init__(self) -> None:
        self.slopes, self.leaves = Slopes(), dict[Any, Tensor]()

    def leaf(self, key: Any, value: Tensor) -> Tensor:
        # A leaf of zeros is added: it gets the gradient, and in-place writes downstream cannot reach it.
        self.leaves[key] = torch.zeros_like(value, requires_grad=True)
        return value + self.leaves[key]

    def track(self, value: Tensor, hook: HookPoint) -> Tensor:
        self.slopes.values[hook.name] = value.detach().clone()
        return self.leaf(hook.name, value)

    def attend(self, layers: Sequence[int], call: AttentionCall) -> Tensor | None:
        if call.layer not in layers:
            return None
        self.slopes.calls[call.layer] = replace(call, q=call.q.detach(), k=call.k.detach(), v=call.v.detach())
        return self.leaf(call.layer, call.z)

    def behind(self, label: str, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        self.slopes.values[label] = args[0].detach().clone()
        return self.leaf(label, output)

    def differentiated(self, scores: Tensor) -> Slopes:
        slopes = torch.autograd.grad(scores.sum(), list(self.leaves.values()), allow_unused=True)
        # What the metric does not depend on (in the last layer, rows that are not read) has gradient zero.
        for (key, leaf), slope in zip(self.leaves.items(), slopes, strict=True):
            self.slopes.slopes[key] = torch.zeros_like(leaf) if slope is None else slope
        self.slopes.scores = scores.detach()
        return self.slopes


@contextmanager
def still(model: HookedMLLM) -> Iterator[None]:
    """Gradients on, except for the parameters; both are restored afterwards."""
    trained = [parameter for parameter in model.hf_model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def check_smooth(model: HookedMLLM, readings: Sequence[Reading], metric: object) -> None:
    """Refuse a metric without a gradient.

    Raises:
        ExperimentError: it has none.
    """
    for reading in readings:
        logits = torch.zeros(1, len(reading.positions), model.cfg.vocab, requires_grad=True)
        with torch.enable_grad():
            if not reading.score(logits, logits[0].detach()).requires_grad:
                raise _without_gradient(repr(metric))


def _without_gradient(metric: str) -> ExperimentError:
    return ExperimentError(f"{metric}: a metric without a gradient", "one that can be differentiated", "use LogitDiff")


def between(name: str, ours: Tensor, theirs: Tensor, share: float) -> Edit:
    """A hook that sets an activation to ``share`` of the way from one run's value to the other's."""
    mixed = torch.lerp(ours, theirs, share)
    return name, lambda value, hook: mixed.to(value)


def midpoints(steps: int) -> list[float]:
    """Where a path from 0 to 1 is sampled. The error of midpoints falls with the square of the number of steps."""
    return [(step + 0.5) / steps for step in range(steps)]
