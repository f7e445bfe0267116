"""Cuts windows out of planes that lie on the device: the planes cross the bus once, the crops never do."""

from __future__ import annotations

import torch


def cut_on_device(planes: torch.Tensor, origins: torch.Tensor, size: int, border: str) -> torch.Tensor:
    """Windows [n, C, s, s] of planes [C, H, W] (uint8 or uint16) whose first rows and columns are ``origins`` int64 [n, 2].

    Equivalent to `cellfast.screens.cutting.cut_crops`: ``pad`` gives 0 outside the field, ``reflect`` mirrors it.
    """
    channels, height, width = planes.shape
    steps = torch.arange(size, device=planes.device)
    y, x = origins[:, :1] + steps, origins[:, 1:] + steps  # [n, s]
    outside = None
    if border == "reflect":
        y, x = _reflected(y, height), _reflected(x, width)
    else:
        outside = ((y < 0) | (y >= height))[:, :, None] | ((x < 0) | (x >= width))[:, None, :]
        y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    # Few operations know uint16; moving bytes is the same for int16.
    stored = planes.view(torch.int16) if planes.dtype == torch.uint16 else planes
    index = (y[:, :, None] * width + x[:, None, :]).reshape(-1)
    windows = stored.reshape(channels, -1).index_select(1, index).view(channels, len(origins), size, size)
    if outside is not None:
        windows = windows.masked_fill(outside, 0)
    windows = windows.transpose(0, 1).contiguous()
    return windows.view(torch.uint16) if planes.dtype == torch.uint16 else windows


def _reflected(index: torch.Tensor, length: int) -> torch.Tensor:
    if length == 1:
        return torch.zeros_like(index)
    period = 2 * (length - 1)
    index = index.abs() % period
    return torch.minimum(index, period - index)
