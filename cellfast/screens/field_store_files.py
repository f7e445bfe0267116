"""The files of a field store under URLs, as fsspec reads them: ``fieldstore:///path/FIELDS.h5!/name``."""

from __future__ import annotations

import errno
import io
import os
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem

from cellfast.errors import CellfastError
from cellfast.screens.field_store import AGAIN, EncodedFields

PROTOCOL = "fieldstore"


def store_url(path: str | os.PathLike[str]) -> str:
    """The URL under which the files of a store are found: ``fieldstore:///path/FIELDS.h5!``."""
    return f"{PROTOCOL}://{Path(path).absolute()}!"


def store_and_key(url: str) -> tuple[str, str]:
    """(path of the store, name in it) of a URL of `store_url` or under it.

    Raises:
        CellfastError: there is no such store.
    """
    rest = url.split("://", 1)[1]
    # Folders may have an exclamation mark in their names.
    ends = [place for place, letter in enumerate(rest) if letter == "!" and os.path.isfile(rest[:place])]
    if not ends:
        raise CellfastError(f"{rest.rpartition('!')[0]}: no such field store")
    return rest[: ends[0]], rest[ends[0] + 1 :].strip("/")


class _NamedFiles:
    """An open store, its files by their names, and the names in each of their folders."""

    def __init__(self, path: str) -> None:
        self.store = EncodedFields(path)
        self.lock = threading.Lock()
        self.numbers = {name: number for number, name in enumerate(self.store.names())}
        if not self.numbers:
            self.store.close()
            raise CellfastError(f"{path}: a field store without the names of its files; {AGAIN}")
        self.folders: dict[str, set[str]] = {}
        for name in self.numbers:
            parts = name.split("/")
            for depth, below in enumerate(parts):
                self.folders.setdefault("/".join(parts[:depth]), set()).add(below)


@lru_cache(maxsize=4)
def _named_files(path: str, written: int) -> _NamedFiles:
    """Opened once for all threads while the file stays the same (``written``: its time of change)."""
    return _NamedFiles(path)


class FieldStoreFileSystem(AbstractFileSystem):
    """The files of a field store by their names, for fsspec: ``fieldstore:///path/FIELDS.h5!/P1/A01_s1_DNA.tif``.

    Raises:
        CellfastError: no field store, or one without names.
    """

    protocol = PROTOCOL
    cachable = False  # a store that is written anew is opened anew

    def __init__(self, store: str, **options: Any) -> None:
        super().__init__(**options)
        self._files = _named_files(store, os.stat(store).st_mtime_ns)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return store_and_key(path)[1] if path.startswith(f"{PROTOCOL}://") else path.strip("/")

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, str]:
        return {"store": store_and_key(path)[0]}

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        """``{"name", "type", "size"}`` of a file or folder."""
        key = self._strip_protocol(path)
        if (number := self._files.numbers.get(key)) is not None:
            return {"name": key, "type": "file", "size": self._files.store.size(number)}
        if key in self._files.folders:
            return {"name": key, "type": "directory", "size": 0}
        raise self._missing(key)

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        """What is in a folder, sorted by name: its names, or the `info` of each."""
        key = self._strip_protocol(path)
        if key in self._files.numbers:
            names = [key]
        elif key in self._files.folders:
            names = [f"{key}/{name}" if key else name for name in sorted(self._files.folders[key])]
        else:
            raise self._missing(key)
        return [self.info(name) for name in names] if detail else names

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        """The bytes of a file.

        Raises:
            FileNotFoundError: there is none of this name.
            OSError: it is damaged.
        """
        key = self._strip_protocol(path)
        number = self._files.numbers.get(key)
        if number is None:
            raise self._missing(key)
        try:
            with self._files.lock:
                return self._files.store.file(*divmod(number, self._files.store.num_channels)).tobytes()[start:end]
        except CellfastError as error:
            # One file of many: who reads it refuses its field and goes on.
            raise OSError(errno.EIO, str(error)) from error

    def _open(self, path: str, mode: str = "rb", **options: Any) -> io.BytesIO:
        if mode != "rb":
            raise OSError(errno.EROFS, f"{self._files.store.path}: a field store is only read through its files' names")
        return io.BytesIO(self.cat_file(path))

    def _missing(self, key: str) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, f"not in the field store {self._files.store.path}", key)
