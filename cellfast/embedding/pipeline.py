"""Reading, cutting, copying to the device, encoding and writing at the same time, in bounded memory and in a fixed order."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cellfast.data.buffers import Buffer
from cellfast.data.device_cutting import cut_on_device
from cellfast.embedding.blocks import BlockWork
from cellfast.embedding.cells import Block, Cells, CellSource
from cellfast.embedding.encoder import CropEncoder, plate_scaling
from cellfast.embedding.progress import EmbedProgress

# Minibatches between the stages: one being filled, one waiting, one being encoded.
BUFFERS = 3
# Blocks whose rows wait to be written.
WAITING_BLOCKS = 2


@dataclass
class _Minibatch:
    """Cells of one block on their way to the encoder: a row must not depend on which blocks an earlier run had finished."""

    buffer: Buffer
    work: BlockWork
    count: int = 0
    is_last: bool = False
    scaling: tuple[torch.Tensor, ...] = ()
    fields: int = 0
    done: Any = None  # CUDA event: the results have arrived in host memory


class Pipeline:
    """Embeds blocks: each is read, cut, encoded and handed to ``write`` in order, all stages at work at once.

    Args:
        source: what is read.
        encoder: crops → features.
        open_reader: makes the reader, e.g. a `ReaderPool`, given the stream its planes are to be ready on.
        batch_size: cells per minibatch; minibatches run across the units of a block.
        write: called with each finished block, on a thread of its own.
        progress: told what is done.
    """

    def __init__(
        self,
        source: CellSource,
        encoder: CropEncoder,
        open_reader: Callable[[Any], Any],
        *,
        batch_size: int,
        write: Callable[[BlockWork], None],
        progress: EmbedProgress,
    ) -> None:
        self.source, self.encoder, self.open_reader, self.batch_size = source, encoder, open_reader, batch_size
        self.write, self.progress, self.clock = write, progress, progress.clock
        self.scaling = plate_scaling(encoder.loaded, source)
        self.defer = encoder.device.type == "cuda"
        self._launched: list[tuple[_Minibatch, torch.Tensor | None]] = []
        self.stop = threading.Event()
        self.free: queue.Queue[Buffer | None] = queue.Queue()
        self.ready: queue.Queue[Any] = queue.Queue()
        self._written: queue.Queue[BlockWork | None] = queue.Queue(WAITING_BLOCKS)
        self._write_error: BaseException | None = None

    def run(self, blocks: Iterable[Block]) -> None:
        """Embed ``blocks``; the first error of any stage ends all of them and is raised here."""
        encoder = self.encoder
        size = encoder.loaded.output_size
        shape = (self.batch_size, len(self.source.channel_names), size, size)
        dtype = torch.uint8 if self.source.dtype == "uint8" else torch.uint16
        for _ in range(BUFFERS):
            self.free.put(Buffer(shape, dtype, encoder.device))
        cutter = threading.Thread(target=self._cut_all, args=(blocks,), name="cellfast-cut", daemon=True)
        writer = threading.Thread(target=self._write_all, name="cellfast-write", daemon=True)
        cutter.start()
        writer.start()
        try:
            while (got := self.ready.get()) is not None:
                if isinstance(got, BaseException):
                    raise got
                self._encode(got)
                if self._write_error is not None:
                    raise self._write_error
            while self._launched:
                self._collect()
        finally:
            self.stop.set()
            self.free.put(None)
            cutter.join()
            # After an error of the writer nothing takes blocks off its queue but its own thread, which drains it.
            self._written.put(None)
            writer.join()
        if self._write_error is not None:
            raise self._write_error

    def _encode(self, batch: _Minibatch) -> None:
        buffer, encoder = batch.buffer, self.encoder
        cuda = encoder.device.type == "cuda"
        began = time.perf_counter()
        values = None
        if batch.count:
            if cuda:
                torch.cuda.current_stream(encoder.device).wait_event(buffer.copied)
            values = encoder.launch(buffer.crops[: batch.count], *batch.scaling)
            if cuda:
                stream = torch.cuda.current_stream(encoder.device)
                buffer.used = stream.record_event()
                # Sent off at once: a copy asked for when the results are wanted would wait for the next minibatch too.
                host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
                values, batch.done = host, stream.record_event()
        self.free.put(buffer)
        # A device at work on its own gets the next minibatch before the results of this one are waited for.
        self._launched.append((batch, values))
        if len(self._launched) > (1 if self.defer else 0):
            self._collect()
        self.clock.add("encode", time.perf_counter() - began)

    def _collect(self) -> None:
        """Take the results of the oldest minibatch under way to the blocks its cells belong to."""
        batch, values = self._launched.pop(0)
        if values is not None:
            if batch.done is not None:
                batch.done.synchronize()
                values = values.clone()  # pinned memory is not kept for the length of a block
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

    def _cut_all(self, blocks: Iterable[Block]) -> None:
        reader = None
        try:
            stager = _Stager(self)
            reader = self.open_reader(stager.stream)
            for (work, is_last), cells in reader.cells(self._units(blocks)):
                self.clock.add("read", cells.seconds)
                work.add(cells)
                if not stager.take(work, cells):
                    break
                if is_last:
                    stager.end(work)
            self.ready.put(None)
        except BaseException as error:
            self.ready.put(error)
        finally:
            if reader is not None:
                reader.close()

    def _units(self, blocks: Iterable[Block]) -> Iterator[tuple[tuple[BlockWork, bool], Any]]:
        for block in blocks:
            if self.stop.is_set():
                return
            work, units = BlockWork(block), self.source.units(block)
            for position, unit in enumerate(units):
                yield (work, position == len(units) - 1), unit


class _Stager:
    """Fills minibatches from the cells of units: on a CPU it cuts into the buffer; for a GPU planes go to the device and are cut there."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.device = pipeline.encoder.device
        self.cuda = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if self.cuda else None
        self.batch: _Minibatch | None = None

    def _open(self, work: BlockWork) -> bool:
        if self.batch is None:
            buffer = self.pipeline.free.get()
            if buffer is None or self.pipeline.stop.is_set():
                self.pipeline.free.put(None)  # whoever asks next is told too
                return False
            if buffer.copied is not None:
                buffer.copied.synchronize()  # the pinned buffer is still being read by its last copy
            if buffer.used is not None:
                assert self.stream is not None
                self.stream.wait_event(buffer.used)  # the encoder still reads the device buffer
            self.batch = _Minibatch(buffer, work)
        return True

    def take(self, work: BlockWork, cells: Cells) -> bool:
        """Put the cells of a unit into minibatches; False when the pipeline is stopping."""
        if not self._open(work):
            return False
        assert self.batch is not None
        self.batch.fields += cells.fields
        planes, start = None, 0
        while start < cells.count:
            if not self._open(work):
                return False
            batch = self.batch
            began = time.perf_counter()
            stop = min(cells.count, start + self.pipeline.batch_size - batch.count)
            place = slice(batch.count, batch.count + stop - start)
            if self.cuda and cells.planes is not None:
                planes = self._cut_there(cells, planes, start, stop, batch.buffer.crops[place])
            else:
                cells.fill(batch.buffer.array[place], start, stop)
                if self.cuda:
                    with torch.cuda.stream(self.stream):
                        batch.buffer.crops[place].copy_(batch.buffer.host[place], non_blocking=True)
            batch.count += stop - start
            start = stop
            self.pipeline.clock.add("cut", time.perf_counter() - began)
            if batch.count == self.pipeline.batch_size:
                self._send()
        return True

    def _cut_there(self, cells: Cells, planes: Any, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        assert cells.planes is not None
        assert cells.origins is not None
        with torch.cuda.stream(self.stream):
            if planes is None:
                if isinstance(cells.planes[0], torch.Tensor):
                    # Decoded there, on this stream; few operations know uint16.
                    stored = cells.planes[0].dtype
                    bits = torch.int16 if stored == torch.uint16 else stored
                    planes = torch.stack([plane.view(bits) for plane in cells.planes]).view(stored)
                else:
                    planes = torch.from_numpy(np.stack(cells.planes)).pin_memory().to(self.device, non_blocking=True)
            origins = torch.from_numpy(np.ascontiguousarray(cells.origins[start:stop])).to(self.device)
            out.copy_(cut_on_device(planes, origins, cells.size, cells.border))
        return planes

    def end(self, work: BlockWork) -> None:
        """Send what is left of the block."""
        if self._open(work):
            assert self.batch is not None
            self.batch.is_last = True
            self._send()

    def _send(self) -> None:
        assert self.batch is not None
        if self.batch.count:
            self.batch.scaling = self.pipeline.scaling(self.batch.work.block.plate)
        if self.cuda:
            assert self.stream is not None
            self.batch.buffer.copied = self.stream.record_event()
        self.pipeline.ready.put(self.batch)
        self.batch = None
