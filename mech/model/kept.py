"""One forward of a model, kept so that variants of it can be run on from any text layer (``resume.py``).

    run = kept_run(model, inputs, reads=[last])
    run.layers[3].stream, run.layers[3].call.k       # what entered layer 3, and the keys it made

A layer is kept as it was called: the stream, the other arguments, and what its attention saw. A model whose layers
could not be called again on some rows alone is refused here, with the reason.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mech.model.attention import AttentionCall
from mech.model.families import layers_of, module_at
from mech.model.hooked import HookedMLLM
from mech.model.points import hooked

_ROWLESS = (type(None), bool, int, float, str)
_SLICED = ("position_embeddings", "position_ids", "cache_position")
REPLACED = ("attention_mask", "past_key_values", "past_key_value")


class NotResumable(Exception):
    """This model or run cannot be continued from the middle exactly; the message is the reason."""


@dataclass(frozen=True, eq=False)
class LayerRun:
    """What one text layer was given and did.

    Attributes:
        args: positional arguments behind the stream.
        kwargs: keyword arguments.
        stream: the residual stream that entered.
        call: what its attention saw and produced; of the queries only the shape.
        added: what the model adds to the stream behind the layer (DeepStack), None for nothing.
    """

    args: tuple
    kwargs: dict[str, Any]
    stream: Float[Tensor, "batch pos d_model"]
    call: AttentionCall
    added: Float[Tensor, "batch pos d_model"] | None


@dataclass(frozen=True, eq=False)
class KeptRun:
    """One forward of a batch: every text layer, the stream that leaves the last one, and the logits at ``reads``."""

    layers: tuple[LayerRun, ...]
    last: Float[Tensor, "batch pos d_model"]
    reads: tuple[int, ...]
    logits: Float[Tensor, "batch read vocab"]
    shaped: Callable[[Tensor], Tensor]  # what becomes of the unembedding's output: most often nothing


@torch.no_grad()
def kept_run(model: HookedMLLM, inputs: Any, reads: Sequence[int]) -> KeptRun:
    """Run ``inputs`` once and keep what continuing needs: per layer the stream, queries, keys, values and z.

    Raises:
        NotResumable: a layer whose work is not its own self-attention and row by row, or hooks on the model.

    Cost: one forward; memory of a KV cache and of three streams a layer.
    """
    if hooked(model.hook_dict.values()) or any(record.observers for _, record in model._layers):
        raise NotResumable("there are hooks on the model")
    layers = layers_of(model.hf_model, model.family.text)
    norm = module_at(model.hf_model, model.family.final_norm)
    calls: dict[int, list[AttentionCall]] = {}
    given: dict[int, tuple] = {}
    added: dict[int, Tensor | None] = {}
    streams: list[tuple[Tensor, int]] = []  # each with its version: what is kept must not be written into afterwards
    left: list[Tensor] = []

    def keep(stream: Tensor) -> Tensor:
        index = len(streams) - 1
        if left and left[0] is not stream:
            change = stream - left[0]
            added[index] = change if change.any() else None
        left.clear()
        streams.append((stream, stream._version))
        return stream

    def enter(index: int) -> Callable:
        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            stream = keep(args[0] if args else kwargs["hidden_states"])
            given[index] = (args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}, stream)

        return before

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        left.append(output[0] if isinstance(output, tuple) else output)

    def look(call: AttentionCall) -> None:
        # Queries are made anew while running on; only their shape is asked for.
        calls.setdefault(call.layer, []).append(replace(call, q=call.q.new_empty(1).expand(call.q.shape)))

    handles = [norm.register_forward_pre_hook(lambda module, args: (keep(args[0]), None)[1])]
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(enter(index), with_kwargs=True))
        handles.append(layer.register_forward_hook(leave))
    try:
        with model.attending(look):
            logits = model(inputs, logits_to_keep=torch.as_tensor(reads, device=model.device))
    finally:
        for handle in handles:
            handle.remove()
    if len(streams) != len(layers) + 1 or any(stream._version != version for stream, version in streams):
        raise NotResumable("the stream between layers is written in place")
    kept, final = [], streams[-1][0]
    for index in range(len(layers)):
        args, kwargs, stream = given[index]
        _refuse(index, args, kwargs, stream, calls.get(index, []))
        kept.append(LayerRun(args, kwargs, stream, calls[index][0], added.get(index)))
    unembed: Any = module_at(model.hf_model, model.family.unembed)
    shaped = _shape_of(model, unembed(norm(final[:, list(reads)])), logits)
    return KeptRun(tuple(kept), final, tuple(reads), logits, shaped)


def _shape_of(model: HookedMLLM, unembedded: Tensor, logits: Tensor) -> Callable[[Tensor], Tensor]:
    """What the model does to the unembedding's output. It is tried: a config may name what its model leaves out."""
    config = model.hf_model.config.get_text_config()
    scale, cap = (getattr(config, name, None) or 1.0 for name in ("logit_scale", "final_logit_softcapping"))
    shapes = (lambda x: x, lambda x: x * scale, lambda x: torch.tanh(x / cap) * cap)
    gaps = [float((shape(unembedded) - logits).abs().max()) for shape in shapes]
    if min(gaps) <= tolerance(logits):
        return shapes[gaps.index(min(gaps))]
    raise NotResumable("the logits are not the unembedding of the final norm")


def tolerance(logits: Tensor) -> float:
    """What rounding may move logits by."""
    # Norms and rotations compute in single precision in many models, whatever the dtype of the rest.
    eps = max(torch.finfo(kind).eps for kind in (logits.dtype, torch.float32))
    return float(logits.abs().max()) * 32 * eps**0.75


def _refuse(index: int, args: tuple, kwargs: dict, stream: Tensor, calls: list[AttentionCall]) -> None:
    """Refuse a layer that cannot be run on some rows alone."""
    if len(calls) != 1:
        raise NotResumable(f"layer {index} calls attention {len(calls)} times")
    call = calls[0]
    if call.k.shape[2] != stream.shape[1] or call.q.shape[2] != stream.shape[1] or call.q.shape[0] != stream.shape[0]:
        raise NotResumable(f"layer {index} does not attend to its own positions")
    if call.mask is not None and call.mask.dtype != torch.bool:
        raise NotResumable(f"layer {index} adds a bias to its scores")
    if call.cross:
        raise NotResumable(f"layer {index} attends to another sequence")
    for name, value in kwargs.items():
        if name not in (*_SLICED, *REPLACED) and not isinstance(value, _ROWLESS):
            raise NotResumable(f"layer {index} is given {name!r}, which is not known to be cut to rows")
    for value in args:
        if not isinstance(value, _ROWLESS) and not (isinstance(value, Tensor) and value.shape[:2] == stream.shape[:2]):
            raise NotResumable(f"layer {index} is given an argument that is not known to be cut to rows")
