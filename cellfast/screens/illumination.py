"""Illumination functions: what a plane is divided by so that the field is evenly lit."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cellfast.bounded import load_npy
from cellfast.errors import CellfastError
from cellfast.metadata.names import file_name
from cellfast.screens.image_files import FileFinder, base_channel

MOST_LOADED = 32


@dataclass
class Illumination:
    """Functions from a folder and the folders in it.

    Of plate and channel, the first that is there: the file that the image table names (``named``: (plate, channel) → (folder,
    name)); ``<plate>_<channel>.npy`` or ``<plate>_Illum<channel>.npy`` (CellProfiler's name); the same or
    ``[Illum]<channel>.npy`` in a folder of the plate's name; and for all plates ``[Illum]<channel>.npy`` in the folder itself.
    The channel OrigDNA is also called DNA.

    Each is a float array [H, W] of positive, finite values. A plane becomes ``round(plane / (f / mean(f)))``, clipped to its
    type: the mean brightness of a field stays about what it was.
    """

    folder: Path
    named: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    description: str = ""
    _loaded: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    _files: dict[str, Path] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._files = {file.relative_to(self.folder).as_posix(): file for file in sorted(self.folder.rglob("*.npy"))}
        if not self._files:
            raise CellfastError(
                f"{self.folder}: expected a folder with illumination functions <channel>.npy or <plate>_<channel>.npy, found none"
            )
        content = hashlib.sha256()
        for name, file in self._files.items():
            content.update(name.encode())
            with open(file, "rb") as handle:
                while block := handle.read(1 << 20):
                    content.update(block)
        self.description = f"{len(self._files)} functions, sha256 {content.hexdigest()[:16]}"

    def _file(self, plate: str, channel: str) -> Path:
        both = [f"{kind}{name}.npy" for name in dict.fromkeys((channel, base_channel(channel))) for kind in ("", "Illum")]
        of_plate = [f"{plate}_{name}" for name in both]
        wanted = [*of_plate, *(f"{plate}/{name}" for name in (*of_plate, *both)), *both]
        if (plate, channel) in self.named:
            folder, name = self.named[plate, channel]
            file = Path(FileFinder(self.folder).find(folder, name, plate))
            if file.is_file():
                return file
        for name in wanted:
            # What has the plate in its name may lie deeper.
            deep = [p for key, p in self._files.items() if key == name or (name not in both and key.endswith(f"/{name}"))]
            if len(deep) > 1:
                raise CellfastError(f"{deep[0]} and {deep[1]}: two illumination functions for plate {plate}, channel {channel}")
            if deep:
                return deep[0]
        raise CellfastError(
            f"{self.folder}: no illumination function for plate {plate}, channel {channel}; expected one of {', '.join(wanted)}"
        )

    def function(self, plate: str, channel: str) -> np.ndarray:
        """The function of a plate's channel, divided by its mean, float32 [H, W].

        Raises:
            CellfastError: a name that cannot name a file, none for this channel, not readable, or with values that are not
                positive and finite.
        """
        file_name("plate", plate), file_name("channel", channel)  # the folder is not left
        found = self._loaded.get(f"{plate}/{channel}")
        if found is None:
            file = self._file(plate, channel)
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
            self._loaded[f"{plate}/{channel}"] = found
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
