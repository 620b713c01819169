"""Attention sinks: which tokens they are, how much RAM falls on them, and how heads rank without them.

    found = attention_sinks(model, find)
    found["ram_on_sinks"].mean("example")                       # the part of each head's RAM that is on sinks
    rank_heads(found, "ram"), rank_heads(found, "ram_without")  # do they name the same heads?
    print(*sink_tokens(found), sep="\\n")                        # "first position: a sink in 100% of the examples ..."

A few tokens absorb attention that is not needed elsewhere: nearly always the first token, and in multimodal models also
some visual tokens of plain background. If the evidence contains such a token, a head can have a high RAM without
reading anything. There are two definitions, because they do not always agree:

* ``by="state"``: the token's residual stream, divided by its root mean square, reaches ``tau`` in some dimension
  (massive activations; arXiv 2503.03321 with tau = 20);
* ``by="attention"``: the question's attention to the token, averaged over the heads of the layer, exceeds ``share``
  (arXiv 2410.10781 counts heads by a threshold of 0.3).

``definition_for(model)`` names the first if the model can meet it. ``with_sinks`` marks sinks in attention maps so that
a view can show and hide them; ``without_sinks`` removes them.

It does not say whether sinks are needed; in many models they are. Removing a sink from a score is bookkeeping, removing
it from the model is an intervention (``mech.Knockout(key=...)``).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from mech.arguments import Count, Positive, Progress, Share, checked, given_by, one_of
from mech.axes import EXAMPLE, HEAD, LAYER
from mech.data.samples import Samples, SomeSamples
from mech.errors import ExperimentError
from mech.experiments.attention.rows import mean_rows, read_rows, row_weights
from mech.experiments.ranking.checks import refuse_without_evidence
from mech.experiments.scores.ram import evidence_batches
from mech.inputs import IMAGE, PADDING, VIDEO, Inputs, TokenLayout
from mech.model import AttentionCall, HookedMLLM
from mech.results import provenance
from mech.scale.measures import in_one_piece

BY = ("state", "attention")
TAU, SHARE = 20.0, 0.3  # thresholds of the two definitions
POS = "pos"
KINDS = ("first", "text", "visual", "evidence")  # kinds of sinks; the last that applies counts
DIMS = {
    "strength": (EXAMPLE, LAYER, POS),
    "sink": (EXAMPLE, LAYER, POS),
    "kind": (EXAMPLE, POS),
    "border": (EXAMPLE, POS),
}


@checked
@in_one_piece("sinks")
@torch.no_grad()
def attention_sinks(
    model: HookedMLLM,
    samples: SomeSamples,
    *,
    by: one_of(BY) = "state",
    tau: Positive = TAU,
    dims: Sequence[int] | None = None,
    share: Share = SHARE,
    batch_size: Count = 8,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Sinks of every layer, and RAM with and without the evidence tokens that are sinks.

    ``ram = ram_without + ram_on_sinks``; ``sink_mass`` is the question's attention to all sinks, wherever they are.

    Sign: the higher, the more attention is on sinks. Unit: attention mass, between 0 and 1.

    Args:
        model: a hooked model.
        samples: samples with evidence.
        by: ``"state"`` or ``"attention"``, see the module.
        tau: for ``"state"``: the smallest ``|x_d| / rms(x)`` of a sink. A stream of d dimensions cannot exceed
            ``sqrt(d)``, so small models have no sinks at 20.
        dims: for ``"state"``: the model's sink dimensions, if known; by default any dimension counts.
        share: for ``"attention"``: a sink gets more attention than this.
        batch_size: samples per forward.
        progress: called with (samples done, samples in total).

    Returns:
        ``ram``, ``ram_on_sinks``, ``ram_without``, ``sink_mass`` over (example, layer, head); ``strength`` (example,
        layer, pos), which is compared with the threshold, nan after a row's end; ``sink`` (the same dims);
        ``peak_dim`` (layer), the dimension in which most sinks of a layer peak, -1 if there are none or with
        ``by="attention"``; ``kind`` (example, pos): 0 for padding, else 1 + the index in ``KINDS``; ``border``
        (example, pos): whether it is a visual token on the border of its picture, tile or frame.

    Raises:
        ExperimentError: an unknown definition or sink dimension, no evidence, or pictures in a memory.

    Cost: one forward per sample, plus the question's rows.

    References: Kang et al. 2025, arXiv 2503.03321; Gu et al. 2024, arXiv 2410.10781; Sun et al. 2024, arXiv 2402.17762.
    """
    samples = Samples(samples)
    _check(model, samples, dims)
    parts: list[dict[str, np.ndarray]] = []
    peaks = np.zeros((len(model.cfg.attention_layers), model.cfg.d_model), dtype=int)
    for inputs, evidence, done in evidence_batches(model, samples, batch_size):
        strength, at = _strength(model, inputs, by, dims)
        sink = (strength >= tau) if by == "state" else (strength > share)
        real = torch.stack([torch.as_tensor(layout.kind != PADDING) for layout in inputs.layouts])
        sink &= real[:, None].to(sink.device)
        if at is not None:
            for layer, chosen in enumerate(sink.unbind(1)):
                peaks[layer] += np.bincount(at[:, layer][chosen].cpu().numpy(), minlength=model.cfg.d_model)
        parts += _of_rows(model, inputs, evidence, strength, sink)
        if progress:
            progress(done, len(samples))
    result = _dataset(model, samples, parts).assign(peak_dim=(LAYER, np.where(peaks.any(1), peaks.argmax(1), -1)))
    unit = "largest entry over root mean square" if by == "state" else "attention mass, mean over heads"
    result["strength"].attrs = {"unit": unit, "sign": "more: more of a sink"}
    return result.assign_attrs(
        kind="sinks", model=model.name, domain=", ".join(samples.domains), by=by,
        threshold=tau if by == "state" else share,
        provenance=provenance(model, samples, by=by, tau=tau, dims=list(dims or ()), share=share),
    )  # fmt: skip


def _of_rows(
    model: HookedMLLM, inputs: Inputs, evidence: Sequence[np.ndarray], strength: torch.Tensor, sink: torch.Tensor
) -> list[dict[str, np.ndarray]]:
    """The results of each row: attention masses, and values per position without the left padding."""
    masks = torch.zeros(len(inputs), len(inputs.layouts[0]))
    for row, tokens in enumerate(evidence):
        masks[row, torch.as_tensor(tokens)] = 1
    masses = _masses(model, inputs, sink, masks)
    rows = []
    for row, layout in enumerate(inputs.layouts):
        left = int((layout.kind != PADDING).argmax())
        own = {"strength": strength[row, :, left:].cpu().numpy().astype(float)}
        own["kind"] = _kinds(layout, evidence[row])[left:]
        own["border"] = _border(layout)[left:]
        own["sink"] = sink[row, :, left:].cpu().numpy()
        rows.append({name: mass[row] for name, mass in masses.items()} | own)
    return rows


def _dataset(model: HookedMLLM, samples: Samples, rows: Sequence[Mapping[str, np.ndarray]]) -> xr.Dataset:
    """The rows stacked, shorter ones padded."""
    length = max(len(row["kind"]) for row in rows)
    value = {name: np.stack([_padded(row[name], length) if name in DIMS else row[name] for row in rows])
             for name in rows[0]}  # fmt: skip
    value["ram_without"] = value["ram"] - value["ram_on_sinks"]
    result = xr.Dataset(
        {name: (DIMS.get(name, (EXAMPLE, LAYER, HEAD)), array) for name, array in value.items()},
        {
            EXAMPLE: samples.names,
            LAYER: list(model.cfg.attention_layers),
            HEAD: np.arange(model.cfg.n_heads),
            POS: np.arange(length),
        },
    )
    for name in ("ram", "ram_on_sinks", "ram_without", "sink_mass"):
        result[name].attrs = {"unit": "attention mass, 0 to 1", "sign": "more: the question attends more to them"}
    return result


@checked
def sink_tokens(result: given_by("attention_sinks", "sink", "kind", "strength")) -> list[str]:
    """Sentences that say which tokens are sinks in ``attention_sinks``, and how much RAM is on them.

    A token counts as a sink of an example if it is a sink in any layer.
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
    visual = kind >= 1 + KINDS.index("visual")
    if "border" in result and (sink & visual).any():
        border = result["border"].values.astype(bool)
        sinks, tokens = border[sink & visual].mean(), border[visual].mean()
        lines.append(
            f"{sinks:.0%} of visual sinks lie on the border of their picture, {tokens:.0%} of visual tokens do."
        )
    ram, on = float(result["ram"].mean()), float(result["ram_on_sinks"].mean())
    return [*lines, f"{on / ram if ram else 0.0:.0%} of all RAM sits on sinks (by {by})."]


def definition_for(model: HookedMLLM, tau: float = TAU) -> str:
    """The definition that can find sinks in this model: "state", or "attention" if the stream is too narrow."""
    return "state" if model.cfg.d_model > tau**2 else "attention"


@checked
def without_sinks(
    maps: given_by("attention_maps", "attention", "rect", "token_image"), model: HookedMLLM, samples: SomeSamples,
    found: given_by("attention_sinks", "sink", "kind", "strength"),
) -> xr.Dataset:  # fmt: skip
    """Attention maps with the attention to sinks set to 0, which show where else a head attends.

    Maps often highlight empty tokens on the border of a picture; these are sinks. This changes only the maps, not the
    model. The attribute ``sinks`` records it.

    Args:
        maps: the result of ``attention_maps``.
        model: the model of both results.
        samples: the samples of the maps, in the same order.
        found: the result of ``attention_sinks`` on these samples.

    Raises:
        ExperimentError: maps or sinks of other samples.

    Cost: none; inputs are rebuilt for their layouts.
    """
    sinks = _drawn_sinks(maps, model, samples, found)
    drawn = maps.copy()
    values = np.where(sinks, 0.0, maps["attention"].values)
    drawn["attention"] = (maps["attention"].dims, values, maps["attention"].attrs)
    return drawn.assign_attrs(sinks="left out")


@checked
def with_sinks(
    maps: given_by("attention_maps", "attention", "rect", "token_image"), model: HookedMLLM, samples: SomeSamples,
    found: given_by("attention_sinks", "sink", "kind", "strength"),
) -> xr.Dataset:  # fmt: skip
    """Attention maps that mark the sinks of each head's layer, so that a view can show and hide them.

    Args:
        maps: the result of ``attention_maps``.
        model: the model of both results.
        samples: the samples of the maps, in the same order.
        found: the result of ``attention_sinks`` on these samples.

    Returns:
        The maps with ``sink`` over (example, shown, token), 1 for a sink; ``attrs["sinks"]`` names the definition.

    Raises:
        ExperimentError: maps or sinks of other samples.

    Cost: none; inputs are rebuilt for their layouts.
    """
    by = f"by {found.attrs['by']}, threshold {found.attrs['threshold']:g}"
    sinks = _drawn_sinks(maps, model, samples, found).astype(np.int8)
    return maps.assign(sink=(maps["attention"].dims, sinks)).assign_attrs(sinks=by)


def _drawn_sinks(
    maps: xr.Dataset, model: HookedMLLM, samples: SomeSamples, found: xr.Dataset
) -> Bool[np.ndarray, "example shown token"]:
    """Which tokens of the maps are sinks in the layer of the head shown."""
    samples = Samples(samples)
    if not len(samples) == maps.sizes[EXAMPLE] == found.sizes[EXAMPLE]:
        raise ExperimentError(
            f"{maps.sizes[EXAMPLE]} maps, sinks of {found.sizes[EXAMPLE]} examples and {len(samples)} samples",
            "the same samples in all three", "measure attention_sinks on the samples of the maps",
        )  # fmt: skip
    layers, sinks = found[LAYER].values.tolist(), np.zeros(maps["attention"].shape, dtype=bool)
    for row, sample in enumerate(samples):
        tokens = model.inputs_of(sample).layout.positions("image")
        for shown, layer in enumerate(maps["shown_layer"].values.tolist()):
            sinks[row, shown, : len(tokens)] = found["sink"].values[row, layers.index(layer), tokens]
    return sinks


def _check(model: HookedMLLM, samples: Samples, dims: Sequence[int] | None) -> None:
    width = model.cfg.d_model
    if dims is not None and (not len(dims) or not all(0 <= d < width for d in dims)):
        raise ExperimentError(f"dims={list(dims)}", f"dimensions from 0 to {width - 1}", "leave dims out")
    refuse_without_evidence(samples)
    if model.cfg.cross_layers:
        raise ExperimentError(
            f"sinks of {model.name}, whose visual tokens are in a memory", "visual tokens in the sequence", ""
        )


def _strength(
    model: HookedMLLM, inputs: Inputs, by: str, dims: Sequence[int] | None
) -> tuple[Float[Tensor, "batch layer pos"], Tensor | None]:
    """The sink strength of each position in each layer; with ``by="state"`` also the dimension of the peak."""
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
        strength, indices = state_strength(stream, among)
        seen.append(strength.to(model.device))
        indices = indices.to(model.device)
        peaks.append(indices if among is None else among[indices])

    with model.hooks([(f"blocks.{layer}.hook_resid_pre", note) for layer in model.cfg.attention_layers]):
        model(inputs, logits_to_keep=1)
    return torch.stack(seen, dim=1), torch.stack(peaks, dim=1)


def state_strength(
    stream: Float[Tensor, "*pos d_model"], dims: Tensor | None = None
) -> tuple[Float[Tensor, "*pos"], Tensor]:
    """``max over d of |x_d| / rms(x)`` at each position, and the index of that d in ``dims`` (all d if None)."""
    wide = stream.float()
    size = wide.abs() / wide.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
    best = (size if dims is None else size[..., dims.to(size.device)]).max(-1)
    return best.values, best.indices


def _masses(
    model: HookedMLLM, inputs: Inputs, sink: Bool[Tensor, "batch layer pos"], evidence: Float[Tensor, "batch pos"]
) -> dict[str, np.ndarray]:
    """Every head's RAM, the part of it on sinks, and its mass on all sinks."""
    weight = row_weights(inputs, "question").to(model.device)
    at, index_of = weight.sum(0).nonzero().flatten(), {layer: i for i, layer in enumerate(model.cfg.attention_layers)}
    evidence = evidence.to(model.device)

    def read(call: AttentionCall, pattern: Tensor) -> dict[str, Tensor]:
        mean, sinks = mean_rows(pattern, weight[:, at]), sink[:, index_of[call.layer]].to(pattern)
        wanted = torch.stack([evidence.to(pattern), sinks * evidence.to(pattern), sinks])  # [3 batch pos]
        return {"mass": torch.einsum("bhk,sbk->bsh", mean, wanted)}

    mass = read_rows(model, inputs, at, read)["mass"].cpu().numpy()  # [batch layer 3 head]
    return dict(zip(("ram", "ram_on_sinks", "sink_mass"), np.moveaxis(mass, 2, 0), strict=True))


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    """Values over positions, padded at the end with nan, no sink, or kind 0."""
    fill = np.nan if values.dtype.kind == "f" else 0
    return np.pad(values, [*[(0, 0)] * (values.ndim - 1), (0, length - values.shape[-1])], constant_values=fill)


def _kinds(layout: TokenLayout, evidence: np.ndarray) -> np.ndarray:
    kind = np.where((layout.kind == IMAGE) | (layout.kind == VIDEO), 3, 2)
    kind[evidence], kind[int((layout.kind != PADDING).argmax())] = 4, 1
    return kind


def _border(layout: TokenLayout) -> Bool[np.ndarray, " pos"]:
    """Visual tokens in the first or last row or column of their picture, tile or frame."""
    visual = (layout.kind == IMAGE) | (layout.kind == VIDEO)
    border, owners = np.zeros(len(layout), dtype=bool), np.stack([layout.image, layout.frame, layout.view])
    for owner in np.unique(owners[:, visual], axis=1).T:
        at = np.flatnonzero(visual & (owners == owner[:, None]).all(0))
        for place in (layout.row[at], layout.col[at]):
            border[at] |= (place == place.min()) | (place == place.max())
    return border
