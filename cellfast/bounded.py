"""What files claim, held against what they can hold before memory is taken for it; damage of any kind told in one sentence.

A header says how large its content is, and a few bytes can say anything. Every reader of files from outside asks here first.
"""

from __future__ import annotations

import codecs
import gzip
import io
import math
import mmap
import os
import resource
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cellfast.errors import CellfastError

# Bytes that one byte of Deflate can stand for (zlib's manual).
MOST_DEFLATED = 1032
# Less is taken without asking how much memory is free, which costs a fifth of a millisecond.
ALWAYS_THERE = 64 << 20
# Text in a gzip file is rarely more than 30 times its size there; a table of one value throughout passes by the slack.
MOST_TEXT, TEXT_SLACK = 100, 64 << 20
# Of the decoded table to its file: encoded runs of one value have no bound of their own.
MOST_PARQUET, PARQUET_SLACK = 1000, 256 << 20


def size_text(size: float) -> str:
    """Bytes for a reader: ``3.1 GB``."""
    power = max(0, min(3, (len(str(int(size))) - 1) // 3))
    return f"{size / 1000**power:,.{min(power, 1)}f} {('bytes', 'kB', 'MB', 'GB')[power]}"


def available_bytes() -> float:
    """Memory this process may still take: the machine's, its control group's, and its own limit; infinite where nothing tells."""
    least: float = math.inf
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            least = int(line.split()[1]) * 1024
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        taken = next((int(line.split()[0]) for line in _lines("/proc/self/statm")), 0) * resource.getpagesize()
        least = min(least, limit - taken)
    for folder, most, used in _GROUPS:
        in_use = _number(f"{folder}/{used}", 0)
        # What the group holds of files is given back when memory is asked for.
        cached = sum(
            int(line.split()[1])
            for line in _lines(f"{folder}/memory.stat")
            if line.startswith(("inactive_file ", "active_file "))
        )
        least = min(least, _number(f"{folder}/{most}", math.inf) - max(0, in_use - cached))
    return max(0, least)


# Where a control group of either version tells its limit and what is used of it.
_GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _number(path: str, otherwise: float) -> float:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else otherwise


def check_claim(name: object, what: str, claimed: float, held: float, *, most: float = 1, slack: float = 0) -> None:
    """Raise `CellfastError` where ``claimed`` bytes cannot come out of ``held`` bytes of the file, or would not go into memory.

    Args:
        most: bytes that one byte of the file can stand for; slack: bytes that are no harm whatever the file's size.
    """
    if claimed > most * held + slack:
        raise CellfastError(
            f"{name}: damaged: {what} would be {size_text(claimed)}, more than the {size_text(held)} of the file can hold; write "
            "it again"
        )
    if claimed > ALWAYS_THERE and claimed > (free := available_bytes()):
        raise CellfastError(f"{name}: {what} takes {size_text(claimed)} of memory, and {size_text(free)} are free")


@contextmanager
def told(name: object, what: str) -> Iterator[None]:
    """Whatever goes wrong inside is a `CellfastError` that names the file and what it was to be; libraries have kinds of their
    own."""
    try:
        yield
    except CellfastError:
        raise
    except FileNotFoundError as error:
        raise CellfastError(f"{name}: no such file; expected {what}") from error
    except MemoryError as error:
        raise CellfastError(
            f"{name}: reading it takes more memory than there is ({size_text(available_bytes())} are free)"
        ) from error
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise CellfastError(
            f"{name}: not a readable {what} ({type(error).__name__}{f': {said}' if said else ''}); write it again"
        ) from error


def check_zip(
    path: str | os.PathLike[str] | IO[bytes], name: object, *, most: float = MOST_DEFLATED, slack: float = 0
) -> zipfile.ZipFile:
    """The archive, opened, whose members are stored or deflated, lie in the file, do not overlap, and can come out of it.

    Raises:
        CellfastError: any other; ``zipfile.BadZipFile``, ``OSError``: no archive.
    """
    archive = zipfile.ZipFile(path)
    assert archive.fp is not None
    archive.fp.seek(0, io.SEEK_END)
    size = archive.fp.tell()
    members = archive.infolist()
    for member in members:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise CellfastError(
                f"{name}: {member.filename} is packed in a way that is not read (zip method {member.compress_type})"
            )
        one = 1 if member.compress_type == zipfile.ZIP_STORED else MOST_DEFLATED
        check_claim(name, f"its part {member.filename[:80]!r}", member.file_size, member.compress_size, most=one, slack=64)
    if sum(member.compress_size for member in members) > size:
        raise CellfastError(f"{name}: damaged: its parts together are larger than the file ({size_text(size)}); write it again")
    check_claim(name, "its content", sum(member.file_size for member in members), size, most=most, slack=slack)
    return archive


def read_npy(handle: IO[bytes], name: object, held: float, *, most: float = 1) -> Any:
    """The array of a ``.npy`` file; never an object. ``held``: bytes of the file, of which one stands for ``most`` at most.

    Raises:
        CellfastError: damaged, of a type that needs pickle, or with a shape that ``held`` bytes cannot hold.
    """
    import numpy as np

    with told(name, "array (.npy)"):
        version = np.lib.format.read_magic(handle)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise CellfastError(f"{name}: expected an array (.npy) of version 1 or 2, got {version[0]}.{version[1]}")
        shape, fortran, dtype = read(handle)
        if dtype.hasobject or dtype.kind not in "biuf":
            raise CellfastError(f"{name}: expected an array of numbers, got {dtype}")
        if any(length < 0 for length in shape):
            raise CellfastError(f"{name}: damaged: its shape is {list(shape)}")
        count = math.prod(shape)
        check_claim(name, f"its array {list(shape)} of {dtype}", count * dtype.itemsize, held, most=most, slack=64)
        content = bytearray(count * dtype.itemsize)
        view, filled = memoryview(content), 0
        while filled < len(content) and (got := handle.readinto(view[filled:])):  # type: ignore[attr-defined]
            filled += got
        if filled < len(content):
            raise CellfastError(f"{name}: cut short: {size_text(filled)} of {size_text(len(content))} of its array are there")
        return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def load_npy(path: str | os.PathLike[str]) -> Any:
    """The array of a ``.npy`` file, as `read_npy`."""
    with told(path, "array (.npy)"), open(path, "rb") as handle:
        return read_npy(handle, path, os.path.getsize(path))


def load_npz(path: str | os.PathLike[str], member: str) -> Any:
    """One array of an ``.npz`` file, as `read_npy`.

    Raises:
        CellfastError: no such array (names those there are), damaged, or a bomb.
    """
    with told(path, "npz file"), check_zip(path, path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if member not in names:
            raise CellfastError(f"{path}: expected an array {member!r}; this one has {', '.join(names)[:200] or 'none'}.")
        info = archive.getinfo(f"{member}.npy" if f"{member}.npy" in archive.namelist() else member)
        with archive.open(info) as handle:
            return read_npy(handle, path, info.file_size)


class _Text(io.RawIOBase):
    """The bytes of a text file, unpacked where it is a gzip file, as far as they are text and plausible."""

    def __init__(self, path: Path) -> None:
        self.path, self._held, self._read = path, path.stat().st_size, 0
        packed = path.suffix.lower() == ".gz"
        self._most = min(MOST_TEXT * self._held + TEXT_SLACK, available_bytes()) if packed else math.inf
        self._wide = False  # UTF-16, half of whose bytes are zero
        self._source: Any = gzip.open(path, "rb") if packed else open(path, "rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._source.readinto(buffer)
        self._read += count
        if self._read > self._most:
            raise CellfastError(
                f"{self.path}: damaged: {size_text(self._held)} that unpack to more than {size_text(self._most)}; expected a "
                "table"
            )
        if self._read == count:
            self._wide = bytes(memoryview(buffer)[:2]) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        if not self._wide and b"\0" in bytes(memoryview(buffer)[:count]):
            raise CellfastError(f"{self.path}: not a text table: it holds zero bytes; save it as UTF-8 text")
        return count

    def close(self) -> None:
        self._source.close()
        super().close()


def open_table(path: str | os.PathLike[str]) -> IO[bytes]:
    """A text table's bytes, unpacked where its name ends in .gz.

    Raises:
        CellfastError: while reading: zero bytes, or more than a table unpacks to.
    """
    return io.BufferedReader(_Text(Path(path)), 1 << 18)


def check_parquet(path: str | os.PathLike[str]) -> None:
    """Raise `CellfastError` where the footer of a parquet file claims what the file cannot hold.

    Row groups must add up, and the table must not be more than `MOST_PARQUET` times the file.
    """
    import pyarrow.parquet as pq

    size = os.path.getsize(path)
    with told(path, "parquet file"):
        with pq.ParquetFile(path, memory_map=False) as file:
            meta = file.metadata
            rows = unpacked = 0
            for g in range(meta.num_row_groups):
                group = meta.row_group(g)
                rows += group.num_rows
                if group.num_rows < 0:
                    raise CellfastError(f"{path}: damaged: a group of {group.num_rows} rows; write it again")
                # Not column by column: where a column's statistics are damaged, asking for it ends the process.
                if group.total_byte_size < 0:
                    raise CellfastError(f"{path}: damaged: a group of {group.total_byte_size} bytes; write it again")
                unpacked += group.total_byte_size
            if rows != meta.num_rows:
                raise CellfastError(f"{path}: damaged: {meta.num_rows:,} rows, and its groups have {rows:,}; write it again")
            # A value of a row is a byte at least once it is decoded.
            claimed = max(unpacked, rows * meta.num_columns)
            check_claim(path, f"its table of {rows:,} rows", claimed, size, most=MOST_PARQUET, slack=PARQUET_SLACK)


def read_parquet(path: str | os.PathLike[str], columns: list[str] | None = None) -> Any:
    """The table of a parquet file that passes `check_parquet`, as a DataFrame; what pandas noted in it plays no part."""
    import pyarrow.parquet as pq

    check_parquet(path)
    with told(path, "parquet file"), pq.ParquetFile(path, memory_map=False) as file:
        return file.read(columns=columns, use_threads=False).to_pandas(ignore_metadata=True)


# Programs in a torch file are text; the tensors beside them are stored as they are.
MOST_TORCH, TORCH_SLACK = 4, 64 << 20


def check_torch_file(path: str | os.PathLike[str]) -> None:
    """Raise `CellfastError` where reading a file of ``torch.save``, TorchScript or ``torch.export`` could take more than it
    holds.

    A file that is no archive (``torch.save`` of old) holds its tensors as they are; a ``bytearray`` is the one object that torch
    makes of a number alone, of any size.
    """
    with told(path, "file of tensors"):
        with open(path, "rb") as handle:
            if handle.read(4) == b"PK\3\4":
                with check_zip(path, path, most=MOST_TORCH, slack=TORCH_SLACK) as archive:
                    found = any(b"bytearray" in archive.read(name) for name in archive.namelist() if name.endswith(".pkl"))
            else:
                with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    found = content.find(b"bytearray") >= 0
        if found:
            raise CellfastError(f"{path}: holds a bytearray, which a file of tensors has no use for; it is not read")
