"""Which process embeds which block: each claims one after the other, and who finishes a plate's last block writes its files."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from cellfast.embedding.cells import Block, PlatePlan
from cellfast.errors import CellfastError
from cellfast.storage.locks import elapsed_clock

BEAT_S = 5.0
# A process that gave no sign for so long is taken to be stopped or dead, and the run ends. One that cannot end by itself then,
# because it waits for a store that does not answer, is ended `GRACE_S` later.
PATIENCE_S, GRACE_S = 180.0, 60.0
# Added to the signs of life of a process that has nothing left to do: no more are to be expected.
_LEFT = 1 << 40
AGAIN = "run the same command again: it goes on where this one ended"


class BlockQueue:
    """The blocks of the run, shared by its processes: a counter in their common store hands them out, so that none is done twice
    and a fast process does more of them.

    Args:
        store: torch's store, one per attempt of the run; `OwnStore` for a process on its own.
        rank, world_size: of this process.
        todo: plans with the blocks that are left of them; rank 0's counts, the others take it over.
        watch: tells when another process is stopped or dead.

    Raises:
        CellfastError: (from every method) another process is stopped or dead, or the store is gone.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        todo: Sequence[tuple[PlatePlan, list[Block]]],
        watch: Watch | None = None,
    ) -> None:
        self.store, self.rank, self.world_size, self.watch = store, rank, world_size, watch
        if rank == 0:
            plan = [[p.plate, [[block.start, block.stop] for block in blocks]] for p, blocks in todo if blocks]
            with told():
                store.set("plan", json.dumps(plan))
        else:
            # Rank 0 may look at finished plates for a while.
            while not self._ask(lambda: store.check(["plan"])):
                time.sleep(0.1)
            plan = json.loads(self._ask(lambda: store.get("plan")))
        self._parts = [Block(plate, start, stop) for plate, blocks in plan for start, stop in blocks]
        self._count = {plate: len(blocks) for plate, blocks in plan}

    def check(self) -> None:
        """Raise `CellfastError` where the run must not go on."""
        if self.watch is not None:
            self.watch.check()

    def _ask(self, question: Callable[[], Any]) -> Any:
        self.check()
        with told():
            return question()

    def count(self, name: str, more: int) -> int:
        """Add to a count of all processes; returns what it is now."""
        return self._ask(lambda: self.store.add(name, more))

    def claims(self) -> Iterator[Block]:
        """The blocks this process is to do, in order."""
        while (taken := self.count("claimed", 1) - 1) < len(self._parts):
            yield self._parts[taken]

    def is_last(self, plate: str) -> bool:
        """Note that one block of the plate is written; True when it was the last one left."""
        return self.count(f"written/{plate}", 1) == self._count[plate]

    def plate_done(self) -> None:
        """Note that a plate's files are written."""
        self.count("plates", 1)

    def wait_for_all(self) -> None:
        """Return when all plates are done."""
        while self.count("plates", 0) < len(self._count):
            time.sleep(0.2)

    def leave(self) -> None:
        """Tell the others that this process needs them no more."""
        if self.watch is not None and self.rank:
            with told():
                self.watch.leave()
        # Rank 0 may keep the store: it goes last.
        gone = self.count("left", 1)
        while self.rank == 0 and gone < self.world_size:
            time.sleep(0.05)
            gone = self.count("left", 0)


class OwnStore:
    """The store of a process on its own."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def set(self, name: str, value: str) -> None:
        """Nobody else asks."""

    def add(self, name: str, more: int) -> int:
        """As torch's store does; each name is counted on by one thread at a time."""
        self._counts[name] += more
        return self._counts[name]


class Watch:
    """Notices that a process of the run is stopped or dead, by signs of life in the common store.

    Each process counts up a number of its own; rank 0 looks at all of them, the others at rank 0. Seconds are those of the
    observer: clocks of two machines are never compared. A process that was stopped itself notices it by its own clock.

    Args:
        store: torch's store.
        rank, world_size: of this process.
        clock: seconds that pass, also while this process is stopped.
    """

    def __init__(self, store: Any, rank: int, world_size: int, *, clock: Callable[[], float] = elapsed_clock) -> None:
        self.store, self.rank, self.clock = store, rank, clock
        self._others = list(range(1, world_size)) if rank == 0 else [0]
        self._seen = {other: (0, clock()) for other in self._others}
        self._heard = clock()  # when the store last answered
        self._silent: int | None = None
        self._ended = threading.Event()

    def start(self) -> Watch:
        """Give signs of life, and look for those of the others, on threads of their own."""
        for work in (self._beat, self._guard):
            threading.Thread(target=work, name="cellfast-watch", daemon=True).start()
        return self

    def close(self) -> None:
        """No more signs of life are to be expected of this process."""
        self._ended.set()

    def leave(self) -> None:
        """Tell the others that this process ended as it should."""
        self.store.add(f"alive/{self.rank}", _LEFT)
        self.close()

    def look(self) -> None:
        """Give a sign of life and look for those of the others."""
        self.store.add(f"alive/{self.rank}", 1)
        now = self.clock()
        for other, (count, since) in self._seen.items():
            found = self.store.add(f"alive/{other}", 0)
            if found != count:
                self._seen[other] = (found, now)
            elif count < _LEFT and now - since > PATIENCE_S and now - self._heard < PATIENCE_S:
                # Not after a time in which this process itself was stopped: the others may have ended because of that.
                self._silent = other
        self._heard = now

    def trouble(self) -> str:
        """What is wrong; empty where all is well."""
        away = self.clock() - self._heard
        if self._silent is not None:
            return f"process {self._silent} of the run gave no sign for {PATIENCE_S:.0f} s: it is stopped or dead"
        if away > PATIENCE_S:
            return f"process {self.rank} was stopped, or could not reach the others, for {away:.0f} s"
        return ""

    def check(self) -> None:
        """Raise `CellfastError` where another process is stopped or dead, or this one was."""
        if trouble := self.trouble():
            raise CellfastError(f"{trouble}; {AGAIN}")

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S) and not self.trouble():
            try:
                self.look()
            except Exception:
                continue  # `trouble` tells when it lasts

    def _guard(self) -> None:
        since: float | None = None
        while not self._ended.wait(BEAT_S):
            if not (trouble := self.trouble()):
                continue
            since = self.clock() if since is None else since
            if self.clock() - since > GRACE_S:
                # The main thread hangs in a call to the store. Files are whole or not there: nothing is lost by ending here.
                os.write(2, f"Error: {trouble}; {AGAIN}\n".encode())
                os._exit(1)


@contextmanager
def told() -> Iterator[None]:
    """Turn what torch's store raises into one sentence."""
    try:
        yield
    except (RuntimeError, ConnectionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CellfastError(
            f"the other processes of the run cannot be reached ({reason[:200]}): one of them ended; {AGAIN}"
        ) from error


def join_processes(device: torch.device) -> tuple[Any, int, int]:
    """(store, rank, world_size) of the processes torchrun started, or of this one on its own.

    When torchrun ends this process, most often because another one died, it says so.

    Raises:
        CellfastError: the store cannot be reached, or there are more processes than GPUs on this machine.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return OwnStore(), 0, 1
    import torch.distributed as dist

    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CellfastError(
            f"process {device.index} of this machine has no GPU: there are {torch.cuda.device_count()}. Use torchrun "
            f"--nproc-per-node {torch.cuda.device_count()}"
        )
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
    except (RuntimeError, ValueError) as error:
        raise CellfastError(f"the {world_size} processes cannot find each other: {error}. Start them with torchrun") from error
    store.set_timeout(timedelta(seconds=PATIENCE_S))
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _say_ended)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"cellfast-embed/{attempt}", store), rank, world_size


def _say_ended(number: int, frame: object) -> None:
    rank = os.environ.get("RANK", "0")
    os.write(
        2, f"Error: process {rank} was ended by a signal, most often because another process of the run died; {AGAIN}\n".encode()
    )
    os._exit(128 + number)
