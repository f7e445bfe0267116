"""Rows of a screen's crop stores, read into a buffer by their places in the files, and compared with their checksums once."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numba import types

from cellfast.compiled import njit
from cellfast.errors import CellfastError

# Bounded by the system: 1,024 by default on Linux.
_OTHER_FILES = 128


class RowGather:
    """Copy global rows of a screen into a buffer, in the order asked for.

    The files are read, not mapped: of a file that is cut short or fails while it is mapped the system says nothing but SIGBUS, which
    ends the process. Each row's pixels are compared with its checksum the first time they are read.

    Args:
        screen: a ``cellfast.screens.Screen``.
        threads: threads that read; more than one helps where one core cannot saturate the memory, or reads wait for a disk.

    Raises:
        CellfastError: more plates than files can be open at the same time.
    """

    def __init__(self, screen: Any, *, threads: int = 1) -> None:
        if threads < 1:
            raise CellfastError(f"threads must be at least 1, got {threads}")
        self.threads = threads
        self.row_shape = (len(screen.channel_names), screen.crop_size, screen.crop_size)
        self.dtype = np.dtype(screen.dtype)
        self.offsets = np.asarray(screen.offsets, dtype=np.int64)
        self.num_rows = int(self.offsets[-1])
        self.row_bytes = int(np.prod(self.row_shape)) * self.dtype.itemsize
        self._plates = screen.plates
        self._file_offset = np.array([plate.offset for plate in self._plates], dtype=np.int64)
        self._unread = np.ones(self.num_rows, dtype=bool)
        self._pool = ThreadPoolExecutor(threads, "cellfast-gather") if threads > 1 else None
        # Held while copying, so that close() cannot close what is being read.
        self._lock = threading.Lock()
        _allow_open_files(len(self._plates))
        self._handles: list[int] = []
        self._closed = False
        for plate in self._plates:
            self._handles.append(os.open(plate.path, os.O_RDONLY))
        self._handle_of = np.array(self._handles, dtype=np.int32)

    def pieces(self) -> list[tuple[Path, int, int]]:
        """(path, offset, length) in bytes of the pixels in each plate file."""
        return [(Path(p.path), int(p.offset), p.num_cells * self.row_bytes) for p in self._plates if p.num_cells]

    def copy(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Fill ``out`` [n, C, S, S] (the screen's dtype, C-contiguous) with ``rows`` (int64 [n]).

        Equivalent to ``out[:] = np.concatenate([plate.crops() for plate in screen.plates])[rows]``. Releases the interpreter
        lock.

        Raises:
            CellfastError: a row outside the screen, pixels that differ from their checksum, or a file that was cut short.
            OSError: a file that cannot be read.
            ValueError: an ``out`` of the wrong shape, dtype or layout.
        """
        rows = np.ascontiguousarray(rows, dtype=np.int64)
        if out.shape != (len(rows), *self.row_shape) or out.dtype != self.dtype or not out.flags.c_contiguous:
            wanted = (len(rows), *self.row_shape)
            raise ValueError(f"out must be C-contiguous {self.dtype} of shape {wanted}, got {out.dtype} of shape {out.shape}")
        if len(rows) == 0:
            return
        if rows.min() < 0 or rows.max() >= self.num_rows:
            raise CellfastError(f"rows must lie in 0..{self.num_rows - 1}, got {rows.min()}..{rows.max()}")
        with self._lock:
            if self._closed:
                raise CellfastError("the loader was closed while it was in use")
            if self._pool is None:
                self._copy_part(rows, out)
                return
            edges = np.linspace(0, len(rows), self.threads + 1).astype(int)
            parts = [self._pool.submit(self._copy_part, rows[a:b], out[a:b]) for a, b in pairwise(edges) if b > a]
            # Wait for all of them before any error leaves: none may still write to ``out``.
            errors = [part.exception() for part in parts]
        for error in errors:
            if error is not None:
                raise error

    def _copy_part(self, rows: np.ndarray, out: np.ndarray) -> None:
        plate = np.searchsorted(self.offsets, rows, side="right") - 1
        local = rows - self.offsets[plate]
        handle, place = self._handle_of[plate], self._file_offset[plate] + local * self.row_bytes
        done = _read_rows(handle, place, self.row_bytes, out.ctypes.data)
        while done < len(rows):
            # The system read less than it was asked for: read this row by itself, which says why.
            self._read_row(int(plate[done]), int(place[done]), memoryview(out[done].reshape(-1).view(np.uint8)))
            done += 1
            done += _read_rows(handle[done:], place[done:], self.row_bytes, out[done:].ctypes.data)
        unread = np.flatnonzero(self._unread[rows])
        for number in np.unique(plate[unread]):
            these = unread[plate[unread] == number]
            self._plates[number].check(local[these], out[these] if len(these) < len(out) else out)
        self._unread[rows[unread]] = False

    def _read_row(self, plate: int, place: int, memory: memoryview) -> None:
        done = 0
        while done < len(memory):
            got = os.preadv(self._handles[plate], [memory[done:]], place + done)
            if got == 0:
                raise self._plates[plate].cut_short()
            done += got

    def close(self) -> None:
        """Release threads and files; safe to call twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._pool is not None:
                self._pool.shutdown(wait=True)
            for handle in self._handles:
                os.close(handle)
            self._handles = []

    def __del__(self) -> None:
        if hasattr(self, "_closed"):
            self.close()


def _allow_open_files(count: int) -> None:
    """Raise this process's limit of open files where ``count`` more need it."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise CellfastError(f"{count} plates need as many open files; this system allows {hard} (ulimit -n): ask for {wanted}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


_pread = types.ExternalFunction("pread", types.intp(types.int32, types.uintp, types.uintp, types.int64))


# Without the interpreter lock for the whole minibatch: a call per row would wait for the lock each time.
@njit()
def _read_rows(handle: np.ndarray, place: np.ndarray, row_bytes: int, target: int) -> int:
    """Read ``row_bytes`` bytes at each place to consecutive addresses from ``target``; how many rows were read before one failed."""
    for i in range(place.shape[0]):
        if _pread(handle[i], types.uintp(target + i * row_bytes), types.uintp(row_bytes), place[i]) != row_bytes:
            return i
    return place.shape[0]
