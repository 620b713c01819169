"""Dense heads chosen anew for every input, without evidence: what would the question lose if this head were local?

    fast = mech.localize_dynamic(model, 0.05, sinks=4, window=256)
    fast.generate_text(inputs, max_new_tokens=8)
    fast.policy(inputs)                                    # the heads this input gets

The score is ``reach``: how far a head's output at the question's rows would move if the head saw only sinks and window.
It takes one dense pass and the question's rows of the attention, with no annotation and no training. Averaged over
samples it is a static ranking like any other (``mech.rank_heads(reach(model, samples))``); computed on one input it
chooses the heads for that input. With ``layers=n`` only the first ``n`` layers are run and read.

The pass that chooses is dense, so prefill gains nothing unless ``layers`` is small; the savings are in the cache and in
every generated token. Each row of a batch would need its own set of heads, so one row is run at a time.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from mech.arguments import Amount, Count, Progress, Whole, checked, one_of
from mech.axes import EXAMPLE, HEAD, LAYER
from mech.data.samples import Sample, Samples
from mech.errors import ExperimentError, InputError, UnsupportedModel
from mech.experiments.ranking.ranking import Ranking, head_count
from mech.inputs import Inputs
from mech.model import AttentionCall, HookedMLLM
from mech.results import provenance
from mech.scale.measures import per_sample
from mech.sparse.groups import expanded, grouped
from mech.sparse.localize import localize
from mech.sparse.masks import Near
from mech.sparse.policy import PHASES, Policy


def reach(
    model: HookedMLLM,
    samples: Samples | Sequence[Sample],
    *,
    sinks: int = 4,
    window: int = 256,
    layers: int | None = None,
    progress: Progress | None = None,
) -> xr.Dataset:
    """How much each head's output at the question depends on keys beyond sinks and window, sample by sample.

    ``reach = max over x in question of | (z[x] - z_local[x]) W_O |`` with ``z_local`` the head's output when its
    attention at x is confined to sinks and window and renormalised.

    Sign: the higher, the more is lost if the head is local. Unit: length in the residual stream (before a post-norm).

    Args:
        model: a hooked model with weights in floating point.
        samples: samples; they need no evidence.
        sinks, window: what a local head sees, as in ``Policy``.
        layers: run and read only this many layers, from the first on; the others score 0.
        progress: called with (samples done, samples in all).

    Returns:
        ``reach`` with dims example, layer, head.

    Raises:
        ExperimentError: no samples, or ``layers`` that the model does not have.
        UnsupportedModel: quantized weights.

    Cost: one dense forward per sample (through the first ``layers``), and the question's rows of the attention.

    References: arXiv 2606.05843 leaves choosing heads per input open; the score is ours.
    """
    samples = Samples(samples)
    if not len(samples):
        raise ExperimentError("no samples", "at least one", "pass samples=find")
    data = per_sample_reach(
        model, samples, sinks=sinks, window=window, layers=layers, batch_size=1, progress=progress
    )  # fmt: skip
    data["reach"].attrs.update(unit="length in the residual stream", sign="more: more is lost if the head is local")
    settings = {"sinks": sinks, "window": window, "layers": layers}
    return data.assign_attrs(
        model=model.name, domain=", ".join(samples.domains), **{k: v for k, v in settings.items() if v is not None},
        provenance=provenance(model, samples, **settings),
    )  # fmt: skip


@per_sample("reach")
def per_sample_reach(
    model: HookedMLLM,
    samples: Samples,
    *,
    sinks: int,
    window: int,
    layers: int | None,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> xr.Dataset:
    """The values of ``reach``, sample by sample."""
    found = []
    for i, sample in enumerate(samples, start=1):
        found.append(reach_of(model, model.inputs_of(sample), sinks=sinks, window=window, layers=layers).cpu().numpy())
        if progress:
            progress(i, len(samples))
    coords = {EXAMPLE: samples.names, LAYER: list(model.cfg.attention_layers), HEAD: np.arange(model.cfg.n_heads)}
    return xr.Dataset({"reach": ((EXAMPLE, LAYER, HEAD), np.stack(found).astype(np.float64))}, coords)


@torch.no_grad()
def reach_of(
    model: HookedMLLM, inputs: Inputs, *, sinks: int = 4, window: int = 256, layers: int | None = None, **options: Any
) -> Float[Tensor, "layer head"]:
    """``reach`` for one row of inputs; ``options`` go to the forward. Layers are ``cfg.attention_layers``."""
    cfg = model.cfg
    if len(inputs) != 1:
        raise InputError(f"a batch of {len(inputs)} rows", "one row: heads are chosen for each input", "run one by one")
    if layers is not None and not 1 <= layers <= cfg.n_layers:
        raise ExperimentError(f"layers={layers}", f"1 to {cfg.n_layers}, as {model.name} has", "leave it out for all")
    rows = torch.as_tensor(inputs.layout.positions("question"), device=model.device)
    first = inputs.tensors["attention_mask"].argmax(1)
    near = Near(Policy((), sinks, window), first, torch.full_like(first, len(inputs.layout)))
    weights = [block.attn.W_O for block in model.blocks]
    found = torch.zeros(len(cfg.attention_layers), cfg.n_heads, device=model.device)

    def read(call: AttentionCall) -> None:
        if layers is not None and call.layer >= layers:
            raise _Enough
        weight = weights[call.layer]
        if weight is None:
            raise UnsupportedModel(f"quantized weights in layer {call.layer}", "weights in floating point")
        if not call.cross:  # cross-attention to visual tokens has no window
            found[cfg.attention_layers.index(call.layer)] = _moved(call, near, rows, weight)

    try:
        with model.attending(read):
            model(inputs, **{"logits_to_keep": 1, **options})
    except _Enough:
        pass
    return found


def _moved(
    call: AttentionCall, near: Near, rows: Int[Tensor, " row"], weight: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, " head"]:
    """How far each head's output moves at the row where it moves most."""
    rows, near = rows.to(call.q.device), near.to(call.q.device)
    pattern = call.rows(rows)
    seen = near.seen(rows, torch.arange(pattern.shape[-1], device=rows.device))[:, None]
    local = pattern * seen
    kept = local.sum(-1, keepdim=True)
    if call.sinks is not None:  # the layer's own sink keeps its share
        kept = kept + 1 - pattern.sum(-1, keepdim=True)
    local = local / kept.clamp(min=torch.finfo(kept.dtype).tiny)
    change = (pattern - local).reshape(1, call.v.shape[1], -1, pattern.shape[-1]) @ call.v.to(pattern)
    change = change.reshape(call.q.shape[1], len(rows), -1)
    return torch.einsum("hrd,hdm->hrm", change, weight.to(change)).norm(dim=-1).amax(-1)


class _Enough(Exception):
    """Raised once the last layer to be read has been passed."""


@checked
def localize_dynamic(
    model: HookedMLLM,
    n: Amount,
    *,
    sinks: Whole = 4,
    window: Count = 256,
    layers: Count | None = None,
    keep_text: bool = False,
    phase: one_of(PHASES) = "both",
) -> "Dynamic":
    """A model that chooses its dense heads anew for every input, by ``reach``.

    Args:
        model: a hooked model.
        n: how many KV heads stay dense with all their query heads, or a share of all (see ``Ranking.count``).
        layers: how many layers the heads are chosen from; see ``reach``.
        sinks, window, keep_text, phase: see ``Policy``.

    Raises:
        ExperimentError: settings that no policy allows.

    Cost: for every input one dense pass through ``layers``, in addition to the run itself.
    """
    policy = Policy((), sinks, window, keep_text, phase)
    count = head_count(n, len(model.cfg.attention_layers) * model.cfg.n_kv_heads, "n")
    return Dynamic(model, policy, count, layers)


class Dynamic:
    """What ``localize_dynamic`` returns: call it, or generate with it, one row of inputs at a time."""

    def __init__(self, model: HookedMLLM, policy: Policy, n: int, layers: int | None = None):
        self.model, self.n, self.layers = model, n, layers
        self._base = policy

    def __repr__(self) -> str:
        where = "" if self.layers is None else f" of the first {self.layers} layers"
        return f"Dynamic({self.model.name}, {self.n} KV heads{where}, window={self._base.window})"

    def policy(self, inputs: Inputs, **options: Any) -> Policy:
        """The policy for one input; ``options`` go to the forward that chooses."""
        base = self._base
        found = reach_of(self.model, inputs, sinks=base.sinks, window=base.window, layers=self.layers, **options)
        return chosen(self.model, found, self.n, base)

    def __call__(self, inputs: Inputs, **options: Any) -> Float[Tensor, "batch pos vocab"]:
        """The logits of one row under its own policy."""
        with localize(self.model, self.policy(inputs, **_pictures(options))) as fast:
            return fast(inputs, **options)

    def generate(self, inputs: Inputs, **options: Any) -> Int[Tensor, "batch new_pos"]:
        """``HookedMLLM.generate`` of one row under its own policy."""
        with localize(self.model, self.policy(inputs)) as fast:
            return fast.generate(inputs, **options)

    def generate_text(self, inputs: Inputs, **options: Any) -> list[str]:
        """``HookedMLLM.generate_text`` of one row under its own policy."""
        with localize(self.model, self.policy(inputs)) as fast:
            return fast.generate_text(inputs, **options)

    def answer(self, inputs: Inputs, **options: Any) -> str:
        """``HookedMLLM.answer`` of one row under its own policy."""
        with localize(self.model, self.policy(inputs)) as fast:
            return fast.answer(inputs, **options)


def chosen(model: HookedMLLM, scores: Float[Tensor, "layer head"] | np.ndarray, n: int, base: Policy) -> Policy:
    """The policy whose dense heads are the ``n`` highest-scoring KV heads."""
    of_one = Ranking(np.asarray(torch.as_tensor(scores).cpu().double()), layers=model.cfg.attention_layers)
    heads = expanded(grouped(of_one, model.cfg).heads[:n], model.cfg)
    return Policy(heads, base.sinks, base.window, base.keep_text, base.phase)


def _pictures(options: dict[str, Any]) -> dict[str, Any]:
    seen = options.get("mm_encoder_outputs")
    return {} if seen is None else {"mm_encoder_outputs": dict(seen)}
