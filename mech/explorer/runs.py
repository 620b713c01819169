"""One question about one picture: its answer, and the attention of every head, read in a single forward.

    run = Run.of(model, sample)
    run.top(5)                                # [("seven", 0.98), ...]
    run.score("ram", sample.evidence)         # [layer head]; another box costs no forward

Everything is of the model as it is: what a changed head does to the answer is asked of ``mech.intervene``.
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
from mech.explorer.state import NEW_TOKENS
from mech.inputs import Inputs
from mech.interventions import Spec, intervene
from mech.model import AttentionCall, HookedMLLM
from mech.model.cache import ActivationCache


def _is_output(point: str) -> bool:
    return point.startswith("blocks.") and point.endswith(".attn.hook_z")


@dataclass(frozen=True, eq=False)
class Run:
    """A sample as the model takes it, what it says, and where every head attends.

    Attributes:
        blind, seen: the inputs without their pixels, and what the vision stack made of these: read once.
        keys: the positions that are kept: visual tokens, and evidence in a text.
        attention: of the question's rows and, last, of the row that predicts the answer.
        visible: how many keys each of these rows may look at.
        probabilities: of the next token.
    """

    model: HookedMLLM
    sample: Sample
    inputs: Inputs
    blind: Inputs
    seen: Mapping[str, Any]
    keys: Int[np.ndarray, " key"]
    attention: Float[np.ndarray, "layer head row key"]
    visible: Float[np.ndarray, " row"]
    probabilities: Float[torch.Tensor, " vocab"]
    answer: str

    @classmethod
    @torch.no_grad()
    def of(cls, model: HookedMLLM, sample: Sample) -> "Run":
        """Ask, and read.

        Cost: two forwards and a short generation, the vision stack twice.
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
        says = model(blind, logits_to_keep=1, mm_encoder_outputs=dict(seen))[0, -1]
        return cls(
            model, sample, inputs, blind, seen, keys,
            found["pattern"][0].cpu().numpy(), found["visible"][0].amax(0).cpu().numpy(),
            says.float().softmax(-1).cpu(), model.answer(inputs, max_new_tokens=NEW_TOKENS),
        )  # fmt: skip

    def under(self, spec: Spec) -> Float[torch.Tensor, " vocab"]:
        """The probabilities of the next token under an intervention. Cost: one forward of the text stack."""
        with intervene(self.model, spec) as changed, torch.no_grad():
            says = changed(self.blind, logits_to_keep=1, mm_encoder_outputs=dict(self.seen))[0, -1]
        return says.float().softmax(-1).cpu()

    @cached_property
    def outputs(self) -> ActivationCache:
        """What every head puts out (z), to be patched into another run. Cost: one forward, once."""
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
        """The attention of a head, averaged over some rows; ``layer`` counts as the model does."""
        return self.attention[self.row_of(layer), head, list(rows)].mean(0)

    def row_of(self, layer: int) -> int:
        """Where a layer of the model is in ``attention``."""
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
        """What RAM would be of a head that attends to everything alike."""
        return float((self.on(evidence).sum() / self.visible[:-1]).mean())
