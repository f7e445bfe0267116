"""NT-Xent as a module: over one process, or over the global minibatch of a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cellfast.ops import ntxent_loss
from cellfast.ops.ntxent import NO_DOUBLE_BACKWARD


def _gather(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def _check_equal_shapes(z: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Every rank learns every rank's shape, so that all of them raise the same error instead of some of them waiting for ever."""
    odd = z.dim() != 2 or z.shape[0] % 2 or not z.numel()
    shape = torch.tensor(list(z.shape) if z.dim() == 2 else [-1, -1], dtype=torch.int64, device=z.device)
    shapes = [part.tolist() for part in _gather(shape, group)]
    if any(other != shapes[0] for other in shapes) or odd:
        found = ", ".join(f"rank {rank}: {rows}" for rank, rows in enumerate(shapes))
        raise ValueError(
            f"z must have the same shape [2n, D] with an even row count on every rank, got {found}. Drop the last, smaller "
            "minibatch of an epoch (drop_last)."
        )


class _GlobalNTXent(torch.autograd.Function):
    """NT-Xent over all ranks' rows: ẑ, lse and the row losses are gathered; the gradient of the local rows then needs no
    communication.

    The local gradient is multiplied by the world size, because DistributedDataParallel averages gradients over ranks: the average
    is then the gradient one process would have had with the global minibatch.
    """

    @staticmethod
    def forward(
        ctx: Any, z: torch.Tensor, temperature: torch.Tensor, normalize: bool, group: dist.ProcessGroup | None
    ) -> torch.Tensor:
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        local, inv_norm = torch.ops.cellfast.ntxent_normalize(z, normalize)
        parts = _gather(local, group)
        half = local.shape[0] // 2
        zhat = torch.cat([part[:half] for part in parts] + [part[half:] for part in parts])
        row_loss, lse = torch.ops.cellfast.ntxent_shard_forward(zhat, temperature, rank, world)
        losses, lses = zip(*(part.unbind(0) for part in _gather(torch.stack((row_loss, lse)), group)))
        all_lse = torch.cat([part[:half] for part in lses] + [part[half:] for part in lses])
        ctx.save_for_backward(zhat, inv_norm, all_lse, temperature)
        ctx.normalize, ctx.rank, ctx.world, ctx.dtype = normalize, rank, world, z.dtype
        return torch.stack(losses).mean().to(torch.float64 if z.dtype == torch.float64 else torch.float32)

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(NO_DOUBLE_BACKWARD)
        zhat, inv_norm, lse, temperature = ctx.saved_tensors
        grad_z, grad_temperature = torch.ops.cellfast.ntxent_shard_backward(
            grad_loss * ctx.world, zhat, inv_norm, lse, temperature, ctx.normalize, ctx.rank, ctx.world, ctx.dtype
        )
        return grad_z, grad_temperature, None, None


class NTXentLoss(nn.Module):
    """NT-Xent of projections [2n, D]; over the global minibatch when a process group is initialised.

    Equals ``cellfast.ops.ntxent_loss`` of all ranks' rows (all first views, then all second views), on every rank. Under
    DistributedDataParallel the averaged parameter gradients equal those of one process with the global minibatch.

    Args:
        temperature: a positive number; a parameter of the module where ``learnable``.
        gather: False keeps each rank to its own rows (the negatives are then only the rank's own cells).
        normalize: False takes the rows as they are.
        learnable: make the temperature a parameter.
        group: the process group; None is the default group.

    Raises:
        ValueError: ``temperature`` is not a positive finite number; ``z`` is not [2n, D] or differs in shape between ranks.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        gather: bool = True,
        *,
        normalize: bool = True,
        learnable: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be a positive finite number, got {temperature}")
        self.gather, self.normalize, self.group = gather, normalize, group
        # A plain number, not a buffer: module.to(torch.bfloat16) would round a buffer.
        self.temperature = nn.Parameter(torch.tensor(float(temperature))) if learnable else float(temperature)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """The loss of ``z`` [2n, D] (rows 0:n first views, n:2n second views of the same cells), a scalar."""
        if self.gather and dist.is_available() and dist.is_initialized() and dist.get_world_size(self.group) > 1:
            _check_equal_shapes(z, self.group)
            temperature = torch.as_tensor(self.temperature, dtype=torch.float64, device=z.device)
            return _GlobalNTXent.apply(z, temperature, self.normalize, self.group)
        return ntxent_loss(z, self.temperature, normalize=self.normalize)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"temperature={float(self.temperature):g}, gather={self.gather}, normalize={self.normalize}"
