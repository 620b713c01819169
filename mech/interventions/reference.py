"""What heads put out on other samples: the means and the draws that ablation replaces a head's output with.

Positions with a visual token and positions with text are kept apart: a head's mean over the picture is not a value it
ever takes at a word.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float

from mech.data.samples import Sample, Samples
from mech.errors import ExperimentError
from mech.inputs import IMAGE, PADDING, VIDEO, TokenLayout
from mech.model import AttentionCall, HookedMLLM

TEXT_KIND, VISUAL_KIND = 0, 1


def kinds(layout: TokenLayout) -> torch.Tensor:
    """0 at text, 1 at visual tokens, -1 at padding."""
    kind = torch.as_tensor(layout.kind)
    visual = (kind == IMAGE) | (kind == VIDEO)
    return torch.where(kind == PADDING, -1, torch.where(visual, VISUAL_KIND, TEXT_KIND))


@dataclass(frozen=True)
class Reference:
    """Outputs of every text head on reference samples.

    Attributes:
        mean: over all positions of a kind.
        draws: at random positions of a kind, the same positions for every head.
        digest: of the samples.
    """

    mean: Float[torch.Tensor, "kind layer head d_head"] = field(repr=False)
    draws: Float[torch.Tensor, "kind draw layer head d_head"] = field(repr=False)
    digest: str = ""


@torch.no_grad()
def reference_activations(
    model: HookedMLLM, samples: Samples | Sequence[Sample], *, n_draws: int = 64, batch_size: int = 8, seed: int = 0
) -> Reference:
    """The mean of every head's z over ``samples``, and ``n_draws`` single values of it, for each kind of position.

    Cost: one forward per sample.
    """
    samples = Samples(samples)
    if not len(samples):
        raise ExperimentError("no reference samples", "at least one", "pass reference=train")
    cfg = model.cfg
    total = torch.zeros(2, cfg.n_layers, cfg.n_heads, cfg.d_head, dtype=torch.float64)
    count = torch.zeros(2)
    each = -(-n_draws // len(samples))
    drawn: list[list[torch.Tensor]] = [[], []]
    for start in range(0, len(samples), batch_size):
        inputs = model.collate([model.inputs_of(sample) for sample in samples[start : start + batch_size]])
        kind = torch.stack([kinds(layout) for layout in inputs.layouts])
        # Seeded sample by sample: what is drawn does not depend on the batches.
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + start + row) for row in range(len(kind))]
        picked = [[_pick(row == which, each, g) for row, g in zip(kind, generators, strict=True)] for which in (0, 1)]
        here: list[list[torch.Tensor]] = [[], []]

        def read(call: AttentionCall, kind=kind, picked=picked, here=here) -> None:
            z = call.z.detach().float()
            for which in (TEXT_KIND, VISUAL_KIND):
                total[which, call.layer] += z[(kind == which).to(z.device)].sum(0).double().cpu()
                drawn_here = [row[at.to(z.device)] for row, at in zip(z, picked[which], strict=True)]
                here[which].append(torch.cat(drawn_here).cpu())

        with model.attending(read):
            model(inputs, logits_to_keep=1)
        for which in (TEXT_KIND, VISUAL_KIND):
            count[which] += (kind == which).sum()
            drawn[which].append(torch.stack(here[which], dim=1))
    mean = (total / count.clamp(min=1)[:, None, None, None]).float()
    draws = torch.stack([_shuffled(torch.cat(parts), n_draws, seed) for parts in drawn])
    return Reference(mean.to(model.device), draws.to(model.device), samples.digest())


def _pick(allowed: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    where = allowed.nonzero().flatten()
    return where[torch.randint(len(where), (n,), generator=generator)] if len(where) else where


def _shuffled(parts: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    if not len(parts):
        return parts.new_zeros(n, *parts.shape[1:])
    return parts[torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed))[:n]]
