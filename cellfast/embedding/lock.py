"""One run at a time in an output folder: a lock that its owner's death releases."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from cellfast.embedding.place import Place
from cellfast.errors import CellfastError

LOCK_NAME = ".embed/lock"
HEARTBEAT_S = 30.0
# A lock in an object store has no owner that the store knows of: one that was not renewed for so long is taken to be dead.
STALE_AFTER_S = 300.0


class OutputLock:
    """Hold the lock of an output folder while the block runs.

    On a local disk the kernel holds it (``flock``) and releases it with the process, so that a killed run leaves no stale lock. Where
    the file system has no locks, and in object stores, a file with process id, host and time is renewed every half minute; it counts as
    stale when its process is gone from this host, or when it was not renewed for five minutes.

    Raises:
        CellfastError: another run holds it (names its process and host).
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._handle: Any = None
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._renewed = 0.0
        self._trouble = ""
        self._lost = False

    def check(self) -> None:
        """Raise unless the lock is still held: a run whose lock went stale must not write beside the one that took it.

        Raises:
            CellfastError: another run has the lock, or it could not be renewed for so long that another may take it (says why).
        """
        if self._thread is None:
            return  # the kernel's lock does not go stale
        if self._lost:
            raise CellfastError(
                f"{self.place}: the lock was taken by another cellfast embed while this one could not renew it; stopped"
            )
        if time.monotonic() - self._renewed > STALE_AFTER_S:
            raise CellfastError(
                f"{self.place}: the lock could not be renewed for {STALE_AFTER_S:.0f} s ({self._trouble}), and another run may take it; "
                "stopped: the same command goes on where this one ended"
            )

    def __enter__(self) -> OutputLock:
        if self.place.remote or not self._take_kernel_lock():
            self._take_by_file()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._owner().get("token") == self._token:
                self.place.remove(LOCK_NAME)
        if self._handle is not None:
            # The file stays: removing it would let a waiting run lock a file that no longer has a name.
            self._handle.close()
            self._handle = None

    def _describe(self) -> bytes:
        me = {"pid": os.getpid(), "host": socket.gethostname(), "renewed": time.time(), "token": self._token}
        return json.dumps(me).encode()

    def _take_kernel_lock(self) -> bool:
        """True: held. False: this file system has no such locks."""
        try:
            import fcntl
        except ImportError:
            return False
        path = Path(self.place.path(LOCK_NAME))
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "a+b")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                handle.seek(0)
                owner = _parsed(handle.read())
                handle.close()
                raise self._refusal(owner) from None
            handle.close()
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                return False
            raise
        handle.truncate(0)
        handle.write(self._describe())
        handle.flush()
        self._handle = handle
        return True

    def _take_by_file(self) -> None:
        owner = self._owner()
        if owner and not _is_stale(owner):
            raise self._refusal(owner)
        self.place.write_bytes(LOCK_NAME, self._describe())
        # Two runs may have found no lock at the same moment: the one whose file is there now has it.
        time.sleep(0.5)
        owner = self._owner()
        if owner.get("token") != self._token:
            raise self._refusal(owner)
        self._renewed = time.monotonic()
        self._thread = threading.Thread(target=self._renew, name="cellfast-lock", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                if self._owner().get("token", self._token) != self._token:
                    self._lost = True
                    return
                self.place.write_bytes(LOCK_NAME, self._describe())
                self._renewed = time.monotonic()
            except (
                Exception
            ) as error:  # whatever an object store raises: the next beat tries again, and `check` tells when it is too late
                self._trouble = f"{type(error).__name__}: {error}"

    def _owner(self) -> dict[str, Any]:
        try:
            return _parsed(self.place.read_bytes(LOCK_NAME))
        except (FileNotFoundError, OSError):
            return {}

    def _refusal(self, owner: dict[str, Any]) -> CellfastError:
        who = f"process {owner['pid']} on {owner['host']}" if {"pid", "host"} <= set(owner) else "another process"
        return CellfastError(
            f"{self.place}: another cellfast embed ({who}) is writing there; wait for it, stop it, or choose another -o"
        )


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _is_stale(owner: dict[str, Any]) -> bool:
    if owner.get("host") == socket.gethostname() and isinstance(owner.get("pid"), int):
        try:
            os.kill(owner["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
    return time.time() - float(owner.get("renewed", 0)) > STALE_AFTER_S
