"""NT-Xent over a process group: the ranks' averaged gradients are one process's gradients."""

from __future__ import annotations

import gc
import os
import socket

import pytest
import torch
import torch.distributed as dist
from forked import start_ranks
from torch.testing import assert_close

from cellfast.losses import NTXentLoss
from cellfast.ops import ntxent_loss


def _network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))


def _cells(world: int, per_rank: int) -> torch.Tensor:
    """[2, world · per_rank, 6]: two views of each cell of the global minibatch."""
    return torch.randn(2, world * per_rank, 6, generator=torch.Generator().manual_seed(1))


def _rank(rank: int, world: int, port: int, folder: str, shape_differs: bool) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        _loss_of_a_part(rank, world, folder, shape_differs)
    finally:
        # What averages gradients must be gone before the group: it would drop its last exchange while Python ends, which aborts.
        gc.collect()
        dist.destroy_process_group()


def _loss_of_a_part(rank: int, world: int, folder: str, shape_differs: bool) -> None:
    per_rank = 5
    cells = _cells(world, per_rank)[:, rank * per_rank : (rank + 1) * per_rank]
    if shape_differs and rank == 1:
        cells = cells[:, :-1]
    network = torch.nn.parallel.DistributedDataParallel(_network())
    criterion = NTXentLoss(0.2, learnable=True)
    try:
        loss = criterion(network(cells.flatten(0, 1)))
    except ValueError as error:
        torch.save({"error": str(error)}, f"{folder}/{rank}.pt")
        return
    loss.backward()
    temperature = criterion.temperature.grad.clone()
    dist.all_reduce(temperature)
    torch.save(
        {"loss": loss.detach(), "grads": [p.grad for p in network.parameters()], "temperature": temperature / world},
        f"{folder}/{rank}.pt",
    )


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_equal_one_process(tmp_path, world):
    start_ranks(_rank, world, _free_port(), str(tmp_path), False, processes=world)
    network, criterion = _network(), NTXentLoss(0.2, learnable=True)
    loss = criterion(network(_cells(world, 5).flatten(0, 1)))
    loss.backward()
    for rank in range(world):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert_close(found["loss"], loss.detach(), rtol=1e-6, atol=1e-6)
        for got, expected in zip(found["grads"], network.parameters()):
            assert_close(got, expected.grad, rtol=1e-4, atol=1e-7)
        assert_close(found["temperature"], criterion.temperature.grad, rtol=1e-5, atol=1e-6)


def test_ranks_of_different_sizes_all_say_so(tmp_path):
    start_ranks(_rank, 2, _free_port(), str(tmp_path), True)
    for rank in range(2):
        error = torch.load(tmp_path / f"{rank}.pt", weights_only=True)["error"]
        assert "same shape" in error
        assert "rank 1: [8, 8]" in error


def test_without_a_group_it_is_the_operator():
    z = torch.randn(12, 5)
    assert_close(NTXentLoss(0.3)(z), ntxent_loss(z, 0.3), rtol=0, atol=0)
    with pytest.raises(ValueError, match="temperature"):
        NTXentLoss(0.0)
