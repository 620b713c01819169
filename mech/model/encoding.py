"""The vision stack alone: what a Hugging Face model makes of the pictures before its text stack runs.

Every current family has ``get_image_features`` (and ``get_video_features``), takes their output back as
``mm_encoder_outputs``, and differs only in the tensors they ask for beside the pixels. Mllama has neither: its text
stack is handed the memory that its cross-attention layers look at.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from mech.errors import UnsupportedModel


def pictures_seen(hf_model: PreTrainedModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """What takes the place of the pixels in ``given``; empty where there are none.

    Raises:
        UnsupportedModel: the architecture has no way to run its vision stack alone.
    """
    base: Any = getattr(hf_model, "model", hf_model)
    inner: Any = base if hasattr(base, "get_image_features") else hf_model
    seen: dict[str, Any] = {}
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if given.get(pixels) is None:
            continue
        if hasattr(base, "vision_output_dim"):
            return {"cross_attention_states": _memory(base, given)}
        encode = getattr(inner, f"get_{kind}_features", None)
        if encode is None or "mm_encoder_outputs" not in inspect.signature(hf_model.forward).parameters:
            raise UnsupportedModel(
                f"{type(hf_model).__name__}, which cannot run its vision stack alone",
                f"a model with get_{kind}_features that takes mm_encoder_outputs",
                "run model(inputs) instead",
            )
        asked = [name for name in inspect.signature(encode).parameters if given.get(name) is not None]
        seen[kind] = encode(**{name: given[name] for name in asked}, return_dict=True)
    return seen


def _memory(base: Any, given: Mapping[str, Any]) -> Tensor:
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    seen = base.vision_model(**{name: given[name] for name in names}).last_hidden_state
    return base.multi_modal_projector(seen).reshape(-1, seen.shape[-2], base.hidden_size)
