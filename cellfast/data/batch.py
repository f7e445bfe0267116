"""What the ways to read cells hand out."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Batch(NamedTuple):
    """A minibatch: ``crops`` uint8 or uint16 [B, C, S, S] on the loader's device, ``rows`` int64 [B], global rows, on the CPU."""

    crops: torch.Tensor
    rows: torch.Tensor
