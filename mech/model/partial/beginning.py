"""The first layers of a run, kept so that runs that differ from it only later need not repeat them.

    kept = beginning(model, batch, logits_to_keep=2)     # one forward
    with kept.at(12):                                    # text layers 0 to 11 are passed over
        logits = model(batch, logits_to_keep=2)

An intervention at layer 12 does not change what enters layer 12, so the run may begin there: same inputs, same numbers,
a part of the cost. The stream that enters each layer is kept, or that of every second, third, ... layer if all of them
would take too much memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mech.model.architectures.families import layers_of
from mech.model.hooked import HookedMLLM
from mech.model.partial.cached_run import BufferPool, tolerance
from mech.model.points import hooked

MOST = 2**31  # the most bytes of streams that are kept


@dataclass(frozen=True, eq=False)
class Beginning:
    """Made by ``beginning``: the logits of the run, and what entered its layers.

    Attributes:
        model: the model that ran.
        logits: of the whole run.
        streams: by layer; empty for a model whose layers cannot be skipped.
    """

    model: HookedMLLM
    logits: Float[Tensor, "batch read vocab"]
    streams: dict[int, Float[Tensor, "batch pos d_model"]]

    @contextmanager
    def at(self, layer: int) -> Iterator[None]:
        """While open, the model runs from ``layer`` on, or from the last layer before it whose stream is kept.

        The inputs must be those of ``beginning``. If a layer that would be skipped has hooks, all layers run.
        """
        layer = max((held for held in self.streams if held <= layer), default=0)
        layers = layers_of(self.model.hf_model, self.model.family.text)
        passed = tuple(f"blocks.{i}." for i in range(layer))
        heard = (point for name, point in self.model.hook_dict.items() if name.startswith(passed))
        if layer == 0 or hooked(heard):
            yield
            return
        stream = self.streams[layer]
        handle = layers[layer].register_forward_pre_hook(_entered_by(stream), prepend=True, with_kwargs=True)
        own = {module: module.__dict__.get("forward") for module in layers[:layer]}
        try:
            for module in own:
                module.forward = _passed_over
            yield
        finally:
            handle.remove()
            for module, forward in own.items():
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward


def _passed_over(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _entered_by(stream: Tensor) -> Callable[[nn.Module, tuple, dict], tuple[tuple, dict]]:
    """A pre-hook that gives a layer a copy of the stream (a layer may write into its input)."""

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (stream.clone(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": stream.clone()}

    return enter


@torch.no_grad()
def beginning(model: HookedMLLM, inputs: Any, *, most: int = MOST, **options: Any) -> Beginning:
    """Run once and keep what enters the text layers, in at most ``most`` bytes (but at least one stream).

    A model whose layers pass on more than the stream (a tuple, shared keys and values) is detected by running it again
    from its last layer and from its middle: it gets no streams, and ``at`` then runs everything.

    Cost: one forward, and half of one.
    """
    layers = layers_of(model.hf_model, model.family.text)
    streams: dict[int, Tensor] = {}
    plain = [True]
    pool: list[BufferPool] = []

    def keep(index: int) -> Callable[[nn.Module, tuple, dict], None]:
        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            stream = args[0] if args else kwargs["hidden_states"]
            if not pool:
                whole = stream.numel() * stream.element_size() * len(layers)
                pool.append(BufferPool(max(1, len(layers) // -(-whole // most))))
            if index % -(-len(layers) // pool[0].count) == 0:
                streams[index] = pool[0].put(stream)

        return before

    def look(module: nn.Module, args: tuple, output: Any) -> None:
        plain[0] = plain[0] and isinstance(output, Tensor)

    handles = [layer.register_forward_pre_hook(keep(i), with_kwargs=True) for i, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(look) for layer in layers]
    try:
        logits = model(inputs, **options)
    finally:
        for handle in handles:
            handle.remove()
    found = Beginning(model, logits, streams if plain[0] else {})
    tried = {max(found.streams, default=0), len(layers) // 2} if found.streams else set()
    if all(_same(found, layer, inputs, options) for layer in tried):
        return found
    return Beginning(model, logits, {})


def _same(found: Beginning, layer: int, inputs: Any, options: dict[str, Any]) -> bool:
    """Whether a run that begins at a layer gives the logits of the whole run."""
    try:
        with found.at(layer):
            again = found.model(inputs, **options)
    except (AttributeError, KeyError, RuntimeError, TypeError):  # a layer lacks what another one left for it
        return False
    return float((again - found.logits).abs().max()) <= tolerance(found.logits)
