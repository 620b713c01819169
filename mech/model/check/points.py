"""Laws of activation points: every point fires as listed, is live, and means what the table says."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mech.model import attention
from mech.model.check.trial import (
    Batches,
    Finding,
    apart,
    image_token,
    layer_of,
    layers,
    noise,
    placed,
    reached,
    same,
    spread,
    stock_attention,
)
from mech.model.hook_sites import INSIDE_ATTENTION
from mech.model.points import dims_of


def names(model: Any, batches: Batches) -> Iterator[Finding]:
    """Every listed point fires once in a forward, in the shape that the table lists.

    Forwards: 1, on the padded batch.
    """
    seen: dict[str, list[tuple[int, ...]]] = {name: [] for name in reached(model, batches)}

    def note(value: Tensor, hook: Any) -> None:
        seen[hook.name].append(tuple(value.shape))

    sizes: dict[Any, dict[str, int]] = {}

    def measure(call: attention.AttentionCall) -> None:
        (_, head, query_pos, d_head), (_, kv_head, key_pos, _) = call.q.shape, call.k.shape
        sizes[call.stack, call.layer] = {
            "head": head, "kv_head": kv_head, "d_head": d_head, "query_pos": query_pos, "key_pos": key_pos
        }  # fmt: skip

    with model.attending(measure, "text"), model.attending(measure, "vision"):
        model.run_with_hooks(batches.padded, fwd_hooks=[(name, note) for name in seen])
    rows, length = batches.padded["input_ids"].shape
    for name, shapes in seen.items():
        words = dims_of(name).split()
        known = dict(sizes.get(layer_of(name), {}))
        if not name.startswith("vision."):
            known |= {"batch": rows, "d_model": model.cfg.d_model}
            # Keys and values come from the memory if a layer attends to one, otherwise from the sequence.
            known["pos"] = known["key_pos"] if name.endswith(("attn.hook_k", "attn.hook_v")) else length
        fits = len(shapes) == 1 and len(shapes[0]) == len(words)
        fits = fits and all(known.get(word, size) == size for word, size in zip(words, shapes[0], strict=True))
        expected = " ".join(f"{word}={known[word]}" if word in known else word for word in words)
        yield Finding(name, fits, 0.0, "" if fits else f"fired {len(shapes)} times with {shapes[:2]}, not [{expected}]")


def liveness(model: Any, batches: Batches) -> Iterator[Finding]:
    """Every listed point is live after a first forward: writing to it changes the logits.

    Noise as large as the activation is added, and the logits are compared with those of a run that writes back what
    was read: both compute in the same way, so a dead point changes nothing, not even rounding.
    Forwards: 2 + 19 s + 3, on one row with one image.
    """
    row = next(iter(batches.rows.values()))
    model(row)
    clean, looked_at = model(row), {None, *layers(model, batches)}
    for name in reached(model, batches):
        if layer_of(name) in looked_at:
            stepwise = name.endswith(INSIDE_ATTENTION)
            now = model.run_with_hooks(row, fwd_hooks=[(name, lambda v, hook: v.clone())]) if stepwise else clean
            change = apart(model.run_with_hooks(row, fwd_hooks=[(name, _add_noise)]), now)
            alive = change > torch.finfo(model.dtype).eps
            says = "" if alive else f"writing it moves the logits by {change:.1e}"
            yield Finding(name, alive, 0.0 if alive else change, says)


def meaning(model: Any, batches: Batches) -> Iterator[Finding]:
    """Writing to a point means what the table says.

    * ``hook_z`` is what the attention function returned; an edit equals the same edit in the stock model, made by a
      torch hook at the input of W_O;
    * an edit of ``hook_pattern`` equals the edit of z that it implies through the values of its key/value head;
    * a vector added to ``hook_resid_mid`` equals the same vector added to ``hook_attn_out``: MLP and skip connection
      both see it;
    * every row of a pattern sums to one, or to zero where the row may attend to nothing;
    * an edit of ``hook_embed`` at the visual tokens equals the same edit at the projector, if the model puts nothing in
      between.

    Forwards: up to 6 s + 3, on the padded batch.
    """
    for stack, layer in layers(model, batches):
        prefix = f"{'vision.' if stack == 'vision' else ''}blocks.{layer}."
        has = set(model.points())
        if f"{prefix}attn.hook_z" in has:
            yield from _edit_of_z(model, batches, prefix, stack, layer)
        if f"{prefix}attn.hook_pattern" in has:
            yield from _edit_of_pattern(model, batches, prefix, stack, layer)
        if {f"{prefix}hook_resid_mid", f"{prefix}hook_attn_out"} <= has:
            yield from _edit_of_stream(model, batches, prefix)
    yield from _edit_of_embeddings(model, batches)


def _edit_of_z(model: Any, batches: Batches, prefix: str, stack: str, layer: int) -> Iterator[Finding]:
    batch = batches.padded
    name = f"{prefix}attn.hook_z"
    site = next(site for site in model._sites if site.point == name)
    returned, seen = [], []

    def observe(call: attention.AttentionCall) -> None:
        if call.layer == layer:
            returned.append(call.z)

    def halve(value: Tensor, hook: Any) -> Tensor:
        seen.append(value)
        value = value.clone()
        value[:, :, -1] *= -0.5
        return value

    def halve_columns(module: Any, args: tuple) -> tuple:
        z = args[0].clone()
        z[..., -z.shape[-1] // site.heads :] *= -0.5
        return (z, *args[1:])

    with stock_attention(model):
        handle = site.module.register_forward_pre_hook(halve_columns)
        try:
            plain = model.hf_model(**placed(model, batch), use_cache=False).logits
        finally:
            handle.remove()
    with model.attending(observe, stack):
        edited = model.run_with_hooks(batch, fwd_hooks=[(name, halve)])
    if not getattr(model.family, stack).gated:  # a gate stands between the two
        off = apart(seen[0].reshape(returned[0].shape), returned[0])
        says = "" if off == 0 else f"it is {off:.1e} from what attention returned"
        yield Finding(f"{name}: what attention returns", off == 0, off, says)
    yield same(f"{name}: an edit by hand before W_O", edited, plain, batch, batches.rounding)


def _edit_of_pattern(model: Any, batches: Batches, prefix: str, stack: str, layer: int) -> Iterator[Finding]:
    batch = batches.padded
    name, patterns = f"{prefix}attn.hook_pattern", {}

    def implied(call: attention.AttentionCall) -> Tensor | None:
        if call.layer != layer:
            return None
        z = call.z.clone()
        z[:, :, -1] = patterns["last"].to(z.dtype) @ call.v[:, -1]  # the last head reads the last key/value head
        return z

    def shuffle(pattern: Tensor, hook: Any) -> Tensor:
        patterns["sums"] = pattern.sum(-1)
        pattern = pattern.clone()
        pattern[:, -1] = torch.softmax(noise(pattern[:, -1]), dim=-1)
        patterns["last"] = pattern[:, -1]
        return pattern

    through_pattern = model.run_with_hooks(batch, fwd_hooks=[(name, shuffle)])
    with model.attending(implied, stack):
        through_z = model(batch)
    yield same(f"{name}: the edit of z it implies", through_pattern, through_z, batch, batches.rounding)
    off = torch.minimum((patterns["sums"] - 1).abs(), patterns["sums"].abs()).max().item()
    yield Finding(f"{name}: rows sum to one", off <= 1e-5, off, "" if off <= 1e-5 else f"a row is off by {off:.1e}")


def _edit_of_stream(model: Any, batches: Batches, prefix: str) -> Iterator[Finding]:
    batch = batches.padded
    streams: list[Tensor] = []

    def add(value: Tensor, hook: Any) -> Tensor:
        if not streams:
            streams.append(noise(value) * spread(value))
        return value + streams[0]

    added = model.run_with_hooks(batch, fwd_hooks=[(f"{prefix}hook_attn_out", add)])
    written = model.run_with_hooks(batch, fwd_hooks=[(f"{prefix}hook_resid_mid", add)])
    yield same(f"{prefix}hook_resid_mid: the same edit of hook_attn_out", written, added, batch, batches.rounding)


def _edit_of_embeddings(model: Any, batches: Batches) -> Iterator[Finding]:
    where = "hook_embed: the same edit at the projector"
    if batches.blind or model.cfg.cross_layers:
        yield Finding(where, None, says=batches.blind or "the images are a memory outside the sequence")
        return
    visual = batches.padded["input_ids"] == image_token(model)
    _, cache = model.run_with_cache(batches.padded, names_filter=["hook_embed", "projector.hook_out"])
    embedded, projected = cache["hook_embed"][visual.to(model.device)], cache["projector.hook_out"]
    if embedded.shape != projected.shape or not torch.equal(embedded, projected):
        yield Finding(where, None, says="the model scales or arranges the features between projector and text stack")
        return
    features = noise(projected)
    edited = model.run_with_hooks(
        batches.padded, fwd_hooks=[("projector.hook_out", lambda value, hook: value + features)]
    )

    def write(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[visual.to(value.device)] += features
        return value

    again = model.run_with_hooks(batches.padded, fwd_hooks=[("hook_embed", write)])
    yield same(where, edited, again, batches.padded, batches.rounding)


def _add_noise(value: Tensor, hook: Any) -> Tensor:
    return value + noise(value) * spread(value)
