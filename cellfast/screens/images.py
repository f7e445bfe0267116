"""Reads one channel of one field: an 8- or 16-bit grey plane, exactly as it is in the file, or a refusal that says why."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from cellfast.errors import CellfastError
from cellfast.screens.remote import is_url, read_bytes

# tifffile logs what it finds odd in a file; what makes a file unusable is raised below, by name.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

_TIFF = (".tif", ".tiff", ".flex", ".lsm", ".stk")


class ImageError(CellfastError):
    """An image that cannot be used; ``reason`` is what the ledger counts it under."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (str(self), self.reason)


def read_plane(
    path: str | os.PathLike[str], *, expect_shape: tuple[int, int] | None = None, expect_dtype: np.dtype | None = None
) -> np.ndarray:
    """Read [H, W] uint8 or uint16, equal to ``tifffile.imread(path)``; PNG is read too. ``path``: a file or an fsspec URL.

    Raises:
        ImageError: missing, unreadable or truncated, planar or of several pages, colour, not 8 or 16 bit, or unlike the expected.
    """
    content = _content(path)
    try:
        if _is_tiff(path):
            with tifffile.TiffFile(content) as tiff:
                page = _single_page(tiff, path)
                plane = page.asarray()
        else:
            plane = _read_other(content, path)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(
            f"{path}: cannot be read ({type(error).__name__}: {str(error)[:200]})", "not a readable image"
        ) from error
    plane = plane.astype(plane.dtype.newbyteorder("="), copy=False)
    _check(path, plane.shape, plane.dtype, expect_shape, expect_dtype)
    return np.ascontiguousarray(plane)


# Lossless, and the same pixels from every decoder: none, LZW, Deflate (two numbers), PackBits, Zstandard.
_PLAIN_COMPRESSIONS = (1, 5, 8, 32946, 32773, 50000)


def encoded_plane(
    path: str | os.PathLike[str], *, expect_shape: tuple[int, int] | None = None, expect_dtype: np.dtype | None = None
) -> np.ndarray | None:
    """The bytes of a TIFF, uint8 [n], whose pixels any decoder gives as `read_plane` does; None for every other file.

    None says nothing about the file but that `read_plane` must decide: it is no TIFF, missing, damaged, refused, unlike the expected, or
    has a palette, an inverted scale, a turned orientation, or a rare compression.
    """
    if not _is_tiff(path):
        return None
    try:
        content = read_bytes(str(path)) if is_url(path) else Path(path).read_bytes()
        with tifffile.TiffFile(io.BytesIO(content)) as tiff:
            page = _single_page(tiff, path)
            _check(path, page.shape, np.dtype(page.dtype).newbyteorder("="), expect_shape, expect_dtype)
            plain = (
                page.photometric == tifffile.PHOTOMETRIC.MINISBLACK
                and page.tags.valueof(274, 1) == 1
                and page.fillorder == 1
                and page.bitspersample in (8, 16)
                and int(page.compression) in _PLAIN_COMPRESSIONS
            )
            ends = (a + n for a, n in zip(page.dataoffsets, page.databytecounts))
            whole = len(page.dataoffsets) > 0 and min(page.databytecounts) > 0 and max(ends) <= len(content)
    except Exception:  # whatever is wrong with the file, `read_plane` says it
        return None
    return np.frombuffer(content, np.uint8) if plain and whole else None


def image_info(path: str | os.PathLike[str]) -> tuple[tuple[int, int], np.dtype]:
    """((H, W), dtype) from the file's header; refuses what `read_plane` refuses, except damage beyond the header."""
    if not _is_tiff(path):
        plane = read_plane(path)
        return plane.shape, plane.dtype
    content = _content(path)
    try:
        with tifffile.TiffFile(content) as tiff:
            page = _single_page(tiff, path)
            shape, dtype = page.shape, np.dtype(page.dtype).newbyteorder("=")
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(
            f"{path}: cannot be read ({type(error).__name__}: {str(error)[:200]})", "not a readable image"
        ) from error
    _check(path, shape, dtype, None, None)
    return (int(shape[0]), int(shape[1])), dtype


def _is_tiff(path: object) -> bool:
    return os.path.splitext(str(path))[1].lower() in _TIFF


def _content(path: str | os.PathLike[str]) -> Any:
    """The path of a local file, the bytes of one at a URL."""
    if not is_url(path):
        if not Path(path).is_file():
            raise ImageError(f"{path}: no such file", "file missing")
        return path
    try:
        return io.BytesIO(read_bytes(str(path)))
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file", "file missing") from error
    except CellfastError:
        raise
    except Exception as error:  # each file system has its own kinds
        raise ImageError(
            f"{path}: cannot be read ({type(error).__name__}: {str(error)[:200]})", "not a readable image"
        ) from error


def _single_page(tiff: tifffile.TiffFile, path: object) -> tifffile.TiffPage:
    pages = len(tiff.pages)
    if pages == 0:
        raise ImageError(f"{path}: has no image in it", "not a readable image")
    page = tiff.pages[0]
    if page.photometric in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR) and page.samplesperpixel >= 3:
        raise ImageError(f"{path}: a colour image; expected one grey plane per channel", "colour image")
    if pages > 1 or page.samplesperpixel > 1 or page.imagedepth > 1 or len(page.shape) != 2:
        raise ImageError(
            f"{path}: {pages} pages of shape {page.shape}; expected one grey plane per file: split it into one file per channel",
            "planar or multi-page",
        )
    return page


def _read_other(content: Any, path: object) -> np.ndarray:
    from PIL import Image

    with Image.open(content) as image:
        if getattr(image, "n_frames", 1) > 1:
            raise ImageError(f"{path}: {image.n_frames} frames; expected one", "planar or multi-page")
        if image.mode in ("RGB", "RGBA", "CMYK", "YCbCr", "LA"):
            raise ImageError(f"{path}: a colour image ({image.mode}); expected one grey plane per channel", "colour image")
        if image.mode not in ("L", "P", "I;16", "I;16B", "I;16L", "I"):
            raise ImageError(f"{path}: image mode {image.mode}; expected 8- or 16-bit grey", "wrong bit depth")
        plane = np.asarray(image)
        if image.mode == "I" and plane.min() >= 0 and plane.max() <= 65535:
            plane = plane.astype(np.uint16)  # Pillow hands out 16-bit PNGs as 32-bit integers
        return plane


def _check(
    path: object, shape: tuple[int, ...], dtype: np.dtype, expect_shape: tuple[int, int] | None, expect_dtype: np.dtype | None
) -> None:
    if len(shape) != 2:
        raise ImageError(f"{path}: expected one grey plane [H, W], got shape {shape}", "planar or multi-page")
    if dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)):
        raise ImageError(f"{path}: expected 8- or 16-bit unsigned integers, got {dtype}", "wrong bit depth")
    if expect_shape is not None and tuple(shape) != tuple(expect_shape):
        raise ImageError(
            f"{path}: expected {expect_shape[0]} × {expect_shape[1]} px like the other fields, got {shape[0]} × {shape[1]}",
            "wrong size",
        )
    if expect_dtype is not None and dtype != expect_dtype:
        raise ImageError(f"{path}: expected {expect_dtype} like the other fields, got {dtype}", "wrong bit depth")
