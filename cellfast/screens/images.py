"""Reads one channel of one field: an 8- or 16-bit grey plane, exactly as it is in the file, or a refusal that says why."""

from __future__ import annotations

import io
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import tifffile

from cellfast.bounded import MOST_DEFLATED, check_claim
from cellfast.errors import CellfastError
from cellfast.screens.tiff import check_page, damage_shows, open_tiff, read_alike
from cellfast.storage.urls import is_url, read_bytes

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
    with _refused(path):
        if _is_tiff(path):
            with open_tiff(content, path) as (tiff, _, size):
                page = _single_page(tiff, path)
                # Before anything is decoded: what is not wanted takes no memory.
                _check(path, page.shape, np.dtype(page.dtype).newbyteorder("="), expect_shape, expect_dtype)
                check_page(page, path, size)
                plane = page.asarray()
        else:
            plane = read_picture(content, path, expect_shape)
    plane = plane.astype(plane.dtype.newbyteorder("="), copy=False)
    _check(path, plane.shape, plane.dtype, expect_shape, expect_dtype)
    return np.ascontiguousarray(plane)


@contextmanager
def _refused(path: object) -> Iterator[None]:
    """Whatever goes wrong inside is an `ImageError`."""
    try:
        yield
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(f"{path}: reading it takes more memory than there is", "not a readable image") from error
    except CellfastError as error:
        raise ImageError(str(error), "not a readable image") from error
    except Exception as error:
        raise ImageError(
            f"{path}: cannot be read ({type(error).__name__}: {str(error)[:200]})", "not a readable image"
        ) from error


def encoded_plane(
    path: str | os.PathLike[str], *, expect_shape: tuple[int, int] | None = None, expect_dtype: np.dtype | None = None
) -> np.ndarray | None:
    """The bytes of a TIFF, uint8 [n], whose pixels any decoder gives as `read_plane` does; None for every other file.

    None says nothing about the file but that `read_plane` must decide: it is no TIFF, missing, damaged, refused, unlike the
    expected, or stored in a way that decoders take differently (`cellfast.screens.tiff.read_alike`) or whose damage they do not
    tell.
    """
    if not _is_tiff(path):
        return None
    try:
        content = read_bytes(str(path)) if is_url(path) else Path(path).read_bytes()
        with open_tiff(io.BytesIO(content), path) as (tiff, tags, size):
            page = _single_page(tiff, path)
            _check(path, page.shape, np.dtype(page.dtype).newbyteorder("="), expect_shape, expect_dtype)
            check_page(page, path, size)
            # Decoders take the first page, or all.
            alike = len(tiff.pages) == 1 and read_alike(page, tags, size) and damage_shows(page)
    except Exception:  # whatever is wrong with the file, `read_plane` says it
        return None
    return np.frombuffer(content, np.uint8) if alike else None


def image_info(path: str | os.PathLike[str]) -> tuple[tuple[int, int], np.dtype]:
    """((H, W), dtype) from the file's header; refuses what `read_plane` refuses, except damage beyond the header."""
    if not _is_tiff(path):
        plane = read_plane(path)
        return plane.shape, plane.dtype
    with _refused(path), open_tiff(_content(path), path) as (tiff, _, size):
        page = _single_page(tiff, path)
        shape, dtype = page.shape, np.dtype(page.dtype).newbyteorder("=")
        _check(path, shape, dtype, None, None)
        check_page(page, path, size)
    return (int(shape[0]), int(shape[1])), dtype


def read_stack(path: str | os.PathLike[str], *, expect_shape: tuple[int, int] | None = None, colour: bool = False) -> np.ndarray:
    """A picture of any type, and a TIFF of any number of axes (its first series, as ``tifffile.imread``): label masks, crops.

    Raises:
        ImageError: missing, damaged, larger than the file can hold, or of two axes unlike ``expect_shape``.
    """
    content = _content(path)
    with _refused(path):
        if not _is_tiff(path):
            return read_picture(content, path, expect_shape, colour=colour, labels=not colour)
        with open_tiff(content, path) as (tiff, _, size):
            for number in range(len(tiff.pages)):
                page = tiff.pages[number]
                check_page(page if isinstance(page, tifffile.TiffPage) else page.aspage(), path, size)
            (first, *_) = tiff.series
            if expect_shape is not None and len(first.shape) == 2:
                _check(path, first.shape, np.dtype(np.uint8), expect_shape, None)
            # Pages of one file may share their strips.
            check_claim(path, f"its image {list(first.shape)}", first.nbytes, size, most=MOST_DEFLATED, slack=64 << 20)
            return first.asarray()


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
    page: Any = tiff.pages[0]
    if page.photometric in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR) and page.samplesperpixel >= 3:
        raise ImageError(f"{path}: a colour image; expected one grey plane per channel", "colour image")
    if page.samplesperpixel > 1 and any(kind in (1, 2) for kind in page.extrasamples):
        raise ImageError(f"{path}: has an alpha channel; expected one grey plane per channel", "colour image")
    # Further pages are no planes where they are smaller images of the first: thumbnails, levels of a pyramid.
    full = 1 + next((1 for number in range(1, pages) if not cast(tifffile.TiffPage, tiff.pages[number]).is_reduced), 0)
    shape, planes = page.shape, 1 if full == 1 else pages
    if planes == 1 and len(page.shape) == 2:
        shape, planes = _series(tiff, page)
    if planes > 1 or page.samplesperpixel > 1 or page.imagedepth > 1 or len(page.shape) != 2:
        raise ImageError(
            f"{path}: {planes} planes of shape {list(shape)}; expected one grey plane per file: split it into one file per "
            "channel",
            "planar or multi-page",
        )
    return page


def _series(tiff: tifffile.TiffFile, page: tifffile.TiffPage) -> tuple[tuple[int, ...], int]:
    """(shape, planes) that tifffile would return of a file of one page: STK and ImageJ keep several planes behind one."""
    if not tiff.flags - {"uniform", "lsm"}:
        return page.shape, 1
    # The planes of an OME set lie in files of their own; this one's is its page.
    if tiff.is_ome and len(set(re.findall(r'FileName="([^"]*)"', tiff.ome_metadata or ""))) > 1:
        return page.shape, 1
    shape = tiff.series[0].shape
    return shape, max(1, math.prod(shape) // max(1, math.prod(page.shape)))


_GREYS = bytes(value for value in range(256) for _ in range(3))


def _png_bits(content: Any) -> int:
    """Bits of a sample: byte 24 of a PNG."""
    if hasattr(content, "seek"):
        place = content.tell()
        content.seek(24)
        found = content.read(1)
        content.seek(place)
    else:
        with open(content, "rb") as handle:
            handle.seek(24)
            found = handle.read(1)
    return found[0] if found else 0


# What Pillow may take a file for: others run programs (EPS) or have no bound.
_PICTURES = ("PNG", "JPEG", "BMP", "PPM")


def read_picture(
    content: Any, path: object, expect_shape: tuple[int, int] | None = None, *, colour: bool = False, labels: bool = False
) -> np.ndarray:
    """Read a PNG, JPEG, BMP or PGM [H, W], or of several channels [H, W, C] with ``colour``; 16 bits stay 16.

    ``labels``: the numbers count and not what they look like, so that palettes and one bit are read too.

    Raises:
        ImageError: several frames, colour, transparency, a palette of colours, a mode that is not 8 or 16 bit, unlike
            ``expect_shape``, or larger than the file can hold.
    """
    from PIL import Image

    size = content.seek(0, os.SEEK_END) if hasattr(content, "seek") else os.path.getsize(content)
    if hasattr(content, "seek"):
        content.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bombs, which are judged here
        image = Image.open(content, formats=_PICTURES)
    with image:
        if (frames := getattr(image, "n_frames", 1)) > 1:
            raise ImageError(f"{path}: {frames} frames; expected one", "planar or multi-page")
        deep = image.format == "PNG" and _png_bits(content) == 16
        if image.mode in ("LA", "RGBA", "PA", "La", "RGBa") or ("transparency" in image.info and not labels):
            raise ImageError(
                f"{path}: has an alpha channel or transparency ({image.mode}); expected "
                + ("channels" if colour else "one grey plane per channel"),
                "colour image",
            )
        if image.mode in ("RGB", "CMYK", "YCbCr") and not colour:
            bits = 16 if deep else 8
            raise ImageError(
                f"{path}: a colour image ({image.mode}, {bits} bits a channel); expected one grey plane per channel",
                "colour image",
            )
        if image.mode == "P" and not labels and bytes(image.getpalette() or ()) != _GREYS[: len(image.getpalette() or ())]:
            raise ImageError(f"{path}: an image with a palette of colours; expected one grey plane per channel", "colour image")
        if image.mode not in (
            "L",
            "P",
            "I;16",
            "I;16B",
            "I;16L",
            "I",
            *(("RGB", "1") if colour else ()),
            *(("1",) if labels else ()),
        ):
            raise ImageError(f"{path}: image mode {image.mode}; expected 8- or 16-bit grey", "wrong bit depth")
        width, height = image.size
        if expect_shape is not None:
            _check(path, (height, width), np.dtype(np.uint8), expect_shape, None)
        check_claim(path, f"its image [{height}, {width}]", width * height, size, most=MOST_DEFLATED, slack=4096)
        if image.mode == "RGB" and deep:
            # Pillow keeps the upper 8 bits only.
            import imagecodecs

            check_claim(path, f"its image [{height}, {width}, 3]", 6 * width * height, size, most=MOST_DEFLATED, slack=4096)
            return imagecodecs.png_decode(content.getvalue() if hasattr(content, "getvalue") else Path(content).read_bytes())
        plane = np.asarray(image)
        if image.mode == "I" and plane.size and plane.min() >= 0 and plane.max() <= 65535:
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
        bits, expected = 8 * dtype.itemsize, 8 * np.dtype(expect_dtype).itemsize
        raise ImageError(
            f"{path}: expected {expected}-bit pixels ({expect_dtype}) like the other fields, got {bits}-bit ({dtype})",
            "wrong bit depth",
        )
