"""How one pass of a batch becomes numbers: the query rows, the token sets they are scored on, and the reductions.

``head_scores`` (``measure.py``) plans and combines passes; this module computes one pass. Each reduction is written
once, for any attention; applied to attention spread evenly over visible keys, it gives its own size null.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mech.data.regions import Region
from mech.data.samples import Sample
from mech.errors import ExperimentError
from mech.experiments.attention.rows import mean_rows, read_rows
from mech.experiments.scores.localization import spatial_entropy
from mech.experiments.scores.published import Score
from mech.inputs import Inputs, TokenLayout
from mech.model import AttentionCall, HookedMLLM

_TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Prepared:
    """One example of a pass: its inputs and, as positions, its evidence, the regions of the same size elsewhere, the
    distractors, and the evidence of each answer token.
    """

    inputs: Inputs
    evidence: np.ndarray
    shifted: np.ndarray
    random: tuple[np.ndarray, ...]
    distractors: tuple[np.ndarray, ...] = ()
    parts: tuple[np.ndarray, ...] = ()


def prepared(
    inputs: Inputs, evidence: Sequence[Region], draws: int, seed: list[int], sample: Sample | None = None
) -> Prepared:
    """Find the evidence of one row and, with ``draws``, where else a region of its shape fits.

    With a ``sample``, also find the evidence of each token of its answer.

    The evidence is moved along the visual tokens, taken as a ring in reading order: a box stays a box except at the
    border, frames stay frames, and pages stay pages. If pictures are tiled, whole views and tiles are separate rings.

    Raises:
        ExperimentError: there is no room for the evidence elsewhere.
    """
    layout = inputs.layouts[0].visual
    positions = layout.positions(evidence) if len(evidence) else np.empty(0, dtype=int)
    parts = () if sample is None else _parts(inputs.layouts[0], sample, positions)
    if not draws:
        return Prepared(inputs, positions, positions, (), parts=parts)
    visual, rng = layout.positions("image"), np.random.default_rng(seed)
    moved = []
    for ring in (visual[layout.view[visual] == 0], visual[layout.view[visual] != 0]):
        here = np.flatnonzero(np.isin(ring, positions))
        if not len(here):
            continue
        inside = np.zeros(len(ring))
        inside[here] = 1
        overlap = np.fft.irfft(np.abs(np.fft.rfft(inside)) ** 2, len(ring))
        free = np.flatnonzero(overlap < 0.5)
        if not len(free):
            raise ExperimentError(
                f"evidence of {len(here)} in {len(ring)} visual tokens, with no room for a similar region elsewhere",
                "evidence smaller than half of the visual tokens",
                'calibrate by "size" or "null_question"',
            )
        half = free[np.argmin(np.abs(free - len(ring) / 2))]
        moved.append([ring[(here + step) % len(ring)] for step in (half, *rng.choice(free, draws))])
    shifted, *drawn = (np.sort(np.concatenate(parts)) for parts in zip(*moved, strict=True))
    return Prepared(inputs, positions, shifted, tuple(drawn), parts=parts)


def _parts(layout: TokenLayout, sample: Sample, evidence: np.ndarray) -> tuple[np.ndarray, ...]:
    """The evidence of each answer token: that of the spans that it overlaps, or all evidence."""
    at = layout.spans["answer"]
    ends = np.cumsum([0, *(len(layout.tokens[position]) for position in at)])
    # The tokens may start with a space that belongs to the template.
    ends -= "".join(layout.tokens[position] for position in at).index(sample.answer)
    parts = []
    for start, stop in pairwise(ends):
        own = [region for span in sample.spans if span.start < stop and start < span.stop for region in span.evidence]
        parts.append(layout.visual.positions(own) if own else evidence)
    return tuple(parts)


@torch.no_grad()
def read_pass(
    model: HookedMLLM,
    inputs: Inputs,
    rows: Sequence[Prepared],
    scores: Mapping[str, Score],
    sink_tau: float,
    pictures: Mapping[str, Any] | None = None,
) -> dict[str, Float[Tensor, "batch layer head *rest"]]:
    """One forward of a batch (``inputs`` are its collated rows): every score, averaged over its rows, null subtracted.

    ``trimmed`` instead gives the attention to each evidence token ([... token], padded with zeros); ``entropy`` also
    gives the image mass, as ``name/mass``.
    """
    reading = _Reading.of(inputs, rows, scores, model.device)
    sinks: dict[int, Bool[Tensor, "batch key_pos"]] = {}

    def read(call: AttentionCall, pattern: Tensor) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name, score in scores.items():
            attended = pattern
            if score.calibrate == "no_sinks":
                attended = pattern.masked_fill(sinks[call.layer].to(pattern.device)[:, None, None], 0.0)
            weight = reading.weights[name][:, reading.at]
            if score.reduce == "trimmed":
                values[name] = _each(mean_rows(attended, weight), reading.evidence)
            elif score.reduce == "entropy":
                mean = mean_rows(attended, weight)
                values[name] = _entropies(mean, inputs.layouts)
                values[f"{name}/mass"] = torch.einsum("bhk,bk->bh", mean, reading.targets[score.on].to(pattern))
            else:
                value = reading.score(score, call, attended)
                values[name] = torch.einsum("bhr,br->bh", value, weight.to(value))
        return values

    with ExitStack() as stack:
        if any(score.calibrate == "no_sinks" for score in scores.values()):
            stack.enter_context(model.hooks(_watching(model, inputs, sinks, sink_tau)))
        return read_rows(model, inputs, reading.at, read, pictures)


@dataclass(frozen=True, eq=False)
class _Reading:
    """What a pass reads: rows and their weights for each score, sets of keys, and the regions to compare with."""

    at: Tensor  # the query rows that any score reads
    weights: Mapping[str, Float[Tensor, "batch pos"]]
    evidence: Sequence[np.ndarray]  # positions of each row's evidence in the batch
    targets: Mapping[str, Float[Tensor, "batch *query_pos key_pos"]]
    regions: Mapping[str, Sequence[Float[Tensor, "batch key_pos"]]]

    @classmethod
    def of(
        cls, inputs: Inputs, rows: Sequence[Prepared], scores: Mapping[str, Score], device: torch.device
    ) -> "_Reading":
        shift = [len(a.visual) - len(row.inputs.layouts[0].visual) for a, row in zip(inputs.layouts, rows, strict=True)]

        def moved(positions: Sequence[np.ndarray]) -> list[np.ndarray]:
            return [own + left for own, left in zip(positions, shift, strict=True)]

        def marked(positions: Sequence[np.ndarray]) -> Float[Tensor, "batch key_pos"]:
            mask = torch.zeros(len(rows), len(inputs.layouts[0].visual), device=device)
            for row, own in enumerate(moved(positions)):
                at = torch.as_tensor(own, device=device)
                mask[row].index_put_((at,), torch.ones((), device=device), accumulate=True)
            return mask

        weights = {name: _weight(inputs.layouts, score.queries).to(device) for name, score in scores.items()}
        at = torch.stack(list(weights.values())).sum((0, 1)).nonzero().flatten()
        targets: dict[str, Float[Tensor, "batch *query_pos key_pos"]] = {
            "image": marked([row.inputs.layouts[0].visual.pictured for row in rows]),
            "evidence": marked([row.evidence for row in rows]),
        }
        if any(score.on == "parts" for score in scores.values()):
            targets["parts"] = _of_parts(inputs.layouts, rows, shift, targets["evidence"])[:, at]
        regions = {"shifted": [marked([row.shifted for row in rows])]}
        regions["random"] = [marked(drawn) for drawn in zip(*(row.random for row in rows), strict=True)]
        if any(row.distractors for row in rows):  # masses are sums: the mean over regions is one weighted region
            each = [np.concatenate(row.distractors) for row in rows]
            counts = torch.tensor([len(row.distractors) for row in rows], device=device)
            regions["distractors"] = [marked(each) / counts[:, None]]
        return cls(at, weights, moved([row.evidence for row in rows]), targets, regions)

    def score(self, score: Score, call: AttentionCall, attended: Tensor) -> Float[Tensor, "batch head row"]:
        """A score of every head at every row read, with its null subtracted."""
        norms = None
        if score.reduce == "value_norm":
            norms = torch.linalg.vector_norm(call.v, dim=-1, dtype=attended.dtype)
            norms = norms.repeat_interleave(attended.shape[1] // norms.shape[1], dim=1)
        on, image = self.targets[score.on].to(attended), self.targets["image"]
        value = _reduced(score.reduce, attended, on, image, norms)
        if score.calibrate == "size":
            visible = call.visible(self.at).to(attended)
            even = visible / visible.sum(-1, keepdim=True).clamp(min=1)
            return value - _reduced(score.reduce, even, on, image, norms, even=True)
        if score.calibrate in self.regions:
            others = [_reduced(score.reduce, attended, other.to(on), image, norms)
                      for other in self.regions[score.calibrate]]  # fmt: skip
            return value - torch.stack(others).mean(0)
        return value


def _of_parts(
    layouts: Sequence[TokenLayout], rows: Sequence[Prepared], shift: Sequence[int], evidence: Float[Tensor, "batch key"]
) -> Float[Tensor, "batch query_pos key_pos"]:
    """What each query row is scored on; a row that predicts an answer token is scored on that token's evidence."""
    mask = evidence[:, None].repeat(1, len(layouts[0]), 1)
    for row, (own, layout, left) in enumerate(zip(rows, layouts, shift, strict=True)):
        for position, part in zip(layout.spans["answer"], own.parts, strict=True):
            mask[row, position - 1] = 0
            mask[row, position - 1, torch.as_tensor(part + left, device=mask.device)] = 1
    return mask


def trimmed(
    each: Float[Tensor, "batch layer head token"], evidence: Sequence[np.ndarray]
) -> Float[Tensor, "batch layer head"]:
    """The sum over evidence tokens except those over two standard deviations below the mean (ICR, arXiv 2410.02642)."""
    left = []
    for values, tokens in zip(each, evidence, strict=True):
        values = values[..., : len(tokens)]
        low = values.mean(-1, keepdim=True) - 2 * values.std(-1, keepdim=True, correction=0)
        left.append(values.masked_fill(values < low, 0.0).sum(-1))
    return torch.stack(left)


def _weight(layouts: Sequence[TokenLayout], queries: str) -> Float[Tensor, "batch pos"]:
    """1 / |rows| on the rows of each example. A token is predicted one row before its own position."""
    weight = torch.zeros(len(layouts), len(layouts[0]))
    for row, layout in enumerate(layouts):
        answer = np.asarray(layout.spans.get("answer", ()), dtype=int)
        if queries in ("answer", "generated"):
            at = answer - 1
        elif queries == "last" and len(answer):
            at = answer[:1] - 1
        else:
            at = layout.positions(queries)
        weight[row, torch.as_tensor(at)] = 1 / len(at)
    return weight


def _reduced(
    reduce: str,
    pattern: Float[Tensor, "batch head row key_pos"],
    on: Float[Tensor, "batch *row key_pos"],
    image: Float[Tensor, "batch key_pos"],
    norms: Float[Tensor, "batch head key_pos"] | None,
    even: bool = False,
) -> Float[Tensor, "batch head row"]:
    which = "bhrk,bk->bhr" if on.ndim == 2 else "bhrk,brk->bhr"  # one mask for all rows, or one per row
    size = on.sum(-1)[:, None, None] if on.ndim == 2 else on.sum(-1)[:, None]
    if norms is not None:
        weighted = pattern * norms[:, :, None]
        return torch.einsum(which, weighted, on) / weighted.sum(-1).clamp(min=_TINY)
    mass = torch.einsum(which, pattern, on)
    if reduce == "share":
        return mass / torch.einsum("bhrk,bk->bhr", pattern, image.to(pattern)).clamp(min=_TINY)
    if reduce in ("hit", "hit_size"):
        # With even attention every visible key is a maximum, so the probability of a hit equals the mass.
        best = pattern.argmax(-1)
        rows = on[:, None].expand(*best.shape, -1) if on.ndim == 3 else on[:, None, None].expand(*best.shape, -1)
        hit = mass if even else rows.gather(-1, best[..., None])[..., 0]
        return hit / size if reduce == "hit_size" else hit
    return mass / size if reduce == "mean" else mass


def _each(mean: Float[Tensor, "batch head key_pos"], positions: Sequence[np.ndarray]) -> Tensor:
    each = mean.new_zeros(*mean.shape[:2], max(map(len, positions)))
    for row, own in enumerate(positions):
        each[row, :, : len(own)] = mean[row][:, torch.as_tensor(own, device=mean.device)]
    return each


def _entropies(mean: Float[Tensor, "batch head key_pos"], layouts: Sequence[TokenLayout]) -> Tensor:
    entropies = []
    for values, layout in zip(mean.cpu().numpy(), layouts, strict=True):
        visual = layout.visual
        entropies.append(spatial_entropy(values[:, visual.positions("image")], visual))
    return torch.as_tensor(np.array(entropies))


def _watching(model: HookedMLLM, inputs: Inputs, sinks: dict[int, Tensor], tau: float) -> list[tuple[str, Any]]:
    """Hooks that note each layer's sinks: keys whose state has an entry far above its root mean square."""
    if inputs.layouts[0].memory is not None:
        raise ExperimentError(
            "sinks in a memory of visual tokens", "visual tokens in the sequence", "choose another calibration"
        )

    def watch(layer: int):
        def note(stream: Tensor, hook: Any) -> None:
            wide = stream.float()
            sinks[layer] = wide.abs().amax(-1) >= tau * wide.pow(2).mean(-1).sqrt().clamp(min=_TINY)

        return note

    return [(f"blocks.{layer}.hook_resid_pre", watch(layer)) for layer in model.cfg.attention_layers]
