"""The same forwards through TransformerLens' bridge and through mech, on the same weights.

    python benchmarks/transformerlens.py                 # 600 and 2,000 tokens, about a minute and a half

The bridge (TransformerLens 4.3) computes attention step by step in every layer; mech does so only where a layer's
scores or pattern are hooked. A test checks that the two agree in what they read (``tests/model/test_interop.py``).
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

from models import llava, question
from record import interleaved, one_thread, ratio, record
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from mech.model import HookedMLLM

WHAT = {"forward": "a forward without hooks", "cache_z": "run_with_cache of all z"}


def runs(tokens: int) -> dict[str, Callable[[], Any]]:
    stock = llava(tokens)
    model, inputs = HookedMLLM.from_hf(copy.deepcopy(stock)), question(tokens)
    bridge = build_bridge_from_module(stock, type(stock).__name__, hf_config=stock.config)
    rest = {name: value for name, value in inputs.tensors.items() if name != "input_ids"}
    ids = inputs.tensors["input_ids"]
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
    return {
        "mech forward": lambda: model(inputs),
        "bridge forward": lambda: bridge(ids, **rest, use_cache=False),
        "mech cache_z": lambda: model.run_with_cache(inputs, names_filter=names),
        "bridge cache_z": lambda: bridge.run_with_cache(ids, names_filter=names, **rest, use_cache=False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[600, 2000])
    parser.add_argument("--seconds", type=float, default=40, help="time for each length")
    given = parser.parse_args()
    with one_thread():
        taken = {tokens: interleaved(runs(tokens), given.seconds) for tokens in given.tokens}
        for name, what in WHAT.items():
            found = {t: round(ratio(times, f"bridge {name}", f"mech {name}"), 2) for t, times in taken.items()}
            record(
                f"transformerlens_{name}", min(found.values()), unit="x", compared_with=f"mech, {what}",
                what=f"TransformerLens' bridge, {what}", by_tokens=found,
            )  # fmt: skip


if __name__ == "__main__":
    main()
