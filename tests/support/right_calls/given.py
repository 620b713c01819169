"""What right calls are made of: a model, samples, a ranking; and kinds of arguments that many functions have."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

import mech

RUN = {"model": "model", "samples": "samples"}
USUAL = {"seed": "seed", "batch_size": "count"}
TOLD = {"progress": "?function"}
OTHER = {"allow_other_model": "flag"}
PAIR = {"model": "model", "clean": "given", "corrupted": "?given", "metric": "metric"}
SWEEP = {**PAIR, "point": "word", "over": "*words", "positions": "where", "regions": "?regions", "layers": "layers"}


@dataclass(frozen=True)
class Call:
    """``function(**right)`` would run; ``kinds`` says what each argument is."""

    function: Callable[..., Any]
    right: Mapping[str, Any]
    kinds: Mapping[str, str]


@dataclass
class Given:
    """A model, a folder to write to, and what is made of them."""

    model: mech.HookedMLLM
    folder: Path

    @cached_property
    def samples(self) -> mech.Samples:
        return mech.haystacks("grounding", n=12, seed=0)

    @property
    def find(self) -> mech.Samples:
        return self.samples[:4]

    @property
    def test(self) -> mech.Samples:
        return self.samples[6:10]

    @property
    def sample(self) -> mech.Sample:
        return self.test[0]

    @property
    def picture(self) -> Any:
        return self.sample.images[0]

    @cached_property
    def inputs(self) -> mech.Inputs:
        return self.model.inputs_of(self.sample)

    @property
    def layout(self) -> mech.TokenLayout:
        return self.inputs.layout

    @property
    def columns(self) -> dict[str, Any]:
        names = ("kind", "image", "frame", "row", "col", "view", "rect")
        return {name: getattr(self.layout, name) for name in names}

    @cached_property
    def ram(self) -> xr.DataArray:
        values = np.random.default_rng(0).random((4, self.model.cfg.n_layers, self.model.cfg.n_heads))
        return xr.DataArray(values, dims=("example", "layer", "head"), name="ram")

    @cached_property
    def ranking(self) -> mech.Ranking:
        return mech.rank_heads(self.ram)

    @property
    def metric(self) -> mech.LogitDiff:
        return mech.LogitDiff(self.sample.answer, self.sample.counterfactual.answer)

    @property
    def tested(self) -> dict[str, Any]:
        return {"model": self.model, "samples": self.test}

    @property
    def runs(self) -> dict[str, Any]:
        return {"model": self.model, "clean": self.sample, "corrupted": None, "metric": self.metric}

    @property
    def task(self) -> mech.CircuitTask:
        return mech.CircuitTask("a task", self.model, self.find, self.test)

    @property
    def graph(self) -> mech.CircuitGraph:
        cfg = self.model.cfg
        senders = 1 + cfg.n_layers * (cfg.n_heads + 1)
        receivers = cfg.n_layers * (cfg.n_heads + 2 * cfg.n_kv_heads + 1) + 1
        return mech.CircuitGraph.of(self.model, np.zeros((senders, receivers)))

    def run_with(self, spec: Callable[..., Any], **options: Any) -> None:
        """A run with an intervention."""
        with mech.intervene(self.model, spec(**options)) as changed:
            changed(self.inputs)


def entered(function: Callable[..., Any]) -> Callable[..., Any]:
    """A context manager that is entered, and left again if it could be."""

    def call(*args: Any, **kwargs: Any) -> None:
        with function(*args, **kwargs):
            pass

    return call


def intervened(model: Any, specs: Any) -> None:
    with mech.intervene(model, specs):
        pass
