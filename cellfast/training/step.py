"""One training step: views → encoder and head → NT-Xent → gradients → optimiser."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from cellfast.models import SimCLR


class TwoViewModel(nn.Module):
    """Projections z of stacked views, with BatchNorm over both views or over each.

    Equivalent to ``model(views)[1]``, or with ``per_view`` to ``torch.cat([model(view)[1] for view in views.chunk(2)])``:
    BatchNorm statistics
    per view, as in the reference implementation of Perakis et al. (its running averages see the views one after the other).
    """

    def __init__(self, model: SimCLR, per_view: bool) -> None:
        super().__init__()
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
    ) -> None:
        self.module, self.loss, self.optimizer = module, loss, optimizer
        self.device, self.amp, self.clip_grad_norm = device, amp, clip_grad_norm

    def compute_loss(self, views: Tensor) -> Tensor:
        """The loss of a minibatch of views, with its graph."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            z = self.module(views)
        # On a CPU the loss is a small part and float32 costs nothing; on a GPU the operator's bfloat16 kernels are the fast ones.
        return self.loss(z.float() if self.device.type == "cpu" else z)

    def update(self, loss: Tensor) -> None:
        """Gradients of ``loss`` and one optimiser step."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_grad_norm)
        self.optimizer.step()
