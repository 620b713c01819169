"""A question and pictures -> ``Inputs``. The only place where tensors for a model are built.

    build(processor, "Which digit is in the red frame?", images=[photo])     # chat template around the question
    build(processor, question, video=frames, fps=2.0, answer="seven")         # the answer appended (teacher forcing)
    encode(processor, "USER: <image>\\nHello ASSISTANT:", images=[photo])      # a text with placeholders, used as given

Each picture appears in the text as one placeholder, which is replaced by what the family writes for it: marks of rows
and tiles, and one visual token for each run of them. The text is tokenized once, and each visual token is repeated for
the length of its run; what every position is follows from that, not from searching for tokens. The span of the
question comes from character offsets, so it contains no token of the template. If several tokens make up one character
(Chinese, an emoji), the layout shows it on the last of them, and the others as "".

For the Qwen-VL family this builds ``mm_token_type_ids`` and the grids, without which the models silently fall back to
one-dimensional positions. The result is that of the Hugging Face processor; frames of a video are resized by PIL,
which may differ from torchvision in the last bit. Frames are used as given: nothing is sampled.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from mech.data.pictures import pictures
from mech.data.regions import Passage
from mech.errors import InputError
from mech.inputs.batch import Inputs
from mech.inputs.families.family import Family
from mech.inputs.layout import TEXT, TokenLayout
from mech.inputs.processor import Processor
from mech.inputs.visuals import Run, Written, image_visuals, video_visuals

# Stands for the question while the template is rendered a second time, to find where the question goes.
_STAND_IN = "\ue000question\ue001"


def build(
    processor: Processor,
    question: str,
    images: Sequence[Any] = (),
    video: Sequence[Any] = (),
    fps: float = 2.0,
    answer: str = "",
    context: str = "",
    passages: Sequence[Passage] = (),
) -> Inputs:
    """A question about pictures, in the model's chat template.

    Args:
        processor: of the model.
        question: the user's question, without special tokens.
        images: PIL images, paths or uint8 arrays, in the order in which they are shown.
        video: the frames of a video, all of one size, instead of images.
        fps: frames per second of ``video``.
        answer: appended where the model's answer begins; the layout's span "answer".
        context: a text before the question in the user's message, not part of the question.
        passages: stretches of the context whose positions the layout will know.

    Raises:
        InputError: the question cannot be asked like this; nothing has been computed yet.
    """
    for name, given in (("question", question), ("answer", answer), ("context", context)):
        if not isinstance(given, str):
            raise InputError(f"the {name} {given!r} of type {type(given).__name__}", "text", "pass str(...) of it")
        if special := [token for token in processor.special_tokens if token in given]:
            raise InputError(
                f"the {name} holds the special token {special[0]!r}",
                "plain text; the chat template inserts the placeholders",
                "remove it and pass images=[...]",
            )
    if not question.strip():
        raise InputError("an empty question", "some text", "ask something; its tokens are where retrieval is measured")
    images, video = pictures(images), pictures(video, "video")
    text = context + question
    prompt, start, end = _rendered(processor, text, len(images), bool(video))
    # Where the text would begin if the template had not stripped it.
    first = start if end - start == len(text) else start - (len(text) - len(text.lstrip()))
    spans = {"question": (max(start, first + len(context)), end)}
    spans |= {passage.span: (first + passage.start, first + passage.stop) for passage in passages}
    if not answer:
        return encode(processor, prompt, images, video, fps, spans=spans)
    processor.answer_ids(answer)
    whole = processor.with_answer(prompt, answer)
    return encode(processor, whole, images, video, fps, spans={**spans, "answer": (len(prompt), len(whole))})


def _rendered(processor: Processor, question: str, images: int, video: bool) -> tuple[str, int, int]:
    """The prompt, and where in it the question starts and ends."""
    prompt = processor.prompt(question, images, video)
    around = processor.prompt(_STAND_IN, images, video).split(_STAND_IN)
    if len(around) == 2:
        before, after = around
        inner = prompt[len(before) : len(prompt) - len(after)]
        # Templates may strip the question, but do nothing else to it.
        if prompt == before + inner + after and inner in (question, question.strip()):
            return prompt, len(before), len(before) + len(inner)
    raise InputError(
        "the chat template does not print the question exactly once and unchanged",
        "a template that prints the text of a user message",
        "pass another chat_template to Processor.from_hf, or use encode with spans={'question': (start, end)}",
    )


def encode(
    processor: Processor,
    text: str,
    images: Sequence[Any] = (),
    video: Sequence[Any] = (),
    fps: float = 2.0,
    *,
    spans: Mapping[str, tuple[int, int]] | None = None,
) -> Inputs:
    """A text with one placeholder for each picture, as tensors and a layout.

    Args:
        processor: of the model.
        text: with ``processor.image_token`` for each image, or one ``processor.video_token``.
        images: PIL images, paths or uint8 arrays, in the order of their placeholders.
        video: frames of one size.
        fps: frames per second of ``video``.
        spans: named stretches of ``text``, as (first, one past last) character; they become the layout's spans.
    """
    shown, frames = pictures(images), pictures(video, "video")
    _check_counts(processor, text, len(shown), len(frames))
    family = processor.geometry.family
    if frames:
        tensors, written = video_visuals(processor, frames, fps)
    else:
        tensors, written = image_visuals(processor, shown)
    visual = processor.visual_token(bool(frames))
    placeholder = processor.video_token if frames else processor.image_token
    text, spans, runs = _written_out(text, dict(spans or {}), str(placeholder), written, visual)
    ids, offsets, shown_as = _tokenized(processor, text)
    slots = np.flatnonzero(ids == processor.tokenizer.convert_tokens_to_ids(visual))
    _check_slots(slots, runs, family)
    repeats = np.ones(len(ids), dtype=int)
    repeats[slots] = [len(run.tokens) for run in runs]
    source = np.repeat(np.arange(len(ids)), repeats)
    layout = TokenLayout(
        **_fields(source, slots, runs),
        tokens=tuple(shown_as[index] for index in source),
        spans={name: _span(offsets, source, slots, *characters) for name, characters in spans.items()},
        images=tuple(picture.size for picture in frames or shown),
        frames_per_token=processor.geometry.frames_per_token if frames else 1,
    )
    sequence = torch.from_numpy(ids[source])[None]
    tensors = {"input_ids": sequence, "attention_mask": torch.ones_like(sequence), **tensors}
    if family.types:
        name, types = family.types
        tensors[name] = torch.from_numpy(types(layout).astype(np.int64))[None]
    if family.memory and shown:
        made = [processor.geometry.show(picture.size, processor.image_processor) for picture in shown]
        tensors, layout = family.memory(tensors, layout, made, processor.geometry)
    return Inputs(tensors, (layout,), processor.mark)


def _check_slots(slots: Int[np.ndarray, " picture"], runs: Sequence[Any], family: Family) -> None:
    if len(slots) != len(runs):
        raise InputError(
            f"the tokenizer finds {len(slots)} placeholders in a prompt with {len(runs)}",
            "placeholders that are separate tokens",
            "put white space around them",
        )
    if family.types and family.types[0] == "mm_token_type_ids" and (np.diff(slots) == 1).any():
        raise InputError(
            "two pictures side by side without a token between them",
            "text or <|vision_start|> ... <|vision_end|> around each: a run of visual tokens counts as one picture",
            "put a token between the placeholders",
        )


def _check_counts(processor: Processor, text: str, images: int, frames: int) -> None:
    if images and frames:
        raise InputError("both images and a video", "one of the two", "pass images=[...] or video=[...]")
    if frames and processor.video_token is None:
        raise InputError(
            f"a video for a {processor.geometry.name} model, which takes none",
            "images",
            "pass the frames as images=[...]",
        )
    for token, count, name in (
        (processor.image_token, images, "image"),
        (processor.video_token, min(frames, 1), "video"),
    ):
        written = text.count(token) if token else 0
        if written != count:
            raise InputError(
                f"{written} placeholders {token!r} in the text for {count} {name}{'s' * (count != 1)}",
                "one placeholder for each",
                "pass as many pictures as there are placeholders; build() inserts them itself",
            )


def _tokenized(processor: Processor, text: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The token ids of a text, the characters each stands for, and how each is shown."""
    tokenizer = processor.tokenizer
    # Templates that print the first special token themselves (PaliGemma's after the images) must not get it twice.
    bos = tokenizer.bos_token
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=not (bos and bos in text), verbose=False)
    ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    offsets = _without_gaps(np.asarray(encoded["offset_mapping"], dtype=int).reshape(-1, 2))
    return ids, offsets, _shown(text, offsets, tokenizer.convert_ids_to_tokens(ids.tolist()))


def _without_gaps(offsets: np.ndarray) -> np.ndarray:
    """Offsets that leave out no character: one that no token has (a trimmed space) goes to the next token."""
    widened, reached = offsets.copy(), 0
    for index, (start, stop) in enumerate(offsets):
        if stop:  # (0, 0) is a token that the tokenizer added
            widened[index, 0], reached = min(start, reached), max(reached, stop)
    return widened


def _shown(text: str, offsets: np.ndarray, names: list[str]) -> list[str]:
    """How each token is shown: its characters, each on the last of the tokens that share it, where it is whole.

    Byte-level and byte-fallback tokenizers encode a rare character as several tokens, which all have its offsets.
    """
    shown, taken = list(names), len(text)
    for index in reversed(range(len(offsets))):
        start, stop = offsets[index]
        if stop:
            shown[index] = text[start : min(stop, taken)]
            taken = min(taken, start)
    return shown


def _written_out(
    text: str, spans: dict[str, tuple[int, int]], placeholder: str, written: list[Written], visual: str
) -> tuple[str, dict[str, tuple[int, int]], list[Run]]:
    """The text with every placeholder replaced by what it stands for, one visual token for each run.

    Returns the text, the spans in it, and the runs in order.
    """
    parts = text.split(placeholder)
    replaced = ["".join(piece if isinstance(piece, str) else visual for piece in pieces) for pieces in written]
    starts = np.cumsum([len(part) for part in parts[:-1]]) + len(placeholder) * np.arange(len(written))
    growth = np.cumsum([0, *(len(tokens) - len(placeholder) for tokens in replaced)])

    def moved(character: int) -> int:
        return int(character + growth[np.searchsorted(starts, character)])

    whole = parts[0] + "".join(tokens + part for tokens, part in zip(replaced, parts[1:], strict=True))
    runs = [piece for pieces in written for piece in pieces if isinstance(piece, Run)]
    return whole, {name: (moved(first), moved(behind)) for name, (first, behind) in spans.items()}, runs


def _fields(source: np.ndarray, slots: np.ndarray, runs: list[Run]) -> dict[str, Any]:
    """The layout's fields for each position; ``source`` is the token of the text that it comes from."""
    names = ("frame", "row", "col", "view", "rect")
    fields: dict[str, Any] = {name: np.full(len(source), -1) for name in ("image", *names[:-1])}
    fields["kind"] = np.full(len(source), TEXT)
    fields["rect"] = np.full((len(source), 4), np.nan)
    for slot, run in zip(slots, runs, strict=True):
        start = int(np.searchsorted(source, slot))
        here = slice(start, start + len(run.tokens))
        fields["kind"][here], fields["image"][here] = run.kind, run.image
        for name in names:
            fields[name][here] = getattr(run.tokens, name)
    return fields


def _span(offsets: np.ndarray, source: np.ndarray, slots: np.ndarray, first: int, behind: int) -> tuple[int, ...]:
    """Positions of the tokens with a character in ``[first, behind)``, except placeholders."""
    inside = (offsets[:, 0] < behind) & (offsets[:, 1] > first) & (offsets[:, 0] < offsets[:, 1])
    inside[slots] = False
    return tuple(np.flatnonzero(inside[source]).tolist())
