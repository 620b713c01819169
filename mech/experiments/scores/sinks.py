"""Attention sinks: which tokens they are, how much of RAM sits on them, and what the ranking is without them.

    found = attention_sinks(model, find)
    found["ram_on_sinks"].mean("example")                       # of every head: the part of its RAM that is on sinks
    rank_heads(found, "ram"), rank_heads(found, "ram_without")  # do they name the same heads?
    print(*sink_tokens(found), sep="\\n")                        # "first position: a sink in 100% of the examples ..."

A few tokens take attention that nobody needs elsewhere: the first one nearly always, in multimodal models some visual
tokens of plain background as well. A head whose evidence holds such a token has a high RAM without reading anything.
Two definitions are offered, because they do not always agree:

* ``by="state"``: the token's residual stream, divided by its root mean square, reaches ``tau`` in some dimension
  (massive activations; arXiv 2503.03321 with tau = 20);
* ``by="attention"``: the question's attention on the token, averaged over the heads of the layer, exceeds ``share``
  (arXiv 2410.10781 counts heads by a threshold of 0.3).

What it does not say: whether sinks are needed. They are, for many models: removing one from a score is bookkeeping,
and removing it from the model an intervention (``mech.Knockout(key=...)``).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from mech.arguments import Count, Positive, Share, checked, given_by, one_of
from mech.axes import EXAMPLE, HEAD, LAYER
from mech.data.samples import Samples, SomeSamples
from mech.errors import ExperimentError
from mech.experiments.attention.rows import in_batches, mean_rows, read_rows, row_weights
from mech.experiments.scores.ram import Progress
from mech.inputs import IMAGE, PADDING, VIDEO, Inputs, TokenLayout
from mech.model import AttentionCall, HookedMLLM
from mech.results import provenance

BY = ("state", "attention")
POS = "pos"
KINDS = ("first", "text", "visual", "evidence")  # of a sink, the last that holds


@checked
@torch.no_grad()
def attention_sinks(
    model: HookedMLLM,
    samples: SomeSamples,
    *,
    by: one_of(BY) = "state",
    tau: Positive = 20.0,
    dims: Sequence[int] | None = None,
    share: Share = 0.3,
    batch_size: Count = 8,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Sinks of every layer, and RAM with and without the evidence tokens that are sinks.

    ``ram = ram_without + ram_on_sinks``; ``sink_mass`` is the question's attention on all sinks, wherever they are.

    Sign: the higher, the more sits on sinks. Unit: attention mass, between 0 and 1.

    Args:
        model: a hooked model.
        samples: with evidence.
        by: ``"state"`` or ``"attention"``, see the module.
        tau: of ``"state"``: the least ``|x_d| / rms(x)``. A stream of d dimensions cannot exceed ``sqrt(d)``: small
            models have no sinks at 20.
        dims: of ``"state"``: the sink dimensions of the model, where they are known; any dimension counts without.
        share: of ``"attention"``: attention a sink takes more than.
        batch_size: samples per forward.
        progress: called with (samples done, samples in all).

    Returns:
        ``ram``, ``ram_on_sinks``, ``ram_without``, ``sink_mass`` over (example, layer, head); ``strength`` (example,
        layer, pos), what is compared with the threshold, nan behind a row's end; ``sink`` (the same dims); ``peak_dim``
        (layer), the dimension in which most sinks of a layer peak, -1 where there are none or by attention; ``kind``
        (example, pos): 0 padding, else 1 + the place in ``KINDS``.

    Raises:
        ExperimentError: an unknown definition, a threshold that nothing can reach, no evidence, pictures in a memory.

    Cost: one forward per sample, and the question's rows.

    References: Kang et al. 2025, arXiv 2503.03321; Gu et al. 2024, arXiv 2410.10781; Sun et al. 2024, arXiv 2402.17762.
    """
    samples = Samples(samples)
    _check(model, samples, dims)
    rows = [model.inputs_of(sample).to("cpu") for sample in samples]
    evidence = [row.layout.positions(sample.evidence) for row, sample in zip(rows, samples, strict=True)]
    length = max(len(row.layout) for row in rows)
    parts: list[dict[str, np.ndarray]] = []
    peaks = np.zeros((len(model.cfg.attention_layers), model.cfg.d_model), dtype=int)
    for batch, indices in in_batches(rows, batch_size):
        inputs = model.collate(batch)
        strength, at = _strength(model, inputs, by, dims)
        sink = (strength >= tau) if by == "state" else (strength > share)
        real = torch.stack([torch.as_tensor(layout.kind != PADDING) for layout in inputs.layouts])
        sink &= real[:, None].to(sink.device)
        if at is not None:
            for layer, chosen in enumerate(sink.unbind(1)):
                peaks[layer] += np.bincount(at[:, layer][chosen].cpu().numpy(), minlength=model.cfg.d_model)
        shift = [len(inputs.layouts[0]) - len(row.layout) for row in batch]
        masks = torch.zeros(len(batch), len(inputs.layouts[0]))
        for row, (index, left) in enumerate(zip(indices, shift, strict=True)):
            masks[row, torch.as_tensor(evidence[index] + left)] = 1
        masses = _masses(model, inputs, sink, masks)
        masses |= {"strength": _aligned(strength, shift, length), "sink": _aligned(sink.float(), shift, length) == 1}
        parts.append(masses)
        if progress:
            progress(indices[-1] + 1, len(samples))
    value = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    value["ram_without"] = value["ram"] - value["ram_on_sinks"]
    kind = np.stack([_kinds(row.layout, own, length) for row, own in zip(rows, evidence, strict=True)])
    heads, places = (EXAMPLE, LAYER, HEAD), (EXAMPLE, LAYER, POS)
    result = xr.Dataset(
        {name: (places if name in ("strength", "sink") else heads, array) for name, array in value.items()}
        | {"peak_dim": (LAYER, np.where(peaks.any(1), peaks.argmax(1), -1)), "kind": ((EXAMPLE, POS), kind)},
        {
            EXAMPLE: [sample.id or str(i) for i, sample in enumerate(samples)],
            LAYER: list(model.cfg.attention_layers),
            HEAD: np.arange(model.cfg.n_heads),
            POS: np.arange(length),
        },
        {
            "kind": "sinks",
            "model": model.name,
            "domain": ", ".join(samples.domains),
            "by": by,
            "threshold": tau if by == "state" else share,
            "provenance": provenance(model, samples, by=by, tau=tau, dims=list(dims or ()), share=share),
        },
    )
    for name in ("ram", "ram_on_sinks", "ram_without", "sink_mass"):
        result[name].attrs = {"unit": "attention mass, 0 to 1", "sign": "more: the question attends more to them"}
    unit = "largest entry over root mean square" if by == "state" else "attention mass, mean over heads"
    result["strength"].attrs = {"unit": unit, "sign": "more: more of a sink"}
    return result


@checked
def sink_tokens(result: given_by("attention_sinks", "sink", "kind", "strength")) -> list[str]:
    """Which tokens the sinks of ``attention_sinks`` are, and how much RAM is on them, in sentences.

    A token counts as a sink of an example if it is one in any layer.
    """
    sink, kind = result["sink"].values.any(axis=1), result["kind"].values
    names = {"first": "The first position", "text": "Another text token", "visual": "A visual token without evidence",
             "evidence": "A visual token of the evidence"}  # fmt: skip
    by, threshold, strongest = result.attrs["by"], result.attrs["threshold"], float(result["strength"].max())
    if not sink.any():
        return [f"No token is a sink (by {by}): the strongest reaches {strongest:.2g}, the threshold is {threshold:g}."]
    lines = []
    for index, name in enumerate(KINDS, start=1):
        here = sink & (kind == index)
        if here.any():
            share, count = here.any(1).mean(), here.sum(1).mean()
            lines.append(f"{names[name]} is a sink in {share:.0%} of the examples ({count:.1f} an example).")
    ram, on = float(result["ram"].mean()), float(result["ram_on_sinks"].mean())
    return [*lines, f"{on / ram if ram else 0.0:.0%} of all RAM sits on sinks (by {by})."]


def _check(model: HookedMLLM, samples: Samples, dims: Sequence[int] | None) -> None:
    width = model.cfg.d_model
    if dims is not None and (not len(dims) or not all(0 <= d < width for d in dims)):
        raise ExperimentError(f"dims={list(dims)}", f"dimensions from 0 to {width - 1}", "leave dims out")
    lacking = [sample.id or str(i) for i, sample in enumerate(samples) if not sample.evidence]
    if lacking:
        what = f"{len(lacking)} samples have no evidence, the first is {lacking[0]!r}"
        raise ExperimentError(what, "samples that say where the evidence is", "set Sample(evidence=(mech.Box(...),))")
    if model.cfg.cross_layers:
        raise ExperimentError(
            f"sinks of {model.name}, whose visual tokens are in a memory", "visual tokens in the sequence", ""
        )


def _strength(
    model: HookedMLLM, inputs: Inputs, by: str, dims: Sequence[int] | None
) -> tuple[Float[Tensor, "batch layer pos"], Tensor | None]:
    """How much of a sink each position is for each layer; by state also in which dimension."""
    if by == "attention":
        weight = row_weights(inputs, "question").to(model.device)
        at = weight.sum(0).nonzero().flatten()

        def read(call: AttentionCall, pattern: Tensor) -> dict[str, Tensor]:
            return {"mean": mean_rows(pattern, weight[:, at]).mean(1)}

        return read_rows(model, inputs, at, read)["mean"], None
    seen: list[Tensor] = []
    peaks: list[Tensor] = []
    among = None if dims is None else torch.as_tensor(list(dims), device=model.device)

    def note(stream: Tensor, hook: Any) -> None:
        wide = stream.float()
        size = wide.abs() / wide.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
        best = (size if among is None else size[..., among]).max(-1)
        seen.append(best.values)
        peaks.append(best.indices if among is None else among[best.indices])

    with model.hooks([(f"blocks.{layer}.hook_resid_pre", note) for layer in model.cfg.attention_layers]):
        model(inputs, logits_to_keep=1)
    return torch.stack(seen, dim=1), torch.stack(peaks, dim=1)


def _masses(
    model: HookedMLLM, inputs: Inputs, sink: Bool[Tensor, "batch layer pos"], evidence: Float[Tensor, "batch pos"]
) -> dict[str, np.ndarray]:
    """RAM, its part on sinks, and the mass on all sinks, of every head."""
    weight = row_weights(inputs, "question").to(model.device)
    at, index_of = weight.sum(0).nonzero().flatten(), {layer: i for i, layer in enumerate(model.cfg.attention_layers)}
    evidence = evidence.to(model.device)

    def read(call: AttentionCall, pattern: Tensor) -> dict[str, Tensor]:
        mean, sinks = mean_rows(pattern, weight[:, at]), sink[:, index_of[call.layer]].to(pattern)
        wanted = torch.stack([evidence.to(pattern), sinks * evidence.to(pattern), sinks])  # [3 batch pos]
        return {"mass": torch.einsum("bhk,sbk->bsh", mean, wanted)}

    mass = read_rows(model, inputs, at, read)["mass"].cpu().numpy()  # [batch layer 3 head]
    return dict(zip(("ram", "ram_on_sinks", "sink_mass"), np.moveaxis(mass, 2, 0), strict=True))


def _aligned(value: Float[Tensor, "batch layer pos"], shift: Sequence[int], length: int) -> np.ndarray:
    """The rows of a padded batch from their own first position on; nan behind their end."""
    out = np.full((len(value), value.shape[1], length), np.nan)
    for row, left in enumerate(shift):
        own = value[row, :, left:].cpu().numpy()
        out[row, :, : own.shape[1]] = own
    return out


def _kinds(layout: TokenLayout, evidence: np.ndarray, length: int) -> np.ndarray:
    kind = np.zeros(length, dtype=int)
    kind[: len(layout)] = 2
    kind[: len(layout)][(layout.kind == IMAGE) | (layout.kind == VIDEO)] = 3
    kind[evidence], kind[0] = 4, 1
    return kind
