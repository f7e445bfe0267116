"""Units read ahead, by threads or processes, and handed out in their order."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from cellfast.embedding.cells import Cells, CellSource
from cellfast.errors import CellfastError, option

_source: CellSource | None = None


def _begin_reader(source: CellSource) -> None:
    global _source
    _source = source


def _read_in_process(unit: Any) -> Cells:
    assert _source is not None
    return _source.read(unit)


class ReaderPool:
    """Reads units ahead, ``workers`` at a time, and hands their cells out in the order of the units.

    Args:
        source: what is read.
        workers: threads or processes.
        readers: ``threads`` or ``processes``.
    """

    def __init__(self, source: CellSource, workers: int, readers: str) -> None:
        self.source, self.workers, self.readers = source, workers, readers
        self._pool: Executor = self._make()

    def _make(self) -> Executor:
        if self.readers == "threads":
            return ThreadPoolExecutor(self.workers, "cellfast-read")
        # spawn: a fork would copy locks in the state another thread left them in.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self.workers, mp_context=context, initializer=_begin_reader, initargs=(self.source,))

    def _submit(self, unit: Any) -> Future[Cells]:
        return self._pool.submit(self.source.read if self.readers == "threads" else _read_in_process, unit)

    def cells(self, units: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Cells]]:
        """(key, cells) for each (key, unit), in order; 2 × workers + 1 units at most are read or waiting to be taken."""
        waiting: list[tuple[Any, Any, Future[Cells]]] = []
        feed = iter(units)
        broken = 0
        while True:
            while len(waiting) < 2 * self.workers + 1 and (following := next(feed, None)) is not None:
                key, unit = following
                waiting.append((key, unit, self._submit(unit)))
            if not waiting:
                return
            key, unit, future = waiting.pop(0)
            try:
                cells = future.result()
            except BrokenProcessPool as error:
                # A reader was killed (most often: out of memory). What was under way is read again by new ones.
                broken += 1
                if broken > 3:
                    raise CellfastError(
                        f"the processes that read fields died repeatedly; use fewer with {option('workers')}, or "
                        f"{option('readers', 'threads')}"
                    ) from error
                self._pool.shutdown(wait=False, cancel_futures=True)
                self._pool = self._make()
                again = [(key, unit), *((k, u) for k, u, _ in waiting)]
                waiting = [(k, u, self._submit(u)) for k, u in again]
                continue
            except MemoryError as error:
                raise CellfastError(f"out of memory while reading fields; use fewer readers with {option('workers')}") from error
            yield key, cells

    def close(self) -> None:
        """End the readers; what they have under way is dropped."""
        self._pool.shutdown(wait=self.readers == "threads", cancel_futures=True)
