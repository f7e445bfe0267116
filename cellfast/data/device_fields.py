"""Whole fields to cells on the device: DALI decodes, one gather cuts, and torch gets the result without a copy or a wait."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from cellfast.data.cut_cells import cut_cells
from cellfast.data.dali import EpochPipeline, EpochSource, dali_type, require_dali
from cellfast.data.loader import Batch
from cellfast.errors import CellfastError
from cellfast.screens.cutting import crop_origins
from cellfast.screens.field_store import PROTOCOL, store_and_key

DECODES = ("auto", "cpu", "mixed")


class _PlanePipeline(EpochPipeline):
    """Planes of one size as one tensor [n, H, W]."""

    def tensor(self, output: Any) -> torch.Tensor:
        shapes = {tuple(shape) for shape in output.shape()}
        if len(shapes) != 1:
            raise CellfastError(f"fields decoded together have several sizes: {', '.join(map(str, sorted(shapes)))}")
        (shape,) = shapes
        if len(shape) == 3 and shape[2] != 1:
            raise CellfastError(f"a field decodes to shape {list(shape)}: expected one greyscale plane per channel")
        return super().tensor(output).view(-1, *shape[:2])


class FieldDecoder:
    """Groups of fields as tensors [n, C, H, W] on ``device``, decoded by DALI a few groups ahead of the consumer.

    Args:
        source: encoded fields (``encoded(index)`` → C uint8 arrays, a `cellfast.screens.field_store.EncodedFields`), or plain ones
            (``read([index])`` → C arrays [H, W], e.g. `cellfast.data.dali.Hdf5Fields`).
        fields_per_group: fields decoded together.
        device: a GPU, or the CPU (no driver is then needed).
        decode: ``cpu`` (decoded by the host's threads, then copied), ``mixed`` (nvImageCodec's GPU decoders for what they can, the
            host for the rest; needs a GPU), or ``auto``: on a GPU the one that was faster on the first group, else ``cpu``. What was
            chosen stands in :attr:`notes`.
        num_threads: decoding threads of the host.
        prefetch: groups in flight.

    Raises:
        CellfastError: an unknown ``decode``, ``mixed`` without a GPU, or DALI missing.
    """

    def __init__(
        self, source: Any, *, fields_per_group: int = 8, device: str | torch.device = "cpu", decode: str = "auto",
        num_threads: int = 2, prefetch: int = 2,
    ) -> None:  # fmt: skip
        if decode not in DECODES:
            raise CellfastError(f"decode must be one of {', '.join(DECODES)}, got {decode!r}")
        self.device = torch.device(device)
        if decode == "mixed" and self.device.type != "cuda":
            raise CellfastError(f"decode='mixed' needs a GPU, and the device is {self.device}: use 'cpu' or 'auto'")
        require_dali("decoding fields on the device", "cellfast.screens.images.read_plane")
        self.source, self.fields_per_group = source, fields_per_group
        self._encoded = hasattr(source, "encoded")
        self._threads, self._prefetch = num_threads, prefetch
        self._pipelines: dict[str, _PlanePipeline] = {}
        self.notes: list[str] = []
        self.decode = decode if self._encoded else "cpu"
        if not self._encoded:
            self.notes.append("decode: none, the fields are stored plainly")
        elif decode != "auto":
            self.notes.append(f"decode {decode}: as asked")
        elif self.device.type != "cuda":
            self.decode = "cpu"
            self.notes.append("decode cpu: no GPU")

    def run(self, groups: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
        """Decode each group of field indices (at most ``fields_per_group``) → uint8 or uint16 [n, C, H, W].

        On a GPU a tensor is ready in the order of torch's current stream, and its memory is DALI's until the tensor is dropped.
        """
        if len(groups) == 0:
            return
        if self.decode == "auto":
            self._measure(groups[0])
        yield from self._epoch(groups, self.decode)

    def _measure(self, group: np.ndarray) -> None:
        rates = {}
        for decode in ("cpu", "mixed"):
            list(self._epoch([group], decode))  # starts threads, allocates
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            list(self._epoch([group] * 4, decode))
            torch.cuda.synchronize(self.device)
            rates[decode] = 4 * len(group) / (time.perf_counter() - start)
        self.decode = max(rates, key=rates.__getitem__)
        measured = ", ".join(f"{name} {rate:,.0f} fields/s" for name, rate in rates.items())
        self.notes.append(f"decode {self.decode}: the faster on the first fields ({measured}, {self._threads} threads)")

    def _epoch(self, groups: Sequence[np.ndarray], decode: str) -> Iterator[torch.Tensor]:
        def feeds() -> Iterator[tuple[np.ndarray, tuple]]:
            for group in groups:
                yield group, (self._read(group),)

        if decode not in self._pipelines:
            self._pipelines[decode] = self._pipeline(decode)
        batches = self._pipelines[decode].epoch(feeds(), torch.empty(0))
        try:
            for planes, _ in batches:
                yield planes.view(-1, self.source.num_channels, *planes.shape[1:])
        finally:
            batches.close()

    def _pipeline(self, decode: str) -> _PlanePipeline:
        pixel, encoded = self.source.dtype, self._encoded

        def graph(dali: Any, source: EpochSource) -> Any:
            kept = {"source": source, "num_outputs": 1, "batch": True, "no_copy": False}
            if not encoded:
                return dali.fn.external_source(dtype=dali_type(dali, pixel), ndim=2, **kept)[0]
            (content,) = dali.fn.external_source(dtype=dali.types.UINT8, ndim=1, **kept)
            # Both types are needed: without dtype the result is silently 8-bit.
            return dali.fn.decoders.image(
                content,
                device="mixed" if decode == "mixed" else "cpu",
                output_type=dali.types.ANY_DATA,
                dtype=dali_type(dali, pixel),
                adjust_orientation=False,
            )

        planes = self.fields_per_group * self.source.num_channels
        return _PlanePipeline(planes, self.device, self._prefetch, self._threads, graph)

    def _read(self, group: np.ndarray) -> list[np.ndarray]:
        if len(group) > self.fields_per_group:
            raise CellfastError(f"a group has at most {self.fields_per_group} fields, got {len(group)}")
        if self._encoded:
            return [content for index in group.tolist() for content in self.source.encoded(index)]
        return [np.ascontiguousarray(plane) for field in self.source.read(group.tolist()) for plane in field]


class DeviceFieldCells:
    """Cells of fields, cut on the device: decodes each field once, in groups, and yields all cells of a group as one `Batch`.

    The pixels of ``cellfast.screens.cutting.cut_crops(planes, origins, S, border=border)``.

    Args:
        decoder: the fields.
        field_index: int [N], the field of each cell.
        centers: float [N, 2], (x, y) centroids in pixels.
        crop_size: S.
        border: ``pad`` or ``reflect``.
        random_margin_px: each window is shifted by whole pixels, uniform in [−m, m] along each axis, by seed, epoch and cell.

    Raises:
        CellfastError: centres that are not finite, fields that do not exist, a negative margin.
    """

    def __init__(
        self, decoder: FieldDecoder, field_index: np.ndarray, centers: np.ndarray, crop_size: int, *, border: str = "pad",
        random_margin_px: int = 0, seed: int = 0,
    ) -> None:  # fmt: skip
        self.decoder, self.crop_size, self.border = decoder, crop_size, border
        self._field = np.asarray(field_index, dtype=np.int64)
        centers = np.asarray(centers, dtype=np.float64)
        if centers.shape != (len(self._field), 2) or not np.isfinite(centers).all():
            wanted = f"centers must be {len(self._field)} finite (x, y) pairs, one for each cell"
            raise CellfastError(f"{wanted}, got shape {list(centers.shape)}")
        count = decoder.source.num_fields
        if len(self._field) and not 0 <= self._field.min() <= self._field.max() < count:
            raise CellfastError(f"fields must lie in 0..{count - 1}, got {self._field.min()}..{self._field.max()}")
        if random_margin_px < 0 or border not in ("pad", "reflect"):
            raise CellfastError(
                f"border must be pad or reflect and the margin not negative, got {border!r} and {random_margin_px}"
            )
        self.random_margin_px, self.seed = int(random_margin_px), int(seed)
        self._origins = crop_origins(centers[:, 1], centers[:, 0], crop_size)

    def __len__(self) -> int:
        return len(self._field)

    def origins(self, epoch: int) -> np.ndarray:
        """First row and column of each window in ``epoch``, int64 [N, 2]."""
        if self.random_margin_px == 0:
            return self._origins
        rng, most = np.random.Generator(np.random.PCG64([self.seed, epoch])), self.random_margin_px
        return self._origins + rng.integers(-most, most, self._origins.shape, endpoint=True)

    def run(self, *, epoch: int = 0, shuffle_fields: bool = False) -> Iterator[Batch]:
        """Yield ``Batch(crops [k, C, S, S] on the device, rows [k])`` until every cell was given once."""
        used = np.unique(self._field)
        if shuffle_fields:
            used = np.random.Generator(np.random.PCG64([self.seed, epoch, 1])).permutation(used)
        size = self.decoder.fields_per_group
        groups = [used[start : start + size] for start in range(0, len(used), size)]
        order = np.argsort(self._field, kind="stable")
        edges = np.searchsorted(self._field[order], np.arange(self.decoder.source.num_fields + 1))
        origins, device = self.origins(epoch), self.decoder.device
        for group, fields in zip(groups, self.decoder.run(groups)):
            rows = np.concatenate([order[edges[index] : edges[index + 1]] for index in group])
            place = np.repeat(np.arange(len(group)), [edges[index + 1] - edges[index] for index in group])
            where = torch.from_numpy(np.column_stack((place, origins[rows])))
            if device.type == "cuda":
                where = where.pin_memory().to(device, non_blocking=True)
            crops = cut_cells(fields, where[:, 0], where[:, 1:], self.crop_size, border=self.border)
            yield Batch(crops, torch.from_numpy(rows))


def located_cells(table: Any, locations: Any, fields: Any) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """The located cells of an image table's fields that a field store keeps, for `DeviceFieldCells`.

    Args:
        table: an `ImageTable` read with the store as image root.
        locations: a `LocationSource` that needs no pixels.
        fields: the store, an `EncodedFields` with names.

    Returns:
        field_index int64 [N], centers float32 [N, 2] (x, y), and of each field of the store its `Field` or None.

    Raises:
        CellfastError: cells that are detected in the images, files that are in no field store, or a field without locations.
    """
    if locations.reads_images:
        raise CellfastError(
            "cells detected in the images are not located beforehand: run cellfast ingest fields --locations detect"
        )
    index = {name: number // fields.num_channels for number, name in enumerate(fields.names())}
    of_field: list[Any] = [None] * fields.num_fields
    for one in table.fields:
        if not one.files[0].startswith(f"{PROTOCOL}://"):
            raise CellfastError(f"{one.files[0] or 'a field'}: not in a field store; read the table with the store as image root")
        place = index.get(store_and_key(one.files[0])[1])
        if place is not None:  # what the store was written without is not there
            of_field[place] = one
    numbers, centers = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.float32)]
    for place, one in enumerate(of_field):
        if one is not None:
            found = locations.locate(one, None)
            numbers.append(np.full(len(found.x), place))
            centers.append(np.stack((found.x, found.y), 1))
    return np.concatenate(numbers), np.concatenate(centers), of_field
