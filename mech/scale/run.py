"""A driver: it cuts a measurement, hands the blocks to an executor, and joins the parts.

    with on_folder("blocks") as run:                     # this process; `mech work blocks` joins in
        ram = mech.retrieval_attention_mass(model, samples)
    run.costs                                            # {"attention": Cost(blocks=4, samples=64, seconds=1.9)}

    stream(masses, model, iterator, queries="question")  # samples that are never all in memory

Memory, whatever the number of samples: at most ``in_flight + 1`` blocks, that is ``(in_flight + 1) x batches x
batch_size`` samples; and the joined values (RAM: 4 bytes for each head and sample).
"""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import xarray as xr

from mech.arguments import Count, Text, checked
from mech.axes import EXAMPLE
from mech.data.samples import Sample, Samples
from mech.errors import ExperimentError, MechError, OutputError
from mech.files import parse_json
from mech.scale.blocks import Block, Cut, Job, Task, tasks, timing, whole
from mech.scale.executors import Executor, Here
from mech.scale.folder import Folder, claim_of, sealed_bytes
from mech.scale.laid_out import LaidOut
from mech.scale.measures import Measure, run_by, running
from mech.scale.models import files_of, identity, recorded, software, split_revision
from mech.scale.packing import fingerprint, pack
from mech.scale.work import ABOUT, Outcome, beating, refusal

WANTED = 20.0  # seconds of a block: long compared with handing it over, short compared with what a kill may cost
EVERY = 2.0  # seconds between two records of a driver's progress


class BlocksFailed(MechError):
    """Blocks that failed three times; the others are done, and their parts are kept."""

    exit_code = 3

    def __init__(self, failed: Mapping[str, tuple[tuple[str, ...], str]], folder: str):
        self.failed, self.folder = dict(failed), folder
        samples = sum(len(ids) for ids, _ in failed.values())
        ids, error = next(iter(failed.values()))
        shown = ", ".join(ids[:4]) + (f" and {len(ids) - 4} more" if len(ids) > 4 else "")
        super().__init__(
            f"{len(failed)} blocks of {samples} samples failed three times, the first with "
            f"{f'samples {shown}' if ids else 'none'}: {error}",
            "every block measured; all others are done and kept",
            f"see `mech status {folder}`, fix the cause, and run the same command again",
        )

    @classmethod
    def of(cls, errors: Sequence["BlocksFailed"]) -> "BlocksFailed":
        """Several errors as one."""
        return cls({key: one for error in errors for key, one in error.failed.items()}, errors[0].folder)


@dataclass
class Cost:
    """What a measurement took; device seconds are summed over all workers."""

    blocks: int = 0
    samples: int = 0
    seconds: float = 0.0
    devices: dict[str, float] = field(default_factory=dict)


@dataclass
class Seen:
    """A driver's progress, as the progress line and `mech status` show it."""

    what: str = ""
    blocks: int = 0
    ended: int = 0
    samples: int = 0
    failed: int = 0
    started: float = field(default_factory=time.time)
    total: int | None = None


class Run:
    """The measurements of one driver. Made by ``on_folder`` and ``on_ray``."""

    def __init__(
        self, folder: Folder, executor: Executor, *, batches: int | None = None, wanted: float = WANTED,
        threads: int | None = None, say: Callable[[Seen], None] = lambda seen: None,
    ):  # fmt: skip
        self.folder, self.executor, self.batches, self.wanted, self.say = folder, executor, batches, wanted, say
        self.threads = threads or torch.get_num_threads()
        self.costs: dict[str, Cost] = {}
        self.seen, self.failed = Seen(), 0
        self.name, self._noted = uuid.uuid4().hex[:12], 0.0

    def measure(self, measure: Measure, model: Any, samples: Iterable[Sample], options: dict[str, Any]) -> xr.Dataset:
        """A measurement, block by block.

        Raises:
            MechError: what the measurement itself refuses.
            BlocksFailed: some failed three times, and all others are done.
            ExperimentError: an id that occurs twice.
        """
        options = dict(options)
        progress = options.pop("progress", None)
        if measure.whole:
            return self._whole(measure, model, Samples(iter(samples)), options, identity(model))
        size = options.pop("batch_size", 8)
        beside = {name: options.pop(name) for name in measure.beside if name in options}
        listed = samples if isinstance(samples, Sequence) else None
        if listed is not None:
            _refuse_twice([one.id or str(i) for i, one in enumerate(listed)])
        items = len(options[measure.over]) if measure.over is not None else None
        job = self._ready(measure, model, identity(model), options, size)
        self.seen = Seen(f"{model.name}: {measure.what}", failed=self.failed,
                         total=None if listed is None else len(listed) * (items or 1))  # fmt: skip
        cut, source = self._cut(job, measure, listed, samples, items, beside)
        kept: list[Block] = []
        outcomes = self._run(tasks(source, job, self.seen.what, cut, items, beside), kept, measure.what)
        for _ in outcomes:
            if progress:
                done = self.seen.samples // (items or 1)
                progress(done, max(done, len(listed) if listed is not None else done))
        return self._joined(job, measure, kept)

    @property
    def computes(self) -> bool:
        """Whether this process computes too."""
        return self.executor.works

    def laid_out(self, name: str) -> LaidOut:
        """A model without its weights, with what a worker that has them says about them.

        Raises:
            UnsupportedModel: it cannot be opened.
        """
        base, revision = split_revision(name)
        model = LaidOut.of(base, revision)
        model.name = name
        found = self._whole(recorded.measure, model, Samples([]), {"files": files_of(name)}, {"name": name})  # type: ignore[attr-defined]
        model.elsewhere = parse_json(found.attrs["record"])
        return model

    def _whole(
        self, measure: Measure, model: Any, samples: Samples, options: dict[str, Any], of: Mapping[str, str]
    ) -> xr.Dataset:
        """A measurement that is one block."""
        job = self._ready(measure, model, of, options, len(samples))
        self.seen = Seen(f"{model.name}: {measure.what}", failed=self.failed, total=len(samples))
        kept: list[Block] = []
        for _ in self._run(iter([whole(samples, job, self.seen.what)]), kept, measure.what):
            pass
        return self._joined(job, measure, kept)

    def _ready(self, measure: Measure, model: Any, of: Mapping[str, str], options: dict[str, Any], size: int) -> Job:
        """Write a job into the folder, and check that the executor can compute it."""
        job = Job(measure.name, of, software(), fingerprint(options), size, self.threads)
        self.folder.write(f"jobs/{job.key}.options.pack", pack(options))
        self.folder.write(f"jobs/{job.key}.pack", pack(job))
        self.executor.ready(job, model)
        return job

    def _cut(
        self, job: Job, measure: Measure, listed: Sequence[Sample] | None, samples: Iterable[Sample],
        items: int | None, beside: Mapping[str, Sequence[Any]],
    ) -> tuple[Cut, Iterable[Sample]]:  # fmt: skip
        """How the job is cut: as before in this folder, or else by the time that one batch takes."""
        name = f"jobs/{job.key}.cut.json"
        if (known := self.folder.record(name)) is not None:
            return Cut(known["batches"], known["items"]), samples
        batches = None if listed is None else -(-len(listed) // job.batch_size)
        if self.batches is not None:
            cut = Cut(self.batches, items)
        elif batches == 1 and items in (None, 1):
            cut = Cut(1, items)
        else:
            head = list(_first(samples, job.batch_size))
            rest = samples if listed is not None else _chained(head, samples)
            task = timing(head, job, f"{self.seen.what}, timed", items, beside)
            list(self._run(iter([task]), [], measure.what, counted=False))
            part, samples = self.folder.part(task.key), rest
            seconds = part.attrs[ABOUT]["seconds"] if part is not None else self.wanted  # it failed: use small blocks
            cut = Cut.by_time(seconds, self.wanted, batches, items, self.executor.workers)
        self.folder.create(name, sealed_bytes({"batches": cut.batches, "items": cut.items}))
        known = self.folder.record(name) or {}  # the first driver's cut
        return Cut(known.get("batches", cut.batches), known.get("items", cut.items)), samples

    def _run(self, todo: Iterator[Task], kept: list[Block], what: str, counted: bool = True) -> Iterator[Outcome]:
        blocks: dict[str, Block] = {}
        failed = set(self.folder.keys("failed"))

        def offered() -> Iterator[Task]:
            for task in todo:
                if task.key in failed:  # in an earlier run: it has three tries again
                    self.folder.forgive(task.key)
                kept.append(task.block)
                blocks[task.key] = task.block
                self.seen.blocks += counted
                yield task

        cost = self.costs.setdefault(what, Cost())
        for outcome in self.executor.run(offered()):
            block = blocks.pop(outcome.key)
            n = len(block.ids) * (1 if block.items is None else block.items[1] - block.items[0])
            self.failed += outcome.state in ("failed", "refused")
            self.seen.failed = self.failed
            if outcome.state == "landed":
                cost.blocks, cost.samples, cost.seconds = (
                    cost.blocks + 1,
                    cost.samples + n,
                    cost.seconds + outcome.seconds,
                )
                cost.devices[outcome.device] = cost.devices.get(outcome.device, 0.0) + outcome.seconds
            if counted:
                self.seen.ended, self.seen.samples = self.seen.ended + 1, self.seen.samples + n
            self._note()
            yield outcome

    def _joined(self, job: Job, measure: Measure, blocks: Sequence[Block]) -> xr.Dataset:
        parts, failed, refused = {}, {}, []
        for block in blocks:
            part = self.folder.part(block.key)
            attempts = self.folder.failures(block.key) if part is None else []
            if part is not None:
                parts[block] = part
            elif attempts and attempts[-1].get("final"):
                refused.append(block.key)
            else:
                failed[block.key] = (block.ids, attempts[-1]["error"] if attempts else "its part is gone")
        if refused:
            raise refusal(self.folder, refused[0])
        if failed:
            raise BlocksFailed(failed, self.folder.url)
        return merged(parts, job, measure)

    def _note(self, finished: bool = False) -> None:
        self.say(self.seen)
        now = time.monotonic()
        if not finished and now - self._noted < EVERY:
            return
        self._noted = now
        costs = {what: asdict(cost) for what, cost in self.costs.items()}
        facts = {"finished": finished, "seen": asdict(self.seen), "workers": self.executor.workers, "costs": costs}
        self.folder.put_record(f"runs/{self.name}.json", {**claim_of(self.name), **facts})

    def alive(self) -> None:
        """A sign of life for workers that wait for blocks."""
        self._noted = 0.0
        with suppress(OutputError):
            self._note()

    def close(self) -> None:
        """Release the workers, and record that nothing more comes."""
        self.executor.close()
        with suppress(OutputError):  # from a full disk: the error that came before says more
            self._note(finished=True)


def merged(parts: Mapping[Block, xr.Dataset], job: Job, measure: Measure) -> xr.Dataset:
    """The parts of a job as one dataset, in the order of their samples.

    Raises:
        OutputError: parts made with other weights, another processor or another program, or not one for each sample.
    """
    rows: dict[int, list[tuple[Block, xr.Dataset]]] = {}
    for block, part in parts.items():
        _refuse_foreign(block, part.attrs.pop(ABOUT, {}), job)
        if measure.whole:
            return part
        rows.setdefault(block.first, []).append((block, part))
    options: dict[str, Any] = dict(compat="equals", join="exact", combine_attrs="override")
    joined_rows = []
    for first in sorted(rows):
        beside = [part for _, part in sorted(rows[first], key=lambda one: one[0].items or (0, 0))]
        joined_rows.append(xr.concat(beside, measure.dim, data_vars="minimal", coords="minimal", **options)
                           if measure.over is not None else beside[0])  # fmt: skip
    joined = xr.concat(joined_rows, EXAMPLE, data_vars="minimal", coords="minimal", **options)
    ids = [id for first in sorted(rows) for id in rows[first][0][0].ids]
    _refuse_twice(list(map(str, joined[EXAMPLE].values)))
    if list(map(str, joined[EXAMPLE].values)) != ids:
        raise OutputError(
            f"{joined.sizes[EXAMPLE]} examples for {len(ids)} samples", "one for each", "remove the folder"
        )
    return joined


@checked
@contextmanager
def on_folder(
    folder: Text | Path,
    *,
    works: bool = True,
    workers: Count = 4,
    batches: Count | None = None,
    threads: Count | None = None,
    say: Callable[[Seen], None] = lambda seen: None,
) -> Iterator[Run]:
    """Measure block by block into a folder; blocks that are already there are not computed again.

    Inside, the measurements of mech over samples (RAM, scores, ablation, patching, transfer, sparse inference) are cut
    into blocks; any number of ``mech work FOLDER`` processes may join. The numbers are the same as in one process.

    Args:
        folder: a path, or an fsspec URL.
        works: whether this process computes too; if not, it only waits for others.
        workers: how many workers are expected: a short job is cut into four blocks for each.
        batches: batches per block; by default as many as take twenty seconds.
        threads: CPU threads of each worker; by default those of this process.
        say: called with the progress.

    Raises:
        OutputError: the folder cannot be written.
    """
    place = Folder(folder)
    here = Here(place, works=works, publish=True, workers=workers, in_flight=64)
    with driving(Run(place, here, batches=batches, threads=threads, say=say)) as run:
        yield run


@contextmanager
def rest_goes_on(failed: list[BlocksFailed]) -> Iterator[None]:
    """Keep failed blocks for later: the rest of a study is done first."""
    try:
        yield
    except BlocksFailed as error:
        failed.append(error)


@contextmanager
def driving(run: Run) -> Iterator[Run]:
    """Let a driver cut the measurements inside."""
    try:
        with run_by(run), beating(run.folder.lease / 4, run.alive):
            yield run
    finally:
        run.close()


def stream(function: Callable[..., xr.Dataset], model: Any, samples: Iterable[Sample], **options: Any) -> xr.Dataset:
    """Measure samples that come one by one, and are never all in memory.

    Args:
        function: a measurement marked by ``per_sample``.
        model: the model to measure.
        samples: any iterable of samples, such as a generator over a streamed data set.
        options: options of the measurement, ``batch_size`` among them.

    Raises:
        ExperimentError: a function that is not marked, or no ``on_folder`` or ``on_ray`` around it.

    Memory: see ``mech.scale.run``.
    """
    measure, run = getattr(function, "measure", None), running()
    if measure is None or run is None:
        where = "" if run else " outside on_folder and on_ray"
        raise ExperimentError(
            f"stream({getattr(function, '__name__', function)}, ...){where}",
            "a function marked by mech.scale.per_sample, inside `with mech.on_folder(...)`", "put it inside",
        )  # fmt: skip
    return run.measure(measure, model, iter(samples), options)


def _refuse_foreign(block: Block, about: Mapping[str, Any], job: Job) -> None:
    for name, mine in (("model", job.model), ("software", job.software)):
        theirs = about.get(name, {})
        if wrong := [key for key, value in mine.items() if theirs.get(key) != value]:
            raise OutputError(
                f"part {block.key} was made with another {wrong[0]} ({str(theirs.get(wrong[0]))[:12]})",
                f"{str(mine[wrong[0]])[:12]}, as the job says", "remove it, and run the same command again",
            )  # fmt: skip


def _refuse_twice(ids: Sequence[str]) -> None:
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = next(id for id in ids if id in seen or seen.add(id))
        raise ExperimentError(f"the id {twice!r} occurs twice", "a unique id for each sample", "rename one of them")


def _first(samples: Iterable[Sample], n: int) -> Iterator[Sample]:
    for _, sample in zip(range(n), samples, strict=False):  # in this order, no further sample is taken
        yield sample


def _chained(head: Sequence[Sample], rest: Iterable[Sample]) -> Iterator[Sample]:
    yield from head
    yield from rest
