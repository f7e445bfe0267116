"""What a TIFF file claims, held against what it can hold, and whether every decoder reads it alike. tifffile parses, this
judges."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

import tifffile

from cellfast.bounded import MOST_DEFLATED, check_claim
from cellfast.errors import CellfastError

NONE, LZW, DEFLATE, PACKBITS, ZSTD = 1, 5, (8, 32946), 32773, (34926, 50000)
_JPEG, _JPEG2000 = 7, (33003, 33004, 33005, 34712)
_LZMA = 34925
# Bytes that one byte can stand for. LZW: a table of 4,094 strings, each one longer than the one before. Zstandard and LZMA know
# hardly a bound; beyond that of Deflate an image is blank, and small ones have the slack.
_MOST = {NONE: 1, PACKBITS: 64, LZW: 1400, **dict.fromkeys((*DEFLATE, *ZSTD, _LZMA, _JPEG, *_JPEG2000), MOST_DEFLATED)}
_SLACK = dict.fromkeys((*ZSTD, _LZMA, _JPEG, *_JPEG2000), 64 << 20)
_VALUE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_MOST_TAGS = 4096


class Tag(NamedTuple):
    """One entry of an image's list of tags; ``type`` 3 and 4: whole numbers of two and four bytes."""

    code: int
    type: int
    number: int


@contextmanager
def open_tiff(content: str | os.PathLike[str] | IO[bytes], name: object) -> Iterator[tuple[tifffile.TiffFile, list[Tag], int]]:
    """(parsed file, tags of its first image, bytes in it); its list of tags has been found to fit the file.

    Raises:
        CellfastError: no TIFF, or tags that claim more than the file.
    """
    handle = open(content, "rb") if isinstance(content, (str, os.PathLike)) else content
    try:
        size = handle.seek(0, os.SEEK_END)
        tags = _tags(handle, size, name)
        claimed = sum(_VALUE_BYTES.get(tag.type, 1) * tag.number for tag in tags)
        check_claim(name, "what its tags hold", claimed, size, slack=4096)
        handle.seek(0)
        with tifffile.TiffFile(handle) as tiff:
            yield tiff, tags, size
    finally:
        if handle is not content:
            handle.close()


def _tags(handle: IO[bytes], size: int, name: object) -> list[Tag]:
    handle.seek(0)
    head = handle.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 8:
        raise CellfastError(f"{name}: not a TIFF file: it does not begin as one")
    big = struct.unpack(order + "H", head[2:4])[0] == 43
    where = struct.unpack(order + ("Q" if big else "I"), head[8:16] if big else head[4:8])[0]
    entry, counter = ("HHQ8x", "Q") if big else ("HHI4x", "H")
    width = struct.calcsize(order + counter)
    if where + width > size:
        raise CellfastError(f"{name}: damaged or cut short: its list of tags would begin at byte {where:,} of {size:,}")
    handle.seek(where)
    (count,) = struct.unpack(order + counter, handle.read(width))
    length = struct.calcsize(order + entry) * count
    if count > _MOST_TAGS or where + width + length > size:
        raise CellfastError(f"{name}: damaged: its list of {count:,} tags does not fit the file")
    return [Tag(*one) for one in struct.iter_unpack(order + entry, handle.read(length))]


def check_page(page: tifffile.TiffPage, name: object, size: int) -> None:
    """Raise `CellfastError` unless the image can come out of the file, has all its strips or tiles, and fits into memory.

    Raises:
        CellfastError: also for compressions whose streams tell their own size, JPEG and JPEG 2000 aside: they are not read.
    """
    compression = int(page.compression)
    if compression not in _MOST:
        kind = getattr(page.compression, "name", compression)
        raise CellfastError(f"{name}: compression {kind} is not read; save it uncompressed, or with LZW, Deflate or Zstandard")
    # Unknown types have no size here; reading them gives nothing, and is refused.
    item = page.dtype.itemsize if page.dtype is not None else 1
    pixels, parts = math.prod(page.shaped) * item, _parts(page, name)
    part_pixels = pixels
    if page.is_tiled:
        part_pixels = math.prod((page.tilelength, page.tilewidth, max(1, page.tiledepth), page.samplesperpixel)) * item
        pixels = max(pixels, part_pixels * len(page.dataoffsets))
    held = min(size, sum(max(0, n) for n in page.databytecounts))
    if compression == NONE:
        bits = page.bitspersample if isinstance(page.bitspersample, int) else 8 * item
        check_claim(name, f"its image {list(page.shape)}", pixels * min(bits, 8 * item) // (8 * item), size)
    check_claim(
        name, f"its image {list(page.shape)}", pixels, size if compression == NONE else held,
        most=8 if compression == NONE else _MOST[compression], slack=_SLACK.get(compression, 4096),
    )  # fmt: skip
    if len(page.dataoffsets) < parts and not page.is_contiguous:
        raise CellfastError(f"{name}: damaged: {len(page.dataoffsets)} of its {parts} strips or tiles are there")
    if compression == _JPEG or compression in _JPEG2000:
        handle = page.parent.filehandle
        for offset, count in zip(page.dataoffsets, page.databytecounts):
            handle.seek(offset)
            inside = _inner_size(handle.read(min(count, 1 << 16)))
            if inside is None or inside * item > max(
                part_pixels, page.tilelength * page.tilewidth * item if page.is_tiled else 0
            ):
                raise CellfastError(f"{name}: damaged: a compressed part of the image is larger than the header tells")


def _parts(page: tifffile.TiffPage, name: object) -> int:
    """Strips or tiles that the image is made of."""
    planes = page.samplesperpixel if int(page.planarconfig or 1) == 2 else 1
    if page.is_tiled:
        if not page.tilelength or not page.tilewidth:
            raise CellfastError(f"{name}: damaged: its tiles have no size")
        return planes * -(-page.imagelength // page.tilelength) * -(-page.imagewidth // page.tilewidth)
    rows = page.rowsperstrip or page.imagelength
    return planes * -(-page.imagelength // max(1, min(rows, page.imagelength)))


def _inner_size(head: bytes) -> int | None:
    """Samples that a JPEG or JPEG 2000 stream says it has; None where it does not begin as one."""
    if head[:4] == b"\xff\x4f\xff\x51" and len(head) >= 42:
        right, below, left, top = struct.unpack(">4I", head[8:24])
        return max(0, right - left) * max(0, below - top) * struct.unpack(">H", head[40:42])[0]
    at = 2 if head[:2] == b"\xff\xd8" else len(head)
    while at + 10 <= len(head) and head[at] == 0xFF:
        if 0xC0 <= head[at + 1] <= 0xCF and head[at + 1] not in (0xC4, 0xC8, 0xCC):
            height, width, samples = struct.unpack(">HHB", head[at + 5 : at + 10])
            return height * width * samples
        at += 1 if head[at + 1] == 0xFF else 2 + struct.unpack(">H", head[at + 2 : at + 4])[0]
    return None


# Tags that change no decoder's pixels beside those judged below: names, dates, places, resolution, thresholds, page numbers.
_WITHOUT_EFFECT = {
    *(269, 270, 271, 272, 280, 281, 282, 283, 285, 286, 287, 288, 289, 296, 297, 305, 306, 315, 316, 700),
}  # fmt: skip
_ONE_NUMBER = {
    256: (3, 4),
    257: (3, 4),
    258: (3,),
    259: (3,),
    262: (3,),
    277: (3,),
    278: (3, 4),
    317: (3,),
    322: (3, 4),
    323: (3, 4),
}
# Of private tags these: matteing, data type, depth of the image, colour profile.
_WITH_EFFECT = {32995, 32996, 32997, 34675}
_ONLY_ONE = {254: 0, 262: 1, 266: 1, 274: 1, 277: 1, 284: 1, 339: 1}


def read_alike(page: tifffile.TiffPage, tags: Sequence[Tag], size: int) -> bool:
    """Whether any decoder gives the pixels of this grey image of 8 or 16 bits as tifffile does, as long as they are not damaged.

    Only what the standard leaves no doubt of: tags once each and in order, one image of one sample, its strips or tiles as many
    as its rows need, each in the file and, where not compressed, just as long as its rows.
    """
    codes = [tag.code for tag in tags]
    if codes != sorted(set(codes)) or page.parent.is_bigtiff:
        return False
    judged = {*_ONE_NUMBER, *_ONLY_ONE, 273, 279, 324, 325}
    if any((c < 32768 and c not in judged | _WITHOUT_EFFECT) or c in _WITH_EFFECT for c in codes):
        return False
    by_code = {tag.code: tag for tag in tags}
    if any(t.code in _ONE_NUMBER and (t.number != 1 or t.type not in _ONE_NUMBER[t.code]) for t in tags):
        return False
    value = page.tags.valueof
    if not {256, 257, 258, 259, 262} <= by_code.keys() or any(int(value(c, v)) != v for c, v in _ONLY_ONE.items()):
        return False
    compression, predictor, bits = int(value(259)), int(value(317, 1)), int(value(258))
    if bits not in (8, 16) or compression not in (NONE, LZW, PACKBITS, *DEFLATE, *ZSTD):
        return False
    if predictor != 1 and (predictor != 2 or compression not in (LZW, *DEFLATE, *ZSTD)):
        return False
    height, width = int(value(257)), int(value(256))
    tiled, stripped = {322, 323, 324, 325} & by_code.keys(), {273, 278, 279} & by_code.keys()
    if tiled:
        if stripped or len(tiled) < 4:
            return False
        rows, columns = int(value(323)), int(value(322))
        if rows < 16 or columns < 16 or rows % 16 or columns % 16:
            return False
        lengths = [rows * columns * bits // 8] * (-(-height // rows) * -(-width // columns))
        offsets, counts = by_code[324], by_code[325]
    else:
        rows = int(value(278, height))
        if not {273, 279} <= stripped or rows < 1:
            return False
        lengths = [min(rows, height - first) * width * bits // 8 for first in range(0, height, rows)]
        offsets, counts = by_code[273], by_code[279]
    if any(tag.number != len(lengths) or tag.type not in (3, 4) for tag in (offsets, counts)):
        return False
    starts, held = _numbers(value(offsets.code)), _numbers(value(counts.code))
    whole = all(0 < at and 0 < n and at + n <= size for at, n in zip(starts, held))
    return whole and (compression != NONE or held == lengths)


def _numbers(value: Any) -> list[int]:
    return [int(one) for one in value] if isinstance(value, (tuple, list)) or hasattr(value, "__len__") else [int(value)]


def damage_shows(page: tifffile.TiffPage) -> bool:
    """Whether every decoder that finds a strip damaged refuses it.

    DALI goes on with what it has of compressed 8-bit images, and of 16-bit ones in Deflate and PackBits where only the end is
    wrong.
    """
    compression = int(page.compression)
    return compression == NONE or (page.bitspersample == 16 and compression in (LZW, *ZSTD))
