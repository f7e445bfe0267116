"""The cells of one field as their centroids, whoever found them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cellfast.errors import CellfastError


class LocationError(CellfastError):
    """A field without usable locations; ``reason`` is what the ledger counts it under."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (str(self), self.reason)


@dataclass(frozen=True)
class Locations:
    """The cells of one field: object_number int64 [n], centroid y and x float32 [n] (px, 0-based pixel centres); dropped rows by reason."""

    object_number: np.ndarray
    y: np.ndarray
    x: np.ndarray
    dropped: dict[str, int] = field(default_factory=dict)


def files_version(files: Sequence[Path], folder: Path) -> str:
    """A digest of the files' names relative to ``folder`` and their sizes."""
    content = hashlib.sha256()
    for file in files:
        name = file.relative_to(folder) if file.is_relative_to(folder) else file
        content.update(f"{name} {file.stat().st_size}\n".encode())
    return content.hexdigest()[:16]
