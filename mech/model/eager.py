"""A Hugging Face model run as its modules are written, for as long as somebody listens inside.

    with uncompiled(), uncheckpointed(hf_model):
        hf_model(**tensors)                  # every hook fires, once

Two things that people switch on would leave hooks out without a word:

* ``torch.compile`` keeps what modules did when they were traced, without the hooks that came later. Whatever was
  compiled (the model, a layer, a ``forward`` that was replaced) runs the Python it was made from for so long; its
  compiled code is there again afterwards.
* Gradient checkpointing runs layers a second time in the backward pass, when the hooks are gone, and drops the KV cache
  in train mode. The layers keep their activations instead: the same gradients, at the memory of a run without it.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

P = ParamSpec("P")
R = TypeVar("R")

# torch's switch is one for all threads: the first that needs it sets it, the last puts it back.
_switch = threading.Lock()
_open: list[Any] = []


@contextmanager
def uncompiled() -> Iterator[None]:
    """While open, whatever was compiled runs the Python it was made from. Several threads may have it open."""
    with _switch:
        _open.append(torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _switch:
            stance = _open.pop()
            if not _open:
                stance.__exit__(None, None, None)


@contextmanager
def uncheckpointed(model: nn.Module) -> Iterator[None]:
    """While open, no layer below ``model`` is checkpointed."""
    # Looking through the modules is left out where nothing can be checkpointed: this runs around every forward.
    switches = list(_checkpoints(model)) if model.training or torch.is_grad_enabled() else []
    for module, name, plain, _ in switches:
        setattr(module, name, plain)
    try:
        yield
    finally:
        for module, name, _, own in switches:
            setattr(module, name, own)


def _checkpoints(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any, Any]]:
    """Every switch of gradient checkpointing that is on: its module, its name, what turns it off, what it is now."""
    for module in model.modules():
        if module.__dict__.get("gradient_checkpointing"):
            yield module, "gradient_checkpointing", False, True
        if "checkpoint_fn" in module.__dict__:  # torch.distributed's wrapper around a layer
            yield module, "checkpoint_fn", _called, module.__dict__["checkpoint_fn"]


def _called(function: Callable, *args: Any, **options: Any) -> Any:
    return function(*args, **options)


def in_python(method: Callable[P, R]) -> Callable[P, R]:
    """A method that is run, not traced, where compiled code calls it; what it calls may be compiled itself."""
    return torch.compiler.disable(method)  # type: ignore[return-value]


def original(module: Any) -> Any:
    """The module that ``torch.compile`` was given, for what it returned; anything else as it is."""
    return module._orig_mod if isinstance(module, OptimizedModule) else module
