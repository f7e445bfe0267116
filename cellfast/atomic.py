"""Files that are either whole or absent: write beside the target, then rename; what a killed process left is known and
removed."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cellfast.errors import CellfastError, option
from cellfast.printable import masked_values

# The disk is full, the quota is spent, or a file may not grow further.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Whether a process of another machine still lives cannot be asked: what it has not written to for so long is taken to be left
# over.
ABANDONED_AFTER_S = 24 * 3600.0
_NAME_BYTES = 255
_OWNER = re.compile(r"\.(?P<host>[^.]+)\.(?P<pid>\d+)\.[0-9a-f]{12}(\.exact)?\.partial")


def host_name() -> str:
    """This machine's name; in a container the container's."""
    return socket.gethostname()


def _host_in_a_name() -> str:
    # Dots part the fields of a name. The process ids of another container with the same name are others' ids: its number tells
    # them apart.
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    return f"{re.sub('[^A-Za-z0-9-]', '-', host_name())[:24]}-{space:x}"


def process_lives(pid: int) -> bool:
    """Whether a process of this machine has that id now; one that has ended and was not waited for (a zombie) does not."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    try:
        # Containers without an init keep zombies for ever. The state follows the name, which may hold anything, brackets too.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):
        return True


def partial_path(target: str | os.PathLike[str]) -> Path:
    """A new hidden name beside ``target`` for what is not finished, ``.STEM.HOST.PID.RANDOM.partial.SUFFIX``; `is_abandoned`
    reads it."""
    target = Path(target)
    # The random part keeps two writers apart whose host and process id are alike; the suffix is kept because libraries choose
    # formats by it.
    owner = f".{_host_in_a_name()}.{os.getpid()}.{secrets.token_hex(6)}.partial{target.suffix}"
    # Room for `PlateWriter`'s second file, whose name is longer by ".exact".
    stem = target.stem.encode()[: _NAME_BYTES - len(owner.encode()) - 9].decode(errors="ignore")
    return target.with_name(f".{stem}{owner}")


def is_abandoned(partial: Path) -> bool:
    """Whether nobody will finish ``partial``: its process is gone from this machine, or nothing was written to it for a day."""
    owner = _OWNER.search(partial.name)
    if owner and owner["host"] == _host_in_a_name() and not process_lives(int(owner["pid"])):
        return True
    try:
        return time.time() - partial.lstat().st_mtime > ABANDONED_AFTER_S
    except OSError:
        return False  # finished or removed just now


def remove_abandoned(folder: str | os.PathLike[str], *, deep: bool = False) -> int:
    """Remove the partial files in ``folder`` (``deep``: below it too) that `is_abandoned` names; returns how many."""
    folder = Path(folder)
    left = [p for p in (folder.rglob if deep else folder.glob)(".*.partial*") if p.is_file() and is_abandoned(p)]
    for partial in left:
        partial.unlink(missing_ok=True)
    return len(left)


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        # HDF5 and torch tell the reason in their text only.
        if getattr(error, "errno", None) in FULL or any(os.strerror(number) in str(error) for number in FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def told_when_full(target: str | os.PathLike[str], where: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """Turn "the disk is full, the quota is spent, a file may not grow further" inside the block into a sentence about ``target``.

    Args:
        target: what is being written, for the message.
        where: the folder whose free space is told; None: that of ``target``.

    Raises:
        CellfastError: writing failed for want of room. Other errors pass.
    """
    try:
        yield
    except CellfastError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        if not _is_full(error):
            raise
        folder = Path(where) if where is not None else Path(target).parent
        free = shutil.disk_usage(folder if folder.is_dir() else ".").free
        raise CellfastError(
            f"no space left to write {target} ({free / 2**20:,.0f} MiB free at {folder}; a quota or limit may be lower). "
            "Nothing is half written, what was finished stays: make room and run the same command again (a training: with "
            f"{option('resume', True)})"
        ) from error


@contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in ``target``'s folder that replaces ``target`` when the block ends without an exception.

    Equivalent to writing ``target`` in one indivisible step: readers see the old file or the new one, never a part.
    The temporary file is removed when the block raises, and so are those that killed processes left of ``target``. Creates the
    parent folder.

    Raises:
        CellfastError: the disk is full; ``target`` stays as it was.
    """
    target = Path(target)
    with told_when_full(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = partial_path(target)
        # What a killed process left of this very file would stay for ever where no command owns the folder.
        for left in target.parent.glob(f".{glob.escape(target.stem)}.*.partial{glob.escape(target.suffix)}"):
            if is_abandoned(left):
                left.unlink(missing_ok=True)
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
