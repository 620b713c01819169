"""The exact attention of a few query rows at every layer, from one ordinary forward: the basis of every head score.

    weight = row_weights(inputs, "question")                     # 1 / |question| on its rows
    rows = weight.sum(0).nonzero().flatten()
    found = read_rows(model, inputs, rows, lambda call, pattern: {"peak": pattern.amax(-1)})
    found["peak"]                                                # [batch layer head row]

The fused kernel computes the forward; only the requested rows are computed a second time, in the layer's own mask and
at least in float32. The scores and their nulls (``mech.experiments.scores``) are built on it. It makes no ``S x S``
attention and reads no generation step (teacher-force generated text instead: a cache with windows does not record where
its keys were).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from mech.inputs import Inputs
from mech.model import AttentionCall, HookedMLLM

Item = TypeVar("Item")
Read = Callable[[AttentionCall, Float[Tensor, "batch head row key_pos"]], Mapping[str, Tensor]]


@torch.no_grad()
def read_rows(
    model: HookedMLLM, inputs: Inputs, rows: Tensor, read: Read, pictures: Mapping[str, Any] | None = None
) -> dict[str, Float[Tensor, "batch layer *rest"]]:
    """Apply ``read`` to the attention of some query rows, layer by layer; layers are ``cfg.attention_layers``.

    If visual tokens are in a memory that only some layers attend to, the other layers give zeros: they cannot see any
    visual token. ``pictures`` is the output of ``encode_pictures``, for inputs without pixels.

    Cost: one forward, and ``rows x S x d_head`` for each head.
    """
    crossing = inputs.layouts[0].memory is not None
    seen: dict[int, dict[str, Tensor]] = {}

    def read_call(call: AttentionCall) -> None:
        if call.cross == crossing:
            values = read(call, call.rows(rows))
            seen[call.layer] = {name: value.float().to(model.device) for name, value in values.items()}

    with model.attending(read_call):
        model(inputs, logits_to_keep=1, **({"mm_encoder_outputs": dict(pictures)} if pictures else {}))
    nothing = {name: torch.zeros_like(value) for name, value in next(iter(seen.values())).items()}
    layers = [seen.get(layer, nothing) for layer in model.cfg.attention_layers]
    return {name: torch.stack([values[name] for values in layers], dim=1) for name in nothing}


def row_weights(inputs: Inputs, queries: str) -> Float[Tensor, "batch pos"]:
    """The averaging weights of the query rows of each example: 1 / |queries| on each of them."""
    weight = torch.zeros(len(inputs), len(inputs.layouts[0].kind))
    for row, layout in enumerate(inputs.layouts):
        positions = torch.as_tensor(layout.positions(queries))
        weight[row, positions] = 1 / len(positions)
    return weight


def mean_rows(
    pattern: Float[Tensor, "batch head row key_pos"], weight: Float[Tensor, "batch row"]
) -> Float[Tensor, "batch head key_pos"]:
    """The attention averaged over query rows."""
    return torch.einsum("bhrk,br->bhk", pattern, weight.to(pattern))


def in_batches(items: Sequence[Item], batch_size: int) -> Iterator[tuple[list[Item], range]]:
    """Consecutive items, at most ``batch_size`` at once, with their indices."""
    for start in range(0, len(items), batch_size):
        rows = range(start, min(start + batch_size, len(items)))
        yield [items[row] for row in rows], rows
