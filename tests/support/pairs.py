"""Clean and corrupted batches of tiny models: what tests of patching, paths and attribution start from."""

import torch

from mech.experiments.metrics import LogitDiff
from mech.experiments.patching.sweeps import KEYS
from mech.model import HookedMLLM
from mech.reference import tiny, tiny_processors

METRIC = LogitDiff(300, 301)
QUESTIONS = ("What is shown here?", "Which digit is in the red frame?")

# Grouped expert products, and attention with a softcap, exist in single precision only.
SINGLE = ("qwen3_vl_moe", "paligemma2")


def opened(name, dtype=torch.float64):
    hf = tiny.model(name)
    return HookedMLLM.from_hf(hf if name in SINGLE else hf.to(dtype), tiny_processors.processor(name))


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
