"""Who computes the blocks: this process, or any worker that joins through the folder. Ray is in ``ray_actors``.

An executor takes tasks as they come and yields outcomes as they end, in any order. It holds at most ``in_flight``
tasks, and asks for the next one only when one of them has ended: this bounds the memory that samples take.
"""

import time
from collections.abc import Iterator
from typing import Any, Protocol

from mech.scale.blocks import Job, Task
from mech.scale.folder import Folder
from mech.scale.work import ABOUT, Outcome, Worker, given_up, publish

ENDED = ("landed", "there", "refused", "failed")


class Executor(Protocol):
    """What computes blocks."""

    works: bool  # whether this process computes
    workers: int  # how many there are, which decides how a job is cut
    in_flight: int  # the most tasks it holds

    def ready(self, job: Job, model: Any) -> None:
        """Refuse a job that cannot be computed, before any work."""
        ...

    def run(self, tasks: Iterator[Task]) -> Iterator[Outcome]:
        """The outcome of every task."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


class Here:
    """This process; with ``publish`` also every ``mech work`` process that watches the folder.

    Args:
        folder: the folder of blocks.
        works: whether this process computes too; if not, it waits for others.
        publish: put the blocks into the folder for others.
        in_flight: the most tasks held, or waiting in the folder, at once.
        workers: how many workers are expected.
        pause: seconds between two checks, when others are at work.
    """

    def __init__(
        self, folder: Folder, *, works: bool = True, publish: bool = False, in_flight: int = 8, workers: int = 1,
        pause: float = 0.2,
    ):  # fmt: skip
        self.folder, self.works, self.publish, self.pause = folder, works, publish, pause
        self.workers, self.in_flight = workers, in_flight
        self._worker = Worker(folder)

    def ready(self, job: Job, model: Any) -> None:
        self._worker = Worker(self.folder, model=model)

    def run(self, tasks: Iterator[Task]) -> Iterator[Outcome]:
        held: dict[str, Task] = {}
        more = True
        while more or held:
            while more and len(held) < self.in_flight:
                task = next(tasks, None)
                more = task is not None
                if task is not None:
                    held[task.key] = self._offered(task)
            for outcome in self._step(held):
                del held[outcome.key]
                if self.publish:
                    self.folder.remove(f"todo/{outcome.key}.pack")
                yield outcome

    def close(self) -> None:
        self._worker = Worker(self.folder)

    def _offered(self, task: Task) -> Task:
        if not self.publish or self.folder.part(task.key) is not None:
            return task
        return publish(self.folder, task)

    def _credited(self, outcome: Outcome, task: Task) -> Outcome:
        """A part that another worker landed since the task was published counts as landed, with the time it took."""
        if outcome.state != "there" or task.samples is not None or (part := self.folder.part(task.key)) is None:
            return outcome
        about = part.attrs[ABOUT]
        return Outcome(task.key, "landed", seconds=float(about["seconds"]), device=str(about["device"]))

    def _step(self, held: dict[str, Task]) -> list[Outcome]:
        """The tasks that have ended: the first one this process can do; if others do them all, those they have done."""
        if self.works:
            for task in held.values():
                outcome = self._worker.attempt(task)
                if outcome.state in ENDED:
                    return [self._credited(outcome, task)]
                if outcome.state == "again":
                    return []
        landed = set(self.folder.keys("parts"))
        there = (self._credited(Outcome(key, "there"), task) for key, task in held.items() if key in landed)
        ended = [outcome for outcome in there if outcome.state == "landed" or self.folder.part(outcome.key) is not None]
        failed = set(self.folder.keys("failed"))
        ended += [spent for key in held if key in failed and (spent := given_up(self.folder, key)) is not None]
        if held and not ended:
            time.sleep(self.pause)
        return ended
