"""How a head acts: at which positions, what it reads there, and which later heads and MLPs carry its effect.

    path = path_of(runs, (1, 0), attended_regions(runs))
    path.direct, path.through, path.acts, path.reads
    path.carrier                          # "directly on the logits", or "through the values of L4H2"

The head is noised (its output becomes that of the corrupted run), and everything after it is recomputed. A *leg* is
what one later component's change costs on its own path to the logits, all else clean; for a later head, giving it only
the noised run's queries, keys or values shows through which input the change came. Keys and values are those of its
key/value head, which other heads may share. A negative leg compensates for the head: self-repair.

This does not distinguish a component that responds to the head itself from one that responds to another in between, and
freezes nothing on the way (for that see ``mech.experiments.paths.path_patching``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mech.arguments import NamedProgress
from mech.experiments.attention.mass import attention_mass
from mech.experiments.causal.runs import REGIONS, Runs, score, swaps, watched

STEPS = 3  # later components that are named
INPUTS = {"q": "queries", "k": "keys", "v": "values"}


@dataclass(frozen=True)
class Leg:
    """A later head (``head`` is None for an MLP) that carries ``effect``; ``inputs`` say through which of q, k, v."""

    layer: int
    head: int | None
    effect: float
    inputs: Mapping[str, float]

    def __str__(self) -> str:
        return f"the MLP of layer {self.layer}" if self.head is None else f"L{self.layer}H{self.head}"


@dataclass(frozen=True)
class HeadPath:
    """How one head acts; all numbers but ``reads`` (attention mass) are shares of the gap between the runs.

    Attributes:
        layer, head: which head.
        direct: what is lost on the direct path to the logits.
        through: later components with the largest legs, largest first.
        acts: region -> what is lost when the head is noised only there.
        reads: region -> attention mass, from the region where the head acts most.
    """

    layer: int
    head: int
    direct: float
    through: tuple[Leg, ...]
    acts: Mapping[str, float]
    reads: Mapping[str, float]

    @property
    def where(self) -> str:
        """The region in which the head acts most."""
        return max(self.acts, key=lambda region: abs(self.acts[region]))

    @property
    def carrier(self) -> str:
        """The largest part of the path, in words."""
        if not self.through or abs(self.direct) >= abs(self.through[0].effect):
            # A loss on no named path went along many, each too small to be named.
            small = abs(self.direct) < 0.5 * abs(sum(self.acts.values())) and not self.through
            return "along many paths, none of them large" if small else "directly on the logits"
        leg = self.through[0]
        if not leg.inputs:
            return f"through {leg}"
        best = max(leg.inputs, key=lambda name: abs(leg.inputs[name]))
        more = len(self.through) - 1
        others = f" and {more} other{'s' * (more > 1)}" if more else ""
        return f"through the {INPUTS[best]} of {leg}{others}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "HeadPath":
        return cls(**{**value, "through": tuple(Leg(**leg) for leg in value["through"])})


def paths_of(runs: Runs, heads: Sequence[tuple[int, int]], threshold: float, say: NamedProgress) -> list[HeadPath]:
    """How each of these heads acts; see ``path_of``."""
    attended, paths = attended_regions(runs), []
    for head in heads:
        paths.append(path_of(runs, head, attended, threshold))
        say("paths", len(paths), len(heads))
    return paths


@torch.no_grad()
def path_of(runs: Runs, head: tuple[int, int], attended: xr.DataArray | None, threshold: float = 0.02) -> HeadPath:
    """How a head acts. ``attended`` is ``attended_regions(runs)``; legs below ``threshold`` are left out.

    Raises:
        NotResumable: a model whose layers cannot be run on only some rows.

    Cost: for each sample two forwards, one for each region, and three for each later head that is named.
    """
    layer, index = head
    model, live = runs.model, set(runs.model.points())
    later = range(layer, model.cfg.n_layers)
    names = [f"blocks.{i}.{point}" for i in later for point in ("attn.hook_q", "attn.hook_k", "attn.hook_v")]
    names += [f"blocks.{i}.hook_mlp_out" for i in later]
    noised: list[dict[str, Tensor]] = []
    for batch in runs.batches:
        kept: dict[str, Tensor] = {}
        every = [*(name for name in batch.z[0]), *(name for name in names if name in live)]
        score(model, batch, 0, [*swaps(batch.z[1], [head]), *watched(kept, every)])
        noised.append(kept)
    heads, mlps = (part.mean(0) for part in runs.legs(noised))
    layers = model.cfg.attention_layers
    legs = [(float(heads[i, j]), layers[i], j) for i in range(len(layers)) for j in range(heads.shape[1])
            if layers[i] > layer]  # fmt: skip
    legs += [(float(mlps[i]), layers[i], None) for i in range(len(layers))]
    largest = sorted((leg for leg in legs if abs(leg[0]) >= threshold), key=lambda leg: -abs(leg[0]))[:STEPS]
    through = tuple(Leg(at, to, effect, _inputs(runs, noised, at, to)) for effect, at, to in largest)
    present = [name for name in REGIONS if any(bool(batch.regions[name].any()) for batch in runs.batches)]
    acts = {name: float(runs.lost([head], name).mean()) for name in present}
    direct = float(heads[layers.index(layer), index])
    path = HeadPath(layer, index, direct, through, acts, {})
    if attended is None or path.where not in attended["query"]:
        return path
    mass = attended.sel(query=path.where, layer=layer).isel(head=index)
    return HeadPath(layer, index, direct, through, acts, dict(zip(attended["set"].values.tolist(), mass.values.tolist(),
                                                                 strict=True)))  # fmt: skip


def _inputs(runs: Runs, noised: list[dict[str, Tensor]], layer: int, head: int | None) -> dict[str, float]:
    """What is lost when one head takes its queries, keys or values from the noised run."""
    if head is None:
        return {}
    found = {}
    for name in INPUTS:
        point = f"blocks.{layer}.attn.hook_{name}"
        if any(point not in cache for cache in noised):
            continue
        parts = []
        for batch, cache in zip(runs.batches, noised, strict=True):
            group = batch.z[0][f"blocks.{layer}.attn.hook_z"].shape[2] // cache[point].shape[2]
            hooks = swaps(cache, [(layer, head // group)], point=name)
            parts.append(batch.scores[0] - score(runs.model, batch, 0, hooks))
        found[name] = float(np.concatenate(parts).mean()) / runs.gap
    return found


def attended_regions(runs: Runs) -> xr.DataArray | None:
    """What heads attend to from each region, on average: (query, layer, head, set), queries and sets being regions.

    None if pictures are not in the sequence. Cost: a forward for each sample.
    """
    if runs.pairs[0][0].layout.memory is not None:
        return None
    names = [name for name in REGIONS if all(bool(b.regions[name].any(1).all()) for b in runs.batches)]
    total, start = 0.0, 0
    for batch in runs.batches:
        inputs = runs.model.collate([clean for clean, _ in runs.pairs[start : start + len(batch)]])
        start += len(batch)
        sets = [{name: batch.regions[name][row].nonzero()[:, 0].tolist() for name in names}
                for row in range(len(batch))]  # fmt: skip
        mass = attention_mass(runs.model, inputs, sets)
        weight = np.stack([batch.regions[name].numpy() for name in names])  # query, example, query_pos
        weight = weight / weight.sum(-1, keepdims=True)
        total = total + np.einsum("elhps,qep->qlhs", mass.values, weight)
    coords = {"query": names, "layer": mass["layer"].values, "set": names}
    return xr.DataArray(total / len(runs.samples), dims=("query", "layer", "head", "set"), coords=coords)
