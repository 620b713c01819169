"""What the laws are tested on, and how their verdicts are worded.

``make_batches(model)`` builds one image, two images of other sizes and text alone through ``model.inputs``. Everything
is seeded: two checks of one model agree.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mech.errors import MechError
from mech.model import attention
from mech.model.wiring import sdpa_names

QUESTION = "What is shown here?"
SIZES = ((40, 24), (20, 44), (32, 32))  # (width, height) of the test pictures
# Relative to the largest logit: how much two ways of computing the same thing may differ by rounding.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def tolerance(model: Any) -> float:
    """The tolerance of the model's dtype; with 4- or 8-bit weights, bitsandbytes uses bfloat16 or scales by batch."""
    quantized = getattr(model.hf_model, "is_quantized", False)
    return TOLERANCE[torch.bfloat16] if quantized else TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16])


@dataclass(frozen=True)
class Finding:
    """One thing a law looked at: ``ok`` is None where the law does not apply, and ``says`` why."""

    where: str
    ok: bool | None
    deviation: float = 0.0
    says: str = ""


@dataclass(frozen=True)
class Batches:
    """What the laws are tested on.

    Attributes:
        rows: rows to run alone: tensors for the Hugging Face model, by name.
        padded: the same rows as one batch, padded on the left.
        blind: why there are no pictures in them, or "".
        rounding: how far apart two exact computations may be, see ``make_batches``.
        of_answer: the value of answer tokens in tensors as long as the sequence (PaliGemma's token types).
        full: look at every layer.
    """

    rows: Mapping[str, Mapping[str, Tensor]]
    padded: Mapping[str, Tensor]
    blind: str = ""
    rounding: float = TOLERANCE[torch.float32]
    of_answer: Mapping[str, int] = field(default_factory=dict)
    full: bool = False

    def named(self) -> dict[str, Mapping[str, Tensor]]:
        return {**self.rows, "padded batch": self.padded}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def make_batches(model: Any, full: bool = False) -> Batches:
    """One image, two images of other sizes and text alone, built by ``model.inputs``.

    A model whose inputs cannot be built (no geometry is known for it) is tested on text alone. Two exact ways to
    compute the logits may differ by ``TOLERANCE``, or by four times what the last digit of the pixels does to them, if
    that is more: deep random models amplify rounding, and transformers' own two ways differ as much. Forwards: 2.
    """
    try:
        _ = model.processor
    except MechError as error:
        special = special_tokens(model)
        plain = torch.tensor([token for token in range(min(model.cfg.vocab, 1000)) if token not in special])
        ids = plain[torch.randint(len(plain), (1, 12), generator=torch.Generator().manual_seed(0))]
        short = {"input_ids": ids[:, 4:], "attention_mask": torch.ones_like(ids[:, 4:])}
        padded = {"input_ids": ids.repeat(2, 1), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
        padded["attention_mask"][1, :4] = 0
        rows = {"text": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "shorter text": short}
        limit = tolerance(model)
        return Batches(rows, padded, blind=error.given, rounding=limit, full=full)
    shots = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    asked = {"one image": shots[:1], "two images": shots[1:], "text": []}
    if model.cfg.cross_layers:  # here all rows of a batch have the same number of pictures
        asked = {"one image": shots[:1], "another image": shots[1:2]}
    built = {name: model.inputs(QUESTION, images=images) for name, images in asked.items()}
    joined = model.collate(list(built.values())).tensors
    taught = model.inputs(QUESTION, answer="a").tensors
    of_answer = {name: int(value[0, -1]) for name, value in taught.items() if value.shape == taught["input_ids"].shape}
    rows = {name: inputs.tensors for name, inputs in built.items()}
    return Batches(rows, joined, "", _rounding(model, joined), of_answer, full)


def reached(model: Any, batches: Batches) -> list[str]:
    """The points that fire on these batches: without pictures, those of text layers that attend to no picture."""
    crossing = [f"blocks.{layer}." for layer in model.cfg.cross_layers]
    visual = ("vision.", "projector.", *crossing)
    return [name for name in model.points() if not (batches.blind and name.startswith(visual))]


def layer_of(name: str) -> tuple[str, int] | None:
    stack, dot, rest = name.partition("blocks.")
    return ("vision" if stack else "text", int(rest.split(".")[0])) if dot else None


def layers(model: Any, batches: Batches) -> list[tuple[str, int]]:
    """The (stack, layer) pairs to look at: all, or the first and last of every kind."""
    of_layer: dict[tuple[str, int], set[str]] = {}
    for name in reached(model, batches):
        if (layer := layer_of(name)) is not None:
            of_layer.setdefault(layer, set()).add(name.split("blocks.")[1].split(".", 1)[1])
    kinds: dict[Any, list[tuple[str, int]]] = {}
    types = getattr(model.hf_model.config.get_text_config(), "layer_types", None) or ()
    for (stack, layer), points in of_layer.items():
        kind = types[layer] if stack == "text" and layer < len(types) else ""
        kinds.setdefault((stack, kind, frozenset(points)), []).append((stack, layer))
    chosen = {layer for members in kinds.values() for layer in (members if batches.full else (members[0], members[-1]))}
    return [layer for layer in of_layer if layer in chosen]


def noise(like: Tensor) -> Tensor:
    """Normal noise of a tensor's shape, the same at every call."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1)).to(like)


def spread(value: Tensor) -> Tensor:
    """Standard deviation of a tensor's finite values; 1 if all are the same."""
    scale = value[torch.isfinite(value)].float().std(correction=0)
    return torch.where(scale > 0, scale, 1.0).to(value.dtype)


def padded_right(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch padded on the left, with every row moved to the left instead."""
    rows, length = batch["input_ids"].shape
    pads = [length - int(row.sum()) for row in batch["attention_mask"]]
    return {
        name: torch.stack([row.roll(-pad, 0) for row, pad in zip(value, pads, strict=True)])
        if value.shape[:2] == (rows, length)
        else value
        for name, value in batch.items()
    }


def continued(batches: Batches, new: Tensor) -> dict[str, Tensor]:
    """The padded batch followed by generated text, as ``generate`` feeds it."""
    (rows, length), steps = batches.padded["input_ids"].shape, new.shape[1]
    longer = {}
    for name, value in batches.padded.items():
        if value.shape[:2] == (rows, length):
            more = value[:, -1:].expand(rows, steps, *value.shape[2:])  # new tokens attend to the memory as before
            if value.ndim == 2:
                more = torch.full_like(more, batches.of_answer.get(name, 1))
            value = torch.cat((value, new.to(value.device) if name == "input_ids" else more), 1)
        longer[name] = value
    return longer


@contextmanager
def stock_attention(model: Any) -> Iterator[None]:
    """While open, the Hugging Face model runs transformers' own SDPA, without this package.

    Where transformers has eager attention only (Gemma2 with its softcap), that part runs eagerly.
    """
    model.hf_model.set_attn_implementation(sdpa_names(model.hf_model))
    try:
        yield
    finally:
        model.hf_model.set_attn_implementation(attention.IMPLEMENTATION)


def special_tokens(model: Any) -> set[int]:
    """The tokens that the config names: placeholders and marks, which stand for pictures that are not there."""
    config = model.hf_model.config.to_dict()
    return {value for key, value in config.items() if "_token_i" in key and isinstance(value, int)}


def placed(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value.to(model.device, model.dtype if name.startswith("pixel_values") else None)
        for name, value in batch.items()
    }


def _rounding(model: Any, padded: Mapping[str, Tensor]) -> float:
    batch, limit = placed(model, padded), tolerance(model)
    if "pixel_values" not in batch:
        return limit
    pixels, step = batch["pixel_values"], torch.finfo(model.dtype).eps
    with torch.no_grad(), stock_attention(model):
        plain = model.hf_model(**batch, use_cache=False).logits
        batch["pixel_values"] = pixels * (1 + step * noise(pixels))
        moved = model.hf_model(**batch, use_cache=False).logits
    return min(max(limit, 4 * gap(moved, plain, padded)), 100 * limit)


def apart(got: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().clamp_min(1)
    return float(((got - expected).abs().max() / scale).nan_to_num(float("inf")))


def gap(got: Tensor, expected: Tensor, batch: Mapping[str, Tensor]) -> float:
    real = batch["attention_mask"].bool().to(expected.device)
    return apart(got[real], expected[real])


def same(where: str, got: Tensor, expected: Tensor, batch: Mapping[str, Tensor], tolerance: float) -> Finding:
    off = gap(got, expected, batch)
    return Finding(where, off <= tolerance, off, "" if off <= tolerance else f"logits differ by {off:.1e}")


def image_token(model: Any) -> int | None:
    config = model.hf_model.config
    return getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
