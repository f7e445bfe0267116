"""What a screen is: image tables, wells, locations, images, the crop store, ingest, simulation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cellfast.screens.crop_store import PlateStore, Screen
    from cellfast.screens.crop_writer import PlateWriter

from fsspec import register_implementation

# Named, not imported: whoever reads an image at such a URL has imported this package.
register_implementation("fieldstore", "cellfast.screens.field_store_files.FieldStoreFileSystem")

_PUBLIC = {
    "Screen": "cellfast.screens.crop_store",
    "PlateStore": "cellfast.screens.crop_store",
    "PlateWriter": "cellfast.screens.crop_writer",
}

__all__ = ["PlateStore", "PlateWriter", "Screen"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'cellfast.screens' has no attribute '{name}'")
