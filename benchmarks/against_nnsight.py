"""The same reads through nnsight and through mech, on the same weights.

    pip install nnsight && python benchmarks/against_nnsight.py      # 600 and 2,000 tokens, under a minute

Both read what enters W_O in every layer (``attn.hook_z``). nnsight traces the stock model with its own attention, so
only what both do is compared. Not part of ``make bench``: nnsight is not a dependency of mech.
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import nnsight
import torch
from models import llava, question
from record import interleaved, one_thread, ratio, record

from mech.model import HookedMLLM


def runs(tokens: int) -> dict[str, Callable[[], Any]]:
    stock, inputs = llava(tokens), question(tokens)
    model = HookedMLLM.from_hf(copy.deepcopy(stock))
    traced = nnsight.NNsight(stock)
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]

    def through_nnsight() -> list[torch.Tensor]:
        with traced.trace(**inputs.tensors, use_cache=False):
            read = nnsight.save([layer.self_attn.o_proj.input for layer in traced.model.language_model.layers])
        return read

    def through_mech() -> list[torch.Tensor]:
        _, cache = model.run_with_cache(inputs, names_filter=names)
        return [cache[name] for name in names]

    for theirs, ours in zip(through_nnsight(), through_mech(), strict=True):
        torch.testing.assert_close(theirs, ours.flatten(2))
    return {"nnsight": through_nnsight, "mech": through_mech}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[600, 2000])
    parser.add_argument("--seconds", type=float, default=15, help="time for each length")
    given = parser.parse_args()
    with one_thread():
        found = {}
        for tokens in given.tokens:
            found[tokens] = round(ratio(interleaved(runs(tokens), given.seconds), "nnsight", "mech"), 2)
    record(
        "nnsight_cache_z", min(found.values()), unit="x", compared_with="mech, run_with_cache of all z",
        what="nnsight, a trace that saves what enters W_O", by_tokens=found,
    )  # fmt: skip


if __name__ == "__main__":
    main()
