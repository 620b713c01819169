"""One forward of a model, kept so that variants of it can be continued from any text layer (``continuation.py``).

    run = cached_run(model, inputs, reads=[last])
    run.layers[3].stream, run.layers[3].call.k       # what entered layer 3, and the keys it made

A layer is kept as it was called: the stream, the other arguments, and what its attention saw. A model whose layers
cannot be called again on some rows alone is refused here, with the reason.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mech.model.architectures.families import layers_of, module_at, part_at
from mech.model.attention import AttentionCall
from mech.model.hooked import HookedMLLM
from mech.model.partial.room import Room
from mech.model.points import hooked, point_name
from mech.model.turns import alone

_ROWLESS = (type(None), bool, int, float, str)
_SLICED = ("position_embeddings", "position_ids", "cache_position")
_BEHIND_LAST_MLP = ("mlp.hook_post", "hook_mlp_out", "hook_resid_post")
REPLACED = ("attention_mask", "past_key_values", "past_key_value")


class NotResumable(Exception):
    """This model or run cannot be continued from the middle exactly; the message is the reason."""


@dataclass(frozen=True, eq=False)
class LayerRun:
    """What one text layer was given and computed.

    Attributes:
        args: positional arguments after the stream.
        kwargs: keyword arguments.
        stream: the residual stream that entered.
        call: what its attention saw and produced; only the shape of the queries.
        added: what the model adds to the stream after the layer (DeepStack), None for nothing.
    """

    args: tuple
    kwargs: dict[str, Any]
    stream: Float[Tensor, "batch pos d_model"]
    call: AttentionCall
    added: Float[Tensor, "batch pos d_model"] | None


@dataclass(frozen=True, eq=False)
class CachedRun:
    """One forward of a batch: every text layer, the stream that leaves the last one, and the logits at ``reads``.

    Streams are on the device of the logits, even if layers are on several devices; what attention saw stays with its
    layer.

    ``last`` is known only at ``reads`` and NaN elsewhere, see ``last_mlp_at``.
    """

    layers: tuple[LayerRun, ...]
    last: Float[Tensor, "batch pos d_model"]
    reads: tuple[int, ...]
    logits: Float[Tensor, "batch read vocab"]
    shaped: Callable[[Tensor], Tensor]  # what the model does to the unembedding's output: usually nothing
    room: Room  # for variants of it


class BufferPool:
    """Copies of what a forward computes and is needed after it, ``count`` of one shape in one block of memory.

        pool = BufferPool(layers)
        z = pool.put(z)

    A tensor that is kept where it was made lies between those that a layer frees. On a CPU, memory is then returned to
    the system and requested again in every layer: four times the page faults of a copy in a block. On other devices
    each copy is separate, as layers may be on several devices.
    """

    def __init__(self, count: int):
        self.count = count
        self._free: dict[tuple, list[Tensor]] = {}

    def put(self, value: Tensor) -> Tensor:
        """The copy, without its gradient."""
        if value.device.type != "cpu":
            return value.detach().clone()
        key = (value.shape, value.dtype)
        if not self._free.get(key):
            self._free[key] = list(value.new_empty((self.count, *value.shape)))
        return self._free[key].pop().copy_(value.detach())


@alone
@torch.no_grad()
def cached_run(model: HookedMLLM, inputs: Any, reads: Sequence[int]) -> CachedRun:
    """Run ``inputs`` once and keep what continuing needs: per layer the stream, keys, values and z.

    Raises:
        NotResumable: a layer that does more than its own self-attention and row-wise work, hooks on the model, or local
            heads.

    Cost: one forward; memory for a KV cache and three streams per layer.
    """
    if hooked(model.hook_dict.values()) or any(record.observers for _, record in model._layers):
        raise NotResumable("there are hooks on the model")
    if model.localized is not None:
        raise NotResumable("the model is localized")
    norm = module_at(model.hf_model, model.family.final_norm)
    recorder = _Recorder(layers_of(model.hf_model, model.family.text))
    with recorder.listening(norm), model.attending(recorder.read_call), last_mlp_at(model, reads):
        logits = model(inputs, logits_to_keep=torch.as_tensor(reads, device=model.device))
    layers = recorder.layer_runs(model.device)
    final = recorder.streams[-1].to(model.device)
    unembed: Any = module_at(model.hf_model, model.family.unembed)
    shaped = _shape_of(model, unembed(norm(final[:, list(reads)])).to(logits.device), logits)
    return CachedRun(layers, final, tuple(reads), logits, shaped, Room.of(model))


class _Recorder:
    """What passes between the layers of one forward: streams, arguments and attention calls."""

    def __init__(self, layers: Sequence[nn.Module]):
        self.layers = layers
        self.streams: list[Tensor] = []  # before each layer, and after the last
        self._calls: dict[int, list[AttentionCall]] = {}
        self._arguments: dict[int, tuple[tuple, dict]] = {}
        self._added: dict[int, Tensor | None] = {}  # what is added to the stream between two layers
        self._left: tuple[Tensor, int] | None = None  # the stream as the last layer left it, and its version
        self._pool = BufferPool(len(layers) + 1)

    @contextmanager
    def listening(self, norm: nn.Module) -> Iterator[None]:
        """While open, everything is recorded; ``norm`` is the one after the last layer."""
        handles = [norm.register_forward_pre_hook(lambda module, args: (self._keep(args[0]), None)[1])]
        for index, layer in enumerate(self.layers):
            handles.append(layer.register_forward_pre_hook(partial(self._enter, index), with_kwargs=True))
            handles.append(layer.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, stream: Tensor) -> None:
        index = len(self.streams) - 1
        if self._left is not None:
            left, version = self._left
            if left is not stream:
                change = stream - left
                self._added[index] = change if change.any() else None
            elif version != stream._version:
                raise NotResumable(f"the stream after layer {index} is written in place")
        self._left = None
        self.streams.append(self._pool.put(stream))

    def _enter(self, index: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._keep(args[0] if args else kwargs["hidden_states"])
        self._arguments[index] = args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        stream = output[0] if isinstance(output, tuple) else output
        self._left = stream, stream._version

    def read_call(self, call: AttentionCall) -> None:
        # Queries are recomputed when the run is continued; only their shape is needed.
        kept = {name: self._pool.put(getattr(call, name)) for name in "kvz"}
        self._calls.setdefault(call.layer, []).append(replace(call, q=call.q.new_empty(1).expand(call.q.shape), **kept))

    def layer_runs(self, device: torch.device) -> tuple[LayerRun, ...]:
        """What was recorded for each layer.

        Raises:
            NotResumable: layers that did not run once each, or cannot be run again from what was recorded.
        """
        if len(self.streams) != len(self.layers) + 1:
            raise NotResumable(f"{len(self.streams) - 1} of {len(self.layers)} layers ran")
        runs = []
        for index in range(len(self.layers)):
            (args, kwargs), stream = self._arguments[index], self.streams[index]
            calls, added = self._calls.get(index, []), self._added.get(index)
            _refuse(index, args, kwargs, stream, calls)
            runs.append(
                LayerRun(args, kwargs, stream.to(device), calls[0], None if added is None else added.to(device))
            )
        return tuple(runs)


@contextmanager
def last_mlp_at(model: HookedMLLM, reads: Sequence[int]) -> Iterator[None]:
    """While open, the last layer's MLP runs for the rows ``reads`` only, unless it or anything after it is hooked.

    Torch hooks inside that MLP count too: they may count rows.

    For runs that need only the logits at ``reads`` and what precedes that MLP: two thirds of a layer are saved. The
    stream that leaves the layer is NaN in the other rows, so that any use of them shows.
    """
    last = model.cfg.n_layers - 1
    behind = ("ln_final.hook_normalized", *(point_name(p, last) for p in _BEHIND_LAST_MLP))
    points = [model.hook_dict[name] for name in behind if name in model.hook_dict]
    module = part_at(layers_of(model.hf_model, model.family.text)[last], model.family.text.mlp)
    if module is None or any(part._forward_hooks or part._forward_pre_hooks for part in module.modules()):
        yield
        return
    shapes: list[torch.Size] = []
    at = torch.as_tensor(reads, device=model.device)

    def narrow(module: nn.Module, args: tuple) -> tuple | None:
        if not args or args[0].ndim != 3 or hooked(points):
            return None
        shapes.append(args[0].shape)
        return args[0][:, at.to(args[0].device)], *args[1:]

    def widen(module: nn.Module, args: tuple, output: Any) -> Any:
        if not shapes:
            return None
        some, *more = output if isinstance(output, tuple) else (output,)
        shape = shapes.pop()
        whole = some.new_full(shape, float("nan"))
        whole[:, at.to(some.device)] = some.reshape(shape[0], -1, shape[2])
        whole = whole.flatten(0, 1) if some.ndim == 2 else whole  # experts may flatten the batch
        return (whole, *more) if isinstance(output, tuple) else whole

    handles = [module.register_forward_pre_hook(narrow), module.register_forward_hook(widen)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shape_of(model: HookedMLLM, unembedded: Tensor, logits: Tensor) -> Callable[[Tensor], Tensor]:
    """What the model does to the unembedding's output, found by trial: a config may name what its model leaves out."""
    config = model.hf_model.config.get_text_config()
    scale, cap = (getattr(config, name, None) or 1.0 for name in ("logit_scale", "final_logit_softcapping"))
    shapes = (lambda x: x, lambda x: x * scale, lambda x: torch.tanh(x / cap) * cap)
    gaps = [float((shape(unembedded) - logits).abs().max()) for shape in shapes]
    if min(gaps) <= tolerance(logits):
        return shapes[gaps.index(min(gaps))]
    raise NotResumable("the logits are not the unembedding of the final norm")


def tolerance(logits: Tensor) -> float:
    """How far rounding may move logits."""
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
            raise NotResumable(f"layer {index} is given {name!r}, which mech cannot cut to rows")
    for value in args:
        if not isinstance(value, _ROWLESS) and not (isinstance(value, Tensor) and value.shape[:2] == stream.shape[:2]):
            raise NotResumable(f"layer {index} is given an argument that mech cannot cut to rows")
