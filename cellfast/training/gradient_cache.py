"""Large minibatches in pieces: the loss sees every projection, the encoder one piece at a time, and the gradients are the
same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cellfast.augment import TwoViews


class ViewPieces:
    """The views of a minibatch, made a piece of its cells at a time; asking for a piece again makes the same views again.

    Pieces differ by at most one cell. Joined, they are ``two_views(crops, low, high, seed=seed)``: the draws are those of the
    whole minibatch.
    """

    def __init__(self, two_views: TwoViews, crops: Tensor, low: Tensor, high: Tensor, *, seed: int, chunk_size: int) -> None:
        self._two_views, self._crops, self._low, self._high = two_views, crops, low, high
        self.num_cells = crops.shape[0]
        count = -(-self.num_cells // chunk_size)
        edges = np.linspace(0, self.num_cells, count + 1).round().astype(int).tolist()
        self.cells = [slice(first, last) for first, last in pairwise(edges)]
        self._parameters = two_views.draw(self.num_cells, seed)

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, piece: int) -> Tensor:
        """Views [2k, C, s, s] of the k cells of ``piece``, first views first."""
        cells = self.cells[piece]
        low, high = (bound if bound.ndim == 1 else bound[cells] for bound in (self._low, self._high))
        return self._two_views.apply(self._crops[cells], low, high, self._parameters.of_cells(cells))


class GradientCache:
    """Forward and backward of a minibatch given as :class:`ViewPieces`.

    Equivalent, for a module whose rows do not depend on one another, to ``loss(module(torch.cat(views))).backward()``: the first
    pass gives all projections z without their graphs, the loss gives ∂L/∂z, and the second pass encodes each piece again and
    sends its rows of ∂L/∂z back. BatchNorm's statistics are those of a piece, the same in both passes; its running averages are
    moved by the second pass only, once per piece.

    Args:
        module: stacked views → z; in `DistributedDataParallel` gradients are exchanged once, with the last piece.
        encode: views → z as the training step computes it (autocast, dtype of the loss), given the module to use.
        loss: z → scalar.

    Source: Gao et al. 2021 (GradCache, arXiv 2101.06983).
    """

    def __init__(
        self, module: nn.Module, encode: Callable[[nn.Module, Tensor], Tensor], loss: Callable[[Tensor], Tensor]
    ) -> None:
        self.module, self.encode, self.loss = module, encode, loss
        self._pending: tuple[ViewPieces, Tensor] | None = None

    def compute_loss(self, pieces: ViewPieces) -> Tensor:
        """The loss of the whole minibatch; call :meth:`backward` with it before the next."""
        module = self.module
        inner = module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module
        with torch.no_grad(), _batch_norm_remembers_nothing(inner):
            parts = [self.encode(inner, pieces[number]) for number in range(len(pieces))]
        # [2B, D] with the first views of all cells first, as the loss pairs them.
        halves = [part.unflatten(0, (2, -1)) for part in parts]
        z = torch.cat(halves, dim=1).flatten(0, 1).detach().requires_grad_()
        self._pending = (pieces, z)
        return self.loss(z)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss`` to those of the module's parameters."""
        assert self._pending is not None, "compute_loss comes first"
        (pieces, z), self._pending = self._pending, None
        loss.backward()
        assert z.grad is not None
        gradient = z.grad.unflatten(0, (2, -1))
        for number, cells in enumerate(pieces.cells):
            last = number + 1 == len(pieces)
            shared = self.module if isinstance(self.module, nn.parallel.DistributedDataParallel) else None
            with nullcontext() if shared is None or last else shared.no_sync():
                part = self.encode(self.module, pieces[number])
                part.backward(gradient[:, cells].flatten(0, 1))


@contextmanager
def _batch_norm_remembers_nothing(module: nn.Module) -> Iterator[None]:
    """BatchNorm in training mode normalises by the minibatch and leaves its running averages alone."""
    # Not momentum = 0: an infinity times 0 would enter the averages as NaN, and the minibatch counter would still move.
    tracking = [
        layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.training and layer.track_running_stats
    ]
    for layer in tracking:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in tracking:
            layer.track_running_stats = True
