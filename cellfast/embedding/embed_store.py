"""Embeds a screen's crop store: each plate's cells through the encoder, in store order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cellfast.embedding.encoder import CropEncoder, feature_names
from cellfast.embedding.options import EmbedOptions
from cellfast.embedding.run import EmbedSummary, embed_source
from cellfast.embedding.sources import StoreSource
from cellfast.model_file import LoadedModel
from cellfast.screens import Screen

__all__ = ["CropEncoder", "EmbedSummary", "embed_screen", "feature_names"]


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

    A plate whose file is there and was made from the same crops by the same model in the same way is kept; one that was begun is gone
    on with.

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
