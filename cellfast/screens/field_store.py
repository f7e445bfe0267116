"""Whole fields in one HDF5 file as they were written by the microscope: encoded TIFF bytes, to be decoded where they are needed.

Layout (attribute ``format`` = ``cellfast-fields``, ``version`` = 1): ``encoded`` uint8 [total], the files one after the other, field by
field and channel by channel; ``offsets`` int64 [N · C + 1]; attributes ``num_fields``, ``num_channels``, ``height``, ``width``,
``dtype`` (``uint16`` or ``uint8``), ``channel_names``. Files of others whose ``encoded`` is a variable-length uint8 dataset [N, C] are
read too.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cellfast.atomic import atomic_path
from cellfast.errors import CellfastError

FORMAT, VERSION = "cellfast-fields", 1


def greyscale_tiff(source: Path | io.BytesIO, name: str) -> tuple[np.dtype, tuple[int, int], bool]:
    """Depth and shape of a single-page greyscale TIFF, and whether a plain decoder gives its values as stored.

    Raises:
        CellfastError: any other file: a decoder may return wrong or partial pixels of it without a word.
    """
    import tifffile

    try:
        with tifffile.TiffFile(source) as tiff:
            page, pages = tiff.pages[0], len(tiff.pages)
            shape, dtype, photometric, oriented = page.shape, page.dtype, page.photometric, page.tags.valueof(274, 1)
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise CellfastError(f"{name} cannot be read as TIFF ({error})") from error
    if pages != 1 or len(shape) != 2 or dtype not in (np.dtype(np.uint16), np.dtype(np.uint8)):
        found = f"{pages} page(s) of {dtype} {shape}"
        raise CellfastError(f"{name} must be a single-page greyscale TIFF of 8 or 16 bits, got {found}")
    plain = photometric == tifffile.PHOTOMETRIC.MINISBLACK and oriented == 1
    return np.dtype(dtype), (int(shape[0]), int(shape[1])), plain


def write_field_store(
    path: str | os.PathLike[str], files: Sequence[Sequence[str | os.PathLike[str]]], channel_names: Sequence[str] | None = None
) -> list[str]:
    """Keep the TIFF files of fields in one HDF5 file, byte for byte, and return what was not (one line each).

    Greyscale files with a palette, an inverted scale or a turned orientation are stored anew as plain uncompressed TIFF, because
    decoders would convert their values.

    Args:
        files: for each field its C paths, in channel order.

    Raises:
        CellfastError: no files, an unreadable file, or one of another size or depth than the first; nothing is then written.
    """
    import h5py
    import tifffile

    if not files or len({len(channels) for channels in files}) != 1 or not files[0]:
        raise CellfastError("every field needs the same number of channel files, at least one, and there must be a field")
    num_channels, notes = len(files[0]), []
    names = list(channel_names) if channel_names is not None else [f"channel{number}" for number in range(num_channels)]
    if len(names) != num_channels:
        raise CellfastError(f"{num_channels} channels need as many names, got {', '.join(names)}")
    first: tuple[np.dtype, tuple[int, int]] | None = None
    offsets = [0]
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        encoded = file.create_dataset("encoded", shape=(0,), maxshape=(None,), dtype=np.uint8, chunks=(1 << 22,))
        for channels in files:
            for name in map(Path, channels):
                dtype, shape, plain = greyscale_tiff(name, str(name))
                if first is None:
                    first = (dtype, shape)
                if (dtype, shape) != first:
                    raise CellfastError(
                        f"{name} is {dtype} {shape}, the first file is {first[0]} {first[1]}: all fields must be alike"
                    )
                if plain:
                    content = name.read_bytes()
                else:
                    buffer = io.BytesIO()
                    tifffile.imwrite(buffer, tifffile.imread(name), photometric="minisblack")
                    content = buffer.getvalue()
                    notes.append(f"{name} was stored anew: its values are not stored plainly (palette, inverted or turned)")
                encoded.resize((offsets[-1] + len(content),))
                encoded[offsets[-1] :] = np.frombuffer(content, np.uint8)
                offsets.append(offsets[-1] + len(content))
        file.create_dataset("offsets", data=np.array(offsets, np.int64))
        file.attrs.update(
            format=FORMAT, version=VERSION, num_fields=len(files), num_channels=num_channels, height=first[1][0], width=first[1][1],
            dtype=first[0].name, channel_names=names,
        )  # fmt: skip
    return notes


class EncodedFields:
    """Encoded fields of an HDF5 file: ``num_fields``, ``num_channels``, ``shape`` (H, W), ``dtype``, :meth:`encoded`.

    Raises:
        CellfastError: not such a file, a damaged or newer one, or one that points into another file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import h5py

        self.path = Path(path)
        try:
            self._file = h5py.File(self.path, "r")
        except OSError as error:
            raise CellfastError(f"{self.path} cannot be read as HDF5 ({error})") from error
        try:
            self._data = self._own("encoded")
            self._vlen = h5py.check_vlen_dtype(self._data.dtype) is not None
            if self._vlen:
                self._open_vlen()
            else:
                self._open_flat()
        except BaseException:
            self._file.close()
            raise

    def _own(self, name: str) -> Any:
        import h5py

        link = self._file.get(name, getlink=True) if name in self._file else None
        data = self._file[name] if isinstance(link, h5py.HardLink) else None
        if not isinstance(data, h5py.Dataset) or data.external or data.is_virtual:
            found = ", ".join(self._file) or "nothing"
            raise CellfastError(
                f"{self.path} has no dataset {name!r} of its own: it holds {found}; links to other files are refused"
            )
        return data

    def _open_flat(self) -> None:
        attrs = self._file.attrs
        if attrs.get("format") != FORMAT:
            raise CellfastError(f"{self.path} is not a field store (format {attrs.get('format')!r}, expected {FORMAT!r})")
        if int(attrs["version"]) > VERSION:
            raise CellfastError(
                f"{self.path} is field store version {attrs['version']}, this cellfast reads {VERSION}: upgrade cellfast"
            )
        self.num_fields, self.num_channels = int(attrs["num_fields"]), int(attrs["num_channels"])
        self.shape, self.dtype = (int(attrs["height"]), int(attrs["width"])), np.dtype(str(attrs["dtype"]))
        self._offsets = self._own("offsets")[:]
        rising = len(self._offsets) == self.num_fields * self.num_channels + 1 and bool((np.diff(self._offsets) > 0).all())
        if not rising or self._offsets[0] != 0 or self._offsets[-1] != self._data.shape[0] or self._data.dtype != np.uint8:
            raise CellfastError(f"{self.path} is damaged: its offsets do not fit {self._data.shape[0]} bytes; write it again")

    def _open_vlen(self) -> None:
        if self._data.ndim != 2 or 0 in self._data.shape:
            raise CellfastError(f"{self.path}:encoded must have shape (N, C), got {self._data.shape}")
        self.num_fields, self.num_channels = map(int, self._data.shape)
        first = io.BytesIO(np.asarray(self._data[0, 0], np.uint8).tobytes())
        self.dtype, self.shape, _ = greyscale_tiff(first, f"{self.path}:encoded[0, 0]")

    def encoded(self, index: int) -> list[np.ndarray]:
        """The C files of field ``index`` as uint8 arrays."""
        if self._vlen:
            return [np.ascontiguousarray(part, np.uint8) for part in self._data[index]]
        edges = self._offsets[index * self.num_channels : (index + 1) * self.num_channels + 1]
        content = self._data[edges[0] : edges[-1]]
        return [content[a - edges[0] : b - edges[0]] for a, b in pairwise(edges)]

    def close(self) -> None:
        """Close the file."""
        self._file.close()
