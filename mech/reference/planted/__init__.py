"""Planted circuits: the answer key. Hand-set weights in real LLaVA and Qwen2.5-VL architectures.

    planted = circuit("mover")                                   # one of NAMES
    model   = mech.HookedMLLM.from_hf(planted.model, planted.processor)
    planted.sample, planted.sample.counterfactual                # a Sample and its corruption, as everywhere
    planted.clean, planted.corrupted                             # Inputs of the two: the same layout
    planted.truth.heads["mover"]                                 # (1, 0)
    planted.truth.ram[1, 0]                                      # 0.0: it does not attend to the evidence ...
    planted.truth.effects["mover",]                              # Effect(lost=1.0, recovered=1.0): ... and is necessary
    planted.truth.edges["retrieval", "mover.v"]                  # Effect(lost=1.0, recovered=1.0)

The picture is a grid of cells, each with a left colour (its name) and a right one. Asked "red", the model says which
colour is next to red. All of this is computed by two layers of four heads whose every weight is set in ``planting``,
through the stock vision tower, projector, norms, rotary positions and softmax; what those add to the numbers stated
here is below 1e-5.

The circuits (``NAMES``), and why their numbers are what they are, are in ``circuits``, one function for each:

* ``roles``, ``gqa``: a retrieval, a sink, an even and a recency head; the same with shared keys and values;
* ``q_composition``, ``k_composition``: an early head writes what a later one uses as its query, or as its key;
* ``and``, ``or``, ``backup``: two heads of which both, either, or first one and then the other is needed;
* ``mover``: a head that does not attend to the picture but is necessary.

The circuits do not resemble a trained model. Attention is saturated (the gradient through queries and keys is zero), so
gradients find value paths and miss the others; that, too, is a known answer.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from mech.data.samples import Sample, Samples
from mech.errors import UnsupportedModel
from mech.inputs import Inputs, Processor, TokenLayout, build
from mech.reference.planted.circuits import CIRCUITS, FAMILIES, NOTHING, RECENCY, WHOLE, Circuit, Effect, Roles
from mech.reference.planted.planting import HEADS, LAYERS, PACE, SIDE, grow, processor
from mech.reference.scenes import scene

__all__ = ["FAMILIES", "NAMES", "NOTHING", "WHOLE", "Effect", "Planted", "Truth", "circuit"]
NAMES = tuple(CIRCUITS)


@dataclass(frozen=True)
class Truth:
    """What is true of a planted circuit.

    Attributes:
        heads: (layer, head) of every role.
        ram: Retrieval Attention Mass of every head on the clean sample; a head without a role attends evenly.
        logit_diff: logit of the clean answer minus that of the corrupted one, (in the clean, in the corrupted run).
        effects: sets of roles, in the order of ``heads`` -> what patching their z at *all* positions does. Every head
            without a role has ``NOTHING``, and adding it to a set changes nothing.
        zeroed: sets of roles -> ``logit_diff`` of the clean run with their z set to zero.
        edges: (sender role, receiver) -> what switching this path alone does. A receiver is ``"role.q"``,
            ``"role.k"``, ``"role.v"``, ``"mlp.1"`` or ``"logits"``. The path is direct: everything between sender and
            receiver keeps its value, everything after the receiver is computed anew. Every other path from a role to
            a role, to that MLP or to the logits has ``NOTHING``.
    """

    heads: Mapping[str, tuple[int, int]]
    ram: Float[np.ndarray, "layer head"] = field(repr=False)
    logit_diff: tuple[float, float]
    effects: Mapping[Roles, Effect]
    zeroed: Mapping[Roles, float]
    edges: Mapping[tuple[str, str], Effect]

    @property
    def necessary(self) -> tuple[Roles, ...]:
        """The smallest sets whose noising loses everything."""
        return _smallest([roles for roles, effect in self.effects.items() if effect.lost == 1])

    @property
    def sufficient(self) -> tuple[Roles, ...]:
        """The smallest sets whose denoising recovers everything."""
        return _smallest([roles for roles, effect in self.effects.items() if effect.recovered == 1])


@dataclass(frozen=True, eq=False)
class Planted:
    """A planted circuit, ready to run: model, processor, a clean and a corrupted row, and what is true of it."""

    name: str
    model: Any = field(repr=False)
    processor: Processor = field(repr=False)
    sample: Sample
    clean: Inputs
    corrupted: Inputs
    truth: Truth

    def samples(self, n: int, seed: int = 0) -> Samples:
        """More scenes for the same circuit, each with its counterfactual.

        ``logit_diff``, ``effects``, ``zeroed`` and ``edges`` hold for all of them; so does ``ram``, except for heads
        that attend evenly or by distance, whose mass depends on where the evidence is.
        """
        rng = random.Random(f"{self.name}/{seed}")
        return Samples([_scene(CIRCUITS[self.name], rng, f"{self.name}-{seed}-{i}") for i in range(n)])


def circuit(name: str, family: str = "llava", dtype: torch.dtype = torch.float32) -> Planted:
    """A planted circuit in a real architecture.

    Args:
        name: one of ``NAMES``.
        family: ``"llava"`` (CLIP and Llama) or ``"qwen2_5_vl"`` (2 x 2 merging, M-RoPE).
        dtype: dtype of the weights and pixels; norms compute in float32 in any case.

    Raises:
        UnsupportedModel: no such circuit, or not in this family.
    """
    if name not in CIRCUITS:
        raise UnsupportedModel.unknown("planted circuit", name, NAMES)
    planted = CIRCUITS[name]
    if family not in planted.families:
        raise UnsupportedModel(
            f"the circuit {name!r} in {family!r}", ", ".join(planted.families), f"use circuit({name!r})"
        )
    model = grow(family, list(planted.heads.values()), planted.gate, planted.kv_heads, dtype)
    model.config.name_or_path = f"planted:{name}"  # what results are labelled with
    reader = processor(family, model.config, planted.answer_mark)
    sample = _scene(planted, random.Random(name), name)
    assert sample.counterfactual is not None
    clean, corrupted = (build(reader, s.question, s.images).to(dtype=dtype) for s in (sample, sample.counterfactual))
    truth = Truth(
        heads={role: (head.layer, head.head) for role, head in planted.heads.items()},
        ram=_ram(planted, sample, clean.layout, family),
        logit_diff=planted.logit_diff,
        effects=planted.effects,
        zeroed=planted.zeroed,
        edges=planted.edges,
    )
    return Planted(name, model, reader, sample, clean, corrupted, truth)


def _scene(planted: Circuit, rng: random.Random, name: str) -> Sample:
    return scene(planted.corruption, planted.words, rng, name)


def _ram(planted: Circuit, sample: Sample, layout: TokenLayout, family: str) -> Float[np.ndarray, "layer head"]:
    """RAM in closed form: what a head's role says, and 'evenly' for heads that have none."""
    evidence, question = layout.positions(sample.evidence), layout.positions("question")
    when = np.arange(len(layout), dtype=float)
    if family == "qwen2_5_vl":
        # The temporal axis of M-RoPE: a picture is one moment, and the text after it continues after its longer side.
        visual = layout.positions("image")
        when[visual] = visual[0]
        when[visual[-1] + 1 :] += visual[0] + SIDE - (visual[-1] + 1)
    rows: dict[str, list[float]] = {"evenly": [], "near": []}
    for row in question:
        near = np.exp(RECENCY * np.cos(PACE * (when[row] - when[: row + 1])))
        rows["evenly"].append(len(evidence) / (row + 1))
        rows["near"].append(near[evidence].sum() / near.sum())
    ram = np.full((LAYERS, HEADS), np.mean(rows["evenly"]))
    for role, head in planted.heads.items():
        expected = planted.ram_of[role]
        ram[head.layer, head.head] = np.mean(rows[expected]) if isinstance(expected, str) else expected
    return ram


def _smallest(sets: list[Roles]) -> tuple[Roles, ...]:
    return tuple(roles for roles in sets if not any(set(other) < set(roles) for other in sets))
