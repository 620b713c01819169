"""Run a Hugging Face model as its modules are written, for as long as there are hooks or observers.

    with uncompiled(), uncheckpointed(hf_model):
        hf_model(**tensors)                  # every hook fires, once

Two common options would silently skip hooks:

* ``torch.compile`` keeps what modules did when they were traced, without hooks added later. While hooks are live,
  whatever was compiled (the model, a layer, a replaced ``forward``) runs its original Python; afterwards its compiled
  code is used again.
* Gradient checkpointing runs layers a second time in the backward pass, when the hooks are gone, and drops the KV cache
  in train mode. Layers keep their activations instead: the gradients are the same, at the memory cost of a run without
  checkpointing.
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

# torch's switch is shared by all threads: the first one that needs it sets it, the last one restores it.
_switch = threading.Lock()
_open: list[Any] = []


@contextmanager
def uncompiled() -> Iterator[None]:
    """While open, whatever was compiled runs its original Python. Several threads may have it open."""
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
    # This runs around every forward, so the modules are searched only where something can be checkpointed.
    switches = list(_checkpoints(model)) if model.training or torch.is_grad_enabled() else []
    for module, name, plain, _ in switches:
        setattr(module, name, plain)
    try:
        yield
    finally:
        for module, name, _, own in switches:
            setattr(module, name, own)


def _checkpoints(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any, Any]]:
    """Every gradient checkpointing switch that is on: its module, its name, its "off" value and its current value."""
    for module in model.modules():
        if module.__dict__.get("gradient_checkpointing"):
            yield module, "gradient_checkpointing", False, True
        if "checkpoint_fn" in module.__dict__:  # torch.distributed's wrapper around a layer
            yield module, "checkpoint_fn", _called, module.__dict__["checkpoint_fn"]


def _called(function: Callable, *args: Any, **options: Any) -> Any:
    return function(*args, **options)


def in_python(method: Callable[P, R]) -> Callable[P, R]:
    """Make compiled code run this method instead of tracing it; what it calls may itself be compiled."""
    return torch.compiler.disable(method)  # type: ignore[return-value]


def original(module: Any) -> Any:
    """The module behind what ``torch.compile`` returned; anything else unchanged."""
    return module._orig_mod if isinstance(module, OptimizedModule) else module
