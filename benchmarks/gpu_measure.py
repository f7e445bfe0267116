"""One measurement of benchmarks/gpu.py in a process of its own: ``python benchmarks/gpu_measure.py NAME --device cuda --out FILE``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Measure = Callable[[str, bool], Any]


def ntxent(device: str, tiny: bool) -> Any:
    from cellfast.benchmark.ntxent import measure_ntxent
    from cellfast.ops import ntxent_cuda_kernel

    if tiny:
        return measure_ntxent(((64, 128), (512, 128)), repeats=1, device=device)
    sizes = ((8192, 128), (65536, 128), (65536, 512), (262144, 256), (1048576, 128))
    others = ("plain PyTorch", "torch.compile", "chunked", "tile-wise (Inf-CL)")
    # The portable kernels use no tensor cores: the largest sizes would take minutes.
    runs = [("sm90a", "bfloat16", sizes), ("portable", "bfloat16", sizes[:2]), ("portable", "float32", sizes[:2])]
    results = {}
    for kernel, dtype, chosen in runs:
        for size in chosen:
            peers = ("cellfast", *others) if kernel == "sm90a" or dtype == "float32" else ("cellfast",)
            try:
                ntxent_cuda_kernel(kernel)
                result = measure_ntxent((size,), repeats=5, device=device, dtype=dtype, peers=peers)
            except Exception as error:
                result = {"failed": f"{type(error).__name__}: {str(error)[:400]}"}
            finally:
                ntxent_cuda_kernel("auto")
            results[f"{kernel} {dtype} {size[0]}x{size[1]}"] = result
    return results


def augment(device: str, tiny: bool) -> Any:
    from cellfast.benchmark.augment import measure_augment

    return measure_augment(batch_size=16 if tiny else 1024, repeats=1 if tiny else 20, device=device)


def step(**options: Any) -> Measure:
    def run(device: str, tiny: bool) -> Any:
        from cellfast.benchmark.device import measure_step

        small = {"batch_size": 8, "output_size": 32, "crop_size": 40, "store_cells": 16, "steps": 1, "repeats": 1, "amp": False}
        values = {**options, **small} if tiny else options
        if tiny and options.get("chunk_size"):
            values["chunk_size"] = 4
        return measure_step(device=device, **values)

    return run


def embedding(**options: Any) -> Measure:
    def run(device: str, tiny: bool) -> Any:
        from cellfast.benchmark.device import measure_embedding

        small = {"batch_size": 4, "output_size": 32, "crop_size": 40, "store_cells": 8, "repeats": 1, "amp": False}
        return measure_embedding(device=device, **({**options, **small} if tiny else options))

    return run


def decode(device: str, tiny: bool) -> Any:
    import os

    from cellfast.benchmark.device import measure_decode

    if tiny:
        return measure_decode(
            fields=3, height=64, width=80, cells_per_field=4, crop_size=16, threads=(1,), repeats=1, device=device
        )
    return measure_decode(threads=(1, os.cpu_count() or 1), device=device)


MEASURES: dict[str, Measure] = {
    "ntxent": ntxent,
    "augment": augment,
    "step-resnet18": step(encoder="resnet18"),
    "step-resnet18-compile": step(encoder="resnet18", compile=True, feeds=("resident",)),
    "step-resnet18-graphs": step(encoder="resnet18", cuda_graphs=True, feeds=("resident",)),
    "step-resnet18-batch128": step(encoder="resnet18", batch_size=128, steps=50, feeds=("resident",)),
    "step-resnet18-batch128-graphs": step(encoder="resnet18", batch_size=128, steps=50, cuda_graphs=True, feeds=("resident",)),
    "step-resnet18-chunked": step(
        encoder="resnet18", batch_size=16384, chunk_size=2048, steps=3, store_cells=32768, feeds=("resident",)
    ),
    "step-resnet50": step(encoder="resnet50"),
    "step-resnet50-compile": step(encoder="resnet50", compile=True, feeds=("resident",)),
    "embed-resnet50": embedding(encoder="resnet50"),
    "embed-resnet50-compile": embedding(encoder="resnet50", compile=True),
    "decode": decode,
}
# Compilers take minutes of a small CPU and record nothing a dry run needs.
NOT_IN_DRY_RUN = tuple(name for name in MEASURES if name.endswith("-compile"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=MEASURES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no GPU (CELLFAST_BENCH_DEVICE=cpu is for a dry run)")
    result = MEASURES[options.name](options.device, options.tiny)
    options.out.write_text(json.dumps(result, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
