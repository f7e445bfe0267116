"""Cells of the crop store through NVIDIA DALI, and what every user of DALI needs. The only importer of nvidia.dali.

DALI has no HDF5 reader: arrays enter through ``external_source`` in batch mode and leave as torch tensors through DLPack. Without
a GPU the pipelines run with ``device_id=None``, which needs no driver.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cellfast.data.batch import Batch
from cellfast.data.gather import RowGather
from cellfast.data.sampler import RowSampler
from cellfast.errors import CellfastError


def require_dali(what: str = "--loader dali", instead: str = "--loader mmap") -> Any:
    """The module ``nvidia.dali``.

    Args:
        what, instead: for the message: what was asked for, and what does without.

    Raises:
        CellfastError: it is not installed, or does not load (the reason is given).
    """
    try:
        import nvidia.dali
        import nvidia.dali.fn
        import nvidia.dali.types
    except ImportError as error:
        raise CellfastError(
            f"{what} needs NVIDIA DALI, which cannot be imported ({error}): "
            f"pip install nvidia-dali-cuda130 (or -cuda120), or use {instead}"
        ) from error
    return nvidia.dali


class CropPipeline:
    """Crops of the crop store through DALI, for :class:`cellfast.data.Loader` with ``backend="dali"``.

    Args:
        gather: copies rows from the plates' HDF5 files.
        batch_size: the largest minibatch.
        device: ``cpu``, or a GPU to which DALI copies the crops.
        prefetch: minibatches in flight.
    """

    def __init__(
        self, gather: RowGather, batch_size: int, device: torch.device, *, prefetch: int = 2, num_threads: int = 1
    ) -> None:
        self._batch_size, self._device, self._prefetch, self._threads = batch_size, device, prefetch, num_threads
        self._feed = _Feed(gather, batch_size)
        self._dtype = gather.dtype
        dtype = {"uint8": torch.uint8, "uint16": torch.uint16}[gather.dtype.name]
        self._empty = torch.empty((0, *gather.row_shape), dtype=dtype, device=device)
        self._pipe: Any = self._build()

    def _build(self) -> Any:
        dali = require_dali()
        cuda = self._device.type == "cuda"
        pipe = dali.Pipeline(
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=device_id(self._device),
            prefetch_queue_depth=self._prefetch,
        )
        with pipe:
            # no_copy=False: DALI copies the array when it is fed, so that one buffer serves every minibatch.
            crops = dali.fn.external_source(
                source=self._feed, dtype=dali_type(dali, self._dtype), ndim=3, layout="CHW", batch=True, no_copy=False
            )
            pipe.set_outputs(crops.gpu() if cuda else crops)
        pipe.build()
        return pipe

    def run(self, sampler: RowSampler, epoch: int, indices: range) -> Iterator[Batch]:
        """The minibatches ``indices`` of ``epoch``, a few ahead of the consumer; a batch is valid until the next is asked for."""
        if self._pipe is None:
            self._pipe = self._build()
        waiting, ended = self._feed.waiting, False
        self._feed.start(sampler.batch(epoch, index) for index in indices)
        try:
            while not ended:
                output = self._next_output()
                ended = output is None
                while waiting and not len(waiting[0]):
                    yield Batch(self._empty, torch.from_numpy(waiting.popleft()))
                if output is not None:
                    yield Batch(torch.from_dlpack(output.as_tensor()), torch.from_numpy(waiting.popleft()))
        finally:
            if self._pipe is not None:
                # Left early: no more inputs, and take what is under way, so that the next epoch starts with an empty pipeline.
                self._feed.stop()
                while not ended:
                    ended = self._next_output() is None
                self._pipe.reset()

    def _next_output(self) -> Any:
        """The next result, or None at the end."""
        try:
            return self._pipe.run(*stream_of(self._device))[0]
        except StopIteration:
            return None
        except BaseException:
            self._pipe = None  # DALI's state is unknown after an error: build it anew when it is used again
            raise


class _Feed:
    """What ``external_source`` calls: the crops of one minibatch after the other; ``waiting``: the rows of those under way."""

    def __init__(self, gather: RowGather, batch_size: int) -> None:
        self._gather = gather
        self._buffer = np.empty((batch_size, *gather.row_shape), dtype=gather.dtype)
        self._rows: Iterator[np.ndarray] = iter(())
        self.waiting: deque[np.ndarray] = deque()

    def start(self, rows: Iterator[np.ndarray]) -> None:
        self._rows = rows
        self.waiting.clear()

    def stop(self) -> None:
        self._rows = iter(())

    def __call__(self) -> np.ndarray:
        while True:
            rows = next(self._rows)  # StopIteration is DALI's end of epoch
            self.waiting.append(rows)
            if len(rows):  # DALI has no empty minibatch
                crops = self._buffer[: len(rows)]
                self._gather.copy(rows, crops)
                return crops


def device_id(device: torch.device) -> int | None:
    """DALI's number of a GPU; None for the CPU, which needs no driver."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def stream_of(device: torch.device) -> tuple[Any, ...]:
    """What a pipeline is run with: bound to torch's stream, a result on a GPU needs no wait and goes back to DALI in that stream's order."""
    return (torch.cuda.current_stream(device),) if device.type == "cuda" else ()


def dali_type(dali: Any, dtype: np.dtype) -> Any:
    """DALI's name of uint8 or uint16."""
    return {"uint8": dali.types.UINT8, "uint16": dali.types.UINT16}[dtype.name]
