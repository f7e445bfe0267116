"""Files of tensors: written with a digest of all their bytes, read without running code."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from cellfast.bounded import check_torch_file
from cellfast.errors import CellfastError

# A file ends in this mark and the SHA-256 of all bytes before it; torch.load takes no notice of them.
_MARK = b"cellfast-sha256:"
_SEAL_BYTES = len(_MARK) + hashlib.sha256().digest_size
# Stands in the content, so that a file without its end is not taken for one of a version that wrote no digest.
_SEALED = "sealed"


class _Hashed:
    """The file that torch.save writes to, hashed as it is written."""

    def __init__(self, handle: BinaryIO) -> None:
        self.handle, self.digest = handle, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            written = self.handle.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return written

    def flush(self) -> None:
        self.handle.flush()


def write_tensors(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write ``content`` (tensors and plain values) as ``torch.save`` does, and a digest of every byte at the end; use in
    `atomic_path`."""
    with open(path, "wb") as handle:
        hashed = _Hashed(handle)
        try:
            torch.save({**content, _SEALED: True}, cast(IO[bytes], hashed))
        except RuntimeError:
            if hashed.error is not None:
                raise hashed.error from None  # torch tells of its own bookkeeping instead
            raise
        handle.write(_MARK + hashed.digest.digest())


def load_tensors(path: Path) -> Any:
    """``torch.load(path, map_location="cpu", weights_only=True)`` of a file of `write_tensors` or of any other of tensors.

    Raises:
        CellfastError: there is no such file, it is damaged (a byte of it changed, its end is missing), it is no file of tensors,
            or reading it would need to run code.
    """
    if not path.is_file():
        raise CellfastError(f"the weights file {path} does not exist or is not a file")
    sealed = _check_seal(path)
    if not _is_cut_short(path):
        check_torch_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a file that is not its own
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "weights_only" in first:
            # torch's text recommends to run the code in the file.
            first = "it is not a file of tensors, or it holds objects that only running code can make"
        elif _is_cut_short(path):
            first = f"its end is missing ({path.stat().st_size:,} bytes are there), as after an interrupted copy or a crash"
        raise CellfastError(
            f"{path} cannot be read as a weights file: {first[:200]}. Expected a file of tensors written by torch.save "
            "(files that need to run code to be read are refused)"
        ) from error
    if isinstance(content, dict) and content.pop(_SEALED, False) and not sealed:
        raise CellfastError(f"{path} is damaged: its end, with the digest of its content, is missing or was changed")
    return content


def _is_cut_short(path: Path) -> bool:
    """Whether this is an empty file or the beginning of a ZIP archive, which torch.save writes, without the directory at its
    end."""
    with open(path, "rb") as handle:
        begins = handle.read(4)
        size = handle.seek(0, os.SEEK_END)
        handle.seek(max(0, size - (1 << 16)))
        return not size or (begins == b"PK\3\4" and b"PK\5\6" not in handle.read())


def _check_seal(path: Path) -> bool:
    """True: the digest is there and right. False: there is none."""
    size = path.stat().st_size
    if size < _SEAL_BYTES:
        return False
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        handle.seek(size - _SEAL_BYTES)
        seal = handle.read()
        if not seal.startswith(_MARK):
            return False
        handle.seek(0)
        left = size - _SEAL_BYTES
        while left and (block := handle.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    if digest.digest() != seal[len(_MARK) :]:
        raise CellfastError(f"{path} is damaged: its content does not match the digest it was written with")
    return True
