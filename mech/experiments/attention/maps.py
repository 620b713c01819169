"""The attention of every head to every key, and maps of a few heads over the pictures of a few samples.

    found = attention_maps(model, samples[:3], ranking)           # the first four heads and the last four
    mech.view(found, on=samples[:3])                     # drawn over the pictures, side by side
    attention_maps(model, samples[:1], ranking, bands={"circuit": circuit.heads})
    known = [mech.deciding_queries(model, sample, ranking.top(4)) for sample in samples[:3]]
    attention_maps(model, samples[:3], ranking, bands={"top": ranking.top(4)}, deciding=known)

The maps show the same numbers as RAM: attention after the softmax, averaged over the question's tokens; or that of one
token, the query at which a head decides the answer. Nothing is averaged over samples; for that see
``retrieval_attention_mass``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int

from mech.arguments import NOT_EMPTY, Count, checked
from mech.data.pictures import pixel_digest
from mech.data.samples import Sample, SomeSamples, outlines, pictures_of
from mech.errors import ExperimentError
from mech.experiments.attention.rows import mean_rows, read_rows, row_weights
from mech.experiments.ranking.checks import other_model_attrs, refuse_other_model
from mech.experiments.ranking.ranking import Head, Ranking
from mech.inputs import Inputs
from mech.model import HookedMLLM
from mech.results import ShownHead, maps_dataset


@checked
@torch.no_grad()
def attention_from(
    model: HookedMLLM, inputs: Inputs, queries: str = "question"
) -> Float[torch.Tensor, "batch layer head key_pos"]:
    """The attention of every text head, averaged over the query rows; layers are those of ``cfg.attention_layers``.

    If visual tokens are in a memory (``cfg.cross_layers``), keys are the memory's, and attention is zero in other
    layers.

    Cost: one forward and the query rows; memory ``layers x heads x S`` per row of the batch.
    """
    weight = row_weights(inputs, queries).to(model.device)
    rows = weight.sum(0).nonzero().flatten()
    means = read_rows(model, inputs, rows, lambda call, pattern: {"mean": mean_rows(pattern, weight[:, rows])})
    return means["mean"]


@checked
def attention_maps(
    model: HookedMLLM,
    samples: SomeSamples,
    ranking: Ranking,
    *,
    k: Count = 4,
    bands: Annotated[Mapping[str, Sequence[tuple[int, int]]], NOT_EMPTY] | None = None,
    queries: str = "question",
    deciding: Sequence[Sequence[tuple[int, float] | None]] | None = None,
    allow_other_model: bool = False,
) -> xr.Dataset:
    """The attention of some heads to every visual token of some samples.

    ``attention[head, y] = mean over x in queries of A[x, y]``.

    Sign: higher means that the question attends more to this token. Unit: attention mass, between 0 and 1.

    Args:
        model: a hooked model.
        samples: a few samples, whose pictures are drawn.
        ranking: gives the heads and their mean RAM.
        k: how many heads from the top and from the bottom of the ranking.
        bands: other heads to show instead, by name.
        queries: which rows attend, as in ``retrieval_attention_mass``.
        deciding: for each sample and head the row to draw instead, as found by ``deciding_queries``, or None.
        allow_other_model: accept a ranking made on another model of the same shape; the attribute ``other_model``
            records it.

    Returns:
        A dataset of kind "maps" (``mech.results.maps_dataset``): ``attention`` over (example, shown, token), the
        rectangle of each token, and for each example the question, answer, prediction, evidence and each head's query.

    Raises:
        ExperimentError: no samples or heads, heads that are not in the ranking, or a ranking of another model.

    Cost: one forward and one short generation for each sample.
    """
    named = {"top": ranking.top(k), "bottom": ranking.bottom(k)} if bands is None else bands
    heads = _heads_of(named, ranking)
    other = refuse_other_model(ranking, model, allow_other_model)
    known = [[None] * len(heads)] * len(samples) if deciding is None else [list(values) for values in deciding]
    if [len(values) for values in known] != [len(heads)] * len(samples):
        raise ExperimentError(
            f"deciding queries of {[len(values) for values in known]} heads",
            f"{len(heads)} for each of {len(samples)} samples",
        )
    maps = [_map(model, sample, heads, queries, own) for sample, own in zip(samples, known, strict=True)]
    facts = [_facts(i, sample, drawn) for i, (sample, drawn) in enumerate(zip(samples, maps, strict=True))]
    width = max(len(drawn.rect) for drawn in maps)
    return maps_dataset(
        np.stack([_padded(drawn.attention, width, 0.0, axis=1) for drawn in maps]),
        np.stack([_padded(drawn.rect, width, np.nan, axis=0) for drawn in maps]),
        np.stack([_padded(drawn.owner, width, -1, axis=0) for drawn in maps]),
        facts,
        [
            ShownHead(layer, head, name, float(ranking.mean[ranking.layers.index(layer), head]))
            for name, band in named.items()
            for layer, head in band
        ],
        model=model.name,
    ).assign_attrs(other_model_attrs([other]))


def _heads_of(bands: Mapping[str, Sequence[tuple[int, int]]], ranking: Ranking) -> list[Head]:
    """The heads of all bands.

    Raises:
        ExperimentError: no heads, or one that is not in the ranking.
    """
    heads, known = [Head(*head) for band in bands.values() for head in band], set(ranking.heads)
    if not heads:
        raise ExperimentError("bands without heads", "at least one head", "pass ranking.top(4)")
    if strange := [head for head in heads if head not in known]:
        raise ExperimentError(f"there is no head {strange[0]}", "heads of the ranking", "see ranking.heads")
    return heads


def _facts(index: int, sample: Sample, drawn: "_Map") -> dict[str, Any]:
    """What is recorded of one sample besides its maps."""
    shown = pictures_of(sample, drawn.frames_per_token)
    return {
        "question": sample.question,
        "answer": sample.answer,
        "prediction": drawn.prediction,
        "pictures": [f"map{index}_{n}.png" for n in range(len(shown))],
        "digests": [pixel_digest(picture.convert("RGB")) for picture in shown],
        "evidence": outlines(sample, drawn.frames_per_token),
        "queries": drawn.queries,
    }


@dataclass(frozen=True, eq=False)
class _Map:
    """One sample: what each head attends to, the pixels of each visual token, and what the model answers."""

    attention: Float[np.ndarray, "shown token"]
    rect: Float[np.ndarray, "token 4"]
    owner: Int[np.ndarray, " token"]  # the picture, or first frame, that a token belongs to
    queries: list[str]
    prediction: str
    frames_per_token: int


def _map(
    model: HookedMLLM,
    sample: Sample,
    heads: Sequence[Head],
    queries: str,
    deciding: Sequence[tuple[int, float] | None],
) -> _Map:
    inputs = model.inputs_of(sample)
    layout, tokens = inputs.layout.visual, inputs.layout.visual.positions("image")
    attention, asked = _attention(model, inputs, heads, queries, deciding)
    owner = layout.frame // layout.frames_per_token if sample.video else layout.image
    said = model.generate_text(inputs, max_new_tokens=max(4, 2 * len(sample.answer)))[0]
    return _Map(attention[:, tokens], layout.rect[tokens], owner[tokens], asked, said, layout.frames_per_token)


def _attention(
    model: HookedMLLM,
    inputs: Inputs,
    heads: Sequence[Head],
    queries: str,
    deciding: Sequence[tuple[int, float] | None],
) -> tuple[Float[np.ndarray, "head key_pos"], list[str]]:
    """The attention of each head, and the query it comes from."""
    layers, asked = list(model.cfg.attention_layers), list(map(int, inputs.layout.positions(queries)))
    rows = sorted({*asked, *(at[0] for at in deciding if at is not None)})
    patterns = read_rows(
        model, inputs, torch.tensor(rows, device=model.device), lambda call, pattern: {"rows": pattern}
    )
    pattern = patterns["rows"][0].cpu().numpy()
    mean = pattern[:, :, [rows.index(at) for at in asked]].mean(2)
    drawn, names = [], []
    for (layer, head), at in zip(heads, deciding, strict=True):
        i = layers.index(layer)
        drawn.append(mean[i, head] if at is None else pattern[i, head, rows.index(at[0])])
        names.append(queries if at is None else f"{inputs.layout.tokens[at[0]]!r}: {at[1]:.0%}")
    return np.stack(drawn), names


def _padded(values: np.ndarray, width: int, fill: float, axis: int) -> np.ndarray:
    room = [(0, 0)] * values.ndim
    room[axis] = (0, width - values.shape[axis])
    return np.pad(values, room, constant_values=fill)
