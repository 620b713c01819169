"""A family of models: how its pictures become tokens, as one row of data, and the sizes of one checkpoint.

``Family`` says what one picture becomes in the sequence (``show``), which sizes the tower has (``measure``), which
tensors the model takes, how a video is written and which chat template is the default. ``Geometry`` is a family's row
filled in from one checkpoint's config. This file names no architecture: the files beside it add their rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from mech.errors import InputError, UnsupportedModel, suggestion
from mech.inputs.canvas import Piece, Shown, Size
from mech.inputs.layout import TokenLayout

Video = Callable[[Any, list[Image.Image], float], tuple[dict[str, Tensor], list[Piece]]]
TokenTypes = Callable[[TokenLayout], Int[np.ndarray, " pos"]]


@dataclass(frozen=True)
class Family:
    """One architecture's way of writing pictures into a sequence.

    Attributes:
        show: ``(size, image_processor, geometry, alone) -> Shown``; ``alone`` says that it is the row's only picture.
        measure: ``(name, config, image_processor) -> fields of Geometry``.
        template: the chat template (jinja) for checkpoints that have none.
        tensors: the image processor's outputs that the model takes.
        reads: settings that its image processors have, by which they are told from another family's.
        sizes: ``(made, image_processor) -> [(tiles, size)]`` by picture, if ``pixel_values`` do not show it.
        nested: the image processor must be told which pictures belong to one row.
        types: name and values of the tensor that tells the model the kind of every position, if it needs one.
        placeholder: of a picture in the prompt, if it is not the visual token itself (``config.image_token_id``).
        memory: adds the layout of visual tokens outside the sequence, and the mask of which positions attend to them.
        video: ``(processor, frames, fps) -> (tensors, pieces)``, or ``None`` if the family takes no video.
        video_placeholder: of a video in the prompt, if it is not the token ``config.video_token_id``.
        video_as_images: the tokens of a video are written like an image's.
        late: a token that checkpoints store as a word, and that the family's own processor makes a special one.
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


# Every architecture by name; the files beside this one fill it in.
FAMILIES: dict[str, Family] = {}


def kinds(layout: TokenLayout) -> Int[np.ndarray, " pos"]:
    """0 text, 1 image, 2 video: the layout's kinds are those of the Qwen models."""
    return layout.kind


@dataclass(frozen=True)
class Geometry:
    """A family's row, filled in from one checkpoint's config.

    Attributes:
        name: the row of ``FAMILIES``: ``config.model_type``, except for a LLaVA with Pixtral's tower.
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
        """Refuse a map of the picture that is not the image processor's own: every box would be elsewhere."""
        if expected != made:
            raise InputError(
                f"the image processor made {made}",
                f"{expected}, by its settings",
                f"report the image processor's settings: the row {self.name!r} of mech/inputs/families is wrong",
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
            f"{suggestion(str(name), FAMILIES)}, or add a row to FAMILIES in mech/inputs/families",
        )
    if missing := [setting for setting in FAMILIES[name].reads if not hasattr(image_processor, setting)]:
        raise UnsupportedModel(
            f"a {type(image_processor).__name__} for a {name} model, which has no {missing[0]!r}",
            "an image processor of the model's family",
            "load the image processor that belongs to this checkpoint",
        )
    return Geometry(name, **FAMILIES[name].measure(name, config, image_processor), config=config)
