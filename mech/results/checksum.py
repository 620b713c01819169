"""Checksums over all that a file holds, so that damage is refused and never read as a result.

A binary file ends in a line of its own. It lies behind what other readers read (HDF5 and zip say where they end), so
xarray and numpy open the file as if it were not there:

    content, whole = unsealed(content + seal(content))      # ValueError when a bit of either is another one

A JSON object carries one more entry, over what it says and not over how it is laid out: it may be indented anew.

    record = unsealed_record(sealed_record({"heads": [[3, 5, 0.4]]}))

Files from before there were checksums, and those of other programs, have none and are read as they are. For a file that
says inside that it was sealed, a missing checksum is damage too.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

NAME = "mech_checksum"  # of the entry in a JSON object, and of the attribute that says: this file was sealed
SEALED = "sha256, at the end of the file"
_MARK = b"\nmech sha256 "
_LENGTH = len(_MARK) + 64 + 1
_ENTRY = re.compile("sha256:[0-9a-f]{64}")


def seal(content: bytes | memoryview) -> bytes:
    """What is written behind the content of a binary file."""
    return _MARK + hashlib.sha256(content).hexdigest().encode() + b"\n"


def unsealed(content: bytes) -> tuple[bytes, bool]:
    """The content without its checksum, and whether it had one.

    Raises:
        ValueError: content and checksum do not belong together.
    """
    body, end = content[:-_LENGTH], content[-_LENGTH:]
    if not end.startswith(_MARK):
        return content, False
    if end != seal(body):
        raise ValueError("it is damaged: its checksum is that of another content")
    return body, True


def sealed_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its checksum as the last entry."""
    return {**record, NAME: _entry(record)}


def unsealed_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object without its checksum, if it has one.

    Raises:
        ValueError: the checksum is not that of the object, or stands under a damaged name.
    """
    named = [name for name, value in record.items() if isinstance(value, str) and _ENTRY.fullmatch(value)]
    plain = {name: value for name, value in record.items() if name != NAME}
    if NAME not in record and not named:
        return plain
    if record.get(NAME) != _entry(plain):
        raise ValueError(
            f"it is damaged: its checksum is that of another content; if it was changed on purpose, remove {NAME!r}"
        )
    return plain


def _entry(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
