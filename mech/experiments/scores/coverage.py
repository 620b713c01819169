"""How much of the evidence is among the most attended keys: KeyTokenRatio of a head, Coverage of a set of heads.

    found = key_coverage(model, samples, {"top": ranking.top(15), "bottom": ranking.bottom(15)})
    found["key_token_ratio"], found["coverage"].sel(set="top")

Unlike RAM these count tokens, not mass: a head with all its attention on one token of a large box has a high RAM and a
low ratio.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float

from mech.arguments import NOT_EMPTY, Amount, Count, checked
from mech.axes import EXAMPLE, HEAD, LAYER
from mech.data.samples import Samples, SomeSamples
from mech.errors import ExperimentError
from mech.experiments.attention.rows import mean_rows, read_rows, row_weights
from mech.experiments.ranking.checks import refuse_without_evidence
from mech.experiments.ranking.ranking import head_count
from mech.experiments.scores.ram import evidence_batches
from mech.indices import Pairs
from mech.inputs import Inputs
from mech.inputs.layout import PADDING
from mech.model import AttentionCall, HookedMLLM
from mech.results import provenance


@checked
@torch.no_grad()
def key_coverage(
    model: HookedMLLM,
    samples: SomeSamples,
    sets: Annotated[Mapping[str, Pairs], NOT_EMPTY] | None = None,
    *,
    keys: Amount = 0.05,
    batch_size: Count = 8,
) -> xr.Dataset:
    """``KeyTokenRatio = |T n E| / |E|`` of every head, and ``Coverage(G) = |union over G of T n E| / |E|`` of sets.

    ``T`` are the keys of the whole sequence to which a head attends most, averaged over the question's rows; ``E`` is
    the evidence.

    Sign: the higher, the more of the evidence is among the most attended keys. Unit: share of evidence tokens. Chance
    is about ``keys`` for one head; for a set it grows with its size, so compare sets of the same size.

    Args:
        samples: samples with evidence.
        sets: name -> heads.
        keys: size of T: a share of the sequence, or a number.
        batch_size: samples per forward.

    Returns:
        ``key_token_ratio`` over example, layer, head; ``coverage`` over example, set.

    Raises:
        ExperimentError: no samples, a sample without evidence, or a head that the model does not have.

    Cost: one forward per sample, plus the question's rows.

    References: arXiv 2606.05843 (top 5% of the keys).
    """
    samples, layers = Samples(samples), list(model.cfg.attention_layers)
    refuse_without_evidence(samples)
    chosen = _checked_sets(model, sets or {})
    parts: list[np.ndarray] = []
    for inputs, evidence, _ in evidence_batches(model, samples, batch_size):
        hits = _hits(model, inputs, evidence, keys)
        parts += [hit[..., : len(tokens)] for hit, tokens in zip(hits, evidence, strict=True)]
    ratio = np.stack([hit.mean(-1) for hit in parts])
    covered = [
        [np.any([hit[layers.index(layer), head] for layer, head in heads], axis=0).mean() for heads in chosen.values()]
        for hit in parts
    ]
    result = xr.Dataset(
        {
            "key_token_ratio": ((EXAMPLE, LAYER, HEAD), ratio),
            "coverage": ((EXAMPLE, "set"), np.array(covered).reshape(len(samples), len(chosen))),
        },
        {
            EXAMPLE: samples.names,
            LAYER: layers,
            HEAD: np.arange(ratio.shape[2]),
            "set": np.array(list(chosen), dtype=str),
        },
        {"model": model.name, "keys": keys, "provenance": provenance(model, samples, keys=keys)},
    )
    for name in result.data_vars:
        result[name].attrs = {"unit": "share of evidence tokens", "sign": "more: more of the evidence is attended most"}
    return result


def _checked_sets(model: HookedMLLM, sets: Mapping[str, Pairs]) -> dict[str, list[tuple[int, int]]]:
    layers, n_heads = model.cfg.attention_layers, model.cfg.n_heads
    chosen = {name: [(int(layer), int(head)) for layer, head in heads] for name, heads in sets.items()}
    for name, heads in chosen.items():
        if not heads or any(layer not in layers or not 0 <= head < n_heads for layer, head in heads):
            raise ExperimentError(f"the set {name!r} of {heads[:4]}", f"heads of {model.name}", "use ranking.top(15)")
    return chosen


def _hits(
    model: HookedMLLM, inputs: Inputs, evidence: Sequence[np.ndarray], keys: float
) -> Float[np.ndarray, "batch layer head token"]:
    """1 if an evidence token is among the keys that a head attends to most."""
    weight = row_weights(inputs, "question").to(model.device)
    at = weight.sum(0).nonzero().flatten()
    real = [int((layout.visual.kind != PADDING).sum()) for layout in inputs.layouts]

    def read(call: AttentionCall, pattern: torch.Tensor) -> dict[str, torch.Tensor]:
        mean = mean_rows(pattern, weight[:, at])
        hit = torch.zeros(*mean.shape[:2], max(map(len, evidence)), device=mean.device)
        for row, tokens in enumerate(evidence):
            best = mean[row].topk(head_count(keys, real[row], "keys"), dim=-1).indices
            among = torch.zeros_like(mean[row]).scatter_(1, best, 1.0)
            hit[row, :, : len(tokens)] = among[:, torch.as_tensor(tokens, device=mean.device)]
        return {"hit": hit}

    return read_rows(model, inputs, at, read)["hit"].cpu().numpy()
