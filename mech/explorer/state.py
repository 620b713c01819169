"""What the explorer shows, as one frozen value: a line of text that can be a link, and Python that reproduces it.

    state = State(sample=3, off=((0, 2), (4, 1)), way="zero")
    state.link()                          # "sample=3&off=L0H2,L4H1&way=zero"
    State.read(state.link()) == state     # True
    print(state.as_python())              # runs unchanged, given `model` and `samples`

It does not know whether the model has such a head or the data such a sample; that is checked where it is used.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlencode

from mech.arguments import Rule, Whole, checking, one_of
from mech.data.regions import Box
from mech.errors import InputError, suggestion

WAYS = ("mean", "zero", "resample", "patch", "pull")
SCORES = ("ram", "gaze", "vision_mass", "writes", "effect")
BIAS = 8.0  # of "pull", in logits of attention
SEED = 0  # of "resample" and of the random heads
NEW_TOKENS = 8  # tokens generated
LONGEST = 2000  # characters of a question
COUNTERFACTUAL, BLANK = "counterfactual", "blank"
Pair = tuple[int, int]  # layer, head
Other = Annotated[
    str, Rule("'counterfactual', 'blank' or the number of a sample", lambda text: bool(OTHER.fullmatch(text)))
]
OTHER = re.compile(rf"{COUNTERFACTUAL}|{BLANK}|\d{{1,7}}")
Question = Annotated[str, Rule(f"at most {LONGEST} characters", lambda text: len(text) <= LONGEST)]
_HEAD = re.compile(r"L(\d{1,4})H(\d{1,4})")


@checking(InputError)
@dataclass(frozen=True)
class State:
    """What is shown, what is changed, and which head is inspected.

    Attributes:
        sample: index of the sample.
        picture: the name (a digest) of a user's picture, in place of the sample's.
        question: a question in place of the sample's.
        boxes: drawn evidence, in place of the sample's.
        off: heads whose output is changed.
        way: how they are changed: to their ``mean`` over other samples, ``zero``, a ``resample``; ``patch`` (their
            output on the second picture) or ``pull`` (a bias of ``BIAS`` towards the evidence).
        other: the second picture: that of the sample's ``counterfactual``, the same without the evidence (``blank``),
            or that of another sample, by its number.
        head: the head whose attention is shown.
        word: the word of the question it attends from, by its number; None for the whole question.
        score: the score shown in the map of heads.
        against: the other score in the scatter plot.
        sinks: whether attention on sinks is "shown" in the pictures, or "hidden" and the rest rescaled.
    """

    sample: Whole = 0
    picture: str = ""
    question: Question = ""
    boxes: tuple[Box, ...] = ()
    off: tuple[Pair, ...] = ()
    way: one_of(WAYS) = "mean"
    other: Other = "counterfactual"
    head: Pair | None = None
    word: Whole | None = None
    score: one_of(SCORES) = "ram"
    against: one_of(SCORES) = "effect"
    sinks: one_of(("shown", "hidden")) = "shown"

    @classmethod
    def read(cls, link: str) -> "State":
        """The state of a link.

        Raises:
            InputError: an unknown name, or an invalid value.
        """
        given: dict[str, Any] = {}
        for name, text in parse_qsl(link.lstrip("#?"), keep_blank_values=True):
            if name not in _READ:
                raise InputError(f"{name!r} in a link to the explorer", ", ".join(_READ), suggestion(name, _READ))
            try:
                given[name] = _READ[name](text)
            except (ValueError, IndexError) as error:
                raise InputError(f"{name}={text!r} in a link to the explorer", "the form that the page writes",
                                 "copy the link again") from error  # fmt: skip
        return cls(**given)

    def link(self) -> str:
        """The state as the part of an address after ``#``; defaults are left out."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {name: given[name] for name in given if given[name] != _START[name]}
        return urlencode({name: _WRITTEN.get(name, str)(value) for name, value in changed.items()}, safe=",:;")

    def as_python(self, origin: "Origin | None" = None) -> str:
        """Python that makes the sample, changes the heads, answers and reads the head, as the page does.

        It defines ``answer``, ``probabilities`` (of the next token), and ``attention`` of the head if one is chosen.

        Args:
            origin: how model and samples are made; without it ``model`` and ``samples`` must exist.
        """
        origin = origin or Origin()
        body = "\n".join(part for part in (_subject(self, origin), _answer(self), _attention(self)) if part)
        imports = "from dataclasses import replace\n\n" if "replace(" in body else ""
        imports += "from PIL import Image\n\n" if self.picture else ""
        return f"{imports}import mech\n\n{origin.code()}\n{body}"


@dataclass(frozen=True)
class Origin:
    """How model and samples are made, as Python expressions; "" if the reader has them.

    Attributes:
        model: expression for the model.
        samples: expression for all samples.
        split: whether half of them is shown and the other half is the reference of ``mean`` and ``resample``.
        pictures: digest -> file name, for each of the user's pictures.
    """

    model: str = ""
    samples: str = ""
    split: bool = True
    pictures: Mapping[str, str] = field(default_factory=dict)

    def code(self) -> str:
        """The lines that make model and samples."""
        model = f"model = {self.model}\n" if self.model else "# model: the explored model\n"
        if not self.samples:
            return f"{model}# samples, reference: what was given to mech.explore\n"
        halves = f"reference, samples = {self.samples}.split(0.5)\n"
        return model + (halves if self.split else f"reference = samples = {self.samples}\n")


def heads_in(text: str) -> tuple[Pair, ...]:
    """``"L0H2,L4H1"`` as pairs, each once.

    Raises:
        ValueError: it is something else.
    """
    found: dict[Pair, None] = {}
    for part in text.split(",") if text else []:
        if (one := _HEAD.fullmatch(part)) is None:
            raise ValueError(part)
        found[int(one[1]), int(one[2])] = None
    return tuple(found)


def in_words(heads: Iterable[Pair]) -> str:
    """Pairs as ``"L0H2,L4H1"``."""
    return ",".join(f"L{layer}H{head}" for layer, head in heads)


def _boxes(text: str) -> tuple[Box, ...]:
    """Boxes from ``"0:10,12,40,44"``, or for a video ``"f4:10,12,40,44"``; several are separated by ``;``."""
    found = []
    for part in text.split(";") if text else []:
        place, corners = part.split(":")
        x0, y0, x1, y1 = map(float, corners.split(","))
        where = {"frame": int(place[1:])} if place.startswith("f") else {"image": int(place)}
        found.append(Box(x0, y0, x1, y1, **where))
    return tuple(found)


def _box_in_words(box: Box) -> str:
    place = box.image if box.frame is None else f"f{box.frame}"
    return f"{place}:{box.x0:g},{box.y0:g},{box.x1:g},{box.y1:g}"


_READ: dict[str, Callable[[str], Any]] = {
    "sample": int, "picture": str, "question": str, "boxes": _boxes, "off": heads_in, "way": str, "other": str,
    "head": lambda text: heads_in(text)[0], "word": int, "score": str, "against": str, "sinks": str,
}  # fmt: skip
_WRITTEN: dict[str, Callable[[Any], str]] = {
    "boxes": lambda boxes: ";".join(map(_box_in_words, boxes)),
    "off": in_words,
    "head": lambda head: in_words([head]),
}
_START = {field.name: field.default for field in fields(State)}


# -- Python ---------------------------------------------------------------------------------------------------------


def _box_in_python(box: Box) -> str:
    place = f"image={box.image}" if box.frame is None else f"frame={box.frame}"
    return f"mech.Box({box.x0:g}, {box.y0:g}, {box.x1:g}, {box.y1:g}, {place})"


def quoted(text: str) -> str:
    """A text as a Python literal."""
    return json.dumps(text, ensure_ascii=False)


def _subject(state: State, origin: Origin) -> str:
    """The lines that make ``sample`` and ``inputs``."""
    evidence = f"({', '.join(map(_box_in_python, state.boxes))},)" if state.boxes else ""
    if state.picture:
        name = origin.pictures.get(state.picture, "picture.png")
        asked = quoted(state.question) if state.question else f"samples[{state.sample}].question"
        lines = f"picture = Image.open({quoted(name)})  # the file that was dropped\n"
        lines += f'sample = mech.Sample({asked}, "", (picture,){f", evidence={evidence}" if evidence else ""})\n'
        return lines + "inputs = model.inputs_of(sample)\n"
    changes = [f"question={quoted(state.question)}"] if state.question else []
    changes += [f"evidence={evidence}"] if evidence else []
    lines = f"sample = samples[{state.sample}]\n"
    lines += f"sample = replace(sample, {', '.join(changes)})\n" if changes else ""
    return lines + "inputs = model.inputs_of(sample)\n"


def _second(state: State) -> str:
    """The expression that gives the second picture, as a sample with the same question."""
    if state.other == BLANK:
        return "mech.without_evidence(sample)"
    if state.other == COUNTERFACTUAL:
        return "replace(sample.counterfactual, question=sample.question)"
    images = f"images=samples[{state.other}].images, video=samples[{state.other}].video"
    return f"replace(sample, {images})"


def _spec(state: State) -> str:
    """The lines that make ``change``."""
    heads = f"heads = {list(state.off)!r}\n"
    if state.way == "patch":
        patch = 'mech.Patch("attn.hook_z", model.inputs_of(other), heads=heads)'
        return f"{heads}other = {_second(state)}\nchange = {patch}\n"
    if state.way == "pull":
        return f"{heads}change = mech.Redirect(heads, to=sample.evidence, bias={BIAS:g})\n"
    source = "" if state.way == "zero" else ", reference=reference"
    seed = f", seed={SEED}" if state.way == "resample" else ""
    return f'{heads}change = mech.Ablate(heads=heads, to="{state.way}"{source}{seed})\n'


def _answer(state: State) -> str:
    """The lines that answer, with the change if there is one."""
    asked = "{run}.answer(inputs, max_new_tokens=" + str(NEW_TOKENS) + ")"
    logits = "{run}(inputs, logits_to_keep=1)[0, -1]"
    lines = f"answer = {asked}\nprobabilities = {logits}.detach().float().softmax(-1)\n"
    if state.off:
        block = lines.format(run="changed").replace("\n", "\n    ").rstrip()
        lines = f"{_spec(state)}with mech.intervene(model, change) as changed:\n    {block}\n"
    else:
        lines = lines.format(run="model")
    shown = "for token in probabilities.topk(5).indices.tolist():\n"
    shown += '    print(f"{model.tokenizer.decode([token])!r:>12} {probabilities[token]:.3f}")\n'
    return f"{lines}print(answer)\n{shown}"


def _attention(state: State) -> str:
    """The lines that read the attention of the state's head, in the unchanged model."""
    if state.head is None:
        return ""
    layer, head = state.head
    word = f"list(inputs.layout.words().values())[{state.word}]"
    rows = 'inputs.layout.positions("question")' if state.word is None else word
    lines = f'point = "blocks.{layer}.attn.hook_pattern"\n'
    lines += "_, cache = model.run_with_cache(inputs, names_filter=[point])\n"
    lines += f"rows = {rows}\nattention = cache[point][0, {head}, rows].float().mean(0)\n"
    if not state.picture or state.boxes:
        lines += "evidence = inputs.layout.visual.positions(sample.evidence)\n"
        lines += 'print(f"on the evidence: {attention[evidence].sum():.3f}")\n'
    return lines
