"""LoRA (arXiv 2106.09685) on the attention of a language model: trained on top of frozen weights, merged when opened.

adapters = adapt(model, rank=16)             # the model now computes W x + B A x, and only A and B are trained
merge(weights, adapters_state)               # W + B A, for a state dict of the plain model
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")
DOWN, UP = "lora_down", "lora_up"


class Adapted(nn.Module):
    """A frozen linear map in bfloat16 and, with a rank, a low-rank one in float32 that is added to it."""

    weight: Tensor

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().bfloat16(), persistent=False)
        self.rank = rank
        if rank:
            out, into = linear.weight.shape
            self.lora_down = nn.Parameter(torch.randn(rank, into) / into**0.5)
            self.lora_up = nn.Parameter(torch.zeros(out, rank))

    def forward(self, x: Float[Tensor, "*rows into"]) -> Float[Tensor, "*rows out"]:
        found = nn.functional.linear(x.bfloat16(), self.weight).float()
        return found + (x @ self.lora_down.T) @ self.lora_up.T if self.rank else found


class Adapters(dict[str, nn.Parameter]):
    """The trained parameters by name; saved and restored like a module."""

    def state_dict(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            self[name].data.copy_(value)


def adapt(model: nn.Module, rank: int) -> Adapters:
    """Puts an ``Adapted`` in place of every linear map of the layers; returns the parameters to train."""
    trained = Adapters()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in f".{name}":
            parent, _, own = name.rpartition(".")
            adapted = Adapted(module, rank if own in ADAPTED else 0)
            setattr(model.get_submodule(parent), own, adapted)
            trained.update((f"{name}.{part}", parameter) for part, parameter in adapted.named_parameters())
    return trained


def merge(weights: dict[str, Tensor], adapters: dict[str, Tensor], prefix: str = "") -> None:
    """Adds every adapter's ``up @ down`` to the weight it belongs to, in place."""
    for name, up in adapters.items():
        if name.endswith(UP):
            module = name.removesuffix(f".{UP}")
            weight = weights[f"{prefix}{module}.weight"]
            weight += (up.float() @ adapters[f"{module}.{DOWN}"].float()).to(weight.dtype)
