"""Laws of running: parity with transformers, padding, generation, serving, and nothing left behind."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mech.errors import UnsupportedModel
from mech.model import attention
from mech.model.check.trial import (
    QUESTION,
    SIZES,
    Batches,
    Finding,
    apart,
    continued,
    layer_of,
    layers,
    padded_right,
    picture,
    placed,
    reached,
    same,
    special_tokens,
    stock_attention,
)
from mech.model.hook_sites import INSIDE_ATTENTION


def parity(model: Any, batches: Batches) -> Iterator[Finding]:
    """Idle logits are those of transformers with SDPA, bit for bit, and stay so with every point written back.

    With the points inside attention hooked (rotated q and k, scores, pattern), attention is computed step by step, a
    vision stack's windows in one call, and may round differently (``TOLERANCE``).
    Forwards: 4 for each of the rows and the padded batch.
    """
    inside = INSIDE_ATTENTION
    outside = [name for name in model.points() if not name.endswith(inside)]
    stepwise = [name for name in model.points() if name.endswith(inside)]
    for name, batch in batches.named().items():
        with stock_attention(model):
            plain = model.hf_model(**placed(model, batch), use_cache=False).logits
        idle = model(batch)
        yield same(f"idle logits, {name}", idle, plain, batch, 0.0)
        for which, points, tolerance in (("outside", outside, 0.0), ("inside", stepwise, batches.rounding)):
            read = [(point, lambda value, hook: value.clone()) for point in points]
            where = f"logits with the points {which} attention written back, {name}"
            yield same(where, model.run_with_hooks(batch, fwd_hooks=read), idle, batch, tolerance)


def padding(model: Any, batches: Batches) -> Iterator[Finding]:
    """A row gives the same logits alone and in a batch of rows with other pictures, padded on the left or the right.

    Forwards: 1 for each row, 2 for the batch.
    """
    alone = {name: model(row)[0] for name, row in batches.rows.items()}
    left, right = batches.padded, padded_right(batches.padded)
    for side, batch in (("left", left), ("right", right)):
        logits = model(batch)
        for index, (name, expected) in enumerate(alone.items()):
            here = batch["attention_mask"][index].bool().to(logits.device)
            off = apart(logits[index][here], expected)
            ok = off <= batches.rounding
            says = "" if ok else f"logits are {off:.1e} from those of the row alone"
            yield Finding(f"{name}, padded on the {side}", ok, off, says)


def generation(model: Any, batches: Batches, steps: int = 4) -> Iterator[Finding]:
    """Generating with hooks and a KV cache gives what recomputing everything at each step gives.

    One text head is zeroed and one layer's pattern sharpened, at all positions of prompt and answer. As the model is
    causal over new tokens, one forward over the finished sequence recomputes every step.
    Forwards: ``steps`` + 1, on the padded batch.
    """
    last: list[Tensor] = []
    points = [name for name in model.points() if name.startswith("blocks.")]
    first = next(name for name in points if name.endswith("attn.hook_z"))
    pattern = [name for name in points if name.endswith("attn.hook_pattern")][-1]

    def without(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[:, :, 0] = 0
        return z

    def sharpened(attention: Tensor, hook: Any) -> Tensor:
        sharp = attention**2
        return sharp / sharp.sum(-1, keepdim=True).clamp_min(1e-20)

    def keep(value: Tensor, hook: Any) -> None:
        last.append(value[:, -1])

    edits = [(first, without), (pattern, sharpened)]
    batch = dict(batches.padded)
    # Neither an end nor a placeholder: a random model may well generate a placeholder, which then has no picture.
    end = model.hf_model.generation_config.eos_token_id
    unwanted = sorted({*special_tokens(model), *([] if end is None else [end] if isinstance(end, int) else end)})
    with model.hooks([*edits, ("ln_final.hook_normalized", keep)]):
        new = model.generate(batch, suppress_tokens=unwanted, repetition_penalty=1.0, max_new_tokens=steps)
    stepwise = torch.stack(last, 1)
    last.clear()
    whole = []
    longer = continued(batches, new[:, :-1])
    normalized = ("ln_final.hook_normalized", lambda value, hook: whole.append(value[:, -steps:]))
    logits = model.run_with_hooks(longer, fwd_hooks=[*edits, normalized])[:, -steps:]
    off = apart(stepwise, whole[0])
    ok = off <= batches.rounding
    yield Finding("final states of each step", ok, off, "" if ok else f"{off:.1e} from full recomputation")
    # Where two tokens are equally likely, rounding decides.
    logits[..., unwanted] = -torch.inf
    chosen = logits.gather(-1, new[..., None].to(logits.device))[..., 0]
    lost = ((logits.amax(-1) - chosen).max() / chosen.abs().max().clamp_min(1)).item()
    ok = lost <= batches.rounding
    yield Finding("tokens", ok, lost, "" if ok else "the generated tokens are not the most likely of a recomputation")


def serving(model: Any, batches: Batches) -> Iterator[Finding]:
    """Continuous batching, which would run without hooks and masks, is refused under the name it looks up.

    Forwards: 0.
    """
    known = attention.PAGED in ALL_ATTENTION_FUNCTIONS
    says = "" if known else f"no attention is registered as {attention.PAGED!r}: batches would be served dense"
    yield Finding("paged twin", known, 0.0, says)
    if not known:
        return
    try:
        ALL_ATTENTION_FUNCTIONS[attention.PAGED](None, None, None, None, None)
        refused = False
    except UnsupportedModel:
        refused = True
    yield Finding("paged twin refuses", refused, 0.0, "" if refused else "it computes attention without hooks")


def encoding(model: Any, batches: Batches) -> Iterator[Finding]:
    """Pictures encoded once (``encode_pictures``) give exactly the logits that their pixels give.

    Forwards: 2, and the vision stack once more, on two rows with a picture each.
    """
    where = "logits from encoded pictures"
    if batches.blind:
        yield Finding(where, None, says=batches.blind)
        return
    rows = [model.inputs(QUESTION, images=[picture(*size, seed)]) for seed, size in enumerate(SIZES[:2])]
    both = model.collate(rows)
    blind, seen = model.encode_pictures(both)
    again = model(blind, mm_encoder_outputs=seen)
    yield same(where, again, model(both), both.tensors, 0.0)


def cleanliness(model: Any, batches: Batches) -> Iterator[Finding]:
    """After a run, a generation or an exception in a hook the model is unchanged: hooks, modes, weights, RNG, logits.

    Forwards: 4 and a generation of 3 tokens, on the padded batch.
    """
    clean, before = model(batches.padded), _state(model)
    looked_at = layers(model, batches)
    points = [name for name in reached(model, batches) if layer_of(name) in (looked_at[0], looked_at[-1])]

    def fails(value: Tensor, hook: Any) -> None:
        raise _OnPurpose

    def broken() -> None:
        try:
            model.run_with_hooks(batches.padded, fwd_hooks=[(points[len(points) // 2], fails)])
        except _OnPurpose:
            return
        raise AssertionError("an exception in a hook was swallowed")

    runs: dict[str, Callable[[], object]] = {
        "a run with a cache": lambda: model.run_with_cache(batches.padded, names_filter=points),
        "a generation": lambda: model.generate(dict(batches.padded), max_new_tokens=3),
        "an exception in a hook": broken,
    }
    for name, run in runs.items():
        run()
        after = _state(model)
        changed = [key for key, value in before.items() if not _equal(value, after[key])]
        yield Finding(f"after {name}", not changed, 0.0, f"changed: {', '.join(changed)}" if changed else "")
        if changed:
            return
    yield same("logits afterwards", model(batches.padded), clean, batches.padded, 0.0)


def unwrapping(model: Any, batches: Batches) -> Iterator[Finding]:
    """``unwrap()`` restores the model: same logits, its own attention implementation, no trace in its layers.

    The wrapper cannot run afterwards. Forwards: 2, on the padded batch.
    """
    clean, hooks = model(batches.padded), _state(model)["torch hooks"]
    modules, stock = [module for module, _ in model._layers], model._stock_attention
    hf_model = model.unwrap()
    config = hf_model.config
    now = {key: (getattr(config, key) if key else config)._attn_implementation for key in stock}
    left = [key or "the model" for key in now if now[key] != stock[key]]
    yield Finding("attention implementation", not left, 0.0, f"not restored: {', '.join(left)}" if left else "")
    owned = [module for module in modules if attention.owner_of(module) is not None]
    clear = not owned and _state(model)["torch hooks"] == hooks
    yield Finding("layers", clear, 0.0, "" if clear else "hooks or records of the wrapper are left")
    plain = hf_model(**placed(model, batches.padded), use_cache=False).logits
    yield same("logits of the unwrapped model", plain, clean, batches.padded, 0.0)


class _OnPurpose(Exception):
    pass


def _state(model: Any) -> dict[str, Any]:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = list(model.hf_model.modules())
    parameters = list(model.hf_model.parameters())
    return {
        "torch hooks": [tuple(getattr(module, table)) for module in modules for table in tables],
        "hooks of points": [bool(point.fwd_hooks or point.bwd_hooks) for point in model.hook_dict.values()],
        "active layers": [record.active for _, record in model._layers],
        "training mode": [module.training for module in modules],
        "requires_grad": [parameter.requires_grad for parameter in parameters],
        "gradients": [parameter.grad is not None for parameter in parameters],
        "grad mode": torch.is_grad_enabled(),
        "random state": torch.random.get_rng_state(),
        "weights": [parameter._version for parameter in parameters],
    }


def _equal(ours: Any, theirs: Any) -> bool:
    return torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs
