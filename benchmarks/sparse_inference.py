"""Sparse against dense inference: attention by itself, bytes of KV cache, and decoding with a whole small model.

    python benchmarks/sparse_inference.py                          # the bars: 8k and 16k tokens, about six minutes
    python benchmarks/sparse_inference.py --only decode            # or prefill, model
    python benchmarks/sparse_inference.py --gpu --config qwen3-vl-8b --tokens 8192 32768 131072

16 sinks, a window of 256, one dense head in 16; heads 64 wide, MHA (16 key/value heads) and GQA (4); float32, one
thread. *Prefill* attention is one layer against SDPA, causal. *Decode* attention is the step of four layers (the new
key into the cache, attention over it) against a dense cache that is allocated beforehand. The *model* is a LLaVA of
four layers, d_model 256, whose tokens are timed against Hugging Face's default cache too, which copies itself at every
token. The bound given with each figure is what the policy saves in pairs or bytes if everything else were free: pairs
of attention for the first, bytes of the KV cache for the others.

``--gpu`` times whole models of published size with random weights, vision tower included: time to the first token, and
tokens per second. It has not been run on a GPU; on a CPU it runs with narrow heads, as a check that it runs.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from models import llava, question
from record import interleaved, one_thread, ratio, record
from torch import nn
from transformers.cache_utils import DynamicCache

from mech.model import AttentionCall, HookedMLLM
from mech.sparse.cache import SplitCache, SplitLayer
from mech.sparse.kernels import split_heads
from mech.sparse.localize import localize
from mech.sparse.masks import Near
from mech.sparse.plan import Plan
from mech.sparse.policy import Policy

SINKS, WINDOW, HEADS, D_HEAD = 16, 256, 16, 64
KV_HEADS = {"": 16, "gqa_": 4}  # prefix of the figures' names -> key/value heads
LAYERS, TOKENS = 4, 4  # of the model and of decode attention; decoded in a turn of the model
BARS = {
    "prefill_attention_8k": ">= 4", "prefill_attention_16k": ">= 6", "decode_attention_8k": ">= 8",
    "kv_bytes_8k": ">= 10", "decode_model_8k_vs_preallocated": ">= 2.3", "decode_model_8k_vs_default": ">= 4.5",
}  # fmt: skip
WHAT = {
    "prefill_attention_8k": "attention of one layer, prompt of 8,192 tokens",
    "prefill_attention_16k": "the same, 16,384 tokens",
    "decode_attention_8k": "attention of four layers for the next token, 8,192 tokens in the cache",
    "kv_bytes_8k": "bytes of KV cache that are held after a prompt of 8,192 tokens, reserve included",
    "decode_model_8k_vs_preallocated": "the next token of a whole small model, 8,192 tokens in the cache",
    "decode_model_8k_vs_default": "the same",
}
SDPA, RESERVED = "SDPA over all keys", "a dense cache allocated beforehand"


def written(name: str, prefix: str, value: float, bound: float, over: str, **details: Any) -> None:
    kind = "GQA 16:4" if prefix else "MHA"
    record(
        prefix + name, value, unit="x", compared_with=f"{over}; bound {bound:.1f}x", bar="" if prefix else BARS[name],
        what=f"{WHAT[name]}, {kind}", bound=round(bound, 2), **details,
    )  # fmt: skip


def policy() -> Policy:
    return Policy([(layer, 5) for layer in range(LAYERS)], SINKS, WINDOW)


def layer(kv_heads: int, tokens: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of one layer."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, heads, tokens, D_HEAD, generator=generator) for heads in (HEADS, kv_heads, kv_heads))


def plan_of(kv_heads: int) -> Plan:
    return Plan.of(policy().dense(0, HEADS), kv_heads)


def call_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int = 0) -> AttentionCall:
    return AttentionCall("text", 0, q, k, v, q.transpose(1, 2), None, D_HEAD**-0.5, q.shape[2] > 1, start)


def near_of(tokens: int) -> Near:
    return Near(policy(), torch.zeros(1, dtype=torch.long), torch.tensor([tokens]))


def prefill_runs(kv_heads: int, tokens: int) -> dict[str, Callable[[], Any]]:
    q, k, v = layer(kv_heads, tokens)
    near, plan, gqa = near_of(tokens), plan_of(kv_heads), kv_heads != HEADS
    return {
        "dense": lambda: nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa),
        "sparse": lambda: split_heads(call_of(q, k, v), near, plan),
    }


def decode_runs(kv_heads: int, tokens: int) -> dict[str, Callable[[], Any]]:
    """The next token's attention in ``LAYERS`` layers, each with its own cache; each run continues from the last."""
    q, k, v = layer(kv_heads, tokens + 600)
    cache = SplitCache.__new__(SplitCache)  # a layer only reads its ``near``
    cache.near = near_of(tokens)
    split, default, held = [], DynamicCache(), []
    for index in range(LAYERS):
        split.append(SplitLayer(cache, plan_of(kv_heads), None))
        split[-1].update(k[:, :, :tokens], v[:, :, :tokens])
        split[-1].given = None
        default.update(k[:, :, :tokens], v[:, :, :tokens], index)
        held.append((k.clone(), v.clone()))
    query, key, value = (x[:, :, -1:] for x in (q, k, v))
    at = [tokens]

    def attended(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        # As transformers does: query heads that share keys are rows of one call.
        rows = query.reshape(1, kv_heads, -1, D_HEAD)
        return nn.functional.scaled_dot_product_attention(rows, keys, values).reshape(1, 1, HEADS, D_HEAD)

    def sparse() -> Any:
        z = None
        for one in split:
            one.update(key, value)
            z = one.attend(call_of(query, key, value, one.seen - 1))
        return z

    def reserved() -> Any:
        z, place = None, at[0]
        for keys, values in held:
            keys[:, :, place], values[:, :, place] = key[:, :, 0], value[:, :, 0]
            z = attended(keys[:, :, : place + 1], values[:, :, : place + 1])
        at[0] += 1
        return z

    def by_default() -> Any:
        z = None
        for index in range(LAYERS):
            z = attended(*default.update(key, value, index))
        return z

    return {"reserved": reserved, "default": by_default, "sparse": sparse}


def model_of(kv_heads: int, tokens: int) -> HookedMLLM:
    return HookedMLLM.from_hf(llava(tokens, LAYERS, HEADS, kv_heads, 256))


def model_runs(kv_heads: int, tokens: int) -> tuple[dict[str, Callable[[], Any]], float, float]:
    """Decoding of the whole model with three caches; the measured and the exact share of dense KV bytes."""
    model, inputs = model_of(kv_heads, tokens), question(tokens)
    plans = {index: plan_of(kv_heads) for index in range(LAYERS)}
    text = model.hf_model.config.text_config
    caches: dict[str, Any] = {"default": DynamicCache(config=text), "reserved": SplitCache(text, plans, split=False)}
    options = {"use_cache": True, "logits_to_keep": 1}
    for cache in caches.values():
        model(inputs, past_key_values=cache, **options)
    fast = localize(model, policy())
    caches["sparse"] = fast.cache()
    fast(inputs, past_key_values=caches["sparse"], **options)
    fast.close()
    dense = sum(held.keys.nbytes + held.values.nbytes for held in caches["default"].layers)
    ids = inputs.tensors["input_ids"][:, -1:]

    def decode(name: str) -> Callable[[], Any]:
        def run() -> None:
            with localize(model, policy()) if name == "sparse" else torch.no_grad():
                for _ in range(TOKENS):
                    model({"input_ids": ids}, past_key_values=caches[name])

        return run

    share = policy().budgets(model.cfg, tokens).kv_bytes
    return {name: decode(name) for name in caches}, dense / caches["sparse"].nbytes, 1 / share


def attention_figures(prefix: str, only: str, seconds: float) -> None:
    cfg = model_of(KV_HEADS[prefix], 64).cfg
    for tokens, name in ((8192, "prefill_attention_8k"), (16384, "prefill_attention_16k")):
        if only in ("", "prefill"):
            times = interleaved(prefill_runs(KV_HEADS[prefix], tokens), seconds, least=5)
            bound = policy().budgets(cfg, tokens).prefill_bound
            written(name, prefix, ratio(times, "dense", "sparse"), bound, SDPA, **_medians(times))
    if only in ("", "decode"):
        runs = decode_runs(KV_HEADS[prefix], 8192)
        # In pairs: memory that the default cache returns to the system at every token slows the run after it.
        times, others = (
            interleaved({name: runs[name] for name in (over, "sparse")}, part, least=21, most=201)
            for over, part in (("reserved", seconds), ("default", seconds / 3))
        )
        bound = policy().budgets(cfg, 8192).decode_bound
        default = {"over_default": round(ratio(others, "default", "sparse"), 2)}
        value = ratio(times, "reserved", "sparse")
        written("decode_attention_8k", prefix, value, bound, RESERVED, **default, **_medians(times))


def model_figures(prefix: str, seconds: float) -> None:
    runs, smaller, bound = model_runs(KV_HEADS[prefix], 8192)
    written("kv_bytes_8k", prefix, smaller, bound, "a dense cache without reserve")
    times = interleaved(runs, seconds, least=9, most=61)
    for name, over in (("reserved", RESERVED), ("default", "Hugging Face's default cache")):
        figure = f"decode_model_8k_vs_{'preallocated' if name == 'reserved' else name}"
        written(figure, prefix, ratio(times, name, "sparse"), bound, over, **_medians(times))


def _medians(times: dict[str, list[float]]) -> dict[str, Any]:
    return {"median_ms": {name: round(1000 * statistics.median(taken), 3) for name, taken in times.items()}}


@torch.no_grad()
def whole_model(config: str, tokens: list[int], device: str, share: float, new: int = 32) -> None:
    """Time to the first token and tokens per second of a model of published size, pictures read anew each time."""
    from fullsize import DTYPES, config_of, inputs_of
    from transformers import AutoModelForImageTextToText

    narrow, dtype = device == "cpu", DTYPES["fp32" if device == "cpu" else "bf16"]
    made = config_of(config, narrow)
    with torch.device(device):
        model = HookedMLLM.from_hf(AutoModelForImageTextToText.from_config(made, dtype=dtype).eval(), name=config)
    heads = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    groups = model.cfg.n_heads // model.cfg.n_kv_heads
    dense = heads[: round(share * len(heads)) // groups * groups]  # whole groups, as a ranking by groups gives them
    for length in tokens:
        inputs = inputs_of(made, length, device, dtype)
        took: dict[str, dict[str, float]] = {}
        policy_of = Policy(dense, SINKS, max(WINDOW, 1024))
        budgets = policy_of.budgets(model.cfg, length)
        for name in ("dense", "sparse"):
            fast = localize(model, policy_of) if name == "sparse" else None
            _timed(model, inputs, 2)  # warms up
            first, every = (_timed(model, inputs, count) for count in (1, new + 1))
            took[name] = {"first_token_s": round(first, 4), "tokens_per_s": round(new / max(every - first, 1e-9), 2)}
            if fast is not None:
                fast.close()
        record(
            f"gpu_first_token_{length}_{config}", took["dense"]["first_token_s"] / took["sparse"]["first_token_s"],
            unit="x", compared_with=f"dense, Hugging Face's default cache; bound {budgets.prefill_bound:.1f}x",
            what=f"time to the first token, {length:,} tokens, {config}{', narrow' if narrow else ''}, tower included",
            seconds_and_rates=took,
            tokens_per_second=round(took["sparse"]["tokens_per_s"] / took["dense"]["tokens_per_s"], 3),
            decode_bound=round(budgets.decode_bound, 2), share=share,
        )  # fmt: skip


def _timed(model: HookedMLLM, inputs: Any, count: int) -> float:
    start = time.perf_counter()
    model.generate(inputs, max_new_tokens=count, min_new_tokens=count)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["prefill", "decode", "model"], default="")
    parser.add_argument("--kv", choices=["mha", "gqa"], default="", help="one of the two tables")
    parser.add_argument("--seconds", type=float, default=20, help="time for each figure")
    parser.add_argument("--gpu", action="store_true", help="whole models of published size")
    parser.add_argument("--config", default="qwen3-vl-8b")
    parser.add_argument("--tokens", type=int, nargs="*", default=[8192, 32768, 131072])
    parser.add_argument("--share", type=float, default=1 / 16, help="of the heads that stay dense, with --gpu")
    given = parser.parse_args()
    if given.gpu:
        whole_model(given.config, given.tokens, "cuda" if torch.cuda.is_available() else "cpu", given.share)
        return
    with one_thread():
        for prefix in KV_HEADS:
            if given.kv == ("gqa" if not prefix else "mha"):
                continue
            if given.only != "model":
                attention_figures(prefix, given.only, given.seconds)
            if given.only in ("", "model"):
                model_figures(prefix, given.seconds)


if __name__ == "__main__":
    main()
