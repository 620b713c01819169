"""Checksums over a file's whole content, so that damage is refused and never read as a result.

A binary file ends in a checksum line. It comes after what other readers read (HDF5 and zip record where they end), so
xarray and numpy open the file as if it were not there:

    content, whole = unsealed(content + seal(content))      # ValueError if a bit of either has changed

A JSON object carries one more entry, over its content and not its layout: it may be indented anew.

    record = unsealed_record(sealed_record({"heads": [[3, 5, 0.4]]}))

Files older than the checksums, and those of other programs, have none and are read without. In a file marked as sealed,
a missing checksum is damage too.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

NAME = "mech_checksum"  # of the entry in a JSON object, and of the attribute that marks a file as sealed
SEALED = "sha256, at the end of the file"
_MARK = b"\nmech sha256 "
_LENGTH = len(_MARK) + 64 + 1
_ENTRY = re.compile("sha256:[0-9a-f]{64}")


def seal(content: bytes | memoryview) -> bytes:
    """The bytes written after the content of a binary file."""
    return _MARK + hashlib.sha256(content).hexdigest().encode() + b"\n"


def unsealed(content: bytes) -> tuple[bytes, bool]:
    """The content without its checksum, and whether it had one.

    Raises:
        ValueError: content and checksum do not match.
    """
    body, end = content[:-_LENGTH], content[-_LENGTH:]
    if not end.startswith(_MARK):
        return content, False
    if end != seal(body):
        raise ValueError("it is damaged: its checksum does not match its content")
    return body, True


def sealed_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its checksum as the last entry."""
    return {**record, NAME: _entry(record)}


def unsealed_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object without its checksum, if it has one.

    Raises:
        ValueError: the checksum does not match the object, or its name is damaged.
    """
    named = [name for name, value in record.items() if isinstance(value, str) and _ENTRY.fullmatch(value)]
    plain = {name: value for name, value in record.items() if name != NAME}
    if NAME not in record and not named:
        return plain
    if record.get(NAME) != _entry(plain):
        raise ValueError(
            f"it is damaged: its checksum does not match its content; if it was changed on purpose, remove {NAME!r}"
        )
    return plain


def _entry(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
