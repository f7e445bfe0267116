"""Profiles and evaluation against their floors: bytes for grouped means, multiplications for neighbours, and the tools in use."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

PARTS = ("start", "aggregate", "neighbours", "large")


def measure_evaluate(
    only: Sequence[str] = PARTS,
    *,
    num_cells: int = 1_000_000,
    num_wells: int = 2_000,
    num_features: int = 512,
    num_treatments: int = 30_000,
    num_large: int = 116_000,
    repeats: int = 3,
) -> dict[str, Any]:
    """Measure the parts named; agreement with the slower way is checked before its time is taken.

    Args:
        only: ``start`` (first call with an empty cache, and in a later process), ``aggregate`` (means and medians of cells by well,
            compared with ``torch.Tensor.index_add_`` and one read of the bytes), ``neighbours`` (NSC and NSCB in one call, compared with scikit-learn
            and one NumPy product with a masked argmax), ``large`` (time and peak memory of ``num_large`` profiles).
        repeats: timings of each; the best and the median are given.

    Returns:
        ``{"threads", <part>: {…}}``, times in seconds, memory in GiB.
    """
    from cellfast.profiles.aggregate import num_threads

    result: dict[str, Any] = {"threads": num_threads()}
    if "start" in only:
        result["start"] = _start()
    if "aggregate" in only:
        result["aggregate"] = _aggregate(num_cells, num_wells, num_features, repeats)
    if "neighbours" in only:
        result["neighbours"] = _neighbours(num_treatments, num_features, repeats)
    if "large" in only:
        result["large"] = _large(num_large, num_features)
    return result


def _timed(function: Callable[[], Any], repeats: int) -> dict[str, float]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return {"best": min(seconds), "median": float(np.median(seconds))}


_FIRST_CALLS = """
import time
start = time.perf_counter()
import numpy as np
from cellfast.profiles.aggregate import group_means, group_medians
from cellfast.profiles import neighbours
imported = time.perf_counter()
x = np.random.default_rng(0).standard_normal((600, 32), dtype=np.float32)
codes = np.arange(600) % 7
group_means(x, codes, 7)
group_medians(x, codes, 7)
aggregated = time.perf_counter()
neighbours._SMALL = 0
every = np.ones(600, bool)
neighbours.nearest_neighbours(x, neighbours.AllowedPairs(codes.astype(np.int64), codes[:, None].astype(np.int64), False, every,
every))
done = time.perf_counter()
print(imported - start, aggregated - imported, done - aggregated)
"""


def _start() -> dict[str, Any]:
    """Seconds for imports and the first calls of both kinds, with an empty cache of compiled code and then in a new process
    with it.
    """
    with tempfile.TemporaryDirectory(prefix="cellfast-bench-") as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        result = {}
        for name in ("empty_cache", "later_process"):
            out = subprocess.run(
                [sys.executable, "-c", _FIRST_CALLS], env=environment, capture_output=True, text=True, check=True
            )
            imports, aggregation, neighbours = map(float, out.stdout.split())
            result[name] = {"imports": imports, "first_aggregation": aggregation, "first_neighbours": neighbours}
    return result


def _aggregate(num_cells: int, num_wells: int, num_features: int, repeats: int) -> dict[str, Any]:
    import torch

    from cellfast.profiles.aggregate import group_means, group_medians

    rng = np.random.default_rng(0)
    x = rng.standard_normal((num_cells, num_features), dtype=np.float32)
    result: dict[str, Any] = {"cells": num_cells, "wells": num_wells, "features": num_features}
    for order in ("shuffled", "by_well"):
        codes = rng.integers(0, num_wells, num_cells)
        if order == "by_well":
            codes = np.sort(codes)
        tensor, index = torch.from_numpy(x), torch.from_numpy(codes)
        counts = np.maximum(np.bincount(codes, minlength=num_wells), 1)[:, None]

        def by_torch(tensor: Any = tensor, index: Any = index) -> Any:
            return torch.zeros(num_wells, num_features).index_add_(0, index, tensor)

        np.testing.assert_allclose(by_torch().numpy() / counts, group_means(x, codes, num_wells).values, atol=1e-4)
        check = group_medians(x[:, :8], codes, num_wells).values
        for g in range(0, num_wells, max(1, num_wells // 5)):
            if (codes == g).any():
                np.testing.assert_array_equal(check[g], np.median(x[codes == g, :8].astype(np.float64), axis=0))
        times = {
            "mean": _timed(lambda codes=codes: group_means(x, codes, num_wells), repeats),
            "torch_index_add": _timed(by_torch, repeats),
            "median": _timed(lambda codes=codes: group_medians(x, codes, num_wells), repeats),
            "read_once": _timed(lambda: x.sum(dtype=np.float32), repeats),
        }
        times["mean_over_torch"] = times["mean"]["best"] / times["torch_index_add"]["best"]
        result[order] = times
    return result


def _pairs(n: int, rng: np.random.Generator) -> Any:
    from cellfast.profiles.neighbours import AllowedPairs

    every = np.ones(n, bool)
    return AllowedPairs(rng.integers(0, max(2, n // 4), n), rng.integers(0, 20, (n, 1)), False, every, every)


def _neighbours(n: int, num_features: int, repeats: int) -> dict[str, Any]:
    from sklearn.metrics import pairwise_distances_chunked

    from cellfast.profiles.neighbours import nearest_neighbours

    rng = np.random.default_rng(0)
    x, pairs = rng.standard_normal((n, num_features), dtype=np.float32), _pairs(n, rng)
    compound, batch = pairs.compound, pairs.batch[:, 0]

    def by_scikit_learn() -> np.ndarray:
        def nearest(distances: np.ndarray, start: int) -> np.ndarray:
            rows = slice(start, start + len(distances))
            distances[compound[rows, None] == compound[None, :]] = np.inf
            nsc = distances.argmin(axis=1)
            distances[batch[rows, None] == batch[None, :]] = np.inf
            return np.stack([nsc, distances.argmin(axis=1)], axis=1)

        return np.concatenate(list(pairwise_distances_chunked(x, reduce_func=nearest, metric="cosine", working_memory=512)))

    def by_numpy() -> np.ndarray:
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        similarity = unit @ unit.T
        similarity[compound[:, None] == compound[None, :]] = -np.inf
        return similarity.argmax(axis=1)

    ours = nearest_neighbours(x, pairs)
    found = by_scikit_learn()
    result: dict[str, Any] = {
        "treatments": n,
        "features": num_features,
        "agreement_with_scikit_learn": [float((ours[i].index[:, 0] == found[:, i]).mean()) for i in range(2)],
        "nsc_and_nscb": _timed(lambda: nearest_neighbours(x, pairs), repeats),
        "scikit_learn": _timed(by_scikit_learn, 1),
        "numpy_product_masked_argmax_nsc_only": _timed(by_numpy, 1),
    }
    best = result["nsc_and_nscb"]["best"]
    result["times_faster_than_scikit_learn"] = result["scikit_learn"]["best"] / best
    result["times_faster_than_numpy"] = result["numpy_product_masked_argmax_nsc_only"]["best"] / best
    result["gflops_of_the_full_product"] = 2 * n * n * num_features / best / 1e9
    return result


_LARGE = """
import sys, time
import numpy as np
from cellfast.benchmark.evaluate import _pairs
from cellfast.profiles.neighbours import nearest_neighbours
n, d = int(sys.argv[1]), int(sys.argv[2])
rng = np.random.default_rng(0)
x, pairs = rng.standard_normal((n, d), dtype=np.float32), _pairs(n, rng)
start = time.perf_counter()
nearest_neighbours(x, pairs)
seconds = time.perf_counter() - start
# Not getrusage: its peak is inherited from the process that started this one.
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, peak / 2**20)
"""


def _large(n: int, num_features: int) -> dict[str, Any]:
    out = subprocess.run([sys.executable, "-c", _LARGE, str(n), str(num_features)], capture_output=True, text=True, check=True)
    seconds, peak = map(float, out.stdout.split())
    return {"treatments": n, "features": num_features, "seconds": seconds, "peak_gib": peak}
