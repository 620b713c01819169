"""Predicts whether a policy gains at a length: counted FLOPs and bytes, divided by what a machine does per second.

    fast.expects(32768, new_tokens=64)     # Expected(length=32768, prefill=1.3, decode=1.1, runs='sparse')

Only the text stack is counted; a vision tower costs the same either way. All experts are counted, so the gain predicted
for mixtures of experts is too small. ``MACHINES`` holds the speeds. They are rough, and those of one GPU and one CPU:
the ratios between them decide, and these differ less from machine to machine than the speeds do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from mech.model import HookedMLLM
from mech.model.architectures.families import module_at
from mech.sparse.policy import Policy, seen_pairs

GAIN = 1.01  # the least predicted gain at which a run is sparse


@dataclass(frozen=True)
class Machine:
    """What a machine does per second, and its overheads in seconds.

    Attributes:
        matrices: FLOPs of linear layers.
        dense: FLOPs of attention over everything.
        local: FLOPs of the attention of local heads, merging included.
        bytes: bytes of weights, keys and values read.
        layer: seconds that a layer's local attention costs in addition to its FLOPs.
        token: seconds that a layer costs per token when steps are not captured: dense, and sparse.
    """

    matrices: float
    dense: float
    local: float
    bytes: float
    layer: float
    token: tuple[float, float]


MACHINES = {
    # An H200 in bf16, measured with torch 2.11 and an earlier version of this package: 36 layers of 32 heads, 128 wide.
    "cuda": Machine(420e12, 570e12, 240e12, 4.3e12, 5e-5, (1.9e-3, 3.1e-3)),
    # One thread of a Xeon in float32: benchmarks/results.json.
    "cpu": Machine(1e11, 1.2e11, 4.6e10, 1e10, 1e-4, (2e-4, 3e-4)),
}


@dataclass(frozen=True)
class Expected:
    """The prediction at one length: speeds relative to dense, above 1 for a gain.

    Attributes:
        length: tokens in the context.
        prefill: speed of reading the prompt, linear layers included.
        decode: speed of one more token.
        runs: what ``localize(..., auto=True)`` then runs: "sparse", or "dense" where there is no gain overall.
    """

    length: int
    prefill: float
    decode: float
    runs: Literal["sparse", "dense"]


def expected(
    model: HookedMLLM,
    policy: Policy,
    length: int,
    *,
    new_tokens: int = 1,
    batch: int = 1,
    captured: bool = False,
    windows: Mapping[int, int] | None = None,
) -> Expected:
    """Predict the speed of a prompt and some new tokens under a policy, relative to the dense model.

    Args:
        model: a hooked model, for its sizes, precision and device.
        policy: which heads are local.
        length: tokens of the prompt.
        new_tokens: how many tokens are generated.
        batch: rows.
        captured: whether the step of a token is captured in a CUDA graph.
        windows: layer -> its own sliding window, where it has one.

    Cost: none.
    """
    machine = MACHINES.get(model.device.type, MACHINES["cuda"])
    linear, held = _weights(model)
    dense, local, all_dense = _attention(model, policy, length, windows or {})
    layers, size = len(model.cfg.attention_layers), model.dtype.itemsize
    reading = 2 * linear * length / machine.matrices
    prefill = {
        False: batch * (reading + all_dense / machine.dense),
        True: batch * (reading + dense / machine.dense + local / machine.local) + bool(local) * layers * machine.layer,
    }
    groups = sum(n * d for n, d in zip(model.cfg.kv_heads, model.cfg.d_heads, strict=True))
    share = policy.budgets(model.cfg, length, windows=windows).kv_bytes
    decode = {}
    for sparse, kept in ((False, 1.0), (True, share)):
        reads = size * (held + batch * kept * 2 * length * groups) / machine.bytes
        starts = 0 if captured else layers * machine.token[sparse and kept < 1]
        decode[sparse] = max(reads, starts) if model.device.type == "cuda" else reads + starts
    whole, sparse = (prefill[way] + new_tokens * decode[way] for way in (False, True))
    return Expected(
        length,
        round(prefill[False] / prefill[True], 3),
        round(decode[False] / decode[True], 3),
        "sparse" if whole / sparse >= GAIN else "dense",
    )


def _attention(
    model: HookedMLLM, policy: Policy, length: int, windows: Mapping[int, int]
) -> tuple[float, float, float]:
    """FLOPs of a prompt's attention: of dense heads, of local ones, and of all heads if all were dense."""
    cfg, found = model.cfg, [0.0, 0.0, 0.0]
    for layer in set(cfg.attention_layers) - set(cfg.cross_layers):
        own = min(windows.get(layer, length), length)
        heads = int(policy.dense(layer, cfg.n_heads).sum()) if policy.phase != "decode" else cfg.n_heads
        whole = seen_pairs(length, own, own)
        near = seen_pairs(length, own, min(own, policy.window), policy.sinks)
        each = 4 * cfg.d_heads[layer]  # a product with the key and one with the value, each a multiply and an add
        found[0] += each * heads * whole
        found[1] += each * (cfg.n_heads - heads) * near
        found[2] += each * cfg.n_heads * whole
    return found[0], found[1], found[2]


def _weights(model: HookedMLLM) -> tuple[int, int]:
    """Number of weights of the text stack: of its layers, and of its layers with the unembedding."""
    root = module_at(model.hf_model, model.family.text.root)
    embedded = sum(
        p.numel() for module in root.modules() if isinstance(module, nn.Embedding) for p in module.parameters()
    )
    layers = sum(parameter.numel() for parameter in root.parameters()) - embedded
    head: Any = model.hf_model.get_output_embeddings()
    return layers, layers + (0 if head is None else sum(p.numel() for p in head.parameters()))
