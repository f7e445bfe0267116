"""Which rows each rank reads, in which order: a permutation by (seed, epoch), cut into minibatches and rank slices."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from cellfast.errors import CellfastError


class RowSampler:
    """The rows of each minibatch of an epoch, a pure function of its arguments.

    Epoch e is ``permutation(rows)`` seeded by (seed, e), or ``rows`` in their order without shuffling; global minibatch g is its
    piece [g·W·B, (g+1)·W·B), and rank r of W takes the r-th B rows of it. The last, smaller global minibatch of m rows is dropped
    with ``drop_last``; otherwise rank r takes its rows [r·m // W, (r+1)·m // W): the ranks' pieces differ by at most one row,
    some are empty where m < W, and every rank has the same number of minibatches. Joined over the ranks, minibatch g is what one
    process with a minibatch of W·B would see, and every row occurs once per epoch.

    Args:
        num_rows: rows of the screen.
        batch_size: B, per rank.
        rows: the rows to use (unique, within the screen), or None for all.
        seed: any non-negative integer.

    Raises:
        CellfastError: a value out of range, repeated rows, or ``drop_last`` with less than one global minibatch.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        *,
        rows: np.ndarray | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise CellfastError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise CellfastError(f"rank must be in 0..world_size-1, got rank {rank} of {world_size}")
        if seed < 0:
            raise CellfastError(f"seed must not be negative, got {seed}")
        self.rows = None if rows is None else _checked_rows(rows, num_rows)
        self.num_rows = num_rows if self.rows is None else len(self.rows)
        self.batch_size, self.shuffle, self.seed = int(batch_size), bool(shuffle), int(seed)
        self.drop_last, self.rank, self.world_size = bool(drop_last), int(rank), int(world_size)
        if self.num_rows == 0:
            raise CellfastError("there are no cells to load: the screen, or the selection of rows, is empty")
        if len(self) == 0:
            raise CellfastError(
                f"drop_last leaves no minibatch: {self.num_rows} cells are fewer than {world_size} x {batch_size}. "
                f"Use a batch size of at most {self.num_rows // world_size}, or keep the last one"
            )
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Minibatches per epoch, the same on every rank."""
        step = self.batch_size * self.world_size
        return self.num_rows // step if self.drop_last else -(-self.num_rows // step)

    def batch(self, epoch: int, index: int) -> np.ndarray:
        """The rows, int64, of this rank's minibatch ``index`` of ``epoch``."""
        step = self.batch_size * self.world_size
        start = index * step
        size = min(step, self.num_rows - start)
        if size == step:
            first, last = self.rank * self.batch_size, (self.rank + 1) * self.batch_size
        else:
            first, last = self.rank * size // self.world_size, (self.rank + 1) * size // self.world_size
        if self.shuffle:
            position = self._permutation(epoch)[start + first : start + last].astype(np.int64)
        else:
            position = np.arange(start + first, start + last, dtype=np.int64)
        return position if self.rows is None else self.rows[position]

    def fingerprint(self) -> dict[str, Any]:
        """What must agree for a position in an epoch to mean the same rows."""
        digest = 0 if self.rows is None else zlib.crc32(self.rows.tobytes())
        return {
            "num_rows": self.num_rows,
            "rows_digest": digest,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "seed": self.seed,
        }

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            # Half the memory of int64: 4 GB for a billion cells.
            order = np.arange(self.num_rows, dtype=np.uint32 if self.num_rows < 2**32 else np.int64)
            np.random.Generator(np.random.PCG64([self.seed, epoch])).shuffle(order)
            self._order = (epoch, order)
        return self._order[1]


def _checked_rows(rows: np.ndarray, num_rows: int) -> np.ndarray:
    rows = np.asarray(rows)
    if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
        raise CellfastError(f"rows must be a 1-D array of integers, got shape {list(rows.shape)} of {rows.dtype}")
    rows = rows.astype(np.int64)
    if rows.size and (rows.min() < 0 or rows.max() >= num_rows):
        raise CellfastError(f"rows must lie in 0..{num_rows - 1}, got {rows.min()}..{rows.max()}")
    if len(np.unique(rows)) != len(rows):
        raise CellfastError("rows must not repeat: each cell is seen once per epoch")
    return rows
