"""What can be measured: one function per subject, each returning a JSON-able dict; agreement is checked before anything is timed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Subject:
    """One thing that ``cellfast benchmark`` measures: ``module:function`` called with ``full`` or ``quick`` arguments.

    ``command``: a click command ``module:name`` of its own, for a subject with options beyond --quick and --out.
    """

    help: str
    function: str
    full: dict[str, Any] = field(default_factory=dict)
    quick: dict[str, Any] = field(default_factory=dict)
    command: str | None = None


SUBJECTS: dict[str, Subject] = {
    "ntxent": Subject(
        "NT-Xent beside plain PyTorch, torch.compile, lightly and others: time and memory of forward and backward.",
        "cellfast.benchmark.ntxent:measure_ntxent",
        full={"repeats": 5},
        quick={"sizes": ((512, 128), (1024, 128)), "repeats": 3},
    ),
    "ingest": Subject(
        "Fields of view to crop stores beside merely reading the images.",
        "cellfast.benchmark.ingest:measure_ingest",
        quick={"num_plates": 2, "sites": 2, "repeats": 2, "detect_fields": 4},
    ),
    "loader": Subject(
        "Minibatches from memory maps and through DALI beside a plain copy.",
        "cellfast.benchmark.loader:measure_loader",
        full={"screen": None},
        quick={"screen": None, "num_cells": 4000, "repeats": 2},
    ),
    "decode": Subject(
        "TIFF fields from HDF5 decoded by DALI beside tifffile, and their cells cut, on the GPU where there is one.",
        "cellfast.benchmark.decode:measure_decode",
        full={"fields": 24},
        quick={"fields": 8, "compressions": ("none", "lzw"), "repeats": 1},
    ),
    "augment": Subject(
        "Two views per cell beside the explicit Kornia chain.",
        "cellfast.benchmark.augment:measure_augment",
        quick={"batch_size": 128, "repeats": 2},
    ),
    "train": Subject(
        "A training step fed by loader and augmentation beside the bare encoder's forward and backward.",
        "cellfast.benchmark.train:measure_train",
        full={"repeats": 5},
        quick={"batch_size": 64, "repeats": 2},
    ),
    "embed": Subject(
        "Embedding from fields and from the crop store beside the bare encoder; memory, two processes, resuming.",
        "cellfast.benchmark.embed:measure_embed",
        quick={"fields": 8, "cells_per_field": 32, "batch_size": 64, "repeats": 2},
    ),
    "evaluate": Subject(
        "Aggregation and nearest neighbours beside torch, pandas and scikit-learn.",
        "cellfast.benchmark.evaluate:measure_evaluate",
        quick={"num_cells": 100_000, "num_treatments": 5_000, "num_large": 10_000, "num_plain_cells": 2_000, "repeats": 1},
    ),
    "reference": Subject(
        "The whole way beside the reference implementation (a checkout of yours) or a plain PyTorch baseline.",
        "cellfast.benchmark.reference:measure_reference",
        quick={"quick": True},
        command="cellfast.cli.benchmark_reference:reference",
    ),
}


def environment() -> dict[str, Any]:
    """Machine, versions, thread count and source commit, as every result carries them."""
    from cellfast.system import system_report
    from cellfast.training.provenance import source_commit

    # Paths and the kernel's build name say where it ran, not what it ran on.
    report = {key: value for key, value in system_report().items() if key not in ("nvcc", "platform")}
    return {"system": report, "commit": source_commit()}
