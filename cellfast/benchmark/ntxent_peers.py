"""The losses that NT-Xent is compared with. Each takes projections z [2N, D] (row i's positive is row (i + N) mod 2N) and a temperature."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from cellfast.ops import ntxent_loss, ntxent_loss_reference

Loss = Callable[[torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True)
class Peer:
    """A loss, the largest M it is asked for (its memory grows as M², or as M²·D), and where it makes sense."""

    name: str
    make: Callable[[], Loss]
    largest_rows: int
    cuda_only: bool = False


def _compiled() -> Loss:
    torch._dynamo.reset()  # or the shapes measured before count against its limit of recompilations
    return torch.compile(ntxent_loss_reference, dynamic=False)


def broadcasting(z: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cosine similarities by broadcasting [M, 1, D] against [1, M, D], as the reference implementation writes them: O(M²·D) memory."""
    num_rows = z.shape[0]
    logits = F.cosine_similarity(z[:, None], z[None, :], dim=-1) / temperature
    logits = logits.masked_fill(torch.eye(num_rows, dtype=torch.bool, device=z.device), float("-inf"))
    return F.cross_entropy(logits, (torch.arange(num_rows, device=z.device) + num_rows // 2) % num_rows)


def chunked(z: torch.Tensor, temperature: float, rows_per_chunk: int = 4096) -> torch.Tensor:
    """Rows in chunks, each recomputed for the gradient: O(M · chunk) memory."""
    num_rows = z.shape[0]
    zhat = F.normalize(z.float(), dim=1).to(z.dtype)

    def part(first: int, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        index = torch.arange(first, first + rows.shape[0], device=z.device)
        logits = (rows @ columns.T).float() / temperature
        logits = logits.masked_fill(index[:, None] == torch.arange(num_rows, device=z.device), float("-inf"))
        return F.cross_entropy(logits, (index + num_rows // 2) % num_rows, reduction="sum")

    parts = [
        checkpoint(functools.partial(part, first), rows, zhat, use_reentrant=False)
        for first, rows in zip(range(0, num_rows, rows_per_chunk), zhat.split(rows_per_chunk))
    ]
    return torch.stack(parts).sum() / num_rows


class _TileWise(torch.autograd.Function):
    """Row blocks against column blocks with a running log-sum-exp; the gradient recomputes each tile for both its rows and its columns."""

    @staticmethod
    def forward(ctx, zhat: torch.Tensor, temperature: float, block: int) -> torch.Tensor:
        num_rows = zhat.shape[0]
        lse = torch.full((num_rows,), float("-inf"), device=zhat.device)
        for i, rows in zip(range(0, num_rows, block), zhat.split(block)):
            for j, columns in zip(range(0, num_rows, block), zhat.split(block)):
                logits = (rows @ columns.T).float() / temperature
                if i == j:
                    logits.fill_diagonal_(float("-inf"))
                lse[i : i + block] = torch.logaddexp(lse[i : i + block], torch.logsumexp(logits, 1))
        positive = (zhat.float() * zhat.roll(num_rows // 2, 0).float()).sum(1) / temperature
        ctx.save_for_backward(zhat, lse)
        ctx.temperature, ctx.block = temperature, block
        return (lse - positive).mean()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        zhat, lse = ctx.saved_tensors
        num_rows, block = zhat.shape[0], ctx.block
        total = -2 * zhat.roll(num_rows // 2, 0).float()
        for i, rows in zip(range(0, num_rows, block), zhat.split(block)):
            for j, columns in zip(range(0, num_rows, block), zhat.split(block)):
                logits = (rows @ columns.T).float() / ctx.temperature
                weights = (logits - lse[i : i + block, None]).exp_()
                if i == j:
                    weights.fill_diagonal_(0)
                weights = weights.to(zhat.dtype)
                total[i : i + block] += (weights @ columns).float()
                total[j : j + block] += (weights.T @ rows).float()
        return (grad / (num_rows * ctx.temperature) * total).to(zhat.dtype), None, None


def tile_wise(z: torch.Tensor, temperature: float, block: int = 8192) -> torch.Tensor:
    """Tile by tile, as Inf-CL does it (Cheng et al., 2024, arXiv 2410.17243), from library matrix products: O(M·D + block²) memory."""
    return _TileWise.apply(F.normalize(z.float(), dim=1).to(z.dtype), temperature, block)


def _lightly() -> Loss:
    from lightly.loss import NTXentLoss

    @functools.cache
    def module(temperature: float) -> torch.nn.Module:
        return NTXentLoss(temperature=temperature)

    return lambda z, temperature: module(temperature)(*z.chunk(2))


def _pytorch_metric_learning() -> Loss:
    from pytorch_metric_learning.losses import NTXentLoss

    def loss(z: torch.Tensor, temperature: float) -> torch.Tensor:
        cell = torch.arange(z.shape[0] // 2, device=z.device).repeat(2)
        return NTXentLoss(temperature=temperature)(z, cell)

    return loss


PEERS = (
    Peer("cellfast", lambda: ntxent_loss, 1 << 30),
    Peer("plain PyTorch", lambda: ntxent_loss_reference, 16384),
    Peer("torch.compile", _compiled, 16384),
    Peer("lightly", _lightly, 16384),
    Peer("pytorch-metric-learning", _pytorch_metric_learning, 512),
    Peer("broadcasting", lambda: broadcasting, 1024),
    Peer("chunked", lambda: chunked, 1 << 18, cuda_only=True),
    Peer("tile-wise (Inf-CL)", lambda: tile_wise, 1 << 18, cuda_only=True),
)
