"""Attention during training: every head mixed with its local version, and the attention it pays to distant keys.

    with gated(model, inputs, policy, gates):              # g dense + (1 - g) local, head by head
        model(inputs)
    with far_mass(model, inputs, policy) as masses:        # attention outside of sinks and window
        model(inputs)
    torch.stack(masses)                                    # [layer head]

The local branch is ``split_heads``, the attention that ``localize`` runs, whose cost is linear in the length: a gate of
0 gives the logits of the served model, a gate of 1 those of the dense model.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mech.inputs import Inputs
from mech.model import AttentionCall, HookedMLLM
from mech.sparse.kernels import split_heads
from mech.sparse.masks import Near
from mech.sparse.plan import Plan
from mech.sparse.policy import Policy

FINAL = "ln_final.hook_normalized"
Gates = Float[Tensor, "layer kv_head"] | Float[Tensor, "batch layer kv_head"]


def near_of(inputs: Inputs, policy: Policy) -> Near:
    """What a policy's local heads can see in a batch that is run in one forward, answers included."""
    mask = inputs.tensors["attention_mask"]
    return Near(policy, mask.argmax(1), torch.full((len(mask),), mask.shape[1], device=mask.device))


@contextmanager
def gated(model: HookedMLLM, inputs: Inputs, policy: Policy, gates: Gates) -> Iterator[None]:
    """While open, every head's output is ``gate * dense + (1 - gate) * local``, with the gate of its KV head.

    Cost: dense attention plus local attention, and memory for both in the backward pass.
    """
    near = near_of(inputs, policy)
    place = {layer: i for i, layer in enumerate(model.cfg.attention_layers)}

    def mix(call: AttentionCall) -> Tensor | None:
        if call.cross:  # visual tokens outside the sequence have no window
            return None
        heads, groups = call.q.shape[1], call.k.shape[1]
        local = split_heads(call, near, Plan.of(torch.zeros(heads, dtype=torch.bool), groups))
        gate = gates[..., place[call.layer], :].to(call.z).repeat_interleave(heads // groups, dim=-1)
        gate = gate[:, None, :, None] if gate.ndim == 2 else gate[:, None]
        return gate * call.z + (1 - gate) * torch.nan_to_num(local)  # a row of padding sees nothing

    with model.attending(mix):
        yield


@contextmanager
def far_mass(model: HookedMLLM, inputs: Inputs, policy: Policy) -> Iterator[list[Float[Tensor, " head"]]]:
    """While open, one forward fills the list with the attention mass on keys that a local head would not see.

    ``mean over rows x of sum over y outside sinks and window of A[x, y]``, layer by layer, differentiable. Rows of
    padding are left out.

    Cost: the whole attention pattern of every layer, in float32.
    """
    near, real = near_of(inputs, policy), inputs.tensors["attention_mask"].bool()
    found: list[Tensor] = []

    def read(call: AttentionCall) -> None:
        if not call.cross:
            rows = torch.arange(call.q.shape[2], device=call.q.device)
            far = call.rows(rows) * ~near.seen(rows, rows)[:, None]
            found.append(_over_rows(far.sum(-1), real))

    with model.attending(read):
        yield found


def _over_rows(mass: Float[Tensor, "batch head row"], real: Bool[Tensor, "batch row"]) -> Float[Tensor, " head"]:
    return (mass * real[:, None]).sum((0, 2)) / real.sum()


def final_states(model: HookedMLLM, inputs: Inputs) -> Float[Tensor, "batch pos d_model"]:
    """The states before unembedding at all positions, in float32; only the last position is unembedded."""
    kept: list[Tensor] = []
    with model.hooks([(FINAL, lambda value, hook: kept.append(value))]):
        model(inputs, logits_to_keep=1)
    return kept[0].float()
