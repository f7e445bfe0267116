"""A folder to write into: on a local disk, or at an fsspec URL (s3://, gs://, memory://). Files appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from cellfast.atomic import atomic_path, told_when_full
from cellfast.errors import CellfastError
from cellfast.screens.remote import file_system, is_url


class Place:
    """A folder, local or remote; names in it are relative, with ``/``.

    Args:
        location: path or URL.

    Raises:
        CellfastError: a file is in the way, or the URL's protocol is not installed.
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        self.location = str(location)
        self.remote = is_url(self.location)
        self._fs: Any = None
        if self.remote:
            self._fs, self._root = file_system(self.location.rstrip("/"))
        else:
            self._root = str(Path(location))
            if Path(location).exists() and not Path(location).is_dir():
                raise CellfastError(f"{location} is a file: expected a folder for the embeddings")

    def __getstate__(self) -> dict[str, str]:
        return {"location": self.location}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(state["location"])

    def __str__(self) -> str:
        return self.location

    def path(self, name: str) -> str:
        """Where ``name`` lies, for messages and local use."""
        return f"{self.location.rstrip('/')}/{name}" if self.remote else str(Path(self._root) / name)

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}"

    def exists(self, name: str) -> bool:
        """Whether the file ``name`` is there."""
        return bool(self._fs.exists(self._key(name))) if self.remote else (Path(self._root) / name).is_file()

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a local path that becomes ``name`` when the block ends without an exception.

        Raises:
            CellfastError: the disk is full (nothing is left half written; a later run goes on from there).
        """
        where = tempfile.gettempdir() if self.remote else self._root
        with told_when_full(self.path(name), where):
            if not self.remote:
                with atomic_path(Path(self._root) / name) as temporary:
                    yield temporary
                return
            with tempfile.TemporaryDirectory(prefix="cellfast-") as folder:
                local = Path(folder) / Path(name).name
                yield local
                self._fs.put_file(str(local), self._key(name))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a small file, whole or not at all."""
        with self.writing(name) as path:
            path.write_bytes(content)

    def read_bytes(self, name: str) -> bytes:
        """The content of a small file."""
        return self._fs.cat_file(self._key(name)) if self.remote else (Path(self._root) / name).read_bytes()

    @contextmanager
    def reading(self, name: str) -> Iterator[BinaryIO]:
        """Open ``name`` for reading, seekable."""
        with self._fs.open(self._key(name), "rb") if self.remote else open(Path(self._root) / name, "rb") as handle:
            yield handle

    def names(self, folder: str) -> list[str]:
        """Names of the files and folders in ``folder``, sorted; empty where there is none."""
        if not self.remote:
            path = Path(self._root) / folder
            return sorted(p.name for p in path.iterdir()) if path.is_dir() else []
        # Another process may have written since the last listing.
        self._fs.invalidate_cache()
        try:
            return sorted(str(found).rstrip("/").rsplit("/", 1)[-1] for found in self._fs.ls(self._key(folder), detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def remove(self, name: str) -> None:
        """Remove a file or a folder with what is in it; nothing happens where there is none."""
        if self.remote:
            if self._fs.exists(self._key(name)):
                self._fs.rm(self._key(name), recursive=True)
            return
        path = Path(self._root) / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def remove_partial_files(self, folder: str, *, deep: bool) -> None:
        """Remove what killed runs left half written in ``folder`` (``deep``: below it too); the caller holds the output's lock."""
        if not self.remote:
            path = Path(self._root) / folder
            for partial in (path.rglob if deep else path.glob)(".*.partial*"):
                partial.unlink(missing_ok=True)
