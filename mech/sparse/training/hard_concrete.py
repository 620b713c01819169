"""Hard-concrete gates (arXiv 1712.01312): random numbers that are often exactly 0 or 1 and still have a gradient.

gates = HardConcrete(n_layers, n_kv_heads)
gates.draw(batch, generator)        # [batch layer kv_head], for a training step
gates.open_probability()            # the probability that each is not 0, which an L0 penalty counts
gates.value()                       # the gates without noise
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

SHARPNESS, LOW, HIGH = 2 / 3, -0.1, 1.1  # the paper's temperature and the ends of the stretched interval
START = 3.0  # log alpha of a gate that is open in 99 of 100 draws


class HardConcrete(nn.Module):
    """A gate for each key/value head of each layer, all open at the start."""

    def __init__(self, n_layers: int, n_kv_heads: int):
        super().__init__()
        self.log_alpha = nn.Parameter(torch.full((n_layers, n_kv_heads), START))

    def draw(self, batch: int, generator: torch.Generator) -> Float[Tensor, "batch layer kv_head"]:
        """``clip(sigmoid((logit(u) + log_alpha) / temperature) stretched to [-0.1, 1.1], 0, 1)``, u even in (0, 1)."""
        even = torch.rand(batch, *self.log_alpha.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
        return _stretched((torch.logit(even).to(self.log_alpha) + self.log_alpha) / SHARPNESS)

    def open_probability(self) -> Float[Tensor, "layer kv_head"]:
        """The probability that a draw is not 0: ``sigmoid(log_alpha - temperature log(-low / high))``."""
        return torch.sigmoid(self.log_alpha - SHARPNESS * math.log(-LOW / HIGH))

    def value(self) -> Float[Tensor, "layer kv_head"]:
        """The gate without noise."""
        return _stretched(self.log_alpha)

    @torch.no_grad()
    def close(self, places: Sequence[tuple[int, int]]) -> None:
        """Close some open gates in turn; each ends up above all gates that were closed before it."""
        for place in places:
            closed = self.log_alpha[~self.chosen()]
            self.log_alpha[place] = 0.9 * float(closed.max()) if closed.numel() else -1.0

    def chosen(self) -> Bool[Tensor, "layer kv_head"]:
        """The gates that stay open when all are rounded to 0 or 1: those with a value of at least one half."""
        return self.log_alpha.detach() >= 0


def _stretched(logits: Tensor) -> Tensor:
    return (torch.sigmoid(logits) * (HIGH - LOW) + LOW).clamp(0, 1)
