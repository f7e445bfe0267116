"""Files at fsspec URLs (s3://, gs://, memory://, and what is registered with fsspec), beside those on local disks."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from cellfast.errors import CellfastError
from cellfast.printable import masked, printable, remember_secrets

_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")
_PACKAGE = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs", "http": "aiohttp", "https": "aiohttp"}


def is_url(text: object) -> bool:
    """True for ``s3://bucket/key`` and its kin; ``file://`` too."""
    return bool(_URL.match(str(text)))


class _Guarded:
    """A file system whose errors are `OSError` of the same kind, masked and in one line, whatever its packages raise.

    Secrets of the URL come back in the errors of object stores (an invalid bucket name, the request that was signed).
    """

    def __init__(self, fs: Any, url: str) -> None:
        self._fs, self._url = fs, masked(url)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._fs, name)
        if not callable(found):
            return found

        def call(*args: Any, **options: Any) -> Any:
            try:
                return found(*args, **options)
            except OSError as error:
                # Not the local path of an error: the disk that a file is copied to or from may be what is full.
                if error.errno is not None:
                    raise _same_kind(error)(error.errno, printable(error.strerror), *_file_of(error)) from None
                raise _same_kind(error)(f"{self._url}: {printable(error)}") from None
            except Exception as error:  # each package has its own kinds
                raise OSError(f"{self._url}: {type(error).__name__}: {printable(error)}") from None

        return call


def _same_kind(error: OSError) -> type[OSError]:
    kinds = (FileNotFoundError, PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError, TimeoutError, OSError)
    return next(kind for kind in kinds if isinstance(error, kind))


def _file_of(error: OSError) -> tuple[str, ...]:
    return () if error.filename is None else (printable(error.filename),)


def file_system(url: str) -> tuple[Any, str]:
    """(fsspec file system, path in it) of a URL; what the file system raises is `OSError` with secrets masked.

    Raises:
        CellfastError: the protocol's package is not installed, the protocol is unknown, or why a field store cannot be opened.
    """
    import fsspec

    protocol = url.split("://", 1)[0].lower()
    remember_secrets(url)
    try:
        if "::" in url and not _lies_in_another_file(fsspec.get_filesystem_class(protocol)):
            kind = fsspec.get_filesystem_class(protocol)
            return _Guarded(kind(**kind._get_kwargs_from_urls(url)), url), kind._strip_protocol(url)
        fs, path = fsspec.core.url_to_fs(url)
        return _Guarded(fs, url), path
    except CellfastError:
        raise
    except ImportError as error:
        raise CellfastError(
            f"{url}: {protocol}:// needs the package {_PACKAGE.get(protocol, 'for it')}: pip install 'cellfast[remote]'"
        ) from error
    except Exception as error:  # each package has its own kinds
        raise CellfastError(f"{url}: cannot be opened ({type(error).__name__}: {error}); check the URL") from error


def _lies_in_another_file(kind: Any) -> bool:
    """Whether ``::`` in a URL names the file that the file system is in (``zip://a.csv::s3://…``) and is not part of a name."""
    return bool({"fo", "target_protocol"} & set(inspect.signature(kind.__init__).parameters))


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
