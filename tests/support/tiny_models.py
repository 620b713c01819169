"""Tiny random models of every family, wrapped."""

import torch

from mech.model import HookedMLLM
from mech.reference import tiny, tiny_processors

# Grouped expert products, and attention with a softcap, exist in single precision only.
SINGLE = ("qwen3_vl_moe", "paligemma2")


def opened(name, dtype=None):
    """A model of ``mech.reference.tiny``, as it is or in another precision; double where the family has it."""
    hf = tiny.model(name)
    if dtype is not None and not (dtype is torch.float64 and name in SINGLE):
        hf = hf.to(dtype)
    return HookedMLLM.from_hf(hf, tiny_processors.processor(name), name=name)
