"""Frozen specs: a job is a measurement, a block is a job on some batches of samples; the hash of each is its name.

    job = Job("mech.experiments.scores.ram:masses", identity, software, options, 16, 1)
    block = Block(job.key, "ram", first=32, ids=("a", "b"), digest="...")
    block.key                                     # names its part file

A block is a whole number of batches in order, so no number depends on how a job is cut. Seeds are options.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from mech.data.samples import Sample, Samples
from mech.scale.packing import fingerprint

PER_WORKER = 4  # blocks of a job for each worker, if there are enough batches: workers then end at about the same time


def _key(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Job:
    """What is measured, on which model, with which program.

    Attributes:
        measure: the function, ``module:name``.
        model: ``mech.scale.models.identity``.
        software: ``mech.scale.models.software``.
        options: fingerprint of all other arguments.
        batch_size: samples per forward.
        threads: CPU threads; with another number of them, sums may differ in their last bit.
    """

    measure: str
    model: Mapping[str, str]
    software: Mapping[str, str]
    options: str
    batch_size: int
    threads: int

    @cached_property
    def key(self) -> str:
        return _key(asdict(self))


@dataclass(frozen=True)
class Block:
    """Some batches of a job.

    Attributes:
        job: key of the job.
        what: the job in a word, for people to read.
        first: index of the first sample among all.
        ids: ids of the samples.
        digest: digest of their pixels, questions and answers.
        items: which of the items (conditions, settings) it measures, from and to; None for all.
        timed: run twice, so that the time recorded is that of a warm model.
    """

    job: str
    what: str
    first: int
    ids: tuple[str, ...]
    digest: str
    items: tuple[int, int] | None = None
    timed: bool = False

    @cached_property
    def key(self) -> str:
        return _key({name: value for name, value in asdict(self).items() if name != "what"})


@dataclass(frozen=True)
class Task:
    """A block with its samples, and the options with an entry for each; no samples here if they are in the folder."""

    block: Block
    samples: Samples | None
    beside: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return self.block.key


@dataclass(frozen=True)
class Cut:
    """How a job is cut: batches and items of each block."""

    batches: int
    items: int | None = None

    @classmethod
    def by_time(cls, seconds: float, wanted: float, batches: int | None, items: int | None, workers: int) -> "Cut":
        """Blocks that take about as long as wanted, and not so few that workers are idle.

        Args:
            seconds: seconds that one item takes on one batch.
            wanted: seconds that a block should take.
            batches: batches of the job; None if not known yet.
            items: items of the job; None if it has none.
            workers: how many workers there are.
        """
        units = max(1, int(wanted / max(seconds, 1e-6)))
        if batches is not None:
            units = max(1, min(units, math.ceil(batches * (items or 1) / (PER_WORKER * workers))))
        if items is None:
            return cls(min(units, batches or units))
        return cls(units // items, items) if units >= items else cls(1, units)


def tasks(
    samples: Iterable[Sample],
    job: Job,
    what: str,
    cut: Cut,
    items: int | None,
    beside: Mapping[str, Sequence[Any]] | None = None,
) -> Iterator[Task]:
    """The blocks of a job, made lazily as samples arrive: all items of the first batches, then of the next."""
    first = 0
    for some in _chunks(samples, cut.batches * job.batch_size):
        named = Samples([one if one.id else replace(one, id=str(first + i)) for i, one in enumerate(some)])
        own = {name: list(values[first : first + len(named)]) for name, values in (beside or {}).items()}
        digest = fingerprint([named.digest(), own]) if own else named.digest()
        block = Block(job.key, what, first, tuple(one.id for one in named), digest)
        step = cut.items or items or 0
        parts = [(start, min(start + step, items)) for start in range(0, items, step)] if items else [None]
        for part in parts:
            yield Task(replace(block, items=part), named, own)
        first += len(named)


def whole(samples: Samples, job: Job, what: str) -> Task:
    """A job that cannot be cut, as one task."""
    return Task(Block(job.key, what, 0, tuple(samples.names), samples.digest()), samples)


def timing(
    samples: Sequence[Sample], job: Job, what: str, items: int | None, beside: Mapping[str, Sequence[Any]] | None = None
) -> Task:
    """One batch and one item, to be timed."""
    (task,) = tasks(samples[: job.batch_size], job, what, Cut(1, 1), 1 if items else None, beside)
    return replace(task, block=replace(task.block, timed=True))


def _chunks(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    chunk: list[Sample] = []
    for sample in samples:
        chunk.append(sample)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
