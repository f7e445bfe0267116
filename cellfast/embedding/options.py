"""What an embedding run is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cellfast.errors import CellfastError

FEATURES = ("h", "z")
FORMATS = ("parquet", "anndata", "cpg")
DTYPES = ("float32", "float16")
ROTATIONS = (1, 4, 8)
READERS = ("threads", "processes")
ENGINES = ("local", "ray")
DECODES = ("auto", "host", "dali")


@dataclass(frozen=True)
class EmbedOptions:
    """How cells become rows, and where the work is done.

    Attributes:
        features: ``h`` (encoder output, what is profiled) or ``z`` (projection).
        batch_size: cells per minibatch; changes results by rounding only.
        amp: bfloat16 autocast.
        tta: test-time augmentation, the mean of the features over 1 view, 4 right-angle rotations, or 8 (with mirror images).
        dtype: type of the stored features.
        formats: what is written: ``parquet``, ``anndata``, ``cpg``.
        aggregate_wells: write the mean of each well's cells and no cells.
        compile: ``torch.compile`` the encoder.
        workers: readers of fields at the same time; None: chosen from the cores.
        readers: ``threads`` or ``processes``.
        retries: how often a field that cannot be read is tried again before it is quarantined.
        strict: stop at the first field that cannot be used.
        retry_quarantined: make plates again that an earlier run finished with quarantined fields.
        force: make everything again.
        decode: who decodes fields: ``host`` (tifffile, on the readers), ``dali``, or ``auto``: the faster on the first fields, see
            `cellfast.embedding.decoding.choose_decoding`; the pixels are the same.
        engine: ``local`` (this process, or those of torchrun) or ``ray``.
    """

    features: str = "h"
    batch_size: int = 256
    amp: bool = False
    tta: int = 1
    dtype: str = "float32"
    formats: tuple[str, ...] = ("parquet",)
    aggregate_wells: bool = False
    compile: bool = False
    workers: int | None = None
    readers: str = "threads"
    retries: int = 2
    strict: bool = False
    retry_quarantined: bool = False
    force: bool = False
    engine: str = "local"
    decode: str = "auto"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise CellfastError(f"--batch-size must be at least 1, got {self.batch_size}")
        if self.retries < 0:
            raise CellfastError(f"--retries must be 0 or more, got {self.retries}")
        if self.workers is not None and self.workers < 1:
            raise CellfastError(f"--workers must be at least 1, got {self.workers}")
        if not self.formats:
            raise CellfastError(f"nothing to write: choose one of {', '.join(FORMATS)}")
        for name, value, known in (
            ("features", self.features, FEATURES),
            ("--tta", self.tta, ROTATIONS),
            ("--dtype", self.dtype, DTYPES),
            ("--readers", self.readers, READERS),
            ("--engine", self.engine, ENGINES),
            ("--decode", self.decode, DECODES),
            *(("--to", name, FORMATS) for name in self.formats),
        ):
            if value not in known:
                raise CellfastError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")

        if self.decode == "dali" and (self.readers == "processes" or self.engine == "ray"):
            other = "--engine ray" if self.engine == "ray" else "--readers processes"
            raise CellfastError(f"--decode dali does not go with {other}: DALI decodes in this process, on threads of its own")

    def origin(self) -> dict[str, Any]:
        """What of this decides the values that are written, JSON-able."""
        return {
            "features": self.features,
            "amp": self.amp,
            "tta": self.tta,
            "dtype": self.dtype,
            "aggregate": "well" if self.aggregate_wells else "none",
        }
