"""Changed head outputs: the arithmetic of ``Ablate``, ``Knockout`` and ``Redirect`` inside one attention call.

It works on an ``AttentionCall`` and never builds a query x key tensor for all rows at once.
"""

from dataclasses import replace

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech.errors import ExperimentError
from mech.interventions.reference import Reference
from mech.interventions.specs import Ablate
from mech.interventions.where import Plan, for_beams
from mech.model import AttentionCall

ROWS = 512  # query rows per block when attention is computed: bounds memory at 512 x S


def span(call: AttentionCall) -> tuple[int, int]:
    """The first position of the call's query rows in the sequence, and the one after the last."""
    return call.query_start, call.query_start + call.q.shape[2]


def replacement(spec: Ablate, call: AttentionCall, plan: Plan) -> Float[Tensor, "batch pos head d_head"]:
    """The heads' output under an ablation."""
    if spec.to == "zero":
        return torch.zeros_like(call.z)
    if spec.to == "uniform":
        return _grouped(_mean_of_visible(call), call)
    if spec.to == "paper":
        return _grouped(_mean_of_all(call, for_beams(plan.prompt_end, call.q.shape[0])), call)
    return drawn(spec, call.layer, plan, *span(call), batch=call.q.shape[0])[..., : call.z.shape[-1]]


def drawn(spec: Ablate, layer: int, plan: Plan, start: int, stop: int, batch: int) -> Float[Tensor, "batch pos ..."]:
    """The values from reference samples that ``mean`` and ``resample`` put in."""
    reference = spec.reference
    if not isinstance(reference, Reference):
        raise ExperimentError(f"{spec!r} without reference activations", "a Reference", "run it through intervene")
    kind = for_beams(plan.kinds(start, stop), batch).to(reference.mean.device)
    if spec.to == "mean":
        return reference.mean[kind, layer]
    draw = for_beams(plan.draw(spec.seed, reference.draws.shape[1], start, stop), batch).to(reference.draws.device)
    return reference.draws[kind, draw, layer]


def knocked_out(
    call: AttentionCall,
    z: Float[Tensor, "batch pos head d_head"],
    query: Bool[Tensor, "batch pos"],
    key: Bool[Tensor, "batch key_pos"],
    heads: Bool[Tensor, " head"],
) -> tuple[Float[Tensor, "batch pos head d_head"], bool]:
    """z with the rows of ``query`` cut off from ``key``, and whether any of them attended to it.

    A row that could attend to nothing else outputs zero.
    """
    z, cut = z.clone(), False
    rows = query.any(0).nonzero().flatten()
    for part in rows.split(ROWS):
        seen = call.rows(part)
        allowed = seen * ~key[:, None, None, :]
        cut = cut or bool(((seen - allowed).sum(-1) > 0)[:, 0][query[:, part]].any())
        allowed = allowed / allowed.sum(-1, keepdim=True).clamp(min=torch.finfo(allowed.dtype).tiny)
        chosen = query[:, part, None, None] & heads[None, None, :, None]
        z[:, part] = torch.where(chosen, _mixed(allowed, call, z), z[:, part])
    return z, cut


def redirected(
    call: AttentionCall,
    z: Float[Tensor, "batch pos head d_head"],
    query: Bool[Tensor, "batch pos"],
    key: Bool[Tensor, "batch key_pos"],
    bias: float,
    heads: Bool[Tensor, " head"],
) -> tuple[Float[Tensor, "batch pos head d_head"], bool]:
    """z with the rows of ``query`` pulled towards ``key``, and whether any of them can see it."""
    z, pulled = z.clone(), False
    rows = query.any(0).nonzero().flatten()
    for part in rows.split(ROWS):
        pattern = call.rows(part, bias=bias * key[:, None, None, :].to(torch.promote_types(z.dtype, torch.float32)))
        reach = (call.visible(part) & key[:, None, None, :]).any(-1).any(1)
        pulled = pulled or bool(reach[query[:, part]].any())
        z[:, part] = torch.where(
            query[:, part, None, None] & heads[None, None, :, None], _mixed(pattern, call, z), z[:, part]
        )
    return z, pulled


def _mixed(
    pattern: Float[Tensor, "batch head row key_pos"], call: AttentionCall, z: Tensor
) -> Float[Tensor, "batch row head d_head"]:
    """The heads' output under an attention pattern."""
    batch, n_heads, n_rows, keys = pattern.shape
    grouped = pattern.reshape(batch, call.v.shape[1], -1, keys) @ call.v.to(pattern)
    return grouped.reshape(batch, n_heads, n_rows, -1).transpose(1, 2).to(z)


def _wide(values: Tensor) -> Tensor:
    """Values in a dtype wide enough for sums over many keys: at least float32; float64 stays float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _grouped(mean: Float[Tensor, "batch kv_head pos d_head"], call: AttentionCall) -> Tensor:
    return repeat(mean, "batch kv pos d -> batch pos (kv group) d", group=call.q.shape[1] // mean.shape[1])


def _mean_of_visible(call: AttentionCall) -> Float[Tensor, "batch kv_head pos d_head"]:
    start, stop = span(call)
    v = _wide(call.v)
    if call.mask is None and call.causal and call.head_mask is None:
        count = torch.arange(1, v.shape[2] + 1, device=v.device)[:, None]
        return (v.cumsum(2) / count)[:, :, start:stop]
    means = []
    for first in range(0, stop - start, ROWS):
        rows = torch.arange(first, min(first + ROWS, stop - start), device=v.device)
        weight = call.visible(rows).to(v)
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=1)
        if weight.shape[1] > 1:  # narrowed heads: each sees its own keys
            own = repeat(v, "batch kv key d -> batch (kv group) key d", group=weight.shape[1] // v.shape[1])
            means.append(weight @ own)
            continue
        # not `@`: that would copy the weights for every head
        means.append(torch.einsum("brk,bhkd->bhrd", weight[:, 0], v))
    return torch.cat(means, dim=2)


def _mean_of_all(call: AttentionCall, prompt_end: Int[Tensor, " batch"]) -> Float[Tensor, "batch kv_head pos d_head"]:
    """Every row of the prompt sees the whole prompt; a later row sees everything up to itself."""
    start, stop = span(call)
    # The last row sees every key that is not padding.
    v = _wide(call.v)
    real = replace(call, head_mask=None).visible([call.q.shape[2] - 1])[..., 0, :, None].to(v)
    mean = (v * real).cumsum(2) / real.cumsum(2).clamp(min=1)
    rows = torch.arange(start, stop, device=mean.device)
    if call.cross:  # the first row already sees the whole memory
        return mean[:, :, -1:].expand(-1, -1, stop - start, -1)
    seen = torch.maximum(rows[None], prompt_end.to(mean.device)[:, None] - 1).clamp(max=mean.shape[2] - 1)
    return mean.gather(2, seen[:, None, :, None].expand(-1, mean.shape[1], -1, mean.shape[3]))
