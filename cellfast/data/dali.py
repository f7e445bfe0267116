"""Cells through NVIDIA DALI: crops from the crop store, or cut from whole fields (HDF5, TIFF). The only importer of nvidia.dali.

DALI has no HDF5 reader: arrays enter through ``external_source`` in batch mode and leave as torch tensors through DLPack. Without
a GPU the pipelines run with ``device_id=None``, which needs no driver.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from cellfast.data.gather import RowGather
from cellfast.data.loader import Batch
from cellfast.data.sampler import RowSampler
from cellfast.errors import CellfastError
from cellfast.screens.cutting import crop_origins
from cellfast.screens.field_store import greyscale_tiff
from cellfast.screens.sealed import check_sizes, open_hdf5


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


class EpochSource:
    """What ``external_source`` calls: hands out the inputs of one epoch and remembers which rows they belong to."""

    def __init__(self) -> None:
        self._feeds: Iterator[tuple[np.ndarray, tuple]] = iter(())
        # The inputs stay here until their results have been given back: some of them are read in place.
        self.waiting: deque[tuple[np.ndarray, tuple | None]] = deque()

    def start(self, feeds: Iterator[tuple[np.ndarray, tuple]]) -> None:
        self._feeds = feeds
        self.waiting.clear()

    def stop(self) -> None:
        self._feeds = iter(())

    def __call__(self) -> tuple:
        while True:
            rows, inputs = next(self._feeds)  # StopIteration is DALI's end of epoch
            if len(rows):
                self.waiting.append((rows, inputs))
                return inputs
            self.waiting.append((rows, None))  # DALI has no empty minibatch


class EpochPipeline:
    """A DALI pipeline that runs epochs of minibatches given as (rows, inputs), a few ahead of the consumer.

    ``graph(dali, source)`` builds it from the source's outputs.
    """

    def __init__(
        self, batch_size: int, device: torch.device, prefetch: int, num_threads: int, graph: Callable[[Any, EpochSource], Any]
    ) -> None:
        self._batch_size, self.device, self._prefetch = batch_size, device, prefetch
        self._num_threads, self._graph = num_threads, graph
        self._source = EpochSource()
        self._pipe = self._build()

    def _build(self) -> Any:
        dali = require_dali()
        cuda = self.device.type == "cuda"
        device_id = None
        if cuda:
            device_id = torch.cuda.current_device() if self.device.index is None else self.device.index
        pipe = dali.Pipeline(
            batch_size=self._batch_size, num_threads=self._num_threads, device_id=device_id, prefetch_queue_depth=self._prefetch
        )
        with pipe:
            output = self._graph(dali, self._source)
            pipe.set_outputs(output.gpu() if cuda else output)
        pipe.build()
        return pipe

    def epoch(self, feeds: Iterator[tuple[np.ndarray, tuple]], empty: torch.Tensor) -> Iterator[Batch]:
        """Run ``feeds``; a pair without rows gives ``empty``."""
        if self._pipe is None:
            self._pipe = self._build()
        waiting, ended = self._source.waiting, False
        self._source.start(feeds)
        try:
            while not ended:
                output = self._next_output()
                ended = output is None
                while waiting and waiting[0][1] is None:
                    yield Batch(empty, torch.from_numpy(waiting.popleft()[0]))
                if output is not None:
                    yield Batch(self.tensor(output), torch.from_numpy(waiting[0][0]))
                    waiting.popleft()
        finally:
            if self._pipe is not None:
                # Left early: no more inputs, and take what is under way, so that the next epoch starts with an empty pipeline.
                self._source.stop()
                while not ended:
                    ended = self._next_output() is None
                self._pipe.reset()

    def _next_output(self) -> Any:
        """The next result, or None at the end."""
        try:
            # Bound to torch's stream, a result on a GPU needs no wait here and goes back to DALI in that stream's order.
            return self._pipe.run(*(() if self.device.type == "cpu" else (torch.cuda.current_stream(self.device),)))[0]
        except StopIteration:
            return None
        except BaseException:
            self._pipe = None  # DALI's state is unknown after an error: build it anew when it is used again
            raise

    def tensor(self, output: Any) -> torch.Tensor:
        """DALI's result as one torch tensor, sharing its memory."""
        return torch.from_dlpack(output.as_tensor())


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
        self._gather = gather
        self._empty = torch.empty((0, *gather.row_shape), dtype=_torch_dtype(gather.dtype), device=device)

        def graph(dali: Any, source: EpochSource) -> Any:
            # no_copy=False: DALI copies the array when it is fed, so that one buffer serves every minibatch.
            (crops,) = dali.fn.external_source(
                source=source,
                num_outputs=1,
                dtype=dali_type(dali, gather.dtype),
                ndim=3,
                layout="CHW",
                batch=True,
                no_copy=False,
            )
            return crops

        self._pipeline = EpochPipeline(batch_size, device, prefetch, num_threads, graph)
        self._buffer = np.empty((batch_size, *gather.row_shape), dtype=gather.dtype)

    def run(self, sampler: RowSampler, epoch: int, indices: range) -> Iterator[Batch]:
        """The minibatches ``indices`` of ``epoch``; a batch is valid until the next is asked for."""

        def feeds() -> Iterator[tuple[np.ndarray, tuple]]:
            for index in indices:
                rows = sampler.batch(epoch, index)
                self._gather.copy(rows, self._buffer[: len(rows)])
                yield rows, (self._buffer[: len(rows)],)

        return self._pipeline.epoch(feeds(), self._empty)


class FieldSource(Protocol):
    """Whole fields by index: ``num_channels``, ``dtype``, and ``read`` → for each index a list of C arrays [H, W]."""

    num_channels: int
    dtype: np.dtype

    def read(self, indices: Sequence[int]) -> list[list[np.ndarray]]: ...


class Hdf5Fields:
    """Fields in one HDF5 dataset of shape (N, C, H, W), uint16 or uint8.

    Raises:
        CellfastError: not such a dataset, or one that points into another file.
    """

    def __init__(self, path: str | os.PathLike[str], dataset: str = "fields") -> None:
        import h5py

        self._path = Path(path)
        self._file = open_hdf5(self._path, Hdf5Fields)
        link = self._file.get(dataset, getlink=True) if dataset in self._file else None
        data = self._file[dataset] if isinstance(link, h5py.HardLink) else None
        if not isinstance(data, h5py.Dataset) or data.external or data.is_virtual:
            found = ", ".join(self._file) or "nothing"
            self._file.close()
            raise CellfastError(
                f"{self._path} has no dataset {dataset!r} of its own: it holds {found}; links to other files are refused"
            )
        if data.ndim != 4 or data.dtype not in (np.dtype(np.uint16), np.dtype(np.uint8)):
            found = f"{data.dtype} of shape {data.shape}"
            self._file.close()
            raise CellfastError(f"{self._path}:{dataset} must be uint16 or uint8 of shape (N, C, H, W), got {found}")
        check_sizes(data, self._path)
        self._data = data
        self.num_fields, self.num_channels = int(data.shape[0]), int(data.shape[1])
        self.dtype = np.dtype(data.dtype)

    def read(self, indices: Sequence[int]) -> list[list[np.ndarray]]:
        """Fields ``indices`` as lists of C arrays [H, W]."""
        return [list(self._data[index]) for index in indices]


class TiffFields:
    """Fields of one single-page greyscale TIFF per channel, decoded by DALI on ``num_threads`` threads.

    Equivalent to ``tifffile.imread`` of every file. Planar, multi-page and colour files are refused by name: DALI would return
    wrong or partial pixels of them without a word. Greyscale files with a palette, an inverted scale or a turned orientation,
    whose values DALI would convert, are read by tifffile instead.

    Args:
        files: for each field its C paths, in channel order.

    Raises:
        CellfastError: a file that is unreadable, is not such a TIFF, or differs in depth from the first.
    """

    def __init__(self, files: Sequence[Sequence[str | os.PathLike[str]]], *, num_threads: int = 2, batch_size: int = 32) -> None:
        if not files or len({len(channels) for channels in files}) != 1 or not files[0]:
            raise CellfastError("every field needs the same number of channel files, at least one, and there must be a field")
        self.files = [[Path(path) for path in channels] for channels in files]
        self.num_fields, self.num_channels = len(self.files), len(self.files[0])
        self._batch_size = batch_size
        self.dtype, _ = _greyscale_tiff(self.files[0][0])
        dali = require_dali()
        self._pipe = dali.Pipeline(batch_size=batch_size, num_threads=num_threads, device_id=None, prefetch_queue_depth=1)
        with self._pipe:
            encoded = dali.fn.external_source(name="encoded", dtype=dali.types.UINT8, ndim=1, batch=True, no_copy=False)
            # Both types are needed: without dtype the result is silently 8-bit.
            image = dali.fn.decoders.image(encoded, output_type=dali.types.ANY_DATA, dtype=dali_type(dali, self.dtype))
            self._pipe.set_outputs(image)
        self._pipe.build()

    def read(self, indices: Sequence[int]) -> list[list[np.ndarray]]:
        """Fields ``indices`` as lists of C arrays [H, W]."""
        paths = [path for index in indices for path in self.files[index]]
        planes: list[np.ndarray] = []
        for start in range(0, len(paths), self._batch_size):
            planes += self._decode(paths[start : start + self._batch_size])
        c = self.num_channels
        return [planes[i * c : (i + 1) * c] for i in range(len(indices))]

    def _decode(self, paths: Sequence[Path]) -> list[np.ndarray]:
        import tifffile

        planes: dict[int, np.ndarray] = {}
        plain: list[int] = []
        for i, path in enumerate(paths):
            dtype, as_stored = _greyscale_tiff(path)
            if dtype != self.dtype:
                raise CellfastError(f"{path} is {dtype}, the first file is {self.dtype}: all fields must have the same depth")
            if as_stored:
                plain.append(i)
            else:
                planes[i] = tifffile.imread(path)
        if plain:
            self._pipe.feed_input("encoded", [np.fromfile(paths[i], dtype=np.uint8) for i in plain])
            (images,) = self._pipe.run()
            for position, i in enumerate(plain):
                image = np.array(images.at(position))
                if image.ndim != 3 or image.shape[2] != 1:
                    raise CellfastError(f"{paths[i]} decodes to shape {list(image.shape)}: expected one greyscale plane")
                planes[i] = image[..., 0]
        return [planes[i] for i in range(len(paths))]


class FieldCellPipeline:
    """Cells cut from whole fields by DALI: cell i is the S × S window of its field with the centroid's pixel at index S // 2.

    The pixels of ``cellfast.screens.cutting.cut_crops(planes, origins, S, border="pad")``: what lies outside the field is zero.

    Args:
        source: whole fields.
        field_index: int [N], the field of each cell.
        centers: float [N, 2], (x, y) centroids in pixels.
        crop_size: S.
        batch_size: the largest minibatch.
        prefetch: minibatches in flight.
    """

    def __init__(
        self,
        source: FieldSource,
        field_index: np.ndarray,
        centers: np.ndarray,
        crop_size: int,
        batch_size: int,
        device: str | torch.device = "cpu",
        *,
        prefetch: int = 2,
        num_threads: int = 2,
    ) -> None:
        self._source = source
        self._field = np.asarray(field_index, dtype=np.int64)
        centers = np.asarray(centers, dtype=np.float64)
        if centers.shape != (len(self._field), 2) or not np.isfinite(centers).all():
            raise CellfastError(
                f"centers must be {len(self._field)} finite (x, y) pairs, one for each cell, got shape {list(centers.shape)}"
            )
        self._start = crop_origins(centers[:, 1], centers[:, 0], crop_size).astype(np.int32)
        self._cache: dict[int, list[np.ndarray]] = {}
        device = torch.device(device)
        self._empty = torch.empty(
            (0, source.num_channels, crop_size, crop_size), dtype=_torch_dtype(source.dtype), device=device
        )  # fmt: skip

        def graph(dali: Any, feed: EpochSource) -> Any:
            # no_copy: the cells of a field all read the one decoded array, which the feed keeps until their windows are used.
            channels, pixel = source.num_channels, dali_type(dali, source.dtype)
            start, *planes = dali.fn.external_source(
                source=feed, num_outputs=1 + channels, dtype=[dali.types.INT32] + [pixel] * channels, ndim=[1] + [2] * channels,
                batch=True, no_copy=True,
            )  # fmt: skip
            windows = [
                dali.fn.slice(
                    plane, start, [crop_size, crop_size], axes=[0, 1], normalized_anchor=False, normalized_shape=False,
                    out_of_bounds_policy="pad", fill_values=0,
                )
                for plane in planes
            ]  # fmt: skip
            return dali.fn.stack(*windows, axis=0)

        self._pipeline = EpochPipeline(batch_size, device, prefetch, num_threads, graph)

    def __len__(self) -> int:
        return len(self._field)

    def run(self, sampler: RowSampler, epoch: int, indices: range) -> Iterator[Batch]:
        """The minibatches ``indices`` of ``epoch``; without shuffling, and cells in field order, each field is read once."""

        def feeds() -> Iterator[tuple[np.ndarray, tuple]]:
            for index in indices:
                rows = sampler.batch(epoch, index)
                fields = self._fields(self._field[rows])
                planes = [[field[channel] for field in fields] for channel in range(self._source.num_channels)]
                yield rows, (list(self._start[rows]), *planes)

        return self._pipeline.epoch(feeds(), self._empty)

    def _fields(self, wanted: np.ndarray) -> list[list[np.ndarray]]:
        missing = [int(index) for index in np.unique(wanted) if index not in self._cache]
        # Only the fields of this minibatch stay: a screen has far more than memory holds.
        needed = set(wanted.tolist())
        self._cache = {index: field for index, field in self._cache.items() if index in needed}
        self._cache.update(zip(missing, self._source.read(missing) if missing else []))
        return [self._cache[index] for index in wanted.tolist()]


def _greyscale_tiff(path: Path) -> tuple[np.dtype, bool]:
    """The depth of a single-page greyscale TIFF, and whether DALI decodes its values as stored; other files are refused."""
    dtype, _, plain = greyscale_tiff(path, str(path))
    return dtype, plain


def dali_type(dali: Any, dtype: np.dtype) -> Any:
    """DALI's name of uint8 or uint16."""
    return {"uint8": dali.types.UINT8, "uint16": dali.types.UINT16}[dtype.name]


def _torch_dtype(dtype: np.dtype) -> torch.dtype:
    return {"uint8": torch.uint8, "uint16": torch.uint16}[dtype.name]
