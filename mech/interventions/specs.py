"""Interventions as frozen values: what to change, where and when. Nothing happens until ``intervene``.

    Ablate(heads=ranking.top(0.05), to="mean", reference=train)              # what is it needed for?
    Ablate("hook_mlp_out", layers=[3], to="zero")                            # MLPs, attention layers, visual tokens
    Patch("attn.hook_z", source=other_inputs, heads=[(3, 2)])                # values of another run
    Knockout(query="question", key=Box(10, 10, 40, 40), layers=range(4, 9))  # who may not attend to what
    Redirect(heads=[(3, 2)], to=Box(10, 10, 40, 40), bias=8.0)               # where does the answer come from?
    Scale(heads=[(3, 2)], factor=2.0)                                        # steering
    Custom("blocks.3.hook_resid_post", fn)                                   # anything

"Ablating a head" means five different operations in the literature, and they can disagree. Each has its own name here,
which every result records:

==============  =================================================================================================
``mean``        the head's output becomes its mean over reference samples, visual and text positions separately
``zero``        the head's output becomes 0 (off-distribution where the mean is not near 0)
``resample``    the head's output becomes its output at a random reference position of the same kind
``uniform``     the head attends equally to every key it may see; values unchanged (uniform over the *causal* mask)
``paper``       the logits are set to 0 after the causal mask, as arXiv 2606.05843 does: the head attends equally to
                every key of the prompt, *future ones included* (a generated token: to all up to itself)
==============  =================================================================================================
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Any

import numpy as np

from mech.arguments import NOT_EMPTY, Reading, Rule, Seed, checked, one_of, short
from mech.data.regions import where
from mech.data.samples import Samples
from mech.errors import ExperimentError, suggestion
from mech.indices import Layers, Pairs, indices, pairs
from mech.inputs import Inputs
from mech.interventions.reference import ABLATED, Reference
from mech.model.cache import ActivationCache

METHODS = ("mean", "zero", "resample", "uniform", "paper")
POSITIONS = ("all", "question", "last", "image", "text")
PHASES = ("both", "prefill", "decode")
Z = "attn.hook_z"
PATCHED = {  # point -> which heads it has
    "hook_embed": "", "hook_resid_pre": "", "hook_resid_mid": "", "hook_resid_post": "", "hook_attn_out": "",
    "hook_mlp_out": "", "mlp.hook_post": "", "attn.hook_q": "head", "attn.hook_rot_q": "head", Z: "head",
    "attn.hook_result": "head", "attn.hook_pattern": "head", "attn.hook_attn_scores": "head",
    "attn.hook_k": "kv_head", "attn.hook_v": "kv_head",
}  # fmt: skip
LARGEST_BIAS = float(np.finfo(np.float16).max)
Bias = Annotated[
    float,
    Rule(f"a number between -{LARGEST_BIAS:.0f} and {LARGEST_BIAS:.0f}", lambda value: abs(value) <= LARGEST_BIAS),
]


def _positions(name: str, given: Any) -> Any:
    """Positions as a frozen value; names are checked at once, the rest once the inputs are known."""
    if isinstance(given, PerRow):
        return given
    read = where(name, given)
    if isinstance(read, str) and read not in POSITIONS:
        known = " or ".join(map(repr, POSITIONS))
        raise ExperimentError(f"{name}={read!r}", f"{known}, a region, or positions", suggestion(read, POSITIONS))
    return read


def _rows(name: str, given: Any) -> tuple[Any, ...]:
    """The positions of each row."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ExperimentError(f"{name}={short(given)}", "positions for each row", "PerRow((Box(...), Box(...)))")
    return tuple(_positions(name, row) for row in given)


Where = Annotated[
    Any, Reading(_positions, "a name, a region, regions, positions or a mask")
]  # a name, a region, several regions, positions or a mask of them
Phase = one_of(PHASES)


class Spec:
    """The base of all interventions: a check before any forward, and a description for the record."""

    def check(self, model: Any) -> None:
        """Refuse what cannot be run on this model. No forward pass is made.

        Raises:
            ExperimentError: an unknown word, a head or layer the model lacks, nothing to act on.
            PointError: a point that does not exist or is not live.
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """The spec as plain data, for a result's provenance."""
        fields = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"kind": type(self).__name__, **fields}


def digest_of(*specs: Spec) -> str:
    """SHA-256 of the interventions' descriptions, in order: part of every key under which answers are cached.

    A cache that knows only the model's name would replay the answers of the unmodified model. ``Custom`` is identified
    by the name of its function, a region by its numbers.
    """
    return hashlib.sha256(json.dumps([spec.describe() for spec in specs], sort_keys=True).encode()).hexdigest()


@checked
@dataclass(frozen=True)
class Ablate(Spec):
    """Replace the output of attention heads, of whole layers' attention or MLPs, or of visual tokens.

    Attributes:
        point: ``"attn.hook_z"`` (heads: each head's output before W_O), ``"hook_attn_out"``, ``"hook_mlp_out"``
            (layers) or ``"hook_embed"`` (tokens, as the text stack receives them; name them by ``positions``).
        heads: (layer, head) pairs, or a boolean mask over (layer, head), at ``"attn.hook_z"``.
        layers: layers, or a mask of them, at ``"hook_attn_out"`` and ``"hook_mlp_out"``.
        to: the method (see the module); at points other than heads, ``mean``, ``zero`` or ``resample``.
        positions: ``"all"``, or only those of the ``"question"``, the ``"image"`` or the ``"text"``, or the ``"last"``
            one of the prompt; or a region, positions of the prompt, or a boolean mask of it. Generated tokens belong
            to ``"all"`` and ``"text"``.
        phase: while the prompt is read (``"prefill"``), while the answer is written (``"decode"``), or ``"both"``.
        reference: samples, or their ``reference_activations``, that ``mean`` and ``resample`` draw from. They should
            not be the samples under test.
        seed: of ``resample``.
        allow_other_model: accept a ``Reference`` made on another model of the same shape.
    """

    point: one_of(ABLATED) = Z
    _: KW_ONLY
    heads: Pairs = ()
    layers: Layers = ()
    to: one_of(METHODS) = "mean"
    positions: Where = "all"
    phase: Phase = "both"
    reference: Samples | Reference | None = field(default=None, repr=False, compare=False)
    seed: Seed = 0
    allow_other_model: bool = False

    def check(self, model: Any) -> None:
        if self.point != Z and self.to not in METHODS[:3]:
            raise ExperimentError(
                f"Ablate({self.point!r}, to={self.to!r})",
                " or ".join(map(repr, METHODS[:3])),
                "use it on heads: they have a pattern",
            )
        if self.point == Z:
            check_heads(model, self.heads)
        elif self.point == "hook_embed":
            model.select(self.point)
        else:
            check_layers(model, self.layers, self.point)
        if self.to in ("mean", "resample") and self.reference is None:
            raise ExperimentError(
                f"Ablate(to={self.to!r}) without reference",
                "samples to take the replacement from, other than the tested ones",
                "pass reference=train",
            )
        if isinstance(self.reference, Reference):
            self.reference.check(model, self.point, self.allow_other_model)

    def describe(self) -> dict[str, Any]:
        reference = self.reference
        digest = reference.digest if isinstance(reference, Reference) else reference.digest() if reference else None
        made_on = {"reference_model": reference.weights} if isinstance(reference, Reference) else {}
        return {**super().describe(), "reference": digest, **made_on}


@checked
@dataclass(frozen=True)
class Patch(Spec):
    """Replace activations with those of another run, position by position.

    Attributes:
        point: a point of the text stack without its layer (``"attn.hook_z"``, ``"hook_resid_post"``, ...).
        source: ``Inputs`` of the other run (one forward), or its ``ActivationCache``. Its layout must be the same:
            position 17 replaces position 17.
        heads: (layer, head) pairs, if the point has heads; at keys and values these are key/value heads.
        layers: layers, if the point has no heads, or to patch all heads of them.
        positions: as in ``Ablate``, within the prompt. At ``"attn.hook_pattern"`` they are query positions.
    """

    point: one_of(PATCHED) = Z
    source: Inputs | ActivationCache | Mapping[str, Any] | None = field(default=None, repr=False, compare=False)
    _: KW_ONLY
    heads: Pairs = ()
    layers: Layers = ()
    positions: Where = "all"

    def check(self, model: Any) -> None:
        if self.source is None:
            raise ExperimentError(
                f"Patch({self.point!r}) without source", "Inputs of another run, or their cache", "pass source=clean"
            )
        if self.heads and not PATCHED[self.point]:
            raise ExperimentError(f"Patch({self.point!r}, heads=...)", "layers: this point has no heads", "layers=[3]")
        if self.heads and self.layers:
            raise ExperimentError("Patch with heads and layers", "one of the two", "leave layers out")
        if self.heads:
            check_heads(model, self.heads, PATCHED[self.point])
        elif self.point == "hook_embed":
            model.select(self.point)
        else:
            check_layers(model, self.layers, self.point)
        if isinstance(self.source, Mapping) or hasattr(self.source, "cache_dict"):
            absent = [name for name in names_of(self) if name not in self.source]  # type: ignore[operator]
            if absent:
                raise ExperimentError(
                    f"a source cache without {absent[0]!r}", "every patched point", f"names_filter={names_of(self)!r}"
                )


@checked
@dataclass(frozen=True)
class Knockout(Spec):
    """Cut attention edges: the query positions may not attend to the key positions; the rest is renormalised.

    ``pattern'[q, k] = pattern[q, k] [k not in key] / sum of the same over k`` - the scores of the cut edges set to
    minus infinity before the softmax (Geva et al. 2023, arXiv 2304.14767; for MLLMs 2411.18620).

    Attributes:
        query: the positions cut off, as in ``Ablate``; generated tokens belong to "all", "text" and "last".
        key: what they can no longer see, positions of the prompt.
        layers: a window of layers; all when neither layers nor heads are given.
        heads: single heads instead of layers.
        phase: as in ``Ablate``.
    """

    query: Where = "question"
    key: Where = "image"
    _: KW_ONLY
    layers: Layers = ()
    heads: Pairs = ()
    phase: Phase = "both"

    def check(self, model: Any) -> None:
        if self.heads and self.layers:
            raise ExperimentError("Knockout with heads and layers", "one of the two", "leave layers out")
        if self.heads:
            check_heads(model, self.heads)
        elif self.layers:
            check_layers(model, self.layers, Z)


@checked
@dataclass(frozen=True)
class PerRow:
    """Different positions for each row of a batch: ``PerRow((Box(...), Box(...)))`` for two rows.

    Attributes:
        rows: the ``positions`` of each row, in order.
    """

    rows: Annotated[tuple[Where, ...], Reading(_rows, "positions for each row")]


@checked
@dataclass(frozen=True)
class Redirect(Spec):
    """Pull heads towards a region: a bias on their scores before the softmax; the rest of the layer is unchanged.

    ``pattern'[q, k] = softmax over k of (score[q, k] + bias [k in to])``. Where ablation asks whether an answer needs a
    head, this asks whether the head decides *where the answer comes from*: if the answer becomes the region's, it does
    (Gaze heads, arXiv 2606.14703).

    Attributes:
        heads: (layer, head) pairs.
        to: positions of the prompt that they are pulled towards: a region, ``"image"``, or ``PerRow`` of them.
        bias: in units of the scores (attention logits); negative pushes away. At most 65,504 in absolute value, so that
            it means the same in every precision.
        query: the positions pulled, as in ``Ablate``; generated tokens belong to "all", "text" and "last".
        phase: as in ``Ablate``.
    """

    heads: Pairs
    to: Where
    bias: Bias
    _: KW_ONLY
    query: Where = "all"
    phase: Phase = "both"

    def check(self, model: Any) -> None:
        check_heads(model, self.heads)


@checked
@dataclass(frozen=True)
class Scale(Spec):
    """Multiply the output of heads: steering up (``factor > 1``), down, or off (0 is zero ablation).

    Attributes:
        heads: (layer, head) pairs.
        factor: what z is multiplied by.
        positions, phase: as in ``Ablate``.
    """

    heads: Pairs
    factor: float
    _: KW_ONLY
    positions: Where = "all"
    phase: Phase = "both"

    def check(self, model: Any) -> None:
        check_heads(model, self.heads)


@checked
@dataclass(frozen=True)
class Custom(Spec):
    """Any hook at any point: ``fn(value, hook)`` returns the new value, or None to leave it unchanged.

    Attributes:
        point: one or several full names (``"blocks.3.hook_resid_post"``) of text or vision points.
        fn: TransformerLens' hook function.
    """

    point: str | Annotated[Sequence[str], NOT_EMPTY]
    fn: Callable[..., Any] = field(repr=False, compare=False)

    def check(self, model: Any) -> None:
        model.select(self.point if isinstance(self.point, str) else list(self.point))

    def describe(self) -> dict[str, Any]:
        return {"kind": "Custom", "point": self.point, "fn": getattr(self.fn, "__qualname__", repr(self.fn))}


def names_of(spec: Ablate | Patch) -> list[str]:
    """The full names of the points a spec writes to, in order."""
    if spec.point == "hook_embed":
        return [spec.point]
    layers = sorted({layer for layer, _ in spec.heads} | set(spec.layers))
    return [f"blocks.{layer}.{spec.point}" for layer in layers]


def check_heads(model: Any, heads: Pairs, kind: str = "head") -> None:
    """Refuse heads the model does not have.

    Raises:
        ExperimentError: none at all, a layer or head out of range, or a layer without attention heads.
    """
    if not len(heads):
        raise ExperimentError("no heads", "at least one head, as (layer, head)", "pass ranking.top(0.05)")
    n_heads = model.cfg.n_heads if kind == "head" else model.cfg.n_kv_heads
    pairs("heads", heads).check_mask("heads", (model.cfg.n_layers, n_heads))
    for layer, head in heads:
        if not (0 <= layer < model.cfg.n_layers and 0 <= head < n_heads):
            raise ExperimentError(
                f"{kind} (layer {layer}, {kind} {head}) of a model with {model.cfg.n_layers} x {n_heads}",
                f"a {kind} of this model's text stack",
                "check that the ranking was made on this model",
            )
    for layer in sorted({layer for layer, _ in heads}):
        model.select(f"blocks.{layer}.{Z}")


def check_layers(model: Any, layers: Layers, point: str) -> None:
    """Refuse layers the model does not have, or at which the point is not live."""
    indices("layers", layers).check_mask("layers", (model.cfg.n_layers,))
    if not layers:
        raise ExperimentError(f"{point!r} without layers", "at least one layer", "pass layers=[3], or range(4, 9)")
    for layer in layers:
        if not 0 <= layer < model.cfg.n_layers:
            raise ExperimentError(
                f"layer {layer} of a model with {model.cfg.n_layers}",
                f"0 to {model.cfg.n_layers - 1}",
                "count layers from 0",
            )
        model.select(f"blocks.{layer}.{point}")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool) or value is None else repr(value)
