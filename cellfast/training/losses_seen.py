"""Losses read some steps after they were computed, so that the host never waits for the device."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

DELAY = 4


class LossReader:
    """Gives each step's loss back as a number: at once on a CPU, on a GPU `DELAY` steps later.

    The delay is fixed, not "when it is ready": every process of a group learns of a NaN at the same step. It also bounds how far
    the host runs ahead.
    """

    def __init__(self, device: torch.device, delay: int = DELAY) -> None:
        self._cuda = device.type == "cuda"
        self._delay = delay
        self._waiting: deque[tuple[int, Tensor, Any]] = deque()
        self._free = [torch.empty((), pin_memory=True) for _ in range(delay + 1)] if self._cuda else []

    def put(self, step: int, loss: Tensor) -> list[tuple[int, float]]:
        """Take the loss of ``step`` and return (step, loss) of those that are due, oldest first."""
        loss = loss.detach()
        if not self._cuda:
            return [(step, float(loss))]
        host = self._free.pop()
        host.copy_(loss, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._waiting.append((step, host, copied))
        return self._take(self._delay)

    def drain(self) -> list[tuple[int, float]]:
        """(step, loss) of all that were not given back yet; waits for the device."""
        return self._take(0)

    def _take(self, keep: int) -> list[tuple[int, float]]:
        due = []
        while len(self._waiting) > keep:
            step, host, copied = self._waiting.popleft()
            copied.synchronize()
            due.append((step, float(host)))
            self._free.append(host)
        return due
