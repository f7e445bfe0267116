"""Rows of a screen's crop stores, copied into a buffer: from memory maps, or by threaded reads."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from cellfast.errors import CellfastError


class RowGather:
    """Copy global rows of a screen into a buffer, in the order asked for.

    Args:
        screen: a ``cellfast.screens.Screen``.
        read: ``mmap`` copies from memory maps of the plate files (as fast as memory where the pages are cached); ``pread`` reads
            each row from its file on several threads, which keeps mapped pages out of this process and is far faster from a cold
            disk.
        threads: threads that copy; more than one helps where one core cannot saturate the memory, or reads wait for a disk.

    Raises:
        CellfastError: an unknown ``read``.
    """

    def __init__(self, screen: Any, *, read: str = "mmap", threads: int = 1) -> None:
        if read not in ("mmap", "pread"):
            raise CellfastError(f"read must be mmap or pread, got {read!r}")
        if threads < 1:
            raise CellfastError(f"threads must be at least 1, got {threads}")
        self.read, self.threads = read, threads
        self.row_shape = (len(screen.channel_names), screen.crop_size, screen.crop_size)
        self.dtype = np.dtype(screen.dtype)
        self.offsets = np.asarray(screen.offsets, dtype=np.int64)
        self.num_rows = int(self.offsets[-1])
        self.row_bytes = int(np.prod(self.row_shape)) * self.dtype.itemsize
        # Kept for as long as the addresses below are used.
        self._maps = [plate.crops() for plate in screen.plates]
        self._address = np.array([m.ctypes.data for m in self._maps], dtype=np.uintp)
        self._file_offset = [int(getattr(m, "offset", 0)) for m in self._maps]
        self._paths = [Path(plate.path) for plate in screen.plates]
        self._handles: list[int] = []
        if read == "pread":
            self._handles = [os.open(path, os.O_RDONLY) for path in self._paths]
        self._pool = ThreadPoolExecutor(threads, "cellfast-gather") if threads > 1 else None
        # Held while copying, so that close() cannot unmap what is being read.
        self._lock = threading.Lock()
        self._closed = False

    def pieces(self) -> list[tuple[Path, int, int]]:
        """(path, offset, length) in bytes of the pixels in each plate file."""
        return [(p, o, m.nbytes) for p, o, m in zip(self._paths, self._file_offset, self._maps) if m.nbytes]

    def copy(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Fill ``out`` [n, C, S, S] (the screen's dtype, C-contiguous) with ``rows`` (int64 [n]).

        Equivalent to ``out[:] = np.concatenate([plate.crops() for plate in screen.plates])[rows]``. Releases the interpreter
        lock.

        Raises:
            CellfastError: a row outside the screen, or a file that ended early.
            ValueError: an ``out`` of the wrong shape, dtype or layout.
        """
        rows = np.ascontiguousarray(rows, dtype=np.int64)
        if out.shape != (len(rows), *self.row_shape) or out.dtype != self.dtype or not out.flags.c_contiguous:
            wanted = (len(rows), *self.row_shape)
            raise ValueError(f"out must be C-contiguous {self.dtype} of shape {wanted}, got {out.dtype} of shape {out.shape}")
        if len(rows) == 0:
            return
        # The copy works on addresses: a row outside the screen must never reach it.
        if rows.min() < 0 or rows.max() >= self.num_rows:
            raise CellfastError(f"rows must lie in 0..{self.num_rows - 1}, got {rows.min()}..{rows.max()}")
        plate = np.searchsorted(self.offsets, rows, side="right") - 1
        local = rows - self.offsets[plate]
        flat = out.reshape(-1).view(np.uint8)
        with self._lock:
            if self._closed:
                raise CellfastError("the loader was closed while it was in use")
            if self._pool is None:
                self._copy_part(plate, local, flat, 0, len(rows))
                return
            edges = np.linspace(0, len(rows), self.threads + 1).astype(int)
            parts = [self._pool.submit(self._copy_part, plate, local, flat, int(a), int(b)) for a, b in pairwise(edges) if b > a]
            # Wait for all of them before any error leaves: none may still write to ``out``.
            errors = [part.exception() for part in parts]
        for error in errors:
            if error is not None:
                raise error

    def _copy_part(self, plate: np.ndarray, local: np.ndarray, flat: np.ndarray, start: int, stop: int) -> None:
        if self.read == "mmap":
            source = self._address[plate[start:stop]] + (local[start:stop] * self.row_bytes).astype(np.uintp)
            _copy_rows(source, self.row_bytes, flat.ctypes.data + start * self.row_bytes)
            return
        memory = memoryview(flat)
        for i in range(start, stop):
            where, done = self._file_offset[plate[i]] + int(local[i]) * self.row_bytes, 0
            while done < self.row_bytes:
                target = memory[i * self.row_bytes + done : (i + 1) * self.row_bytes]
                got = os.preadv(self._handles[plate[i]], [target], where + done)
                if got == 0:
                    raise CellfastError(
                        f"{self._paths[plate[i]]} ended early: it was cut short after it was opened; ingest it again"
                    )
                done += got

    def close(self) -> None:
        """Release threads, files and maps; safe to call twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._pool is not None:
                self._pool.shutdown(wait=True)
            for handle in self._handles:
                os.close(handle)
            self._handles, self._maps = [], []

    def __del__(self) -> None:
        if hasattr(self, "_closed"):
            self.close()


@intrinsic
def _memcpy(typing_context: Any, target: Any, source: Any, num_bytes: Any) -> Any:
    signature = types.void(types.uintp, types.uintp, types.intp)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, frm = (builder.inttoptr(address, cgutils.voidptr_t) for address in arguments[:2])
        cgutils.raw_memcpy(builder, to, frm, arguments[2], 1)
        return context.get_dummy_value()

    return signature, generate


# Without the interpreter lock for the whole minibatch: a call per row or per plate would wait for the lock each time.
@njit(nogil=True, cache=True)
def _copy_rows(source: np.ndarray, row_bytes: int, target: int) -> None:
    """Copy ``row_bytes`` bytes from each address in ``source`` to consecutive places from the address ``target``."""
    for i in range(source.shape[0]):
        _memcpy(types.uintp(target + i * row_bytes), source[i], row_bytes)
