"""Files that are either whole or absent: write beside the target, then rename."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cellfast.printable import masked_values


@contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in ``target``'s folder that replaces ``target`` when the block ends without an exception.

    Equivalent to writing ``target`` in one indivisible step: readers see the old file or the new one, never a part.
    The temporary file is removed when the block raises. Creates the parent folder.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two writers apart; the suffix is kept because libraries choose formats by it.
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.partial{target.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(target: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, atomically, with the secrets in its texts masked.

    NaN and infinity are refused (``ValueError``) as JSON has no such numbers.
    """
    text = json.dumps(masked_values(value), indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(target) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_text(target: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
