"""One measurement of benchmarks/gpu.py in a process of its own: ``python benchmarks/gpu_measure.py NAME --device cuda --out FILE``.

FILE is written anew whenever there is more to tell, so that a measurement that is stopped leaves what it had.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Report = Callable[[Any], None]
Measure = Callable[[str, bool, Report], Any]
NTXENT_SIZES = ((8192, 128), (65536, 128), (65536, 512), (262144, 256), (1048576, 128))
NTXENT_PEERS = ("plain PyTorch", "torch.compile", "chunked", "tile-wise (Inf-CL)")


def _reason(error: BaseException) -> dict[str, str]:
    return {"failed": f"{type(error).__name__}: {str(error)[:400]}"}


def ntxent(device: str, runs: list[tuple[str, str, tuple[tuple[int, int], ...]]], peers: tuple[str, ...], report: Report) -> Any:
    """Ours at all sizes first, then each peer on its own: one that fails takes no other figure with it."""
    import torch

    from cellfast.benchmark.ntxent import DTYPES, measure_ntxent
    from cellfast.ops import ntxent_cuda_kernel

    results: dict[str, Any] = {}
    for peer in ("cellfast", *peers):
        for kernel, dtype, sizes in runs:
            for num_rows, dim in sizes if peer != "cellfast" or kernel != "peers" else ():
                case = results.setdefault(f"{kernel} {dtype} {num_rows}x{dim}", {"peers": {}})
                try:
                    if device != "cpu" and kernel != "peers":
                        ntxent_cuda_kernel(kernel)
                    (row,) = measure_ntxent(((num_rows, dim),), repeats=5, device=device, dtype=dtype, peers=(peer,))["rows"]
                    case["peers"][peer] = row.pop("peers")[peer]
                    case.update(row)
                    report(results)
                    if device != "cpu" and "forward_backward" in case["peers"][peer]:
                        case["peers"][peer].update(_more(peer, num_rows, dim, DTYPES[dtype]))
                except Exception as error:
                    case["peers"].setdefault(peer, {}).update(_reason(error))
                    report(results)  # now: after some errors nothing more can be had from the GPU
                finally:
                    if device != "cpu":
                        ntxent_cuda_kernel("auto")
                        torch.cuda.empty_cache()
                report(results)
    return results


def _more(peer: str, num_rows: int, dim: int, dtype: Any) -> dict[str, Any]:
    """What only some are asked for: the GPU's own time, and the error against float64."""
    asked: dict[str, Callable[[], Any]] = {}
    if peer in ("cellfast", "plain PyTorch"):
        asked["device_ms"] = lambda: ntxent_device_ms(peer, num_rows, dim, dtype)
    if peer == "cellfast" and num_rows <= 1 << 18:
        asked["error"] = lambda: ntxent_error(num_rows, dim, dtype, 0.1)
    found: dict[str, Any] = {}
    for name, ask in asked.items():
        try:
            found[name] = ask()
        except Exception as error:
            found[f"no_{name}"] = _reason(error)["failed"]
    return found


def ntxent_device_ms(peer: str, num_rows: int, dim: int, dtype: Any) -> float:
    """Forward + backward recorded as a CUDA graph: the GPU's own time, without what Python takes to launch it. Median of 5 × 10 replays."""
    import statistics

    import torch

    from cellfast.ops import ntxent_loss, ntxent_loss_reference

    loss = ntxent_loss if peer == "cellfast" else ntxent_loss_reference
    z = torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(0)).to("cuda", dtype).requires_grad_()
    side, graph, times = torch.cuda.Stream(), torch.cuda.CUDAGraph(), []
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            torch.autograd.grad(loss(z, 0.1), z)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        torch.autograd.grad(loss(z, 0.1), z)
    graph.replay()
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(10):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 10)
    return statistics.median(times)


def ntxent_error(
    num_rows: int, dim: int, dtype: Any, temperature: float, sample: int = 256, block: int = 2048
) -> dict[str, float]:
    """Our loss, and gradient of some rows, against float64 by blocks of rows; the gradient relative to its largest value.

    ``rounding`` is the error of the float64 computation from rows that were normalised and rounded to z's dtype: what no kernel can avoid.
    """
    import torch
    import torch.nn.functional as F

    from cellfast.ops import ntxent_loss

    z = torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    leaf = z.clone().requires_grad_()
    value = ntxent_loss(leaf, temperature)
    (grad,) = torch.autograd.grad(value, leaf)
    rows = torch.arange(0, num_rows, max(1, num_rows // sample), device="cuda")[:sample]
    pair = (torch.arange(num_rows, device="cuda") + num_rows // 2) % num_rows

    def truth(zhat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def logits(index: torch.Tensor) -> torch.Tensor:
            found = zhat[index] @ zhat.T / temperature
            return found.scatter_(1, index[:, None], -torch.inf)

        lse = torch.cat([logits(part).logsumexp(1) for part in torch.arange(num_rows, device="cuda").split(block)])
        loss = (lse - (zhat * zhat[pair]).sum(1) / temperature).mean()
        s = logits(rows)
        weights = (s - lse[rows, None]).exp() + (s - lse).exp()
        weights.scatter_add_(1, pair[rows, None], torch.full((len(rows), 1), -2.0, dtype=weights.dtype, device="cuda"))
        g = weights @ zhat / (num_rows * temperature)
        unit = zhat[rows]
        return loss, (g - (g * unit).sum(1, keepdim=True) * unit) / z[rows].double().norm(dim=1, keepdim=True)

    exact, exact_grad = truth(F.normalize(z.double(), dim=1))
    rounded, rounded_grad = truth(F.normalize(z.double(), dim=1).to(dtype).double())
    size = exact_grad.abs().max()
    return {
        "loss": abs(float(value) - float(exact)), "loss_rounding": abs(float(rounded - exact)),
        "gradient": float((grad[rows].double() - exact_grad).abs().max() / size),
        "gradient_rounding": float((rounded_grad - exact_grad).abs().max() / size),
    }  # fmt: skip


def ntxent_portable(device: str, tiny: bool, report: Report) -> Any:
    if tiny:
        return ntxent(device, [("cpu", "float32", ((64, 128), (512, 128)))], ("plain PyTorch",), report)
    # No matrix units: the largest sizes would take minutes.
    return ntxent(device, [("portable", "bfloat16", NTXENT_SIZES[:2]), ("portable", "float32", NTXENT_SIZES[:2])], (), report)


def ntxent_sm90a(device: str, tiny: bool, report: Report) -> Any:
    return ntxent(device, [("sm90a", "bfloat16", NTXENT_SIZES)], (), report)


def ntxent_peers(device: str, tiny: bool, report: Report) -> Any:
    """The others at the same sizes, in bfloat16, as training uses them."""
    return ntxent(device, [("peers", "bfloat16", NTXENT_SIZES)], NTXENT_PEERS, report)


def augment(device: str, tiny: bool, report: Report) -> Any:
    from cellfast.benchmark.augment import measure_augment

    return measure_augment(batch_size=16 if tiny else 1024, repeats=1 if tiny else 20, device=device)


def step(**options: Any) -> Measure:
    def run(device: str, tiny: bool, report: Report) -> Any:
        from cellfast.benchmark.device import measure_step

        small = {"batch_size": 8, "output_size": 32, "crop_size": 40, "store_cells": 16, "steps": 1, "repeats": 1, "amp": False}
        values = {**options, **small} if tiny else options
        if tiny and options.get("chunk_size"):
            values["chunk_size"] = 4
        return measure_step(device=device, report=report, **values)

    return run


def embedding(**options: Any) -> Measure:
    def run(device: str, tiny: bool, report: Report) -> Any:
        from cellfast.benchmark.device import measure_embedding

        small = {"batch_size": 4, "output_size": 32, "crop_size": 40, "store_cells": 8, "repeats": 1, "amp": False}
        return measure_embedding(device=device, report=report, **({**options, **small} if tiny else options))

    return run


def decode(device: str, tiny: bool, report: Report) -> Any:
    import os

    from cellfast.benchmark.decode import measure_decode
    from cellfast.data.dali import require_dali

    require_dali()
    if tiny:
        return measure_decode(
            fields=3, height=64, width=80, cells_per_field=4, crop_size=16, threads=(1,), repeats=1, device=device
        )
    return measure_decode(threads=(1, os.cpu_count() or 1), device=device, report=report)


# In the order of what matters most.
MEASURES: dict[str, Measure] = {
    "step-resnet18": step(encoder="resnet18"),
    "augment": augment,
    "ntxent-portable": ntxent_portable,
    "ntxent-sm90a": ntxent_sm90a,
    "embed-resnet50": embedding(encoder="resnet50"),
    "step-resnet50": step(encoder="resnet50"),
    "step-resnet18-chunked": step(
        encoder="resnet18", batch_size=16384, chunk_size=2048, steps=3, store_cells=32768, feeds=("resident",)
    ),
    "step-resnet18-batch128": step(encoder="resnet18", batch_size=128, steps=50, feeds=("resident",)),
    "step-resnet18-batch128-graphs": step(encoder="resnet18", batch_size=128, steps=50, cuda_graphs=True, feeds=("resident",)),
    "step-resnet18-graphs": step(encoder="resnet18", cuda_graphs=True, feeds=("resident",)),
    "step-resnet18-compile": step(encoder="resnet18", compile=True, feeds=("resident",)),
    "embed-resnet50-compile": embedding(encoder="resnet50", compile=True),
    "step-resnet50-compile": step(encoder="resnet50", compile=True, feeds=("resident",)),
    "ntxent-peers": ntxent_peers,
    "decode": decode,
}
# Compilers take minutes of a small CPU, and kernels of a GPU do not run there.
NOT_IN_DRY_RUN = ("ntxent-sm90a", "ntxent-peers", *(name for name in MEASURES if name.endswith("-compile")))
# Seconds, where the driver's own limit is too long for what may never end.
LIMITS: dict[str, float] = {"ntxent-sm90a": 120}


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

    def report(result: Any) -> None:
        temporary = options.out.with_name(options.out.name + ".partial")
        temporary.write_text(json.dumps(result, indent=2, default=str) + "\n")
        temporary.replace(options.out)

    report(MEASURES[options.name](options.device, options.tiny, report))


if __name__ == "__main__":
    main()
