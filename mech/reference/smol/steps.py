"""What both stages of the training share: a schedule, a step, and a checkpoint from which it resumes."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def learning_rate(step: int, steps: int, peak: float, *, warm_up: int, least: float = 0.02) -> float:
    """Linear warm-up, times half a cosine from ``peak`` down to ``least`` of it."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * min(1.0, (step + 1) / warm_up) * (least + (1 - least) * cosine)


def stepped(optimizer: torch.optim.Optimizer, trained: list[Any], loss: Tensor, rate: float) -> None:
    """One step of the optimizer at a learning rate, with the gradient's norm held to 1."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()


class Checkpoint:
    """State of a training in a file: the named parts are restored from it, and saved to it with every ``save``."""

    def __init__(self, file: Path, **parts: Any):
        self.file, self.parts = file, parts
        self.step, self.minutes, self.curve = 0, 0.0, []
        if file.exists():
            state = torch.load(file, weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.step, self.minutes, self.curve = state["step"], state["minutes"], state["curve"]
        self.began = time.perf_counter()

    def save(self, step: int, **figures: Any) -> None:
        """Writes the state to another file and moves it into place; ``figures`` become the curve's next entry."""
        now = time.perf_counter()
        self.step, self.minutes, self.began = step, self.minutes + (now - self.began) / 60, now
        rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}
        self.curve.append({"step": step, "minutes": round(self.minutes, 1), **rounded})
        state = {name: part.state_dict() for name, part in self.parts.items()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        written = self.file.with_suffix(".part")
        torch.save(state | {"step": step, "minutes": self.minutes, "curve": self.curve}, written)
        written.replace(self.file)
