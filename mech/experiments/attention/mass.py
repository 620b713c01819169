"""How much attention *every* query of every head pays to a few sets of tokens, from one ordinary forward.

    mass = attention_mass(model, inputs, {"image": "image", "evidence": sample.evidence})
    mass.sel(layer=3, head=5, set="evidence")            # one number for each query position

The sets' indicator vectors are appended to the values and pass through the model's own fused kernel
(``mech.model.KeySums``), so no ``S x S`` attention is built, and masks, windows and shared key/value heads are the
kernel's own. RAM is the same for the question's rows only (``mech.retrieval_attention_mass``); for the attention to
single keys see ``mech.attention_from``.
"""

from collections.abc import Mapping, Sequence

import torch
import xarray as xr
from jaxtyping import Float

from mech.arguments import checked
from mech.errors import ExperimentError
from mech.inputs import Inputs
from mech.inputs.layout import Where
from mech.model import AttentionCall, HookedMLLM, KeySums


@checked
@torch.no_grad()
def attention_mass(
    model: HookedMLLM,
    inputs: Inputs,
    sets: Mapping[str, Where] | Sequence[Mapping[str, Where]],
    *,
    queries: str = "all",
) -> xr.DataArray:
    """The attention mass of every text head on each set of tokens, for every query.

    ``mass[l, h, x, s] = sum over y in s of A[l, h, x, y]`` with ``A`` the attention after the softmax.

    Sign: higher means that the query attends more to the set. Unit: attention mass, between 0 and 1, in the model's own
    precision.

    Args:
        inputs: one or more rows; padding queries have mass 0.
        sets: name -> what ``TokenLayout.positions`` takes ("image", "question", a region, several, positions); or
            such a mapping for each row, with the same names.
        queries: "all" keeps every query position; "question", "last", "text", ... take the mean over these rows.

    Returns:
        dims example, layer (those with attention to the sequence), head, query_pos (absent for a mean), set.

    Raises:
        ExperimentError: no sets, or not one mapping for each row.
        RegionError: a set that covers no token.

    Cost: one forward; up to 8 sets cost about a tenth of its attention.
    """
    if inputs.layouts[0].memory is not None:
        raise ExperimentError(
            "pictures in a memory, which only some layers attend to", "a model with its pictures in the "
            "sequence", "use mech.attention_from(model, inputs), whose keys are those of inputs.layout.memory",
        )  # fmt: skip
    names, columns, weight = _columns(inputs, sets, queries)
    weight = weight.to(model.device)
    seen: dict[int, torch.Tensor] = {}

    def keep(call: AttentionCall) -> None:
        if call.carried is None:
            return
        mass = call.carried.transpose(1, 2) * weight.to(call.carried)[:, None, :, None]
        seen[call.layer] = (mass if queries == "all" else mass.sum(2)).float().cpu()

    with model.attending(KeySums(columns.to(model.device), keep)):
        model(inputs, logits_to_keep=1)
    layers = sorted(seen)
    return xr.DataArray(
        torch.stack([seen[layer] for layer in layers], dim=1).numpy(),
        dims=("example", "layer", "head", *(["query_pos"] if queries == "all" else []), "set"),
        coords={"layer": layers, "set": names},
        name="attention_mass",
        attrs={
            "unit": "attention mass",
            "sign": "the higher, the more the query attends to the set",
            "queries": queries,
        },
    )


def _columns(
    inputs: Inputs, sets: Mapping[str, Where] | Sequence[Mapping[str, Where]], queries: str
) -> tuple[list[str], Float[torch.Tensor, "batch key_pos set"], Float[torch.Tensor, "batch query_pos"]]:
    """The names of the sets, which keys are in each, and the weight of each query."""
    named = [sets] * len(inputs) if isinstance(sets, Mapping) else list(sets)
    names = list(named[0]) if named else []
    if not names or len(named) != len(inputs) or any(list(row) != names for row in named):
        raise ExperimentError(
            f"sets {sets!r} for {len(inputs)} rows", "a mapping of at least one set, or one for each row, named alike",
            'pass {"image": "image"}',
        )  # fmt: skip
    columns = torch.zeros(*inputs.tensors["input_ids"].shape, len(names))
    weight = torch.zeros(columns.shape[:2])
    for row, (layout, wanted) in enumerate(zip(inputs.layouts, named, strict=True)):
        for index, where in enumerate(wanted.values()):
            columns[row, layout.positions(where), index] = 1
        rows = layout.positions(queries)
        weight[row, rows] = 1 if queries == "all" else 1 / len(rows)
    return names, columns, weight
