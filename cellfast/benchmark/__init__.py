"""What can be measured: one function per subject, each returning a JSON-able dict; agreement is checked before anything is timed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Subject:
    """One thing that ``cellfast benchmark`` measures: ``module:function`` called with ``full`` or ``quick`` arguments.

    ``options``: the function's arguments that the command line may set (`cellfast.cli.benchmark.OPTIONS`).
    ``command``: instead of all this, a click command ``module:name``.
    """

    help: str
    function: str = ""
    full: dict[str, Any] = field(default_factory=dict)
    quick: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    command: str | None = None


SUBJECTS: dict[str, Subject] = {
    "ntxent": Subject(
        "Time and memory of NT-Xent, compared with plain PyTorch, torch.compile, lightly and others.",
        "cellfast.benchmark.ntxent:measure_ntxent",
        quick={"sizes": ((512, 128), (1024, 128)), "repeats": 3},
        options=("sizes", "dtype", "repeats", "device", "picture"),
    ),
    "ingest": Subject(
        "Ingest of fields of view, compared with only reading the images.",
        "cellfast.benchmark.ingest:measure_ingest",
        quick={"num_plates": 2, "sites": 2, "repeats": 2, "detect_fields": 4},
        options=("crop_size", "repeats"),
    ),
    "loader": Subject(
        "Minibatches from memory maps and through DALI, compared with a plain copy.",
        "cellfast.benchmark.loader:measure_loader",
        quick={"num_cells": 4000, "repeats": 2},
        options=("screen", "num_cells", "crop_size", "batch_size", "threads", "dali", "repeats"),
    ),
    "decode": Subject(
        "Reading fields from one HDF5 file as embed does, decoded by DALI, compared with tifffile; on the GPU where there is one.",
        "cellfast.benchmark.decode:measure_decode",
        full={"fields": 24},
        quick={"fields": 8, "compressions": ("none", "lzw"), "repeats": 1},
        options=("fields", "crop_size", "repeats", "device"),
    ),
    "augment": Subject(
        "Two views of each cell, compared with a chain of Kornia's own modules.",
        "cellfast.benchmark.augment:measure_augment",
        quick={"batch_size": 128, "repeats": 2},
        options=("crop_size", "output_size", "batch_size", "repeats", "device"),
    ),
    "train": Subject(
        "A whole training step, compared with the bare encoder's forward and backward.",
        "cellfast.benchmark.train:measure_train",
        quick={"batch_size": 64, "repeats": 2},
        options=("encoder", "crop_size", "output_size", "batch_size", "amp", "repeats", "device"),
    ),
    "embed": Subject(
        "Embedding from fields and from a crop store, compared with the bare encoder; two processes; resuming.",
        "cellfast.benchmark.embed:measure_embed",
        quick={"fields": 8, "cells_per_field": 32, "batch_size": 64, "repeats": 2},
        options=("encoder", "stem", "fields", "cells_per_field", "batch_size", "amp", "processes", "repeats", "device"),
    ),
    "evaluate": Subject(
        "Aggregation and nearest neighbours, compared with torch and scikit-learn.",
        "cellfast.benchmark.evaluate:measure_evaluate",
        quick={"num_cells": 100_000, "num_treatments": 5_000, "num_large": 10_000, "repeats": 1},
        options=("only", "num_cells", "num_treatments", "repeats"),
    ),
    "reference": Subject(
        "The whole path, compared with the reference implementation (your checkout of it) or a plain PyTorch baseline.",
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
