"""CRC-32 of a parquet file's footer, in the footer: names, types and places of the columns, which the checksums of pages do not
cover.

Of a file that no ``embeddings.json`` lists, a second one of all before the footer: the headers of pages, which nothing else
covers.
"""

from __future__ import annotations

import os
import re
import zlib
from typing import Any

KEY = "cellfast_footer_crc32"
WHOLE_KEY = "cellfast_pages_crc32"
_BLANK = "0" * 8
# Key and value as Thrift's compact protocol writes them: the value is a field of its own of eight bytes.
_FOUND, _PAGES = (re.compile(key.encode() + rb"\x18\x08([0-9a-f]{8})") for key in (KEY, WHOLE_KEY))


def leave_room(writer: Any, *, pages: bool = False) -> None:
    """Reserve the place of the checksums (``pages``: of the second too); the last call before a ``ParquetWriter`` is closed."""
    writer.add_key_value_metadata({**({WHOLE_KEY: _BLANK} if pages else {}), KEY: _BLANK})


def seal_footer(path: str | os.PathLike[str]) -> None:
    """Put the checksum into the place that `leave_room` reserved in a finished file."""
    with open(path, "r+b") as file:
        start, footer = _footer(file)
        if (pages := _PAGES.search(footer)) is not None:
            crc = f"{_pages_crc(file, start):08x}".encode()
            file.seek(start + pages.start(1))
            file.write(crc)
            footer = footer[: pages.start(1)] + crc + footer[pages.end(1) :]
        found = _FOUND.search(footer)
        assert found is not None, path
        file.seek(start + found.start(1))
        file.write(f"{_crc(footer, found):08x}".encode())


def check_footer(path: str | os.PathLike[str]) -> None:
    """Compare the footer, and the pages where they have one, with their checksums; a file without them passes.

    Raises:
        ValueError: they differ, or the file has no footer.
    """
    with open(path, "rb") as file:
        start, footer = _footer(file)
        found, pages = _FOUND.search(footer), _PAGES.search(footer)
        if found is not None and f"{_crc(footer, found):08x}".encode() != found[1]:
            raise ValueError("its footer is not as it was written, by its CRC-32")
        if pages is not None and f"{_pages_crc(file, start):08x}".encode() != pages[1]:
            raise ValueError("it is not as it was written, by its CRC-32")


def _pages_crc(file: Any, stop: int) -> int:
    crc, left = 0, stop
    file.seek(0)
    while left > 0 and (block := file.read(min(left, 1 << 20))):
        crc, left = zlib.crc32(block, crc), left - len(block)
    return crc


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
