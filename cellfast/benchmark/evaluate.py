"""Profiles and evaluation against their floors: bytes for grouped means, multiplications for neighbours, and the tools in use."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

SUBJECTS = ("start", "aggregate", "neighbours", "large", "plain")


def measure_evaluate(
    subjects: Sequence[str] = SUBJECTS,
    *,
    num_cells: int = 1_000_000,
    num_wells: int = 2_000,
    num_features: int = 512,
    num_treatments: int = 30_000,
    num_large: int = 116_000,
    num_plain_cells: int = 10_000,
    repeats: int = 3,
    reference_dir: str | None = None,
) -> dict[str, Any]:
    """Measure the subjects named; agreement with the slower way is checked before its time is taken.

    Args:
        subjects: ``start`` (first call with an empty cache, and in a later process), ``aggregate`` (means and medians of cells
        by well, beside
            ``torch.Tensor.index_add_`` and a plain read of the bytes), ``neighbours`` (NSC and NSCB in one call, beside
            scikit-learn and one NumPy
            product with a masked argmax), ``large`` (time and peak memory), ``plain`` (cells to scores, beside the reference
            implementation's
            steps written out in Python, and the reference itself from ``reference_dir``).
        repeats: timings of each; the best and the median are given.

    Returns:
        ``{"subject": "evaluate", "threads", <subject>: {…}}``, times in seconds, memory in GiB.
    """
    from cellfast.profiles.aggregate import num_threads

    result: dict[str, Any] = {"subject": "evaluate", "threads": num_threads()}
    if "start" in subjects:
        result["start"] = _start()
    if "aggregate" in subjects:
        result["aggregate"] = _aggregate(num_cells, num_wells, num_features, repeats)
    if "neighbours" in subjects:
        result["neighbours"] = _neighbours(num_treatments, num_features, repeats)
    if "large" in subjects:
        result["large"] = _large(num_large, num_features)
    if "plain" in subjects:
        result["plain"] = _plain(num_plain_cells, num_features, repeats, reference_dir)
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


def _cells(num_cells: int, num_features: int) -> tuple[np.ndarray, Any]:
    """Cells of 103 treatments of 38 compounds and of DMSO, in 17 plates."""
    import pandas as pd

    rng = np.random.default_rng(0)
    wells = 17 * 24
    well = rng.integers(0, wells, num_cells)
    treatment = np.where(np.arange(wells) % 4 == 0, -1, rng.integers(0, 103, wells))[well]
    compound = treatment % 38
    frame = pd.DataFrame(
        {
            "Metadata_Plate": [f"Week{w // 24 % 10 + 1}_{w // 24}" for w in well],
            "Metadata_Well": [f"{'ABCD'[w % 24 // 6]}{w % 6 + 1:02d}" for w in well],
            "compound": np.where(treatment < 0, "DMSO", np.char.add("c", compound.astype(str))),
            "concentration": np.where(treatment < 0, 0.0, treatment // 38 + 1.0),
            "moa": np.where(treatment < 0, "DMSO", np.char.add("m", (compound % 12).astype(str))),
            "Replicate": 1,
        }
    )
    return rng.standard_normal((num_cells, num_features), dtype=np.float32) + 0.1 * compound[:, None], frame


def _plain(num_cells: int, num_features: int, repeats: int, reference_dir: str | None) -> dict[str, Any]:
    """Means per well, medians per treatment, NSC and NSCB, all in memory."""
    from cellfast.metadata.batches import fill_batches
    from cellfast.metadata.canonical import canonical_metadata
    from cellfast.metadata.columns import find_columns
    from cellfast.profiles.build import ProfileTable, collapse, treatments
    from cellfast.profiles.neighbours import AllowedPairs, batch_codes, nearest_neighbours

    features, frame = _cells(num_cells, num_features)

    def ours() -> tuple[int, int]:
        metadata, _ = fill_batches(canonical_metadata(frame, find_columns(list(frame.columns))))
        cells = ProfileTable(metadata, features, [f"h{i:03d}" for i in range(num_features)])
        wells = collapse(cells, ["Metadata_Plate", "Metadata_Well"], "mean")
        table = treatments(wells.rows((wells.metadata["Metadata_Compound"] != "DMSO").to_numpy()), "median")
        names = {c: i for i, c in enumerate(sorted(set(table.metadata["Metadata_Compound"])))}
        words, overlap = batch_codes([(b,) for b in table.metadata["Metadata_Batch"]], "joined")
        every = np.ones(len(table), bool)
        compound = np.array([names[c] for c in table.metadata["Metadata_Compound"]])
        moa = table.metadata["Metadata_MoA"].to_numpy()
        found = nearest_neighbours(table.features, AllowedPairs(compound, words, overlap, every, every))
        return tuple(int(((f.index[:, 0] >= 0) & (moa[f.index[:, 0]] == moa)).sum()) for f in found)

    scores = ours()
    plain_scores, seconds = _plain_python(features, frame)
    if plain_scores != scores:
        raise AssertionError(f"cellfast finds {scores}, the plain steps {plain_scores}")
    result: dict[str, Any] = {
        "cells": num_cells,
        "num_correct": list(scores),
        "cellfast": _timed(ours, repeats),
        "plain_steps": seconds,
    }
    result["times_faster"] = seconds / result["cellfast"]["best"]
    if reference_dir is not None:
        result["reference"] = _reference(Path(reference_dir), features, frame)
        if "seconds" in result["reference"]:
            for kind in ("seconds", "seconds_without_pictures"):
                result[f"times_faster_than_reference{kind[7:]}"] = result["reference"][kind] / result["cellfast"]["best"]
    return result


def _plain_python(features: np.ndarray, frame: Any) -> tuple[tuple[int, int], float]:
    """The same scores step by step: a query per well, a Python sum over its cells, a classifier fitted anew for every
    treatment.
    """
    import pandas as pd
    from sklearn.neighbors import KNeighborsClassifier

    start = time.perf_counter()
    rows, profiles = [], []
    for (plate, well), _ in frame.groupby(["Metadata_Plate", "Metadata_Well"]):
        cells = frame[(frame["Metadata_Plate"] == plate) & (frame["Metadata_Well"] == well)]
        total = np.zeros(features.shape[1])
        for i in cells.index:
            total += features[i]
        first = cells.iloc[0]
        rows.append((first["compound"], first["concentration"], first["moa"], plate.split("_")[0]))
        profiles.append(total / len(cells))
    wells = pd.concat(
        [pd.DataFrame(rows, columns=["compound", "concentration", "moa", "batch"]), pd.DataFrame(np.array(profiles))], axis=1
    )
    wells = wells[wells["compound"] != "DMSO"]
    key = ["compound", "concentration", "moa"]
    table = wells.drop(columns="batch").groupby(key).median().reset_index()
    batches = wells.groupby(key)["batch"].agg(lambda b: ",".join(sorted(set(b)))).to_numpy()
    x = table.drop(columns=key).to_numpy()
    scores = []
    for not_same_batch in (False, True):
        correct = 0
        for i in range(len(table)):
            keep = (table["compound"] != table["compound"][i]).to_numpy().copy()
            if not_same_batch:
                keep &= batches != batches[i]
            if keep.any():
                classifier = KNeighborsClassifier(1, algorithm="brute", metric="cosine").fit(x[keep], table["moa"][keep])
                correct += int(classifier.predict(x[i : i + 1])[0] == table["moa"][i])
        scores.append(correct)
    return (scores[0], scores[1]), time.perf_counter() - start


def _reference(folder: Path, features: np.ndarray, frame: Any) -> dict[str, Any]:
    """Time the reference's own function from a checkout, as it is (with its t-SNE and plots, into a temporary folder) and without those;
    what it raises where it does not run is reported.
    """
    import importlib

    found = sorted(folder.rglob("feature_eval/profile_metrics.py"))
    if not found:
        return {"error": f"{folder} holds no feature_eval/profile_metrics.py"}
    place = str(found[-1].parent.parent)
    sys.path.insert(0, place)
    try:
        import matplotlib

        matplotlib.use("Agg")
        module = importlib.import_module("feature_eval.profile_metrics")
        with tempfile.TemporaryDirectory(prefix="cellfast-bench-") as pictures:
            start = time.perf_counter()
            nsc, nscb = module.calculate_nsc_and_nscb(features, frame, f"{pictures}/{{}}")
            result = {"seconds": time.perf_counter() - start, "nsc": float(nsc), "nscb": float(nscb)}
            inert = SimpleNamespace(lmplot=lambda *a, **k: SimpleNamespace(savefig=lambda *a: None), figure=lambda *a, **k: None)
            module.sb = module.plt = inert
            module.TSNE = lambda *a, **k: SimpleNamespace(fit_transform=lambda c: c[:, :2])
            start = time.perf_counter()
            module.calculate_nsc_and_nscb(features, frame, f"{pictures}/{{}}")
            return {**result, "seconds_without_pictures": time.perf_counter() - start}
    except Exception as error:  # another project's code under other library versions: whatever it raises is the result
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        sys.path.remove(place)
