"""The study folder: results that are only ever added to, and that survive being killed.

Running the same command again computes only what is missing. A long result is appended in parts, so a kill loses at
most the part in progress; a damaged file counts as missing.

    >>> study = Study("study", settings={"n_test": 100, "seed": 0})      # doctest: +SKIP
    >>> if not study.done("llava-m/grounding/ram"):                      # doctest: +SKIP
    ...     study.put("llava-m/grounding/ram", scores)
    >>> for i in study.missing("llava-m/grounding/ablation", len(plan)): # doctest: +SKIP
    ...     study.append("llava-m/grounding/ablation", measured(plan[i]), i)
    >>> study.finish("llava-m/grounding/ablation", len(plan))            # doctest: +SKIP

``settings`` hold whatever changes the numbers in an existing file; a folder made with other settings is refused. What
only *adds* files (one more model or domain) belongs in the keys, not in the settings. A study that ends in an error
before its first result leaves nothing behind, so that a refused call does not block the next one.

One process writes at a time. A key that ends in "ram", "ablation", "maps" or "causal" must hold that kind of dataset;
beyond that nothing here knows what the numbers mean.
"""

import contextlib
import json
import os
import weakref
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import xarray as xr

from mech.arguments import checking
from mech.axes import CONDITION
from mech.errors import OutputError
from mech.files import make_folder, unwritable
from mech.results.older import older_file
from mech.results.provenance import jsonable
from mech.results.schema import KINDS, VERSION, check
from mech.results.store import load, load_part, read_json, save, save_part, write_json

BLOCKS = "blocks"  # a folder of `mech.scale` inside the study, which many processes write to

try:
    import fcntl
except ImportError:  # no file locks on this system: two writers go unnoticed
    fcntl = None


@checking(OutputError)
class Study:
    """A folder of results that is only ever added to.

    Args:
        path: the folder; created if it does not exist.
        settings: what determines the numbers, JSON-able. The same settings open the folder again; without settings the
            folder is opened for reading only, and nothing is locked.

    Raises:
        OutputError: the folder cannot be written, was made with other settings, or is being written by another
            process.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any] | None = None):
        self.path = Path(path)
        self.writes = settings is not None
        self._lock: _Lock | None = None
        self._made: tuple[bool, bool] = False, False  # whether this opening made the folder and its study.json
        if settings is None:
            self._record = _read_record(self.path / "study.json")
            return
        there = self.path.exists()
        make_folder(self.path)
        self._lock = _Lock.of(self.path / ".lock")
        for left in self.path.rglob(".*.part"):  # left by a process that was killed while writing
            if BLOCKS not in left.parts:  # others may be writing there
                left.unlink(missing_ok=True)
        wanted = jsonable(dict(settings))
        if (self.path / "study.json").exists():
            self._record = _read_record(self.path / "study.json")
            if difference := _difference(self._record.get("settings", {}), wanted):
                name, here, asked = difference
                self.close()
                raise OutputError(
                    f"{self.path} was made with {name} = {here}, but now {name} = {asked}",
                    "the same settings, so that its numbers can be kept",
                    "give another folder, or delete this one",
                )
        else:
            created = datetime.now(UTC).isoformat(timespec="seconds")
            self._record = {"schema": VERSION, "created": created, "settings": wanted, "records": []}
            self._made = not there, True
            try:
                write_json(self._record, self.path / "study.json")
            except OutputError:
                self._undo()
                raise

    @property
    def settings(self) -> dict[str, Any]:
        return self._record.get("settings", {})

    @property
    def records(self) -> list[dict[str, Any]]:
        """The recorded entries, oldest first."""
        return list(self._record.get("records", []))

    def record(self, entry: Mapping[str, Any]) -> None:
        """Add an entry (a provenance, say) to ``study.json``."""
        self._must_write()
        record = {**self._record, "records": [*self._record.get("records", []), jsonable(dict(entry))]}
        write_json(record, self.path / "study.json")
        self._record = record

    def file(self, key: str, suffix: str = ".nc") -> Path:
        """Where a key lives: ``model/domain/ram`` -> ``{study}/model/domain/ram.nc``."""
        parts = key.split("/")
        if not all(parts) or any(part.startswith(".") or "\\" in part or "\0" in part for part in parts):
            raise OutputError(f"{key!r} is not a key", "words joined by '/', none empty or starting with a dot")
        return self.path.joinpath(*parts[:-1], parts[-1] + suffix)

    def keys(self) -> list[str]:
        """Every finished result, by name."""
        return sorted(p.relative_to(self.path).with_suffix("").as_posix() for p in self.path.rglob("*.nc"))

    def done(self, key: str) -> bool:
        """Whether the result is there and whole. A damaged file counts as missing."""
        try:
            self.get(key)
        except OutputError:
            return False
        return True

    def get(self, key: str) -> xr.Dataset:
        """The result of a key, checked."""
        return _checked(load(older_file(self.file(key))), key)

    def put(self, key: str, dataset: xr.Dataset) -> None:
        """Add a finished result. One that is there and whole is not overwritten."""
        self._must_write()
        path = self.file(key)
        _checked(dataset, key)
        if self.done(key):
            raise OutputError(f"{path} already exists", "a study is only added to", "ask study.done(key) first")
        make_folder(path.parent)
        save(dataset, path)

    def append(self, key: str, part: xr.Dataset, index: int) -> None:
        """Save part number ``index`` of a result at once, so that a kill loses at most the part in progress."""
        self._must_write()
        path = self._part(key, index)
        _checked(part, key)
        make_folder(path.parent)
        save_part(part, path)

    def missing(self, key: str, n: int) -> list[int]:
        """Which of the parts 0 to n-1 still have to be computed; none if the result is finished."""
        if self.done(key):
            return []
        return [i for i in range(n) if not self._has_part(key, i)]

    def finish(self, key: str, n: int, dim: str = CONDITION, **attrs: Any) -> xr.Dataset:
        """Join parts 0 to n-1 along ``dim`` in the order of their numbers, and put the result.

        ``attrs`` (such as ``provenance``) are set on the whole; those of the first part are kept.
        """
        self._must_write()
        if not self.done(key):
            self.put(key, self._joined(key, n, dim).assign_attrs(attrs))
        folder = self._part(key, 0).parent
        for path in folder.glob("*.npz"):  # also those of a run that was killed right here
            path.unlink()
        with contextlib.suppress(OSError):  # not there, or kept by a stray file of the user's
            folder.rmdir()
        return self.get(key)

    def close(self) -> None:
        """Let others write. A study that is no longer referenced, or whose process ends, is closed by itself."""
        self._lock = None
        self.writes = False

    def __enter__(self) -> "Study":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._undo()
        self.close()

    def __repr__(self) -> str:
        return f"Study({str(self.path)!r}, {len(self.keys())} results{'' if self.writes else ', reading only'})"

    def _undo(self) -> None:
        """Remove what this opening made, as long as there is no result."""
        of_folder, of_record = self._made
        results = (path for pattern in ("*.nc", "*.npz") for path in self.path.rglob(pattern))
        if not of_record or next(results, None) is not None:
            return
        for name in ("study.json", ".lock"):
            (self.path / name).unlink(missing_ok=True)
        if of_folder:
            inner = sorted(filter(Path.is_dir, self.path.rglob("*")), key=lambda path: -len(path.parts))
            for folder in (*inner, self.path):
                with contextlib.suppress(OSError):  # kept by a file of the user's
                    folder.rmdir()

    def _must_write(self) -> None:
        if not self.writes:
            raise OutputError(f"{self.path} is open for reading", "", "open it with Study(path, settings)")

    def _joined(self, key: str, n: int, dim: str) -> xr.Dataset:
        if missing := self.missing(key, n):
            raise OutputError(
                f"{key!r} is not complete: {len(missing)} of {n} parts are missing, the first is {missing[0]}",
                "every part appended",
                "compute those that study.missing(key, n) names",
            )
        parts = [load_part(self._part(key, i)) for i in range(n)]
        try:
            return xr.concat(
                parts, dim, data_vars="all", coords="different", compat="equals", join="exact",
                combine_attrs="override",
            )  # fmt: skip
        except (ValueError, KeyError) as error:
            raise OutputError(f"the parts of {key!r} do not fit: {error}", "the same examples in every part") from error

    def _part(self, key: str, index: int) -> Path:
        if index < 0:
            raise OutputError(f"part {index} of {key!r}", "a number of at least 0")
        return self.file(key, ".parts") / f"{index:04d}.npz"

    def _has_part(self, key: str, index: int) -> bool:
        try:
            _checked(load_part(self._part(key, index)), key)
        except OutputError:
            return False
        return True


class _Lock:
    """The lock file of a folder, held while an object lives.

    The system keeps the lock (``flock``) and drops it when the process dies, however it dies: a lock left behind by a
    killed run never has to be cleaned up, and no process number can be mistaken for another. The number inside the
    file is for the message only. Studies of one process share the lock: a notebook may open its folder twice.
    """

    _held: ClassVar["weakref.WeakValueDictionary[Path, _Lock]"] = weakref.WeakValueDictionary()

    @classmethod
    def of(cls, path: Path) -> "_Lock":
        path = path.resolve()
        held = cls._held.get(path)
        if held is None or held.pid != os.getpid():  # a forked child inherits the table, not the right to write
            held = cls._held[path] = cls(path)
        return held

    def __init__(self, path: Path):
        self.pid = os.getpid()
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise unwritable(path, error) from error
        weakref.finalize(self, os.close, handle)
        if fcntl is None:
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(handle, 200).decode(errors="replace").strip()
            raise OutputError(
                f"{path.parent} is being written by another process ({holder or 'unknown'})",
                "one writer at a time",
                "wait for it, stop it, or give another folder",
            ) from error
        except OSError:  # some network drives have no locks: go on without
            return
        with contextlib.suppress(OSError):  # a full disk: the number only makes a message clearer
            os.ftruncate(handle, 0)
            os.write(handle, f"process {self.pid} on {os.uname().nodename}".encode())


def _checked(dataset: xr.Dataset, key: str) -> xr.Dataset:
    record = dataset.attrs.get("provenance")
    if record is not None and not isinstance(record, Mapping):
        raise OutputError(
            f"the provenance of {key!r} is a {type(record).__name__}", "a record", "pass provenance=provenance(...)"
        )
    kind = key.rsplit("/", 1)[-1]
    return check(dataset, kind) if kind in KINDS else dataset


def _read_record(path: Path) -> dict[str, Any]:
    """What ``study.json`` holds: settings by name, and a list of records."""
    try:
        value = read_json(path)
    except FileNotFoundError as error:
        raise OutputError(
            f"{path.parent} is not a study", "a folder with study.json", "run `mech study` first"
        ) from error
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read ({error})", "JSON", "delete the folder and run again") from error
    if not isinstance(value, dict):
        raise OutputError(f"{path} holds a {type(value).__name__}", "a JSON object", "delete the folder and run again")
    settings, records = value.get("settings", {}), value.get("records", [])
    if not isinstance(settings, dict) or not all(
        isinstance(entry, dict) for entry in (records if isinstance(records, list) else [records])
    ):
        raise OutputError(f"{path} has other entries", "settings and records", "delete the folder and run again")
    return value


def _difference(here: Any, asked: Any, name: str = "") -> tuple[str, str, str] | None:
    """The first setting that differs: its dotted name and both values."""
    if isinstance(here, dict) and isinstance(asked, dict):
        for key in dict.fromkeys([*here, *asked]):
            inner = f"{name}.{key}" if name else key
            if key not in here or key not in asked:
                return inner, json.dumps(here.get(key, "unset")), json.dumps(asked.get(key, "unset"))
            if found := _difference(here[key], asked[key], inner):
                return found
        return None
    return None if here == asked else (name, json.dumps(here), json.dumps(asked))
