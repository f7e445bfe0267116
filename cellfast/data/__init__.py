"""Cells of a screen as minibatches: ``Loader`` yields ``Batch`` (crops, rows)."""

from cellfast.data.loader import BACKENDS, Batch, Loader
from cellfast.data.malloc import tune_malloc
from cellfast.data.sampler import RowSampler

__all__ = ["BACKENDS", "Batch", "Loader", "RowSampler", "tune_malloc"]
