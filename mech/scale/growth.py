"""How far it scales: a simulated clock over measured blocks, and what a study of a million samples takes.

    found = grow([20.1, 19.8, 20.4], samples=64, workers=512, driver=0.012, store=0.004, opening=30.0)
    found.pace, found.efficiency                 # samples per second; as a share of what as many lone workers would do
    plan(1_000_000, forward=0.35, ...)           # GPU hours, hours, bytes, blocks

The clock has three kinds of time: a worker computes a block, for as long as such a block took when it was measured; the
driver cuts, packs and hands over blocks, one at a time; the store takes parts, one at a time. No time is invented: the
n-th block takes the time of the n-th measured one, cycling through them.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from mech.arguments import NOT_EMPTY, Count, Positive, Whole, checked


@dataclass(frozen=True)
class Growth:
    """How fast a number of workers gets through a job.

    Attributes:
        workers: how many.
        seconds: from the first block to the last.
        pace: samples per second.
        efficiency: the pace divided by that of as many workers that never wait.
        busy: share of the time for which the driver, and the store, had work: the one at 1 is the bottleneck.
    """

    workers: int
    seconds: float
    pace: float
    efficiency: float
    busy: dict[str, float]


@checked
def grow(
    blocks: Annotated[Sequence[Positive], NOT_EMPTY],
    *,
    samples: Count,
    workers: Count,
    driver: float = 0.0,
    store: float = 0.0,
    opening: float = 0.0,
    n_blocks: Count | None = None,
) -> Growth:
    """The pace of a number of workers, by a simulated clock.

    Args:
        blocks: measured seconds of blocks.
        samples: samples per block.
        workers: how many.
        driver: seconds that the driver takes for a block; it serves one worker at a time.
        store: seconds that the store takes for a part; it takes one at a time.
        opening: seconds until a worker has its model.
        n_blocks: blocks of the job; forty per worker if None, so that the start hardly counts.
    """
    total = n_blocks or 40 * workers
    # What happens next: a worker asks the driver for a block, or has computed one and brings it to the store.
    events = [(opening, False)] * workers
    driver_free = store_free = end = 0.0
    asked = 0
    while events:
        now, computed = heapq.heappop(events)
        if computed:
            store_free = max(now, store_free) + store
            heapq.heappush(events, (store_free, False))
        elif asked < total:
            driver_free = max(now, driver_free) + driver
            heapq.heappush(events, (driver_free + blocks[asked % len(blocks)], True))
            asked += 1
        else:
            end = now
    alone = sum(blocks[block % len(blocks)] for block in range(total)) / total
    pace = total * samples / end
    busy = {"driver": total * driver / end, "store": total * store / end}
    return Growth(workers, end, pace, pace * alone / (workers * samples), busy)


def stops_at(blocks: Sequence[float], *, driver: float, store: float) -> int:
    """The number of workers at which the driver, or the store, has no time left: more of them add nothing.

    ``workers = mean block seconds / max(driver, store)``
    """
    return math.ceil(sum(blocks) / len(blocks) / max(driver, store, 1e-9))


@dataclass(frozen=True)
class Plan:
    """What a study takes.

    Attributes:
        forwards: forwards of the model.
        gpu_hours: hours of one GPU.
        hours: hours on all GPUs.
        samples_bytes: bytes of samples that are read.
        parts_bytes: bytes of parts that are kept.
        blocks: blocks that are handed out.
    """

    forwards: int
    gpu_hours: float
    hours: float
    samples_bytes: int
    parts_bytes: int
    blocks: int


@checked
def plan(
    n_samples: Count,
    *,
    forward: Positive,
    passes: Count,
    conditions: Whole,
    heads: Count,
    gpus: Count,
    gpus_per_model: Positive = 1.0,
    efficiency: Positive = 0.95,
    sample_bytes: Count = 100_000,
    block_seconds: Positive = 20.0,
) -> Plan:
    """Forwards, hours and bytes for RAM (``passes`` per sample) and an ablation (one forward per sample and condition).

    Args:
        n_samples: number of samples; half find heads, half test them.
        forward: seconds per sample, in batches, on one model's GPUs.
        passes: forwards of each sample that finds heads.
        conditions: conditions for each sample that tests them.
        heads: heads of the model; a score takes four bytes for each.
        gpus: how many there are.
        gpus_per_model: GPUs that each model takes.
        efficiency: see ``Growth``.
        sample_bytes: bytes of a sample, pictures included.
        block_seconds: seconds of a block.
    """
    half = n_samples // 2
    forwards = half * passes + half * conditions
    gpu_seconds = forwards * forward * gpus_per_model
    parts = half * (2 * heads * 4 + 12) + half * conditions * 2 * 8
    return Plan(
        forwards, gpu_seconds / 3600, gpu_seconds / 3600 / gpus / efficiency, n_samples * sample_bytes, parts,
        math.ceil(forwards * forward / block_seconds),
    )  # fmt: skip
