"""The folder that drivers and workers share: jobs, blocks, parts, claims and failures, on any disk fsspec supports.

    folder = Folder("s3://bucket/study")             # or a path: local, NFS
    folder.land(key, dataset); folder.part(key)      # whole or not at all, with a checksum
    folder.claim(key, worker)                        # False while another live worker holds it

    jobs/KEY.pack  KEY.options.pack     what is measured, and with which options
    jobs/KEY.cut.json                   how it was cut
    todo/KEY.pack                       samples that wait for a worker (executor ``Here`` with ``publish``)
    parts/KEY.npz                       what was measured
    claims/KEY.json  failed/KEY.json    who works on it; what went wrong, try by try
    runs/DRIVER.json                    how far a driver is, for `mech status`

A claim only saves work; the numbers do not depend on it: two workers that compute the same block land the same values.
"""

import contextlib
import errno
import json
import os
import platform
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import xarray as xr

from mech.errors import OutputError
from mech.files import make_folder, parse_json, read, unwritable, write
from mech.results.checksum import sealed_record, unsealed_record
from mech.results.provenance import jsonable
from mech.results.store import part_bytes, part_of_bytes

KINDS = ("jobs", "todo", "parts", "claims", "failed", "runs")
ATTEMPTS = 3  # tries before a block is given up
LEASE = 120.0  # seconds without a sign of life after which a claim of another machine is void


class Folder:
    """A place that many processes write to.

    Args:
        url: a path, or an fsspec URL (``s3://``, ``gs://``, ``memory://``).
        lease: seconds without a sign of life after which a claim is void.

    Raises:
        OutputError: it cannot be written, or the file system of the URL is not installed.
    """

    def __init__(self, url: str | Path, *, lease: float = LEASE):
        self.url, self.lease = str(url), lease
        self.local = "://" not in self.url or self.url.startswith("file://")
        if self.local:
            self.url = os.path.abspath(os.path.expanduser(self.url.removeprefix("file://")))
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
            for kind in KINDS:
                if self.local:
                    make_folder(Path(self._root, kind))
                else:
                    self._fs.makedirs(f"{self._root}/{kind}", exist_ok=True)
        except (ImportError, ValueError, OSError) as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(
                f"{self.url} cannot be opened ({error})", "a path, or a URL that fsspec knows",
                "install its file system (s3fs for s3://), or give a path that all machines see",
            ) from error  # fmt: skip

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all.

        Raises:
            OutputError: no room, or no permission.
        """
        if self.local:
            write(Path(self._root, name), content)
            return
        try:
            self._fs.pipe_file(f"{self._root}/{name}", content)  # an object appears only once it is complete
        except OSError as error:
            raise unwritable(Path(self.url, name), error) from error

    def create(self, name: str, content: bytes) -> bool:
        """Write a file unless it exists; returns whether it was written."""
        if not self.local:
            try:
                self._fs.pipe_file(f"{self._root}/{name}", content, mode="create")
            except FileExistsError:
                return False
            except (TypeError, ValueError, NotImplementedError):  # a store that cannot: the last write wins
                if self.read(name) is not None:
                    return False
                self.write(name, content)
            return True
        target = Path(self._root, name)
        # Written under another name and linked: a reader that sees the name sees the whole content.
        aside = write(target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}"), content)
        try:
            os.link(aside, target)
        except FileExistsError:
            return False
        except OSError as error:  # a disk without links
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise unwritable(target, error) from error
            if target.exists():
                return False
            write(target, content)
        finally:
            aside.unlink(missing_ok=True)
        return True

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is none."""
        try:
            return read(Path(self._root, name)) if self.local else self._fs.cat_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(Path(self._root, name)) if self.local else self._fs.rm_file(f"{self._root}/{name}")

    def keys(self, kind: str) -> list[str]:
        """The names in one of ``KINDS``, without their suffix."""
        with contextlib.suppress(AttributeError):
            self._fs.invalidate_cache()
        found = self._fs.ls(f"{self._root}/{kind}", detail=False) if self._fs.exists(f"{self._root}/{kind}") else []
        names = (str(path).rsplit("/", 1)[-1] for path in found)
        return sorted(name.split(".", 1)[0] for name in names if name and not name.startswith("."))

    def record(self, name: str) -> dict[str, Any] | None:
        """A JSON object; None if it is missing or damaged."""
        content = self.read(name)
        if content is None:
            return None
        try:
            return unsealed_record(parse_json(content))
        except (ValueError, AttributeError):
            return None

    def put_record(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON object with its checksum."""
        self.write(name, sealed_bytes(value))

    def land(self, key: str, dataset: xr.Dataset) -> None:
        """Save what a block measured."""
        self.write(f"parts/{key}.npz", part_bytes(dataset))

    def part(self, key: str) -> xr.Dataset | None:
        """What a block measured; None if that is missing or damaged."""
        content = self.read(f"parts/{key}.npz")
        if content is None:
            return None
        try:
            return part_of_bytes(content)
        except Exception:  # zipfile, zlib, numpy and xarray have no common error; all of them mean: measure again
            return None

    def claim(self, key: str, worker: str) -> bool:
        """Claim a block; False while another live worker holds it. A dead worker's claim is taken over, and noted."""
        mine = sealed_bytes(claim_of(worker))
        for _ in range(2):
            if self.create(f"claims/{key}.json", mine):
                return True
            held = self.record(f"claims/{key}.json")
            if held is not None and held.get("worker") == worker:
                return True
            if held is not None and not self.void(held):
                return False
            if held is not None:
                self.fail(key, str(held.get("worker")), "the worker died", ())
            self.remove(f"claims/{key}.json")
        return False

    def void(self, held: Mapping[str, Any]) -> bool:
        """Whether the worker that made this claim is dead, or has given no sign of life for too long."""
        if held.get("host") == host() and not _alive(int(held.get("pid", 0))):
            return True
        return time.time() - float(held.get("time", 0)) > self.lease

    def beat(self, key: str, worker: str) -> None:
        """Record that the worker is alive."""
        with contextlib.suppress(OutputError):  # it is only a sign of life
            self.put_record(f"claims/{key}.json", claim_of(worker))

    def release(self, key: str) -> None:
        """Release the claim on a block."""
        self.remove(f"claims/{key}.json")

    def failures(self, key: str) -> list[dict[str, Any]]:
        """What went wrong with a block, try by try."""
        return list((self.record(f"failed/{key}.json") or {}).get("attempts", []))

    def fail(self, key: str, worker: str, error: str, ids: tuple[str, ...], **facts: Any) -> list[dict[str, Any]]:
        """Record a failed try; returns all tries that failed."""
        entry = {"worker": worker, "error": error, "time": time.time(), **facts}
        known = self.record(f"failed/{key}.json") or {}
        attempts = [*known.get("attempts", []), entry]
        self.put_record(f"failed/{key}.json", {"samples": list(ids) or known.get("samples", []), "attempts": attempts})
        return attempts

    def forgive(self, key: str) -> None:
        """Forget what went wrong with a block."""
        self.remove(f"failed/{key}.json")


def sealed_bytes(value: Mapping[str, Any]) -> bytes:
    """A JSON object with its checksum."""
    return json.dumps(sealed_record(jsonable(value)), allow_nan=False).encode()


def claim_of(worker: str) -> dict[str, Any]:
    """A claim: who makes it, with a sign of life."""
    return {"worker": worker, "host": host(), "pid": os.getpid(), "time": time.time()}


def host() -> str:
    """A name of this machine within which a process number means one process."""
    try:
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    try:  # killed, and not yet collected by its parent
        return b") Z" not in read(f"/proc/{pid}/stat")[:200]
    except OSError:
        return True
