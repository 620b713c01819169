"""Progress in one line, the same from another shell, and the costs at the end.

print(status("blocks"))          # what `mech status blocks` prints
line(run.seen)                   # llava-s: attention | 12/40 blocks | 34.1 samples/s | 2 min left | 0 failed
cost_table(run.costs)            # rows of measurement, blocks, samples, seconds by device
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mech.scale.folder import Folder
from mech.scale.work import given_up


@dataclass
class Status:
    """What is in a folder of blocks.

    Attributes:
        landed: number of parts.
        working: blocks claimed by a live worker.
        waiting: blocks that wait for a worker.
        failed: blocks that were given up: key -> samples and the last error.
        lines: the progress of each driver, at work or ended.
        costs: seconds by measurement and device, over all drivers.
    """

    landed: int = 0
    working: int = 0
    waiting: int = 0
    failed: dict[str, tuple[list[str], str]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    costs: list[tuple[str, ...]] = field(default_factory=list)

    def __str__(self) -> str:
        said = [
            f"{self.landed} blocks landed, {self.working} at work, {self.waiting} waiting, {len(self.failed)} failed"
        ]
        said += self.lines
        for ids, error in self.failed.values():
            more = f" and {len(ids) - 4} more" if len(ids) > 4 else ""
            said.append(f"failed: samples {', '.join(ids[:4])}{more}: {error}")
        return "\n".join(said)


def status(folder: str | Path) -> Status:
    """What is in a folder of blocks, and how far its drivers are.

    Raises:
        OutputError: the folder cannot be opened.
    """
    place = Folder(folder)
    landed = set(place.keys("parts"))
    claims = (place.record(f"claims/{key}.json") for key in place.keys("claims"))
    found = Status(
        landed=len(landed), working=sum(held is not None and not place.void(held) for held in claims),
        waiting=len(set(place.keys("todo")) - landed),
    )  # fmt: skip
    for key in place.keys("failed"):
        record = place.record(f"failed/{key}.json")
        if record is not None and key not in landed and given_up(place, key) is not None:
            found.failed[key] = list(map(str, record["samples"])), str(record["attempts"][-1]["error"])
    runs = [run for name in place.keys("runs") if (run := place.record(f"runs/{name}.json")) is not None]
    costs: dict[str, dict[str, Any]] = {}
    for run in sorted(runs, key=lambda run: run["time"]):
        ended = "done" if run["finished"] else "gone" if place.void(run) else ""
        found.lines.append(line(run["seen"], at=run["time"]) + (f" | {ended}" if ended else ""))
        for what, cost in run["costs"].items():
            mine = costs.setdefault(what, {"blocks": 0, "samples": 0, "devices": {}})
            mine["blocks"], mine["samples"] = mine["blocks"] + cost["blocks"], mine["samples"] + cost["samples"]
            for device, seconds in cost["devices"].items():
                mine["devices"][device] = mine["devices"].get(device, 0.0) + seconds
    found.costs = cost_rows(costs)
    return found


def line(seen: Mapping[str, Any], at: float | None = None) -> str:
    """A driver's progress: blocks, samples per second, time left, failures."""
    took = max((at or time.time()) - seen["started"], 1e-3)
    pace = seen["samples"] / took
    left = ""
    if seen["total"] is not None and pace > 0:
        left = f" | {_time((seen['total'] - seen['samples']) / pace)} left"
    blocks = f"{seen['ended']}/{_blocks(seen)} blocks"
    speed = f"{pace:.1f} samples/s{left}" if seen["ended"] else "waiting for the first"
    return f"{seen['what']} | {blocks} | {speed} | {seen['failed']} failed"


def cost_rows(costs: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Measurement, blocks, samples, CPU seconds, GPU seconds: a row for each measurement."""
    rows = []
    for what, cost in costs.items():
        gpu = sum(seconds for device, seconds in cost["devices"].items() if device.startswith("cuda"))
        cpu = sum(cost["devices"].values()) - gpu
        rows.append((what, str(cost["blocks"]), str(cost["samples"]), f"{cpu:.1f}", f"{gpu:.1f}"))
    return rows


COSTS = ("measurement", "blocks", "samples", "CPU seconds", "GPU seconds")


def _blocks(seen: Mapping[str, Any]) -> str:
    """The number of blocks: those known so far or, if larger, the total estimated from the samples done."""
    if seen["total"] is None or not seen["samples"]:
        return f"{seen['blocks']}"
    return str(max(seen["blocks"], round(seen["ended"] * seen["total"] / seen["samples"])))


def _time(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
