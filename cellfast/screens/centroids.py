"""The cells of one field as their centroids, whoever found them."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """The cells of one field.

    Attributes:
        object_number: int64 [n]; y, x: centroids, float32 [n], px, 0-based pixel centres.
        dropped: rows dropped by reason.
        warnings: what is odd about them, for the ledger.
    """

    object_number: np.ndarray
    y: np.ndarray
    x: np.ndarray
    dropped: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
