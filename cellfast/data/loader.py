"""Minibatches of a screen's cells: shuffled, gathered ahead on a thread into reused buffers, resumable within an epoch."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cellfast.data.batch import Batch
from cellfast.data.buffers import Buffer
from cellfast.data.gather import RowGather
from cellfast.data.resident import ResidentCells, choose_feed
from cellfast.data.sampler import RowSampler
from cellfast.data.warm import available_memory, read_files
from cellfast.errors import CellfastError
from cellfast.progress import Progress

BACKENDS = ("mmap", "dali")


class Loader:
    """Iterate over minibatches of a screen's cells; each ``iter()`` runs one epoch.

    A batch is valid until the next one is asked for: its memory is then filled again. The order of rows and the ranks' pieces are
    those of :class:`cellfast.data.sampler.RowSampler`. An epoch left by ``break`` counts as begun: the next ``iter()`` runs the
    next epoch, unless :meth:`load_state_dict` came between.

    Args:
        screen: a ``cellfast.screens.Screen``.
        batch_size: cells per minibatch and rank.
        rows: global rows to use, or None for all.
        shuffle: a full permutation by (seed, epoch), or the rows in their order.
        drop_last: leave out the last, smaller minibatch.
        rank, world_size: this process's piece of each global minibatch of ``world_size * batch_size`` rows.
        backend: ``mmap`` (each row from its place in the file; the fastest on a CPU; the name is older than the way) or ``dali``
            (NVIDIA DALI); both give the same pixels.
        device: where ``crops`` lie. For a GPU the buffers are pinned and copied on a stream of their own.
        prefetch: minibatches made ahead.
        warm: read the files into the page cache before the first minibatch: True, False, or ``auto`` (where the store fits in
            free memory). What was decided stands in :attr:`notes`.
        threads: threads that read; None is 1 where the store fits in free memory and is streamed, and 8 otherwise.
        feed: ``resident`` (all of the loader's rows are read once into memory of ``device`` and gathered there), ``stream`` (each
            minibatch is read when it is due, and on a GPU copied through pinned buffers), or ``auto``: resident on a GPU where the
            cells take at most half of its free memory. Both give the same batches.

    Raises:
        CellfastError: options out of range (named), an empty selection, or DALI missing; while iterating: damaged pixels, or a file
            that was cut short (`RowGather.copy`).
    """

    def __init__(
        self,
        screen: Any,
        batch_size: int,
        *,
        rows: np.ndarray | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        backend: str = "mmap",
        device: str | torch.device = "cpu",
        prefetch: int = 2,
        warm: bool | str = "auto",
        threads: int | None = None,
        feed: str = "auto",
    ) -> None:
        if backend not in BACKENDS:
            raise CellfastError(f"unknown loader {backend!r}: choose one of {', '.join(BACKENDS)}")
        if prefetch < 1:
            raise CellfastError(f"prefetch must be at least 1, got {prefetch}")
        if warm not in (True, False, "auto"):
            raise CellfastError(f"warm must be True, False or 'auto', got {warm!r}")
        self.sampler = RowSampler(
            screen.num_cells, batch_size, rows=rows, shuffle=shuffle, seed=seed, drop_last=drop_last, rank=rank,
            world_size=world_size,
        )  # fmt: skip
        self.backend, self.device, self.prefetch = backend, torch.device(device), prefetch
        self.epoch, self._step, self._begun = 0, 0, False
        self._screen, self._pipeline, self._resident = screen, None, None
        self.notes: list[str] = []
        row_bytes = len(screen.channel_names) * screen.crop_size**2 * np.dtype(screen.dtype).itemsize
        only = "the dali loader streams" if backend == "dali" else None
        self.feed, why = choose_feed(feed, self.sampler.num_rows * row_bytes, self.device, streams_only=only)
        self._open(screen, warm, threads)
        self.notes.append(f"feed {self.feed}: {why}")

    def _open(self, screen: Any, warm: bool | str, threads: int | None) -> None:
        size = screen.num_cells * len(screen.channel_names) * screen.crop_size**2 * np.dtype(screen.dtype).itemsize
        free = available_memory()
        # Room for the process itself and the files that others keep in the page cache.
        fits = size < 0.8 * free
        sizes = f"store {size / 2**30:.2f} GiB, free memory {free / 2**30:.1f} GiB"
        if self.backend == "dali":
            from cellfast.data.dali import require_dali

            require_dali()
        # Several threads where reads wait for a disk, or all cells are wanted at once.
        threads = threads or (1 if fits and self.feed == "stream" else 8)
        self._gather = RowGather(screen, threads=threads)
        self.notes.append(f"loader {self.backend}, {threads} thread(s): {sizes}")
        # Cells that are to be resident are read once, in order: that is the warming.
        self._warm = (fits if warm == "auto" else bool(warm)) and self.feed == "stream"
        if not self._warm and self.feed == "stream":
            self.notes.append(f"files not warmed: {'larger than 80 % of free memory' if warm == 'auto' else 'warm is off'}")

    def __len__(self) -> int:
        """Minibatches per epoch, the same on every rank."""
        return len(self.sampler)

    def state_dict(self) -> dict[str, Any]:
        """The position, JSON-serialisable: minibatches handed out in this epoch count as seen."""
        return {"epoch": self.epoch, "step": self._step, **self.sampler.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken: the next ``iter()`` runs the rest of that epoch.

        Raises:
            CellfastError: the state belongs to other rows, another seed, minibatch size or number of ranks (each difference
                named).
        """
        mine = self.sampler.fingerprint()
        missing = sorted(({"epoch", "step"} | set(mine)) - set(state))
        if missing:
            raise CellfastError(f"this is not a loader's state: {', '.join(missing)} missing")
        differences = [f"{key} was {state[key]}, is {mine[key]}" for key in mine if state[key] != mine[key]]
        if differences:
            raise CellfastError(
                f"the loader's state belongs to another run ({'; '.join(differences)}): resume with the same data and options"
            )
        self.epoch, self._step, self._begun = int(state["epoch"]), int(state["step"]), False
        if self._step >= len(self):
            self.epoch, self._step = self.epoch + 1, 0

    def __iter__(self) -> Iterator[Batch]:
        if self._begun:
            self.epoch, self._step = self.epoch + 1, 0
        self._begun = True
        return self._run(self.epoch, self._step)

    def _run(self, epoch: int, first: int) -> Iterator[Batch]:
        self._warm_once()
        indices = range(first, len(self))
        if self.backend == "dali":
            from cellfast.data.dali import CropPipeline

            if self._pipeline is None:
                self._pipeline = CropPipeline(self._gather, self.sampler.batch_size, self.device, prefetch=self.prefetch)
            batches = self._pipeline.run(self.sampler, epoch, indices)
        elif self.feed == "resident":
            if self._resident is None:
                self._resident = ResidentCells(self._gather, self.sampler.rows, self.device)
            batches = (Batch(crops, rows) for crops, rows in self._resident.run(self.sampler, epoch, indices))
        else:
            batches = _prefetched(self._gather, self.sampler, epoch, indices, self.device, self.prefetch)
        try:
            for index, batch in zip(indices, batches):
                if self.epoch == epoch:
                    self._step = index + 1
                yield batch
        finally:
            batches.close()
        if self.epoch == epoch:
            self.epoch, self._step, self._begun = epoch + 1, 0, False

    def _warm_once(self) -> None:
        if not self._warm:
            return
        self._warm = False
        pieces = self._gather.pieces()
        total = sum(length for _, _, length in pieces)
        with Progress("warm the crop store", total >> 20, "MiB", enabled=total > 4 << 30) as progress:
            read, seconds = read_files(pieces, advance=lambda got: progress.advance(got >> 20))
        self.notes.append(f"files warmed: {read / 2**30:.2f} GiB in {seconds:.1f} s")

    def close(self) -> None:
        """Release files, maps and pipelines; iterators still running end with an error."""
        self._pipeline = self._resident = None
        self._gather.close()


def _prefetched(
    gather: RowGather, sampler: RowSampler, epoch: int, indices: range, device: torch.device, prefetch: int
) -> Iterator[Batch]:
    """Gather minibatches on a thread, ``prefetch`` ahead of the consumer, who holds one buffer more."""
    if len(indices) == 0:
        return
    shape, dtype = (sampler.batch_size, *gather.row_shape), torch.from_numpy(np.empty(0, gather.dtype)).dtype
    cuda = device.type == "cuda"
    free: queue.Queue[Buffer | None] = queue.Queue()
    ready: queue.Queue[Any] = queue.Queue()
    for _ in range(min(prefetch, len(indices)) + 1):
        free.put(Buffer(shape, dtype, device))
    # The thread knows the queues but not the generator: an abandoned generator is collected and its `finally` ends the thread.
    stop = threading.Event()
    worker = threading.Thread(
        target=_fill, args=(gather, sampler, epoch, indices, device, free, ready, stop), name="cellfast-loader", daemon=True
    )  # fmt: skip
    worker.start()
    try:
        for _ in indices:
            got = ready.get()
            if isinstance(got, BaseException):
                raise got
            buffer, rows = got
            if cuda:
                torch.cuda.current_stream(device).wait_event(buffer.copied)
            yield Batch(buffer.crops[: len(rows)], torch.from_numpy(rows))
            if cuda:
                buffer.used = torch.cuda.current_stream(device).record_event()
            free.put(buffer)
    finally:
        stop.set()
        free.put(None)
        worker.join()


def _fill(
    gather: RowGather,
    sampler: RowSampler,
    epoch: int,
    indices: range,
    device: torch.device,
    free: queue.Queue,
    ready: queue.Queue,
    stop: threading.Event,
) -> None:
    try:
        cuda = device.type == "cuda"
        stream = torch.cuda.Stream(device) if cuda else None
        for index in indices:
            buffer = free.get()
            if buffer is None or stop.is_set():
                if cuda:
                    stream.synchronize()  # the buffers are given back next: nothing may still write to them
                return
            rows = sampler.batch(epoch, index)
            if buffer.copied is not None:
                buffer.copied.synchronize()  # the pinned buffer is still being read by the previous copy
            gather.copy(rows, buffer.array[: len(rows)])
            if cuda:
                with torch.cuda.stream(stream):
                    if buffer.used is not None:
                        stream.wait_event(buffer.used)  # the device buffer is still being read by the consumer's kernels
                    buffer.crops[: len(rows)].copy_(buffer.host[: len(rows)], non_blocking=True)
                    buffer.copied = stream.record_event()
            ready.put((buffer, rows))
    except BaseException as error:
        ready.put(error)
