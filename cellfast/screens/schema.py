"""The crop store's schema, version 1: names, types and the meaning of each (docs/crop_store.md tells it in prose)."""

from __future__ import annotations

import numpy as np

from cellfast.metadata import columns

FORMAT = "cellfast-crop-store"
SCHEMA_VERSION = 1

# Pixels start on a page boundary, so that a memory map of them can be gathered from directly.
PAGE_BYTES = 4096

CROPS = "crops"
CELLS = "cells"
FIELDS = "fields"
WELLS = "wells"
CHANNELS = "channels"

PIXEL_DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16))

# Percentiles of a plate's crop pixels that become scale_low and scale_high; crops padded with zeros at the border are left out.
SCALE_PERCENTILES = (0.1, 99.9)
# Pixels of every second row and column go into the histogram: a quarter of the work, the same percentiles to within noise.
HISTOGRAM_STRIDE = 2

CELL_COLUMNS: dict[str, np.dtype] = {
    "field": np.dtype(np.int32),  # row of /fields
    "object_number": np.dtype(np.int64),
    "center_y_px": np.dtype(np.float32),
    "center_x_px": np.dtype(np.float32),
    "padded": np.dtype(np.bool_),  # part of the crop lies outside the field
    "crc32": np.dtype(np.uint32),  # of the crop's bytes
}
FIELD_COLUMNS: dict[str, np.dtype] = {
    "well": np.dtype(np.int32),  # row of /wells
    "site": np.dtype(np.int64),
    "image_number": np.dtype(np.int64),
}
WELL_TEXT = ("name", "compound", "moa")

METADATA_COLUMNS = columns.CELL_COLUMNS
