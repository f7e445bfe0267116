"""Cells of a screen as minibatches: ``Loader`` yields ``Batch`` (crops, rows)."""

from cellfast.data.batch import Batch
from cellfast.data.loader import BACKENDS, Loader
from cellfast.data.malloc import tune_malloc
from cellfast.data.sampler import RowSampler

__all__ = ["BACKENDS", "Batch", "Loader", "RowSampler", "tune_malloc"]
