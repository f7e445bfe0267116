"""cellfast: high-content screens to treatment profiles and mechanisms of action.

The public names below are imported when first used, so that ``import cellfast`` stays light.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "CellfastError": "cellfast.errors",
    "Screen": "cellfast.screens",
    "Loader": "cellfast.data",
    "TwoViews": "cellfast.augment",
    "SimCLR": "cellfast.models",
    "ntxent_loss": "cellfast.ops",
    "NTXentLoss": "cellfast.losses",
    "load_model": "cellfast.model_file",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'cellfast' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
