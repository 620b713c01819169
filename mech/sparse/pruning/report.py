"""What pruning saves and what it costs: parameters, bytes, cache, speed, and accuracy with its interval."""

from dataclasses import asdict, dataclass
from typing import Any

from mech.arguments import Count, checked
from mech.data.samples import Samples, SomeSamples
from mech.experiments.effects import drop
from mech.experiments.metrics import ask, quiz
from mech.experiments.statistics import proportion_interval
from mech.model import HookedMLLM
from mech.sparse.frontier.timing import speed, taking_turns
from mech.sparse.pruning.prune import Pruned


@dataclass(frozen=True)
class PruningReport:
    """A pruned model compared with the original; pairs are (before, after).

    Attributes:
        heads: text heads removed, and how many there were.
        silent: how many of the removed heads keep a place.
        parameters: parameters of the whole model.
        weight_bytes: bytes of all weights in memory.
        kv_bytes: bytes of keys and values per token in the cache.
        prefill_speed: how many times faster a forward of the first batch is; the range is over turns.
        accuracy: shares of right answers, with Wilson intervals.
        drop: the loss of accuracy, paired by sample, with its 95% interval over samples.
        n: number of samples.
    """

    heads: tuple[int, int]
    silent: int
    parameters: tuple[int, int]
    weight_bytes: tuple[int, int]
    kv_bytes: tuple[int, int]
    prefill_speed: dict[str, float]
    accuracy: tuple[dict[str, float], dict[str, float]]
    drop: dict[str, float]
    n: int

    def to_json(self) -> dict[str, Any]:
        """The report in plain values."""
        return asdict(self)

    def __str__(self) -> str:
        silent = f" ({self.silent} keep a place, with weights of zero)" if self.silent else ""
        before, after = (100 * accuracy["mean"] for accuracy in self.accuracy)
        drop, low, high = (100 * self.drop[name] + 0.0 for name in ("mean", "low", "high"))
        return (
            f"{self.heads[0]} of {self.heads[1]} heads gone{silent}: {_less(self.parameters)} of the parameters, "
            f"{_less(self.weight_bytes)} of the bytes, {_less(self.kv_bytes)} of the cache; forward "
            f"{self.prefill_speed['mean']:.2f}x as fast; accuracy {before:.1f}% -> {after:.1f}%, a loss of {drop:.1f} "
            f"points [{low:.1f}, {high:.1f}] on {self.n} samples."
        )


@checked
def pruning_report(
    model: HookedMLLM,
    pruned: Pruned,
    samples: SomeSamples,
    *,
    batch_size: Count = 16,
    turns: Count = 5,
) -> PruningReport:
    """Size, speed and accuracy of a pruned model compared with the original.

    Args:
        model: the original model.
        pruned: what ``prune_heads`` returned.
        samples: samples that neither ranked the heads nor served as the reference of the mean.
        batch_size: samples per forward.
        turns: how often each model is timed.

    Cost: ``2 + 2 turns`` forwards of the first batch, and one forward of all samples for each model.
    """
    small, samples = pruned.model, Samples(samples)
    right = [ask(asked, quiz(asked, samples, batch_size))["accuracy"] for asked in (model, small)]
    inputs = model.collate([model.inputs_of(sample) for sample in samples[:batch_size]])
    runs = {name: lambda one=one: one(inputs, logits_to_keep=1) for name, one in (("before", model), ("after", small))}
    times = taking_turns(runs, turns)
    both = (model, small)
    return PruningReport(
        heads=(len(pruned.heads), len(model.cfg.attention_layers) * model.cfg.n_heads),
        silent=pruned.silent,
        parameters=_pair(sum(p.numel() for p in each.hf_model.parameters()) for each in both),
        weight_bytes=_pair(sum(p.nbytes for p in each.hf_model.parameters()) for each in both),
        kv_bytes=_pair(map(_kv_bytes, both)),
        prefill_speed=speed(times, "before", "after"),
        accuracy=_pair(proportion_interval(answers).as_dict() for answers in right),
        drop=drop(right[0], right[1][None]) or {},
        n=len(samples),
    )


def _kv_bytes(model: HookedMLLM) -> int:
    cfg = model.cfg
    return sum(2 * cfg.kv_heads[layer] * cfg.d_heads[layer] for layer in cfg.attention_layers) * model.dtype.itemsize


def _pair(values: Any) -> tuple[Any, Any]:
    before, after = values
    return before, after


def _less(pair: tuple[int, int]) -> str:
    return f"{100 * (pair[1] / pair[0] - 1):+.0f}%"
