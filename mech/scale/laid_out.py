"""A model without its weights, for a process that plans measurements and leaves them to others.

    model = LaidOut.of("Qwen/Qwen3-VL-8B-Instruct")
    model.cfg.n_layers, model.inputs_of(sample).layout         # from config and processor
    model.elsewhere = record                                   # what a process with the weights says about them

It is laid out on the meta device and takes no memory. Sizes, names of points, processor and layouts are those of the
model; running it is refused.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mech.errors import UnsupportedModel
from mech.model.hooked import HookedMLLM
from mech.model.loading import laid_out


class LaidOut(HookedMLLM):
    """A ``HookedMLLM`` that cannot run.

    Attributes:
        elsewhere: ``mech.results.provenance.model_record`` of the model with its weights, once it is known.
    """

    weights_here = False
    elsewhere: Mapping[str, Any]

    @classmethod
    def of(cls, name: str | Path, revision: str | None = None) -> "LaidOut":
        """Lay out what ``HookedMLLM.from_pretrained`` would open.

        Raises:
            InputError: no such folder.
            UnsupportedModel: no config, or no architecture row for it.

        Cost: none; no weights are read.
        """
        hf_model, source = laid_out(name, revision)
        model = cls(hf_model, name=str(name))
        model._source, model.revision = source, revision
        model.elsewhere = {}
        return model

    @property
    def device(self) -> torch.device:
        """Where inputs go: they are inspected, never run."""
        return torch.device("cpu")

    @contextmanager
    def _attached(self) -> Iterator[None]:
        raise UnsupportedModel(
            f"a run of {self.name}, whose weights only the workers hold",
            "a measurement in blocks",
            "run this outside mech.on_ray and mech.on_folder(works=False), or without --ray and --elsewhere",
        )
        yield
