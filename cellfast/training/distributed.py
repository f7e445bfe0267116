"""Several processes training one model: start, agree, stop. One process needs none of it and pays for none of it."""

from __future__ import annotations

import gc
import inspect
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from cellfast.errors import CellfastError, option

# How long one exchange may take. It must exceed a validation on rank 0, during which the others wait.
TIMEOUT = timedelta(minutes=30)
# Beside the training the processes meet this often to see that all of them live, and one that does not come for so long is taken
# to hang.
BEAT_S = 5.0
SILENCE = timedelta(minutes=4)
# The training is left so long to find out for itself; after that the process ends from outside, since an exchange cannot be
# broken off.
GRACE_S = 5.0

T = TypeVar("T")


class Watch:
    """A thread that meets those of the other processes every few seconds, and ends this process when one of them is gone or
    stopped.

    It goes on while rank 0 validates or writes, so that waiting for that is no alarm.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.lost = ""
        self._group: dist.ProcessGroup | None = group
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cellfast-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watch on all processes: who comes here needs the others no more."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        group, self._group = self._group, None
        try:
            leaving = False
            while not leaving:
                self._over.wait(BEAT_S)
                # The barrier says who is missing; the sum, whether one is about to leave.
                dist.monitored_barrier(group, SILENCE, wait_all_ranks=True)
                flag = torch.tensor(int(self._over.is_set()))
                dist.all_reduce(flag, group=group)
                leaving = bool(flag.item())
        except RuntimeError as error:
            if self._over.is_set():
                return
            self.lost = lost_sentence(error)
        finally:
            del group
        if self.lost and not self._over.wait(GRACE_S):
            sys.stderr.write(f"Error: {self.lost}\n")
            sys.stderr.flush()
            os._exit(1)


def lost_sentence(error: BaseException) -> str:
    """What to tell of an exchange with the other processes that failed."""
    missing = re.search(r"[Rr]anks? ([\d, ]+?) failed to pass", str(error))
    who = f"process {missing[1]}" if missing else "another process"
    return (
        f"{who} of this training has ended or answers no more, so this one stopped too; what it says itself stands above or in "
        f"its own log. The same command with {option('resume', True)} goes on from the last checkpoint"
    )


def _is_of_an_exchange(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in text
        for sign in ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "monitoredBarrier")
    )


@dataclass
class Processes:
    """This process's place among those of ``torchrun``: rank of world_size, local_rank on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    started_here: bool = False
    control: Any = None
    watch: Watch | None = None

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

    def first_does(self, work: Callable[[], T]) -> T:
        """What ``work`` returns on rank 0, on all processes; a `CellfastError` of it is raised on all. Plain values only."""
        if self.world_size == 1:
            return work()
        box: list[Any] = [None, ""]
        if self.is_first:
            try:
                box[0] = work()
            except CellfastError as error:
                box[1] = str(error)
        dist.broadcast_object_list(box, src=0, group=self.control)
        if box[1]:
            raise CellfastError(box[1])
        return box[0]

    def lost(self, error: RuntimeError) -> CellfastError | None:
        """What to raise instead of ``error`` when it comes from an exchange in which another process was missing, else None."""
        if self.world_size == 1 or not ((self.watch and self.watch.lost) or _is_of_an_exchange(error)):
            return None
        return CellfastError((self.watch and self.watch.lost) or lost_sentence(error))

    def stop(self) -> None:
        """Leave the process group if `start_processes` made it; what used it must have been released."""
        if self.watch is not None:
            self.watch.stop()
            self.watch = None
        self.control = None
        # A reducer that outlives its group drops the last exchange while Python ends, which aborts the process; the frames of an
        # error on its way out hold it.
        error = sys.exc_info()[1] if self.world_size > 1 else None
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__
        gc.collect()
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
                    f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}. Use torchrun "
                    f"--nproc-per-node {torch.cuda.device_count()}"
                )
            torch.cuda.set_device(local_rank)
        try:
            dist.init_process_group(backend, timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise CellfastError(
                f"the {world_size} processes cannot form a group over {backend}: {error}. Start them with torchrun"
            ) from error
    control = dist.new_group(backend="gloo", timeout=TIMEOUT) if device.type == "cuda" else None
    watch = Watch(cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=SILENCE))) if started_here else None
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return Processes(rank, world_size, local_rank, local_world_size, started_here, control, watch)


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
    buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return wrapped(module, device_ids=ids, gradient_as_bucket_view=True, **buffers)
