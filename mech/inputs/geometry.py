"""Which pixels of the original image each visual token stands for: a table with one row for each architecture.

A row of ``FAMILIES`` says what one picture becomes in the sequence (``show``), which sizes its tower has (``measure``),
which tensors the model takes, how a video is written and what is asked without a chat template.

To add a family, write ``show(size, image_processor, geometry, alone) -> Shown`` (or take one of those in ``fixed``,
``tiles`` and ``dynamic``; see ``canvas`` for the pieces) and add a row.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from mech.errors import InputError, UnsupportedModel, suggestion
from mech.inputs import dynamic, fixed, gemma4, glm4v, lfm2, mllama, pixtral, templates, tiles
from mech.inputs.canvas import Piece, Shown, Size
from mech.inputs.layout import IMAGE, TokenLayout

Video = Callable[[Any, list[Image.Image], float], tuple[dict[str, Tensor], list[Piece]]]
TokenTypes = Callable[[TokenLayout], Int[np.ndarray, " pos"]]


@dataclass(frozen=True)
class Family:
    """One architecture's way of writing pictures into a sequence.

    Attributes:
        show: ``(size, image_processor, geometry, alone) -> Shown``; ``alone`` says that it is the row's only picture.
        measure: ``(name, config, image_processor) -> fields of Geometry``.
        template: the chat template (jinja) where a checkpoint has none.
        tensors: what the model takes of what the image processor makes.
        reads: settings that its image processors have, and by which those of another family are told.
        sizes: ``(made, image_processor) -> [(tiles, size)]`` by picture, where ``pixel_values`` do not show it.
        nested: the image processor must be told which pictures belong to one row.
        types: name and values of the tensor that tells the model the kind of every position, where it needs one.
        placeholder: of a picture in the prompt, where it is not the visual token itself (``config.image_token_id``).
        memory: adds the layout of visual tokens that are not in the sequence, and the mask of who may look at them.
        video: ``(processor, frames, fps) -> (tensors, pieces)``, or ``None`` where the family takes no video.
        video_placeholder: of a video in the prompt, where it is not the token ``config.video_token_id``.
        video_as_images: the tokens of a video are written as an image's.
        late: a token that checkpoints have as a word, and that the family's own processor makes a special one.
    """

    show: Callable[[Size, Any, "Geometry", bool], Shown]
    measure: Callable[[str, Any, Any], dict[str, Any]]
    template: str
    tensors: tuple[str, ...] = ("pixel_values",)
    reads: tuple[str, ...] = ("do_resize",)
    sizes: Callable[[Any, Any], list[tuple[int, Size]]] | None = None
    nested: bool = False
    types: tuple[str, TokenTypes] | None = None
    placeholder: str = ""
    memory: Callable[..., tuple[dict[str, Tensor], TokenLayout]] | None = None
    video: Video | None = None
    video_placeholder: str = ""
    video_as_images: bool = False
    late: str = ""


def _kinds(layout: TokenLayout) -> Int[np.ndarray, " pos"]:
    """0 text, 1 image, 2 video: the kinds of the layout are the Qwen models' own."""
    return layout.kind


def _images(layout: TokenLayout) -> Int[np.ndarray, " pos"]:
    """1 at visual tokens, which see one another in Gemma 3."""
    return layout.kind == IMAGE


def _answered(layout: TokenLayout) -> Int[np.ndarray, " pos"]:
    """0 in PaliGemma's prompt, where every token sees every other, and 1 in the answer."""
    types = np.zeros(len(layout), dtype=int)
    types[list(layout.spans.get("answer", ()))] = 1
    return types


_QWEN: dict[str, Any] = {
    "show": dynamic.show_dynamic,
    "measure": dynamic.measure_patches,
    "template": templates.CHATML,
    "tensors": ("pixel_values", "image_grid_thw"),
    "reads": ("patch_size", "merge_size", "temporal_patch_size"),
    "sizes": dynamic.grid_sizes,
    "types": ("mm_token_type_ids", _kinds),
}
_GLM: dict[str, Any] = {
    **_QWEN,
    "show": glm4v.show_glm,
    "template": templates.GLM,
    "video": glm4v.video_glm,
    "video_placeholder": "<|video|>",
    "video_as_images": True,
}
_PIXTRAL: dict[str, Any] = {
    "show": pixtral.show_pixtral,
    "measure": pixtral.measure_pixtral,
    "template": templates.MISTRAL,
    "tensors": ("pixel_values", "image_sizes"),
    "reads": ("patch_size",),
    "sizes": pixtral.pixtral_sizes,
}
_SPLIT: dict[str, Any] = {
    "show": tiles.show_idefics3,
    "measure": tiles.measure_idefics3,
    "template": templates.IDEFICS,
    "tensors": ("pixel_values", "pixel_attention_mask"),
    "reads": ("max_image_size",),
    "nested": True,
}
FAMILIES = {
    "llava": Family(fixed.show_fixed, fixed.measure_tower, templates.VICUNA),
    "llava_next": Family(
        tiles.show_llava_next,
        tiles.measure_anyres,
        templates.INST,
        tensors=("pixel_values", "image_sizes"),
        reads=("image_grid_pinpoints",),
    ),
    "llava_onevision": Family(
        tiles.show_onevision,
        tiles.measure_anyres,
        templates.ONEVISION,
        tensors=("pixel_values", "image_sizes", "batch_num_images"),
        reads=("image_grid_pinpoints", "pad_to_square"),
        nested=True,
        video=tiles.video_pooled,
    ),
    "paligemma": Family(
        fixed.show_fixed, fixed.measure_tower, templates.PALIGEMMA, types=("token_type_ids", _answered)
    ),
    "gemma3": Family(
        fixed.show_pan_and_scan,
        fixed.measure_pooled,
        templates.GEMMA,
        reads=("do_pan_and_scan",),
        types=("token_type_ids", _images),
        placeholder="<start_of_image>",
    ),
    "internvl": Family(
        tiles.show_internvl,
        tiles.measure_internvl,
        templates.INTERNVL,
        reads=("crop_to_patches", "min_patches"),
        video=tiles.video_framed,
        video_placeholder="<video>",
        video_as_images=True,
    ),
    "cohere2_vision": Family(
        tiles.show_cohere2, tiles.measure_cohere2, templates.COHERE, reads=("arrangement", "crop_to_patches")
    ),
    "llama4": Family(
        tiles.show_llama4,
        tiles.measure_llama4,
        templates.LLAMA4,
        reads=("arrangement", "resize_to_max_canvas"),
        placeholder="<|image|>",
    ),
    "idefics3": Family(**_SPLIT),
    "smolvlm": Family(**_SPLIT),
    "qwen2_vl": Family(**_QWEN, video=dynamic.video_block),
    "qwen2_5_vl": Family(**_QWEN, video=dynamic.video_timed),
    "qwen3_vl": Family(**_QWEN, video=dynamic.video_stamped),
    "qwen3_vl_moe": Family(**_QWEN, video=dynamic.video_stamped),
    "qwen3_5": Family(**_QWEN, video=dynamic.video_stamped),
    "qwen3_5_moe": Family(**_QWEN, video=dynamic.video_stamped),
    "glm4v": Family(**_GLM),
    "glm46v": Family(**{**_GLM, "video": None}),  # its timestamps are written in another way
    "glm4v_moe": Family(**_GLM),
    "gemma4": Family(
        gemma4.show_soft,
        gemma4.measure_soft,
        templates.GEMMA4,
        tensors=("pixel_values", "image_position_ids"),
        reads=("patch_size", "pooling_kernel_size", "max_soft_tokens"),
        sizes=gemma4.soft_sizes,
        types=("mm_token_type_ids", _kinds),
        video=gemma4.video_soft,
        late="<|video|>",
    ),
    "llava_pixtral": Family(**_PIXTRAL),
    "mistral3": Family(**_PIXTRAL),
    "lfm2_vl": Family(
        lfm2.show_tiles,
        lfm2.measure_lfm2,
        templates.LFM2,
        tensors=("pixel_values", "pixel_attention_mask", "spatial_shapes"),
        reads=("encoder_patch_size", "downsample_factor", "tile_size"),
        sizes=lfm2.tile_sizes,
    ),
    "mllama": Family(
        mllama.show_memory,
        mllama.measure_mllama,
        templates.MLLAMA,
        tensors=("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"),
        reads=("max_image_tiles",),
        sizes=mllama.canvas_sizes,
        nested=True,
        memory=mllama.with_memory,
    ),
}


@dataclass(frozen=True)
class Geometry:
    """A family's row, filled in from one checkpoint's config.

    Attributes:
        name: the row of ``FAMILIES``: ``config.model_type``, but for a LLaVA with Pixtral's tower.
        side: pixels of the canvas along one side of a visual token.
        frames_per_token: frames of a video in one visual token.
        class_tokens: visual tokens in front of the grid that stand for no place (LLaVA with the strategy "full").
        tile: the one (width, height) the vision tower takes, or ``None`` if it takes any.
        options: what the image processor must be told at every call.
        config: the checkpoint's config.
    """

    name: str
    side: int
    frames_per_token: int = 1
    class_tokens: int = 0
    tile: Size | None = None
    options: dict[str, Any] = field(default_factory=dict, compare=False)
    config: Any = field(default=None, repr=False, compare=False)

    @property
    def family(self) -> Family:
        return FAMILIES[self.name]

    def show(self, size: Size, image_processor: Any, alone: bool = True) -> Shown:
        """What one picture becomes; refused when the vision tower could not take it."""
        shown = self.family.show(size, image_processor, self, alone)
        if self.tile not in (None, shown.tile):
            raise InputError(
                "a picture of {} x {} pixels becomes {} x {}".format(*size, *shown.tile),
                "{} x {}, which is all that the vision tower takes".format(*self.tile),
                "set size and crop_size of the image processor to the tower's image_size",
            )
        return shown

    def agree(self, expected: Any, made: Any) -> None:
        """The map of the picture must be the image processor's own, or every box would be elsewhere."""
        if expected != made:
            raise InputError(
                f"the image processor made {made}",
                f"{expected}, by its settings",
                f"report the image processor's settings: the row {self.name!r} of mech/inputs/geometry.py is wrong",
            )


def geometry_of(config: Any, image_processor: Any) -> Geometry:
    """The geometry of a checkpoint, from its config and its image processor."""
    name = getattr(config, "model_type", None)
    if name == "llava" and config.vision_config.model_type == "pixtral":
        name = "llava_pixtral"
    if name not in FAMILIES:
        raise UnsupportedModel(
            f"no geometry is known for model_type={name!r}",
            "one of " + ", ".join(FAMILIES),
            f"{suggestion(str(name), FAMILIES)}, or add a row to FAMILIES in mech/inputs/geometry.py",
        )
    if missing := [setting for setting in FAMILIES[name].reads if not hasattr(image_processor, setting)]:
        raise UnsupportedModel(
            f"a {type(image_processor).__name__} for a {name} model, which has no {missing[0]!r}",
            "an image processor of the model's family",
            "load the image processor that belongs to this checkpoint",
        )
    return Geometry(name, **FAMILIES[name].measure(name, config, image_processor), config=config)
