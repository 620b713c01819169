"""Measurements that actors of a test import by name."""

import os
import signal
from pathlib import Path

import xarray as xr

from mech.scale import per_sample


@per_sample("length")
def length(model, samples, *, batch_size=8, kills="", once="", progress=None):
    """Letters of the question; a sample may kill the process, once or whenever it is met."""
    if any(sample.id == kills for sample in samples) and not (once and Path(once).exists()):
        if once:
            Path(once).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    letters = [float(len(sample.question)) for sample in samples]
    return xr.Dataset({"letters": ("example", letters)}, {"example": [sample.id for sample in samples]})
