"""NT-Xent: cellfast's operator compared with its peers on the same projections, in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cellfast.benchmark.ntxent_peers import PEERS, Loss, Peer
from cellfast.ops import ntxent_loss, ntxent_loss_reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Losses and gradients of peers that keep z's precision throughout are compared this closely (relative; gradient to its largest value).
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


# Rows M, columns D.
CPU_SIZES = ((64, 128), (512, 128), (2048, 128), (8192, 128), (8192, 512), (65536, 128))
CUDA_SIZES = ((512, 128), (8192, 128), (65536, 128), (65536, 512), (262144, 256), (1048576, 128))


def measure_ntxent(
    sizes: Sequence[tuple[int, int]] | None = None,
    *,
    repeats: int = 5,
    temperature: float = 0.1,
    device: str = "cpu",
    dtype: str = "float32",
    peers: Sequence[str] | None = None,
    picture: str | None = None,
) -> dict[str, Any]:
    """Time forward, and forward + backward, of each peer at each (rows M, columns D), after its loss and gradient agreed with plain PyTorch's.

    ``sizes`` None: the published ones of the device. ``picture``: a file to draw time and memory into.

    Each entry of a peer: ``forward`` and ``forward_backward`` with median, min and max in ms; ``extra_bytes``, the memory that forward +
    backward needs beyond ``z`` at its peak; or ``left_out`` with the reason. For cellfast also ``of_mm``: its 2 G = 4·M²·D FLOP per second
    as a fraction of ``torch.mm``'s rate measured between the sizes, and ``floor_ms``: 2 G at that rate.
    """
    chosen = [
        peer for peer in PEERS if (peers is None and (device != "cpu" or not peer.cuda_only)) or (peers and peer.name in peers)
    ]
    rows = []
    for num_rows, dim in sizes or (CPU_SIZES if device == "cpu" else CUDA_SIZES):
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(num_rows, dim, generator=generator).to(device=device, dtype=DTYPES[dtype])
        rate = _mm_rate(device, DTYPES[dtype])
        entry: dict[str, Any] = {"M": num_rows, "D": dim, "mm_flop_per_s": rate, "floor_ms": 4 * num_rows**2 * dim / rate * 1e3}
        entry["peers"] = {peer.name: _measure_peer(peer, z, temperature, repeats) for peer in chosen}
        ours = entry["peers"].get("cellfast", {})
        if "forward_backward" in ours:
            ours["of_mm"] = entry["floor_ms"] / ours["forward_backward"]["median_ms"]
            for name, other in entry["peers"].items():
                if "forward_backward" in other and name != "cellfast":
                    other["times_cellfast"] = other["forward_backward"]["median_ms"] / ours["forward_backward"]["median_ms"]
        rows.append(entry)
    kernels = torch.ops.cellfast.ntxent_cpu_kernels("") if device == "cpu" else torch.cuda.get_device_name()
    result = {
        "device": device,
        "dtype": dtype,
        "temperature": temperature,
        "threads": torch.get_num_threads(),
        "kernels": kernels,
        "repeats": repeats,
        "rows": rows,
    }
    if picture is not None:
        plot(result, picture)
    return result


def _measure_peer(peer: Peer, z: torch.Tensor, temperature: float, repeats: int) -> dict[str, Any]:
    if z.shape[0] > peer.largest_rows:
        return {"left_out": f"needs too much memory or time above M = {peer.largest_rows}"}
    try:
        loss = peer.make()
    except ImportError as error:
        return {"left_out": f"not installed: {error.name}"}
    result: dict[str, Any] = {}
    if z.shape[0] <= 16384:
        result["difference"] = _agreement(peer.name, loss, z, temperature)
    else:
        _with_gradient(loss, z, temperature)
    result["forward"] = _timed(lambda: loss(z, temperature), repeats, z.device)
    result["forward_backward"] = _timed(lambda: _with_gradient(loss, z, temperature), repeats, z.device)
    result["extra_bytes"] = _peak_extra(lambda: _with_gradient(loss, z, temperature), z.device)
    return result


def _agreement(name: str, loss: Loss, z: torch.Tensor, temperature: float) -> dict[str, float]:
    ours, grad = _with_gradient(loss, z, temperature)
    truth, true_grad = _with_gradient(ntxent_loss_reference if name == "cellfast" else ntxent_loss, z, temperature)
    off = abs(float(ours) - float(truth)) / max(1.0, abs(float(truth)))
    grad_off = float((grad.float() - true_grad.float()).abs().max() / true_grad.float().abs().max())
    tolerance = AGREEMENT[z.dtype]
    if not (off <= tolerance and grad_off <= 10 * tolerance):
        raise RuntimeError(
            f"{name} disagrees at M={z.shape[0]}: loss by {off:.2g}, gradient by {grad_off:.2g} (relative); nothing was timed"
        )
    return {"loss": off, "gradient": grad_off}


def _with_gradient(loss: Loss, z: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = z.detach().requires_grad_()
    value = loss(leaf, temperature)
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad


def _timed(run: Callable[[], Any], repeats: int, device: torch.device) -> dict[str, float]:
    run()  # the warm-up
    times: list[float] = []
    begin = time.perf_counter()
    # Short runs are repeated for half a second, long ones as often as asked.
    while len(times) < repeats or (time.perf_counter() - begin < 0.5 and len(times) < 50 * repeats):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append((time.perf_counter() - start) * 1e3)
    return {"median_ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times), "runs": len(times)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _peak_extra(run: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes in use at the peak of ``run`` beyond those in use before; None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status_bytes("VmRSS")
        run()
        return max(0, _status_bytes("VmHWM") - before)
    except OSError:
        return None


def _mm_rate(device: str, dtype: torch.dtype) -> float:
    size = 2048 if device == "cpu" else 8192
    a, b = torch.randn(size, size, device=device, dtype=dtype), torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / (_timed(lambda: a @ b, 5, a.device)["min_ms"] / 1e3)


def plot(result: dict[str, Any], path: str | Path) -> None:
    """Time and memory of forward + backward against M, one line per peer, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in result["rows"] if row["D"] == result["rows"][0]["D"]]  # one D, or the lines would jump
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for name in rows[0]["peers"]:
        measured = [(row["M"], row["peers"][name]) for row in rows if "forward_backward" in row["peers"][name]]
        if not measured:
            continue
        width = 2.5 if name == "cellfast" else 1.2
        axes[0].plot(
            [m for m, _ in measured], [p["forward_backward"]["median_ms"] for _, p in measured], "o-", label=name, lw=width
        )
        # Below a megabyte it fits into memory the process already has.
        memory = [(m, p["extra_bytes"] / 1e6) for m, p in measured if (p["extra_bytes"] or 0) >= 1e6]
        if memory:
            axes[1].plot(*zip(*memory), "o-", label=name, lw=width)
    axes[0].plot([r["M"] for r in rows], [r["floor_ms"] for r in rows], "k:", label="2 G at torch.mm's rate")
    axes[0].set(xscale="log", yscale="log", xlabel="rows M", ylabel="forward + backward, ms")
    axes[1].set(xscale="log", yscale="log", xlabel="rows M", ylabel="memory beyond z, MB")
    axes[0].legend(fontsize=8)
    figure.suptitle(
        f"NT-Xent, D = {rows[0]['D']}, {result['dtype']}, {result['device']}, {result['threads']} threads, {result['kernels']}"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
