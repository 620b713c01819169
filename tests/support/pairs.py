"""Clean and corrupted batches of tiny models: what tests of patching, paths and attribution start from."""

import tiny_models
import torch

from mech.experiments.metrics import LogitDiff
from mech.experiments.patching.sweeps import KEYS
from mech.reference import tiny_processors

METRIC = LogitDiff(300, 301)
QUESTIONS = ("What is shown here?", "Which digit is in the red frame?")


def opened(name, dtype=torch.float64):
    return tiny_models.opened(name, dtype)


def pair(model, questions=QUESTIONS, pictures=1):
    """Clean and corrupted batches: same questions (of different length, so one row is padded), other pictures."""
    both = []
    for seed in (0, 50):
        rows = []
        for i, question in enumerate(questions):
            shown = [tiny_processors.noise(24, 24, seed + 10 * i + j) for j in range(pictures)]
            rows.append(model.inputs(question, shown))
        both.append(model.collate(rows))
    return both


def axes(point):
    heads = ("kv_head",) if point in KEYS else ("head",) if "attn." in point else ()
    return ("layer", *heads)
