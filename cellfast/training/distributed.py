"""Several processes training one model: start, agree, stop. One process needs none of it and pays for none of it."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cellfast.errors import CellfastError

# A lost peer closes its connection and is noticed at once; the limit is for one that hangs. It must exceed a validation on
# rank 0.
TIMEOUT = timedelta(minutes=30)


@dataclass
class Processes:
    """This process's place among those of ``torchrun``: rank of world_size, local_rank on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    started_here: bool = False
    control: Any = None

    @property
    def is_first(self) -> bool:
        """True on the one process that writes files and prints."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """True on all processes when ``flag`` is true on one of them."""
        if self.world_size == 1:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.control)
        return bool(value.item())

    def first_says(self, value: Any) -> Any:
        """Rank 0's ``value`` on all processes; plain values only."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def stop(self) -> None:
        """Leave the process group if `start_processes` made it."""
        if self.started_here and dist.is_initialized():
            dist.destroy_process_group()
            self.started_here = False


def start_processes(device: torch.device) -> Processes:
    """Join the process group that ``torchrun`` describes in the environment; a process started on its own is the only one.

    gloo on CPU, NCCL on CUDA; flags and small values travel over gloo in both cases.

    Raises:
        CellfastError: the group cannot be formed.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return Processes()
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    started_here = not dist.is_initialized()
    if started_here:
        backend = "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            if local_rank >= torch.cuda.device_count():
                raise CellfastError(
                    f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}. "
                    f"Use torchrun --nproc-per-node {torch.cuda.device_count()}"
                )
            torch.cuda.set_device(local_rank)
        try:
            dist.init_process_group(backend, timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise CellfastError(
                f"the {world_size} processes cannot form a group over {backend}: {error}. Start them with torchrun"
            ) from error
    control = dist.new_group(backend="gloo", timeout=TIMEOUT) if device.type == "cuda" else None
    return Processes(rank, world_size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), started_here, control)


def synchronise_gradients(module: nn.Module, processes: Processes, device: torch.device) -> nn.Module:
    """``module`` in `DistributedDataParallel`, which averages gradients over the processes; with one process ``module`` itself.

    BatchNorm statistics stay per process (rank 0's running averages are saved); only gradients are exchanged.
    """
    if processes.world_size == 1:
        return module
    ids = [device.index or 0] if device.type == "cuda" else None
    wrapped = nn.parallel.DistributedDataParallel
    # torch 2.15 renames the option; buffers are alike at the start either way, since every process has the same seed.
    renamed = "forward_sync_buffers" in inspect.signature(wrapped.__init__).parameters
    buffers = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return wrapped(module, device_ids=ids, gradient_as_bucket_view=True, **buffers)
