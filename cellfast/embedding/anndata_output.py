"""AnnData: ``<plate>.h5ad`` with the features in X, the metadata in obs; written in bounded memory."""

from __future__ import annotations

import json
from typing import Any

import h5py
import numpy as np

from cellfast.embedding.outputs import PlateOutput, sealed
from cellfast.embedding.parts import PartFiles
from cellfast.embedding.sources import PlatePlan
from cellfast.errors import CellfastError
from cellfast.storage.folder import Folder


class AnnDataOutput(PlateOutput):
    """``<plate>.h5ad``: X [cells, F], obs the metadata columns, var the features, uns["cellfast"] origin and ledger as JSON.

    obs_names are ``<plate>:<row>``. X is written piece by piece in the layout AnnData documents for dense arrays, so that a plate need
    not fit in memory; obs, var and uns are written by anndata itself.

    Raises:
        CellfastError: anndata is not installed.
    """

    kind = "anndata"

    def __init__(self, place: Folder, parts: PartFiles, names: list[str]) -> None:
        super().__init__(place, parts, names)
        try:
            import anndata  # noqa: F401
        except ImportError as error:
            raise CellfastError("--to anndata needs the package anndata: pip install 'cellfast[anndata]'") from error

    def sealing_file(self, plan: PlatePlan) -> str:
        return f"{plan.file_stem}.h5ad"

    def note(self, name: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None, int]:
        with self.place.reading(name) as handle, h5py.File(handle, "r") as file:
            if "cellfast" not in file.get("uns", {}):
                return None, None, 0
            notes = {key: json.loads(file["uns/cellfast"][key].asstr()[()]) for key in ("origin", "ledger")}
            return notes["origin"], notes["ledger"], int(file["X"].shape[0])

    def write(self, plan: PlatePlan, note: bytes) -> list[str]:
        import anndata
        import pandas as pd

        name = self.sealing_file(plan)
        origin, ledger = sealed(self.parts.origin(plan), note, [name]).values()
        dtype = np.dtype(self.parts.options.dtype)
        with self.sealing(plan) as path:
            frames, rows = [], 0
            with h5py.File(path, "w") as file:
                # AnnData's reader looks at these two attributes to tell a dense array.
                x = file.create_dataset(
                    "X", shape=(0, len(self.names)), maxshape=(None, len(self.names)), dtype=dtype, chunks=(1024, len(self.names))
                )
                x.attrs["encoding-type"], x.attrs["encoding-version"] = "array", "0.2.0"
                for metadata, values in self.tables(plan):
                    frames.append(metadata.to_pandas())
                    x.resize(rows + len(metadata), axis=0)
                    if len(metadata):
                        x[rows:] = values.reshape(len(metadata), len(self.names))
                    rows += len(metadata)
                obs = pd.concat(frames, ignore_index=True)
                # Few different texts in many rows: categories are what AnnData's users expect, and small.
                for column in obs.columns:
                    if not pd.api.types.is_numeric_dtype(obs[column]):
                        obs[column] = obs[column].astype(object).astype("category")
                obs.index = pd.Index([f"{plan.plate}:{row}" for row in range(rows)], dtype=object)
                var = pd.DataFrame(index=pd.Index(self.names, dtype=object))
                file.attrs["encoding-type"], file.attrs["encoding-version"] = "anndata", "0.1.0"
                write = getattr(anndata, "io", None) or anndata.experimental
                uns = {"cellfast": {"origin": origin.decode(), "ledger": ledger.decode()}}
                for key, value in (
                    ("obs", obs),
                    ("var", var),
                    ("uns", uns),
                    ("obsm", {}),
                    ("varm", {}),
                    ("obsp", {}),
                    ("varp", {}),
                    ("layers", {}),
                ):
                    write.write_elem(file, key, value)
        return [name]
