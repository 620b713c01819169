"""The first stage: the language model learns the tasks from text, before it sees any picture.

What a picture would show is given as the embeddings of its words (``words``), so that no tower runs and sequences are
short. Only LoRA on the attention is trained. Early phases list the items of a scene, later ones ask for them
(``Phase``). Noise on the embeddings makes the model tolerate an imperfect tower, and on plain text it is kept close to
the untuned model's predictions, so that it can still write.
"""

import itertools
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mech.data import haystacks
from mech.reference.smol.adapter import Adapted, Adapters
from mech.reference.smol.steps import Checkpoint, stepped
from mech.reference.smol.words import Turn, Vocabulary, turns

DOMAINS = {"grounding": 0.5, "documents": 0.3, "pages": 0.2}  # the share of each in the steps of most phases
HARDEST = {"grounding": 0.8, "documents": 0.1, "pages": 0.1}  # in the phases that teach what is learned last
FULLEST = 0.7  # the share of batches whose scenes are as full as they can be
NOISE = 0.3  # of the embeddings of what is shown, relative to their own size, at most
PLAIN = 160  # tokens of plain text in every other step
HELD = 4.0  # how much a nat of drift on them counts, against a nat of the answers' loss
RATE = 1.5e-3
WARM_UP, ANNEALED = 10, 40  # steps at the beginning in which the rate rises, and at the end in which it falls to 0
EVERY = 10  # steps between two lines of the curve


@dataclass(frozen=True)
class Phase:
    """Some steps: how many items of a scene are asked for (the others are listed), and what the scenes are.

    Attributes:
        steps: how many.
        asked: items of a scene that are asked for one by one, at most.
        scenes: scenes per step; half as many if they have three pages.
        digits: how many digits the items have.
        domains: the share of each in the steps.
    """

    steps: int
    asked: int
    scenes: int
    digits: tuple[int, ...] = (1, 3)
    domains: dict[str, float] = field(default_factory=lambda: DOMAINS)


# In a list, " red7 blue3", every second token has to find a digit: four times as many for their cost as where each is
# asked for. With lists, framed digits (colour and digit are one visual token) are learned in 100 steps; without them,
# not in 120. A line of a score sheet reads like text and is learned in 30.
PHASES = (
    Phase(60, asked=0, scenes=16),
    Phase(40, asked=0, scenes=16, digits=(1,), domains=HARDEST),
    Phase(50, asked=4, scenes=8),
    Phase(50, asked=12, scenes=6, digits=(1,), domains=HARDEST),
    Phase(60, asked=8, scenes=6),
)
STEPS = sum(phase.steps for phase in PHASES)


@dataclass
class Row:
    """One dialogue as tokens: ``second`` is -1 where a token is one word; ``learned`` marks what is to be predicted."""

    ids: list[int] = field(default_factory=list)
    second: list[int] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)
    answers: list[tuple[str, range]] = field(default_factory=list)  # the kind of each full answer, and where it is

    def add(self, ids: list[int], learned: bool = False) -> None:
        self.ids += ids
        self.second += [-1] * len(ids)
        self.learned += [learned] * len(ids)


def dialogue(vocabulary: Vocabulary, shown: list[tuple[int, int]], asked: list[Turn]) -> Row:
    """The tokens of a dialogue about a picture, as the chat template writes it, with words in place of the picture."""
    row, tokens = Row(), vocabulary.tokens
    for number, turn in enumerate(asked):
        row.add(tokens("<|im_start|>user\n"))
        if number == 0:
            row.ids += [first for first, _ in shown]
            row.second += [second for _, second in shown]
            row.learned += [False] * len(shown)
        row.add(tokens(f"{turn.question}<|im_end|>\n<|im_start|>assistant\n"))
        start, answer = len(row.ids), tokens(turn.answer)
        if turn.listed:
            row.add(answer)
            row.learned[start:] = [token in vocabulary.digit for token in answer]
        else:
            row.add([*answer, *tokens("<|im_end|>")], learned=True)
            row.answers.append((turn.kind, range(start, len(row.ids))))
        row.add(tokens("<|im_end|>\n" if turn.listed else "\n"))
    return row


def batch_of(vocabulary: Vocabulary, step: int) -> tuple[str, list[Row]]:
    """The domain and the dialogues of a step; the step decides everything that is random in them."""
    rng, ends = random.Random(f"smol/{step}"), itertools.accumulate(phase.steps for phase in PHASES)
    phase = next((phase for phase, end in zip(PHASES, ends, strict=True) if step < end), PHASES[-1])
    domain = rng.choices(list(phase.domains), list(phase.domains.values()))[0]
    n_digits = rng.choice(phase.digits)
    most = (haystacks.MOST if n_digits == 1 else haystacks.MOST_NUMBERS)[domain]
    n_items = most if rng.random() < FULLEST else rng.randint(2, most)
    rows = []
    for _ in range(phase.scenes // (2 if domain == "pages" else 1)):
        scene = haystacks.draw_scene(domain, rng, n_items, "train", n_digits=n_digits)
        rows.append(dialogue(vocabulary, vocabulary.shown(scene), turns(scene, rng, phase.asked)))
    return domain, rows


def embedded(table: Float[Tensor, "word d_model"], rows: list[Row], noise: float) -> Float[Tensor, "row pos d_model"]:
    """The rows' embeddings (of two words the sum), padded on the right, with noise."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows])
    second = torch.tensor([row.second + [-1] * (longest - len(row.ids)) for row in rows])
    found = table[ids] + torch.where(second[..., None] >= 0, table[second.clamp(min=0)], 0.0)
    return found + noise * found.norm(dim=-1, keepdim=True) * torch.randn_like(found) / found.shape[-1] ** 0.5


def answer_loss(model: Any, rows: list[Row], noise: float) -> tuple[Float[Tensor, ""], float, list[tuple[str, bool]]]:
    """Cross-entropy of all learned tokens, the share of them that the model gets right, and which full answers.

    An answer is right if all of its tokens are.
    """
    table = model.get_input_embeddings().weight
    hidden = model.model(inputs_embeds=embedded(table, rows, noise), use_cache=False).last_hidden_state
    at = [(i, position) for i, row in enumerate(rows) for position, learned in enumerate(row.learned) if learned]
    batch, position = torch.tensor(at).T
    target = torch.tensor([rows[i].ids[position] for i, position in at])
    logits = model.lm_head(hidden[batch, position - 1])
    right = dict(zip(at, (logits.argmax(-1) == target).tolist(), strict=True))
    said = [
        (kind, all(right[i, place] for place in where)) for i, row in enumerate(rows) for kind, where in row.answers
    ]
    return nn.functional.cross_entropy(logits, target), mean(right.values()), said


def plain_text() -> list[str]:
    """English that is available offline, in paragraphs: the standard library's own documentation."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics) if len(topics[name]) > 1000]


def piece(vocabulary: Vocabulary, texts: list[str], length: int, rng: random.Random) -> list[int]:
    """``length`` tokens from somewhere in the texts."""
    while True:
        text = rng.choice(texts)
        start = rng.randrange(max(1, len(text) - 6 * length))
        ids = vocabulary.tokens(text[start : start + 8 * length])
        if len(ids) >= length:
            return ids[:length]


def drift(model, ids: list[int]) -> Float[Tensor, ""]:
    """KL divergence of the tuned model's predictions on plain text from the untuned one's, in nats per token."""
    given = torch.tensor([ids])

    def predicted() -> Tensor:
        return model.lm_head(model.model(input_ids=given, use_cache=False).last_hidden_state[0]).log_softmax(-1)

    adapted = [module for module in model.modules() if isinstance(module, Adapted)]
    ranks = [module.rank for module in adapted]
    with torch.no_grad():
        for module in adapted:
            module.rank = 0
        before = predicted()
        for module, rank in zip(adapted, ranks, strict=True):
            module.rank = rank
    return nn.functional.kl_div(predicted(), before, reduction="batchmean", log_target=True)


def rate(step: int, steps: int) -> float:
    """The learning rate: warm-up, then constant for long, then down to nothing in the last steps."""
    return RATE * min(1.0, (step + 1) / WARM_UP, (steps - step) / ANNEALED)


def train_language(
    model: nn.Module,
    adapters: Adapters,
    vocabulary: Vocabulary,
    checkpoint: Path,
    steps: int,
    say: Callable[[str], None] = print,
) -> list[dict[str, float]]:
    """Trains the adapters, continuing from ``checkpoint`` if there is one; returns the curve.

    Its accuracies are of learned tokens (by domain) and of whole answers (by domain and kind), on scenes that were not
    seen before (every step draws its own).
    """
    texts = plain_text()[::2]  # the other half is left for measurements
    optimizer = torch.optim.AdamW(adapters.values(), weight_decay=0.0, betas=(0.9, 0.98))
    kept = Checkpoint(checkpoint, model=adapters, optimizer=optimizer)
    losses, drifts, right = [], [], defaultdict(list)
    for step in range(kept.step, steps):
        domain, rows = batch_of(vocabulary, step)
        rng = random.Random(f"n{step}")
        torch.manual_seed(step)
        loss, share, said = answer_loss(model, rows, NOISE * rng.random())
        losses.append(loss.item())
        right[domain].append(share)
        if step % 2 == 0:
            away = drift(model, piece(vocabulary, texts, PLAIN, rng))
            drifts.append(away.item())
            loss = loss + HELD * away
        stepped(optimizer, list(adapters.values()), loss, rate(step, steps))
        for kind, well in said:
            right[f"{domain} {kind}"].append(well)
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            accuracy = {name: round(mean(well), 3) for name, well in sorted(right.items())}
            kept.save(step + 1, loss=mean(losses), drift=mean(drifts), accuracy=accuracy)
            say(f"language: {kept.curve[-1]}")
            losses, drifts, right = [], [], defaultdict(list)
    return kept.curve
