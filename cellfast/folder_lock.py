"""One command at a time in a local output folder: a lock that its owner's death releases."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from cellfast.atomic import host_name, process_lives
from cellfast.errors import CellfastError

LOCK_NAME = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class FolderLock:
    """Hold ``folder`` for one command, as a context manager or by `acquire` and `release`.

    The kernel holds the lock (``flock``) and releases it with the process. Where the file system has no locks, the file itself is the
    lock; it counts as left over when its process is gone from this host.

    Args:
        folder: made when it is not there, and removed at the end if it was made here and is still empty.
        command: what holds it, for the message, e.g. ``cellfast train``.

    Raises:
        CellfastError: another process holds it (names process and host), or ``folder`` is a file.
    """

    def __init__(self, folder: str | os.PathLike[str], command: str) -> None:
        self.folder, self.command = Path(folder), command
        self._path = self.folder / LOCK_NAME
        self._handle: BinaryIO | None = None
        self._made_folder = False

    def acquire(self) -> None:
        """Take the lock at once or raise."""
        if self.folder.exists() and not self.folder.is_dir():
            raise CellfastError(f"{self.folder} is a file: expected a folder to write to")
        self._made_folder = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        while self._handle is None:
            handle = open(self._path, "a+b")
            try:
                held = self._lock(handle)
                # The one before us removes the file as it leaves: a lock on a file without a name keeps nobody out.
                if held and os.path.samestat(os.fstat(handle.fileno()), os.stat(self._path)):
                    self._handle = handle
            except FileNotFoundError:
                pass
            finally:
                if self._handle is None:
                    handle.close()
        self._handle.truncate(0)
        self._handle.write(json.dumps({"pid": os.getpid(), "host": host_name(), "command": self.command}).encode())
        self._handle.flush()

    def release(self) -> None:
        """Give the lock back; nothing happens when it is not held."""
        if self._handle is None:
            return
        self._path.unlink(missing_ok=True)
        self._handle.close()
        self._handle = None
        if self._made_folder:
            try:
                self.folder.rmdir()
            except OSError:
                pass  # something was written

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def _lock(self, handle: BinaryIO) -> bool:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except ImportError:
            pass
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise self._refusal(_owner(handle), "wait for it, stop it, or choose another -o") from None
            if error.errno not in _NO_LOCKS:
                raise
        owner = _owner(handle)
        if not owner or (owner.get("host") == host_name() and not process_lives(int(owner["pid"]))):
            return True
        raise self._refusal(
            owner,
            f"wait for it, stop it, or choose another -o; if it runs no longer, remove {self._path} (this file system has no locks)",
        )

    def _refusal(self, owner: dict[str, Any], advice: str) -> CellfastError:
        who = f"process {owner['pid']} on {owner['host']}" if owner else "a process that has just begun"
        return CellfastError(f"{self.folder}: {owner.get('command', 'another command')} ({who}) is writing there; {advice}")


def _owner(handle: BinaryIO) -> dict[str, Any]:
    handle.seek(0)
    try:
        value = json.loads(handle.read())
        return {"pid": int(value["pid"]), "host": str(value["host"]), "command": str(value["command"])}
    except (ValueError, KeyError, TypeError):
        return {}
