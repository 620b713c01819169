"""What sparse inference gains on this machine: prefill time, time per token and cache bytes, with their bounds.

    speed_dataset(model, sample, {0.0: (), 0.1: ranking.top(0.1)}, policy)

The pictures of one sample are encoded once, so that only the text stack is timed. Dense and localized runs take turns
in one process, and a speed is the ratio within a turn. Decoding is compared with two dense caches: Hugging Face's
default, which copies itself at every token (``decode_speed_default``), and one with a reserve, which does not
(``decode_speed``): only the second shows what *sparsity* gains. Timings describe one moment, so they are saved and not
repeated.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from transformers.cache_utils import DynamicCache

from mech.data.samples import Sample, Samples
from mech.experiments.ranking.ranking import Head, Heads
from mech.inputs import Inputs
from mech.model import HookedMLLM
from mech.scale.measures import in_one_piece
from mech.sparse.frontier.timing import taking_turns
from mech.sparse.groups import expanded
from mech.sparse.localize import localize
from mech.sparse.policy import Policy

TOKENS = 8  # decoded in a turn


def speed_dataset(
    model: HookedMLLM, sample: Sample, sets: Mapping[float, Heads], base: Policy, *, turns: int = 3
) -> xr.Dataset:
    """Times, ratios and bytes for each set of dense heads.

    Args:
        model: a hooked model.
        sample: the sample to run.
        sets: share -> the heads that stay dense.
        base: the policy whose sinks and window are used.
        turns: how often everything is timed.

    Returns:
        ``prefill_speed``, ``decode_speed`` (relative to a dense cache with a reserve), ``decode_speed_default``
        (relative to Hugging Face's), dims (timed, turn); ``kv_measured``: cache bytes divided by those of the default,
        dim timed; and the analytic bounds ``prefill_bound`` and ``decode_bound`` of attention alone. ``timed`` is the
        share.

    Cost: ``1 + turns`` prefills and a few tokens for each set and the dense model.
    """
    return timed_in_turns(model, Samples([sample]), sets=dict(sets), base=base, turns=turns)


@in_one_piece("speed", classes=(Policy, Head))
@torch.no_grad()
def timed_in_turns(
    model: HookedMLLM, samples: Samples, *, sets: Mapping[float, Heads], base: Policy, turns: int
) -> xr.Dataset:
    """``speed_dataset`` for the first of the samples."""
    whole = model.inputs_of(samples[0])
    inputs, seen = model.encode_pictures(whole)
    every = expanded(
        [(layer, group) for layer in model.cfg.attention_layers for group in range(model.cfg.n_kv_heads)], model.cfg
    )
    policies = {share: Policy(heads, base.sinks, base.window) for share, heads in sets.items()}
    reserved = Policy(every, base.sinks, base.window)

    def prefill() -> Any:
        return model(inputs, mm_encoder_outputs=dict(seen), logits_to_keep=1)

    runs: dict[str, Callable[[], Any]] = {"dense": prefill}
    for share, policy in policies.items():
        runs[str(share)] = _localized(model, policy, prefill)
    read = taking_turns(runs, turns)

    steps = {"default": _decoding(model, inputs, seen, None), "reserved": _decoding(model, inputs, seen, reserved)}
    steps |= {str(share): _decoding(model, inputs, seen, policy) for share, policy in policies.items()}
    written = taking_turns({name: run for name, (run, _) in steps.items()}, turns)
    held = {name: size for name, (_, size) in steps.items()}

    shares, names = list(policies), [str(share) for share in policies]
    budgets = [policy.budgets(model.cfg, len(whole.layout)) for policy in policies.values()]
    data = {
        "prefill_speed": (("timed", "turn"), np.stack([read["dense"] / read[name] for name in names])),
        "decode_speed": (("timed", "turn"), np.stack([written["reserved"] / written[name] for name in names])),
        "decode_speed_default": (("timed", "turn"), np.stack([written["default"] / written[name] for name in names])),
        "kv_measured": (("timed",), np.array([held[name] / held["default"] for name in names])),
        "prefill_bound": (("timed",), np.array([budget.prefill_bound for budget in budgets])),
        "decode_bound": (("timed",), np.array([budget.decode_bound for budget in budgets])),
    }
    found = xr.Dataset(data, {"timed": shares})
    for name in ("prefill_speed", "decode_speed", "decode_speed_default", "prefill_bound", "decode_bound"):
        found[name].attrs.update(unit="times as fast as dense", sign="more: faster")
    found["kv_measured"].attrs.update(unit="share of the bytes of the dense cache", sign="less: smaller")
    facts = {"timed_tokens": len(whole.layout), "threads": torch.get_num_threads(), "device": str(model.device),
             "prefill_seconds": float(np.median(read["dense"])),
             "token_seconds": float(np.median(written["reserved"])) / TOKENS}  # fmt: skip
    return found.assign_attrs(facts)


def _localized(model: HookedMLLM, policy: Policy, run: Callable[[], Any]) -> Callable[[], Any]:
    def inside() -> Any:
        with localize(model, policy):
            return run()

    return inside


def _decoding(
    model: HookedMLLM, inputs: Inputs, seen: dict[str, Any], policy: Policy | None
) -> tuple[Callable[[], Any], int]:
    """Read the prompt; return a run of ``TOKENS`` more tokens, and the bytes the cache holds after the prompt."""
    cache: Any = DynamicCache(config=model.hf_model.config.get_text_config(decoder=True))
    if policy is not None:
        with localize(model, policy) as fast:
            cache = fast.cache()
            fast(inputs, mm_encoder_outputs=dict(seen), past_key_values=cache, use_cache=True, logits_to_keep=1)
    else:
        model(inputs, mm_encoder_outputs=dict(seen), past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = inputs.tensors["input_ids"][:, -1:]
    held = (
        cache.nbytes if policy is not None else sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    )

    def tokens() -> None:
        for _ in range(TOKENS):
            # No mask: given one, Qwen-VL uses the positions of the whole mask for the new token.
            model({"input_ids": token}, past_key_values=cache, use_cache=True)

    return (tokens if policy is None else _localized(model, policy, tokens)), held
