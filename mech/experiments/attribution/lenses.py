"""Reading activations as words: the logit lens at any position, and what each head writes for what it attends to.

    lens = logit_lens(model, sample, track=sample.answer)        # image tokens, layer by layer, as words
    lens["tracked_rank"].sel(layer=4, tracked="7")               # where in the picture can the answer be read?
    words = ov_reading(model, ranking.top(3), sample)            # what L3H4 writes where it attends to this token
    ov_reading(model, [(3, 4)], ["red", "seven"])["own_rank"]    # does the head copy? 0: its own token comes first

The logit lens sends the stream of any layer through the final norm and the unembedding, as if the model ended there; in
the last layer and at a text position it is the model's own prediction. The OV circuit of a head is ``W_V W_O``: what it
adds to the stream *if* it attends to a token. How much it attends is another question (``mech.attention_from``).

They do not show that later layers read the stream in the basis of the unembedding. Early layers often do not, and
visual tokens need not stand for words at all; a rank near the top is evidence, a rank far from it is not.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from mech.arguments import Count, checked
from mech.axes import EXAMPLE, LAYER
from mech.data.samples import Sample, Samples
from mech.errors import ExperimentError
from mech.experiments.attribution.logits import Given, carried_on, check_direct, head_maps, softcap
from mech.indices import Layers, Pairs, indices
from mech.inputs import Inputs
from mech.inputs.layout import Where
from mech.interventions.specs import check_heads
from mech.model import AttentionCall, HookedMLLM
from mech.model.named.norms import frozen_norm
from mech.results import provenance

POSITION, PLACE, TRACKED, SENDER = "position", "place", "tracked", "sender"
_ROWS = 256  # positions that are unembedded at once


@checked
@torch.no_grad()
def logit_lens(
    model: HookedMLLM,
    inputs: Given,
    positions: Where = "image",
    *,
    layers: Layers | None = None,
    track: str | int | Sequence[str | int] = (),
    k: Count = 5,
) -> xr.Dataset:
    """The residual stream at some positions as words, layer by layer.

    ``p = softmax(W_U N(x_l))`` with ``N`` the final norm, its scale taken from ``x_l`` itself.

    Unit: probability; rank, 0 is the likeliest.

    Args:
        model: a hooked model.
        inputs: a sample, inputs of one row, or several of them with the same positions.
        positions: as ``TokenLayout.positions`` takes them; visual tokens by default.
        layers: the stream that *enters* each of them; ``n_layers`` is what leaves the last. All by default.
        track: tokens (strings of one token, or ids) whose rank and probability are reported everywhere.
        k: how many of the likeliest words to keep.

    Returns:
        ``word`` and ``probability`` (example, layer, position, place); with ``track`` also ``tracked_rank`` and
        ``tracked_probability`` (example, layer, position, tracked). Visual tokens have ``row``, ``col`` and ``image``
        next to their position.

    Raises:
        ExperimentError: layers the model does not have, a k out of range, positions that differ.
        InputError: a tracked string of several tokens, an id that is not in the vocabulary.
        RegionError: positions that do not exist.

    Cost: one forward for each example, and the unembedding of every position in every layer.

    References: nostalgebraist 2020 (logit lens); Neo et al. 2024, arXiv 2410.07149 (for visual tokens).
    """
    rows, ids = _rows(model, inputs), _tracked(model, track)
    n = model.cfg.n_layers
    chosen = list(range(n + 1) if layers is None else indices("layers", layers).check_mask("layers", (n + 1,)))
    if not chosen or not all(0 <= layer <= n for layer in chosen) or len(set(chosen)) < len(chosen):
        raise ExperimentError(
            f"layers={chosen}", f"different layers from 0 to {n}", f"use {n} for the output of the last layer"
        )
    _check_k(model, k)
    where = _same_places(rows, positions)
    names = {f"blocks.{n - 1}.hook_resid_post" if layer == n else f"blocks.{layer}.hook_resid_pre": layer
             for layer in chosen}  # fmt: skip
    examples: list[list[dict[str, np.ndarray]]] = []
    for row in rows:
        streams: dict[int, Tensor] = {}

        def keep(value: Tensor, hook: Any, streams: dict[int, Tensor] = streams) -> None:
            streams[names[hook.name]] = value[0, where]

        with model.hooks([(name, keep) for name in names]):
            model(row, logits_to_keep=1)
        examples.append([_words(model, streams[layer], k, ids) for layer in chosen])
    value = {name: np.stack([[layer[name] for layer in row] for row in examples]) for name in examples[0][0]}
    coords = {LAYER: chosen, **_place_coords(rows[0], where)}
    return _dataset(model, inputs, value, (LAYER, POSITION), coords, ids, "logit_lens")


@checked
@torch.no_grad()
def ov_reading(
    model: HookedMLLM,
    heads: Pairs,
    of: Given | Sequence[str],
    *,
    positions: Where = "image",
    track: str | int | Sequence[str | int] = (),
    k: Count = 5,
) -> xr.Dataset:
    """Which words a head writes for each token it could attend to: its OV circuit, read through the unembedding.

    ``logit[y] = W_U N(W_O[h] v[y])`` with ``v[y]`` the head's value for token y, and ``N`` the final norm with its
    scale frozen where the answer is read: what the head would add to the logits there if all its attention were on y.
    Weighted by its attention and summed over all keys, it is the head's contribution in ``logit_attribution``.

    Sign: positive means that the token raises the word. Unit: logits; for token strings, which have no run to take a
    scale from, logits of the head's output alone.

    Args:
        model: a hooked model.
        heads: (layer, head) pairs.
        of: a sample or inputs (values of that run), several with the same positions; or strings of one token each,
            whose *embeddings* then enter the head's layer directly, without what lower layers would add.
        positions: tokens of the run.
        track: tokens whose logit is reported.
        k: how many words to keep.

    Returns:
        ``word`` and ``logit`` (example, sender, position, place), ``tracked_logit`` (example, sender, position,
        tracked); for token strings ``own_rank`` (example, sender, position): 0 if the head writes the token it attends
        to.

    Raises:
        ExperimentError: a head the model does not have; positions that differ.
        UnsupportedModel: a gate between values and W_O, or keys in a memory.

    Cost: one forward for each example.

    References: Elhage et al. 2021 (OV circuits, copying).
    """
    pairs = tuple((int(layer), int(head)) for layer, head in heads)
    check_heads(model, pairs)
    check_direct(model, by_source=True)
    _check_k(model, k)
    ids, listed = _tracked(model, track), _listed(of)
    examples: list[list[dict[str, np.ndarray]]] = []
    if all(isinstance(item, str) for item in listed):
        tokens = [model.to_single_token(str(item)) for item in listed]
        examples.append(_of_strings(model, pairs, tokens, k, ids))
        coords: dict[str, Any] = {POSITION: [str(item) for item in listed]}
    else:
        rows = _rows(model, of)
        where = _same_places(rows, positions)
        examples += [_of_run(model, pairs, row, where, k, ids) for row in rows]
        coords = _place_coords(rows[0], where)
    value = {name: np.stack([[head[name] for head in row] for row in examples]) for name in examples[0][0]}
    coords[SENDER] = [f"L{layer}H{head}" for layer, head in pairs]
    return _dataset(model, of, value, (SENDER, POSITION), coords, ids, "ov_reading")


def _of_run(
    model: HookedMLLM, pairs: Sequence[tuple[int, int]], row: Inputs, where: np.ndarray, k: int, ids: list[int]
) -> list[dict[str, np.ndarray]]:
    """What each head would write where the answer is read, for each of the tokens it may attend to."""
    layers, n = sorted({layer for layer, _ in pairs}), model.cfg.n_layers
    at, values, seen = int(row.layout.positions("last")[0]), {}, {}

    def read_call(call: AttentionCall) -> None:
        values[call.layer] = call.v[0]

    def keep(value: Tensor, hook: Any) -> None:
        seen[hook.name] = value[0, at]

    end = f"blocks.{n - 1}.hook_resid_post"
    names = [*(f"blocks.{layer}.attn.hook_z" for layer in layers), end]
    with model.hooks([(name, keep) for name in names]), model.attending(read_call):
        model(row, logits_to_keep=1)
    through, carried, words = frozen_norm(model.norm(n), seen[end][None]), carried_on(model), []
    for layer, head in pairs:
        W_O, between = head_maps(model, layer, seen[f"blocks.{layer}.attn.hook_z"].float())
        value = values[layer][head * len(values[layer]) // model.cfg.n_heads, where].to(W_O)
        words.append(_spoken(model, through(between(value @ W_O[head]) * carried[layer]), k, ids))
    return words


def _of_strings(
    model: HookedMLLM, pairs: Sequence[tuple[int, int]], tokens: list[int], k: int, ids: list[int]
) -> list[dict[str, np.ndarray]]:
    """The same for embeddings that enter the head's layer directly, with each head alone in the stream."""
    values: dict[int, Tensor] = {}
    embedded: list[Tensor] = []

    def read_call(call: AttentionCall) -> None:
        values[call.layer] = call.v[0]

    hooks: list[Any] = [("hook_embed", lambda value, hook: embedded.append(value))]
    hooks += [(f"blocks.{layer}.hook_resid_pre", lambda value, hook: embedded[0]) for layer, _ in dict.fromkeys(pairs)]
    with model.hooks(hooks), model.attending(read_call):
        model(input_ids=torch.tensor([tokens], device=model.device), logits_to_keep=1)
    norm, heads = model.norm(model.cfg.n_layers), []
    for layer, head in pairs:
        value = values[layer][head * len(values[layer]) // model.cfg.n_heads].float()
        written = []
        for vector in value:
            z = vector.new_zeros(model.cfg.n_heads, len(vector))
            z[head] = vector
            W_O, between = head_maps(model, layer, z)
            written.append(between((vector @ W_O[head])[None]))
        alone = torch.cat(written).to(model.dtype)
        words = _spoken(model, frozen_norm(norm, alone)(alone), k, [*ids, *tokens])
        logit = words.pop("tracked_logit")
        words["own_rank"] = words.pop("tracked_rank")[np.arange(len(tokens)), len(ids) + np.arange(len(tokens))]
        heads.append({**words, **({"tracked_logit": logit[:, : len(ids)]} if ids else {})})
    return heads


def _words(model: HookedMLLM, stream: Float[Tensor, "position d_model"], k: int, ids: list[int]) -> dict[str, Any]:
    """Some states of the stream as words, through the final norm and the unembedding."""
    norm, cap, pieces = model.norm(model.cfg.n_layers), softcap(model), []
    for part in stream.split(_ROWS):
        logits = _unembedded(model, norm(part))
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        pieces.append(_top(model, logits.softmax(-1), k, ids, "probability"))
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _spoken(model: HookedMLLM, normed: Float[Tensor, "position d_model"], k: int, ids: list[int]) -> dict[str, Any]:
    pieces = [_top(model, part.to(model.W_U) @ model.W_U, k, ids, "logit") for part in normed.split(_ROWS)]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _unembedded(model: HookedMLLM, normed: Tensor) -> Float[Tensor, "position vocab"]:
    logits = normed @ model.W_U
    return (logits + model.b_U).float()


def _top(
    model: HookedMLLM, value: Float[Tensor, "position vocab"], k: int, ids: list[int], name: str
) -> dict[str, np.ndarray]:
    """The ``k`` largest of each row as words, and rank and value of the tracked tokens."""
    best = value.float().topk(k, dim=-1)
    words = [[model.tokenizer.decode([token]) for token in row] for row in best.indices.tolist()]
    columns: dict[str, np.ndarray] = {"word": np.array(words, dtype=str), name: best.values.cpu().numpy()}
    if ids:
        tracked = value[:, ids].float()
        rank = torch.stack([(value > value[:, token, None]).sum(-1) for token in ids], dim=-1)
        columns |= {"tracked_rank": rank.cpu().numpy(), f"tracked_{name}": tracked.cpu().numpy()}
    return columns


def _listed(of: Any) -> list[Any]:
    listed = [of] if isinstance(of, Inputs | Sample | str) else list(of)
    if not listed:
        raise ExperimentError("nothing to read", "at least one sample, inputs or word", "pass a sample")
    return listed


def _rows(model: HookedMLLM, of: Any) -> list[Inputs]:
    rows = [model.inputs_of(item) if isinstance(item, Sample) else item for item in _listed(of)]
    if any(not isinstance(row, Inputs) or len(row) != 1 for row in rows):
        raise ExperimentError(
            "neither samples nor inputs of one row", "samples, or inputs of one row", "read one row at a time"
        )
    return rows


def _same_places(rows: Sequence[Inputs], positions: Where) -> Int[np.ndarray, " position"]:
    places = [row.layout.positions(positions) for row in rows]
    if any(not np.array_equal(at, places[0]) for at in places):
        raise ExperimentError(
            "examples whose positions differ", "the same positions in every example",
            "read one example at a time",
        )  # fmt: skip
    return places[0]


def _place_coords(row: Inputs, where: np.ndarray) -> dict[str, Any]:
    facts = {name: (POSITION, getattr(row.layout, name)[where]) for name in ("image", "frame", "row", "col")}
    return {POSITION: where, **facts}


def _tracked(model: HookedMLLM, track: str | int | Sequence[str | int]) -> list[int]:
    listed = [track] if isinstance(track, str | int) else list(track)
    return [model.token_id(token) for token in listed]


def _check_k(model: HookedMLLM, k: int) -> None:
    if not 1 <= k <= model.W_U.shape[1]:
        raise ExperimentError(f"k={k}", f"1 to {model.W_U.shape[1]} words", "use k=5")


def _dataset(
    model: HookedMLLM, of: Any, value: dict[str, np.ndarray], dims: tuple[str, ...], coords: dict[str, Any],
    ids: list[int], kind: str,
) -> xr.Dataset:  # fmt: skip
    listed = _listed(of)
    samples = Samples([item for item in listed if isinstance(item, Sample)])
    behind = {"word": (PLACE,), "probability": (PLACE,), "logit": (PLACE,), "own_rank": ()}
    result = xr.Dataset(
        {name: ((EXAMPLE, *dims, *behind.get(name, (TRACKED,))), array) for name, array in value.items()},
        coords,
        {"kind": kind, "model": model.name, "provenance": provenance(model, samples if len(samples) else None)},
    )
    if ids:
        result = result.assign_coords({TRACKED: [model.tokenizer.decode([token]).strip() for token in ids]})
    names = [item.id or str(i) if isinstance(item, Sample) else str(i) for i, item in enumerate(listed)]
    result = result.assign_coords({EXAMPLE: names[: result.sizes[EXAMPLE]]})
    signs = {"probability": ("probability", "more: likelier"), "rank": ("rank", "0 is the first of the vocabulary"),
             "logit": ("logits", "more: speaks for the word"), "word": ("token", "best first")}  # fmt: skip
    for name in result.data_vars:
        unit, sign = signs[str(name).rsplit("_", 1)[-1]]
        result[name].attrs = {"unit": unit, "sign": sign}
    return result
