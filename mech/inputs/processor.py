"""``Processor``: what is needed to turn a question and pictures into tensors for one checkpoint.

A tokenizer, an image processor, a chat template and the geometry of the visual tokens. ``AutoProcessor`` is not used:
for the Qwen-VL family it fails without torchvision, because it insists on a video processor. Here the image processors
run on PIL, ``mech.inputs`` expands placeholders and cuts videos, and nothing depends on torchvision.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mech.errors import InputError, UnsupportedModel
from mech.files import parse_json, read
from mech.inputs.families.family import Geometry, geometry_of


@dataclass(frozen=True, eq=False)
class Processor:
    """Built by ``load_processor`` or ``Processor.from_hf``.

    Attributes:
        tokenizer: a fast Hugging Face tokenizer (spans come from its character offsets).
        image_processor: a Hugging Face image processor.
        chat_template: jinja; if a checkpoint has none, its family's (``mech.inputs.families.family.FAMILIES``).
        geometry: which pixels each visual token stands for.
        image_token: the placeholder of an image in a prompt.
        video_token: the placeholder of a video, if the family takes any.
        visual_tokens: how the visual tokens of an image and of a video are written.
        video_size: limits on the pixels of a video (``shortest_edge``, ``longest_edge``) or the tokens of its frames
            (``max_soft_tokens``), if they differ from an image's.
    """

    tokenizer: Any
    image_processor: Any
    chat_template: str
    geometry: Geometry
    image_token: str
    video_token: str | None
    visual_tokens: tuple[str, str | None]
    video_size: dict[str, int] | None = None

    @classmethod
    def from_hf(
        cls,
        processor: Any = None,
        config: Any = None,
        *,
        tokenizer: Any = None,
        image_processor: Any = None,
        chat_template: str | None = None,
        video_size: dict[str, int] | None = None,
    ) -> "Processor":
        """From a Hugging Face processor, or from its tokenizer and image processor.

        Args:
            processor: a Hugging Face processor; parts given by name take precedence over its own.
            config: the model's config, which determines family, patch size and placeholder tokens.
            tokenizer: the tokenizer.
            image_processor: the image processor.
            chat_template: jinja, instead of the processor's or the tokenizer's own.
            video_size: limits on the pixels of a video, instead of the video processor's.
        """
        tokenizer = tokenizer or getattr(processor, "tokenizer", None)
        image_processor = image_processor or getattr(processor, "image_processor", None)
        if tokenizer is None or image_processor is None or config is None:
            missing = {"tokenizer": tokenizer, "image processor": image_processor, "config": config}
            raise UnsupportedModel(
                "a processor without " + " and ".join(name for name, value in missing.items() if value is None),
                "a tokenizer, an image processor and the model's config",
                "pass Processor.from_hf(processor, model.config), or tokenizer= and image_processor=",
            )
        if not getattr(tokenizer, "is_fast", False):
            raise UnsupportedModel(
                f"{type(tokenizer).__name__}, which gives no character offsets",
                "a fast tokenizer",
                "load it with AutoTokenizer; the checkpoint needs a tokenizer.json",
            )
        image_processor = _on_pil(image_processor)
        geometry = geometry_of(config, image_processor)
        family = geometry.family
        video_size = video_size or _limits(getattr(processor, "video_processor", None))
        own = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
        if isinstance(own, dict):  # several templates by name
            own = own.get("default")
        if family.late and family.late not in map(str, tokenizer.added_tokens_decoder.values()):
            late = {"additional_special_tokens": [family.late]}
            tokenizer.add_special_tokens(late, replace_extra_special_tokens=False)
        visual = _placeholder(tokenizer, config, "image_token_id")
        moving = visual if family.video_as_images else None
        if family.video and not moving:
            moving = _placeholder(tokenizer, config, "video_token_id")
        return cls(
            tokenizer=tokenizer,
            image_processor=image_processor,
            chat_template=chat_template or own or family.template,
            geometry=geometry,
            image_token=family.placeholder or visual,
            video_token=(family.video_placeholder or moving) if family.video else None,
            visual_tokens=(visual, moving),
            video_size=video_size,
        )

    def check_belongs(self, config: Any) -> None:
        """Refuse a model that turns pictures into other tokens.

        Raises:
            UnsupportedModel: another family, other patches, or another placeholder.
        """
        theirs, token = (
            geometry_of(config, self.image_processor),
            _placeholder(self.tokenizer, config, "image_token_id"),
        )
        for what, own, other in (("geometry", self.geometry, theirs), ("placeholder", self.visual_tokens[0], token)):
            if own != other:
                raise UnsupportedModel(
                    f"a processor with the {what} {own}", f"the model's, {other}",
                    "load the processor that belongs to this checkpoint",
                )  # fmt: skip

    @cached_property
    def mark(self) -> str:
        """The family, and a short hash of what its inputs mean: tokens of the vocabulary, placeholders, patches.

        Resizing is left out: it may vary for one model.
        """
        geometry, size = self.geometry, len(self.tokenizer)
        probed = self.tokenizer.convert_ids_to_tokens(sorted({*range(0, size, max(1, size // 512)), size - 1}))
        measured = (geometry.side, geometry.frames_per_token, geometry.class_tokens, geometry.tile, size, probed)
        ids = self.tokenizer.convert_tokens_to_ids([token for token in self.visual_tokens if token])
        return f"{geometry.name}-{hashlib.sha256(repr((measured, self.visual_tokens, ids)).encode()).hexdigest()[:8]}"

    def visual_token(self, video: bool) -> str:
        """How a visual token of an image, or of a video, is written."""
        return str(self.visual_tokens[video])

    @property
    def pad_token_id(self) -> int:
        """The token at padded positions; any will do, since it is masked."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in ids if token is not None)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The strings that a question may not contain: placeholders and the marks of the chat template."""
        added = self.tokenizer.added_tokens_decoder.values()
        placeholders = [token for token in (self.image_token, self.video_token, *self.visual_tokens) if token]
        return (*placeholders, *(str(token) for token in added if token.special and str(token) not in placeholders))

    def prompt(self, question: str, images: int = 0, video: bool = False) -> str:
        """The chat template around a question, up to where the answer begins; pictures come first."""
        pictures = [{"type": "image"}] * images + [{"type": "video"}] * video
        messages = [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=True
        )

    def with_answer(self, prompt: str, answer: str) -> str:
        """The prompt followed by the answer, as the model would write it.

        Templates that end in a word ("ASSISTANT:") expect a space before the answer, others end in a line break.
        """
        gap = "" if prompt[-1:].isspace() or answer[:1].isspace() else " "
        return prompt + gap + answer

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """The tokens of an answer as they follow the prompt; a logit difference reads the first."""
        prompt = self.prompt("?")
        alone, joined = (self.tokenizer(text)["input_ids"] for text in (prompt, self.with_answer(prompt, answer)))
        if joined[: len(alone)] != alone or len(joined) == len(alone):
            raise InputError(
                f"the answer {answer!r} has no separate first token after the prompt",
                "an answer that is not merged into the last token of the prompt",
                "strip white space from the start of the answer",
            )
        return tuple(joined[len(alone) :])

    def settings(self) -> dict[str, Any]:
        """What a result should record about how its inputs were made."""
        names = ("size", "crop_size", "do_resize", "do_center_crop", "do_pad", "resample", "image_mean", "image_std")
        settings = {name: getattr(self.image_processor, name, None) for name in names}
        for name in ("size", "crop_size"):
            settings[name] = {edge: value for edge, value in dict(settings[name] or {}).items() if value}
        return {
            "image_processor": type(self.image_processor).__name__,
            **{name: _plain(value) for name, value in settings.items() if value is not None},
            "video_size": self.video_size,
            "pixels_per_token_side": self.geometry.side,
        }


def _on_pil(image_processor: Any) -> Any:
    """The same image processor on PIL.

    Torchvision rounds differently when resizing and crops half a pixel elsewhere: results would depend on whether it is
    installed, and the geometry would not be exact.
    """
    if getattr(image_processor, "backend", "pil") == "pil":
        return image_processor
    import transformers

    from mech.inputs.families.pil import OWN

    name = type(image_processor).__name__.removesuffix("Fast") + "Pil"
    kind = OWN.get(name) or getattr(transformers, name, None)
    if kind is None:
        raise UnsupportedModel(
            f"{type(image_processor).__name__}, which runs on {image_processor.backend} only",
            f"an image processor with a PIL variant ({name})",
            'load it with AutoImageProcessor.from_pretrained(..., backend="pil")',
        )
    return kind.from_dict(image_processor.to_dict())


def _limits(settings: Any) -> dict[str, int] | None:
    """Limits on the pixels of a video, or the soft tokens of a frame; None where they are an image's.

    Args:
        settings: a video processor, or its stored settings.
    """
    names = ("size", "max_soft_tokens")
    stored = settings if isinstance(settings, dict) else {name: getattr(settings, name, None) for name in names}
    size = dict(stored.get("size") or {})
    edges = {edge: size[edge] for edge in ("shortest_edge", "longest_edge") if size.get(edge)}
    if len(edges) == 2:
        return edges
    most = stored.get("max_soft_tokens")
    return {"max_soft_tokens": most} if most else None


def _plain(value: Any) -> Any:
    """As JSON has it: lists for tuples, numbers for enums."""
    if isinstance(value, list | tuple):
        return [float(number) for number in value]
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _placeholder(tokenizer: Any, config: Any, name: str) -> str:
    token_id = getattr(config, name)
    # Only added tokens are found whatever text surrounds them.
    if (token := tokenizer.added_tokens_decoder.get(token_id)) is None:
        inside = 0 <= token_id < len(tokenizer)
        known = repr(tokenizer.convert_ids_to_tokens(token_id)) if inside else "nothing"
        raise UnsupportedModel(
            f"config.{name}={token_id}, which is {known} for the tokenizer",
            "its own special token",
            "load the tokenizer that belongs to this checkpoint, or add the placeholder to it as a special token",
        )
    return str(token)


def load_processor(name: str | Path, config: Any = None, *, revision: str | None = None) -> Processor:
    """The processor of a checkpoint, from a folder or the hub.

    Args:
        name: a folder or a hub id.
        config: the model's config, if it is already loaded.
        revision: branch, tag or commit on the hub.

    Raises:
        UnsupportedModel: a file is missing or broken, or no geometry is known for this architecture.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    where = str(name)
    options = {"revision": revision, "trust_remote_code": False}
    try:
        config = config or AutoConfig.from_pretrained(where, **options)
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        own = _own_class(where, revision)
        if own is None:
            image_processor = AutoImageProcessor.from_pretrained(where, backend="pil", **options)
        else:
            image_processor = own.from_pretrained(where, revision=revision)
        template = None
        if not tokenizer.chat_template:
            template = _stored(where, revision, "chat_template.json").get("chat_template")
        return Processor.from_hf(
            config=config,
            tokenizer=tokenizer,
            image_processor=image_processor,
            chat_template=template,
            video_size=_limits(_settings(where, revision, "video_processor", "video_preprocessor_config.json")),
        )
    except UnsupportedModel:
        raise
    except Exception as error:  # transformers, tokenizers and PIL have no common error for a malformed file
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UnsupportedModel(
            f"the processor of {where!r} cannot be loaded: {reason}",
            "config.json, tokenizer.json and preprocessor_config.json",
            "check the name and the network; for an interrupted download run it again",
        ) from error


def _own_class(name: str, revision: str | None) -> Any:
    """Our image processor if transformers has none on PIL, else ``None``."""
    from mech.inputs.families.pil import OWN

    settings = _settings(name, revision, "image_processor", "preprocessor_config.json")
    stored = settings.get("image_processor_type", "")
    return OWN.get(stored.removesuffix("Pil").removesuffix("Fast") + "Pil")


def _settings(name: str, revision: str | None, part: str, file: str) -> dict[str, Any]:
    """Settings of a part of the processor: in processor_config.json since transformers 5, in its own file before."""
    return _stored(name, revision, "processor_config.json").get(part) or _stored(name, revision, file)


def _stored(name: str, revision: str | None, file: str) -> dict[str, Any]:
    """A JSON file of the checkpoint, empty if it has none."""
    from transformers.utils.hub import cached_file

    path = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return {}
    try:
        stored = parse_json(read(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not JSON ({error})", "a complete file", "download or copy it again") from error
    if not isinstance(stored, dict):
        raise UnsupportedModel(f"{path} holds a {type(stored).__name__}", "an object", "download or copy it again")
    return stored
