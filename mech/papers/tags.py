"""Do marks around the evidence give it away? The tag mode: the same prompt with and without boundary tags.

    found = tag_leak(model, test)
    found["leak"].mean("example")                   # for every head: RAM that the tags add when nothing is asked

Where evidence is located by tags that stay in the prompt (``evidence: ( <image> )``), a head can attend to the evidence
because it is marked, not because it was asked for. Under the question "N/A" nothing is asked for: RAM that the tags add
there is a leak. ``mech`` itself finds evidence by position and leaves nothing in the prompt.

Tags go around whole pictures, because families with 2-D positions allow no text inside a picture. A sample with a
single picture is first placed among pictures of other samples (``among_others``).
"""

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import xarray as xr

from mech.arguments import Count, Seed, checked
from mech.axes import EXAMPLE, HEAD, LAYER
from mech.data.regions import Box, Mask, Pages, Region
from mech.data.samples import Sample, Samples, SomeSamples
from mech.errors import ExperimentError
from mech.experiments.attention.rows import in_batches
from mech.experiments.scores.measure import NULL_QUESTION
from mech.experiments.scores.ram import evidence_mass
from mech.inputs import Inputs, encode
from mech.model import HookedMLLM
from mech.results import provenance

TAGS = (" evidence: (", ")")


@checked
@torch.no_grad()
def tag_leak(
    model: HookedMLLM,
    samples: SomeSamples,
    tags: tuple[str, str] = TAGS,
    *,
    batch_size: Count = 8,
    seed: Seed = 0,
) -> xr.Dataset:
    """RAM of every head with and without tags around the evidence, asked the question and asked nothing.

    ``leak = RAM("N/A", tagged) - RAM("N/A", plain)``.

    Sign: positive, the tags draw attention to the evidence. Unit: attention mass.

    Args:
        model: a hooked model.
        samples: samples with evidence in images.
        tags: plain text before and after every picture that holds evidence.
        batch_size: rows per forward.
        seed: seed of the pictures that single ones are placed among.

    Returns:
        ``plain``, ``tagged``, ``plain_null``, ``tagged_null`` (RAM under question or "N/A") and ``leak`` over (example,
        layer, head); ``right_plain`` and ``right_tagged`` over (example): is the answer's first token the likeliest?

    Raises:
        ExperimentError: no evidence, a video, or a single picture with no other sample to place it among.

    Cost: four forwards per sample.

    References: arXiv 2606.05843 marks evidence by tags in the prompt.
    """
    samples = Samples(samples)
    lacking = [s.id or str(i) for i, s in enumerate(samples) if not s.evidence or s.video]
    if lacking or not len(samples):
        raise ExperimentError(
            f"{len(lacking)} samples without it, the first is {lacking[0]!r}" if lacking else "no samples",
            "samples with evidence in images", "leave the others out",
        )  # fmt: skip
    shown = among_others(samples, seed) if any(len(sample.images) == 1 for sample in samples) else samples
    found = [_of_batch(model, batch, tags) for batch, _ in in_batches(list(shown), batch_size)]
    value = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    value["leak"] = value["tagged_null"] - value["plain_null"]
    heads = (EXAMPLE, LAYER, HEAD)
    result = xr.Dataset(
        {name: (heads if array.ndim == 3 else (EXAMPLE,), array) for name, array in value.items()},
        {
            EXAMPLE: samples.names,
            LAYER: list(model.cfg.attention_layers),
            HEAD: np.arange(model.cfg.n_heads),
        },
        {"kind": "tags", "model": model.name, "tags": list(tags), "provenance": provenance(model, samples, tags=tags)},
    )
    for name in ("plain", "tagged", "plain_null", "tagged_null", "leak"):
        result[name].attrs = {"unit": "attention mass", "sign": "more: the rows attend more to the evidence"}
    return result


def _of_batch(model: HookedMLLM, batch: Sequence[Sample], tags: tuple[str, str]) -> dict[str, np.ndarray]:
    """RAM of each sample in all four prompts, and whether its answer is the likeliest in the two that ask for it."""
    found: dict[str, np.ndarray] = {}
    for name, question, marks in (
        ("plain", None, None), ("tagged", None, tags),
        ("plain_null", NULL_QUESTION, None), ("tagged_null", NULL_QUESTION, tags),
    ):  # fmt: skip
        rows = [tagged(model, sample, question, marks) for sample in batch]
        inputs = model.collate(rows)
        wide = len(inputs.layouts[0].visual)
        keys = [
            row.layout.visual.positions(sample.evidence) + wide - len(row.layout.visual)
            for row, sample in zip(rows, batch, strict=True)
        ]
        mass, _ = evidence_mass(model, inputs, keys)
        found[name] = mass[:, 0].cpu().numpy()
        if question is None:
            likeliest = model(inputs, logits_to_keep=1)[:, -1].argmax(-1).tolist()
            answers = [model.processor.answer_ids(sample.answer)[0] for sample in batch]
            found[f"right_{name}"] = np.equal(likeliest, answers).astype(float)
    return found


def tagged(
    model: HookedMLLM, sample: Sample, question: str | None = None, tags: tuple[str, str] | None = TAGS
) -> Inputs:
    """The inputs of a sample with text before and after every picture with evidence; no text with ``tags=None``."""
    asked = (question or sample.question).strip()
    reader = model.processor
    pieces = reader.prompt(asked, len(sample.images), False).split(str(reader.image_token))
    if tags is not None:
        for index in _pictures(sample.evidence):
            pieces[index], pieces[index + 1] = pieces[index] + tags[0], tags[1] + pieces[index + 1]
    text = str(reader.image_token).join(pieces)
    start = text.rindex(asked)
    return encode(reader, text, sample.images, spans={"question": (start, start + len(asked))}).to(
        model.device, model.dtype
    )


def among_others(samples: Sequence[Sample], seed: int = 0, n: int = 3) -> Samples:
    """Every sample with its pictures at a random place among pictures of other samples, at least ``n`` in all.

    Raises:
        ExperimentError: fewer than two samples.
    """
    if len(samples) < 2:
        raise ExperimentError(
            "one sample with one picture", "other samples whose pictures are put next to it", "give more"
        )
    rng, found = random.Random(seed), []
    for i, sample in enumerate(samples):
        others = [picture for j, other in enumerate(samples) if j != i for picture in other.images]
        beside = rng.sample(others, min(len(others), max(0, n - len(sample.images))))
        place = rng.randrange(len(beside) + 1)
        images = (*beside[:place], *sample.images, *beside[place:])
        evidence = tuple(_moved(region, place) for region in sample.evidence)
        found.append(replace(sample, images=images, evidence=evidence, counterfactual=None))
    return Samples(found)


def _pictures(evidence: Sequence[Region]) -> list[int]:
    indices: set[int] = set()
    for region in evidence:
        indices |= set(region.indices) if isinstance(region, Pages) else {getattr(region, "image", 0)}
    return sorted(indices)


def _moved(region: Region, by: int) -> Region:
    if isinstance(region, Box | Mask):
        return replace(region, image=region.image + by)
    return Pages(*(index + by for index in region.indices)) if isinstance(region, Pages) else region
