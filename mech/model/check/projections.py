"""The law of weights: every named weight is what the model multiplies by, adapters included."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from mech.model.architectures.families import layers_of, module_at, part_at
from mech.model.check.trial import Batches, Finding, apart, layers, reached, special_tokens
from mech.model.hook_sites import attention_of
from mech.model.named.projections import linear_map

# From what a projection read and returned: two values that must agree.
Claim = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def weights(model: Any, batches: Batches) -> Iterator[Finding]:
    """Every named weight is what the model multiplies by.

    * ``x W + b`` is what a projection returned for the ``x`` it was given, with W and b from ``model.blocks[layer]``,
      and with ``W_U`` and ``b_U``;
    * ``hook_q``, ``hook_k`` and ``hook_v`` are this too, and ``hook_result`` summed over heads, plus the bias, is what
      the output projection returned;
    * ``hook_embed`` at a text token is its row of ``W_E``.

    The other side is what the current modules return in this same forward. Forwards: 1, on the padded batch.
    """
    batch, seen, off = batches.padded, {}, {}

    def keep(value: Tensor, hook: Any) -> None:
        seen[hook.name] = value

    def compare(where: str, claim: Claim) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple, output: Tensor) -> None:
            off[where] = apart(*claim(args[0], output))

        return look

    points = [name for name in reached(model, batches) if name.endswith(_POINTS)]
    with ExitStack() as stack:
        for where, module, claim in _claims(model, batches, points, seen):
            off[where] = float("inf")  # until its module has run
            stack.callback(module.register_forward_hook(compare(where, claim)).remove)
        model.run_with_hooks(batch, fwd_hooks=[(name, keep) for name in [*points, "hook_embed"]])
    off["W_E"] = _of_embeddings(model, batch, seen["hook_embed"])
    for where, deviation in off.items():
        ok = deviation <= batches.rounding
        yield Finding(where, ok, deviation, "" if ok else f"it is {deviation:.1e} from what the model computes")


_POINTS = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_result")


def _claims(
    model: Any, batches: Batches, points: list[str], seen: dict[str, Tensor]
) -> Iterator[tuple[str, nn.Module, Claim]]:
    """A point's or weight's name, the module it belongs to, and the claim about what that module reads and returns."""
    blocks = model.blocks
    for kind, layer in layers(model, batches):
        stack, prefix = getattr(model.family, kind), f"{'vision.' if kind == 'vision' else ''}blocks.{layer}."
        block = layers_of(model.hf_model, stack)[layer]
        attn = attention_of(block, stack)
        if (result := f"{prefix}attn.hook_result") in points:
            out = module_at(attn, stack.o)  # type: ignore[arg-type]
            yield result, out, _sum_of_heads(out, seen, result)
        if kind == "vision":
            continue
        paths = {"q": stack.q, "k": stack.k, "v": stack.v}
        for letter in paths:
            point, module = f"{prefix}attn.hook_{letter}", part_at(attn, paths[letter])
            if point in points and isinstance(getattr(module, "out_features", None), int):
                of_heads = blocks[layer].attn.projection(letter.upper())
                if of_heads is not None:
                    yield point, module, _same_heads(of_heads, seen, point)
        yield from _of_matrices(blocks[layer], attn, part_at(block, stack.mlp), stack, prefix)
    yield "W_U", model._unembed(), lambda x, y: (x @ model.W_U + model.b_U, y)


def _of_matrices(block: Any, attn: Any, mlp: Any, stack: Any, prefix: str) -> Iterator[tuple[str, nn.Module, Claim]]:
    if block.attn.W_O is not None:
        yield f"{prefix}attn.W_O", module_at(attn, stack.o), _product(block.attn.W_O.flatten(0, 1), block.attn.b_O)
    if stack.values and block.attn.W_V is not None and part_at(attn, stack.values) is not None:
        made, bias = block.attn.W_V.transpose(0, 1).flatten(1), block.attn.b_V
        bias = None if bias is None else bias.flatten()
        yield f"{prefix}attn.W_V", module_at(attn, stack.values), _product(made, bias)
    if block.mlp.W_out is not None:
        yield f"{prefix}mlp.W_out", module_at(mlp, stack.down), _product(block.mlp.W_out, block.mlp.b_out)
    if block.mlp.W_in is not None:
        made, bias = block.mlp.W_in, block.mlp.b_in
        if stack.up == stack.gate:
            made, bias = torch.cat([block.mlp.W_gate, made], 1), None if bias is None else torch.cat([bias, bias])
        yield f"{prefix}mlp.W_in", module_at(mlp, stack.up), _product(made, bias)
        if stack.up != stack.gate and block.mlp.W_gate is not None:
            yield f"{prefix}mlp.W_gate", module_at(mlp, stack.gate), _product(block.mlp.W_gate, None)


def _product(weight: Tensor, bias: Tensor | None) -> Claim:
    return lambda x, y: (x @ weight + (0 if bias is None else bias), y)


def _same_heads(of_heads: tuple[Tensor, Tensor | None], seen: dict[str, Tensor], point: str) -> Claim:
    weight, bias = of_heads

    def claim(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        made = torch.einsum("...m,hmd->...hd", x, weight) + (0 if bias is None else bias)
        return seen.pop(point).reshape(made.shape), made

    return claim


def _sum_of_heads(out: nn.Module, seen: dict[str, Tensor], point: str) -> Claim:
    bias = linear_map(out).bias

    def claim(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        made = seen.pop(point).sum(-2) + (0 if bias is None else bias)
        return made.reshape(y.shape), y

    return claim


def _of_embeddings(model: Any, batch: Any, embedded: Tensor) -> float:
    ids = batch["input_ids"].to(embedded.device)
    text = batch["attention_mask"].bool().to(embedded.device)
    for token in special_tokens(model):
        text &= ids != token
    return apart(embedded[text], model.W_E[ids[text].to(model.W_E.device)].to(embedded))
