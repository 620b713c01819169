"""Interventions as data: frozen specs that say what to change, and the one place that runs them on a model.

Depends on models, inputs and samples (for reference activations), not on bands, metrics, statistics or figures.
"""

from mech.interventions.reference import Reference, reference_activations
from mech.interventions.run import Intervened, intervene
from mech.interventions.specs import (
    METHODS,
    PHASES,
    POSITIONS,
    Ablate,
    Custom,
    Knockout,
    Patch,
    PerRow,
    Redirect,
    Scale,
    Spec,
    digest_of,
)
from mech.interventions.where import check_positions

__all__ = [
    "METHODS",
    "PHASES",
    "POSITIONS",
    "Ablate",
    "Custom",
    "Intervened",
    "Knockout",
    "Patch",
    "PerRow",
    "Redirect",
    "Reference",
    "Scale",
    "Spec",
    "check_positions",
    "digest_of",
    "intervene",
    "reference_activations",
]
