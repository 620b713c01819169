"""Ray: actors that each hold a model, and compute the blocks of one driver.

    with on_ray() as run:                                      # a cluster of this machine's cores and GPUs
    with on_ray("ray://head:10001", folder="s3://b/blocks"):   # a remote one; every node must see the folder
    with on_ray("auto", gpus_per_model=0.5):                   # two models share a GPU; 4: one model over four

A driver hands each actor one block at a time, so at most ``workers + 1`` blocks of samples are in memory. Nodes are
checked against the job before any work: program, weights, folder, and room for the model. An actor that dies loses only
the block it was computing, which another one takes; what it had landed is in the folder.
"""

import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mech import errors
from mech.arguments import Count, Positive, Text, checked
from mech.errors import ExperimentError, MechError
from mech.scale.blocks import Job, Task
from mech.scale.executors import ENDED
from mech.scale.folder import Folder
from mech.scale.measures import import_all
from mech.scale.models import size_in_bytes
from mech.scale.packing import pack, unpack
from mech.scale.run import Run, Seen, driving
from mech.scale.work import Outcome, Worker, given_up

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
PAUSE = 0.5  # seconds before a block that another driver holds is checked again
ROOM = 1.2  # times the weights: a model needs at least a fifth more than these


class Actor:
    """A worker inside Ray. mech's refusals come back as values: Ray would wrap the error."""

    def __init__(self, url: str, placement: Mapping[str, Any], modules: tuple[str, ...]):
        self._url, self._placement, self._modules, self._worker = url, placement, modules, None

    def __repr__(self) -> str:  # Ray's dashboard and logs show it
        return f"mech worker {os.getpid()}"

    def fit(self, job: str, weights: int) -> tuple[str, Any]:
        """Check this node against a job: the folder, the program, room for the model, its weights."""
        try:
            found, _ = self._mine().job(job)
            if (room := _gpu_bytes()) and room < weights:
                raise ExperimentError(
                    f"{found.model['name']} takes {weights / 1e9:.1f} GB, and a worker's GPUs have {room / 1e9:.1f}",
                    "room for the weights", "give more --gpus-per-model",
                )  # fmt: skip
            self._mine().model(found)
        except MechError as error:
            return "refused", _said(error)
        return "fit", os.uname().nodename

    def attempt(self, task: bytes) -> tuple[str, Any]:
        """Compute a block."""
        try:
            return "outcome", asdict(self._mine().attempt(Task(*unpack(task))))
        except MechError as error:  # not the block's fault: the disk is full, or this node does not match the job
            return "refused", _said(error)

    def _mine(self) -> Worker:
        if self._worker is None:
            import_all(self._modules)
            self._worker = Worker(Folder(self._url), self._placement)
        return self._worker


class OnRay:
    """The executor on a connected Ray cluster.

    Args:
        folder: the folder of blocks.
        gpus_per_model: GPUs of each actor; by default one if the cluster has GPUs.
        threads: CPU threads of each actor.
        modules: modules that actors import first, for measurements that are not part of mech.

    Raises:
        ExperimentError: no node has that many GPUs or cores.
    """

    def __init__(self, folder: Folder, gpus_per_model: float | None, threads: int, modules: tuple[str, ...] = ()):
        self.folder, self.modules, self.works = folder, modules, False
        self._ray = _ray()
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpus = [node.get("GPU", 0.0) for node in nodes]
        share = gpus_per_model if gpus_per_model is not None else (1.0 if sum(gpus) else 0.0)
        _refuse_too_large(share, threads, gpus, [node.get("CPU", 0.0) for node in nodes])
        self._needs = {"num_gpus": share, "num_cpus": threads}
        self._memory = max(node.get("memory", 0.0) for node in nodes)
        self.workers = sum(_fits(node, share, threads) for node in nodes)
        self.in_flight = self.workers
        self._placement = {"device_map": "auto"} if share > 1 else {} if share else {"device": "cpu"}
        self._actors: list[Any] = []  # None in place of one that died, until there is a block for it

    def ready(self, job: Job, model: Any) -> None:
        """Check all nodes against the job.

        Raises:
            ExperimentError: a model that no node has room for; another program, or other weights, on a node.
            OutputError: a node that does not see the folder.
        """
        weights = size_in_bytes(model)
        if not self._needs["num_gpus"] and self._memory < ROOM * weights:
            raise ExperimentError(
                f"{model.name} takes {weights / 1e9:.1f} GB, and the largest node has {self._memory / 1e9:.1f}",
                f"{ROOM:g} times its weights on a node", "add a larger node",
            )  # fmt: skip
        self._actors += [None] * (self.workers - len(self._actors))
        self._actors = [actor or self._started() for actor in self._actors]
        for state, said in self._ray.get([actor.fit.remote(job.key, weights) for actor in self._actors]):
            if state == "refused":
                raise _raised(said)

    def run(self, tasks: Iterator[Task]) -> Iterator[Outcome]:
        idle, later = deque(range(len(self._actors))), deque[tuple[float, Task]]()
        busy: dict[Any, tuple[int, Task]] = {}
        more = True
        while more or busy or later:
            while idle and (more or later):
                task, more = _next(tasks, later, more)
                if task is None:
                    break
                place = idle.popleft()
                busy[self._handed(place, task)] = place, task
            if not busy:
                time.sleep(PAUSE if later else 0)
                continue
            ended, _ = self._ray.wait(list(busy), num_returns=1, timeout=PAUSE)
            for ref in ended:
                place, task = busy.pop(ref)
                outcome = self._outcome(ref, place, task)
                idle.append(place)
                if outcome.state in ENDED:
                    yield outcome
                else:  # held by another driver, or to be tried again
                    later.append((time.monotonic() + PAUSE * (outcome.state == "held"), task))

    def close(self) -> None:
        for actor in filter(None, self._actors):
            self._ray.kill(actor)
        self._actors = []

    def _started(self) -> Any:
        made = self._ray.remote(Actor).options(**self._needs)
        return made.remote(self.folder.url, self._placement, self.modules)

    def _handed(self, place: int, task: Task) -> Any:
        """Give a block to an actor; the name is what Ray's dashboard shows."""
        packed = pack([task.block, task.samples, dict(task.beside)])
        name = f"{task.block.what} from sample {task.block.first}"
        self._actors[place] = self._actors[place] or self._started()
        return self._actors[place].attempt.options(name=name).remote(packed)

    def _outcome(self, ref: Any, place: int, task: Task) -> Outcome:
        """How a block ended; if its actor died, a new one takes its place when there is a block for it."""
        try:
            state, said = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            self._actors[place] = None
            self.folder.release(task.key)
            said = f"the worker died ({type(error).__name__})"
            self.folder.fail(task.key, f"actor {place}", said, task.block.ids)
            return given_up(self.folder, task.key) or Outcome(task.key, "again", said)
        if state == "refused":
            raise _raised(said)
        return Outcome(**said)


@checked
@contextmanager
def on_ray(
    address: Text = "local",
    *,
    folder: Text | Path = "mech-blocks",
    gpus_per_model: Positive | None = None,
    threads: Count | None = None,
    batches: Count | None = None,
    modules: Sequence[str] = (),
    say: Callable[[Seen], None] = lambda seen: None,
) -> Iterator[Run]:
    """Measure on a Ray cluster: the work inside is cut into blocks, as in ``mech.on_folder``, and actors compute them.

    Args:
        address: ``"local"``, a cluster of all cores and GPUs of this machine (or the one this process is connected to);
            ``"auto"``, the one that runs here; ``"ray://HOST:PORT"``.
        folder: the folder of blocks: a path that all nodes see, or an fsspec URL.
        gpus_per_model: a share of one GPU, or several GPUs for one model; by default one where there are GPUs.
        threads: CPU threads of each actor; one by default.
        batches: batches per block; by default as many as take twenty seconds.
        modules: modules that actors import first, for your own measurements.
        say: called with the progress.

    Raises:
        MechError: Ray is not installed, or the cluster cannot be reached.
        ExperimentError: a model that fits no node; other weights or another program on a node.
        OutputError: a folder that cannot be written, or that a node does not see.

    Memory of the driver: samples of ``workers + 1`` blocks, and the joined values.
    """
    ray = _ray()
    mine = not ray.is_initialized()
    if mine:
        _connected(ray, address)
    try:
        place = Folder(folder)
        executor = OnRay(place, gpus_per_model, threads or 1, tuple(modules))
        with driving(Run(place, executor, batches=batches, threads=threads or 1, say=say)) as run:
            yield run
    finally:
        if mine:
            ray.shutdown()


def _ray() -> Any:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise MechError("Ray is not installed", "mech's extra for clusters", "pip install 'mech[ray]'") from error
    return ray


def _connected(ray: Any, address: str) -> None:
    """Connect to a cluster, or start one here.

    Raises:
        MechError: it cannot be reached, or what reaches it is not installed.
    """
    if address.startswith("ray://") and find_spec("grpc") is None:
        raise MechError(
            f"the Ray cluster {address!r} without Ray's client (grpcio is not installed)",
            "mech's extra for clusters, which installs it; auto, on a machine of the cluster, does not need it",
            "pip install 'mech[ray]'",
        )  # fmt: skip
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # Ray's, about what its next version does
            ray.init(**options, **({"include_dashboard": False} if address == "local" else {"address": address}))
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        raise MechError(
            f"the Ray cluster {address!r} cannot be reached ({str(error).strip().splitlines()[0]})",
            "a running cluster, and its address: auto on one of its machines, ray://HOST:10001 from elsewhere",
            "run `ray status` on its head node",
        ) from error


def _next(tasks: Iterator[Task], later: "deque[tuple[float, Task]]", more: bool) -> tuple[Task | None, bool]:
    """A block to hand out, and whether more may come."""
    if later and later[0][0] <= time.monotonic():
        return later.popleft()[1], more
    task = next(tasks, None) if more else None
    return task, more and task is not None


def _refuse_too_large(share: float, threads: int, gpus: list[float], cores: list[float]) -> None:
    if share and share > max(gpus):
        raise ExperimentError(
            f"{share:g} GPUs for a model, and the largest node has {max(gpus):g}", "a model that fits on one node",
            "give fewer --gpus-per-model, or add a larger node",
        )  # fmt: skip
    if threads > max(cores):
        raise ExperimentError(
            f"{threads} threads for a worker, and the largest node has {max(cores):g} cores",
            "a worker that fits on one node", "give fewer --threads",
        )  # fmt: skip


def _fits(node: Mapping[str, float], share: float, threads: int) -> int:
    """How many actors a node has room for."""
    by_cores = int(node.get("CPU", 0.0) // threads)
    return min(by_cores, int(node.get("GPU", 0.0) / share + 1e-9)) if share else by_cores


def _gpu_bytes() -> int:
    """Memory of all GPUs that this process sees; 0 without a GPU."""
    import torch

    n = torch.cuda.device_count()
    return sum(torch.cuda.get_device_properties(i).total_memory for i in range(n))


def _said(error: MechError) -> tuple[str, str, str, str]:
    return type(error).__name__, error.given, error.expected, error.do


def _raised(said: tuple[str, str, str, str]) -> MechError:
    kind, *rest = said
    return getattr(errors, kind, MechError)(*rest)
