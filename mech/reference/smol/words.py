"""The words that the visual tokens of a scene show, as tokens of SmolLM2's vocabulary: the picture as if it were text.

A line of a score sheet is six visual tokens, and reads as in a text: ``" Anna" ":" " " "4" "1" "7"``, or
``" No" "or" ":" " " "7" "\\n"``. A frame shows two words in its first cell, its (first) digit and its colour, whose
embeddings are added. Everything else shows a line break. This is the whole interface between vision and language: the
language model is tuned on these embeddings, and the tower learns to produce them.
"""

import random
from dataclasses import dataclass

from mech.data import answers, haystacks
from mech.data.haystacks import Item, Scene

IMAGE = "<image>"
CELLS = haystacks.SIDE // haystacks.CELL
CAPTION = "List all that can be read."
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Shown = tuple[int, int]  # the token ids of the two words that a visual token shows; the second is -1 where there is one


class Vocabulary:
    """Token ids of the words that pictures can show, with a tokenizer's own spelling."""

    def __init__(self, words):
        self.tokens = lambda text: words(text, add_special_tokens=False).input_ids
        self.blank, self.space, self.colon = (self.tokens(mark)[0] for mark in ("\n", " ", ":"))
        self.digit = [self.tokens(str(digit))[0] for digit in range(10)]
        self.key = {key: self.tokens(f" {key}") for key in (*haystacks.COLOURS, *haystacks.NAMES)}

    @property
    def single(self) -> list[int]:
        """Every token that a visual token can show without a colour."""
        names = {token for name in haystacks.NAMES for token in self.key[name]}
        return [self.blank, self.space, self.colon, *self.digit, *sorted(names)]

    @property
    def colours(self) -> list[int]:
        """The names of the colours, one token each: the possible second words."""
        return [self.key[colour][0] for colour in haystacks.COLOURS]

    def shown(self, scene: Scene) -> list[Shown]:
        """What every visual token of a scene's images shows, in the order of the sequence."""
        cells = [(self.blank, -1)] * (len(scene.canvas) * CELLS**2)
        for item in scene.items:
            row = (item.picture * CELLS + item.y // haystacks.CELL) * CELLS
            if scene.domain in ("documents", "pages"):
                cells[row : row + CELLS] = self._line(item)
            else:
                left = row + item.x // haystacks.CELL
                digits = [(self.digit[digit], -1) for digit in item.digits]
                cells[left : left + len(digits)] = [(digits[0][0], self.key[item.key][0]), *digits[1:]]
        return cells

    def _line(self, item: Item) -> list[Shown]:
        start = CELLS - 3 if len(item.digits) > 1 else CELLS - 2
        line = [*self.key[item.key], self.colon]
        line += [self.space] * (start - len(line)) + [self.digit[digit] for digit in item.digits]
        return [(token, -1) for token in [*line, self.blank][:CELLS]]


@dataclass(frozen=True)
class Turn:
    """A question and its answer of some kind; in a ``listed`` one only the digits can be learned."""

    question: str
    answer: str
    kind: str

    @property
    def listed(self) -> bool:
        return self.kind == "list"


def turns(scene: Scene, rng: random.Random, n_asked: int) -> list[Turn]:
    """Questions about ``n_asked`` items of a scene, each with any kind of answer, and a list of the other items."""
    order = list(range(len(scene.items)))
    rng.shuffle(order)
    kinds = ("digit",) if len(scene.items[0].digits) == 1 else ("number", "number", "sentence", "name")
    said = []
    for index in order[:n_asked]:
        item, kind = scene.items[index], rng.choice(kinds)
        question = rng.choice(answers.QUESTIONS[kind][scene.domain]).format(key=item.key, number=item.number)
        said.append(Turn(question, answers.answer_to(kind, scene.domain, item.key, item.number), kind))
    if rest := [scene.items[index] for index in order[n_asked:]]:
        listed = Turn(CAPTION, "".join(f" {item.key}{item.number}" for item in rest), "list")
        said.insert(rng.randrange(len(said) + 1), listed)
    return said
