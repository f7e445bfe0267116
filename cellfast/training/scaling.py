"""Which pixel values become 0 and 1 for each cell of a minibatch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cellfast.screens import Screen


class PlateScaling:
    """Global rows → (low, high): one pair [C] for the screen, or [B, C], each cell's own plate's."""

    def __init__(self, screen: Screen, method: str) -> None:
        low, high = screen.channel_scaling()
        self.low, self.high = torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)
        self._per_plate = method == "plate"
        self._there: tuple[Tensor, Tensor] | None = None
        self._offsets = torch.from_numpy(screen.offsets[1:].copy())
        self._lows = torch.tensor(np.stack([p.scale_low for p in screen.plates]), dtype=torch.float32)
        self._highs = torch.tensor(np.stack([p.scale_high for p in screen.plates]), dtype=torch.float32)

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if not self._per_plate:
            return self.low, self.high
        plate = torch.searchsorted(self._offsets, rows, right=True)
        return self._lows[plate], self._highs[plate]

    def on(self, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """The same on ``device``: the screen's pair is sent once, each cell's own from pinned memory; the host does not wait."""
        if device.type == "cpu":
            return self(rows)
        if not self._per_plate:
            if self._there is None or self._there[0].device != device:
                self._there = (self.low.to(device), self.high.to(device))
            return self._there
        low, high = self(rows)
        return low.pin_memory().to(device, non_blocking=True), high.pin_memory().to(device, non_blocking=True)
