"""What an embedding run may be told; every value is an option of ``cellfast embed``. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cellfast.declared import check, value
from cellfast.errors import CellfastError, option

FEATURES = ("h", "z")
FORMATS = ("parquet", "anndata", "cpg")
ROTATIONS = (1, 4, 8)


@dataclass(frozen=True)
class EmbedOptions:
    """How cells become rows, and where the work is done.

    Raises:
        CellfastError: a value outside its limits, or values that do not go together.
    """

    features: str = value("h", "Encoder output h, or projection z.", choices=FEATURES)
    formats: tuple[str, ...] = value(
        ("parquet",),
        "What is written; repeat for several. cpg: the Cell Painting Gallery's workspace_dl folders.",
        choices=FORMATS,
    )
    dtype: str = value("float32", "Type of the features.", choices=("float32", "float16"))
    aggregate: str | None = value(None, "Write the mean of each well's cells, and no cells.", choices=("well",))
    tta: int = value(1, "Mean over this many views of a cell: 4 rotations, or 8 with mirror images.", choices=ROTATIONS)
    batch_size: int = value(256, "Cells per minibatch; changes results by rounding only.", minimum=1)
    amp: bool = value(False, "bfloat16 autocast.")
    compile: bool = value(False, "torch.compile the encoder.")
    workers: int | None = value(None, "Readers at the same time.  [default: by device and cores]", minimum=1)
    readers: str = value(
        "threads",
        "What the readers are; processes help where one interpreter cannot feed a GPU.",
        choices=("threads", "processes"),
    )
    decode: str = value(
        "auto",
        "Who decodes fields: host (tifffile), dali (NVIDIA DALI, on a GPU with its decoders), auto: what is faster on the first "
        "fields of 256 or more. The pixels are the same.",
        choices=("auto", "host", "dali"),
    )
    retries: int = value(2, "More tries for a field that cannot be read, before it is quarantined.", minimum=0)
    strict: bool = value(False, "Stop at the first field that cannot be used.")
    retry_quarantined: bool = value(False, "Make plates again that were finished with quarantined fields.")
    engine: str = value(
        "local",
        "ray: Ray Data over a cluster (needs cellfast[ray]); several processes on one or more machines: torchrun -m cellfast "
        "embed …",
        choices=("local", "ray"),
    )
    force: bool = value(False, "Replace files of another model or other cells.")

    def __post_init__(self) -> None:
        check(self)
        if self.decode == "dali" and (self.readers == "processes" or self.engine == "ray"):
            other = option("engine", "ray") if self.engine == "ray" else option("readers", "processes")
            raise CellfastError(
                f"{option('decode', 'dali')} does not go with {other}: DALI decodes in this process, on threads of its own"
            )

    def for_encoder(self) -> dict[str, Any]:
        """What of this `CropEncoder` is told."""
        return {name: getattr(self, name) for name in ("features", "amp", "tta", "compile", "batch_size")}

    def origin(self) -> dict[str, Any]:
        """What of this decides the values that are written, JSON-able."""
        kept = {name: getattr(self, name) for name in ("features", "amp", "tta", "dtype")}
        return {**kept, "aggregate": self.aggregate or "none"}
