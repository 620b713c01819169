"""A head policy as a pattern of whole layers, which stock ``transformers`` and serving engines run, memory savings too.

    pattern = LayerPattern.of(policy, model)      # refused if no pattern of layers is equivalent
    near    = nearest_layers(policy, model)       # the policy of whole layers with as many dense KV groups
    LayerPattern.of(near, model).apply(config)    # for from_pretrained(..., config=config); or .save(folder) as JSON

Engines hold one KV length per layer, so a policy by heads saves memory only in its own cache (``localize``). Many
configs have ``layer_types`` and ``sliding_window``: layers that see everything and layers that see a window. A pattern
is exact: the stock model under it gives the same logits as ``localize``. ``mech.acceleration`` measures what keeping
whole layers instead of the best heads costs in accuracy (its choice ``"layers"``).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mech.errors import ExperimentError, UnsupportedModel
from mech.experiments.ranking.ranking import Head
from mech.files import make_folder, write
from mech.model import HookedMLLM
from mech.sparse.policy import Policy

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class LayerPattern:
    """Which layers see everything and which a window.

    Attributes:
        layer_types: ``"full_attention"`` or ``"sliding_attention"`` for every text layer.
        sliding_window: how many positions a sliding layer sees, including its own.
    """

    layer_types: tuple[str, ...]
    sliding_window: int

    @classmethod
    def of(cls, policy: Policy, model: HookedMLLM) -> "LayerPattern":
        """The pattern equivalent to a policy.

        Raises:
            ExperimentError: a policy that keeps sinks or text, covers one phase only, or has a partly dense layer.
            UnsupportedModel: an architecture that has no such pattern, or layers with their own windows.
        """
        refuse_fixed_layers(model)
        policy.check(model)
        extra = [f"sinks={policy.sinks}"] if policy.sinks else []
        extra += ["keep_text=True"] if policy.keep_text else []
        extra += [f"phase={policy.phase!r}"] if policy.phase != "both" else []
        if extra:
            raise ExperimentError(
                f"a policy with {', '.join(extra)} as a pattern of layers",
                "a window in both phases and nothing else: stock layers have no sinks",
                "use nearest_layers(policy, model), or Policy(heads, sinks=0, window=...)",
            )
        dense = {layer: policy.dense(layer, model.cfg.n_heads) for layer in model.cfg.attention_layers}
        partly = [layer for layer, heads in dense.items() if heads.any() and not heads.all()]
        if partly:
            near = nearest_layers(policy, model)
            raise ExperimentError(
                f"a policy in which layer {partly[0]} is dense in {int(dense[partly[0]].sum())} of its heads",
                f"layers that are dense or not; the nearest keeps layers {_layers(near)}",
                "use nearest_layers(policy, model)",
            )
        return cls(tuple(FULL if heads.any() else SLIDING for heads in dense.values()), policy.window)

    def settings(self) -> dict[str, Any]:
        """The entries to set in the text part of the config."""
        return {
            "layer_types": list(self.layer_types),
            "sliding_window": self.sliding_window,
            "use_sliding_window": True,
        }

    def apply(self, config: Any) -> Any:
        """A Hugging Face config with the pattern written into it: for ``from_pretrained(..., config=...)``."""
        text = config.get_text_config(decoder=True)
        for name, value in self.settings().items():
            setattr(text, name, value)
        return config

    def save(self, folder: str | Path) -> Path:
        """``layer_pattern.json`` in a folder: ``layer_types`` and ``sliding_window``, as engines name them.

        Raises:
            OutputError: the folder cannot be written.
        """
        path = Path(folder) / "layer_pattern.json"
        make_folder(path.parent)
        return write(path, json.dumps(self.settings(), indent=1), "\n")


def nearest_layers(policy: Policy, model: HookedMLLM) -> Policy:
    """The policy of whole layers nearest to a policy by heads, at its KV bytes; kept sinks and text are dropped.

    The layers with the most dense KV groups stay dense (ties: more dense heads, then lower layers), as many as hold the
    same number of groups, rounded.

    Raises:
        ExperimentError: heads that the model does not have.
        UnsupportedModel: see ``LayerPattern.of``.
    """
    refuse_fixed_layers(model)
    policy.check(model)
    cfg = model.cfg
    counts = {
        layer: (
            int(policy.dense_groups(layer, cfg.n_heads, cfg.n_kv_heads).sum()),
            int(policy.dense(layer, cfg.n_heads).sum()),
        )
        for layer in cfg.attention_layers
    }
    n = round(sum(groups for groups, _ in counts.values()) / cfg.n_kv_heads)
    kept = sorted(sorted(counts), key=lambda layer: counts[layer], reverse=True)[:n]
    heads = [Head(layer, head) for layer in sorted(kept) for head in range(cfg.n_heads)]
    return Policy(heads, sinks=0, window=policy.window)


def refuse_fixed_layers(model: HookedMLLM) -> None:
    """Refuse architectures whose layers cannot be given a pattern.

    Raises:
        UnsupportedModel: no ``layer_types``, layers without attention, or windows that the checkpoint was trained with.
    """
    text = model.hf_model.config.get_text_config(decoder=True)
    types = set(getattr(text, "layer_types", None) or ())
    if types != {FULL} or not hasattr(text, "sliding_window"):
        what = f"layers of types {sorted(types)}" if types else "no layer_types in its config"
        raise UnsupportedModel(
            f"{model.name} ({model.cfg.family}), with {what}, as a pattern of layers",
            "an architecture whose config has layer_types, all full_attention, and sliding_window (Qwen-VL and others)",
            "serve the policy with mech.localize",
        )


def _layers(policy: Policy) -> str:
    return ", ".join(map(str, sorted({layer for layer, _ in policy.dense_heads}))) or "none"
