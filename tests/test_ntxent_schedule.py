"""The CUDA kernels without a GPU: index logic, and the kernels' own source run on the CPU by an emulation of one thread block."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
MULTIPROCESSORS = 132
SHARED_LIMIT = 227 * 1024
LOG2E = 1.4426950408889634


def compile_library(name: str, folder: Path, *include: str) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (c++, g++, clang++) on PATH")
    library = folder / f"{name}.so"
    tests = ROOT / "tests" / "emulation"
    flags = ["-std=c++20", "-O2", "-Wall", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    folders = [f"-I{folder}" for folder in (*(tests / i for i in include), tests, ROOT / "csrc")]
    built = subprocess.run(
        [compiler, *flags, *folders, str(tests / f"{name}.cpp"), "-o", str(library)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.failure.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = compile_library("ntxent_sm90", tmp_path_factory.mktemp("sm90"))
    loaded.forward_places.restype = loaded.padded_place.restype = ctypes.c_int64
    loaded.loss_of.restype = ctypes.c_double
    loaded.loss_of.argtypes = [ctypes.c_double] * 3
    loaded.repair_needed.argtypes = [ctypes.c_double] * 3 + [ctypes.c_int]
    return loaded


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_library("ntxent_portable", tmp_path_factory.mktemp("portable"), "portable")


def int64(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def visits(
    kernels, num_rows: int, dim: int, shard: int = 0, shards: int = 1, phase: int = 0, multiprocessors: int = MULTIPROCESSORS
):
    out = np.zeros(7, np.int64)
    arguments = [*int64(num_rows, dim, shard, shards), multiprocessors, phase, pointer(out)]
    kernels.forward_visits(*arguments, None)
    counts = np.zeros((out[2], out[3]), np.uint8)
    kernels.forward_visits(*arguments, pointer(counts))
    assert kernels.failure() is None
    return out, counts


@pytest.mark.parametrize("dim", [64, 256, 512])
@pytest.mark.parametrize("phase", [0, 2, 6])
@pytest.mark.parametrize("num_rows", [2, 128, 130, 514, 4096, 8192, 20002])
def test_every_pair_of_blocks_is_covered_once(kernels, num_rows, phase, dim):
    (row_tile, column_tile, *_), counts = visits(kernels, num_rows, dim, phase=phase)
    ratio = row_tile // column_tile
    rows, columns = np.indices(counts.shape)
    # At and right of the diagonal block once, left of it never: those are the mirror images.
    assert np.array_equal(counts, (columns >= rows * ratio).astype(np.uint8))


@pytest.mark.parametrize(("num_rows", "shards"), [(8, 2), (1536, 3), (8192, 8)])
def test_a_shard_meets_all_columns_once(kernels, num_rows, shards):
    for shard in range(shards):
        _, counts = visits(kernels, num_rows, 128, shard, shards)
        assert (counts == 1).all()


@pytest.mark.parametrize(("num_rows", "dim"), [(8192, 128), (65536, 128), (65536, 512), (262144, 256), (1 << 20, 128)])
def test_workers_get_equal_numbers_of_tiles(kernels, num_rows, dim):
    out = np.zeros(7, np.int64)
    kernels.forward_visits(*int64(num_rows, dim, 0, 1), MULTIPROCESSORS, 0, pointer(out), None)
    _, _, row_blocks, column_blocks, longest, shortest, loads = out
    ratio = column_blocks / row_blocks
    tiles = sum(column_blocks - int(i * ratio) for i in range(row_blocks))
    assert longest <= tiles / MULTIPROCESSORS * 1.01 + 1
    assert shortest >= tiles / MULTIPROCESSORS * 0.99 - 1
    assert loads <= tiles / 3  # rows are loaded for runs of tiles, not for every tile


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("tile", [64, 128, 256])
def test_row_blocks_hold_every_local_row_once(kernels, tile, shards):
    num_rows = 6 * 130
    held = []
    for shard in range(shards):
        per_range = num_rows // shards // (1 if shards == 1 else 2)
        blocks = -(-per_range // tile) * (1 if shards == 1 else 2)
        table = np.zeros((blocks, 3), np.int64)
        kernels.row_block_table(*int64(num_rows, shard, shards), tile, pointer(table))
        local = np.concatenate([np.arange(start, start + valid) for start, _, valid in table])
        assert np.array_equal(local, np.arange(num_rows // shards))
        held.append(np.concatenate([np.arange(start, start + valid) for _, start, valid in table]))
    assert np.array_equal(np.sort(np.concatenate(held)), np.arange(num_rows))


@pytest.mark.parametrize("num_rows", [2, 6, 130, 258, 1000])
@pytest.mark.parametrize(("row_tile", "columns"), [(256, 128), (128, 128), (64, 64), (64, 48)])
def test_tiles_called_ordinary_hold_no_self_no_positive_no_edge(kernels, num_rows, row_tile, columns):
    for first_row in range(0, num_rows, row_tile):
        for first_column in range(0, num_rows, columns):
            i = np.arange(first_row, first_row + row_tile)[:, None]
            j = np.arange(first_column, first_column + columns)[None]
            odd = (i == j) | (abs(i - j) == num_rows // 2) | (i >= num_rows) | (j >= num_rows)
            valid = min(row_tile, num_rows - first_row)
            told = kernels.special(first_row, valid, row_tile, first_column, columns, num_rows)
            assert bool(told) >= bool(odd.any())


def test_swizzle_is_a_permutation_without_bank_conflicts(kernels):
    """Within 1024 bytes every byte has its own place, and the eight 16-byte units of one column of eight rows lie in different banks."""
    out = np.zeros(8192, np.uint32)
    kernels.swizzled(pointer(out), 8192)
    assert np.array_equal(np.sort(out), np.arange(8192))
    assert np.array_equal(out // 1024, np.arange(8192) // 1024)
    for unit in range(8):
        assert len({int(out[row * 128 + unit * 16]) // 16 % 8 for row in range(8)}) == 8


@pytest.mark.parametrize("registers", [24, 32, 64, 128])
def test_accumulators_cover_the_tile(kernels, registers):
    layout = np.zeros((128 * registers, 2), np.int32)
    kernels.accumulator_layout(registers, pointer(layout))
    assert len({tuple(place) for place in layout}) == 64 * 2 * registers
    assert layout.min() == 0
    assert layout[:, 0].max() == 63
    assert layout[:, 1].max() == 2 * registers - 1


def test_lanes_end_with_all_column_sums(kernels):
    columns = np.zeros((32, 4), np.int32)
    kernels.reduced_columns(pointer(columns))
    assert np.array_equal(np.sort(columns.ravel()), np.arange(128))
    assert ((columns[:, 1] == columns[:, 0] + 1) & (columns[:, 3] == columns[:, 2] + 1) & (columns[:, 0] % 2 == 0)).all()


def test_shared_memory_fits(kernels):
    for dim in range(1, 513):
        out = np.zeros(4, np.int64)
        kernels.shared_bytes(ctypes.c_int64(dim), pointer(out))
        forward, forward_stages, backward, backward_stages = out
        assert forward <= SHARED_LIMIT
        assert backward <= SHARED_LIMIT
        assert 2 <= forward_stages <= 8
        assert 3 <= backward_stages <= 8


@pytest.mark.parametrize(("blocks", "tiles"), [(1, 1), (1, 7), (64, 64), (512, 512), (2048, 4096)])
def test_splits_cut_the_columns_into_parts_of_nearly_equal_size(kernels, blocks, tiles):
    begins = np.zeros(64, np.int64)
    count = kernels.splits(*int64(blocks, tiles, MULTIPROCESSORS, 32), pointer(begins))
    sizes = np.diff(begins[: count + 1])
    assert begins[0] == 0
    assert begins[count] == tiles
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= 1
    if blocks == 64:
        assert count == 2  # 128 of 132 multiprocessors busy instead of 64


def bfloat16(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bits and the values after rounding to nearest even."""
    wide = values.astype(np.float32).view(np.uint32)
    bits = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def projections(num_rows: int, dim: int, hard: float = 0.3) -> tuple[np.ndarray, np.ndarray, int]:
    """Normalised rows as bfloat16 with a row stride of whole 16 bytes (what lies between D and the stride is NaN: nothing may read it)."""
    random = np.random.default_rng(num_rows * 1000 + dim)
    z = random.standard_normal((num_rows, dim))
    z[num_rows // 2 :] = hard * z[: num_rows // 2] + (1 - hard) * z[num_rows // 2 :]
    bits, values = bfloat16(z / np.linalg.norm(z, axis=1, keepdims=True))
    stride = -(-dim // 8) * 8
    stored = np.full((num_rows, stride), 0x7FFF, np.uint16)
    stored[:, :dim] = bits
    return stored, values, stride


def local_rows(num_rows: int, shard: int, shards: int) -> np.ndarray:
    views = np.arange(num_rows).reshape(2, shards, -1)
    return views[:, shard].ravel()


def expected_lse(values: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    logits = values @ values.T / temperature
    np.fill_diagonal(logits, -np.inf)
    top = logits.max(axis=1, keepdims=True)
    return (np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]), logits


CASES = [
    # rows, D, shard, shards, phase of the schedule, multiprocessors
    (2, 64, 0, 1, 0, 4),
    (130, 5, 0, 1, 0, 4),
    (512, 128, 0, 1, 0, 3),
    (770, 72, 0, 1, 2, 2),
    (600, 200, 0, 1, 4, 3),
    (390, 300, 0, 1, 0, 2),
    (264, 512, 0, 1, 2, 3),
    (390, 64, 1, 3, 2, 2),
    (300, 512, 0, 2, 0, 2),
]


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(("num_rows", "dim", "shard", "shards", "phase", "multiprocessors"), CASES)
def test_forward_kernel_gives_the_losses(kernels, num_rows, dim, shard, shards, phase, multiprocessors, eager):
    temperature = 0.1
    stored, values, stride = projections(num_rows, dim)
    local = local_rows(num_rows, shard, shards)
    sizes = int64(num_rows, dim, shard, shards)
    workers, places = kernels.forward_workers(*sizes, multiprocessors), kernels.forward_places(*sizes)
    sums, positives = np.zeros((workers, places), np.float32), np.full(len(local), np.nan, np.float32)
    exponent = np.zeros(2, np.float32)
    kernels.forward(
        pointer(stored), *int64(num_rows, dim, stride, shard, shards), ctypes.c_double(temperature), multiprocessors, phase,
        1 + num_rows, int(eager), pointer(sums), pointer(positives), pointer(exponent),
    )  # fmt: skip
    assert kernels.failure() is None
    place = [kernels.padded_place(*sizes, ctypes.c_int64(row)) for row in range(len(local))]
    total = sums.astype(np.float64).sum(axis=0)[place]
    positive = positives.astype(np.float64) * exponent[0]
    loss = np.array([kernels.loss_of(t, exponent[1], p) for t, p in zip(total, positive)])
    lse, logits = expected_lse(values, temperature)
    expected = lse[local] - logits[local, (local + num_rows // 2) % num_rows]
    assert np.allclose(loss, expected, rtol=0, atol=2e-5)
    assert np.allclose(positive / LOG2E + loss, lse[local], rtol=0, atol=2e-5)


BACKWARD = [
    (2, 64, 0, 1, 1, 1),
    (130, 5, 0, 1, 2, 2),
    (390, 72, 0, 1, 3, 2),
    (390, 64, 1, 3, 2, 2),
    (512, 128, 0, 1, 1, 3),
    (300, 200, 0, 1, 1, 2),
    (258, 512, 0, 1, 2, 3),
    (204, 300, 0, 2, 1, 2),
]
# Every case as it is launched most often, and four of them in the two other forms; the rest of those take long.
FORMS = [
    pytest.param(*form, *case, marks=[pytest.mark.slow] if any(form) and number >= 4 else [])
    for form in ((False, False), (False, True), (True, False))
    for number, case in enumerate(BACKWARD)
]


@pytest.mark.parametrize(("wide", "eager", "num_rows", "dim", "shard", "shards", "splits", "workers"), FORMS)
def test_backward_kernel_gives_the_gradient_of_the_normalised_rows(
    kernels, num_rows, dim, shard, shards, splits, workers, wide, eager
):
    temperature = 0.2
    stored, values, stride = projections(num_rows, dim, hard=0.6)
    local = local_rows(num_rows, shard, shards)
    lse, logits = expected_lse(values, temperature)
    partial = np.full((splits, len(local), stride), np.nan, np.float32)
    kernels.backward(
        pointer(stored), *int64(num_rows, dim, stride, shard, shards), ctypes.c_double(temperature), pointer(lse * LOG2E), int(wide),
        splits, workers, 1 + num_rows, int(eager), pointer(partial),
    )  # fmt: skip
    assert kernels.failure() is None
    weights = np.exp(logits - lse[:, None]) + np.exp(logits - lse[None])
    rows = np.arange(num_rows)
    weights[rows, (rows + num_rows // 2) % num_rows] -= 2
    expected = (weights @ values)[local]
    # The weights are rounded to bfloat16, 2^-9 of each at most, before they are summed.
    error = 2.0**-9 * (abs(weights) @ abs(values))[local].max() + 1e-6
    assert np.isfinite(partial[:, :, :dim]).all()
    assert np.abs(partial.astype(np.float64).sum(axis=0)[:, :dim] - expected).max() <= error


def test_rows_outside_the_range_of_float32_are_repaired(kernels):
    assert not kernels.repair_needed(1.0, 0.0, 14.0, 512)
    assert not kernels.repair_needed(0.0, 45.0, 144.0, 512)  # the positive is all there is
    assert kernels.repair_needed(0.0, 45.0, -140.0, 512)
    assert kernels.repair_needed(np.inf, 0.0, 14.0, 512)
    assert not kernels.repair_needed(0.0, 0.0, 14.0, 2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", [0.01, 0.2])
@pytest.mark.parametrize(
    ("num_rows", "dim", "shard", "shards"), [(2, 3, 0, 1), (6, 40, 0, 1), (130, 17, 0, 1), (72, 70, 1, 3), (64, 33, 0, 2)]
)
def test_portable_kernels(portable, num_rows, dim, shard, shards, temperature, normalize, dtype):
    random = np.random.default_rng(num_rows + dim)
    z = random.standard_normal((num_rows, dim))
    z[num_rows // 2 :] = 0.5 * z[: num_rows // 2] + 0.5 * z[num_rows // 2 :]
    norms = np.linalg.norm(z, axis=1, keepdims=True)
    zhat = (z / norms).astype(dtype)
    values, local = zhat.astype(np.float64), local_rows(num_rows, shard, shards)
    lse, logits = expected_lse(values, temperature)
    loss, own_lse = np.full(len(local), np.nan), np.full(len(local), np.nan)
    grad, along = np.full((len(local), dim), np.nan, dtype), np.full(len(local), np.nan)
    inv_norm = np.ascontiguousarray((1 / norms[local, 0]).astype(dtype))
    function = portable.run_float if dtype == np.float32 else portable.run_double
    function(
        pointer(zhat), *int64(num_rows, dim, shard, shards), ctypes.c_double(temperature), pointer(lse), pointer(inv_norm),
        int(normalize), pointer(loss), pointer(own_lse), pointer(grad), pointer(along),
    )  # fmt: skip
    assert portable.failure() is None
    rounding = np.finfo(dtype).eps * 16 / temperature
    positive = logits[local, (local + num_rows // 2) % num_rows]
    expected = lse[local] - positive if num_rows > 2 else np.zeros(2)
    assert np.allclose(loss, expected, rtol=0, atol=rounding)
    assert np.allclose(own_lse, lse[local], rtol=0, atol=rounding)
    weights = np.exp(logits - lse[:, None]) + np.exp(logits - lse[None])
    rows = np.arange(num_rows)
    weights[rows, (rows + num_rows // 2) % num_rows] -= 2
    dzhat = (weights @ values)[local]
    assert np.allclose(along, (dzhat * values[local]).sum(axis=1), rtol=0, atol=8 * rounding)
    tangent = (dzhat - (dzhat * values[local]).sum(axis=1, keepdims=True) * values[local]) / norms[local] if normalize else dzhat
    assert np.allclose(grad, tangent / (num_rows * temperature), rtol=0, atol=8 * rounding / temperature / num_rows)
