"""One command at a time in a folder: locks that their owner's death releases, whatever the clocks of the machines say.

`filelock`, which torch brings, does not do: it keeps no word of who holds a lock of the kernel, and none in object stores.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from cellfast.atomic import host_name, process_lives
from cellfast.errors import CellfastError
from cellfast.storage.folder import Folder

FOLDER_LOCK_NAME = ".lock"
LOCK_NAME = ".embed/lock"
HEARTBEAT_S = 30.0
# A lock in an object store has no owner that the store knows of: one whose content nobody changed while another run looked at it
# for so long is taken to be dead. Its owner stops by itself when it could not renew it for that long.
STALE_AFTER_S = 300.0
LOOK_EVERY_S = 5.0
# A run that was away for longer than this makes sure that the lock is still its own before it writes.
TRUST_S = 2 * HEARTBEAT_S
_ADVICE = "wait for it, stop it, or choose another folder"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


def elapsed_clock() -> float:
    """Seconds that go on while this process is stopped, and while this machine sleeps where the system counts that."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class FolderLock:
    """Hold a local folder for one command, as a context manager or by `acquire` and `release`.

    The kernel holds the lock (``flock``) and releases it with the process. Where the file system has no locks, the file itself is
    the lock; it counts as left over when its process is known to have ended.

    Args:
        folder: made when it is not there, and removed at the end if it was made here and is still empty.
        command: what holds it, for the message, e.g. ``cellfast train``.

    Raises:
        CellfastError: another process holds it (names process and host), or ``folder`` is a file.
    """

    def __init__(self, folder: str | os.PathLike[str], command: str) -> None:
        self.folder, self.command = Path(folder), command
        self._path = self.folder / FOLDER_LOCK_NAME
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
                self._lock(handle)
                # The one before us removes the file as it leaves: a lock on a file without a name keeps nobody out.
                if os.path.samestat(os.fstat(handle.fileno()), os.stat(self._path)):
                    self._handle = handle
            except FileNotFoundError:
                pass
            finally:
                if self._handle is None:
                    handle.close()
        _write(self._handle, {**_me(), "command": self.command})

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

    def _lock(self, handle: BinaryIO) -> None:
        held = _flock(handle)
        if held:
            return
        owner = _read(handle)
        advice = _ADVICE
        if held is None:
            if "pid" not in owner or _is_gone(owner):
                return
            advice += f"; if it runs no longer, remove {self._path} (this file system has no locks)"
        who = _who(owner) if "pid" in owner else "a process that has just begun"
        raise CellfastError(f"{self.folder}: {owner.get('command', 'another command')} ({who}) is writing there; {advice}")


class OutputLock:
    """Hold the output folder of ``cellfast embed`` while the block runs, wherever it lies.

    On a local disk the kernel holds it (``flock``) and releases it with the process, so that a killed run leaves no stale lock.
    Where the file system has no locks, and in object stores, its owner changes a file every half minute. Who finds such a file
    looks at it: if it changes, its owner lives; if it stays the same for five minutes by the observer's own clock, or its process
    is gone from this very system, the lock is taken over. Times of two machines are never compared.

    Args:
        folder: the output folder.
        clock, sleep: seconds that pass, and waiting for them.
        tell: called with a line when somebody else's lock is being looked at.

    Raises:
        CellfastError: another run holds it (names its process and host).
    """

    def __init__(
        self,
        folder: Folder,
        *,
        clock: Callable[[], float] = elapsed_clock,
        sleep: Callable[[float], None] = time.sleep,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.folder, self.clock, self.sleep, self.tell = folder, clock, sleep, tell
        self._beats = 0
        self._renewing = threading.Lock()
        self._handle: BinaryIO | None = None
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
        away = self.clock() - self._renewed
        if not self._lost and away > TRUST_S:
            # Stopped, asleep, or the store was away: what the thread knows may be old. Only the store can tell who has the lock.
            self._beat()
            away = self.clock() - self._renewed
        if self._lost:
            raise CellfastError(
                f"{self.folder}: the lock was taken by another cellfast embed while this one could not renew it; stopped"
            )
        if away > STALE_AFTER_S:
            raise CellfastError(
                f"{self.folder}: the lock could not be renewed for {away:.0f} s ({self._trouble}), and another run may take it; "
                "stopped: the same command goes on where this one ended"
            )

    def __enter__(self) -> OutputLock:
        path = self.folder.on_disk(LOCK_NAME)
        if path is None or not self._take_kernel_lock(path):
            self._take_by_file()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            try:
                if self._owner().get("token") == self._token:
                    self.folder.remove(LOCK_NAME)
            except (CellfastError, OSError):
                pass  # the store is away: who comes next finds the lock unchanged
        if self._handle is not None:
            # The file stays: removing it would let a waiting run lock a file that no longer has a name.
            self._handle.close()
            self._handle = None

    def _take_kernel_lock(self, path: Path) -> bool:
        """True: held. False: this file system has no such locks."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "a+b")
        try:
            held = _flock(handle)
            if held is False:
                raise self._refusal(_read(handle))
            if held:
                _write(handle, self._describe())
                self._handle = handle
        finally:
            if self._handle is None:
                handle.close()
        return self._handle is not None

    def _take_by_file(self) -> None:
        owner = self._owner()
        if owner and not _is_gone(owner):
            self._wait_until_stale(owner)
        self._renew()
        # Two runs may have found no lock at the same moment: the one whose file is there now has it.
        self.sleep(0.5)
        owner = self._owner()
        if owner.get("token") != self._token:
            raise self._refusal(owner)
        self._renewed = self.clock()
        self._thread = threading.Thread(target=self._beat_on, name="cellfast-lock", daemon=True)
        self._thread.start()

    def _wait_until_stale(self, seen: dict[str, Any]) -> None:
        """Return when the lock stayed as it is for `STALE_AFTER_S`; raise when it changes, return when it is given back."""
        began = self.clock()
        self.tell(f"{self.folder} has the lock of {_who(seen)}; looking for up to {STALE_AFTER_S:.0f} s whether it is alive")
        while True:
            self.sleep(LOOK_EVERY_S)
            passed = self.clock() - began
            # Read last: this process may have been stopped itself, and the lock been renewed meanwhile.
            owner = self._owner()
            if not owner or (owner == seen and passed >= STALE_AFTER_S):
                return
            if owner != seen:
                raise self._refusal(owner)

    def _beat_on(self) -> None:
        while not self._lost and not self._stop.wait(HEARTBEAT_S):
            self._beat()

    def _beat(self) -> None:
        with self._renewing:
            began = self.clock()
            try:
                owner = self._owner()
                if owner.get("token", self._token) != self._token or (not owner and began - self._renewed > STALE_AFTER_S):
                    self._lost = True
                    return
                self._renew()
                self._renewed = began
            except Exception as error:
                # Whatever an object store raises: the next beat tries again, and `check` tells when it is too late.
                self._trouble = f"{type(error).__name__}: {error}"

    def _renew(self) -> None:
        self.folder.write_bytes(LOCK_NAME, json.dumps(self._describe()).encode())

    def _describe(self) -> dict[str, Any]:
        self._beats += 1
        renewed = time.strftime("%Y-%m-%d %H:%M:%S %z")  # for people
        return {**_me(), "renewed": renewed, "beat": self._beats, "token": self._token}

    def _owner(self) -> dict[str, Any]:
        try:
            return _parsed(self.folder.read_bytes(LOCK_NAME))
        except FileNotFoundError:
            return {}

    def _refusal(self, owner: dict[str, Any]) -> CellfastError:
        return CellfastError(f"{self.folder}: another cellfast embed ({_who(owner)}) is writing there; {_ADVICE}")


def _flock(handle: BinaryIO) -> bool | None:
    """True: the kernel gave the lock. False: another process has it. None: this file system has no such locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return None
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _write(handle: BinaryIO, owner: dict[str, Any]) -> None:
    handle.truncate(0)
    handle.write(json.dumps(owner).encode())
    handle.flush()


def _read(handle: BinaryIO) -> dict[str, Any]:
    handle.seek(0)
    return _parsed(handle.read())


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    # What cannot be read is somebody's too, until it stays unchanged.
    return value if isinstance(value, dict) and value else {"unreadable": content[:200].hex()}


def _me() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": host_name(), "system": _system()}


def _who(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']}" if {"pid", "host"} <= set(owner) else "another process"


def _system() -> str:
    """Tells apart systems in which a process number means another process: hosts, boots and containers."""
    pieces = [host_name()]
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            pieces.append(file.read().strip())
        pieces.append(os.readlink("/proc/self/ns/pid"))
    except OSError:
        pieces.append(str(uuid.getnode()))
    return " ".join(pieces)


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the owner's process is known to have ended: only in the very system that it ran in can that be known."""
    pid = owner.get("pid")
    return owner.get("system") == _system() and isinstance(pid, int) and pid > 0 and not process_lives(pid)
