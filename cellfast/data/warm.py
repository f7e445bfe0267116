"""Whether a store fits in memory, and reading cold files into the page cache in the order that disks like."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_BLOCK = 8 << 20


def available_memory() -> int:
    """Bytes that can be used without swapping: the system's estimate, or what the control group has left if that is less."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: physical memory is the best estimate
    for limit_file, usage_file, cache_key in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "file"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes", "total_cache"),
    ):
        try:
            limit, usage = int(Path(limit_file).read_text()), int(Path(usage_file).read_text())
            stat = dict(line.split() for line in Path(limit_file).with_name("memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        # Page cache counts as used but is given back on demand.
        available = min(available, limit - usage + int(stat.get(cache_key, 0)))
    return max(0, available)


def read_files(
    pieces: Sequence[tuple[Path, int, int]], *, threads: int = 8, advance: Callable[[int], None] | None = None
) -> tuple[int, float]:
    """Read (path, offset, length) pieces once, in order, on several threads, so that they lie in the page cache.

    Returns:
        Bytes read and seconds taken.

    Raises:
        OSError: a file that cannot be read.
    """
    blocks = [
        (path, start, min(_BLOCK, offset + length - start))
        for path, offset, length in pieces
        for start in range(offset, offset + length, _BLOCK)
    ]
    started, lock, position, total = time.perf_counter(), threading.Lock(), iter(blocks), 0
    failures: list[BaseException] = []

    def work() -> None:
        nonlocal total
        buffer, handles = memoryview(bytearray(_BLOCK)), {}
        try:
            while not failures:
                with lock:
                    block = next(position, None)
                if block is None:
                    return
                path, start, length = block
                if path not in handles:
                    handles[path] = os.open(path, os.O_RDONLY)
                got = os.preadv(handles[path], [buffer[:length]], start)
                with lock:
                    total += got
                    if advance is not None:
                        advance(got)
        except BaseException as error:
            failures.append(error)
        finally:
            for handle in handles.values():
                os.close(handle)

    workers = [threading.Thread(target=work, name="cellfast-warm", daemon=True) for _ in range(min(threads, max(1, len(blocks))))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
    return total, time.perf_counter() - started
