"""Where every head attends: Retrieval Attention Mass.

A head *retrieves* when the tokens of the question attend to the visual tokens that hold the answer. Retrieval Attention
Mass measures exactly this for every head of every layer, from one ordinary forward pass per sample: the fused kernel
computes the forward, and only the question's rows of the attention matrix are recomputed. The ``S x S`` attention of a
head is never formed.

Other scores from the literature, and controls, are variants of the same measurement: see ``mech.head_scores``. RAM does
not say whether a head matters; for that see ``mech.experiments.ablation.ablation``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int

from mech.arguments import Count, Progress, checked
from mech.axes import EXAMPLE, HEAD, LAYER
from mech.data.samples import Samples, SomeSamples
from mech.experiments.attention.rows import in_batches, mean_rows, read_rows, row_weights
from mech.experiments.ranking.checks import refuse_without_evidence
from mech.inputs import Inputs
from mech.model import AttentionCall, HookedMLLM
from mech.results import provenance, ram_dataset
from mech.scale.measures import per_sample


@checked
def retrieval_attention_mass(
    model: HookedMLLM,
    samples: SomeSamples,
    *,
    queries: str = "question",
    batch_size: Count = 8,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Retrieval Attention Mass of every text head, sample by sample.

    ``RAM = mean over x in queries of ( sum over y in evidence of A[x, y] )``, where ``A`` is the head's attention after
    the softmax, with the layer's own mask.

    Sign: the higher, the more the question attends to the evidence. Unit: attention mass, between 0 and 1.

    Args:
        samples: samples with evidence; a visual token counts as evidence if it overlaps the region at all.
        queries: which rows are read: ``"question"`` (the published definition), ``"last"``, ``"text"``.
        batch_size: samples per forward.
        progress: called with (samples done, samples in total).

    Returns:
        ``ram`` and ``vision_mass`` (the same sum over *all* visual tokens) with dims example, layer, head;
        ``size_null`` (the score of a head that attends evenly: the mean over query rows of evidence keys over visible
        keys) and ``n_evidence`` (tokens) with dim example.

    Raises:
        ExperimentError: a sample without evidence.
        RegionError: evidence that lies outside its image or covers no token.

    Cost: one forward per sample, plus the query rows of the attention: O(|queries| x S) per head.

    References: arXiv 2606.05843, Eq. 1.
    """
    samples = Samples(samples)
    refuse_without_evidence(samples)
    values = per_sample_masses(model, samples, queries=queries, batch_size=batch_size, progress=progress)
    return ram_dataset(
        **{str(name): value.values for name, value in values.data_vars.items()},
        layers=model.cfg.attention_layers,
        examples=samples.names,
        model=model.name,
        domain=", ".join(samples.domains),
        queries=queries,
        provenance=provenance(model, samples, queries=queries),
    )


@per_sample("attention")
def per_sample_masses(
    model: HookedMLLM, samples: Samples, *, queries: str, batch_size: int = 8, progress: Progress | None = None
) -> xr.Dataset:
    """The numbers of ``retrieval_attention_mass``, without what depends on all samples together."""
    parts: dict[str, list[np.ndarray]] = {"ram": [], "vision_mass": [], "size_null": [], "n_evidence": []}
    for inputs, keys, done in evidence_batches(model, samples, batch_size):
        masses, sizes = evidence_mass(model, inputs, keys, queries)
        parts["ram"].append(masses[:, 0].cpu().numpy())
        parts["vision_mass"].append(masses[:, 1].cpu().numpy())
        parts["size_null"].append(sizes.cpu().numpy())
        parts["n_evidence"].append(np.array([len(k) for k in keys]))
        if progress:
            progress(done, len(samples))
    dims = {"ram": (EXAMPLE, LAYER, HEAD), "vision_mass": (EXAMPLE, LAYER, HEAD)}
    joined = {name: (dims.get(name, (EXAMPLE,)), np.concatenate(values)) for name, values in parts.items()}
    return xr.Dataset(joined, {EXAMPLE: list(samples.names)})


def evidence_batches(
    model: HookedMLLM, samples: Samples, batch_size: int
) -> Iterator[tuple[Inputs, list[Int[np.ndarray, " key"]], int]]:
    """The samples in batches, with the evidence keys of each row and the number of samples done after the batch.

    All evidence is looked up before the first batch; pixels stay on the CPU until their batch.
    """
    prepared = [model.inputs_of(sample).to("cpu") for sample in samples]
    evidence = [row.layout.visual.positions(sample.evidence) for row, sample in zip(prepared, samples, strict=True)]
    for batch, rows in in_batches(prepared, batch_size):
        inputs = model.collate(batch)
        # Left padding moves the sequence; a memory of visual tokens is not moved.
        shift = [len(a.visual) - len(b.layout.visual) for a, b in zip(inputs.layouts, batch, strict=True)]
        yield inputs, [evidence[row] + left for row, left in zip(rows, shift, strict=True)], rows[-1] + 1


@torch.no_grad()
def evidence_mass(
    model: HookedMLLM, inputs: Inputs, keys: Sequence[np.ndarray], queries: str = "question"
) -> tuple[Float[torch.Tensor, "batch 2 layer head"], Float[torch.Tensor, " batch"]]:
    """One batch of ``retrieval_attention_mass``: the mass on ``keys[row]`` and on all visual tokens; the size null.

    Use it for evidence given as positions, or for inputs that were not made from samples. Layers are
    ``cfg.attention_layers``. If visual tokens are in a memory that only some layers attend to, ``keys`` are positions
    in the memory, and the other layers score 0 because they cannot reach visual tokens. Cost: as there.
    """
    weight = row_weights(inputs, queries).to(model.device)
    rows = weight.sum(0).nonzero().flatten()
    target = torch.zeros(len(inputs), 2, len(inputs.layouts[0].visual), device=model.device)
    for row, (positions, layout) in enumerate(zip(keys, inputs.layouts, strict=True)):
        target[row, 0, torch.as_tensor(positions)] = 1
        target[row, 1, torch.as_tensor(layout.visual.pictured)] = 1
    sizes: list[torch.Tensor] = []

    def read(call: AttentionCall, pattern: torch.Tensor) -> dict[str, torch.Tensor]:
        if not sizes:
            visible = replace(call, head_mask=None).visible(rows)[:, 0].to(target)
            share = torch.einsum("brk,bk->br", visible, target[:, 0]) / visible.sum(-1).clamp(min=1)
            sizes.append((share * weight[:, rows]).sum(-1))
        mean = mean_rows(pattern, weight[:, rows])
        return {"mass": torch.einsum("bhk,bsk->bhs", mean, target.to(mean))}

    return read_rows(model, inputs, rows, read)["mass"].permute(0, 3, 1, 2), sizes[0]
