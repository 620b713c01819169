"""Activation patching of every head, by one wavefront, compared with a forward for every head.

    python benchmarks/sweeps.py                          # the bars: 600 and 2,000 tokens, about fifteen minutes
    python benchmarks/sweeps.py --only last1 last16      # two minutes
    python benchmarks/sweeps.py --only transformerlens screened

A LLaVA with random weights, 12 layers x 12 heads, d_model 768; z of one head is patched at the last position, at the
last 16, or at one visual token in the middle of the picture's first half. Times are processor times of one thread. A
*forward* is transformers' SDPA forward that unembeds one row, without hooks; ``sweep_*`` is 144 of them divided by the
sweep itself, ``sweep_forwards_*`` is the whole call with its two captures, in forwards.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from models import llava, question
from record import one_thread, record

from mech.experiments.metrics import LogitDiff
from mech.experiments.patching.activation import activation_patching
from mech.experiments.patching.plan import Plan
from mech.experiments.patching.sweeps import Wavefront
from mech.model import HookedMLLM
from mech.model.partial.cached_run import cached_run
from mech.model.partial.continuation import Continuation

SIZE, METRIC, OVER = 12, LogitDiff(5, 6), ("layer", "head")


def seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def opened(tokens: int):
    model, clean = HookedMLLM.from_hf(llava(tokens, SIZE, SIZE, SIZE, 64 * SIZE)), question(tokens)
    corrupted = replace(clean, tensors={**clean.tensors, "pixel_values": -clean.tensors["pixel_values"]})
    return model, clean, corrupted


def sweep(model, clean, corrupted, where) -> Callable[[], Any]:
    """The wavefront alone, from kept runs to the metric of every head."""
    plan = Plan.of(model, clean, corrupted, METRIC, "attn.hook_z", OVER, where, None, None, 0)
    row = Continuation(model, cached_run(model, corrupted, plan.reads), 0, torch.tensor(plan.reads))
    cache = model.run_with_cache(clean, names_filter=plan.names, logits_to_keep=1)[1]
    wavefront = Wavefront(row, plan.point, dict(cache), [region[0] for region in plan.regions])
    return lambda: wavefront.measure(plan.cells, lambda x: x[:, 0, 5] - x[:, 0, 6], lambda: None)


def over_forwards(tokens: int, names: list[str], repeats: int) -> None:
    model, clean, corrupted = opened(tokens)
    image = clean.layout.positions("image")
    early = int(image[len(image) // 4])
    places = {"last1": "last", "last16": list(range(tokens - 16, tokens)), "early": [early]}
    bars = {"last1": ">= 100", "last16": ">= 40", "early": ">= 3"}
    said = {"last1": "the last position", "last16": "the last 16 positions", "early": "one early visual position"}
    stock = lambda: model.hf_model(**clean.tensors, use_cache=False, logits_to_keep=1)  # noqa: E731
    stock()
    for name in names:
        run, where = sweep(model, clean, corrupted, places[name]), places[name]
        whole = lambda where=where: activation_patching(model, clean, corrupted, METRIC, positions=where)  # noqa: E731
        if name == "last16":
            whole()
        ratios, wholes = [], []
        for _ in range(repeats):
            forward, taken = seconds(stock), seconds(run)
            forward = (forward + seconds(stock)) / 2
            ratios.append(SIZE**2 * forward / taken)
            if name == "last16":
                wholes.append(seconds(whole) / forward)
        record(
            f"sweep_{name}_{tokens}", statistics.median(ratios), unit="x", bar=bars[name] if tokens == 600 else "",
            compared_with="one SDPA forward for each of 144 heads", what=f"z of all 144 heads at {said[name]}",
            patched_position=str(where),
        )  # fmt: skip
        if wholes:
            record(
                f"sweep_forwards_{tokens}", statistics.median(wholes), unit="forwards",
                bar="<= 5" if tokens == 600 else "<= 3", compared_with="one SDPA forward",
                what="all 144 heads at the last 16 positions, both captures included",
            )  # fmt: skip


def over_transformerlens(tokens: Sequence[int], repeats: int) -> None:
    """The whole call at the last position, compared with the bridge: a clean cache, a corrupted forward, and a hooked
    forward for every head."""
    found = {length: round(_over_transformerlens(length, repeats), 2) for length in tokens}
    record(
        "sweep_vs_transformerlens", min(found.values()), unit="x", bar=">= 80",
        compared_with="TransformerLens' bridge: a clean cache, a corrupted forward, and a hooked one for each of "
        "144 heads (3 timed)", what="z of all 144 heads at the last position, the whole call", by_tokens=found,
    )  # fmt: skip


def _over_transformerlens(tokens: int, repeats: int) -> float:
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model, clean, corrupted = opened(tokens)
    hf = llava(tokens, SIZE, SIZE, SIZE, 64 * SIZE)
    bridge = build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config)
    rest = [{k: v for k, v in run.tensors.items() if k != "input_ids"} for run in (clean, corrupted)]
    ids = clean.tensors["input_ids"]
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(SIZE)]
    caught: dict[str, Any] = {}

    def capture() -> None:
        caught["z"] = bridge.run_with_cache(ids, names_filter=names, **rest[0], use_cache=False)[1]

    def patched(layer: int, head: int) -> float:
        def write(z, hook):
            z[:, -1, head] = caught["z"][names[layer]][:, -1, head]
            return z

        logits = bridge.run_with_hooks(ids, fwd_hooks=[(names[layer], write)], **rest[1], use_cache=False)
        return float(logits[0, -1, 5] - logits[0, -1, 6])

    def ours() -> Any:
        return activation_patching(model, clean, corrupted, METRIC, positions="last").metric[0]

    known = ours()
    capture()
    ratios = []
    for turn in range(repeats if tokens > 1000 else 3 * repeats):
        cells = [(layer, turn % SIZE) for layer in (0, 5, 11)]
        if turn == 0:
            for layer, head in cells:  # the same numbers, or the ratio says nothing
                assert abs(patched(layer, head) - float(known[layer, head])) < 1e-3
        forward = statistics.median(seconds(lambda at=at: patched(*at)) for at in cells)
        taken = seconds(ours)
        theirs = seconds(capture) + seconds(lambda: bridge(ids, **rest[1], use_cache=False)) + SIZE**2 * forward
        ratios.append(theirs / ((taken + seconds(ours)) / 2))
    return statistics.median(ratios)


def screened(n: int) -> None:
    """Heads x visual positions of the reference models: does screening find the true top 10, at what cost?"""
    from mech.data.haystacks import haystacks

    recall, speed, exact_speed = [], [], []
    for name in ("llava-s", "qwen-s"):
        model = HookedMLLM.from_pretrained(f"reference:{name}")
        for sample in haystacks("grounding", n, seed=3):
            pair = model.inputs_of(sample), model.inputs_of(sample.counterfactual)
            asked = {"over": (*OVER, "position"), "positions": "image"}
            metric = LogitDiff(sample.answer, sample.counterfactual.answer)
            forward = min(seconds(lambda: model(pair[1], logits_to_keep=1)) for _ in range(3))  # noqa: B023
            start = time.process_time()
            exact = activation_patching(model, *pair, metric, **asked)
            middle = time.process_time()
            some = activation_patching(model, *pair, metric, method="screened", **asked)
            taken = time.process_time() - middle
            top = np.argsort(-np.abs(exact.effect.values).ravel())[:10]
            recall.append(some.confirmed.values.ravel()[top].mean())
            speed.append(exact.effect.size * forward / taken)
            exact_speed.append((middle - start) / taken)
    what = "z of every head at every visual position, 15% of the cells confirmed, the default; llava-s and qwen-s"
    record("two_stage_recall", float(np.mean(recall)), unit="share", bar=">= 0.95",
           compared_with="the true top 10 cells", what=what, samples=2 * n)  # fmt: skip
    record("two_stage_speedup", statistics.median(speed), unit="x", bar=">= 10",
           compared_with="one SDPA forward for every cell", what=what,
           over_the_exact_wavefront=round(statistics.median(exact_speed), 1))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["last1", "last16", "early", "transformerlens", "screened"])
    parser.add_argument("--tokens", type=int, nargs="*", default=[600, 2000])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    with one_thread():
        for tokens in given.tokens:
            wanted = [name for name in ("last1", "last16", "early") if name in given.only]
            over_forwards(tokens, wanted if tokens == 600 else [n for n in wanted if n != "early"], given.repeats)
        if "transformerlens" in given.only:
            over_transformerlens(given.tokens, given.repeats)
        if "screened" in given.only:
            screened(2 * given.repeats)


if __name__ == "__main__":
    main()
