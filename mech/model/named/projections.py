"""A module as a linear map: its matrix and its bias, whatever wraps or replaces an ``nn.Linear``.

    weight, bias = linear_map(layer.self_attn.o_proj)      # [d_out d_in], [d_out]

A stock ``nn.Linear`` is read directly: these are views. Anything else (a LoRA or DoRA layer with its active adapters,
weights that accelerate keeps elsewhere until the module runs, a replaced layer) is probed: its output for zero is the
bias, its outputs for the unit vectors give the matrix. So the matrix is always the one that the model multiplies by,
and a module that is not a linear map is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mech.errors import UnsupportedModel

# How far, relative to its size, the output for another input may be from what matrix and bias predict.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4}


class LinearMap(NamedTuple):
    """``x weight^T + bias``."""

    weight: Float[Tensor, "d_out d_in"]
    bias: Float[Tensor, " d_out"] | None


def is_stock(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a module computes what its ``weight`` says, and the weight is in memory."""
    if type(module).forward is not kind.forward or "forward" in vars(module):
        return False
    return type(module.weight) in (Tensor, nn.Parameter) and not module.weight.is_meta  # pyright: ignore


def is_quantized(module: nn.Module) -> bool:
    """Whether a module stores its weights in another form than the floating point numbers it multiplies by."""
    weight: Any = getattr(module, "weight", None)
    return not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dtype.itemsize < 2


def is_random(module: nn.Module) -> bool:
    """Whether a module's output is random: dropout inside it, in training mode."""
    return any(isinstance(part, nn.Dropout) and part.p > 0 and part.training for part in module.modules())


def linear_map(module: nn.Module) -> LinearMap:
    """Matrix and bias of a projection as it is now, without any dropout.

    Raises:
        UnsupportedModel: quantized weights, or a module that computes something else.

    Cost: none for an ``nn.Linear``; for others ``d_in`` rows through the module.
    """
    if is_stock(module):
        return LinearMap(module.weight, module.bias)  # type: ignore[arg-type]
    if is_quantized(module):
        raise UnsupportedModel(
            f"the matrix of a quantized {type(module).__name__}", "weights in floating point",
            "open the model without quantization",
        )  # fmt: skip
    width: int = getattr(module, "in_features", 0) or module.weight.shape[-1]  # type: ignore[assignment,union-attr]
    weight: Any = module.weight
    device = execution_device(module)
    asked = torch.zeros(width + 2, width, dtype=weight.dtype, device=device)
    asked[:width].fill_diagonal_(1)
    asked[-1] = torch.arange(width, device=device).cos()  # a test vector of both signs: a linear map adds them up
    with _without_dropout(module):
        output = module.forward(asked[None])[0]
    bias = output[-2]
    linear = LinearMap((output[:width] - bias).T, bias)
    with torch.no_grad():
        off = asked[-1] @ linear.weight.T + bias - output[-1]
        fits = off.abs().max() <= _ROUNDING.get(output.dtype, 0.05) * output[-1].abs().max().clamp_min(1)
    if not fits:
        raise UnsupportedModel(
            f"the matrix of a {type(module).__name__}, which is not a linear map", "a module that computes x W + b",
            "use its input and output: attn.hook_z, hook_attn_out",
        )  # fmt: skip
    return linear


def by_head(weight: Float[Tensor, "d_model d_in"], heads: int) -> Float[Tensor, "head d_head d_model"]:
    """W_O by head: a view of an output projection's matrix."""
    return weight.unflatten(1, (heads, -1)).permute(1, 2, 0)


def embedding(module: nn.Module) -> Float[Tensor, "vocab d_model"]:
    """Each token's row as it leaves the embedding: with adapters, and scaled if the module scales it.

    Cost: none for an ``nn.Embedding``; for others the whole vocabulary through the module.
    """
    if is_stock(module, nn.Embedding):
        return module.weight  # type: ignore[return-value]
    count: int = module.weight.shape[0]  # type: ignore[assignment,union-attr]
    with _without_dropout(module):
        return module.forward(torch.arange(count, device=execution_device(module)))


def accelerate_hook(module: nn.Module) -> Any:
    """The hook with which accelerate places a module's weights for its forward, or None."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return next((candidate for candidate in hooks if getattr(candidate, "execution_device", None) is not None), None)


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: the device accelerate moves its weights to, or else the device they are on.

    Raises:
        UnsupportedModel: there are no weights at all (the meta device).
    """
    for part in module.modules():
        if (hook := accelerate_hook(part)) is not None:
            return torch.device(hook.execution_device)
    for tensor in module.parameters():
        if not tensor.is_meta:
            return tensor.device
    raise UnsupportedModel(
        f"a {type(module).__name__} without weights (on the meta device)", "a model whose weights are loaded",
        "open it with HookedMLLM.from_pretrained",
    )  # fmt: skip


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """While open, a module's own parameters are in memory, even if accelerate loads them only for its forward."""
    hook = accelerate_hook(module)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if isinstance(part, nn.Dropout) and part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
