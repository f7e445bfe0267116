"""A trained model as one file that other programs run."""

from cellfast.export.exported import (
    ExportedModel,
    ExportSummary,
    check_target,
    export_model,
    is_exported,
    load_exported,
    read_export_metadata,
)

__all__ = [
    "ExportSummary",
    "ExportedModel",
    "check_target",
    "export_model",
    "is_exported",
    "load_exported",
    "read_export_metadata",
]
