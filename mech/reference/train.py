"""Trains a reference model: ``python -m mech.reference.train llava-s``, or ``make reference`` for all of them.

Two stages, like LLaVA's. First the vision tower alone: its tokens are pulled towards the text model's embeddings of the
words they show, since the towers of real MLLMs come pretrained against text. Then the tower is frozen and everything
after it learns to answer.

Every picture comes with questions about all of its items: two are asked about in full ("Which digit is in the red
frame?", answered some tokens after the word that matters), the others are listed in one go (" red7 blue3", answered
right after it). The dense list is what makes a small model learn to retrieve, within a few hundred steps, on full
scenes from the start; growing scenes item by item was tried and was far from it after a thousand steps. The full form
teaches the model to carry what it read to where it is said.

A recipe that starts from another model's weights has no first stage: its scenes of pages and video grow instead, from
the length that model knows to a few thousand visual tokens.

Training is resumable (a checkpoint every hundred steps) and deterministic: step ``i`` always draws the same scenes, so
the same command gives the same weights up to floating-point noise. Nothing is tuned to what the heads of the model turn
out to do.
"""

import argparse
import functools
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file

from mech.data import haystacks
from mech.data.haystacks import Scene
from mech.errors import OutputError
from mech.inputs import Inputs, Processor, build, collate, encode
from mech.reference import path
from mech.reference.alignment import Alignment, vision_tower
from mech.reference.recipe import CAPTION, RECIPES, Recipe, image_processor, tokenizer, untrained

EVERY = 100  # steps between two checkpoints and two lines of the curve
POOL = 400  # batches of pictures that the tower is pretrained on, again and again: drawing them costs more than a step
FULL = 2  # items of a scene that are asked about in full
TOKENS = {"pages": 36, "video": 8}  # visual tokens of a page, of a frame
FULLEST = 0.8  # the share of batches whose scenes hold as many items as there is room for


def conversation(scene: Scene, rng: random.Random) -> list[dict]:
    """A dialogue about every item of a scene, in the chat format: ``FULL`` full questions and one list."""
    order = list(range(len(scene.items)))
    rng.shuffle(order)
    n_full = min(FULL, math.ceil(len(order) / 2))
    turns = []
    for index in order[:n_full]:
        item = scene.items[index]
        turns.append((rng.choice(haystacks.QUESTIONS[scene.domain]).format(key=item.key), item.number))
    if order[n_full:]:
        listed = "".join(f" {scene.items[index].key}{scene.items[index].number}" for index in order[n_full:])
        turns.insert(rng.randrange(len(turns) + 1), (CAPTION, listed))
    shown = [{"type": "video"}] if scene.domain == "video" else [{"type": "image"}] * len(scene.canvas)
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": answer})
        shown = []
    return messages


@dataclass(frozen=True)
class Shape:
    """What kind of scenes a step draws, and how many."""

    domain: str
    n_items: int
    n_pictures: int
    size: int

    @classmethod
    def at(cls, step: int, recipe: Recipe) -> "Shape":
        """The shape of a step of the second stage.

        Lengths are drawn between the default and a longest one, uniformly in their logarithm, and the longer of two
        draws counts. The longest grows until half of the steps are done. Batches are smaller to match, but hold at
        least two scenes.
        """
        rng = random.Random(f"{recipe.seed}/domain/{step}")
        domain = rng.choices(recipe.domains, [recipe.weights.get(known, 1.0) for known in recipe.domains])[0]
        most, least = haystacks.MOST[domain], haystacks.PICTURES[domain]
        n_items = most if rng.random() < FULLEST else rng.randint(1, most)
        if not recipe.longest or domain not in haystacks.LONG:
            return cls(domain, n_items, least, recipe.batch)
        risen = min(1.0, 2 * (step + 1) / recipe.steps)
        times = (recipe.longest / (least * TOKENS[domain])) ** (risen * max(rng.random(), rng.random()))
        n_pictures = 2 * round(least * times / 2) if domain == "video" else round(least * times)
        return cls(domain, n_items, n_pictures, max(2, round(recipe.batch / times)))


def batch_of(processor: Processor, shape: Shape, name: str) -> tuple[Inputs, list[Scene]]:
    """The inputs of one training step and what they show; ``name`` decides everything that is random in them."""
    domain = shape.domain
    rows, scenes = [], []
    for i in range(shape.size):
        rng = random.Random(f"{name}/{i}")
        scene = haystacks.draw_scene(domain, rng, shape.n_items, "train", shape.n_pictures)
        text = processor.tokenizer.apply_chat_template(conversation(scene, rng), tokenize=False)
        shown = scene.pictures()
        images, video = ((), shown) if domain == "video" else (shown, ())
        rows.append(encode(processor, text, images, video))
        scenes.append(scene)
    return collate(rows, processor.pad_token_id), scenes


class Marks:
    """Which tokens are answers, recognised by their ids alone: no question contains a digit."""

    def __init__(self, words):
        self.digits = torch.tensor(words.convert_tokens_to_ids([str(d) for d in range(10)]))
        self.end = words.eos_token_id
        # A full answer is the first token after the line that opens the assistant's turn; a listed one follows its key.
        self.header = words("\n").input_ids[-1]

    def of(self, ids: Int[torch.Tensor, "batch pos"]) -> tuple[Bool[torch.Tensor, "batch pos"], ...]:
        """(answers, answers to full questions, ends of answers)."""
        before = torch.cat([torch.full_like(ids[:, :1], -1), ids[:, :-1]], dim=1)
        digits = self.digits.to(ids.device)
        answer = torch.isin(ids, digits)
        return answer, answer & (before == self.header), torch.isin(before, digits) & (ids == self.end)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up over 100 steps, then half a cosine down to 2% of the peak; once for the tower, once for all."""
    tower = step < recipe.tower_steps
    start, end = (0, recipe.tower_steps) if tower else (recipe.tower_steps, recipe.steps)
    peak = recipe.tower_rate if tower else recipe.peak_rate
    if step - start < 100:
        return peak * (step - start + 1) / 100
    along = (step - start - 100) / max(1, end - start - 100)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * along)))


def train(name: str, folder: Path, *, steps: int | None = None, threads: int = 1, say=print) -> Path:
    """Trains reference model ``name`` and saves it, with its processor and card, to ``folder / name``."""
    torch.set_num_threads(threads)
    training = Training(name, folder)
    if training.resumed():
        say(f"{name}: going on from step {training.done}")
    training.model.train()
    folder.mkdir(parents=True, exist_ok=True)
    losses: list[float] = []
    for step in range(training.done, RECIPES[name].steps if steps is None else steps):
        losses.append(training.step(step))
        if training.done % EVERY == 0:
            training.note(sum(losses) / len(losses), say)
            losses.clear()
    record = dict(steps=training.done, curve=training.curve, minutes=round(training.seconds / 60, 1))
    return save(name, training.model.cpu().eval(), training.processor, folder / name, **record)


class Training:
    """A model in training: weights, optimizer, and what is known about the steps done so far.

    Args:
        name: the recipe's name.
        folder: where the checkpoint is.
    """

    def __init__(self, name: str, folder: Path):
        self.name, self.folder, self.recipe = name, folder, RECIPES[name]
        recipe, words = self.recipe, tokenizer(self.recipe)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model = untrained(recipe, words)
        if recipe.start:
            begun = folder / recipe.start
            begun = begun if (begun / "card.json").exists() else path(recipe.start)
            model = type(model).from_pretrained(begun, config=model.config, dtype=torch.float32)
        self.model = model.to(self.device)
        made = image_processor(recipe.family)
        self.processor = Processor.from_hf(config=model.config, tokenizer=words, image_processor=made)
        self.marks, self.alignment = Marks(words), Alignment(words).to(self.device)
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups = [(decayed, 0.05), (others, 0.0), (list(self.alignment.parameters()), 0.0)]
        settings = [{"params": p, "weight_decay": decay} for p, decay in groups]
        self.optimizer = torch.optim.AdamW(settings, betas=(0.9, 0.98))
        self.accuracy, self.curve = dict.fromkeys(recipe.domains, 0.0), []
        self.done, self._spent, self._began = 0, 0.0, time.perf_counter()
        self._pooled = functools.cache(self._pool)
        self.checkpoint = folder / f"{name}.checkpoint.pt"

    @property
    def seconds(self) -> float:
        return self._spent + time.perf_counter() - self._began

    def resumed(self) -> bool:
        """Continue from the checkpoint, if there is one.

        Raises:
            OutputError: it follows another recipe.
        """
        if not self.checkpoint.exists():
            return False
        state = torch.load(self.checkpoint, weights_only=True)
        if state["recipe"] != repr(self.recipe):
            raise OutputError(
                f"{self.checkpoint} follows another recipe", "one of this recipe", "delete it to start over"
            )
        for part in ("model", "alignment", "optimizer"):
            getattr(self, part).load_state_dict(state[part])
        self.accuracy, self.curve = state["accuracy"], state["curve"]
        self.done, self._spent = state["step"], state["spent"]
        self._began = time.perf_counter()
        return True

    def step(self, step: int) -> float:
        """One step of the optimizer; returns the loss."""
        tower = step < self.recipe.tower_steps
        for part in vision_tower(self.model):
            part.requires_grad_(tower)
        if tower:
            domain, inputs, scenes = self._pooled(step % POOL)
            loss, right = self.alignment.loss(self.model, inputs.to(self.device), scenes)
        else:
            shape = Shape.at(step, self.recipe)
            domain, (inputs, _) = shape.domain, batch_of(self.processor, shape, f"{self.recipe.seed}/{step}")
            loss, right = _loss(self.model, inputs.to(self.device).tensors, self.marks)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.recipe)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.accuracy[domain] += 0.1 * (right - self.accuracy[domain])
        self.done = step + 1
        return loss.item()

    def note(self, loss: float, say) -> None:
        """Add a line to the curve, and write a checkpoint."""
        now = {domain: round(value, 3) for domain, value in self.accuracy.items()}
        stage = "tower" if self.done <= self.recipe.tower_steps else "answers"
        self.curve.append({"step": self.done, "stage": stage, "loss": round(loss, 4), "accuracy": now})
        say(f"{self.name}: step {self.done}, {self.seconds / 60:.1f} min, loss {self.curve[-1]['loss']:.3f}, {now}")
        if self.done == self.recipe.tower_steps:
            self._pooled.cache_clear()
        state = {part: getattr(self, part).state_dict() for part in ("model", "alignment", "optimizer")}
        state |= {"accuracy": self.accuracy, "curve": self.curve, "recipe": repr(self.recipe)}
        state |= {"step": self.done, "spent": self.seconds}
        if self.done in self.recipe.keep:
            keep(self.model, self.folder / self.name / f"step{self.done}.safetensors")
        torch.save(state, self.checkpoint.with_suffix(".part"))
        self.checkpoint.with_suffix(".part").replace(self.checkpoint)

    def _pool(self, index: int) -> tuple[str, Inputs, list[Scene]]:
        recipe = self.recipe
        domain = [d for d in recipe.domains if d != "pages"][index % len(set(recipe.domains) - {"pages"})]
        shape = Shape(domain, haystacks.MOST[domain], haystacks.PICTURES[domain], recipe.batch)
        return domain, *batch_of(self.processor, shape, f"{recipe.seed}/tower/{index}")


def _loss(model, tensors: dict[str, torch.Tensor], marks: Marks) -> tuple[Float[torch.Tensor, ""], float]:
    ids = tensors["input_ids"]
    answer, full, end = marks.of(ids)
    rows, positions = (answer | end).nonzero(as_tuple=True)
    # Only the rows that predict an answer are unembedded: nine in ten do not.
    hidden = model.model(**tensors).last_hidden_state[rows, positions - 1]
    logits = model.lm_head(hidden)
    target = ids[rows, positions]
    loss = torch.nn.functional.cross_entropy(logits, target)
    asked = full[rows, positions]
    right = (logits.argmax(-1) == target)[asked].float().mean().item()
    return loss, right


def keep(model, file: Path) -> None:
    """Save the weights in half precision, without those of the vision tower: it no longer changes."""
    tower = {id(p) for part in vision_tower(model) for p in part.parameters()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: p.detach().half().cpu() for key, p in model.named_parameters() if id(p) not in tower}, file)


def save(name: str, model, processor: Processor, folder: Path, **card) -> Path:
    """Save weights (half precision, safetensors), processor files and ``card.json``."""
    model.half().save_pretrained(folder)
    # Stored in half precision to be small, but run in single precision.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=1) + "\n", encoding="utf-8")
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    recipe = RECIPES[name]
    model = model.float()
    config = model.config.text_config
    record = {
        "name": name,
        "family": recipe.family,
        "layers": config.num_hidden_layers,
        "heads": config.num_hidden_layers * config.num_attention_heads,
        "parameters": sum(p.numel() for p in model.parameters()),
        "domains": list(recipe.domains),
        "seed": recipe.seed,
        "batch": recipe.batch,
        "accuracy": {domain: held_out_accuracy(model, processor, domain) for domain in recipe.domains},
        **card,
    }
    if recipe.start:
        record["start"] = recipe.start
    if recipe.longest:
        record["longer"] = [
            {"domain": domain, "n_pictures": n, "visual_tokens": n * TOKENS[domain],
             "accuracy": held_out_accuracy(model, processor, domain, 100, n_pictures=n)}
            for domain in recipe.domains if domain in haystacks.LONG
            for n in (recipe.longest // TOKENS[domain] // part for part in (4, 2, 1))
        ]  # fmt: skip
    if recipe.keep:
        record["checkpoints"] = {}
        for step in (step for step in recipe.keep if step <= card["steps"]):
            model.load_state_dict(load_file(folder / f"step{step}.safetensors"), strict=False)
            accuracy = {domain: held_out_accuracy(model, processor, domain) for domain in recipe.domains}
            record["checkpoints"][f"step{step}"] = accuracy
    (folder / "card.json").write_text(json.dumps(record, indent=1) + "\n")
    return folder


@torch.no_grad()
def held_out_accuracy(
    model, processor: Processor, domain: str, n: int = 300, seed: int = 9, n_pictures: int | None = None
) -> float:
    """The share of held-out questions (unseen handwriting, hardest scenes) answered right."""
    samples, right = haystacks.haystacks(domain, n, seed, n_pictures=n_pictures), 0
    size = max(1, 50 * haystacks.PICTURES[domain] // (n_pictures or haystacks.PICTURES[domain]))
    for i in range(0, n, size):
        part = samples[i : i + size]
        rows = [build(processor, s.question, images=s.images, video=s.video, fps=s.fps) for s in part]
        logits = model(**collate(rows, processor.pad_token_id).tensors, logits_to_keep=1).logits[:, -1]
        texts = processor.tokenizer.batch_decode(logits.argmax(-1, keepdim=True))
        right += sum(a == s.answer for a, s in zip(texts, part, strict=True))
    return round(right / n, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train reference models on the haystacks.")
    parser.add_argument("names", nargs="*", default=list(RECIPES), help=f"any of {', '.join(RECIPES)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("training"), help="checkpoints and models go here")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--steps", type=int, default=None, help="stop after so many steps (to try things)")
    given = parser.parse_args()
    for name in given.names:
        print("saved", train(name, given.out, steps=given.steps, threads=given.threads), flush=True)


if __name__ == "__main__":
    main()
