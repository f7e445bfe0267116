"""One run at a time in an output folder: a lock that its owner's death releases, whatever the clocks of the machines say."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any

from cellfast.embedding.place import Place
from cellfast.errors import CellfastError

LOCK_NAME = ".embed/lock"
HEARTBEAT_S = 30.0
# A lock in an object store has no owner that the store knows of: one whose content nobody changed while another run looked at it for
# so long is taken to be dead. Its owner stops by itself when it could not renew it for that long.
STALE_AFTER_S = 300.0
LOOK_EVERY_S = 5.0
# A run that was away for longer than this makes sure that the lock is still its own before it writes.
TRUST_S = 2 * HEARTBEAT_S


def elapsed_clock() -> float:
    """Seconds that go on while this process is stopped, and while this machine sleeps where the system counts that."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class OutputLock:
    """Hold the lock of an output folder while the block runs.

    On a local disk the kernel holds it (``flock``) and releases it with the process, so that a killed run leaves no stale lock. Where
    the file system has no locks, and in object stores, its owner changes a file every half minute. Who finds such a file looks at it:
    if it changes, its owner lives; if it stays the same for five minutes by the observer's own clock, or its process is gone from this
    very system, the lock is taken over. Times of two machines are never compared.

    Args:
        place: the output folder.
        clock, sleep: seconds that pass, and waiting for them.
        tell: called with a line when somebody else's lock is being looked at.

    Raises:
        CellfastError: another run holds it (names its process and host).
    """

    def __init__(
        self,
        place: Place,
        *,
        clock: Callable[[], float] = elapsed_clock,
        sleep: Callable[[float], None] = time.sleep,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.place, self.clock, self.sleep, self.tell = place, clock, sleep, tell
        self._beats = 0
        self._renewing = threading.Lock()
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
        away = self.clock() - self._renewed
        if not self._lost and away > TRUST_S:
            # Stopped, asleep, or the store was away: what the thread knows may be old. Only the store can tell who has the lock.
            self._beat()
            away = self.clock() - self._renewed
        if self._lost:
            raise CellfastError(
                f"{self.place}: the lock was taken by another cellfast embed while this one could not renew it; stopped"
            )
        if away > STALE_AFTER_S:
            raise CellfastError(
                f"{self.place}: the lock could not be renewed for {away:.0f} s ({self._trouble}), and another run may take it; "
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
            try:
                if self._owner().get("token") == self._token:
                    self.place.remove(LOCK_NAME)
            except (CellfastError, OSError):
                pass  # the store is away: who comes next finds the lock unchanged
        if self._handle is not None:
            # The file stays: removing it would let a waiting run lock a file that no longer has a name.
            self._handle.close()
            self._handle = None

    def _describe(self) -> bytes:
        self._beats += 1
        me = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "system": _system(),
            "renewed": time.strftime("%Y-%m-%d %H:%M:%S %z"),  # for people
            "beat": self._beats,
            "token": self._token,
        }
        return json.dumps(me).encode()

    def _take_kernel_lock(self) -> bool:
        """True: held. False: this file system has no such locks."""
        try:
            import fcntl
        except ImportError:
            return False
        path = self.place.local(LOCK_NAME)
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
        if owner and not _is_gone(owner):
            self._wait_until_stale(owner)
        self.place.write_bytes(LOCK_NAME, self._describe())
        # Two runs may have found no lock at the same moment: the one whose file is there now has it.
        self.sleep(0.5)
        owner = self._owner()
        if owner.get("token") != self._token:
            raise self._refusal(owner)
        self._renewed = self.clock()
        self._thread = threading.Thread(target=self._renew, name="cellfast-lock", daemon=True)
        self._thread.start()

    def _wait_until_stale(self, seen: dict[str, Any]) -> None:
        """Return when the lock stayed as it is for `STALE_AFTER_S`; raise when it changes, return when it is given back."""
        began = self.clock()
        self.tell(f"{self.place} has the lock of {_who(seen)}; looking for up to {STALE_AFTER_S:.0f} s whether it is alive")
        while True:
            self.sleep(LOOK_EVERY_S)
            passed = self.clock() - began
            # Read last: this process may have been stopped itself, and the lock been renewed meanwhile.
            owner = self._owner()
            if not owner or (owner == seen and passed >= STALE_AFTER_S):
                return
            if owner != seen:
                raise self._refusal(owner)

    def _renew(self) -> None:
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
                self.place.write_bytes(LOCK_NAME, self._describe())
                self._renewed = began
            except Exception as error:
                # Whatever an object store raises: the next beat tries again, and `check` tells when it is too late.
                self._trouble = f"{type(error).__name__}: {error}"

    def _owner(self) -> dict[str, Any]:
        try:
            return _parsed(self.place.read_bytes(LOCK_NAME))
        except FileNotFoundError:
            return {}

    def _refusal(self, owner: dict[str, Any]) -> CellfastError:
        return CellfastError(
            f"{self.place}: another cellfast embed ({_who(owner)}) is writing there; wait for it, stop it, or choose another -o"
        )


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    # What cannot be read is somebody's too, until it stays unchanged.
    return value if isinstance(value, dict) and value else {"unreadable": content[:200].hex()}


def _who(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']}" if {"pid", "host"} <= set(owner) else "another process"


def _system() -> str:
    """Tells apart systems in which a process number means another process: hosts, boots and containers."""
    pieces = [socket.gethostname()]
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            pieces.append(file.read().strip())
        pieces.append(os.readlink("/proc/self/ns/pid"))
    except OSError:
        pieces.append(str(uuid.getnode()))
    return " ".join(pieces)


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the owner's process is known to have ended: only in the very system that it ran in can that be known."""
    if owner.get("system") != _system() or not isinstance(owner.get("pid"), int) or owner["pid"] <= 0:
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False
