"""The crop store through DALI: the pixels that the memory maps give, cell for cell."""

from __future__ import annotations

import builtins
import sys

import numpy as np
import pytest
import torch
from screens import all_crops, collect, raw_screen

from cellfast.data import Loader
from cellfast.errors import CellfastError

pytest.importorskip("nvidia.dali")


@pytest.mark.parametrize("dtype", [np.uint16, np.uint8])
@pytest.mark.parametrize("options", [{"shuffle": True, "seed": 5}, {"shuffle": False}, {"drop_last": True}])
def test_the_same_pixels_as_memory_maps_for_the_same_rows(tmp_path, dtype, options):
    screen = raw_screen(tmp_path, channels=5, size=12, dtype=dtype)
    dali, mmap = Loader(screen, 4, backend="dali", **options), Loader(screen, 4, backend="mmap", **options)
    for _ in range(2):  # two epochs through one pipeline
        crops, rows = collect(dali)
        expected, expected_rows = collect(mmap)
        np.testing.assert_array_equal(rows, expected_rows)
        assert crops.dtype == dtype
        np.testing.assert_array_equal(crops, expected)
    assert next(iter(dali)).crops.dtype == torch.from_numpy(expected).dtype


def test_a_break_and_a_restored_state_go_on_in_the_same_way(tmp_path):
    screen = raw_screen(tmp_path)
    expected = collect(Loader(screen, 3, seed=1))
    loader = Loader(screen, 3, seed=1, backend="dali")
    crops, rows = [], []
    for batch in loader:
        crops.append(batch.crops.numpy().copy())
        rows.append(batch.rows.numpy())
        if len(rows) == 3:
            break
    state = loader.state_dict()
    loader.load_state_dict(state)  # the same loader: its pipeline was left with minibatches under way
    rest = collect(loader)
    np.testing.assert_array_equal(np.concatenate((*rows, rest[1])), expected[1])
    np.testing.assert_array_equal(np.concatenate((*crops, rest[0])), expected[0])


def test_a_rank_without_rows_gets_an_empty_batch(tmp_path):
    screen = raw_screen(tmp_path, counts=(9,))
    for rank in range(4):
        dali = [batch.rows.tolist() for batch in Loader(screen, 2, rank=rank, world_size=4, backend="dali")]
        assert dali == [batch.rows.tolist() for batch in Loader(screen, 2, rank=rank, world_size=4)]
        assert len(dali) == 2


def test_batches_stay_as_they_are_until_the_next_is_asked_for(tmp_path):
    screen = raw_screen(tmp_path, counts=(100,))
    expected = all_crops(screen)
    for batch in Loader(screen, 4, backend="dali", prefetch=3):
        np.testing.assert_array_equal(batch.crops.numpy(), expected[batch.rows.numpy()])


def test_without_dali_the_message_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("nvidia.dali"):
            raise ImportError("No module named 'nvidia.dali'")
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith("nvidia.dali")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CellfastError, match="pip install nvidia-dali"):
        Loader(raw_screen(tmp_path), 4, backend="dali")


@pytest.mark.cuda
def test_the_same_pixels_on_a_gpu(tmp_path):
    screen = raw_screen(tmp_path, counts=(300,))
    expected = torch.from_numpy(all_crops(screen).astype(np.int32)).cuda()
    for batch in Loader(screen, 16, backend="dali", device="cuda"):
        assert batch.crops.is_cuda
        assert torch.equal(batch.crops.to(torch.int32), expected[batch.rows.cuda()])
