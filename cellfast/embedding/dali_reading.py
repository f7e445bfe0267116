"""Fields read ahead, decoded by DALI in groups, and checked: the same cells in the same order as the readers make alone."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import combinations, islice
from typing import Any

import torch
from torch import Tensor

from cellfast.data.plane_decoder import PlaneDecoder
from cellfast.embedding.cells import Cells, EncodedField
from cellfast.embedding.decoding import Decoding, fields_per_group, plane_decoder
from cellfast.embedding.field_source import FieldSource
from cellfast.embedding.reading import ReaderPool
from cellfast.screens.field_cells import PlaneFacts

# Groups decoded or being checked, beside the one whose cells are taken.
GROUPS_AHEAD = 2


class DaliReader:
    """As `ReaderPool`, with the decoding done by DALI; what DALI does not decode the readers do, with their tries and refusals.

    On a GPU the planes stay there, in the order of ``stream``; where the host works on pixels (illumination, detection) they come back.

    Args:
        source: fields.
        workers: threads that read files, and as many that check and locate.
        decoding: what was chosen; its counts are kept.
    """

    def __init__(self, source: FieldSource, workers: int, decoding: Decoding, device: torch.device, stream: Any = None) -> None:
        self.source, self.decoding, self.device, self.stream = source, decoding, device, stream
        self.decoder: PlaneDecoder = plane_decoder(source, device, decoding.how or "cpu", decoding.threads)
        self.group = fields_per_group(source)
        self._files = ReaderPool(_Files(source), workers, "threads")
        self._decode = ThreadPoolExecutor(1, "cellfast-decode")
        self._check = ThreadPoolExecutor(workers, "cellfast-check")

    def cells(self, units: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Cells]]:
        """(key, cells) for each (key, unit), in order."""
        read = self._files.cells(units)
        waiting: deque[tuple[list[Any], Future[list[Future[Cells]]]]] = deque()
        while True:
            while len(waiting) < GROUPS_AHEAD and (group := list(islice(read, self.group))):
                waiting.append(([key for key, _ in group], self._decode.submit(self._decoded, [unit for _, unit in group])))
            if not waiting:
                return
            keys, done = waiting.popleft()
            for key, cells in zip(keys, done.result()):
                yield key, cells.result()

    def _decoded(self, group: list[EncodedField | Cells]) -> list[Future[Cells]]:
        """Decode what is encoded, and start checking it."""
        began = time.perf_counter()
        encoded = [one for one in group if isinstance(one, EncodedField)]
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            planes = self.decoder.decode([one.contents for one in encoded])
            facts: list[PlaneFacts | None] = [None] * len(planes)
            if self.device.type == "cuda":
                if self.source.looks_at_pixels:
                    planes = [None if p is None else p.cpu() for p in planes]
                else:
                    facts = [None if p is None else plane_facts(p) for p in planes]
        self.decoding.failure = self.decoder.failure
        seconds = (time.perf_counter() - began) * self.decoding.threads / max(1, len(encoded))
        ready = iter(zip(planes, facts))
        futures: list[Future[Cells]] = []
        for one in group:
            if isinstance(one, Cells):
                self.decoding.fields_host += 1
                futures.append(Future())
                futures[-1].set_result(one)
                continue
            tensor, found = next(ready)
            self.decoding.fields_host += tensor is None
            self.decoding.fields_dali += tensor is not None
            futures.append(self._check.submit(self._cells, one, tensor, found, seconds))
        return futures

    def _cells(self, encoded: EncodedField, planes: Tensor | None, facts: PlaneFacts | None, seconds: float) -> Cells:
        decoded = None
        if planes is not None:
            decoded = dict(enumerate(planes if facts is not None else planes.numpy()))
        cells = self.source.read(encoded.field, decoded, facts)
        cells.seconds += encoded.seconds + seconds
        return cells

    def close(self) -> None:
        """End the threads; what they have under way is dropped."""
        self._files.close()
        for pool in (self._decode, self._check):
            pool.shutdown(wait=True, cancel_futures=True)


class _Files:
    """Reads the files of a field and leaves them encoded."""

    def __init__(self, source: FieldSource) -> None:
        self.read = source.encoded


def plane_facts(planes: Tensor) -> PlaneFacts:
    """What is checked of the planes [C, H, W] of a field, found on their device and fetched in one piece.

    Equal to what `cellfast.screens.field_cells` finds on the host.
    """
    channels = len(planes)
    # Few operations know uint16; the sign is put right below.
    flat = (planes.view(torch.int16) if planes.dtype == torch.uint16 else planes).flatten(1)
    highest = (flat ^ -0x8000 if planes.dtype == torch.uint16 else flat).amax(1).to(torch.int32)
    pairs = list(combinations(range(channels), 2))
    same = [(flat[i] == flat[j]).all() for i, j in pairs]
    told = torch.cat(
        [
            (flat == flat[:, :1]).all(1).to(torch.int32),
            flat[:, 0].to(torch.int32),
            highest,
            torch.stack(same).to(torch.int32) if same else highest[:0],
        ]
    ).tolist()
    constant, value, highest_of = told[:channels], told[channels : 2 * channels], told[2 * channels : 3 * channels]
    shift, mask = (0x8000, 0xFFFF) if planes.dtype == torch.uint16 else (0, 0xFF)
    return PlaneFacts(
        tuple(v & mask if c else None for c, v in zip(constant, value)),
        tuple(pair for pair, is_same in zip(pairs, told[3 * channels :]) if is_same),
        max(highest_of) + shift,
    )
