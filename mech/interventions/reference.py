"""Activations of a point on other samples: the means and draws that ablation puts in its place.

Visual and text positions are kept apart: a head's mean over the picture is not a value it ever takes at a word.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mech.arguments import Count, Seed, checked, one_of
from mech.data.samples import Samples, SomeSamples
from mech.errors import ExperimentError
from mech.identity import made_elsewhere, weight_digest
from mech.inputs import IMAGE, PADDING, VIDEO, Inputs, TokenLayout
from mech.model import AttentionCall, HookedMLLM

TEXT_KIND, VISUAL_KIND = 0, 1
Z = "attn.hook_z"
ABLATED = (Z, "hook_attn_out", "hook_mlp_out", "hook_embed")


def kinds(layout: TokenLayout) -> Tensor:
    """0 at text, 1 at visual tokens, -1 at padding."""
    kind = torch.as_tensor(layout.kind)
    visual = (kind == IMAGE) | (kind == VIDEO)
    return torch.where(kind == PADDING, -1, torch.where(visual, VISUAL_KIND, TEXT_KIND))


@dataclass(frozen=True)
class Reference:
    """Values of one point on reference samples, in every layer: one per text head, or as wide as the residual stream.

    Attributes:
        mean: over all positions of a kind; layers without the point are zero.
        draws: at random positions of a kind, the same positions for every layer and head.
        digest: of the samples.
        point: the point that the values come from.
        model, weights: name and weight digest of the model that they come from; "" where unknown.
    """

    mean: Float[Tensor, "kind layer ..."] = field(repr=False)
    draws: Float[Tensor, "kind draw layer ..."] = field(repr=False)
    digest: str = ""
    point: str = Z
    model: str = ""
    weights: str = ""

    def to(self, device: torch.device | str) -> "Reference":
        """The same values on another device."""
        return replace(self, mean=self.mean.to(device), draws=self.draws.to(device))

    def check(self, model: HookedMLLM, point: str, allow_other_model: bool = False) -> str:
        """Refuse a model or a point other than the one these values come from.

        Returns:
            The other model in words, if another is allowed and the values come from one; else "".
        """
        cfg = model.cfg
        layers = 1 if point == "hook_embed" else cfg.n_layers
        rest = (cfg.n_heads, max(cfg.d_heads)) if point == Z else (cfg.d_model,)
        given, mine = (self.point, *self.mean.shape[1:]), (point, layers, *rest)
        if given != mine:
            raise ExperimentError(
                f"reference activations of {' x '.join(map(str, given))}",
                f"{' x '.join(map(str, mine))} (point, layers, and heads x d_head or d_model), as this model has",
                f"make them with reference_activations(model, samples, point={point!r})",
            )
        return made_elsewhere("reference activations", self.model, self.weights, model, allow_other_model)


@checked
@torch.no_grad()
def reference_activations(
    model: HookedMLLM,
    samples: SomeSamples,
    *,
    point: one_of(ABLATED) = Z,
    n_draws: Count = 64,
    batch_size: Count = 8,
    seed: Seed = 0,
) -> Reference:
    """The mean of a point over ``samples``, and ``n_draws`` single values of it, for each kind of position.

    Args:
        model: a hooked model.
        samples: samples other than those tested.
        point: ``"attn.hook_z"``, ``"hook_attn_out"``, ``"hook_mlp_out"`` or ``"hook_embed"``.
        n_draws: values kept for ``resample``.
        batch_size: samples per forward.
        seed: of the draws.

    Raises:
        ExperimentError: no samples.

    Cost: one forward per sample.
    """
    samples = Samples(samples)
    names = [name for name in model.points() if name == point or _is_text(name, point)]
    layers = {name: 0 if name == point else int(name.split(".")[1]) for name in names}
    found = _Found(-(-n_draws // len(samples)), {layer: ([], []) for layer in layers.values()})
    for start in range(0, len(samples), batch_size):
        inputs = model.collate([model.inputs_of(sample) for sample in samples[start : start + batch_size]])
        # Seeded per sample, so that the draws do not depend on the batches.
        seeds = [seed * 1_000_003 + start + row for row in range(len(inputs.layouts))]
        with _reading(model, point, layers, found.reader(inputs, seeds)):
            model(inputs, logits_to_keep=1)
    n_layers = 1 if point == "hook_embed" else model.cfg.n_layers
    wide = torch.promote_types(model.dtype, torch.float32)
    mean, draws = found.filled(n_layers, n_draws, wide, seed)
    return Reference(mean.to(model.device), draws.to(model.device), samples.digest(), point, model.name,
                     weight_digest(model) or "")  # fmt: skip


@dataclass(eq=False)
class _Found:
    """Sums and drawn values of a point, for each kind of position.

    Attributes:
        each: values drawn per sample and kind.
        drawn: by layer and kind.
        total: by layer, ``[kind ...]``.
        count: positions of each kind.
    """

    each: int
    drawn: dict[int, tuple[list[Tensor], list[Tensor]]]
    total: dict[int, Tensor] = field(default_factory=dict)
    count: Tensor = field(default_factory=lambda: torch.zeros(2))

    def reader(self, inputs: Inputs, seeds: Sequence[int]) -> Callable[[int, Tensor], None]:
        """A function that adds the values of one batch, layer by layer."""
        kind = torch.stack([kinds(layout) for layout in inputs.layouts])
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        picked = [
            [_pick(row == which, self.each, g) for row, g in zip(kind, generators, strict=True)]
            for which in (TEXT_KIND, VISUAL_KIND)
        ]
        for which in (TEXT_KIND, VISUAL_KIND):
            self.count[which] += (kind == which).sum()

        def read(layer: int, value: Tensor) -> None:
            value = value.detach().to(torch.promote_types(value.dtype, torch.float32))
            sums = self.total.setdefault(layer, torch.zeros(2, *value.shape[2:], dtype=torch.float64))
            for which in (TEXT_KIND, VISUAL_KIND):
                sums[which] += value[(kind == which).to(value.device)].sum(0).double().cpu()
                here = [row[at.to(value.device)] for row, at in zip(value, picked[which], strict=True)]
                self.drawn[layer][which].append(torch.cat(here).cpu())

        return read

    def filled(self, n_layers: int, n_draws: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
        """Means ``[kind layer ...]`` and draws ``[kind draw layer ...]`` of all layers."""
        # Heads may be wider in some layers than in others (Gemma 4): narrower ones are padded with zeros.
        rest = [max(sizes) for sizes in zip(*(sums.shape[1:] for sums in self.total.values()), strict=True)]
        mean, draws = (torch.zeros(*shape, n_layers, *rest, dtype=dtype) for shape in ((2,), (2, n_draws)))
        for layer, sums in self.total.items():
            here = tuple(slice(size) for size in sums.shape[1:])
            for which in (TEXT_KIND, VISUAL_KIND):
                mean[(which, layer, *here)] = (sums[which] / self.count[which].clamp(min=1)).to(dtype)
                values = torch.cat(self.drawn[layer][which])
                draws[(which, slice(None), layer, *here)] = _shuffled(values, n_draws, seed)
        return mean, draws


def _is_text(name: str, point: str) -> bool:
    return name.startswith("blocks.") and name.endswith(f".{point}")


def _reading(model: HookedMLLM, point: str, layers: dict[str, int], read: Any) -> AbstractContextManager:
    """Read heads with an observer, which sees them before any hook changes them, and other points with hooks."""
    if point != Z:
        return model.hooks([(name, lambda value, hook: read(layers[hook.name], value)) for name in layers])

    def observe(call: AttentionCall) -> None:
        read(call.layer, call.z)

    return model.attending(observe)


def _pick(allowed: Tensor, n: int, generator: torch.Generator) -> Tensor:
    where = allowed.nonzero().flatten()
    return where[torch.randint(len(where), (n,), generator=generator)] if len(where) else where


def _shuffled(parts: Tensor, n: int, seed: int) -> Tensor:
    if not len(parts):
        return parts.new_zeros(n, *parts.shape[1:])
    return parts[torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed))[:n]]
