"""A worker: it holds a model, takes blocks, and lands what they measure.

    worker = Worker(folder, placement={"device": "cuda"})
    worker.attempt(task)                       # Outcome(key, "landed", ...)
    work("blocks")                             # until nothing is left: `mech work blocks`

A try ends in one of six ways: ``landed``; ``there`` already; ``held`` by another live worker; ``refused``: the
measurement cannot be made on these samples (an error of mech, the same on every machine); ``again``: anything else went
wrong, and it is tried again; ``failed``: it went wrong for the third time.
"""

import platform
import random
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import xarray as xr

from mech import errors
from mech.axes import EXAMPLE
from mech.errors import MechError, OutputError
from mech.scale.blocks import Block, Job, Task
from mech.scale.folder import ATTEMPTS, Folder
from mech.scale.measures import Measure, find_measure, run_by
from mech.scale.models import HASHED, identity, open_model, refuse_difference, software
from mech.scale.packing import known, pack, unpack

ABOUT = "mech_block"  # the attribute of a part that says what it is
known(Job, Block)


@dataclass(frozen=True)
class Outcome:
    """How a try ended: ``error`` in words; ``seconds`` and ``device`` of what landed."""

    key: str
    state: str
    error: str = ""
    seconds: float = 0.0
    device: str = ""


class Worker:
    """Computes blocks in this process.

    Args:
        folder: where jobs are read and parts land.
        placement: how models are opened: ``device``, ``device_map``, ``dtype``.
        model: an open model, instead of opening one by its name.
    """

    def __init__(self, folder: Folder, placement: Mapping[str, Any] | None = None, model: Any = None):
        self.folder, self.placement = folder, dict(placement or {})
        self.name = uuid.uuid4().hex[:12]
        self._own, self._open, self._jobs = model, {}, {}

    def job(self, key: str) -> tuple[Job, dict[str, Any]]:
        """A job and its options.

        Raises:
            OutputError: this machine does not see the folder.
        """
        if key not in self._jobs:
            content = self.folder.read(f"jobs/{key}.pack")
            if content is None:
                raise OutputError(
                    f"{self.folder.url} on {_here()} has no job {key}", "the folder that the driver writes to",
                    "give a folder that all machines see: NFS, or a URL such as s3://",
                )  # fmt: skip
            job = unpack(content)
            find_measure(job.measure)  # its module registers the classes that the options are made of
            options = unpack(self.folder.read(f"jobs/{key}.options.pack") or b"")
            self._jobs = {key: (job, options)}  # one at a time: options may hold activations
        return self._jobs[key]

    def model(self, job: Job) -> Any:
        """The job's model, opened once.

        Raises:
            ExperimentError: other weights, or another program, than the job was made with.
        """
        refuse_difference(job.software, software(), _here())
        name = job.model["name"]
        if self._own is not None and self._own.name == name:
            return self._own
        if name not in self._open:
            self._open.clear()  # before the next one is loaded
            self._open[name] = open_model(name, **self.placement)
        wanted = {name: job.model[name] for name in HASHED if name in job.model}  # the job that records them has none
        refuse_difference(wanted, identity(self._open[name]), _here())
        return self._open[name]

    def attempt(self, task: Task) -> Outcome:
        """Compute a block, unless it is there or held.

        Raises:
            ExperimentError: this worker may not compute it, see ``model``.
            OutputError: the result cannot be written.
        """
        key, folder = task.key, self.folder
        if folder.part(key) is not None:
            return Outcome(key, "there")
        if (spent := given_up(folder, key)) is not None:
            return spent
        job, options = self.job(task.block.job)
        measure, model = find_measure(job.measure), self.model(job)
        if not folder.claim(key, self.name):
            return Outcome(key, "held")
        try:
            with beating(folder.lease / 4, lambda: folder.beat(key, self.name)):
                if folder.part(key) is not None:  # landed between the check and the claim
                    return Outcome(key, "there")
                return self._landed(task, job, measure, model, options)
        finally:
            folder.release(key)

    def _landed(self, task: Task, job: Job, measure: Measure, model: Any, options: Mapping[str, Any]) -> Outcome:
        key, ids = task.key, task.block.ids
        device = str(getattr(model, "device", "cpu"))
        try:
            task = self._with_samples(task)
            if task.block.timed:
                computed(measure, model, task, job, options)
            started = time.perf_counter()
            found = computed(measure, model, task, job, options)
            seconds = time.perf_counter() - started
        except MechError as error:
            kind = {"kind": type(error).__name__, "said": [error.given, error.expected, error.do]}
            self.folder.fail(key, self.name, str(error), ids, final=True, **kind)
            return Outcome(key, "refused", str(error))
        except Exception as error:
            said = "".join(traceback.format_exception_only(error)).strip()
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.folder.fail(key, self.name, f"{said} ({where.name}, line {where.lineno})", ids)
            return given_up(self.folder, key) or Outcome(key, "again", said)
        about = {"key": key, "job": task.block.job, "model": dict(job.model), "software": dict(job.software),
                 "seconds": seconds, "device": device, "worker": self.name, "ids": list(ids)}  # fmt: skip
        self.folder.land(key, found.assign_attrs({ABOUT: about}))
        self.folder.forgive(key)
        return Outcome(key, "landed", seconds=seconds, device=device)

    def _with_samples(self, task: Task) -> Task:
        return task if task.samples is not None else waiting(self.folder, task.key) or task


def computed(measure: Measure, model: Any, task: Task, job: Job, options: Mapping[str, Any]) -> xr.Dataset:
    """What a block measures, with the job's number of threads, so that sums agree to the last bit."""
    call: dict[str, Any] = {**options, **task.beside} | ({} if measure.whole else {"batch_size": job.batch_size})
    if measure.over is not None and task.block.items is not None:
        call[measure.over] = options[measure.over][slice(*task.block.items)]
    if measure.placed:
        call["first"] = task.block.first
    before = torch.get_num_threads()
    torch.set_num_threads(job.threads)
    try:
        with run_by(None):
            found = measure.function(model, task.samples, **call)
    finally:
        torch.set_num_threads(before)
    if not measure.whole and list(map(str, found[EXAMPLE].values)) != list(task.block.ids):
        raise RuntimeError(f"{measure.name} returned other examples than requested")
    return found


def given_up(folder: Folder, key: str) -> Outcome | None:
    """The outcome of a block that was refused, or failed too often; None while it can still be tried."""
    attempts = folder.failures(key)
    if attempts and attempts[-1].get("final"):
        return Outcome(key, "refused", attempts[-1]["error"])
    return Outcome(key, "failed", attempts[-1]["error"]) if len(attempts) >= ATTEMPTS else None


def refusal(folder: Folder, key: str) -> MechError:
    """The error with which a measurement was refused, as originally raised."""
    last = folder.failures(key)[-1]
    kind = getattr(errors, str(last.get("kind")), MechError)
    return kind(*last.get("said", [last["error"]]))


def publish(folder: Folder, task: Task) -> Task:
    """Put a block with its samples into the folder; returns the task without its samples."""
    folder.write(f"todo/{task.key}.pack", pack([task.block, task.samples, dict(task.beside)]))
    return Task(task.block, None)


def waiting(folder: Folder, key: str) -> Task | None:
    """A block that waits in the folder; None if it is no longer there."""
    content = folder.read(f"todo/{key}.pack")
    return None if content is None else Task(*unpack(content))


def work(
    url: str,
    *,
    placement: Mapping[str, Any] | None = None,
    idle: float = 600.0,
    linger: float = 30.0,
    pause: float = 0.5,
    say: Callable[[Outcome, Task], None] = lambda outcome, task: None,
) -> dict[str, int]:
    """Compute the blocks in a folder until its drivers are done or none has come for a while.

    Args:
        url: the folder.
        placement: how models are opened.
        idle: seconds without work after which it ends.
        linger: the same once every driver is done, or dead: the next one may be about to start.
        pause: seconds between two checks.
        say: called with every outcome.

    Returns:
        How many blocks ended in each way.

    Raises:
        ExperimentError: other weights or another program than the driver's.
        OutputError: no room.
    """
    folder = Folder(url)
    worker, counts = Worker(folder, placement), {"landed": 0, "failed": 0, "refused": 0}
    order, since = random.Random(worker.name), time.monotonic()  # which worker takes what; no number depends on it
    ended: set[str] = set()
    while time.monotonic() - since < (linger if _all_done(folder) else idle):
        keys = sorted(set(folder.keys("todo")) - set(folder.keys("parts")) - ended)
        order.shuffle(keys)
        worked = False
        for key in keys:
            if (task := waiting(folder, key)) is None:
                continue
            outcome = worker.attempt(task)
            if outcome.state in ("failed", "refused"):
                ended.add(key)
            if outcome.state in counts:
                counts[outcome.state] += 1
                say(outcome, task)
            worked = worked or outcome.state in ("landed", "again")
        if worked:
            since = time.monotonic()
        else:
            time.sleep(pause)
    return counts


def _all_done(folder: Folder) -> bool:
    """Whether there were drivers, and all of them are done, or dead."""
    runs = [folder.record(f"runs/{name}.json") for name in folder.keys("runs")]
    return bool(runs) and all(run is None or run.get("finished") or folder.void(run) for run in runs)


@contextmanager
def beating(pause: float, beat: Callable[[], None]) -> Iterator[None]:
    """Signs of life while something is computed."""
    over = threading.Event()

    def keep_on() -> None:
        while not over.wait(pause):
            beat()

    thread = threading.Thread(target=keep_on, daemon=True, name="sign of life")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _here() -> str:
    return platform.node()
