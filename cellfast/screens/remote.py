"""Files at fsspec URLs (s3://, gs://, memory://, …) and in field stores (fieldstore://), beside those on local disks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cellfast.errors import CellfastError

_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")
_PACKAGE = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs", "http": "aiohttp", "https": "aiohttp"}


def is_url(text: object) -> bool:
    """True for ``s3://bucket/key`` and its kin; ``file://`` too."""
    return bool(_URL.match(str(text)))


def file_system(url: str) -> tuple[Any, str]:
    """(fsspec file system, path in it) of a URL.

    Raises:
        CellfastError: fsspec or the protocol's package is not installed, or the protocol is unknown.
    """
    protocol = url.split("://", 1)[0].lower()
    if protocol == "fieldstore":
        from cellfast.screens.field_store import store_files

        return store_files(url)
    try:
        import fsspec
    except ImportError as error:
        raise CellfastError(f"{url}: URLs need fsspec: pip install 'cellfast[remote]'") from error
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise CellfastError(
            f"{url}: {protocol}:// needs the package {_PACKAGE.get(protocol, 'for it')}: pip install 'cellfast[remote]'"
        ) from error
    except ValueError as error:
        raise CellfastError(f"{url}: {error}") from error


def exists(path: object) -> bool:
    """Whether there is a file at a path or URL."""
    if not is_url(path):
        return Path(str(path)).is_file()
    fs, key = file_system(str(path))
    return bool(fs.isfile(key))


def read_bytes(url: str) -> bytes:
    """The whole file at ``url``.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read.
    """
    fs, path = file_system(url)
    return fs.cat_file(path)
