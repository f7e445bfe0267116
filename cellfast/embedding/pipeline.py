"""Reading, cutting, copying to the device, encoding and writing at the same time, in bounded memory and in a fixed order."""

from __future__ import annotations

import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cellfast.data.device_cutting import cut_on_device
from cellfast.embedding.encoder import CropEncoder
from cellfast.embedding.parts import PartWork
from cellfast.embedding.sources import CellSource, Chunk, Part
from cellfast.embedding.stages import EmbedProgress, StageClock
from cellfast.errors import CellfastError

# Minibatches between the stages: one being filled, one waiting, one being encoded.
SLOTS = 3
# Parts whose rows wait to be written.
WAITING_PARTS = 2

_source: CellSource | None = None


def _begin_reader(source: CellSource) -> None:
    global _source
    _source = source


def _read_in_process(unit: Any) -> Chunk:
    assert _source is not None
    return _source.read(unit)


class ReaderPool:
    """Reads units ahead, ``workers`` at a time, and hands the chunks out in the order of the units.

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

    def _submit(self, unit: Any) -> Future[Chunk]:
        return self._pool.submit(self.source.read if self.readers == "threads" else _read_in_process, unit)

    def chunks(self, units: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Chunk]]:
        """(key, chunk) for each (key, unit), in order; 2 × workers + 1 units at most are read or waiting to be taken."""
        waiting: list[tuple[Any, Any, Future[Chunk]]] = []
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
                chunk = future.result()
            except BrokenProcessPool as error:
                # A reader was killed (most often: out of memory). What was under way is read again by new ones.
                broken += 1
                if broken > 3:
                    raise CellfastError(
                        "the processes that read fields died repeatedly; use fewer with --workers, or --readers threads"
                    ) from error
                self._pool.shutdown(wait=False, cancel_futures=True)
                self._pool = self._make()
                again = [(key, unit), *((k, u) for k, u, _ in waiting)]
                waiting = [(k, u, self._submit(u)) for k, u in again]
                continue
            except MemoryError as error:
                raise CellfastError("out of memory while reading fields; use fewer readers with --workers") from error
            yield key, chunk

    def close(self) -> None:
        """End the readers; what they have under way is dropped."""
        self._pool.shutdown(wait=self.readers == "threads", cancel_futures=True)


@dataclass
class _Minibatch:
    """Cells of one part on their way to the encoder: a row must not depend on which parts an earlier run had finished."""

    slot: _Slot
    work: PartWork
    count: int = 0
    is_last: bool = False
    low: Any = None
    high: Any = None
    fields: int = 0
    done: Any = None  # CUDA event: the results have arrived in host memory


class _Slot:
    """One reused buffer; on a GPU, ``host`` is pinned and ``crops`` lies on the device."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.crops = torch.empty(shape, dtype=dtype, device=device)
        self.host = torch.empty(shape, dtype=dtype, pin_memory=True) if cuda else self.crops
        self.array = self.host.numpy()
        self.copied: Any = None
        # The memory may be that of tensors which kernels in this stream still read: the first copy waits for those too.
        self.used: Any = torch.cuda.current_stream(device).record_event() if cuda else None


class Pipeline:
    """Embeds parts: each is read, cut, encoded and handed to ``write`` in order, all stages at work at once.

    Args:
        source: what is read.
        encoder: crops → features.
        batch_size: cells per minibatch; minibatches run across the fields of a part.
        scaling: plate → (low, high), float32 [C].
        write: called with each finished part, on a thread of its own.
        workers, readers: as of `ReaderPool`.
        clock, progress: told what is done.
        open_reader: makes another reader than a `ReaderPool`, given the stream its planes are to be ready on.
    """

    def __init__(
        self,
        source: CellSource,
        encoder: CropEncoder,
        *,
        batch_size: int,
        scaling: Callable[[str], tuple[torch.Tensor, torch.Tensor]],
        write: Callable[[PartWork], None],
        workers: int,
        readers: str,
        clock: StageClock,
        progress: EmbedProgress,
        open_reader: Callable[[Any], Any] | None = None,
    ) -> None:
        self.open_reader = open_reader
        self.source, self.encoder, self.batch_size, self.scaling = source, encoder, batch_size, scaling
        self.write, self.workers, self.readers = write, workers, readers
        self.clock, self.progress = clock, progress
        self.defer = encoder.device.type == "cuda"
        self._launched: list[tuple[_Minibatch, torch.Tensor | None]] = []
        self.stop = threading.Event()
        self._free: queue.Queue[_Slot | None] = queue.Queue()
        self._ready: queue.Queue[Any] = queue.Queue()
        self._written: queue.Queue[PartWork | None] = queue.Queue(WAITING_PARTS)
        self._write_error: BaseException | None = None

    def run(self, parts: Iterable[Part]) -> None:
        """Embed ``parts``; the first error of any stage ends all of them and is raised here."""
        encoder = self.encoder
        size = encoder.loaded.output_size
        shape = (self.batch_size, len(self.source.channel_names), size, size)
        dtype = torch.uint8 if self.source.dtype == "uint8" else torch.uint16
        for _ in range(SLOTS):
            self._free.put(_Slot(shape, dtype, encoder.device))
        cutter = threading.Thread(target=self._cut_all, args=(parts,), name="cellfast-cut", daemon=True)
        writer = threading.Thread(target=self._write_all, name="cellfast-write", daemon=True)
        cutter.start()
        writer.start()
        try:
            while (got := self._ready.get()) is not None:
                if isinstance(got, BaseException):
                    raise got
                self._encode(got)
                if self._write_error is not None:
                    raise self._write_error
            while self._launched:
                self._collect()
        finally:
            self.stop.set()
            self._free.put(None)
            cutter.join()
            # After an error of the writer nothing takes parts off its queue but its own thread, which drains it.
            self._written.put(None)
            writer.join()
        if self._write_error is not None:
            raise self._write_error

    def _encode(self, batch: _Minibatch) -> None:
        slot, encoder = batch.slot, self.encoder
        cuda = encoder.device.type == "cuda"
        began = time.perf_counter()
        values = None
        if batch.count:
            if cuda:
                torch.cuda.current_stream(encoder.device).wait_event(slot.copied)
            values = encoder.launch(slot.crops[: batch.count], batch.low, batch.high)
            if cuda:
                stream = torch.cuda.current_stream(encoder.device)
                slot.used = stream.record_event()
                # Sent off at once: a copy asked for when the results are wanted would wait for the next minibatch too.
                host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
                values, batch.done = host, stream.record_event()
        self._free.put(slot)
        # A device at work on its own gets the next minibatch before the results of this one are waited for.
        self._launched.append((batch, values))
        if len(self._launched) > (1 if self.defer else 0):
            self._collect()
        self.clock.add("encode", time.perf_counter() - began)

    def _collect(self) -> None:
        """Take the results of the oldest minibatch under way to the parts its cells belong to."""
        batch, values = self._launched.pop(0)
        if values is not None:
            if batch.done is not None:
                batch.done.synchronize()
                values = values.clone()  # pinned memory is not kept for the length of a part
            batch.work.values.append(values.numpy())
        self.progress.advance(batch.count, batch.fields)
        if batch.is_last:
            self._written.put(batch.work)

    def _write_all(self) -> None:
        while (work := self._written.get()) is not None:
            if self._write_error is not None:
                continue  # drained, so that the encoder never waits for a writer that has failed
            began = time.perf_counter()
            try:
                self.write(work)
            except BaseException as error:
                self._write_error = error
            self.clock.add("write", time.perf_counter() - began)

    def _cut_all(self, parts: Iterable[Part]) -> None:
        pool = None
        try:
            stager = _Stager(self)
            pool = self.open_reader(stager.stream) if self.open_reader else ReaderPool(self.source, self.workers, self.readers)
            self._cut_parts(stager, pool, parts)
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)
        finally:
            if pool is not None:
                pool.close()

    def _units(self, parts: Iterable[Part]) -> Iterator[tuple[tuple[PartWork, bool], Any]]:
        for part in parts:
            if self.stop.is_set():
                return
            work, units = PartWork(part), self.source.units(part)
            for position, unit in enumerate(units):
                yield (work, position == len(units) - 1), unit

    def _cut_parts(self, stager: _Stager, pool: Any, parts: Iterable[Part]) -> None:
        for (work, is_last), chunk in pool.chunks(self._units(parts)):
            self.clock.add("read", chunk.seconds)
            work.add(chunk)
            low, high = self.scaling(chunk.plate) if chunk.count else (None, None)
            if not stager.take(work, chunk, low, high):
                return
            if is_last:
                stager.end(work)


class _Stager:
    """Fills minibatches from chunks: on a CPU it cuts into the buffer; for a GPU planes go to the device and are cut there."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.device = pipeline.encoder.device
        self.cuda = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if self.cuda else None
        self.batch: _Minibatch | None = None

    def _open(self, work: PartWork) -> bool:
        if self.batch is None:
            slot = self.pipeline._free.get()
            if slot is None or self.pipeline.stop.is_set():
                self.pipeline._free.put(None)  # whoever asks next is told too
                return False
            if slot.copied is not None:
                slot.copied.synchronize()  # the pinned buffer is still being read by its last copy
            if slot.used is not None:
                assert self.stream is not None
                self.stream.wait_event(slot.used)  # the encoder still reads the device buffer
            self.batch = _Minibatch(slot, work)
        return True

    def take(self, work: PartWork, chunk: Chunk, low: Any, high: Any) -> bool:
        """Put a chunk's cells into minibatches; False when the pipeline is stopping."""
        if not self._open(work):
            return False
        assert self.batch is not None
        self.batch.fields += chunk.fields
        planes, start = None, 0
        while start < chunk.count:
            if not self._open(work):
                return False
            batch = self.batch
            began = time.perf_counter()
            stop = min(chunk.count, start + self.pipeline.batch_size - batch.count)
            place = slice(batch.count, batch.count + stop - start)
            if self.cuda and chunk.planes is not None:
                planes = self._cut_there(chunk, planes, start, stop, batch.slot.crops[place])
            else:
                chunk.fill(batch.slot.array[place], start, stop)
                if self.cuda:
                    with torch.cuda.stream(self.stream):
                        batch.slot.crops[place].copy_(batch.slot.host[place], non_blocking=True)
            batch.low, batch.high = low, high
            batch.count += stop - start
            start = stop
            self.pipeline.clock.add("cut", time.perf_counter() - began)
            if batch.count == self.pipeline.batch_size:
                self._send()
        return True

    def _cut_there(self, chunk: Chunk, planes: Any, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        assert chunk.planes is not None
        assert chunk.origins is not None
        with torch.cuda.stream(self.stream):
            if planes is None:
                if isinstance(chunk.planes[0], torch.Tensor):
                    # Decoded there, on this stream; few operations know uint16.
                    stored = chunk.planes[0].dtype
                    bits = torch.int16 if stored == torch.uint16 else stored
                    planes = torch.stack([plane.view(bits) for plane in chunk.planes]).view(stored)
                else:
                    planes = torch.from_numpy(np.stack(chunk.planes)).pin_memory().to(self.device, non_blocking=True)
            origins = torch.from_numpy(np.ascontiguousarray(chunk.origins[start:stop])).to(self.device)
            out.copy_(cut_on_device(planes, origins, chunk.size, chunk.border))
        return planes

    def end(self, work: PartWork) -> None:
        """Send what is left of the part."""
        if self._open(work):
            assert self.batch is not None
            self.batch.is_last = True
            self._send()

    def _send(self) -> None:
        assert self.batch is not None
        if self.cuda:
            assert self.stream is not None
            self.batch.slot.copied = self.stream.record_event()
        self.pipeline._ready.put(self.batch)
        self.batch = None
