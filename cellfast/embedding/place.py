"""A folder to write into: on a local disk, or at an fsspec URL (s3://, gs://, memory://). Files appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from cellfast.atomic import FULL, atomic_path, told_when_full
from cellfast.embeddings_folder import Checksum, checksum
from cellfast.errors import CellfastError
from cellfast.screens.remote import file_system, is_url


class Place:
    """A folder, local or remote; names in it are relative, with ``/``, and nothing outside it is ever read or written.

    Names may come from files: every method refuses one that leads out of the folder, by ``..``, an absolute path or a link.

    Args:
        location: path or URL.

    Raises:
        CellfastError: a file is in the way, the URL names no folder, its protocol is not installed, or (from every method) a name leads
            out of the folder, or the object store refuses.
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        self.location = str(location)
        protocol, _, path = self.location.partition("://")
        if protocol.lower() in ("file", "local"):
            self.location = path or "/"
        self.remote = is_url(self.location)
        self._fs: Any = None
        if self.remote:
            if not self.location.split("://", 1)[1].strip("/"):
                raise CellfastError(f"{self.location} names no folder: expected {self.location.split('://')[0]}://BUCKET/FOLDER")
            with self._told("be opened"):
                self._fs, self._root = file_system(self.location.rstrip("/"))
        else:
            self._root = str(Path(self.location))
            if Path(self._root).exists() and not Path(self._root).is_dir():
                raise CellfastError(f"{location} is a file: expected a folder for the embeddings")

    def __getstate__(self) -> dict[str, str]:
        return {"location": self.location}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(state["location"])

    def __str__(self) -> str:
        return self.location

    def path(self, name: str) -> str:
        """Where ``name`` lies, for messages."""
        return f"{self.location.rstrip('/')}/{name}" if self.remote else str(Path(self._root) / name)

    def local(self, name: str) -> Path:
        """Where ``name`` lies on the local disk."""
        self._check(name)
        path = Path(self._root) / name
        inside = os.path.realpath(self._root)
        if os.path.commonpath([inside, os.path.realpath(path)]) != inside:
            raise CellfastError(
                f"{path}: a link leads out of the output folder {self._root}; remove the link, or choose another -o"
            )
        return path

    def _key(self, name: str) -> str:
        self._check(name)
        return f"{self._root}/{name}"

    def _check(self, name: str) -> None:
        parts = name.replace("\\", "/").split("/") if name else []
        if any(part in ("", ".", "..") for part in parts) or "\0" in name:
            raise CellfastError(
                f"{name!r} leads out of the output folder {self.location}: a plate, well or batch must not have '/', '..' or an empty "
                "piece in its name; rename it where it comes from"
            )

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Each object store's package has its own errors: they end in one sentence. A file that is not there stays `FileNotFoundError`."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, CellfastError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            reason = str(error).strip().splitlines() or [""]
            raise CellfastError(
                f"{self.location} cannot {what}: {type(error).__name__}: {reason[0]}. Check the URL, the credentials and the endpoint"
            ) from error

    def exists(self, name: str) -> bool:
        """Whether the file ``name`` is there."""
        if not self.remote:
            return self.local(name).is_file()
        with self._told("be read"):
            return bool(self._fs.exists(self._key(name)))

    def checksum(self, name: str) -> Checksum:
        """Length and CRC-32 of the file ``name``."""
        with self.reading(name) as handle:
            return checksum(handle)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a local path that becomes ``name`` when the block ends without an exception.

        Raises:
            CellfastError: the disk is full (nothing is left half written; a later run goes on from there).
        """
        where = tempfile.gettempdir() if self.remote else self._root
        with told_when_full(self.path(name), where):
            if not self.remote:
                with atomic_path(self.local(name)) as temporary:
                    yield temporary
                return
            key = self._key(name)
            with tempfile.TemporaryDirectory(prefix="cellfast-") as folder:
                local = Path(folder) / Path(name).name
                yield local
                with self._told("be written"):
                    self._fs.put_file(str(local), key)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a small file, whole or not at all."""
        with self.writing(name) as path:
            path.write_bytes(content)

    def read_bytes(self, name: str) -> bytes:
        """The content of a small file."""
        if not self.remote:
            return self.local(name).read_bytes()
        with self._told("be read"):
            return self._fs.cat_file(self._key(name))

    @contextmanager
    def reading(self, name: str) -> Iterator[BinaryIO]:
        """Open ``name`` for reading, seekable."""
        if not self.remote:
            handle: Any = open(self.local(name), "rb")
        else:
            with self._told("be read"):
                handle = self._fs.open(self._key(name), "rb")
        with handle:
            yield handle

    def names(self, folder: str) -> list[str]:
        """Names of the files and folders in ``folder``, sorted; empty where there is none."""
        if not self.remote:
            path = self.local(folder)
            return sorted(p.name for p in path.iterdir()) if path.is_dir() else []
        # Another process may have written since the last listing.
        self._fs.invalidate_cache()
        try:
            with self._told("be read"):
                return sorted(str(found).rstrip("/").rsplit("/", 1)[-1] for found in self._fs.ls(self._key(folder), detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def remove(self, name: str) -> None:
        """Remove a file or a folder with what is in it; nothing happens where there is none."""
        if self.remote:
            with self._told("be written"):
                if self._fs.exists(self._key(name)):
                    self._fs.rm(self._key(name), recursive=True)
            return
        path = self.local(name)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def remove_partial_files(self, folder: str, *, deep: bool, stems: Collection[str] | None = None) -> None:
        """Remove what killed runs left half written in ``folder`` (``deep``: below it too); the caller holds the output's lock.

        Args:
            stems: only of files with these stems: others may write here too.
        """
        if self.remote:
            return  # what is under way lies in a folder for temporary files
        path = self.local(folder)
        for partial in (path.rglob if deep else path.glob)(".*.partial*"):
            if stems is None or any(partial.name.startswith(f".{stem}.") for stem in stems):
                partial.unlink(missing_ok=True)
