"""Profiles and their evaluation: tables, aggregation, normalisation, neighbours, scores. Imports neither torch, kornia nor
DALI.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "ProfileTable": "table",
    "read_profiles": "feature_files",
    "write_profiles": "table",
    "ProfileOptions": "build",
    "build_profiles": "build",
    "group_means": "aggregate",
    "group_medians": "aggregate",
    "normalize_profiles": "normalize",
    "parse_steps": "steps",
    "nearest_neighbours": "neighbours",
    "EvaluationOptions": "evaluate",
    "evaluate_profiles": "evaluate",
    "ActivityOptions": "activity",
    "score_activity": "activity",
    "average_precision": "mean_average_precision",
    "compare_results": "compare",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"cellfast.profiles.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'cellfast.profiles' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
