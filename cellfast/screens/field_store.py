"""Whole fields in one HDF5 file as they were written by the microscope: encoded TIFF bytes, to be decoded where they are needed.

Layout (attribute ``format`` = ``cellfast-fields``, ``version`` = 1): ``encoded`` uint8 [total], the files one after the other,
field by field and channel by channel; ``offsets`` int64 [N · C + 1]; attributes ``num_fields``, ``num_channels``, ``height``,
``width``, ``dtype`` (``uint16`` or ``uint8``), ``channel_names``; ``files`` (optional): N · C names, by which the store stands in
for the folder the images came from (``--image-root FIELDS.h5``); ``crc32`` uint32 [N · C], of each file's bytes. A seal
(`cellfast.screens.sealed`) covers all but ``encoded``. Stores of earlier versions, without seal and ``crc32``, are read too, and
files of others whose ``encoded`` is a variable-length uint8 dataset [N, C].
"""

from __future__ import annotations

import io
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cellfast.atomic import atomic_path
from cellfast.errors import CellfastError
from cellfast.screens import sealed
from cellfast.screens.tiff import check_page, open_tiff, read_alike
from cellfast.storage.urls import is_url, read_bytes

FORMAT, VERSION = "cellfast-fields", 1
AGAIN = "write it again with `cellfast ingest fields … --keep-fields`"


def greyscale_tiff(source: Path | io.BytesIO, name: str) -> tuple[np.dtype, tuple[int, int], bool]:
    """Depth and shape of a single-page greyscale TIFF, and whether a plain decoder gives its values as stored.

    Raises:
        CellfastError: any other file: a decoder may return wrong or partial pixels of it without a word.
    """
    try:
        with open_tiff(source, name) as (tiff, tags, size):
            page: Any = tiff.pages[0]
            pages = len(tiff.pages)
            shape, dtype = page.shape, page.dtype
            check_page(page, name, size)
            plain = pages == 1 and read_alike(page, tags, size)
    except CellfastError:
        raise
    except Exception as error:  # tifffile has a dozen kinds for a damaged file
        raise CellfastError(f"{name} cannot be read as TIFF ({error})") from error
    if pages != 1 or len(shape) != 2 or dtype not in (np.dtype(np.uint16), np.dtype(np.uint8)):
        found = f"{pages} page(s) of {dtype} {shape}"
        raise CellfastError(f"{name} must be a single-page greyscale TIFF of 8 or 16 bits, got {found}")
    return np.dtype(dtype), (int(shape[0]), int(shape[1])), plain


def write_field_store(
    path: str | os.PathLike[str],
    files: Sequence[Sequence[str | os.PathLike[str]]],
    channel_names: Sequence[str] | None = None,
    *,
    names: Sequence[Sequence[str]] | None = None,
    leave_out: bool = False,
    progress: Callable[[int], None] = lambda fields: None,
) -> list[str]:
    """Keep the TIFF files of fields in one HDF5 file, byte for byte, and return what was not (one line each).

    Greyscale files that decoders take differently (a palette, an inverted scale, a turned orientation, strips that do not fit the
    rows; `cellfast.screens.tiff.read_alike`) are stored anew as plain uncompressed TIFF.

    Args:
        files: for each field its C paths or fsspec URLs, in channel order.
        names: what the files are called in the store; None: it keeps no names.
        leave_out: leave out a field with a file that cannot be kept (missing, unreadable, of another size or depth than the first
            field kept), and tell; otherwise that is an error.
        progress: called with 1 after each field.

    Raises:
        CellfastError: no files, two files of one name, or (without ``leave_out``, or where nothing is left) a file that cannot be
            kept; nothing is then written.
    """
    import h5py

    if not files or len({len(channels) for channels in files}) != 1 or not files[0]:
        raise CellfastError("every field needs the same number of channel files, at least one, and there must be a field")
    num_channels = len(files[0])
    channels = list(channel_names) if channel_names is not None else [f"channel{number}" for number in range(num_channels)]
    if len(channels) != num_channels:
        raise CellfastError(f"{num_channels} channels need as many names, got {', '.join(channels)}")
    if names is not None:
        twice = [name for name, count in Counter(name for field in names for name in field).items() if count > 1 and name]
        if twice:
            raise CellfastError(f"{path}: two files would be called {twice[0]} in the field store")
    with atomic_path(path) as temporary:
        with h5py.File(temporary, "w", userblock_size=sealed.USER_BLOCK) as file:
            notes = _write(file, path, files, channels, names, leave_out, progress)
        sealed.seal(temporary, "encoded")
    return notes


def _write(
    file: Any,
    path: str | os.PathLike[str],
    files: Sequence[Sequence[str | os.PathLike[str]]],
    channels: list[str],
    names: Sequence[Sequence[str]] | None,
    leave_out: bool,
    progress: Callable[[int], None],
) -> list[str]:
    import h5py

    alike: tuple[np.dtype, tuple[int, int]] | None = None
    offsets, kept, sums, notes = [0], [], [], []
    encoded = file.create_dataset("encoded", shape=(0,), maxshape=(None,), dtype=np.uint8, chunks=(1 << 22,))
    for number, field in enumerate(files):
        try:
            contents, alike, anew = _contents(field, alike)
        except CellfastError as error:
            if not leave_out:
                raise
            notes.append(f"left out: {error}")
            progress(1)
            continue
        notes += anew
        for content in contents:
            encoded.resize((offsets[-1] + len(content),))
            encoded[offsets[-1] :] = np.frombuffer(content, np.uint8)
            offsets.append(offsets[-1] + len(content))
            sums.append(zlib.crc32(content))
        kept.append(number)
        progress(1)
    if alike is None:
        raise CellfastError(f"none of {len(files)} fields can be kept in {path}; the first was {notes[0]}")
    file.create_dataset("offsets", data=np.array(offsets, np.int64))
    file.create_dataset("crc32", data=np.array(sums, np.uint32))
    if names is not None:
        flat = [name for number in kept for name in names[number]]
        file.create_dataset("files", data=flat, dtype=h5py.string_dtype())
    file.attrs.update(
        format=FORMAT, version=VERSION, num_fields=len(kept), num_channels=len(channels), height=alike[1][0], width=alike[1][1],
        dtype=alike[0].name, channel_names=channels,
    )  # fmt: skip
    return notes


def _contents(
    field: Sequence[str | os.PathLike[str]], alike: tuple[np.dtype, tuple[int, int]] | None
) -> tuple[list[bytes], tuple[np.dtype, tuple[int, int]], list[str]]:
    """The bytes of a field's files, their depth and size, and which were stored anew."""
    import tifffile

    contents, anew = [], []
    for name in field:
        try:
            content = read_bytes(str(name)) if is_url(name) else Path(name).read_bytes()
        except OSError as error:
            raise CellfastError(f"{name or 'a channel without a file'} cannot be read ({error.strerror or error})") from error
        dtype, shape, plain = greyscale_tiff(io.BytesIO(content), str(name))
        dtype = dtype.newbyteorder("=")
        alike = alike or (dtype, shape)
        if (dtype, shape) != alike:
            raise CellfastError(f"{name} is {dtype} {shape}, the first file is {alike[0]} {alike[1]}: all fields must be alike")
        if not plain:
            buffer = io.BytesIO()
            try:
                tifffile.imwrite(buffer, tifffile.imread(io.BytesIO(content)), photometric="minisblack")
            except Exception as error:  # each compression has its own kinds
                raise CellfastError(f"{name} cannot be read as TIFF ({error})") from error
            content = buffer.getvalue()
            anew.append(
                f"{name} was stored anew: decoders take its values differently (palette, inverted, turned, or odd strips)"
            )
        contents.append(content)
    assert alike is not None
    return contents, alike, anew


class EncodedFields:
    """Encoded fields of an HDF5 file: ``num_fields``, ``num_channels``, ``shape`` (H, W), ``dtype``, :meth:`encoded`.

    Raises:
        CellfastError: not such a file, a damaged or newer one, or one that points into another file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with self._said():
            self._file = sealed.open_hdf5(self.path, EncodedFields)
            try:
                self._open()
            except BaseException:
                self._file.close()
                raise

    @contextmanager
    def _said(self) -> Iterator[None]:
        """What a damaged file makes of HDF5, numpy, tifffile and memory, as one sentence."""
        try:
            yield
        except sealed.DamagedFile as error:
            raise CellfastError(f"{error}; {AGAIN}") from error
        except CellfastError:
            raise
        except Exception as error:
            raise CellfastError(
                f"{self.path}: damaged, or not a field store ({type(error).__name__}: {error}); {AGAIN}"
            ) from error

    def _open(self) -> None:
        import h5py

        self._data = self._own("encoded")
        self._sums: np.ndarray | None = None
        self._vlen = h5py.check_vlen_dtype(self._data.dtype) is not None
        if self._vlen:
            self._open_vlen()
        else:
            self._open_flat()

    def _own(self, name: str) -> Any:
        import h5py

        link = self._file.get(name, getlink=True) if name in self._file else None
        data = self._file[name] if isinstance(link, h5py.HardLink) else None
        if not isinstance(data, h5py.Dataset) or data.external or data.is_virtual:
            found = ", ".join(self._file) or "nothing"
            raise CellfastError(
                f"{self.path} has no dataset {name!r} of its own: it holds {found}; links to other files are refused"
            )
        sealed.check_sizes(data, self.path)
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
        if self.num_fields < 1 or self.num_channels < 1 or min(self.shape) < 1 or self._data.ndim != 1:
            raise sealed.DamagedFile(
                f"{self.path}: damaged: {self.num_fields} fields of {self.num_channels} channels {self.shape}"
            )
        self._offsets = self._integers("offsets", np.int64)
        if "crc32" in self._file:
            self._sums = self._integers("crc32", np.uint32)
            if len(self._sums) != self.num_fields * self.num_channels:
                raise sealed.DamagedFile(f"{self.path}: damaged: {len(self._sums)} checksums for {self.num_fields} fields")
        rising = len(self._offsets) == self.num_fields * self.num_channels + 1 and bool((np.diff(self._offsets) > 0).all())
        if not rising or self._offsets[0] != 0 or self._offsets[-1] != self._data.shape[0] or self._data.dtype != np.uint8:
            raise sealed.DamagedFile(f"{self.path} is damaged: its offsets do not fit {self._data.shape[0]} bytes")

    def _integers(self, name: str, dtype: Any) -> np.ndarray:
        data = self._own(name)
        if data.ndim != 1 or data.dtype != dtype:
            raise sealed.DamagedFile(f"{self.path}: damaged: {name} is {data.dtype} of shape {data.shape}")
        return data[:]

    def _open_vlen(self) -> None:
        if self._data.ndim != 2 or 0 in self._data.shape:
            raise CellfastError(f"{self.path}:encoded must have shape (N, C), got {self._data.shape}")
        self.num_fields, self.num_channels = map(int, self._data.shape)
        first = io.BytesIO(np.asarray(self._data[0, 0], np.uint8).tobytes())
        self.dtype, self.shape, _ = greyscale_tiff(first, f"{self.path}:encoded[0, 0]")

    def encoded(self, index: int) -> list[np.ndarray]:
        """The C files of field ``index`` as uint8 arrays.

        Raises:
            CellfastError: as `file`.
        """
        return self._files(index * self.num_channels, (index + 1) * self.num_channels)

    def file(self, index: int, channel: int) -> np.ndarray:
        """One file of field ``index``, uint8 [n].

        Raises:
            CellfastError: it differs from its checksum, or cannot be read.
        """
        number = index * self.num_channels + channel
        return self._files(number, number + 1)[0]

    def size(self, number: int) -> int | None:
        """Bytes of a file, counted over all; None where the store does not tell without reading it."""
        return None if self._vlen else int(self._offsets[number + 1] - self._offsets[number])

    def _files(self, first: int, last: int) -> list[np.ndarray]:
        """Files ``first`` … ``last`` − 1 of all."""
        with self._said():
            if self._vlen:
                return [np.ascontiguousarray(self._data[divmod(n, self.num_channels)], np.uint8) for n in range(first, last)]
            edges = self._offsets[first : last + 1]
            content = self._data[edges[0] : edges[-1]]
            files = [content[a - edges[0] : b - edges[0]] for a, b in pairwise(edges)]
            for number, file in enumerate(files, first):
                if self._sums is not None and zlib.crc32(file) != self._sums[number]:
                    field, channel = divmod(number, self.num_channels)
                    raise sealed.DamagedFile(
                        f"{self.path}: the file of field {field}, channel {channel} differs from its checksum"
                    )
            return files

    def names(self) -> list[str]:
        """What the N · C files are called, field by field; empty where the store keeps no names.

        Raises:
            CellfastError: not one name for each file.
        """
        if "files" not in self._file:
            return []
        with self._said():
            names = [name.decode() if isinstance(name, bytes) else str(name) for name in self._own("files")[:]]
        if len(names) != self.num_fields * self.num_channels:
            raise CellfastError(f"{self.path} is damaged: {len(names)} names for {self.num_fields * self.num_channels} files")
        return names

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> EncodedFields:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
