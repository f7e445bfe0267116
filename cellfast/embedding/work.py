"""Which process does what: parts are claimed one by one, and who finishes a plate's last part writes its files."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch

from cellfast.embedding.sources import Part, PlatePlan
from cellfast.errors import CellfastError

# A process waits so long for the others; one that died is noticed by torchrun, which ends the rest.
PATIENCE = timedelta(days=7)


class LocalWork:
    """All parts for this one process.

    Args:
        todo: plans with the parts that are left of them.
    """

    rank, world_size = 0, 1
    share = None

    def __init__(self, todo: Sequence[tuple[PlatePlan, list[Part]]]) -> None:
        self._todo = list(todo)
        self._left = {plan.plate: len(parts) for plan, parts in todo}
        self._counts: dict[str, int] = {}

    def claims(self) -> Iterator[Part]:
        """The parts this process is to do, in order."""
        for _, parts in self._todo:
            yield from parts

    def is_last(self, plate: str) -> bool:
        """Note that one part of the plate is written; True when it was the last one left."""
        self._left[plate] -= 1
        return self._left[plate] == 0

    def plate_done(self) -> None:
        """Note that a plate's files are written."""

    def count(self, name: str, more: int) -> int:
        """Add to a count of all processes; returns what it is now."""
        self._counts[name] = self._counts.get(name, 0) + more
        return self._counts[name]

    def wait_for_all(self) -> None:
        """Return when all plates are done."""

    def leave(self) -> None:
        """Tell the others that this process needs them no more."""


class SharedWork:
    """Parts shared by the processes of torchrun: a counter in their common store hands them out, so that none is done twice and a fast
    process does more of them.

    Args:
        store: torch's store, one per attempt of the run.
        rank, world_size: of this process.
        todo: as of `LocalWork`; rank 0's counts, the others take it over.
    """

    def __init__(self, store: Any, rank: int, world_size: int, todo: Sequence[tuple[PlatePlan, list[Part]]] | None) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        if rank == 0:
            assert todo is not None
            plan = [[p.plate, [[part.start, part.stop] for part in parts]] for p, parts in todo]
            store.set("plan", json.dumps(plan))
        else:
            plan = json.loads(store.get("plan"))
        self._parts = [Part(plate, start, stop) for plate, parts in plan for start, stop in parts]
        self._count = {plate: len(parts) for plate, parts in plan}
        self.plates = [plate for plate, _ in plan]

    def claims(self) -> Iterator[Part]:
        while (taken := self.store.add("claimed", 1) - 1) < len(self._parts):
            yield self._parts[taken]

    def is_last(self, plate: str) -> bool:
        return self.store.add(f"written/{plate}", 1) == self._count[plate]

    def share(self, cells: int, fields: int) -> tuple[int, int]:
        """Count what is done here; returns what all processes have done."""
        return self.store.add("cells", cells), self.store.add("fields", fields)

    def plate_done(self) -> None:
        self.store.add("plates", 1)

    def count(self, name: str, more: int) -> int:
        return self.store.add(f"count/{name}", more)

    def wait_for_all(self) -> None:
        while self.store.add("plates", 0) < len(self.plates):
            time.sleep(0.2)

    def leave(self) -> None:
        # Rank 0 may keep the store: it goes last.
        gone = self.store.add("left", 1)
        while self.rank == 0 and gone < self.world_size:
            time.sleep(0.05)
            gone = self.store.add("left", 0)


def join_processes(device: torch.device) -> tuple[Any, int, int]:
    """(store, rank, world_size) of the processes torchrun started; (None, 0, 1) for a process on its own.

    Raises:
        CellfastError: the store cannot be reached, or there are more processes than GPUs on this machine.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return None, 0, 1
    import torch.distributed as dist

    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CellfastError(
            f"process {device.index} of this machine has no GPU: there are {torch.cuda.device_count()}. "
            f"Use torchrun --nproc-per-node {torch.cuda.device_count()}"
        )
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
    except (RuntimeError, ValueError) as error:
        raise CellfastError(f"the {world_size} processes cannot find each other: {error}. Start them with torchrun") from error
    store.set_timeout(PATIENCE)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"cellfast-embed/{attempt}", store), rank, world_size
