"""NT-Xent: cellfast's operator beside plain PyTorch on the same projections, in the same run."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cellfast.ops import ntxent_loss, ntxent_loss_reference


def measure_ntxent(
    sizes: Sequence[tuple[int, int]] = ((512, 128), (2048, 128), (8192, 128)),
    *,
    repeats: int = 5,
    temperature: float = 0.1,
    device: str = "cpu",
) -> dict[str, Any]:
    """Time forward + backward at each (rows M, columns D) after checking that losses and gradients agree to 1e-4.

    Returns median and spread in ms, and the operator's speed as a fraction of the floor of 2 · 2 · M² · D FLOP at the rate of one
    large ``torch.mm`` measured in the same run.
    """
    peak = _mm_rate(device)
    rows = []
    for num_rows, dim in sizes:
        z = torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(0)).to(device)
        ours, plain = _with_gradient(ntxent_loss, z, temperature), _with_gradient(ntxent_loss_reference, z, temperature)
        torch.testing.assert_close(ours[0], plain[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours[1], plain[1], rtol=1e-3, atol=1e-4 * float(plain[1].abs().max()))
        entry: dict[str, Any] = {"M": num_rows, "D": dim}
        for name, function in (("cellfast", ntxent_loss), ("plain PyTorch", ntxent_loss_reference)):
            entry[name] = _timed(lambda function=function, z=z: _with_gradient(function, z, temperature), repeats, device)
        entry["speedup"] = entry["plain PyTorch"]["median_ms"] / entry["cellfast"]["median_ms"]
        entry["floor_ms"] = 4 * num_rows**2 * dim / peak * 1e3
        rows.append(entry)
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "mm_flop_per_s": peak,
        "rows": rows,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _with_gradient(
    function: Callable[..., torch.Tensor], z: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = z.detach().clone().requires_grad_()
    loss = function(leaf, temperature)
    loss.backward()
    return loss.detach(), leaf.grad


def _timed(run: Callable[[], Any], repeats: int, device: str) -> dict[str, float]:
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append((time.perf_counter() - start) * 1e3)
    times = times[1:]  # the first is the warm-up
    return {"median_ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times)}


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _mm_rate(device: str, size: int = 2048) -> float:
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    best = min(_timed(lambda: a @ b, 5, device)["min_ms"] for _ in range(2))
    return 2 * size**3 / (best / 1e3)
