"""Questions and pictures for a hooked model, and runs of its vision stack alone.

Every current family has ``get_image_features`` (and ``get_video_features``) and takes their output back as
``mm_encoder_outputs``; families differ only in the tensors these need besides the pixels. Mllama has neither: its text
stack is given the memory that its cross-attention layers attend to.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mech.arguments import NOT_EMPTY, Positive, checking
from mech.data.samples import Sample
from mech.errors import InputError, UnsupportedModel
from mech.inputs.batch import Inputs


class Encoding:
    """How a hooked model prepares questions and pictures before it runs."""

    hf_model: Any
    name: str
    revision: str | None
    device: Any
    dtype: Any
    _processor: Any
    _source: str | None
    _tensors: Any
    turns: Any

    @torch.no_grad()
    def encode_pictures(self, inputs: Any) -> tuple[Any, dict[str, Any]]:
        """Run the vision stack alone; return the inputs without pixels, and the features that take their place.

            blind, seen = model.encode_pictures(inputs)
            logits = model(blind, mm_encoder_outputs=seen)         # equal to model(inputs), the pictures read once

        Use it to run the same pictures many times while only the *text* stack is changed. Hooks on the vision stack and
        the projector do not fire in such forwards.
        """
        with self.turns.taken(running=True):
            seen = pictures_seen(self.hf_model, self._tensors(inputs, {}))
        blind = {name: value for name, value in inputs.tensors.items() if not name.startswith("pixel_values")}
        return replace(inputs, tensors=blind), seen

    @checking(InputError)
    def inputs(
        self,
        question: str,
        images: Sequence = (),
        video: Sequence = (),
        fps: Positive = 2.0,
        answer: str = "",
        **text: Any,
    ) -> Any:
        """``Inputs`` for a question in the model's chat template; ``text``: ``context``, ``passages`` of ``build``."""
        from mech.inputs import build

        made = build(self.processor, question, images=images, video=video, fps=fps, answer=answer, **text)
        return made.to(self.device, self.dtype)

    @checking(InputError)
    def inputs_of(self, sample: Sample, answer: bool = False) -> Any:
        """``Inputs`` for a ``Sample``; with ``answer=True`` its answer follows the prompt."""
        text: dict[str, Any] = dict(
            answer=sample.answer if answer else "", context=sample.context, passages=sample.passages()
        )
        return self.inputs(sample.question, sample.images, sample.video, sample.fps, **text)

    @checking(InputError)
    def collate(self, rows: Annotated[Sequence[Inputs], NOT_EMPTY]) -> Any:
        """One batch of several ``Inputs``, padded on the left."""
        from mech.inputs import collate

        return collate(list(rows), self._pad_token_id())

    @property
    def processor(self) -> Any:
        """The ``mech.inputs.Processor``; opened when first needed."""
        from mech import inputs

        if self._processor is None:
            if self._source is None:
                raise InputError(f"{self.name} has no processor", "HookedMLLM.from_hf(hf_model, processor)")
            self._processor = inputs.load_processor(self._source, self.hf_model.config, revision=self.revision)
        elif not isinstance(self._processor, inputs.Processor):
            self._processor = inputs.Processor.from_hf(self._processor, self.hf_model.config)
        return self._processor

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def _check_made(self, inputs: Any) -> None:
        """Refuse inputs made by another model's processor: their tokens mean something else to this model."""
        known = self._processor is not None or self._source is not None
        if known and inputs.made_by not in ("", self.processor.mark):
            raise InputError(
                f"inputs of another model ({inputs.made_by})", f"those of {self.name} ({self.processor.mark})",
                "build them with the inputs(...) of the model that runs them",
            )  # fmt: skip

    def _pad_token_id(self) -> int:
        text = self.hf_model.config.get_text_config()
        known = [getattr(source, "pad_token_id", None) for source in (self.hf_model.generation_config, text)]
        if self._processor is not None or self._source is not None:
            known.insert(0, self.tokenizer.pad_token_id)
        known.append(getattr(text, "eos_token_id", None))
        first = next((token for token in known if token is not None), 0)
        return first[0] if isinstance(first, list) else first


def pictures_seen(hf_model: PreTrainedModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """The features that take the place of the pixels in ``given``; empty if there are none.

    Raises:
        UnsupportedModel: the architecture cannot run its vision stack alone.
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
