"""What RAM costs over a plain forward: time as a ratio, and peak memory beside that of ``output_attentions=True``.

    python benchmarks/ram.py                # 600 and 4,000 tokens
    python benchmarks/ram.py --tokens 2000

Runs of both kinds are interleaved in one process and medians are compared; one thread. Memory is measured in fresh
processes (the peak of resident memory above that of the loaded model and its inputs). The model is a LLaVA with random
weights, 6 layers x 8 heads, d_model 256; only shapes matter here.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from datetime import UTC, datetime

import numpy as np
import torch
import transformers

KINDS = ("plain", "ram", "output_attentions")


def made(tokens: int):
    """A model, and inputs of ``tokens`` positions: nine in ten of them visual, 24 of a question."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from mech.inputs import IMAGE, TEXT, Inputs, TokenLayout
    from mech.model import HookedMLLM

    side = round((0.9 * tokens) ** 0.5)
    visual = side * side
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=LlamaConfig(
            hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8,
            num_key_value_heads=2, vocab_size=1000, max_position_embeddings=2 * tokens,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, patch_size=14,
            image_size=14 * side,
        ),
        image_token_index=999,
    )  # fmt: skip
    model = HookedMLLM.from_hf(LlavaForConditionalGeneration(config).eval())
    ids = torch.randint(0, 900, (1, tokens))
    ids[0, 4 : 4 + visual] = 999
    kind = np.where(ids[0].numpy() == 999, IMAGE, TEXT)
    here = kind == IMAGE
    place = np.full((2, tokens), -1)
    place[:, here] = np.divmod(np.arange(visual), side)
    rect = np.full((tokens, 4), np.nan)
    rect[here] = np.stack([14 * place[1], 14 * place[0], 14 * place[1] + 14, 14 * place[0] + 14], 1)[here]
    layout = TokenLayout(
        kind=kind, image=np.where(here, 0, -1), frame=np.full(tokens, -1), row=place[0], col=place[1], rect=rect,
        tokens=("",) * tokens, spans={"question": tuple(range(tokens - 30, tokens - 6))},
        images=((14 * side, 14 * side),), frames_per_token=1,
    )  # fmt: skip
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
               "pixel_values": torch.randn(1, 3, 14 * side, 14 * side)}  # fmt: skip
    return model, Inputs(tensors, (layout,)), np.flatnonzero(here)[:4]


@torch.no_grad()
def run(kind: str, model, inputs, evidence) -> None:
    from mech.experiments.heads import evidence_mass

    if kind == "plain":
        model(inputs, logits_to_keep=1)
    elif kind == "ram":
        evidence_mass(model, inputs, [evidence])
    else:
        model.hf_model.set_attn_implementation("eager")
        model.hf_model(**inputs.tensors, output_attentions=True, use_cache=False, logits_to_keep=1)
        model.hf_model.set_attn_implementation("mech")


def seconds(tokens: int, repeats: int) -> dict[str, float]:
    torch.set_num_threads(1)
    parts = made(tokens)
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(repeats + 1):
        for kind in KINDS:
            start = time.perf_counter()
            run(kind, *parts)
            if turn:  # the first turn warms up
                taken[kind].append(time.perf_counter() - start)
    return {kind: statistics.median(values) for kind, values in taken.items()}


def peak(kind: str, tokens: int, pipe) -> None:
    torch.set_num_threads(1)
    parts = made(tokens)
    # Linux keeps a high-water mark; reset it, so that building the model does not count.
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
    before = _high_water()
    run(kind, *parts)
    pipe.send(_high_water() - before)


def _high_water() -> float:
    with open("/proc/self/status") as status:
        return next(float(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def memory(tokens: int) -> dict[str, float]:
    """Peak resident memory of one run above what was there before, in MiB."""
    found = {}
    context = multiprocessing.get_context("spawn")
    for kind in KINDS:
        here, there = context.Pipe()
        process = context.Process(target=peak, args=(kind, tokens, there))
        process.start()
        found[kind] = here.recv()
        process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=[600, 4000])
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    rows = []
    for tokens in given.tokens:
        time_of, memory_of = seconds(tokens, given.repeats), memory(tokens)
        rows.append(
            {
                "tokens": tokens,
                "ram_over_plain_time": round(time_of["ram"] / time_of["plain"], 3),
                "output_attentions_over_plain_time": round(time_of["output_attentions"] / time_of["plain"], 3),
                "plain_seconds": round(time_of["plain"], 3),
                "added_mib": {
                    kind: round(memory_of[kind] - memory_of["plain"], 1) for kind in ("ram", "output_attentions")
                },
                "plain_mib": round(memory_of["plain"], 1),
            }
        )
    record = {
        "what": "RAM of all heads over one plain SDPA forward, LLaVA of 6 layers x 8 heads (2 kv), float32",
        "machine": f"{platform.processor() or platform.machine()},1 thread",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "date": datetime.now(UTC).date().isoformat(),
        "rows": rows,
    }
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
