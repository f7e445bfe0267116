"""Illumination functions: what a plane is divided by so that the field is evenly lit."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cellfast.bounded import load_npy
from cellfast.errors import CellfastError
from cellfast.metadata.names import file_name

MOST_LOADED = 32


@dataclass
class Illumination:
    """Functions from a folder: ``<plate>_<channel>.npy``, ``<plate>_Illum<channel>.npy`` (CellProfiler's name) or, for all plates, ``<channel>.npy``.

    Each is a float array [H, W] of positive, finite values. A plane becomes ``round(plane / (f / mean(f)))``, clipped to its type:
    the mean brightness of a field stays about what it was.
    """

    folder: Path
    description: str = ""
    _loaded: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        files = sorted(self.folder.glob("*.npy")) if self.folder.is_dir() else []
        if not files:
            raise CellfastError(
                f"{self.folder}: expected a folder with illumination functions <channel>.npy or <plate>_<channel>.npy, found none"
            )
        content = hashlib.sha256()
        for file in files:
            content.update(file.name.encode())
            with open(file, "rb") as handle:
                while block := handle.read(1 << 20):
                    content.update(block)
        self.description = f"{len(files)} functions, sha256 {content.hexdigest()[:16]}"

    def function(self, plate: str, channel: str) -> np.ndarray:
        """The function of a plate's channel, divided by its mean, float32 [H, W].

        Raises:
            CellfastError: a name that cannot name a file, none for this channel, not readable, or with values that are not positive and finite.
        """
        file_name("plate", plate), file_name("channel", channel)  # the folder is not left
        names = (f"{plate}_{channel}.npy", f"{plate}_Illum{channel}.npy", f"{channel}.npy", f"Illum{channel}.npy")
        file = next((self.folder / name for name in names if (self.folder / name).is_file()), None)
        if file is None:
            raise CellfastError(
                f"{self.folder}: no illumination function for plate {plate}, channel {channel}; expected one of {', '.join(names)}"
            )
        found = self._loaded.get(file.name)
        if found is None:
            values = load_npy(file)
            if values.ndim != 2 or not np.isfinite(values).all() or not (values > 0).all():
                raise CellfastError(f"{file}: expected positive, finite values [H, W], got {values.dtype} {values.shape}")
            with np.errstate(all="ignore"):
                found = (values / values.mean(dtype=np.float64)).astype(np.float32)
            if not np.isfinite(found).all() or not (found > 0).all():
                raise CellfastError(f"{file}: its values lie too far apart: {values.min():g} to {values.max():g}")
            # Functions of plates that are done would pile up over a screen of thousands.
            while len(self._loaded) >= MOST_LOADED:
                self._loaded.pop(next(iter(self._loaded)), None)
            self._loaded[file.name] = found
        return found

    def correct(self, plane: np.ndarray, plate: str, channel: str) -> np.ndarray:
        """The plane [H, W] divided by its function, in its own dtype."""
        function = self.function(plate, channel)
        if function.shape != plane.shape:
            raise CellfastError(
                f"illumination function of plate {plate}, channel {channel}: expected shape {plane.shape}, got {function.shape}"
            )
        with np.errstate(over="ignore"):  # what is beyond the type is clipped
            return np.clip(np.rint(plane / function), 0, np.iinfo(plane.dtype).max).astype(plane.dtype)
