"""Where each activation point meets the Hugging Face model.

A ``Seam`` says: this point is the input (or the output) of this module, seen in this shape. Seams are data; a torch
hook exists only while the wrapped model runs and only for points that somebody hooked, so an idle model carries none
and nothing can be left behind by an exception.

Hooks are registered with ``prepend=True``: at their first forward, transformers' models install hooks of their own
that capture outputs, and LLaVA's projector reads what those captured. A hook behind them changes nothing.

``hook_rot_q``, ``hook_rot_k``, ``hook_attn_scores`` and ``hook_pattern`` have no seam: they live inside the attention
function (``attention.py``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint

from mech.model.families import Family, ModelConfig, Stack, module_at
from mech.model.points import fire, point_name

INSIDE_ATTENTION = ("attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_attn_scores", "attn.hook_pattern")


@dataclass(frozen=True)
class Seam:
    """One point at one module.

    Attributes:
        point: full name of the point.
        module: the module whose input or output the point is.
        side: "in", "out", "mid" (an input that is also the skip connection) or "result" (heads of an output).
        heads: number of heads the last dimension is split into, 0 for none.
        part: which third of a fused q, k, v projection, None where they are separate.
        argument: the keyword of the input, where it is not positional.
        flat: whether all leading dimensions are one (the projector's tokens).
    """

    point: str
    module: nn.Module
    side: str
    heads: int = 0
    part: int | None = None
    argument: str = "hidden_states"
    flat: bool = False

    def view(self, tensor: Tensor) -> Tensor:
        """The activation as the point's table describes it."""
        if self.flat:
            return tensor.reshape(-1, tensor.shape[-1])
        rows = tensor if tensor.ndim == 3 else tensor.unsqueeze(0)
        if self.part is not None:
            return rows.unflatten(-1, (3, self.heads, -1))[:, :, self.part]
        return rows.unflatten(-1, (self.heads, -1)) if self.heads else rows

    def restore(self, written: Tensor, tensor: Tensor) -> Tensor:
        """Back from the point's shape to the module's."""
        if self.part is None:
            return written.reshape(tensor.shape)
        parts = list(tensor.unflatten(-1, (3, self.heads, -1)).unbind(-3))
        parts[self.part] = written.reshape(parts[self.part].shape)
        return torch.stack(parts, dim=-3).reshape(tensor.shape)

    def run(self, point: HookPoint, tensor: Tensor) -> Tensor:
        """The tensor with the point's hooks applied.

        What the hooks saw is put back even if they returned nothing: they may have written in place, and a gradient
        they kept must lie on the way to the logits.
        """
        return self.restore(fire(point, self.view(tensor)), tensor)

    def attach(self, point: HookPoint) -> RemovableHandle:
        """Register the torch hook that serves the point."""
        if self.side in ("in", "mid"):
            before = _on_stream if self.side == "mid" else _on_input
            return self.module.register_forward_pre_hook(partial(before, self, point), prepend=True, with_kwargs=True)
        after = _on_heads if self.side == "result" else _on_output
        return self.module.register_forward_hook(partial(after, self, point), prepend=True)


def _on_input(seam: Seam, point: HookPoint, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if args:
        return (seam.run(point, args[0]), *args[1:]), kwargs
    return args, {**kwargs, seam.argument: seam.run(point, kwargs[seam.argument])}


def _on_stream(seam: Seam, point: HookPoint, module: nn.Module, args: tuple, kwargs: dict) -> None:
    # The layer adds this very tensor back after the MLP. Writing into it is the one way that reaches both branches
    # without rounding; the hooks get a copy, so that what they keep is not what is overwritten.
    stream = args[0] if args else kwargs[seam.argument]
    stream.copy_(seam.run(point, stream.clone()))


def _on_output(seam: Seam, point: HookPoint, module: nn.Module, args: tuple, output: Any) -> Any:
    if isinstance(output, Tensor):
        return seam.run(point, output)
    if isinstance(output, tuple):
        return (seam.run(point, output[0]), *output[1:])
    output.pooler_output = seam.run(point, output.pooler_output)
    return output


def _on_heads(seam: Seam, point: HookPoint, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    z = seam.view(args[0])
    result = torch.einsum("bphd,hdm->bphm", z, head_weights(module, seam.heads))
    written = fire(point, result)
    # Only the difference is added, so heads that were not written keep the projection's own rounding. The constants
    # are detached so that the gradient of the output flows through what the hook returned.
    change = (written - result.detach()).sum(2).reshape(output.shape)
    bias = getattr(module, "bias", None)
    return output.detach() + change + (0.0 if bias is None else bias - bias.detach())


def head_weights(projection: nn.Module, heads: int) -> Tensor:
    """W_O by head, ``[head d_head d_model]``: a view of the projection's weight."""
    weight: Any = projection.weight
    return weight.unflatten(1, (heads, -1)).permute(1, 2, 0)


def stack_seams(model: nn.Module, stack: Stack, kind: str, layers: int, cfg: ModelConfig, family: Family) -> list[Seam]:
    """The seams of one stack's first ``layers`` layers, in the order in which they fire."""
    heads, kv_heads = (cfg.n_heads, cfg.n_kv_heads) if kind == "text" else (cfg.vision_heads, cfg.vision_heads)
    blocks: Any = module_at(model, stack.layers, family)
    seams: list[Seam] = []
    for index in range(layers):
        block = blocks[index]

        def add(point: str, module: str | nn.Module, side: str, index=index, block=block, **options: Any) -> None:
            at = module if isinstance(module, nn.Module) else module_at(block, module, family)
            seams.append(Seam(point_name(point, index, kind), at, side, **options))

        add("hook_resid_pre", block, "in")
        for part, (letter, path, count) in enumerate(
            (("q", stack.q, heads), ("k", stack.k, kv_heads), ("v", stack.v, kv_heads))
        ):
            add(f"attn.hook_{letter}", path, "out", heads=count, part=part if stack.qkv else None)
        add("attn.hook_z", stack.o, "in", heads=heads)
        add("attn.hook_result", stack.o, "result", heads=heads)
        add("hook_attn_out", stack.attn, "out")
        add("hook_resid_mid", stack.mid, "mid")
        add("mlp.hook_post", stack.down, "in")
        add("hook_mlp_out", stack.mlp, "out")
        if stack.post_at == "output":
            add("hook_resid_post", block, "out")
        else:
            last = index + 1 == len(blocks)
            add("hook_resid_post", module_at(model, family.final_norm, family) if last else blocks[index + 1], "in")
    return seams


def joining_seams(model: nn.Module, family: Family) -> list[Seam]:
    """The seams between and behind the stacks."""
    return [
        Seam("projector.hook_out", module_at(model, family.projector, family), "out", flat=True),
        Seam("hook_embed", module_at(model, family.text.root, family), "in", argument="inputs_embeds"),
        Seam("ln_final.hook_normalized", module_at(model, family.final_norm, family), "out"),
    ]


def merge_windows(keyword: str, store: Callable[[Tensor], None]) -> Callable:
    """A pre-hook for an attention module that calls attention once per window.

    It makes the module see one window of full length and hands the true boundaries to ``store``; the attention
    function turns them into a block-diagonal mask. So hooks and observers see the layer once and whole.
    """

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        boundaries = kwargs[keyword]
        store(boundaries)
        return args, {**kwargs, keyword: torch.stack((boundaries[0], boundaries[-1]))}

    return before
