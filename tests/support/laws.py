"""Tiny wrapped models, whole or broken on purpose, and what a law finds wrong with them."""

from dataclasses import replace

import torch

from mech.model import HookedMLLM
from mech.model.check.laws import make_batches
from mech.reference import tiny, tiny_processors


def wrapped(name="llava"):
    return HookedMLLM.from_hf(tiny.model(name), tiny_processors.processor(name), name=name)


def failures(law, model):
    with torch.no_grad():
        return [one for one in law(model, make_batches(model)) if one.ok is False]


def broken(model, point, **changes):
    """The model with one site that is not where it should be."""
    model._sites = [replace(site, **changes) if site.point == point else site for site in model._sites]
    return model
