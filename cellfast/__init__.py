"""cellfast: high-content screens to treatment profiles and mechanisms of action.

The steps as functions, each writing files and returning an object that the next step takes: `simulate`, `ingest_fields` or
`ingest_crops`, `train`, `embed`, `profile`, `evaluate`; `load_model`. The public names are imported when first used, so that
``import cellfast`` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cellfast.api import embed, evaluate, ingest_crops, ingest_fields, profile, simulate, train
    from cellfast.augment import TwoViews
    from cellfast.data import Loader
    from cellfast.errors import CellfastError
    from cellfast.losses import NTXentLoss
    from cellfast.model_file import load_model
    from cellfast.models import SimCLR
    from cellfast.ops import ntxent_loss
    from cellfast.screens import Screen

__version__ = "0.1.0"

_PUBLIC = {
    "simulate": "cellfast.api",
    "ingest_fields": "cellfast.api",
    "ingest_crops": "cellfast.api",
    "train": "cellfast.api",
    "embed": "cellfast.api",
    "profile": "cellfast.api",
    "evaluate": "cellfast.api",
    "load_model": "cellfast.model_file",
    "CellfastError": "cellfast.errors",
    "Screen": "cellfast.screens",
    "Loader": "cellfast.data",
    "TwoViews": "cellfast.augment",
    "SimCLR": "cellfast.models",
    "ntxent_loss": "cellfast.ops",
    "NTXentLoss": "cellfast.losses",
}

__all__ = [
    "CellfastError",
    "Loader",
    "NTXentLoss",
    "Screen",
    "SimCLR",
    "TwoViews",
    "__version__",
    "embed",
    "evaluate",
    "ingest_crops",
    "ingest_fields",
    "load_model",
    "ntxent_loss",
    "profile",
    "simulate",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'cellfast' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
