"""A screen's cells held in memory, on the device where there is one: minibatches are then gathered there, and nothing crosses the bus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cellfast.data.gather import RowGather
from cellfast.data.sampler import RowSampler
from cellfast.data.warm import available_memory
from cellfast.errors import CellfastError
from cellfast.progress import Progress

FEEDS = ("auto", "resident", "stream")
# The rest is the model's, its activations' and the views'.
DEVICE_SHARE, HOST_SHARE = 0.5, 0.5
_BLOCK_BYTES = 64 << 20


def choose_feed(feed: str, store_bytes: int, device: torch.device, *, streams_only: str | None = None) -> tuple[str, str]:
    """``resident`` or ``stream``, and the reason in words.

    ``auto`` keeps the cells resident on a GPU where they take at most half of its free memory, and streams otherwise; on a CPU it
    always streams, because the page cache holds the files already. An explicit choice is taken, or refused where it cannot be.

    Args:
        streams_only: why only ``stream`` is possible, or None.

    Raises:
        CellfastError: an unknown feed, or ``resident`` where it is impossible or the cells do not fit.
    """
    if feed not in FEEDS:
        raise CellfastError(f"feed must be one of {', '.join(FEEDS)}, got {feed!r}")
    if feed == "stream" or (feed == "auto" and streams_only):
        return "stream", "as asked" if feed == "stream" else str(streams_only)
    if streams_only:
        raise CellfastError(f"--feed resident is not possible: {streams_only}; use --feed stream")
    cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if cuda else available_memory()
    share, sizes = DEVICE_SHARE if cuda else HOST_SHARE, f"{store_bytes / 2**30:.2f} of {free / 2**30:.1f} GiB free on {device}"
    if feed == "resident":
        if store_bytes > 0.9 * free:
            raise CellfastError(f"--feed resident: the cells need {sizes}; use --feed stream")
        return "resident", f"as asked, {sizes}"
    if not cuda:
        return "stream", "on a CPU the page cache holds the files"
    return ("resident", f"fits: {sizes}") if store_bytes <= share * free else ("stream", f"more than half: {sizes}")


class ResidentCells:
    """The cells ``rows`` of a screen in one tensor on ``device``; batches are taken out of it by index.

    Args:
        gather: reads the rows, once.
        rows: global rows to hold, or None for all.
    """

    def __init__(self, gather: RowGather, rows: np.ndarray | None, device: torch.device) -> None:
        self.device = device
        self._rows = None if rows is None else np.sort(rows)
        held = np.arange(gather.num_rows, dtype=np.int64) if self._rows is None else self._rows
        dtype = torch.from_numpy(np.empty(0, gather.dtype)).dtype
        # Unsigned 16-bit tensors have few operators; a gather only moves bits, so the signed type serves.
        self._view = dtype
        self._kept = torch.int16 if dtype == torch.uint16 else dtype
        self.cells = torch.empty((len(held), *gather.row_shape), dtype=self._kept, device=device)
        self._fill(gather, held)

    def _fill(self, gather: RowGather, held: np.ndarray) -> None:
        if self.device.type != "cuda":
            gather.copy(held, self.cells.numpy().view(gather.dtype))
            return
        block = max(1, _BLOCK_BYTES // gather.row_bytes)
        shape = (min(block, len(held)), *gather.row_shape)
        slots: list[tuple[torch.Tensor, Any]] = [
            (torch.empty(shape, dtype=self._kept, pin_memory=True), torch.cuda.Event()) for _ in range(2)
        ]
        total = len(held) * gather.row_bytes
        with Progress("load the crop store", total >> 20, "MiB", enabled=total > 4 << 30) as progress:
            for number, start in enumerate(range(0, len(held), block)):
                host, copied = slots[number % 2]
                copied.synchronize()  # the copy before last still reads this buffer
                part = host[: min(block, len(held) - start)]
                gather.copy(held[start : start + block], part.numpy().view(gather.dtype))
                self.cells[start : start + len(part)].copy_(part, non_blocking=True)
                copied.record()
                progress.advance(len(part) * gather.row_bytes >> 20)
        torch.cuda.synchronize(self.device)  # once: the pinned buffers are given back after this

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """Where global ``rows`` lie in :attr:`cells`."""
        return rows if self._rows is None else np.searchsorted(self._rows, rows)

    def run(self, sampler: RowSampler, epoch: int, indices: range) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(crops, rows) of the minibatches ``indices`` of ``epoch``, crops [B, C, S, S] of the screen's dtype on the device."""
        batches = [sampler.batch(epoch, index) for index in indices]
        if not batches:
            return
        order = torch.from_numpy(np.ascontiguousarray(self.positions(np.concatenate(batches))))
        if self.device.type == "cuda":
            # The whole epoch's order at once: no copy from the host in any step.
            order = order.pin_memory().to(self.device, non_blocking=True)
        start = 0
        for rows in batches:
            crops = torch.index_select(self.cells, 0, order[start : start + len(rows)])
            start += len(rows)
            yield crops.view(self._view), torch.from_numpy(rows)
