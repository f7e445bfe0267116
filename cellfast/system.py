"""What this machine and this installation can do: versions, CPU, GPUs, and which parts of the extension are built and loadable."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

# Distribution names as pip knows them; DALI's differs by CUDA version and is looked for separately.
PACKAGES = (
    "cellfast", "torch", "torchvision", "kornia", "h5py", "hdf5plugin", "numba", "numpy", "pandas", "pyarrow", "scikit-learn", "scikit-image",
    "tifffile", "imagecodecs", "click", "tensorboard",
)  # fmt: skip
DALI_PACKAGES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110")
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "amx_bf16")
# What the processor must have for bfloat16 products to be done in bfloat16 and not by conversion to float32.
NATIVE_BF16 = ("avx512_bf16", "amx_bf16")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        fields = dict(
            (key.strip(), value.strip())
            for key, _, value in (line.partition(":") for line in reversed(cpuinfo.read_text(errors="replace").splitlines()))
        )
        model = fields.get("model name", model)
        flags = set(fields.get("flags", "").split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": model,
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "features": [feature for feature in CPU_FEATURES if feature in flags],
        "native_bf16": any(feature in flags for feature in NATIVE_BF16),
    }


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _torch() -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """How torch was built and runs, the GPUs it sees, and why there are none."""
    import torch

    about = {
        "threads": torch.get_num_threads(),
        "cuda_version": torch.version.cuda,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    gpus: list[dict[str, Any]] = []
    reason = ""
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} was built without CUDA"
    elif not torch.cuda.is_available():
        reason = "torch has CUDA, but finds no usable GPU or driver"
    else:
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append(
                {
                    "name": properties.name,
                    "compute_capability": f"{properties.major}.{properties.minor}",
                    "memory_bytes": properties.total_memory,
                    "multiprocessors": properties.multi_processor_count,
                }
            )
    return about, gpus, reason


def _extension_parts() -> dict[str, dict[str, Any]]:
    try:
        from cellfast.ops.extension import backends, kernel_name
    except (ImportError, OSError) as error:
        return {
            name: {"built": None, "loadable": False, "reason": f"cellfast.ops cannot be imported: {error}"}
            for name in ("_C", "_C_cuda")
        }
    parts = {
        name: {"built": backend.built, "loadable": backend.loaded, "reason": backend.reason}
        for name, backend in backends().items()
    }
    parts["_C"]["kernel"] = kernel_name()
    return parts


def _dali() -> dict[str, Any]:
    installed = next((package for package in DALI_PACKAGES if _version(package)), None)
    if installed is None:
        return {"built": False, "loadable": False, "reason": f"not installed; pip install {DALI_PACKAGES[0]}"}
    try:
        import nvidia.dali
    except (ImportError, OSError) as error:
        return {"built": True, "loadable": False, "reason": f"{installed} is installed but cannot be imported: {error}"}
    return {"built": True, "loadable": True, "reason": "", "version": nvidia.dali.__version__}


def system_report() -> dict[str, Any]:
    """Everything ``cellfast info --system`` shows, as JSON-ready values.

    Returns:
        ``python``, ``platform``, ``packages`` (name → version or None), ``cpu`` (model, cores, usable_cores, features, native_bf16),
        ``memory_bytes``, ``torch`` (threads, cuda_version, cpu_capability), ``gpus`` (list), ``no_gpu_reason``, and ``backends``: for ``_C``,
        ``_C_cuda`` and ``DALI`` whether it is ``built`` (or installed), whether it is ``loadable``, and the ``reason`` why not.
    """
    about_torch, gpus, reason = _torch()
    packages = {package: _version(package) for package in PACKAGES}
    packages["nvidia-dali"] = next((version for version in map(_version, DALI_PACKAGES) if version), None)
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": packages,
        "cpu": _cpu(),
        "memory_bytes": _memory_bytes(),
        "torch": about_torch,
        "gpus": gpus,
        "no_gpu_reason": reason,
        "backends": {**_extension_parts(), "DALI": _dali()},
    }


def _gib(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / 2**30:.1f} GiB"


def format_report(report: dict[str, Any]) -> str:
    """The report of ``system_report`` as text for a terminal."""
    cpu, lines = report["cpu"], []
    lines.append(f"Python      {report['python']} on {report['platform']}")
    lines.append(
        f"CPU         {cpu['model']}, {cpu['usable_cores']} of {cpu['cores']} cores usable, memory {_gib(report['memory_bytes'])}"
    )
    lines.append(f"            {' '.join(cpu['features']) or 'no vector extensions known'}")
    lines.append(
        f"            bfloat16: {'native' if cpu['native_bf16'] else 'by conversion to float32 (--amp saves memory here, not time)'}"
    )
    lines.append(
        f"torch       CUDA {report['torch']['cuda_version'] or 'no'}, {report['torch']['threads']} threads, {report['torch']['cpu_capability']}"
    )
    for gpu in report["gpus"]:
        lines.append(f"GPU         {gpu['name']}, compute capability {gpu['compute_capability']}, {_gib(gpu['memory_bytes'])}")
    if not report["gpus"]:
        lines.append(f"GPU         none: {report['no_gpu_reason']}")
    lines.append("")
    lines.append("Backends")
    for name, part in report["backends"].items():
        state = "loadable" if part["loadable"] else ("built, not loadable" if part["built"] else "not built")
        if name == "DALI" and not part["built"]:
            state = "not installed"
        detail = f" ({part['kernel']} kernels)" if part.get("kernel") else (f" {part['version']}" if part.get("version") else "")
        lines.append(f"  {name:<9} {state}{detail}" + (f": {part['reason']}" if part["reason"] else ""))
    lines.append("")
    lines.append("Packages")
    width = max(map(len, report["packages"]))
    lines += [f"  {name:<{width}}  {version or 'not installed'}" for name, version in report["packages"].items()]
    return "\n".join(lines)
