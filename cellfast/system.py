"""What this machine and this installation can do: versions, devices, and which backends are built, loadable, and why not."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from cellfast import __version__

PACKAGES = (
    "torch",
    "torchvision",
    "kornia",
    "nvidia-dali-cuda130",
    "h5py",
    "numba",
    "scikit-learn",
    "scikit-image",
    "numpy",
    "pandas",
    "pyarrow",
    "tifffile",
    "click",
)
_FLAGS_SHOWN = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


def cpu_flags() -> set[str]:
    """The CPU's feature flags as Linux names them; empty where they cannot be read."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return set(value.split())
    except OSError:
        pass
    return set()


def bfloat16_is_native() -> bool:
    """True where the default device computes in bfloat16: a CUDA GPU of sm_80 or newer, else a CPU with AVX-512 BF16, AMX or
    Arm's BF16."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 0)
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def system_report() -> dict[str, Any]:
    """Versions, processor, GPUs and backends as a JSON-able dict; every backend says ``built``, ``loadable`` and ``reason``."""
    import torch

    flags = cpu_flags()
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append(
                {
                    "name": properties.name,
                    "memory_bytes": properties.total_memory,
                    "capability": f"{properties.major}.{properties.minor}",
                }
            )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    report: dict[str, Any] = {
        "cellfast": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {
            "name": _cpu_name(),
            "cores": cores,
            "threads": torch.get_num_threads(),
            "features": [f for f in _FLAGS_SHOWN if f in flags],
        },
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "bfloat16_native": bfloat16_is_native(),
        "gpus": gpus,
        "gpu_reason": "" if gpus else _why_no_gpu(torch),
        "cuda_of_torch": torch.version.cuda,
        "nvcc": shutil.which("nvcc"),
        "backends": {},
    }
    from cellfast.ops.extension import backends

    for name, backend in backends().items():
        report["backends"][name] = {"built": backend.built, "loadable": backend.loaded, "reason": backend.reason}
    report["backends"]["DALI"] = _dali()
    return report


def _why_no_gpu(torch: Any) -> str:
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not Path("/proc/driver/nvidia").exists() and shutil.which("nvidia-smi") is None:
        return "no NVIDIA driver on this machine"
    return "torch finds no usable GPU"


def _dali() -> dict[str, Any]:
    installed = next((v for v in map(_version, ("nvidia-dali-cuda130", "nvidia-dali-cuda120")) if v), None)
    if installed is None:
        return {"built": False, "loadable": False, "reason": "nvidia-dali is not installed: pip install nvidia-dali-cuda130"}
    try:
        importlib.import_module("nvidia.dali")
    except Exception as error:
        return {"built": True, "loadable": False, "reason": f"nvidia-dali {installed} cannot be imported: {error}"}
    return {"built": True, "loadable": True, "reason": ""}


def format_report(report: dict[str, Any]) -> str:
    """The report as lines for a terminal."""
    cpu = report["cpu"]
    lines = [
        f"cellfast {report['cellfast']}, Python {report['python']}, {report['platform']}",
        f"CPU      {cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads, "
        f"{', '.join(cpu['features']) or 'no known vector features'}",
        f"memory   {report['memory_bytes'] / 2**30:.1f} GiB",
        f"bfloat16 {'native' if report['bfloat16_native'] else 'emulated here: float32 is faster, leave amp out'}",
    ]
    lines += [
        f"GPU      {g['name']}, {g['memory_bytes'] / 2**30:.0f} GiB, sm_{g['capability'].replace('.', '')}"
        for g in report["gpus"]
    ]
    if not report["gpus"]:
        lines.append(f"GPU      none: {report['gpu_reason']}")
    lines.append(f"CUDA     torch: {report['cuda_of_torch'] or 'none'}; nvcc: {report['nvcc'] or 'not found'}")
    for name, backend in report["backends"].items():
        state = "loadable" if backend["loadable"] else "built, not loadable" if backend["built"] else "not built"
        lines.append(f"backend  {name:<8} {state}" + (f" ({backend['reason']})" if backend["reason"] else ""))
    lines += [f"package  {name:<20} {version or 'not installed'}" for name, version in report["packages"].items()]
    return "\n".join(lines)
