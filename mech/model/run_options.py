"""What a run accepts: TransformerLens' keywords, what the Hugging Face model takes, and nothing else.

A Hugging Face forward silently accepts unknown keywords, and tensors that do not belong together. Both are refused
here, before any forward. TransformerLens' keywords mean what they mean there:

* ``return_type="logits"``, ``"loss"``, ``"both"`` (a pair) or ``None`` (run only for the hooks);
* ``loss_per_token=True``: ``[batch pos-1]``, 0 where nothing is predicted;
* ``stop_at_layer=k``: the residual stream that enters layer k, which does not run; negative numbers count from the end.

The loss is the cross-entropy of the next token, in nats. Padding is left out, as in TransformerLens, and so are visual
tokens, which no model predicts.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from inspect import Parameter, signature
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.utils.generic import TransformersKwargs

from mech.errors import InputError, MechError, suggestion
from mech.model.architectures.families import module_at
from mech.model.architectures.stack import Family

RETURNED = ("logits", "loss", "both", None)
OF_FORWARD = ("return_type", "stop_at_layer", "loss_per_token")
OF_CACHE = ("names_filter", "device", "remove_batch_dim", "incl_bwd", "pos_slice", "return_cache_object")
# Keywords of other tools that a run here does not take, with what is expected and what to do instead.
_INSTEAD = {
    "prepend_bos": (
        "inputs: the chat template sets how they begin",
        "leave it out, or write the text yourself with mech.inputs.encode(model.processor, text, images=...)",
    ),
    "padding_side": ("rows padded on the left", "leave it out, and join rows with model.collate"),
    "start_at_layer": (
        "a run that starts at the first layer",
        "overwrite the stream with a hook at 'blocks.K.hook_resid_pre' (earlier layers still run)",
    ),
    "past_kv_cache": ("the Hugging Face model's cache", "use past_key_values"),
    "tokens": ("inputs", "pass them first: model(inputs)"),
    "labels": ("a run that returns what return_type names", "use return_type='loss'"),
    "output_attentions": ("logits", "use run_with_cache(inputs, names_filter='blocks.K.attn.hook_pattern')"),
    "output_hidden_states": ("logits", "use run_with_cache(inputs, names_filter='blocks.K.hook_resid_post')"),
    "return_dict": ("logits", "leave it out"),
}  # fmt: skip
# Tensors that are as long as the sequence, and which of their dimensions are [batch, pos].
_AS_LONG = {
    "attention_mask": slice(None),
    "mm_token_type_ids": slice(None),
    "token_type_ids": slice(None),
    "cross_attention_mask": slice(2),
}
_PIXELS = {"image_token_id": "pixel_values", "video_token_id": "pixel_values_videos"}
_SEEN_ALREADY = ("mm_encoder_outputs", "cross_attention_states", "inputs_embeds", "past_key_values")


def check_keywords(given: Mapping[str, Any], hf_model: nn.Module, root: str, also: Iterable[str] = ()) -> None:
    """Refuse keywords that the model would silently ignore.

    Args:
        given: everything its forward is to be called with.
        hf_model: the Hugging Face model.
        root: the path of its text stack.
        also: other keywords that are allowed.

    Raises:
        InputError: an unknown keyword, with the nearest name or what to do instead.
    """
    parts = root.split(".")
    modules = [hf_model, *(module_at(hf_model, ".".join(parts[: end + 1])) for end in range(len(parts)))]
    known = _taken(tuple(map(type, modules))) | set(also)
    for name, value in given.items():
        if name in _INSTEAD and not (name in known and (value is None or value is False)):
            raise InputError(f"{name}=... in a run", *_INSTEAD[name])
        if name in OF_CACHE:
            raise InputError(f"{name}=... in a run that caches nothing", "run_with_cache", "use model.run_with_cache")
        if name not in known:
            raise InputError(
                f"{name}=..., which {type(hf_model).__name__} does not take",
                f"one of {', '.join(OF_FORWARD)}, or what its forward takes",
                suggestion(name, [*OF_FORWARD, *OF_CACHE, *sorted(known)]),
            )


@cache
def _taken(kinds: tuple[type[nn.Module], ...]) -> frozenset[str]:
    """The names that any of these modules' forwards takes, and those that transformers passes on everywhere."""
    named = {Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY}
    names = {
        name
        for kind in kinds
        for name, parameter in signature(kind.forward).parameters.items()
        if parameter.kind in named
    } | {*TransformersKwargs.__annotations__, "use_cache", "cache_position"}
    return frozenset(names - {"self"})


def check_tensors(given: Mapping[str, Any], hf_model: Any, family: Family) -> None:
    """Refuse tensors that the model would accept but silently misread.

    Raises:
        InputError: no tokens, tokens that the model does not know, tensors of another length; visual tokens without
            pixels, or pixels without the tensors that give their tokens 2-D positions; pixels that are nan or inf.
    """
    ids = given.get("input_ids")
    if given.get("inputs_embeds") is not None:
        raise InputError(
            "inputs_embeds, which say neither which positions are pictures nor where they lie", "input_ids",
            "give the inputs and write the embeddings: run_with_hooks(inputs, fwd_hooks=[('hook_embed', fn)])",
        )  # fmt: skip
    if ids is None:
        raise InputError("no input_ids", "Inputs from model.inputs(...), or input_ids=...")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel() or ids.is_floating_point():
        what = f"of shape {tuple(ids.shape)} and {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(f"input_ids {what}", "whole numbers of shape [batch, pos]", "use model.inputs(...)")
    _check_lengths(given, ids)
    _check_ids(ids, hf_model)
    _check_pictures(given, ids, hf_model.config)
    for tensor, companions in family.needs.items():
        absent = [name for name in companions if given.get(name) is None]
        if given.get(tensor) is not None and absent and given.get("position_ids") is None:
            raise InputError(
                f"{tensor} without {', '.join(absent)}",
                "both: without them the model silently uses other positions or another mask",
                "build inputs with model.inputs(...)",
            )


def _check_lengths(given: Mapping[str, Any], ids: Int[Tensor, "batch pos"]) -> None:
    if given.get("past_key_values") is not None:  # masks include what is cached
        return
    for name, dims in _AS_LONG.items():
        tensor = given.get(name)
        if not isinstance(tensor, Tensor) or (name == "attention_mask" and tensor.ndim == 4):
            continue  # masks of four dimensions are the caller's own, query by key
        if tuple(tensor.shape[dims]) != tuple(ids.shape):
            raise InputError(
                f"{name} of shape {tuple(tensor.shape)} with input_ids of shape {tuple(ids.shape)}",
                "an entry for every position", "build inputs with model.inputs(...), and join rows with collate",
            )  # fmt: skip
    positions = given.get("position_ids")
    if isinstance(positions, Tensor) and positions.shape[-1] != ids.shape[1]:
        raise InputError(
            f"position_ids of shape {tuple(positions.shape)} for {ids.shape[1]} tokens", "one for every token",
            "leave them out: the model counts positions itself",
        )  # fmt: skip


def _check_ids(ids: Int[Tensor, "batch pos"], hf_model: Any) -> None:
    known = hf_model.get_input_embeddings().weight.shape[0]
    low, high = (int(end) for end in ids.aminmax())
    if low >= 0 and high < known:
        return
    # A placeholder may lie beyond the embeddings: pictures take its place before anything is looked up.
    wrong = (ids < 0) | (ids >= known)
    for token in visual_ids(hf_model.config):
        wrong &= ids != token
    if wrong.any():
        raise InputError(
            f"the token {int(ids[wrong][0])}", f"0 to {known - 1}, which the model has embeddings for",
            "build inputs with the processor of this checkpoint",
        )  # fmt: skip


def _check_pictures(given: Mapping[str, Any], ids: Int[Tensor, "batch pos"], config: Any) -> None:
    for name, pixels in given.items():
        if name.startswith("pixel_values") and isinstance(pixels, Tensor) and not pixels.isfinite().all():
            raise InputError(f"{name} with nan or inf", "finite numbers", "check the picture and its preprocessing")
    present = [name for name in _PIXELS.values() if given.get(name) is not None]
    if any(given.get(name) is not None for name in _SEEN_ALREADY):
        return
    for field, name in _PIXELS.items():
        token = getattr(config, field, None)
        # Where images and videos share one token, the pixels of either will do.
        brought = present if token == getattr(config, "image_token_id", None) else [name] if name in present else []
        if token is not None and not brought and (ids == token).any():
            raise InputError(
                f"visual tokens in input_ids but no {name}", f"{name}: without them the model reads placeholders",
                "build inputs with model.inputs(question, images=[...])",
            )  # fmt: skip
    if present and not visual(ids, config).any():
        raise InputError(
            f"{present[0]} but no visual token in input_ids", "a placeholder for each picture",
            "build inputs with model.inputs(question, images=[...])",
        )  # fmt: skip


def visual_ids(config: Any) -> list[int]:
    """The tokens that stand for pictures and videos."""
    ids = [getattr(config, field, None) for field in _PIXELS]
    return [token for token in ids if token is not None]


def visual(ids: Int[Tensor, "batch pos"], config: Any) -> Bool[Tensor, "batch pos"]:
    """Which tokens stand for a piece of a picture."""
    return torch.isin(ids, torch.tensor(visual_ids(config), dtype=ids.dtype, device=ids.device))


def check_returned(
    return_type: str | None, loss_per_token: bool, stop_at_layer: Any, given: Mapping[str, Any], config: Any
) -> None:
    """Refuse what cannot be returned together.

    Raises:
        InputError: an unknown return type, options that exclude each other, or a loss that cannot be computed.
    """
    if return_type not in RETURNED:
        raise InputError(
            f"return_type={return_type!r}", "'logits', 'loss', 'both' or None",
            suggestion(str(return_type), [name for name in RETURNED if name]),
        )  # fmt: skip
    loss = return_type in ("loss", "both")
    if loss_per_token and not loss:
        raise InputError(f"loss_per_token with return_type={return_type!r}", "a loss", "use return_type='loss'")
    if loss and "logits_to_keep" in given:
        raise InputError("a loss together with logits_to_keep", "logits of every position", "leave logits_to_keep out")
    if loss and not _predicted(given, config).any():
        raise InputError(
            "a loss of inputs in which no text token follows another token", "at least one", "add some text"
        )
    if stop_at_layer is None:
        return
    if return_type != "logits":
        raise InputError(
            f"stop_at_layer with return_type={return_type!r}",
            "one of the two: stop_at_layer returns the stream that enters the layer",
            "leave one out",
        )  # fmt: skip
    if given.get("past_key_values") is not None or given.get("use_cache"):
        raise InputError(
            "stop_at_layer with a KV cache", "a run without one: only layers that run would be in it", "leave one out"
        )


def layer_of(stop_at_layer: Any, n_layers: int) -> int:
    """The first layer that does not run, counted from 0; ``n_layers`` if all run.

    Raises:
        InputError: there is no such layer.
    """
    whole = isinstance(stop_at_layer, int) and not isinstance(stop_at_layer, bool)
    if not whole or not -n_layers <= stop_at_layer <= n_layers:
        raise InputError(
            f"stop_at_layer={stop_at_layer!r}",
            f"{-n_layers} to {n_layers}",
            f"use {n_layers} for the output of the last layer",
        )
    return stop_at_layer if stop_at_layer >= 0 else n_layers + stop_at_layer


def is_reached(point: str, layer: int) -> bool:
    """Whether a run that stops at a layer passes through a point."""
    parts = point.split(".")
    return int(parts[1]) < layer if parts[0] == "blocks" else parts[0] != "ln_final"


class _Reached(Exception):
    """The stream has reached the layer at which a run stops."""

    def __init__(self, stream: Tensor):
        super().__init__("a run has come to the layer at which it stops")
        self.stream = stream


def stopped(model: Any, layer: int, run: Callable[[], Any]) -> Float[Tensor, "batch pos d_model"]:
    """The stream that enters a layer of a hooked model; ``run`` stops there."""
    point = f"blocks.{layer - 1}.hook_resid_post" if layer else "hook_embed"

    def stop(value: Tensor, hook: Any) -> None:
        raise _Reached(value)

    with model.hooks([(point, stop)]):  # after existing hooks
        try:
            run()
        except _Reached as reached:
            return reached.stream
    raise MechError(
        f"a run with stop_at_layer={layer} that did not reach {point!r}", "a separate run, outside any hook",
        "run it first, and keep the result",
    )  # fmt: skip


def next_token_loss(
    logits: Float[Tensor, "batch pos vocab"], given: Mapping[str, Any], config: Any, per_token: bool
) -> Float[Tensor, ""] | Float[Tensor, "batch pos-1"]:
    """TransformerLens' loss: cross-entropy of the next token in nats, over text tokens that follow another token."""
    predicted = _predicted(given, config).to(logits.device)
    following = given["input_ids"][:, 1:].to(logits.device).masked_fill(~predicted, 0)
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    losses = nn.functional.cross_entropy(wide.transpose(1, 2), following, reduction="none").masked_fill(~predicted, 0.0)
    return losses if per_token else losses.sum() / predicted.sum()


def _predicted(given: Mapping[str, Any], config: Any) -> Bool[Tensor, "batch pos-1"]:
    """Which tokens after the first are text that follows another token."""
    predicted = ~visual(given["input_ids"], config)[:, 1:]
    mask = given.get("attention_mask")
    if mask is None:
        return predicted
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise InputError("a loss with a custom attention_mask", "a mask of shape [batch, pos]", "build inputs")
    return predicted & mask[:, :-1].bool() & mask[:, 1:].bool()
