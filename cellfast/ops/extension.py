"""Finds and loads the compiled operators: ``_C`` (CPU, always) and ``_C_cuda`` (where it was built and this torch has CUDA)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

_FOLDER = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Backend:
    """One shared object of the extension: whether it was built, whether it is loaded, and if not, why."""

    name: str
    path: Path
    built: bool
    loaded: bool
    reason: str


def _load(name: str, unusable: str | None = None) -> Backend:
    path = _FOLDER / f"{name}.so"
    if not path.is_file():
        return Backend(name, path, False, False, f"{path.name} was not built")
    if unusable:
        return Backend(name, path, True, False, unusable)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Backend(name, path, True, False, f"{path.name} cannot be loaded: {error}")
    return Backend(name, path, True, True, "")


_CPU = _load("_C")
# libtorch_cuda is what _C_cuda links to; a CPU-only torch does not have it.
_CUDA = (
    _load("_C_cuda", None if torch.version.cuda else f"torch {torch.__version__} was built without CUDA") if _CPU.loaded else None
)


def backends() -> dict[str, Backend]:
    """The extension's parts by name (``_C``, ``_C_cuda``): built, loaded, and why not."""
    cuda = _CUDA or Backend("_C_cuda", _FOLDER / "_C_cuda.so", (_FOLDER / "_C_cuda.so").is_file(), False, "_C is not loaded")
    return {"_C": _CPU, "_C_cuda": cuda}


def require_cpu_backend() -> None:
    """Raise ImportError with the likely causes when the compiled operators cannot be used."""
    if not _CPU.loaded:
        raise ImportError(
            f"cellfast's compiled operators are missing: {_CPU.reason}. Build them with 'make build' or 'python setup.py "
            "build_ext --inplace'. Likely causes: the package was not built, torch is older than 2.10 (found "
            f"{torch.__version__}), or it was built for another platform."
        )
