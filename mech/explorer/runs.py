"""One question about one picture: its answer, and the attention of every head, read in a single forward.

    run = Run.of(model, sample)
    run.top(5)                                # [(id, "seven", 0.98), ...]
    run.score("ram", sample.evidence)         # [layer head]; another box costs no forward

Everything describes the unchanged model, except ``under``: the next token with changed heads, by ``mech.intervene``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from mech.data.regions import Passage, Region
from mech.data.samples import Sample
from mech.experiments.attention.rows import read_rows
from mech.experiments.scores.sinks import SHARE, TAU, definition_for, state_strength
from mech.explorer.state import NEW_TOKENS
from mech.inputs import Inputs
from mech.interventions import Ablate, Patch, Redirect, intervene
from mech.model import AttentionCall, HookedMLLM
from mech.model.cache import ActivationCache
from mech.model.partial.beginning import Beginning, beginning

STREAMS = 2**28  # bytes of the layers' inputs, held for each run


def _sinks(
    model: HookedMLLM, start: Beginning, attention: Float[np.ndarray, "layer head row key"], keys: np.ndarray
) -> Bool[np.ndarray, "layer key"]:
    """Sinks among ``keys``, by the definition that applies to this model; no forward is needed."""
    if definition_for(model) == "attention" or not start.streams:
        return attention[:, :, :-1].mean((1, 2)) > SHARE
    held = sorted(start.streams)
    streams = (start.streams[max(at for at in held if at <= layer)] for layer in model.cfg.attention_layers)
    return np.stack([state_strength(stream[0, keys])[0].cpu().numpy() >= TAU for stream in streams])


def _is_output(point: str) -> bool:
    return point.startswith("blocks.") and point.endswith(".attn.hook_z")


@dataclass(frozen=True, eq=False)
class Run:
    """A sample as the model reads it, the model's answer, and where every head attends.

    Attributes:
        blind, seen: the inputs without their pixels, and the vision stack's output for the pixels: computed once.
        keys: the positions that are kept: visual tokens, and evidence in a text.
        attention: attention of the question's rows and, last, of the row that predicts the answer.
        visible: how many keys each of these rows may attend to.
        sinks: visual tokens that are sinks of a layer, whose attention a reader may want to leave out.
        start: the unchanged run, kept so that runs with changed heads begin at the first of these heads.
    """

    model: HookedMLLM
    sample: Sample
    inputs: Inputs
    blind: Inputs
    seen: Mapping[str, Any]
    keys: Int[np.ndarray, " key"]
    attention: Float[np.ndarray, "layer head row key"]
    visible: Float[np.ndarray, " row"]
    sinks: Bool[np.ndarray, "layer key"]
    start: Beginning
    answer: str

    @classmethod
    @torch.no_grad()
    def of(cls, model: HookedMLLM, sample: Sample) -> "Run":
        """Run the model, and read answer and attention.

        Cost: two and a half forwards and a short generation, the vision stack twice.
        """
        inputs = model.inputs_of(sample)
        blind, seen = model.encode_pictures(inputs)
        layout = inputs.layout.visual
        passages = [region for region in sample.evidence if isinstance(region, Passage)]
        read = layout.positions(passages) if passages else []
        keys = np.union1d(layout.pictured, read).astype(int)
        kept = torch.as_tensor(keys, device=model.device)
        question, last = inputs.layout.positions("question"), inputs.layout.positions("last")
        rows = torch.as_tensor(np.concatenate([question, last]), device=model.device)

        def look(call: AttentionCall, pattern: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"pattern": pattern[..., kept], "visible": call.visible(rows)[:, 0].sum(-1)}

        found = read_rows(model, blind, rows, look, seen)
        attention = found["pattern"][0].cpu().numpy()
        start = beginning(model, blind, most=STREAMS, logits_to_keep=1, mm_encoder_outputs=dict(seen))
        return cls(
            model, sample, inputs, blind, seen, keys,
            attention, found["visible"][0].amax(0).cpu().numpy(), _sinks(model, start, attention, keys),
            start, model.answer(inputs, max_new_tokens=NEW_TOKENS),
        )  # fmt: skip

    @cached_property
    def probabilities(self) -> Float[torch.Tensor, " vocab"]:
        """The probabilities of the next token."""
        return self.start.logits[0, -1].float().softmax(-1).cpu()

    def under(self, spec: Ablate | Patch | Redirect) -> Float[torch.Tensor, " vocab"]:
        """The probabilities of the next token with changed heads. Cost: one forward, from their first layer on."""
        first = min(layer for layer, _ in spec.heads)
        with intervene(self.model, spec) as changed, torch.no_grad(), self.start.at(first):
            says = changed(self.blind, logits_to_keep=1, mm_encoder_outputs=dict(self.seen))[0, -1]
        return says.float().softmax(-1).cpu()

    @cached_property
    def outputs(self) -> ActivationCache:
        """Every head's output (z), to be patched into another run. Cost: one forward, once."""
        with torch.no_grad():
            return self.model.run_with_cache(self.blind, names_filter=_is_output, mm_encoder_outputs=dict(self.seen))[1]

    @cached_property
    def words(self) -> dict[str, list[int]]:
        """The words of the question, each with its rows of ``attention``."""
        first = {position: row for row, position in enumerate(self.inputs.layout.positions("question").tolist())}
        return {word: [first[position] for position in rows] for word, rows in self.inputs.layout.words().items()}

    def top(self, k: int, probabilities: torch.Tensor | None = None) -> list[tuple[int, str, float]]:
        """The likeliest next tokens: id, text and probability."""
        best = (self.probabilities if probabilities is None else probabilities).topk(k)
        return [
            (token, self.model.tokenizer.decode([token]), p)
            for token, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def looking(self, layer: int, head: int, rows: Sequence[int]) -> Float[np.ndarray, " key"]:
        """The attention of a head, averaged over some rows; ``layer`` is the model's own number."""
        return self.attention[self.row_of(layer), head, list(rows)].mean(0)

    def row_of(self, layer: int) -> int:
        """The index in ``attention`` of a layer of the model."""
        return self.model.cfg.attention_layers.index(layer)

    def on(self, evidence: Sequence[Region]) -> Bool[np.ndarray, " key"]:
        """Which keys are evidence.

        Raises:
            RegionError: it lies outside the picture, or covers no token.
        """
        return np.isin(self.keys, self.inputs.layout.visual.positions(list(evidence)))

    def score(self, name: str, evidence: Sequence[Region]) -> Float[np.ndarray, "layer head"]:
        """A score read off attention: "ram", "gaze" (the answering row's mass on the evidence) or "vision_mass"."""
        if name == "vision_mass":
            return self.attention[:, :, :-1].sum(-1).mean(-1)
        on = self.attention[..., self.on(evidence)].sum(-1)
        return on[..., -1] if name == "gaze" else on[..., :-1].mean(-1)

    def even(self, evidence: Sequence[Region]) -> float:
        """The RAM of a head that attends to everything evenly."""
        return float((self.on(evidence).sum() / self.visible[:-1]).mean())
