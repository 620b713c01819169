"""Which heads stay dense, what the others still see, and what that saves at best.

    policy = Policy(ranking.top(0.05), sinks=4, window=256)
    policy = Policy.fit(ranking, model.cfg, 8192, kv_bytes=0.2)     # as many top heads as a fifth of the KV bytes holds
    policy.budgets(model.cfg, 8192)                                 # its cost as shares of dense, and their bounds

Compute is saved query head by query head. Memory is saved key/value head by key/value head: under grouped-query
attention a KV group is kept whole as soon as one of its query heads is dense, so heads that share groups are cheaper.

A policy counts sizes, not speed: ``benchmarks/sparse_inference.py`` measures how close a machine comes to the bounds.
Nor does it predict accuracy, which has to be measured separately.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from mech.arguments import Count, Reading, Whole, checked, one_of
from mech.errors import ExperimentError, OutputError
from mech.experiments.ranking.ranking import Head, Ranking
from mech.files import parse_json, read, write
from mech.indices import Indices, pairs
from mech.interventions.specs import check_heads
from mech.model.architectures.families import ModelConfig

PHASES = ("prefill", "decode", "both")


class StillDense(UserWarning):
    """A part of the model, or a whole run, in which a policy changes nothing."""


@dataclass(frozen=True)
class Budgets:
    """What a policy costs at one length, as shares of the dense model: 1 means no saving.

    Attributes:
        length: tokens in the context.
        flops: share of the (query, key) pairs that attention computes while reading a prompt of this length.
        kv_bytes: share of the key and value bytes that are held at this length, and read for the next token.
    """

    length: int
    flops: float
    kv_bytes: float

    @property
    def prefill_bound(self) -> float:
        """How many times faster prefill attention can be at best: it is compute-bound."""
        return 1 / self.flops

    @property
    def decode_bound(self) -> float:
        """How many times faster decode attention (memory-bound), and smaller the cache, can be at best."""
        return 1 / self.kv_bytes

    def __str__(self) -> str:
        return (
            f"{self.length} tokens: {self.flops:.1%} of the attention FLOPs of prefill (at best "
            f"{self.prefill_bound:.1f}x), {self.kv_bytes:.1%} of the KV bytes (at best {self.decode_bound:.1f}x)"
        )


def _heads(name: str, given: Any) -> Indices:
    """Each head once, in the order given."""
    read = pairs(name, given)
    heads = Indices(dict.fromkeys(Head(*pair) for pair in read))
    heads.of = read.of
    return heads


@checked
@dataclass(frozen=True)
class Policy:
    """A few heads attend to everything, the others to the first tokens and to nearby ones.

    Within its layer's own mask, a local head sees each row's first ``sinks`` tokens and the keys less than ``window``
    positions away: itself and the ``window - 1`` before it (and after it, where a layer attends ahead).

    Attributes:
        dense_heads: (layer, query head) pairs, as any iterable. An empty one gives the window-only baseline.
        sinks: first tokens of each row that every head keeps, counted after the padding.
        window: how many positions a local head sees, including its own.
        keep_text: whether local heads also see every text token, however far, in the prompt and in the answer.
        phase: when heads are local: while the prompt is read ("prefill": the KV cache stays whole and decoding
            dense, as in the papers), while the answer is written ("decode"), or in "both".
    """

    dense_heads: Annotated[Sequence[tuple[int, int]], Reading(_heads, "(layer, head) pairs")] = ()
    sinks: Whole = 4
    window: Count = 256
    keep_text: bool = False
    phase: one_of(PHASES) = "both"

    @classmethod
    @checked
    def fit(
        cls,
        ranking: Ranking,
        cfg: ModelConfig,
        length: Count,
        *,
        kv_bytes: float | None = None,
        flops: float | None = None,
        **options: Any,
    ) -> "Policy":
        """The policy with as many of a ranking's top heads as fit a budget at a length.

        Args:
            ranking: a ranking of this model's heads.
            cfg: the model's sizes (``model.cfg``).
            length: tokens in the context the budget is for.
            kv_bytes: the largest share of the dense KV bytes, or
            flops: the largest share of the dense FLOPs of prefill attention; one of the two, between 0 and 1.
            options: ``sinks``, ``window``, ``keep_text``, ``phase`` of the policy.

        Raises:
            ExperimentError: a ranking of another model, no budget or two, or one exceeded even without dense heads.
        """
        refuse_other_ranking(ranking, cfg)
        if (kv_bytes is None) == (flops is None):
            raise ExperimentError(f"budgets kv_bytes={kv_bytes}, flops={flops}", "one of the two", "kv_bytes=0.2")
        name, budget = ("kv_bytes", float(kv_bytes)) if kv_bytes is not None else ("flops", float(flops or 0))

        def costs(count: int) -> float:
            return getattr(cls(ranking.heads[:count], **options).budgets(cfg, length), name)

        if costs(0) > budget:
            raise ExperimentError(
                f"{name}={budget} at {length} tokens with {options or 'the default window'}",
                f"at least {costs(0):.3f}: the cost without any dense head",
                "raise the budget, make the window smaller, or choose the phase it is for",
            )
        count, low, high = 0, 0, len(ranking)
        while low <= high:  # more heads never cost less
            middle = (low + high) // 2
            if costs(middle) <= budget:
                count, low = middle, middle + 1
            else:
                high = middle - 1
        return cls(ranking.heads[:count], **options)

    def to_json(self, path: str | Path | None = None) -> dict[str, Any]:
        """``{"dense_heads": [[layer, head], ...], "sinks", "window", "keep_text", "phase"}``; written if given a path.

        Raises:
            OutputError: the file cannot be written.
        """
        value = {field.name: getattr(self, field.name) for field in fields(self)}
        value["dense_heads"] = [list(head) for head in self.dense_heads]
        if path is not None:
            write(path, json.dumps(value), "\n")
        return value

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, Any]) -> "Policy":
        """A policy from the output of ``to_json``: a path or the dict.

        Raises:
            OutputError: a file that cannot be read, or that holds no policy.
            ExperimentError: invalid heads, sinks, window or phase.
        """
        value: Any = source
        if not isinstance(source, Mapping):
            try:
                value = parse_json(read(source))
            except (OSError, ValueError) as error:
                raise OutputError(f"{source} cannot be read ({error})", "a file written by Policy.to_json") from error
        known = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping) or set(value) != set(known):
            keys = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            raise OutputError(f"not a policy ({keys})", f"an object with {', '.join(known)}", "write it with to_json")
        return cls(**value)

    @property
    def digest(self) -> str:
        """SHA-256 of what the policy says, whatever the order its heads were given in.

        It belongs in the key of every cache of answers: a cache keyed by the model's name alone replays the answers of
        the dense model, or of another policy.
        """
        heads = sorted([int(layer), int(head)] for layer, head in self.dense_heads)
        said = [heads, self.sinks, self.window, self.keep_text, self.phase]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def check(self, model: Any) -> None:
        """Refuse heads that a model does not have.

        Raises:
            ExperimentError: a layer or head out of range.
            PointError: a layer without attention heads.
        """
        if self.dense_heads:
            check_heads(model, self.dense_heads)

    def dense(self, layer: int, n_heads: int) -> Bool[Tensor, " head"]:
        """Which query heads of a layer attend to everything."""
        mine = {head for at, head in self.dense_heads if at == layer}
        return torch.tensor([head in mine for head in range(n_heads)])

    def dense_groups(self, layer: int, n_heads: int, n_groups: int) -> Bool[Tensor, " kv_head"]:
        """Which key/value heads of a layer are kept whole: those that a dense head reads."""
        return self.dense(layer, n_heads).reshape(n_groups, -1).any(1)

    def budgets(
        self, cfg: ModelConfig, length: int, *, text: int = 0, windows: Mapping[int, int] | None = None
    ) -> Budgets:
        """The policy's cost relative to the dense model at a length, over the attention layers of the text stack.

        A local head attends to ``min(t, s + W)`` of the ``t`` keys of a causal row. With S tokens and a share ``p`` of
        dense heads, prefill therefore costs about ``p + (1 - p) 2 (s + W) / S``; with ``p`` the share of KV groups kept
        whole, the cache costs ``p + (1 - p) (s + W) / S``. The figures returned count every pair.

        Args:
            cfg: the model's sizes.
            length: tokens in the context.
            text: how many of them are text, for ``keep_text``.
            windows: layer -> its own sliding window, where it has one (``fast.windows``).
        """
        pairs = {True: 0.0, False: 0.0}  # of the policy; of the dense model
        held = {True: 0.0, False: 0.0}
        for layer in set(cfg.attention_layers) - set(cfg.cross_layers):
            n_groups, d_head = cfg.kv_heads[layer], cfg.d_heads[layer]
            own = min((windows or {}).get(layer, length), length)
            heads = self.dense(layer, cfg.n_heads).double().mean().item()
            groups = self.dense_groups(layer, cfg.n_heads, n_groups).double().mean().item()
            kept = self.sinks + (text if self.keep_text else 0)
            # What lies in the window is not kept twice; what the layer itself does not see is not kept at all.
            near = min(own, self.window + min(kept, max(0, length - self.window)))
            whole, local = seen_pairs(length, own, own), seen_pairs(length, own, min(own, self.window), kept)
            prefill, decode = self.phase != "decode", self.phase != "prefill"
            pairs[False] += d_head * cfg.n_heads * whole
            pairs[True] += d_head * cfg.n_heads * (heads * whole + (1 - heads) * local if prefill else whole)
            held[False] += d_head * n_groups * own
            held[True] += d_head * n_groups * (groups * own + (1 - groups) * near if decode else own)
        if not pairs[False]:
            raise ExperimentError(f"a model of {cfg.n_layers} layers without attention", "layers with attention heads")
        return Budgets(length, pairs[True] / pairs[False], held[True] / held[False])

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self.dense_heads[:4]))
        # The digest stands for the heads not shown, so that the texts of different policies differ.
        more = f", ... {len(self.dense_heads)}, {self.digest[:12]}" if len(self.dense_heads) > 4 else ""
        text = ", keep_text=True" if self.keep_text else ""
        return f"Policy([{shown}{more}], sinks={self.sinks}, window={self.window}{text}, phase={self.phase!r})"


def refuse_other_ranking(ranking: Ranking, cfg: ModelConfig) -> None:
    """Refuse a ranking whose heads are not those of a model."""
    layers = cfg.attention_layers or tuple(range(cfg.n_layers))
    if (ranking.layers, ranking.n_heads) != (layers, cfg.n_heads):
        raise ExperimentError(
            f"a ranking of {ranking.n_layers} x {ranking.n_heads} heads ({ranking.model or 'of an unnamed model'})",
            f"{len(layers)} x {cfg.n_heads}, as this {cfg.family} model has",
            "rank the heads of this model",
        )


@lru_cache
def seen_pairs(length: int, own: int, window: int, kept: int = 0) -> float:
    """Number of (row, key) pairs in a causal prompt: each row's last ``window`` keys, and ``kept`` ones before those.

    ``own`` is the layer's own window: no head sees beyond it. Kept tokens count as if they came first.
    """
    rows = torch.arange(1, length + 1, dtype=torch.float64)
    near = rows.clamp(max=window)
    far = (rows - window).clamp(min=0, max=kept) - (rows - own).clamp(min=0, max=kept)
    return float((near + far).sum())
