"""HDF5 files that reach libhdf5 only when their structure is whole.

libhdf5 trusts what a file says of itself: one damaged byte can make it loop for ever, end the process or hand out other values.
So a file of ours begins with a seal in HDF5's user block: the file's size, and a SHA-256 over all of its bytes but the bulk of
the data, which has checksums of its own. It is compared from plain bytes before HDF5 opens the file. A file without a seal (an
older one, or another program's) is first opened in a process of its own with a time limit.
"""

from __future__ import annotations

import hashlib
import json
import os
import selectors
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cellfast.errors import CellfastError

# A power of two, as HDF5 wants it, and a page, so that what is aligned behind it is aligned in the file.
USER_BLOCK = 4096
_MAGIC = b"cellfast-seal 1\n"
_HDF5 = b"\x89HDF\r\n\x1a\n"
_RANGE = 16  # bytes of a (start, stop) of the bulk, int64 little-endian, at the end of the file


class DamagedFile(CellfastError):
    """A file that is not what was written; the reader adds what to do."""


def seal(path: str | os.PathLike[str], bulk: str) -> None:
    """Seal a closed HDF5 file with a user block of `USER_BLOCK` bytes.

    Args:
        bulk: the dataset whose bytes are left out: they have checksums of their own.
    """
    with h5py.File(path, "r", locking=False) as handle:
        assert handle.userblock_size == USER_BLOCK, path
        ranges = _bulk_ranges(handle[bulk])
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.write(np.array(ranges, "<i8").tobytes())
        content: dict[str, Any] = {"size": file.tell(), "hdf5": size, "ranges": len(ranges)}
        content["sha256"] = _digest(file, ranges, content["size"])
        file.seek(0)
        file.write(_block(content))
        file.flush()
        os.fsync(file.fileno())


def is_sealed(path: Path) -> bool:
    """Compare the file with its seal; False where it has none.

    Raises:
        DamagedFile: the file was changed, cut short or damaged, or is no HDF5 file.
    """
    try:
        with open(path, "rb") as file:
            block = file.read(USER_BLOCK)
            if block.startswith(_HDF5):
                return False
            if not block.startswith(_MAGIC):
                raise DamagedFile(
                    f"{path} cannot be read as HDF5: damaged, or another kind of file; it begins with {block[:8]!r}"
                )
            content, size = _parse(block, path), file.seek(0, os.SEEK_END)
            if size != content["size"]:
                raise DamagedFile(f"{path}: truncated or added to: {content['size']:,} bytes were written, there are {size:,}")
            file.seek(content["hdf5"])
            ranges = np.frombuffer(file.read(), "<i8").reshape(-1, 2).tolist()
            if len(ranges) != content["ranges"] or _digest(file, ranges, size) != content["sha256"]:
                raise DamagedFile(f"{path}: damaged: its tables or structure are not those that were written (SHA-256)")
            return True
    except OSError as error:
        raise DamagedFile(f"{path}: cannot be read ({error.strerror or error})") from error


def _begins(path: Path, with_bytes: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(with_bytes)) == with_bytes


def _block(content: dict[str, Any]) -> bytes:
    body = json.dumps(content).encode() + b"\n"
    block = _MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body
    return block.ljust(USER_BLOCK, b"\0")


def _parse(block: bytes, path: Path) -> dict[str, Any]:
    """What the seal says; every byte of the user block is as `_block` makes it."""
    try:
        content = json.loads(block.split(b"\n")[2])
        size, hdf5, ranges = (int(content[name]) for name in ("size", "hdf5", "ranges"))
        if _block(content) == block and 0 <= ranges and USER_BLOCK <= hdf5 and hdf5 + _RANGE * ranges == size:
            return content
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        pass
    raise DamagedFile(f"{path}: damaged: its seal, the first {USER_BLOCK} bytes, is not as it was written")


def _digest(file: Any, ranges: Sequence[Sequence[int]], size: int) -> str:
    """SHA-256 of the bytes behind the user block that are in none of the ``ranges``."""
    sha, place = hashlib.sha256(), USER_BLOCK
    for start, stop in (*ranges, (size, size)):
        if not place <= start <= stop <= size:
            return "ranges out of order"
        file.seek(place)
        while place < start:
            block = file.read(min(1 << 20, start - place))
            if not block:
                return "shorter than it was"
            sha.update(block)
            place += len(block)
        place = stop
    return sha.hexdigest()


def _bulk_ranges(dataset: h5py.Dataset) -> list[list[int]]:
    """(start, stop) in the file of a dataset's bytes, ascending, touching ones joined."""
    if dataset.chunks is None:
        start = dataset.id.get_offset()
        return [] if start is None else [[start, start + dataset.id.get_storage_size()]]
    ranges: list[list[int]] = []
    for start, size in sorted(_chunks(dataset)):
        if ranges and ranges[-1][1] == start:
            ranges[-1][1] += size
        else:
            ranges.append([start, start + size])
    return ranges


def _chunks(dataset: h5py.Dataset) -> list[tuple[int, int]]:
    """(place in the file, bytes) of each chunk."""
    found: list[tuple[int, int]] = []
    dataset.id.chunk_iter(lambda chunk: found.append((chunk.byte_offset, chunk.size)))
    user_block = dataset.file.userblock_size
    if found and user_block:
        # HDF5 1.14's first releases count from the end of the user block.
        first = dataset.id.get_chunk_info(0)
        with open(dataset.file.filename, "rb") as file:
            file.seek(first.byte_offset)
            if file.read(first.size) != dataset.id.read_direct_chunk(first.chunk_offset)[1]:
                found = [(place + user_block, size) for place, size in found]
    return found


def check_sizes(dataset: h5py.Dataset, path: Path) -> None:
    """Raise `DamagedFile` where a dataset claims more than the file can hold: nothing is allocated for it before."""
    size = path.stat().st_size
    stored = dataset.id.get_storage_size()
    # Deflate packs 1032 bytes into one at most; without a filter nothing is packed.
    most = stored * 1032 if dataset.chunks and dataset.id.get_create_plist().get_nfilters() else stored
    ends = max((place + length for place, length in _chunks(dataset)), default=0) if dataset.chunks else 0
    if max(stored, ends) > size or dataset.size * dataset.dtype.itemsize > most:
        raise DamagedFile(
            f"{path}: damaged: {dataset.name} claims shape {dataset.shape} of {dataset.dtype}, in {stored:,} bytes of a file of "
            f"{size:,}"
        )


# A process may take so long to open a file without a seal, and a second more for each GB of it.
OPENING_S = 20.0
# Files without a seal that a process of its own has opened, by path, size and time of change.
_tried: set[tuple[str, int, int]] = set()
_in_trial = False


def _key(path: Path) -> tuple[str, int, int]:
    facts = path.stat()
    return str(path.absolute()), facts.st_size, facts.st_mtime_ns


def try_unsealed(paths: Iterable[Path], opener: type) -> None:
    """Open files without a seal in one process of its own, by ``opener(path)``: what hangs or crashes there does not do so here.

    What the opener refuses there it refuses here too, when it is called; nothing is said of that. Each file is tried once.

    Raises:
        DamagedFile: naming the file that did not open in time, or with which the process ended.
    """
    todo = [path for path in paths if _begins(path, _HDF5) and _key(path) not in _tried]
    if _in_trial or not todo:
        return
    package = str(Path(__file__).resolve().parents[2])
    code = f"import sys; sys.path.insert(0, {package!r}); from {__name__} import _trial; _trial(*sys.argv[1:])"
    command = [sys.executable, "-c", code, opener.__module__, opener.__qualname__, *map(str, todo)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        for path, ended in zip(todo, _answers(process, [OPENING_S + path.stat().st_size / 1e9 for path in todo])):
            if ended is not None:
                raise DamagedFile(f"{path}: damaged: HDF5 {ended}")
            _tried.add(_key(path))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _answers(process: subprocess.Popen, seconds: Sequence[float]) -> Iterator[str | None]:
    """For each file None, or what happened to the process that opened it."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        for limit in seconds:
            if not selector.select(limit):
                yield f"did not open it in {limit:.0f} s"
            # One byte per file: nothing is ever left in a buffer.
            elif not os.read(process.stdout.fileno(), 1):
                status = process.wait()
                yield f"ended the process that opened it ({f'signal {-status}' if status < 0 else f'exit status {status}'})"
            else:
                yield None


def _trial(module: str, name: str, *paths: str) -> None:
    global _in_trial
    _in_trial = True
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (32 << 30, 32 << 30))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        pass  # the time limit holds without them
    opener = getattr(import_module(module), name)
    for path in paths:
        try:
            opener(Path(path))
        except Exception:
            pass  # said where the file is opened next
        os.write(1, b".")


def open_hdf5(path: Path, opener: type) -> h5py.File:
    """Open a file that is whole (`is_sealed`), or one without a seal that was tried (`try_unsealed`).

    Raises:
        DamagedFile: it is damaged, or no HDF5 file.
    """
    if not is_sealed(path):
        try_unsealed([path], opener)
    try:
        return h5py.File(path, "r", locking=False)
    except (OSError, RuntimeError, MemoryError) as error:
        raise DamagedFile(f"{path} cannot be read as HDF5 ({error})") from error
