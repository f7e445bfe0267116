"""Damage to bytes: what disks, copies and editors do to files, and what an attacker would; drawn from a seed."""

from __future__ import annotations

import gzip
import zlib

import numpy as np

EXTREMES = (0, 1, -1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**62, 0x10000000, 65_537, 1_000_000_007)


def generator(kind: str, seed: int, index: int) -> np.random.Generator:
    """The random numbers of one mutant: the same kind, seed and index give the same bytes."""
    return np.random.default_rng([seed, zlib.crc32(kind.encode()), index])


def mutate(content: bytes, rng: np.random.Generator, *, text: bool = False, zipped: bool = False) -> tuple[str, bytes]:
    """(name of the mutation, the damaged bytes); ``text``: also what only makes sense in text, ``zipped``: also inside gzip."""
    if zipped and rng.random() < 0.5:
        name, inside = mutate(gzip.decompress(content), rng, text=True)
        return f"gzip of {name}", gzip.compress(inside, mtime=0)
    chosen = TEXT if text and not zipped and rng.random() < 0.6 else BYTES
    name = list(chosen)[rng.integers(len(chosen))]
    return name, bytes(chosen[name](bytearray(content), rng))


def _offset(size: int, rng: np.random.Generator) -> int:
    """Anywhere; as often within a kilobyte of either end, where formats keep what they say about themselves."""
    if size <= 1:
        return 0
    near = int(rng.integers(0, min(size, 1024)))
    return (int(rng.integers(0, size)), near, size - 1 - near, int(rng.integers(0, size)))[rng.integers(4)]


def _range(size: int, rng: np.random.Generator) -> slice:
    start = _offset(size, rng)
    return slice(start, min(size, start + int(2 ** rng.uniform(0, np.log2(max(size, 2))))))


def _flip(content: bytearray, rng: np.random.Generator, count: int = 1) -> bytearray:
    for _ in range(count):
        if content:
            content[_offset(len(content), rng)] ^= 1 << int(rng.integers(8))
    return content


def _flips(content: bytearray, rng: np.random.Generator) -> bytearray:
    return _flip(content, rng, int(rng.integers(2, 30)))


def _byte(content: bytearray, rng: np.random.Generator) -> bytearray:
    content[_offset(len(content), rng)] = int(rng.integers(256))
    return content


def _cut(content: bytearray, rng: np.random.Generator) -> bytearray:
    return content[: _offset(len(content), rng)]


def _zero(content: bytearray, rng: np.random.Generator) -> bytearray:
    where = _range(len(content), rng)
    content[where] = bytes(where.stop - where.start)
    return content


def _remove(content: bytearray, rng: np.random.Generator) -> bytearray:
    del content[_range(len(content), rng)]
    return content


def _double(content: bytearray, rng: np.random.Generator) -> bytearray:
    where = _range(len(content), rng)
    return content[: where.stop] + content[where] + content[where.stop :]


def _swap(content: bytearray, rng: np.random.Generator) -> bytearray:
    length = int(2 ** rng.uniform(0, np.log2(max(len(content) / 3, 2))))
    first, second = sorted(_offset(max(len(content) - length, 1), rng) for _ in range(2))
    second = max(second, first + length)
    one, two = content[first : first + length], content[second : second + length]
    content[second : second + length] = one
    content[first : first + length] = two
    return content


def _append(content: bytearray, rng: np.random.Generator) -> bytearray:
    count = int(2 ** rng.uniform(0, 16))
    return content + (bytes(count) if rng.random() < 0.3 else rng.bytes(count))


def _extreme(content: bytearray, rng: np.random.Generator) -> bytearray:
    width = int(rng.choice([2, 4, 8]))
    value = EXTREMES[rng.integers(len(EXTREMES))] % (1 << 8 * width)
    start = _offset(max(len(content) - width, 1), rng)
    start -= start % int(rng.choice([1, width]))
    content[start : start + width] = value.to_bytes(width, "little" if rng.random() < 0.75 else "big")
    return content


BYTES = {
    "flip": _flip,
    "flips": _flips,
    "byte": _byte,
    "cut": _cut,
    "zero": _zero,
    "remove": _remove,
    "double": _double,
    "swap": _swap,
    "append": _append,
    "extreme": _extreme,
    "extremes": lambda content, rng: _extreme(_extreme(content, rng), rng),
}

# Into a table's cell, or a value of JSON or YAML.
VALUES = (
    b"inf", b"-inf", b"nan", b"1e400", b"-1", b"99999999999999999999999", b"1e18", b"9223372036854775808", b"0x10", b"",
    b"\x00", b"\xff\xfe", "\u202e٣".encode(), b"'", b'"', b"[]", b"{}", b"null", b"true", b"1.5", b"../../x", b"$\\bad{$", b"a\nb",
    b"-", b"=cmd", b"!!python/object:os.system x", b"*a", b"&a [*a]", b"1_000", b"9" * 5000,
)  # fmt: skip


def _lines(content: bytearray) -> list[bytes]:
    return bytes(content).split(b"\n")


def _value(content: bytearray, rng: np.random.Generator) -> bytearray:
    """Replaces one value, what stands between two separators."""
    data = bytes(content)
    marks = [i for i, c in enumerate(data) if c in b",:\n\t[]{}"] or [0]
    mark = int(rng.integers(len(marks)))
    end = marks[mark + 1] if mark + 1 < len(marks) else len(data)
    return bytearray(data[: marks[mark] + 1] + VALUES[rng.integers(len(VALUES))] + data[end:])


def _column(content: bytearray, rng: np.random.Generator) -> bytearray:
    """Doubles, drops, moves or renames a column of a table (a key of a line elsewhere)."""
    rows = [line.split(b",") for line in _lines(content)]
    at, way = int(rng.integers(max(len(rows[0]), 1))), int(rng.integers(4))
    if way == 3:
        rows[0][at] = VALUES[rng.integers(len(VALUES))]
    for row in rows if way < 3 else []:
        if at < len(row):
            row[at : at + 1] = ([row[at], row[at]], [], [row[-1]])[way]
    return bytearray(b"\n".join(b",".join(row) for row in rows))


def _header_only(content: bytearray, rng: np.random.Generator) -> bytearray:
    return bytearray(_lines(content)[0] + b"\n")


def _line(content: bytearray, rng: np.random.Generator) -> bytearray:
    """Doubles, drops or shortens a line, or lets it end in an open quote."""
    lines = _lines(content)
    at, way = int(rng.integers(len(lines))), int(rng.integers(4))
    line = lines[at]
    lines[at : at + 1] = ([line, line], [], [line[: len(line) // 2]], [line + b',"'])[way]
    return bytearray(b"\n".join(lines))


def _nest(content: bytearray, rng: np.random.Generator) -> bytearray:
    depth, data = int(10 ** rng.uniform(1, 5)), bytes(content)
    start = _offset(len(data), rng)
    mark = (b"[", b"{", b"- ", b'{"a":')[rng.integers(4)]
    return bytearray(data[:start] + mark * depth + data[start:])


def _ends(content: bytearray, rng: np.random.Generator) -> bytearray:
    data = bytes(content)
    ways = (data.replace(b"\n", b"\r"), data.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + data, data.replace(b",", b";"))
    return bytearray((*ways, data.decode("utf-8", "replace").encode("utf-16"), b"")[rng.integers(6)])


TEXT = {
    "value": _value,
    "values": lambda content, rng: _value(_value(content, rng), rng),
    "column": _column,
    "line": _line,
    "nest": _nest,
    "ends": _ends,
    "header only": _header_only,
}
