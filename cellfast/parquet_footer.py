"""A CRC-32 of a parquet file's footer, in the footer: names, types and places of the columns, which the checksums of pages do not cover."""

from __future__ import annotations

import os
import re
import zlib
from typing import Any

KEY = "cellfast_footer_crc32"
_BLANK = "0" * 8
# Key and value as Thrift's compact protocol writes them: the value is a field of its own of eight bytes.
_FOUND = re.compile(KEY.encode() + rb"\x18\x08([0-9a-f]{8})")


def leave_room(writer: Any) -> None:
    """Reserve the place of the checksum; the last call before a ``pyarrow.parquet.ParquetWriter`` is closed."""
    writer.add_key_value_metadata({KEY: _BLANK})


def seal_footer(path: str | os.PathLike[str]) -> None:
    """Put the checksum into the place that `leave_room` reserved in a finished file."""
    with open(path, "r+b") as file:
        start, footer = _footer(file)
        found = _FOUND.search(footer)
        assert found is not None, path
        file.seek(start + found.start(1))
        file.write(f"{_crc(footer, found):08x}".encode())


def check_footer(path: str | os.PathLike[str]) -> None:
    """Compare the footer with its checksum; a file without one passes.

    Raises:
        ValueError: they differ, or the file has no footer.
    """
    with open(path, "rb") as file:
        _, footer = _footer(file)
    found = _FOUND.search(footer)
    if found is not None and f"{_crc(footer, found):08x}".encode() != found[1]:
        raise ValueError("its footer is not as it was written, by its CRC-32")


def _footer(file: Any) -> tuple[int, bytes]:
    """(place, bytes) of the footer with its length and the magic after it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 8, 0))
    end = file.read()
    length = int.from_bytes(end[:4], "little") + 8
    if end[4:] != b"PAR1" or length > size:
        raise ValueError("no parquet footer at its end")
    file.seek(size - length)
    return size - length, file.read()


def _crc(footer: bytes, found: re.Match[bytes]) -> int:
    return zlib.crc32(footer[: found.start(1)] + _BLANK.encode() + footer[found.end(1) :])
