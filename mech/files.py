"""Files: untrusted ones read safely, our own written whole or not at all.

    read(path)                 # the bytes of a regular file; a pipe or a device is refused, not waited for
    parse_json(text)           # JSON that is not nested deeper than DEEPEST
    is_below(path, folder)     # whether a path stays in a folder, symbolic links followed
    write(path, content)       # from memory to the disk in one step: a reader never sees half a file

Reading raises ``OSError`` or ``ValueError``, since only the caller knows which file was expected. Writing raises
``OutputError``. Nothing here knows what the bytes mean.
"""

import contextlib
import errno
import json
import os
import stat
import threading
from pathlib import Path
from typing import Any, BinaryIO

from mech.errors import OutputError

DEEPEST = 64  # levels of JSON; mech writes at most ten, and Python's own limit is a RecursionError


def opened(path: str | Path) -> BinaryIO:
    """A regular file, open for reading.

    Raises:
        OSError: it is not there, cannot be read, or is a folder, a pipe or a device.
    """
    return open(path, "rb", opener=_regular)


def read(path: str | Path) -> bytes:
    """The content of a regular file; ``OSError`` as for ``opened``."""
    with opened(path) as file:
        return file.read()


def read_text(path: str | Path, encoding: str = "utf-8") -> str:
    """The text of a regular file; ``UnicodeDecodeError`` (a ``ValueError``) if it is not text."""
    return read(path).decode(encoding)


def parse_json(text: str | bytes) -> Any:
    """The content of a JSON text.

    Raises:
        ValueError: not JSON, or nested deeper than ``DEEPEST``: code that walks over it would not return.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from error
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for part in level
            if isinstance(part, dict | list)
            for inner in (part.values() if isinstance(part, dict) else part)
        ]
        if not level:
            return value
    raise ValueError(f"it is nested deeper than {DEEPEST} levels")


def is_below(path: str | Path, folder: str | Path) -> bool:
    """Whether a path lies in a folder when every symbolic link on the way is followed.

    A snapshot of the Hugging Face cache consists of links into the ``blobs`` beside it, which count as its own.
    """
    home, real = (Path(os.path.realpath(p)) for p in (folder, path))  # Path.resolve() raises on circular links
    blobs = [above.parent / "blobs" for above in home.parents if above.name == "snapshots"]
    return any(real.is_relative_to(root) for root in (home, *blobs))


def write(path: str | Path, *content: bytes | memoryview | str) -> Path:
    """Write a file whole or not at all; text as UTF-8, several pieces one after the other.

    Raises:
        OutputError: the folder cannot be written, the disk is full, or a folder, a pipe or a device is in the way.
    """
    path, target = Path(path), Path(os.path.realpath(path))
    part = target.parent / f".{target.name}.{os.getpid()}-{threading.get_ident()}.part"
    try:
        if target.exists() and not target.is_file():  # it would be replaced, /dev/null above all
            raise OSError(errno.EINVAL, "it is a folder" if target.is_dir() else "it is not a regular file")
        with part.open("wb") as file:
            for piece in content:
                file.write(piece.encode() if isinstance(piece, str) else piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return path


def make_folder(path: Path) -> None:
    """Make a folder, or say that it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise unwritable(path, PermissionError(errno.EACCES, "permission denied"))


def unwritable(path: Path, error: OSError) -> OutputError:
    """The error for a place that cannot be written."""
    return OutputError(
        f"{path} cannot be written ({error.strerror or error})",
        "a writable folder, on a disk that is not full",
        "give another folder, or free space and set permissions for this one",
    )


def _regular(path: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a pipe that nobody writes to would wait forever.
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return handle
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", path)
    raise OSError(errno.EINVAL, "it is not a regular file", path)
