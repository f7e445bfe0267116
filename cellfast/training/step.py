"""One training step: views → encoder and head → NT-Xent → gradients → optimiser."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from cellfast.augment import TwoViews
from cellfast.models import SimCLR
from cellfast.ops.small_maps import use_small_maps
from cellfast.training.gradient_cache import GradientCache, ViewPieces


class TwoViewModel(nn.Module):
    """Projections z of stacked views, with BatchNorm over both views or over each.

    Equivalent to ``model(views)[1]``, or with ``per_view`` to ``torch.cat([model(view)[1] for view in views.chunk(2)])``:
    BatchNorm statistics
    per view, as in the reference implementation of Perakis et al. (its running averages see the views one after the other).
    """

    def __init__(self, model: SimCLR, per_view: bool) -> None:
        super().__init__()
        # On a CPU the last maps of small crops are then convolved as matrix products.
        use_small_maps(model)
        self.model, self.per_view = model, per_view

    def forward(self, views: Tensor) -> Tensor:
        """z, [2B, D], of views [2B, C, s, s]: rows 0:B the first view of every cell, B:2B the second."""
        if not self.per_view:
            return self.model(views)[1]
        return torch.cat([self.model(view)[1] for view in views.chunk(2)])


def views_seed(seed: int, step: int, rank: int) -> int:
    """The seed of the views of one step on one process; other steps, ranks and run seeds give unrelated ones."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


class TrainingStep:
    """Forward, backward and update for one minibatch of views.

    Args:
        module: stacked views [2B, C, s, s] → z [2B, D] (a `TwoViewModel`, perhaps compiled or wrapped for several processes).
        loss: z → scalar.
        optimizer: its gradients are dropped, not zeroed, before each backward pass.
        amp: bfloat16 autocast of the forward pass. No loss scaling: bfloat16 has float32's range.
        clip_grad_norm: clip the gradient's norm to this.
        chunk_size: encode the minibatch in pieces of so many cells (see `GradientCache`); None: at once.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        amp: bool = False,
        clip_grad_norm: float | None = None,
        chunk_size: int | None = None,
    ) -> None:
        self.module, self.loss, self.optimizer = module, loss, optimizer
        self.device, self.amp, self.clip_grad_norm, self.chunk_size = device, amp, clip_grad_norm, chunk_size
        self._cache = None if chunk_size is None else GradientCache(module, self._encode, loss)

    def views(self, two_views: TwoViews, crops: Tensor, low: Tensor, high: Tensor, *, seed: int) -> Tensor | ViewPieces:
        """The views of a minibatch in the form that :meth:`compute_loss` takes: all of them, or a piece when it is asked for."""
        if self.chunk_size is None:
            return two_views(crops, low, high, seed=seed)
        return ViewPieces(two_views, crops, low, high, seed=seed, chunk_size=self.chunk_size)

    def compute_loss(self, views: Tensor | ViewPieces) -> Tensor:
        """The loss of a minibatch of views, with its graph."""
        if isinstance(views, ViewPieces):
            assert self._cache is not None
            return self._cache.compute_loss(views)
        return self.loss(self._encode(self.module, views))

    def update(self, loss: Tensor) -> None:
        """Gradients of ``loss`` and one optimiser step."""
        self._backward(loss)
        if self.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_grad_norm)
        self.optimizer.step()

    def _encode(self, module: nn.Module, views: Tensor) -> Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            z = module(views)
        # On a CPU the loss is a small part and float32 costs nothing; on a GPU the operator's bfloat16 kernels are the fast ones.
        return z.float() if self.device.type == "cpu" else z

    def _backward(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self._cache is None:
            loss.backward()
        else:
            self._cache.backward(loss)
