"""What observing costs: hooked, cached and measured forwards, relative to a plain SDPA forward of the same model.

    python benchmarks/attention.py                       # 600, 2,000 and 4,000 tokens, about three minutes
    python benchmarks/attention.py --tokens 600 --seconds 3

A figure is the worst over the lengths; all of them are recorded with it. ``plain`` is the Hugging Face model with SDPA,
never touched by mech.
"""

import argparse
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from models import evidence, llava, question
from record import added_memory, interleaved, one_thread, ratio, record

from mech.experiments.attention.mass import attention_mass
from mech.experiments.scores.ram import evidence_mass
from mech.model import HookedMLLM

SETS = ("image", "question", "text", "last")  # and four single keys: eight sets
BARS = {"idle": "<= 1.02", "cache_z": "<= 1.1", "ram_rows": "<= 1.1", "ram_all_queries": "<= 1.2"}
WHAT = {
    "idle": "a hooked model without hooks",
    "cache_z": "run_with_cache of all z",
    "ram_rows": "RAM of all heads",
    "ram_all_queries": "attention mass of every query on 8 sets",
    "pattern_one_layer": "run_with_cache of one layer's pattern: what it adds",
}


def runs(tokens: int) -> dict[str, Callable[[], Any]]:
    """Everything that is timed at one length, on the same weights."""
    stock = llava(tokens)
    model, inputs = HookedMLLM.from_hf(copy.deepcopy(stock)), question(tokens)
    keys = [evidence(inputs)]
    sets = {**{name: name for name in SETS}, **{f"key {key}": [int(key)] for key in keys[0]}}
    last = model.cfg.n_layers - 1
    return {
        "plain": lambda: stock(**inputs.tensors, use_cache=False, logits_to_keep=1),
        "idle": lambda: model(inputs, logits_to_keep=1),
        "cache_z": lambda: model.run_with_cache(
            inputs, names_filter=lambda name: name.startswith("blocks") and name.endswith("hook_z"), logits_to_keep=1
        ),
        "ram_rows": lambda: evidence_mass(model, inputs, keys),
        "ram_all_queries": lambda: attention_mass(model, inputs, sets),
        "pattern": lambda: model.run_with_cache(
            inputs, names_filter=[f"blocks.{last}.attn.hook_pattern"], logits_to_keep=1
        ),
        **one_layer(tokens, model.cfg),
    }


def one_layer(tokens: int, cfg: Any) -> dict[str, Callable[[], Any]]:
    """The attention of one layer, fused and written out, on random queries, keys and values."""
    shape = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    q = shape(1, cfg.n_heads, tokens, cfg.d_head)
    k, v = (shape(1, cfg.n_kv_heads, tokens, cfg.d_head) for _ in range(2))
    group = cfg.n_heads // cfg.n_kv_heads
    causal = torch.full((tokens, tokens), float("-inf")).triu(1)

    def explicit() -> torch.Tensor:
        keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return torch.softmax(q @ keys.transpose(-1, -2) * cfg.d_head**-0.5 + causal, dim=-1) @ values

    def fused() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return {"explicit": explicit, "fused": fused}


def prepared(kind: str, tokens: int) -> Callable[[], Any]:
    """One run for ``added_memory``."""
    if kind != "output_attentions":
        return runs(tokens)[kind]
    stock, inputs = llava(tokens), question(tokens)
    stock.set_attn_implementation("eager")
    return lambda: stock(**inputs.tensors, output_attentions=True, use_cache=False, logits_to_keep=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[600, 2000, 4000])
    parser.add_argument("--seconds", type=float, default=30, help="time for each length")
    given = parser.parse_args()
    found: dict[str, dict[int, float]] = {name: {} for name in WHAT}
    plain = {}
    with one_thread():
        for tokens in given.tokens:
            times = interleaved(runs(tokens), given.seconds)
            plain[tokens] = round(sorted(times["plain"])[len(times["plain"]) // 2], 4)
            for name in BARS:
                found[name][tokens] = round(ratio(times, name, "plain"), 4)
            extra = [a - b for a, b in zip(times["pattern"], times["plain"], strict=True)]
            layer = [a - b for a, b in zip(times["explicit"], times["fused"], strict=True)]
            found["pattern_one_layer"][tokens] = round(ratio({"a": extra, "b": layer}, "a", "b"), 4)
        over = dict.fromkeys(BARS, "one plain SDPA forward (Hugging Face)")
        over["pattern_one_layer"] = "what one layer's attention adds when written out in torch"
        for name, by_length in found.items():
            record(
                name, max(by_length.values()), unit="x", compared_with=over[name], bar=BARS.get(name, ""),
                what=WHAT[name], by_tokens=by_length, plain_seconds=plain,
            )  # fmt: skip
        tokens = max(given.tokens)
        peaks = {kind: added_memory(prepared, kind, tokens) for kind in ("plain", "ram_rows", "output_attentions")}
    ours, theirs = (max(peaks[kind] - peaks["plain"], 1.0) for kind in ("ram_rows", "output_attentions"))
    record(
        "ram_rows_memory", theirs / ours, unit="x less", compared_with="output_attentions=True", bar=">= 40",
        what="peak memory that RAM of all heads adds to a plain forward", tokens=tokens,
        added_mib={"ram_rows": round(ours, 1), "output_attentions": round(theirs, 1)},
        plain_mib=round(peaks["plain"], 1),
    )  # fmt: skip


if __name__ == "__main__":
    main()
