"""The second stage: a vision tower and its projector learn to show the language model's own embeddings of words.

The language model takes no part: the words that every visual token shows are known (``words``), and so are their
embeddings. The tower starts as that of ``reference:llava-s``, which was pretrained on the same handwriting.
"""

import random
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mech.data import haystacks
from mech.data.haystacks import Scene
from mech.reference.smol.steps import Checkpoint, learning_rate, stepped
from mech.reference.smol.words import Vocabulary

TELLING = 8.0, 1.0  # how much likelier a word with a nearer embedding is, and what a squared distance costs
# Digits have similar embeddings. Told apart with so little sharpness, they are shown larger than they are, which the
# language model misreads; so the last steps are sharp, and keep what is shown close to the embedding itself.
FITTING, FITTED = (40.0, 5.0), 300
SCENES = 32  # per step
RATE = 2e-3
EVERY = 100  # steps between two lines of the curve


class Targets:
    """The embeddings that a visual token can have: those of single words, and of a digit in a coloured frame."""

    def __init__(self, vocabulary: Vocabulary, table: Float[Tensor, "word d_model"]):
        pairs = [(word, -1) for word in vocabulary.single]
        pairs += [(digit, colour) for digit in vocabulary.digit for colour in vocabulary.colours]
        self.place = {pair: place for place, pair in enumerate(pairs)}
        first, second = torch.tensor(pairs).T
        self.vectors = table[first] + torch.where(second[:, None] >= 0, table[second.clamp(min=0)], 0.0)
        self.scale = self.vectors.square().sum(-1).mean()

    def labels(self, vocabulary: Vocabulary, scenes: list[Scene]) -> Int[Tensor, "visual_token"]:
        return torch.tensor([self.place[pair] for scene in scenes for pair in vocabulary.shown(scene)])

    def loss(
        self,
        seen: Float[Tensor, "visual_token d_model"],
        labels: Int[Tensor, "visual_token"],
        sharpness: float,
        cost: float,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "visual_token"], Float[Tensor, ""]]:
        """(loss, whether each is nearest to what it shows, mean squared distance relative to an embedding's square).

        ``loss = cross_entropy(-sharpness * distance^2) + cost * distance^2``: nearest to the right one, and near it.
        """
        squares = seen.square().sum(-1, keepdim=True) + self.vectors.square().sum(-1) - 2 * seen @ self.vectors.T
        squares = squares / self.scale
        far = squares.gather(1, labels[:, None]).mean()
        nearest = (squares.argmin(-1) == labels).float()
        return nn.functional.cross_entropy(-sharpness * squares, labels) + cost * far, nearest, far


def scenes_of(rng: random.Random, n: int, split: str) -> list[Scene]:
    """Scenes of both kinds, with one digit or three, from nearly empty to full."""
    found = []
    for _ in range(n):
        domain, n_digits = rng.choice(("grounding", "documents")), rng.choice((1, 3))
        most = (haystacks.MOST if n_digits == 1 else haystacks.MOST_NUMBERS)[domain]
        found.append(haystacks.draw_scene(domain, rng, rng.randint(1, most), split, n_digits=n_digits))
    return found


def pixels(scenes: list[Scene]) -> Float[Tensor, "picture 3 height width"]:
    """The scenes' images as the image processor prepares them: their size is right already."""
    shown = np.stack([np.asarray(picture) for scene in scenes for picture in scene.pictures()])
    return torch.from_numpy(shown).permute(0, 3, 1, 2).float() / 127.5 - 1


def features(tower: nn.Module, projector: nn.Module, shown: Tensor) -> Float[Tensor, "visual_token d_model"]:
    """What LLaVA gives its language model: the last layer's patches, projected."""
    return projector(tower(shown).last_hidden_state[:, 1:]).flatten(0, 1)


def train_tower(
    tower: nn.Module,
    projector: nn.Module,
    vocabulary: Vocabulary,
    table: Float[Tensor, "word d_model"],
    checkpoint: Path,
    steps: int,
    say: Callable[[str], None] = print,
) -> list[dict[str, float]]:
    """Trains both in place, continuing from ``checkpoint`` if there is one; returns the curve."""
    targets, trained = Targets(vocabulary, table), [*tower.parameters(), *projector.parameters()]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.02, betas=(0.9, 0.98))
    kept = Checkpoint(checkpoint, tower=tower, projector=projector, optimizer=optimizer)
    losses, right, far = [], [], []
    for step in range(kept.step, steps):
        scenes = scenes_of(random.Random(f"tower/{step}"), SCENES, "train")
        seen = features(tower, projector, pixels(scenes))
        telling, fitting = step < steps - FITTED, step - (steps - FITTED)
        weights = TELLING if telling else FITTING
        loss, nearest, distance = targets.loss(seen, targets.labels(vocabulary, scenes), *weights)
        at = (step, steps - FITTED, RATE) if telling else (fitting, FITTED, RATE / 2)
        stepped(optimizer, trained, loss, learning_rate(*at, warm_up=100 if telling else 20))
        losses.append(loss.item())
        right.append(nearest.mean().item())
        far.append(distance.item())
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            kept.save(step + 1, loss=mean(losses), right=mean(right), distance=mean(far))
            say(f"tower: {kept.curve[-1]}")
            losses, right, far = [], [], []
    return kept.curve
