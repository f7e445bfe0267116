"""Cells cut out of decoded fields where the fields lie, a minibatch in one gather: the pixels of ``cellfast.screens.cutting``."""

from __future__ import annotations

import torch
from torch import Tensor

from cellfast.errors import CellfastError


def cut_cells(fields: Tensor, field: Tensor, origins: Tensor, crop_size: int, *, border: str = "pad") -> Tensor:
    """Crops [k, C, S, S] out of fields [n, C, H, W] of the same device and dtype; on a GPU nothing waits for the host.

    Equivalent to ``cellfast.screens.cutting.cut_crops(fields[field[i]], origins[i], crop_size, border=border)`` for each i.

    Args:
        fields: uint8 or uint16.
        field: int64 [k], the field of each cell.
        origins: int64 [k, 2], first row and column of each crop (`cellfast.screens.cutting.crop_origins`).
        border: ``pad`` (0 outside the field) or ``reflect`` (mirrored without repeating the edge pixel).

    Raises:
        CellfastError: another border or dtype.
    """
    if border not in ("pad", "reflect"):
        raise CellfastError(f"border must be pad or reflect, got {border!r}")
    if fields.dtype not in (torch.uint8, torch.uint16):
        raise CellfastError(f"fields must be uint8 or uint16, got {fields.dtype}")
    device, channels = fields.device, fields.shape[1]
    # A gather only moves bits: the signed type has the operators that uint16 lacks.
    pixels = fields.view(torch.int16) if fields.dtype == torch.uint16 else fields
    span = torch.arange(crop_size, device=device)
    places, inside = [], []
    for axis in range(2):
        extent = fields.shape[2 + axis]
        place = origins[:, axis, None] + span
        inside.append((place >= 0) & (place < extent))
        if border == "reflect":
            period = max(1, 2 * (extent - 1))
            place = place.abs() % period
            places.append(torch.minimum(place, period - place) if extent > 1 else place * 0)
        else:
            places.append(place.clamp(0, extent - 1))
    rows, columns = places
    channel = torch.arange(channels, device=device)
    crops = pixels[field[:, None, None, None], channel[None, :, None, None], rows[:, None, :, None], columns[:, None, None, :]]
    if border == "pad":
        # Multiplied, not filled where a mask says so: one pass, and no wait for the mask's count.
        crops *= (inside[0][:, None, :, None] & inside[1][:, None, None, :]).to(crops.dtype)
    return crops.view(fields.dtype)
