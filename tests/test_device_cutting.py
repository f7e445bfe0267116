"""Cells cut out of planes where these lie: the pixels of plain cutting."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cellfast.data.device_cutting import cut_on_device
from cellfast.screens.cutting import crop_origins, cut_crops


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint8])
@pytest.mark.parametrize("border", ["pad", "reflect"])
@pytest.mark.parametrize("size", [1, 9, 16, 120])
def test_cells_are_cut_as_on_the_host(device, dtype, border, size):
    """Windows inside, over the edge, wholly outside, and wider than the field, which is then reflected more than once."""
    rng = np.random.default_rng(1)
    planes = rng.integers(0, np.iinfo(dtype).max, (3, 40, 50), dtype=dtype)
    origins = crop_origins(rng.uniform(-0.5, 39.5, 30), rng.uniform(-0.5, 49.5, 30), size)
    origins[5:8] += [[-300, 4], [7, 300], [-90, 90]]
    crops = cut_on_device(torch.from_numpy(planes).to(device), torch.from_numpy(origins).to(device), size, border)
    assert crops.device.type == device
    assert crops.is_contiguous()
    np.testing.assert_array_equal(crops.cpu().numpy(), cut_crops(list(planes), origins, size, border=border))
    none = cut_on_device(torch.from_numpy(planes).to(device), torch.zeros((0, 2), dtype=torch.int64, device=device), size, border)
    assert none.shape == (0, 3, size, size)
    row = cut_on_device(torch.from_numpy(planes[:, :1].copy()).to(device), torch.from_numpy(origins).to(device), size, border)
    np.testing.assert_array_equal(row.cpu().numpy(), cut_crops(list(planes[:, :1].copy()), origins, size, border=border))
