"""Embeds the crop store of a screen, or its fields directly: the public calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellfast.embedding.cells import StoreSource
from cellfast.embedding.field_source import FieldSource
from cellfast.embedding.options import EmbedOptions
from cellfast.embedding.run import EmbedSummary, embed_source
from cellfast.errors import CellfastError, option
from cellfast.model_file import LoadedModel
from cellfast.screens import Screen
from cellfast.screens.cutting import BORDERS
from cellfast.screens.field_cells import FieldReader
from cellfast.screens.fields import OpenedFields
from cellfast.screens.image_files import check_files
from cellfast.screens.ingest_fields import probe_images


def embed_screen(
    screen: Screen,
    model: LoadedModel,
    out: str | Path,
    *,
    device: torch.device | str = "cpu",
    show_progress: bool = True,
    **options: Any,
) -> EmbedSummary:
    """Write one parquet file per plate, the metadata columns then one column per feature, a row per cell in store order.

    A plate whose file is there and was made from the same crops by the same model in the same way is kept; one that was begun is
    gone on with.

    Args:
        screen: must have the model's channels, crop size and pixel type.
        out: folder or fsspec URL for ``<plate>.parquet`` and ``embeddings.json``.
        options: of `EmbedOptions`.

    Raises:
        CellfastError: as `embed_source`.
    """
    # Before anything is read: the window must fit in the crops.
    model.check_screen(str(screen.path), screen.channel_names, screen.crop_size, 8 * screen.dtype().itemsize)
    source = StoreSource(screen, model.output_size)
    return embed_source(source, model, out, EmbedOptions(**options), device=device, show_progress=show_progress)


def embed_fields(
    fields: OpenedFields,
    model: LoadedModel,
    out: str | Path,
    *,
    border: str = "pad",
    batch_regex: str | None = None,
    device: torch.device | str = "cpu",
    show_progress: bool = True,
    **options: Any,
) -> EmbedSummary:
    """Embed every located cell of the fields, as if they had been ingested first: the same rows in the same order, equal to
    rounding.

    Each field is read and decoded once, and no crop store is made. A model with ``scaling: plate`` needs each plate's intensity
    percentiles first; its fields are then read twice.

    Args:
        fields: of `cellfast.screens.fields.open_fields`; must have the model's channels and pixel type. The crop size is the
            model's.
        out: folder or fsspec URL.
        border: ``pad``, ``reflect`` or ``drop``, as in `cellfast.screens.ingest_fields`.
        batch_regex: tells the experimental batch from the plate's name.
        options: of `EmbedOptions`.

    Raises:
        CellfastError: as `embed_source`; no fields, one file for two channels or fields, none of some fields tried can be read.
    """
    if border not in BORDERS:
        raise CellfastError(f"{option('border')} must be one of {', '.join(BORDERS)}, got {border!r}")
    table, name, asked = fields.table, fields.source, EmbedOptions(**options)
    if not table.fields:
        raise CellfastError(f"{name or 'the image table'} lists no fields")
    check_files(table.fields, table.channel_names)
    shape, dtype = probe_images(table)
    model.check_screen(name or "of these fields", list(table.channel_names), model.crop_size, 8 * np.dtype(dtype).itemsize)
    reader = FieldReader(table.channel_names, fields.locations, fields.illumination, model.crop_size, border, shape, dtype.name)
    source = FieldSource(
        table,
        reader,
        model.output_size,
        name=name or "fields",
        batch_regex=batch_regex,
        retries=asked.retries,
        strict=asked.strict,
    )
    elsewhere = fields.locations.unused(table.fields)
    source.notes = [*table.notes, *([elsewhere] if elsewhere else [])]
    source.unmatched, source.unused = fields.unmatched, fields.unused
    return embed_source(source, model, out, asked, device=device, show_progress=show_progress)
