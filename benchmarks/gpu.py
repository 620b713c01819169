"""Every figure that is promised for a GPU, on one card, in eight minutes: a table, and benchmarks/gpu.json.

    make bench-gpu                                    # all sections, each in its own process with a time limit
    python benchmarks/gpu.py --only sweep ram
    python benchmarks/gpu.py --dry --out dry.json     # toy sizes, also on a CPU: does it run at all?

The model has Qwen3-VL-8B's published size and random weights in bf16 (``fullsize.py``). Inputs are many pictures of
about 1,000 tokens, like documents: one giant picture would time a quadratic vision tower. Runs that are compared take
turns in one process, and a ratio is the median over the turns. Sparse heads: 16 sinks, a window of 1,024, one head in
16 dense, in whole KV groups. A section that runs out of time says so and does not affect the others.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fullsize
import torch
from models import layout
from record import PACKAGES, interleaved, met, ratio
from torch import nn
from transformers import AutoModelForImageTextToText, LogitsProcessor, LogitsProcessorList, PreTrainedConfig

import mech
from mech.experiments.metrics import LogitDiff
from mech.experiments.scores.ram import evidence_mass
from mech.inputs import Inputs
from mech.model import AttentionCall, HookedMLLM
from mech.sparse.kernels import split_heads
from mech.sparse.masks import Near
from mech.sparse.plan import Plan
from mech.sparse.policy import Policy

OUT = Path(__file__).parent / "gpu.json"
CONFIG, TOY = "qwen3-vl-8b", "qwen3-vl-toy"
SINKS, WINDOW, DENSE_SHARE = 16, 1024, 1 / 16
LIMITS = {"layer": 45, "sweep": 90, "ram": 65, "prefill": 150, "decode": 120}  # seconds of a section; 470 in all
METRIC = LogitDiff(20, 21)
PUBLISHED = fullsize.CONFIGS[CONFIG]
fullsize.CONFIGS[TOY] = {
    "model_type": "qwen3_vl",
    "text_config": PUBLISHED["text_config"] | {
        "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    },
    "vision_config": PUBLISHED["vision_config"] | {
        "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
        "deepstack_visual_indexes": [0],
    },
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One figure: what it is, what it should be, and what it was taken from."""

    name: str
    what: str
    value: float
    unit: str
    goal: str
    compared_with: str
    details: Mapping[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where and at which sizes a section runs."""

    dry: bool
    device: str
    seconds: float

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    @property
    def config(self) -> PreTrainedConfig:
        return fullsize.config_of(TOY if self.dry else CONFIG, False)

    @property
    def window(self) -> int:
        return 32 if self.dry else WINDOW

    def lengths(self, *tokens: int) -> Sequence[tuple[str, int]]:
        """Names of lengths, and how many tokens they are."""
        return [(str(length), length // 64 if self.dry else length) for length in tokens]

    def model(self) -> HookedMLLM:
        torch.manual_seed(0)
        with torch.device(self.device):
            made = AutoModelForImageTextToText.from_config(self.config, dtype=self.dtype).eval()
        return HookedMLLM.from_hf(made, name=CONFIG)

    def inputs(self, tokens: int) -> Inputs:
        """Pictures of 32 x 32 tokens (4 x 4 in a dry run), or one smaller one, and 40 tokens of text."""
        room = max(4, tokens - 40)
        side = min(4 if self.dry else 32, int((0.9 * room) ** 0.5))
        count = max(1, room // (side * side + 2))
        config: Any = self.config
        generator = torch.Generator().manual_seed(0)
        patch = 3 * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
        one = [fullsize.START, *[fullsize.IMAGE] * side**2, fullsize.END]
        text = torch.randint(10, 1000, (max(8, tokens - count * len(one)),), generator=generator).tolist()
        ids = torch.tensor([text[:4] + one * count + text[4:]])
        tensors = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == fullsize.IMAGE).long(),
            "pixel_values": torch.randn(count * 4 * side * side, patch, generator=generator),
            "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]] * count),
        }
        return Inputs(tensors, (layout(ids[0] == fullsize.IMAGE),)).to(self.device, self.dtype)

    def policy(self, model: HookedMLLM) -> Policy:
        """The first of the heads, in whole groups of each layer, as a ranking by groups gives them."""
        cfg = model.cfg
        heads = [(layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
        group = cfg.n_heads // cfg.n_kv_heads
        dense = heads[: max(group, round(DENSE_SHARE * len(heads)) // group * group)]
        return Policy(dense, SINKS, self.window)


def synchronized(run: Callable[[], Any]) -> float:
    """Seconds of a run, until the GPU has finished it."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: round(1000 * statistics.median(taken), 3) for name, taken in times.items()}


class Stamps(LogitsProcessor):
    """When each token's logits were ready, on the GPU's clock: nothing waits for it."""

    def __init__(self):
        self.at: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.is_cuda:
            self.at.append(torch.cuda.Event(enable_timing=True))
            self.at[-1].record()
        else:
            self.at.append(time.perf_counter())
        return scores

    def seconds(self) -> float:
        """Seconds per token, without the first two: between those the cache is moved into its stores."""
        first, last = self.at[1], self.at[-1]
        if isinstance(first, float):
            return (last - first) / (len(self.at) - 2)
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1000 / (len(self.at) - 2)


def each_token(run: Callable[..., Any], inputs: Inputs, new: int) -> float:
    """Seconds per token after a prompt."""
    stamps = Stamps()
    run(inputs, max_new_tokens=new, min_new_tokens=new, logits_processor=LogitsProcessorList([stamps]))
    return stamps.seconds()


def bandwidth(device: str) -> float:
    """Bytes per second of a copy, counting what is read and what is written."""
    size = 2**24 if device == "cpu" else 2**31
    one, other = torch.empty(2, size, dtype=torch.uint8, device=device)
    other.copy_(one)
    return 2 * size / min(synchronized(lambda: other.copy_(one)) for _ in range(5))


def layer(bench: Bench) -> Iterator[Row]:
    """Attention of one layer through what ``localize`` calls, one KV group dense, against SDPA."""
    goals = {"8192": ">= 1.4", "32768": ">= 3.8", "131072": ">= 6"}
    heads, groups, width = (4, 2, 16) if bench.dry else (32, 8, 128)
    plan = Plan.of(torch.arange(heads) < heads // groups, groups)
    for name, tokens in bench.lengths(8192, 32768, 131072):
        generator = torch.Generator(bench.device).manual_seed(0)
        q, k, v = (torch.randn(1, n, tokens, width, device=bench.device, generator=generator).to(bench.dtype)
                   for n in (heads, groups, groups))  # fmt: skip
        near = Near(Policy((), SINKS, bench.window), torch.zeros(1, dtype=torch.long), torch.tensor([tokens]))
        call = AttentionCall("text", 0, q, k, v, q.transpose(1, 2), None, width**-0.5, True, 0)
        runs = {
            "dense": lambda q=q, k=k, v=v: nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            ),
            "sparse": lambda call=call, near=near: split_heads(call, near, plan),
        }
        times = interleaved(runs, bench.seconds, least=3)
        yield Row(
            f"layer_{name}", f"attention of one layer, {heads} heads / {groups} KV, one group dense, {tokens:,} tokens",
            ratio(times, "dense", "sparse"), "x", goals[name], "SDPA, causal", {"median_ms": medians(times)},
        )  # fmt: skip


def sweep(bench: Bench) -> Iterator[Row]:
    """Activation patching of every head, captures included, in forwards of the same inputs."""
    model = bench.model()
    for name, tokens in bench.lengths(600, 2000):
        clean = bench.inputs(max(tokens, 60))
        length = len(clean.layout)
        corrupted = replace(clean, tensors={**clean.tensors, "pixel_values": -clean.tensors["pixel_values"]})
        places = {"last": ([length - 1], {"600": "<= 4", "2000": "<= 3.5"}),
                  "last16": (list(range(length - 16, length)), {"600": "<= 22", "2000": "<= 10"})}  # fmt: skip
        model(clean, logits_to_keep=1)
        for kind, (positions, goals) in places.items():
            asked = lambda at=positions: mech.activation_patching(model, clean, corrupted, METRIC, positions=at)  # noqa: E731, B023
            first = synchronized(asked)
            runs = {"forward": lambda: model(clean, logits_to_keep=1), "sweep": asked}  # noqa: B023
            times = interleaved(runs, bench.seconds, least=3)
            cells = f"all {model.cfg.n_layers} x {model.cfg.n_heads} heads, {kind}, {length:,} tokens"
            details = {"median_ms": medians(times), "first_call_s": round(first, 3)}
            yield Row(f"sweep_{kind}_{name}", f"sweep of {cells}", ratio(times, "sweep", "forward"), "forwards",
                      goals[name], "one forward", details)  # fmt: skip
            if kind == "last":
                yield Row(f"sweep_first_call_{name}", f"the first sweep of {cells}", first, "s", "<= 3", "", {})


def ram(bench: Bench) -> Iterator[Row]:
    """Retrieval attention mass of all heads over a forward."""
    model = bench.model()
    for name, tokens in bench.lengths(600, 2000, 8000, 32000):
        inputs = bench.inputs(max(tokens, 60))
        keys = inputs.layout.positions("image")[:16]
        runs = {
            "forward": lambda inputs=inputs: model(inputs, logits_to_keep=1),
            "ram": lambda inputs=inputs, keys=keys: evidence_mass(model, inputs, [keys]),
        }
        times = interleaved(runs, bench.seconds, least=3)
        what = f"RAM of all heads, {len(inputs.layout):,} tokens"
        yield Row(f"ram_{name}", what, ratio(times, "ram", "forward"), "x",
                  "<= 1.15" if name == "600" else "", "one forward", {"median_ms": medians(times)})  # fmt: skip


def prefill(bench: Bench) -> Iterator[Row]:
    """The first token, tower included: localized (dense where no gain is predicted) against dense."""
    model = bench.model()
    goals = {"8192": ">= 0.99", "32768": ">= 1.25", "131072": ">= 2"}
    for name, tokens in bench.lengths(8192, 32768, 131072):
        inputs = bench.inputs(tokens)

        def sparse(inputs: Inputs = inputs) -> None:
            with mech.localize(model, bench.policy(model), auto=True) as fast:
                fast(inputs, logits_to_keep=1)

        runs = {"dense": lambda inputs=inputs: model(inputs, logits_to_keep=1), "sparse": sparse}
        times = interleaved(runs, bench.seconds, least=2)
        gain, length = ratio(times, "dense", "sparse"), len(inputs.layout)
        with mech.localize(model, bench.policy(model), auto=True) as fast:
            bound = fast.expects(length).prefill
        details = {"median_ms": medians(times), "counted_bound": round(bound, 3)}
        what = f"first token, {length:,} tokens in pictures of about 1,000"
        yield Row(f"prefill_{name}", what, gain, "x", goals[name], "dense", details)
        if name == "131072":
            yield Row(f"prefill_{name}_of_bound", what, gain / bound, "share", ">= 0.85", "the counted bound", {})


def decode(bench: Bench) -> Iterator[Row]:
    """Tokens per second: captured and sparse, captured and dense (static cache), and Hugging Face's default."""
    model = bench.model()
    new, speed = 4 if bench.dry else 32, bandwidth(bench.device)
    weights = sum(p.nbytes for name, p in model.hf_model.named_parameters() if "visual" not in name)
    goals = {"8192": (">= 4", ""), "32768": (">= 4", ">= 1.2"), "131072": ("", ">= 1.6")}
    graph: Any = True if bench.device == "cpu" else "auto"
    for name, tokens in bench.lengths(8192, 32768, 131072):
        inputs = bench.inputs(tokens)

        per_token: dict[str, float] = {}
        policy, turns = bench.policy(model), 1 if name == "131072" else 3

        def taken(run: Callable[..., Any], inputs: Inputs = inputs, turns: int = turns) -> float:
            each_token(run, inputs, new)  # captures
            return statistics.median(each_token(run, inputs, new) for _ in range(turns))

        if name != "131072":
            per_token["default"] = taken(model.generate)
        with mech.localize(model, policy, graph=graph) as fast:
            per_token["sparse"], how = taken(fast.generate), fast.decoding
        with mech.dense_static(model, graph=graph) as static:
            per_token["static"] = taken(static.generate)
        length = len(inputs.layout)
        whole = 2 * length * sum(kv * d for kv, d in zip(model.cfg.kv_heads, model.cfg.d_heads, strict=True))
        kv_bytes = whole * model.dtype.itemsize * policy.budgets(model.cfg, length).kv_bytes
        limit = (weights + kv_bytes) / speed
        details = {"ms_per_token": {k: round(1000 * v, 3) for k, v in per_token.items()},
                   "tokens_per_s": {k: round(1 / v, 1) for k, v in per_token.items()},
                   "byte_limit_ms": round(1000 * limit, 3), "bandwidth_tb_s": round(speed / 1e12, 3),
                   "decoding": how}  # fmt: skip
        what = f"a token of sparse decoding, {length:,} in the cache"
        over_default, over_static = goals[name]
        if "default" in per_token:
            yield Row(f"decode_{name}_vs_default", what, per_token["default"] / per_token["sparse"], "x", over_default,
                      "Hugging Face's default cache and loop", details)  # fmt: skip
        yield Row(f"decode_{name}_vs_static", what, per_token["static"] / per_token["sparse"], "x", over_static,
                  "a dense static cache, captured", details)  # fmt: skip
        yield Row(f"decode_{name}_of_bytes", what, limit / per_token["sparse"], "share", ">= 0.6",
                  "weights and KV cache at the bandwidth of a copy", details)  # fmt: skip


SECTIONS = {"layer": layer, "sweep": sweep, "ram": ram, "prefill": prefill, "decode": decode}


def run_section(name: str, bench: Bench, out: Path) -> None:
    """Run a section in this process; results are written after every row, so that a time limit loses no figure."""
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for row in SECTIONS[name](bench):
            rows.append(asdict(row))
            part = out.with_suffix(".part")  # a section may be stopped while it writes
            part.write_text(json.dumps(rows), encoding="utf-8")
            part.replace(out)


def in_a_process(name: str, given: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """The rows that a section finished in its time, and what ended it early."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        words = [sys.executable, __file__, "--section", name, "--out", str(out), "--seconds", str(given.seconds)]
        words += ["--dry"] if given.dry else []
        why = ""
        try:
            done = subprocess.run(
                words, capture_output=True, text=True, timeout=given.limit or LIMITS[name], check=False
            )
            if done.returncode:
                said = (done.stderr.strip().splitlines() or [""])[-1]
                why = f"exit code {done.returncode}: {said}".removesuffix(": ")
        except subprocess.TimeoutExpired:
            why = f"out of its {given.limit or LIMITS[name]} seconds"
        return json.loads(out.read_text(encoding="utf-8")) if out.exists() else [], why


def shown(rows: Sequence[Mapping[str, Any]], ended: Mapping[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "what", "value", "goal", "", "compared with")
    for row in rows:
        verdict = "" if not row["goal"] else "met" if met(row["value"], row["goal"]) else "NOT MET"
        table.add_row(row["name"], row["what"], f"{row['value']:.3g} {row['unit']}", row["goal"], verdict,
                      row["compared_with"])  # fmt: skip
    for name, why in ended.items():
        table.add_row(name, f"ended early: {why}", "", "", "NOT MET", "")
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--dry", action="store_true", help="toy sizes, also on a CPU")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seconds", type=float, default=3, help="time for each figure")
    parser.add_argument("--limit", type=float, help="seconds of a section, in place of its own")
    parser.add_argument("--section", choices=SECTIONS, help="run one here and write its rows to --out")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not given.dry:
        sys.exit(f"nothing was measured: torch {torch.__version__} sees no GPU here (--dry runs toy sizes on the CPU)")
    if given.section:
        run_section(given.section, Bench(given.dry, device, given.seconds), given.out)
        return
    rows, ended = [], {}
    for name in given.only:
        found, why = in_a_process(name, given)
        rows += found
        if why:
            ended[name] = why
    written = {
        "card": torch.cuda.get_device_name() if device == "cuda" else "none: a dry run on a CPU",
        "versions": {package: version(package) for package in PACKAGES},
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "dry": given.dry,
        "rows": [row | {"met": met(row["value"], row["goal"]) if row["goal"] else None} for row in rows],
        "ended_early": ended,
    }
    given.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    shown(rows, ended)


if __name__ == "__main__":
    main()
