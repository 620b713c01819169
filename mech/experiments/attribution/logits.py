"""Direct logit attribution: what every head, MLP and embedding writes directly to the answer, and from which tokens.

    found = logit_attribution(model, test, sources={"evidence": evidence, "question": "question"})
    found["heads"].mean("example")                 # logits of the answer's lead that each head writes directly
    found["by_source"].sel(set="evidence")         # ... and the part of them that comes from the evidence
    found["total"], found["logit_diff"]            # the sum of all parts, and the model's own: equal

The stream after the last layer is a sum: the embedding, and what each head and MLP added. At the position where the
answer is read, the final norm is a linear map once its scale is taken from the run (``mech.model.frozen_norm``), and so
is the unembedding. Sent through both, every part has its own share of the logit difference, and the shares add up
exactly. A post-norm (Gemma) or a gate between heads and stream is linear in the same way and is included.

It does not show what a head does through later layers: the answer can depend on a head that has no direct part
(``mech.activation_patching``, ``mech.path_patching``). And the norm's scale is held fixed, although it would change
without a part.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mech.arguments import NOT_EMPTY, Progress, Rule, checked
from mech.axes import EXAMPLE, HEAD, LAYER
from mech.data.samples import Sample, Samples
from mech.errors import ExperimentError, UnsupportedModel
from mech.experiments.metrics import LogitDiff, Reading
from mech.inputs import Inputs
from mech.inputs.layout import Where
from mech.model import AttentionCall, HookedMLLM
from mech.model.architectures.families import layers_of, module_at
from mech.model.named.norms import frozen_norm
from mech.model.named.projections import loaded
from mech.results import provenance

Given = Inputs | Sample | Sequence[Inputs] | Sequence[Sample]
Linear = Callable[[Float[Tensor, "*parts d_model"]], Float[Tensor, "*parts d_model"]]
Linear = Annotated[LogitDiff, Rule("mech.LogitDiff, which is linear in the logits", lambda metric: True)]
SET = "set"
POINTS = ("attn.hook_z", "hook_attn_out", "hook_mlp_out")
PARTS = ("heads", "mlps", "attention_rest", "embed", "rest", "bias")  # they sum to the logit difference


@checked
@torch.no_grad()
def logit_attribution(
    model: HookedMLLM,
    clean: Given,
    metric: Linear | None = None,
    *,
    sources: Annotated[Mapping[str, Where] | Sequence[Mapping[str, Where]], NOT_EMPTY] | None = None,
    progress: Progress | None = None,
) -> xr.Dataset:
    """The direct contribution of every head, MLP and embedding to the logit difference of each example.

    ``part(x) = N(x) . (W_U[answer] - W_U[wrong])`` with ``N`` the final norm, its scale frozen at the position that
    predicts the token; ``sum of all parts + bias = logit difference``, before a softcap of the logits.

    Sign: positive favours the answer. Unit: logits.

    Args:
        model: a hooked model.
        clean: samples, or inputs of one row each.
        metric: a ``LogitDiff``; by default each sample's answer against that of its counterfactual.
        sources: name -> key positions (as ``TokenLayout.positions`` takes them), the same for all examples or one
            mapping for each; every head's part is then also split by the tokens it comes from. For evidence pass
            ``[{"evidence": sample.evidence} for sample in samples]``.
        progress: called with (examples done, examples in all).

    Returns:
        ``heads`` (example, layer, head; nan in layers without heads), ``mlps`` and ``attention_rest`` (example, layer;
        the latter is the bias of W_O, or a layer without heads), ``embed``, ``rest`` (what a model adds between layers,
        as DeepStack does), ``bias`` (of norm and unembedding), ``total`` (their sum) and ``logit_diff`` (the model's
        own), over example; with ``sources`` also ``by_source`` (example, layer, head, set).

    Raises:
        ExperimentError: another metric, no wrong answer, sources that do not fit.
        UnsupportedModel: quantized W_O; sources if a gate follows the values, or if keys are in a memory.

    Cost: one forward for each example.

    References: Elhage et al. 2021 (the residual stream as a sum); nostalgebraist 2020 (logit lens).
    """
    rows = [clean] if isinstance(clean, Inputs | Sample) else list(clean)
    difference: LogitDiff = _default_metric(rows) if metric is None else metric
    named = [sources] * len(rows) if sources is None or isinstance(sources, Mapping) else list(sources)
    sets = list(named[0] or ()) if named else []
    if len(named) != len(rows) or any(list(positions or ()) != sets for positions in named) or not rows:
        raise ExperimentError(
            f"{len(named)} sources for {len(rows)} examples", "at least one example, and one mapping or one for each",
            'sources=[{"evidence": sample.evidence} for sample in samples]',
        )  # fmt: skip
    check_direct(model, sources is not None)
    # With the answer appended, so that a token of it after the first can be read.
    inputs = [model.inputs_of(row, answer=bool(row.answer.strip())) if isinstance(row, Sample) else row for row in rows]
    readings = [difference.reading(model, row.layout, i) for i, row in enumerate(inputs)]
    asked = [_Question.of(model, *positions) for positions in zip(inputs, readings, named, strict=True)]
    parts: list[dict[str, np.ndarray]] = []
    for i, (row, question) in enumerate(zip(inputs, asked, strict=True)):
        parts.append(_parts(model, row, question))
        if progress:
            progress(i + 1, len(inputs))
    return _dataset(model, rows, parts, sets)


def check_direct(model: HookedMLLM, by_source: bool) -> None:
    """Refuse models whose heads' direct contributions cannot be computed.

    Raises:
        UnsupportedModel: see ``logit_attribution``.
    """
    if any(model.blocks[layer].attn.W_O is None for layer in model.cfg.attention_layers):
        raise UnsupportedModel(f"{model.name}, whose W_O is quantized", "weights in full precision", "open it without "
                               "quantization=")  # fmt: skip
    if by_source and (model.family.text.gated or model.cfg.cross_layers):
        what = "a gate after its values" if model.family.text.gated else "visual tokens in a memory"
        raise UnsupportedModel(
            f"what single tokens contribute to the heads of {model.cfg.family}, which has {what}",
            "values of the sequence that reach W_O unchanged", "patch heads instead",
        )  # fmt: skip


def head_maps(
    model: HookedMLLM, layer: int, z: Float[Tensor, "head d_head"]
) -> tuple[Float[Tensor, "head d_head d_model"], Linear]:
    """W_O of every head of a layer, and what lies between it and the stream, as the linear map it is at ``z``."""
    block, stack, weights = layers_of(model.hf_model, model.family.text)[layer], model.family.text, model.blocks[layer]
    W_O, b_O = weights.attn.W_O.to(z), weights.attn.b_O
    if stack.attn_out:
        written = torch.einsum("hd,hdm->m", z, W_O) + (0 if b_O is None else b_O.to(z))
        return W_O, frozen_norm(module_at(block, stack.attn_out), written[None])
    if not stack.attn_gain:
        return W_O, lambda parts: parts
    with loaded(block):
        gain = stack.attn_gain(block)
        gain = None if gain is None else gain.to(z)
    return W_O, lambda parts: parts if gain is None else parts * gain.to(parts)


def carried_on(model: HookedMLLM) -> list[float]:
    """The factor on the stream from each layer's input to the last layer's output (Gemma 4); 1 elsewhere."""
    scalars = [float(getattr(block, "layer_scalar", 1.0)) for block in layers_of(model.hf_model, model.family.text)]
    return [*np.cumprod(scalars[::-1])[::-1].tolist(), 1.0]


def softcap(model: HookedMLLM) -> float | None:
    """The bound of the logits, ``c tanh(logit / c)`` (Gemma 2 and 4), or None."""
    return getattr(model.hf_model.config.get_text_config(), "final_logit_softcapping", None)


@dataclass(frozen=True, eq=False)
class _Question:
    """How one example is read: at which position, and which logits with which sign make its difference."""

    at: int
    tokens: Tensor
    signs: Tensor
    keys: Float[Tensor, "set key_pos"] | None

    @classmethod
    def of(cls, model: HookedMLLM, row: Inputs, reading: Reading, sources: Mapping[str, Where] | None) -> "_Question":
        with torch.enable_grad():  # the difference is linear, so its slope is its weights
            logits = torch.zeros(1, 1, model.W_U.shape[1], requires_grad=True)
            slope = torch.autograd.grad(reading.score(logits, logits[0].detach()).sum(), logits)[0][0, 0]
        tokens = slope.nonzero().flatten()
        keys = None
        if sources is not None:
            keys = torch.zeros(len(sources), len(row.layout))
            for index, where in enumerate(sources.values()):
                keys[index, torch.as_tensor(row.layout.positions(where))] = 1
        return cls(reading.positions[0], tokens, slope[tokens], keys)

    def of_logits(self, logits: Float[Tensor, "... vocab"]) -> Float[Tensor, "..."]:
        return (logits[..., self.tokens.to(logits.device)] * self.signs.to(logits)).sum(-1)


def _parts(model: HookedMLLM, row: Inputs, asked: _Question) -> dict[str, np.ndarray]:
    """All parts of one example, as [layer head], [layer] or numbers."""
    n = model.cfg.n_layers
    seen, values, logits = _run(model, row, asked)
    final_norm, carried = model.norm(n), carried_on(model)
    columns = model.W_U[:, asked.tokens].to(torch.promote_types(logits.dtype, torch.float32))
    direction = columns @ asked.signs.to(columns)
    stream = seen[f"blocks.{n - 1}.hook_resid_post"].to(direction.device)
    through = frozen_norm(final_norm, stream[None])

    def said(part: Tensor, layer: int) -> Tensor:
        return (through(part.to(direction)[None] * carried[layer]) @ direction)[0]

    heads = direction.new_full((n, model.cfg.n_heads), torch.nan)
    by_source = direction.new_full((n, model.cfg.n_heads, 0 if asked.keys is None else len(asked.keys)), torch.nan)
    mlps, rest = direction.new_zeros(2, n)
    written = seen["hook_embed"].to(direction) * carried[0]
    for layer in range(n):
        for point, into in (("hook_attn_out", rest), ("hook_mlp_out", mlps)):
            if (out := seen.get(f"blocks.{layer}.{point}")) is not None:
                into[layer] = said(out, layer)
                written = written + out.to(direction) * carried[layer]
        if (z := seen.get(f"blocks.{layer}.attn.hook_z")) is not None:
            W_O, between = head_maps(model, layer, z.to(direction))
            heads[layer] = said(between(torch.einsum("hd,hdm->hm", z.to(direction), W_O)), layer)
            rest[layer] -= heads[layer].sum()
            if layer in values:
                by_source[layer] = said(between(torch.einsum("hsd,hdm->hsm", values[layer].to(W_O), W_O)), layer)
    parts = {
        "heads": heads,
        "mlps": mlps,
        "attention_rest": rest,
        "embed": said(seen["hook_embed"], 0),
        "rest": said(stream.to(direction) - written, n),
        "bias": (final_norm(stream[None])[0].to(stream.device) - through(stream[None])[0]).to(direction) @ direction
        + asked.of_logits(model.b_U.to(direction)),
        "logit_diff": asked.of_logits(logits.to(direction)),
        "by_source": by_source,
    }
    return {name: value.double().cpu().numpy() for name, value in parts.items()}


def _run(
    model: HookedMLLM, row: Inputs, asked: _Question
) -> tuple[dict[str, Tensor], dict[int, Float[Tensor, "head set d_head"]], Tensor]:
    """The points at the position that is read, what each head took from each set of keys there, and the logits."""
    seen: dict[str, Tensor] = {}
    values: dict[int, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        seen[hook.name] = value[0, asked.at]

    def read_call(call: AttentionCall) -> None:
        if asked.keys is not None:
            looked = call.rows([asked.at])[0]  # [head 1 key_pos]
            taken = looked * asked.keys.to(looked)
            values[call.layer] = taken @ call.v[0].to(looked).repeat_interleave(len(looked) // call.v.shape[1], 0)

    n, live = model.cfg.n_layers, set(model.points())
    names = [f"blocks.{layer}.{point}" for layer in range(n) for point in POINTS]
    names = ["hook_embed", *(name for name in names if name in live), f"blocks.{n - 1}.hook_resid_post"]
    with model.hooks([(name, keep) for name in names]), model.attending(read_call):
        logits = model(row)[0, asked.at]
    return seen, values, logits


def _default_metric(rows: Sequence[Inputs | Sample]) -> LogitDiff:
    if any(not isinstance(row, Sample) or row.counterfactual is None for row in rows):
        raise ExperimentError(
            "no metric, and examples without a counterfactual", "a wrong answer for each",
            "pass mech.LogitDiff(answer, wrong)",
        )  # fmt: skip
    pairs = [(row.answer, row.counterfactual.answer) for row in rows if isinstance(row, Sample) and row.counterfactual]
    answers, wrong = zip(*pairs, strict=True) if pairs else ((), ())
    return LogitDiff(answers, wrong)


def _dataset(
    model: HookedMLLM, rows: Sequence[Inputs | Sample], parts: list[dict[str, np.ndarray]], sets: list[str]
) -> xr.Dataset:
    dims = {"heads": (LAYER, HEAD), "mlps": (LAYER,), "attention_rest": (LAYER,), "by_source": (LAYER, HEAD, SET)}
    value = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    axes = {name: tuple(range(1, array.ndim)) for name, array in value.items()}
    value["total"] = sum((np.nansum(value[name], axis=axes[name]) for name in PARTS), np.zeros(len(parts)))
    if not sets:
        del value["by_source"]
    samples = Samples([row for row in rows if isinstance(row, Sample)])
    result = xr.Dataset(
        {name: ((EXAMPLE, *dims.get(name, ())), array) for name, array in value.items()},
        {
            EXAMPLE: [row.id or str(i) if isinstance(row, Sample) else str(i) for i, row in enumerate(rows)],
            LAYER: np.arange(model.cfg.n_layers),
            HEAD: np.arange(model.cfg.n_heads),
            **({SET: sets} if sets else {}),
        },
        {
            "kind": "logit_attribution",
            "model": model.name,
            "softcap": softcap(model),
            "provenance": provenance(model, samples if len(samples) else None, metric="logit difference"),
        },
    )
    for name in result.data_vars:
        result[name].attrs = {"unit": LogitDiff.unit, "sign": "more: speaks for the answer"}
    return result
