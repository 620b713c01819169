"""``Ablate``: which heads, replaced by what, where and when. A frozen value; nothing happens until ``intervene``.

"Ablating a head" names five different operations in the literature, and they can disagree. Each has its name here, and
the name travels into every result:

==============  =================================================================================================
``mean``        the head's output becomes its mean over reference samples, visual and text positions apart
``zero``        the head's output becomes 0 (off-distribution where the mean is not near 0)
``resample``    the head's output becomes that at a random position of the reference samples, of the same kind
``uniform``     the head attends alike to every key it may see; its values stay (uniform over the *causal* mask)
``paper``       the logits are set to 0 after the causal mask, as arXiv 2606.05843 does: the head attends alike to
                every key of the prompt, *future ones included* (a written token: to all up to itself)
==============  =================================================================================================
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mech.data.samples import Samples
from mech.errors import ExperimentError, suggestion
from mech.interventions.reference import Reference

METHODS = ("mean", "zero", "resample", "uniform", "paper")
POSITIONS = ("all", "question", "last", "image", "text")
PHASES = ("both", "prefill", "decode")


@dataclass(frozen=True)
class Ablate:
    """Replace the output of attention heads.

    Attributes:
        point: what is replaced; heads are ablated at ``"attn.hook_z"``, each head's output before W_O.
        heads: (layer, head) pairs.
        to: the method, see the module.
        positions: ``"all"``, or only the positions of the ``"question"``, the ``"last"`` one of the prompt, those of
            the ``"image"`` or of the ``"text"``. Generated tokens belong to ``"all"`` and ``"text"``.
        phase: while the prompt is read (``"prefill"``), while the answer is written (``"decode"``), or ``"both"``.
        reference: samples, or their ``reference_activations``, that ``mean`` and ``resample`` draw from. They should
            not be the samples that are tested.
        seed: of ``resample``.
    """

    point: str = "attn.hook_z"
    heads: tuple[tuple[int, int], ...] = ()
    to: str = "mean"
    positions: str = "all"
    phase: str = "both"
    reference: Samples | Reference | None = field(default=None, repr=False, compare=False)
    seed: int = 0

    def __init__(
        self,
        point: str = "attn.hook_z",
        *,
        heads: Iterable[tuple[int, int]],
        to: str = "mean",
        positions: str = "all",
        phase: str = "both",
        reference: Samples | Reference | None = None,
        seed: int = 0,
    ):
        # Any iterable of pairs is taken, so the fields are set by hand on the frozen instance.
        given = dict(
            point=point,
            heads=tuple((int(layer), int(head)) for layer, head in heads),
            to=to,
            positions=positions,
            phase=phase,
            reference=reference,
            seed=seed,
        )
        for name, value in given.items():
            object.__setattr__(self, name, value)

    def check(self, model: Any) -> None:
        """Refuse what cannot be run on this model. No forward pass is made.

        Raises:
            ExperimentError: an unknown word, a head the model lacks, no head, or no reference where one is needed.
        """
        for name, value, known in (
            ("point", self.point, ("attn.hook_z",)),
            ("to", self.to, METHODS),
            ("positions", self.positions, POSITIONS),
            ("phase", self.phase, PHASES),
        ):
            if value not in known:
                raise ExperimentError(
                    f"Ablate({name}={value!r})", " or ".join(map(repr, known)), suggestion(value, known)
                )
        if not self.heads:
            raise ExperimentError("Ablate with no heads", "at least one (layer, head)", "pass heads=ranking.top(0.05)")
        for layer, head in self.heads:
            if not (0 <= layer < model.cfg.n_layers and 0 <= head < model.cfg.n_heads):
                raise ExperimentError(
                    f"head (layer {layer}, head {head}) of a model with {model.cfg.n_layers} x {model.cfg.n_heads}",
                    "a head of this model's text stack",
                    "check that the ranking was made on this model",
                )
        if self.to in ("mean", "resample") and self.reference is None:
            raise ExperimentError(
                f"Ablate(to={self.to!r}) without reference",
                "samples to take the replacement from, other than those that are tested",
                "pass reference=train",
            )

        mine = (model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_head)
        if isinstance(self.reference, Reference) and tuple(self.reference.mean.shape[1:]) != mine:
            raise ExperimentError(
                f"reference activations of {' x '.join(map(str, self.reference.mean.shape[1:]))} layers, heads, d_head",
                f"{' x '.join(map(str, mine))}, as this model has",
                "make them with reference_activations(model, samples)",
            )

    def describe(self) -> dict[str, Any]:
        """The spec as plain data, for a result's provenance."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "reference"}
        reference = self.reference
        digest = reference.digest if isinstance(reference, Reference) else reference.digest() if reference else None
        return {"kind": "Ablate", **fields, "heads": [list(head) for head in self.heads], "reference": digest}
