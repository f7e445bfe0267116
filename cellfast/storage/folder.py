"""A folder to write into, on a local disk or at an fsspec URL (s3://, gs://, memory://): files appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from cellfast.atomic import FULL, atomic_path, told_when_full
from cellfast.errors import CellfastError
from cellfast.storage.urls import file_system, is_url

Checksum = dict[str, Any]


def checksum(handle: BinaryIO) -> Checksum:
    """``{"bytes": length, "crc32": eight hex digits}`` of what is left to read of ``handle``."""
    crc, length = 0, 0
    while block := handle.read(1 << 20):
        crc, length = zlib.crc32(block, crc), length + len(block)
    return {"bytes": length, "crc32": f"{crc:08x}"}


class Folder(ABC):
    """A folder; names in it are relative, with ``/``, and nothing outside it is ever read or written.

    Names may come from files: every method refuses one that leads out of the folder, by ``..``, an absolute path or a link.
    Can be sent to other processes.

    Attributes:
        location: path or URL.

    Raises:
        CellfastError: (from every method) a name leads out of the folder, or the object store refuses.
    """

    def __init__(self, location: str) -> None:
        self.location = location

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.location,)

    def __str__(self) -> str:
        return self.location

    @abstractmethod
    def path(self, name: str) -> str:
        """Where ``name`` lies, for messages."""

    @abstractmethod
    def on_disk(self, name: str) -> Path | None:
        """Where ``name`` lies on the local disk; None in an object store."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether the file ``name`` is there."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Names of the files and folders in ``folder`` (``""``: in this one), sorted; empty where there is none."""

    @abstractmethod
    def read_bytes(self, name: str) -> bytes:
        """The content of a small file; `FileNotFoundError` where there is none."""

    @abstractmethod
    def reading(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Open ``name`` for reading, seekable; `FileNotFoundError` where there is none."""

    @abstractmethod
    def writing(self, name: str) -> AbstractContextManager[Path]:
        """Yield a local path that becomes ``name`` when the block ends without an exception.

        Raises:
            CellfastError: the disk is full (nothing is left half written; a later run goes on from there).
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file or a folder with what is in it; nothing happens where there is none."""

    @abstractmethod
    def remove_partial_files(self, folder: str, *, deep: bool, stems: Collection[str] | None = None) -> None:
        """Remove what killed runs left half written in ``folder`` (``deep``: below it too); the caller holds the folder's lock.

        Args:
            stems: only of files with these stems: others may write here too.
        """

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a small file, whole or not at all."""
        with self.writing(name) as path:
            path.write_bytes(content)

    def checksum(self, name: str) -> Checksum:
        """Length and CRC-32 of the file ``name``."""
        with self.reading(name) as handle:
            return checksum(handle)

    def _check(self, name: str) -> None:
        parts = name.replace("\\", "/").split("/") if name else []
        if any(part in ("", ".", "..") for part in parts) or "\0" in name:
            raise CellfastError(
                f"{name!r} leads out of the output folder {self.location}: a plate, well or batch must not have '/', '..' or an "
                "empty piece in its name; rename it where it comes from"
            )


def folder_at(location: str | os.PathLike[str]) -> Folder:
    """The folder at a path, a ``file://`` URL or the URL of an object store; it need not be there yet.

    Raises:
        CellfastError: a file is in the way, the URL names no folder, or its protocol is not installed.
    """
    text = str(location)
    protocol, _, path = text.partition("://")
    if protocol.lower() in ("file", "local"):
        return LocalFolder(path or "/")
    return RemoteFolder(text) if is_url(text) else LocalFolder(text)


class LocalFolder(Folder):
    """A folder on a local disk.

    Raises:
        CellfastError: a file is in the way.
    """

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self._root = Path(location)
        if self._root.exists() and not self._root.is_dir():
            raise CellfastError(f"{location} is a file: expected a folder to write to")

    def path(self, name: str) -> str:
        return str(self._root / name)

    def on_disk(self, name: str) -> Path:
        self._check(name)
        path = self._root / name
        inside = os.path.realpath(self._root)
        if os.path.commonpath([inside, os.path.realpath(path)]) != inside:
            raise CellfastError(
                f"{path}: a link leads out of the output folder {self._root}; remove the link, or choose another folder"
            )
        return path

    def exists(self, name: str) -> bool:
        return self.on_disk(name).is_file()

    def names(self, folder: str) -> list[str]:
        path = self.on_disk(folder)
        return sorted(p.name for p in path.iterdir()) if path.is_dir() else []

    def read_bytes(self, name: str) -> bytes:
        return self.on_disk(name).read_bytes()

    def reading(self, name: str) -> AbstractContextManager[BinaryIO]:
        return open(self.on_disk(name), "rb")

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        with told_when_full(self.path(name), self._root), atomic_path(self.on_disk(name)) as temporary:
            yield temporary

    def remove(self, name: str) -> None:
        path = self.on_disk(name)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def remove_partial_files(self, folder: str, *, deep: bool, stems: Collection[str] | None = None) -> None:
        path = self.on_disk(folder)
        for partial in (path.rglob if deep else path.glob)(".*.partial*"):
            if stems is None or any(partial.name.startswith(f".{stem}.") for stem in stems):
                partial.unlink(missing_ok=True)


class RemoteFolder(Folder):
    """A folder at an fsspec URL.

    Raises:
        CellfastError: the URL names no folder, or its protocol is not installed.
    """

    def __init__(self, location: str) -> None:
        super().__init__(location)
        protocol, _, path = location.partition("://")
        if not path.strip("/"):
            raise CellfastError(f"{location} names no folder: expected {protocol}://BUCKET/FOLDER")
        with self._told("be opened"):
            self._fs, self._root = file_system(location.rstrip("/"))

    def path(self, name: str) -> str:
        return f"{self.location.rstrip('/')}/{name}"

    def on_disk(self, name: str) -> None:
        return None

    def exists(self, name: str) -> bool:
        with self._told("be read"):
            return bool(self._fs.exists(self._key(name)))

    def names(self, folder: str) -> list[str]:
        # Another process may have written since the last listing.
        self._fs.invalidate_cache()
        try:
            with self._told("be read"):
                return sorted(str(found).rstrip("/").rsplit("/", 1)[-1] for found in self._fs.ls(self._key(folder), detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def read_bytes(self, name: str) -> bytes:
        with self._told("be read"):
            return self._fs.cat_file(self._key(name))

    @contextmanager
    def reading(self, name: str) -> Iterator[BinaryIO]:
        with self._told("be read"):
            handle = self._fs.open(self._key(name), "rb")
        with handle:
            yield handle

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        key = self._key(name)
        with (
            told_when_full(self.path(name), tempfile.gettempdir()),
            tempfile.TemporaryDirectory(prefix="cellfast-") as folder,
        ):
            local = Path(folder) / Path(name).name
            yield local
            with self._told("be written"):
                self._fs.put_file(str(local), key)

    def remove(self, name: str) -> None:
        with self._told("be written"):
            if self._fs.exists(self._key(name)):
                self._fs.rm(self._key(name), recursive=True)

    def remove_partial_files(self, folder: str, *, deep: bool, stems: Collection[str] | None = None) -> None:
        pass  # what is under way lies in a folder for temporary files

    def _key(self, name: str) -> str:
        self._check(name)
        return f"{self._root}/{name}" if name else self._root

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Each object store's package has its own errors: they end in one sentence. `FileNotFoundError` stays what it is."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, CellfastError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            reason = str(error).strip().splitlines() or [""]
            raise CellfastError(
                f"{self.location} cannot {what}: {type(error).__name__}: {reason[0]}. "
                "Check the URL, the credentials and the endpoint"
            ) from error
