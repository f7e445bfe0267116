"""Who decodes the fields of an embedding run, and why: the readers with tifffile, or DALI."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from cellfast.data.plane_decoder import PlaneDecoder
from cellfast.embedding.cells import EncodedField
from cellfast.embedding.field_source import FieldSource
from cellfast.embedding.options import EmbedOptions
from cellfast.errors import CellfastError, option
from cellfast.screens.images import ImageError, image_info, read_plane

# Fewer fields than this are done before the choice has paid for itself.
MEASURE_FROM = 256
MEASURED_FIELDS = 8
LOOKED_AT = 32
# Decoded planes of a group: enough fields for every thread, and not more memory than this.
FIELDS_PER_GROUP, BYTES_PER_GROUP = 8, 256 << 20


@dataclass
class Decoding:
    """How a run decodes its fields.

    Attributes:
        asked: ``auto``, ``host`` or ``dali``.
        used: ``host`` or ``dali``; how: DALI's ``cpu`` (threads of the host) or ``mixed`` (the GPU's decoders too), else empty.
        reason: in words.
        threads: decoding threads.
        fields_dali, fields_host: with ``dali``, fields of this run that DALI decoded, and those that it did not and the host
            took.
        failure: DALI's first complaint about a file that it was given.
    """

    asked: str
    used: str
    how: str
    reason: str
    threads: int
    fields_dali: int = 0
    fields_host: int = 0
    failure: str = ""

    @property
    def note(self) -> str:
        """One line for the user."""
        return f"decode {self.used}{f' ({self.how})' if self.how else ''}: {self.reason}"

    def closing_notes(self) -> list[str]:
        """The note, and how many fields the host took from DALI."""
        notes = [self.note]
        if self.used == "dali" and self.fields_host:
            total = self.fields_host + self.fields_dali
            why = f" (DALI's first complaint: {self.failure})" if self.failure else ""
            notes.append(f"{self.fields_host:,} of {total:,} fields have files that DALI does not decode, left to the host{why}")
        return notes

    def record(self) -> dict[str, Any]:
        """For ``embeddings.json``."""
        counts = () if self.used == "dali" else ("fields_dali", "fields_host", "failure")
        return {name: value for name, value in asdict(self).items() if name not in counts}


def fields_per_group(source: FieldSource) -> int:
    """Fields decoded together."""
    size = len(source.channel_names) * np.dtype(source.dtype).itemsize * source.reader.shape[0] * source.reader.shape[1]
    return int(np.clip(BYTES_PER_GROUP // size, 1, FIELDS_PER_GROUP))


def plane_decoder(source: FieldSource, device: torch.device, how: str, threads: int) -> PlaneDecoder:
    """A decoder of the source's fields, in groups of `fields_per_group`."""
    planes = fields_per_group(source) * len(source.channel_names)
    return PlaneDecoder(np.dtype(source.dtype), source.reader.shape, planes, device, how=how, threads=threads)


def choose_decoding(
    source: FieldSource, units: Iterable[Any], count: int, options: EmbedOptions, device: torch.device, threads: int
) -> Decoding:
    """Decide ``decode`` for ``count`` fields ``units``.

    ``auto`` times both on the first fields with as many threads and takes the faster; the host where there are too few fields for
    that to pay, where the readers are processes or Ray's, or where DALI is not installed.

    Raises:
        CellfastError: ``dali`` is asked for and is not installed, or decodes none of the first fields.
    """
    asked = options.decode
    if asked == "host":
        return Decoding(asked, "host", "", "as asked", threads)
    if asked == "auto":
        why = None
        if options.engine == "ray" or options.readers == "processes":
            why = "the readers are processes of their own"
        elif count < MEASURE_FROM:
            why = f"{count:,} fields are too few for a choice to pay (from {MEASURE_FROM})"
        if why:
            return Decoding(asked, "host", "", why, threads)
    try:
        PlaneDecoder(np.dtype(source.dtype), source.reader.shape, 1, device)
    except CellfastError as error:
        if asked == "dali":
            raise
        return Decoding(asked, "host", "", f"DALI cannot be used ({error.__cause__ or error})", threads)
    sample, others = _sample(source, units)
    if not sample:
        if asked == "dali" and others:
            raise CellfastError(
                f"{option('decode', 'dali')}: none of the first {others} fields that can be read is a plain TIFF of a "
                f"compression DALI decodes (the first: {next(f.files[0] for f in _readable(source, units))}); use "
                f"{option('decode', 'host')}"
            )
        return Decoding(asked, asked if asked == "dali" else "host", "", "no field to try could be read", threads)
    ways = ("cpu", "mixed") if device.type == "cuda" else ("cpu",)
    if asked == "dali" and len(ways) == 1:
        return Decoding(asked, "dali", "cpu", "as asked", threads)
    rates = {f"dali {how}": _rate(_dali_run(source, sample, device, how, threads), len(sample), device) for how in ways}
    if asked == "auto":
        rates["host"] = _rate(_host_run(source, sample, device, threads), len(sample), device)
    rates = {name: rate for name, rate in rates.items() if rate is not None}
    measured = (
        ", ".join(f"{name} {rate:,.1f}" for name, rate in rates.items()) + f" fields/s on {len(sample)} fields, {threads} threads"
    )
    if not rates:
        raise CellfastError(
            f"{option('decode', 'dali')}: DALI could not decode the first fields on this GPU; use {option('decode', 'host')}"
        )
    used, _, how = max(rates, key=rates.__getitem__).partition(" ")
    return Decoding(asked, used, how, f"{'as asked' if asked == 'dali' else 'the fastest'} ({measured})", threads)


def _sample(source: FieldSource, units: Iterable[Any]) -> tuple[list[EncodedField], int]:
    """Fields DALI is to decode, and how many of those looked at are readable otherwise (counted only where there are none)."""
    sample: list[EncodedField] = []
    looked = list(islice(units, LOOKED_AT))
    for unit in looked:
        if len(sample) == MEASURED_FIELDS:
            break
        contents = source.contents(unit)
        if contents is not None:
            sample.append(EncodedField(unit, contents, 0.0))
    return sample, 0 if sample else len(_readable(source, looked))


def _readable(source: FieldSource, units: Iterable[Any]) -> list[Any]:
    def good(unit: Any) -> bool:
        try:
            return all(image_info(file)[0] == source.reader.shape for file in unit.files)
        except ImageError:
            return False

    return [unit for unit in islice(units, LOOKED_AT) if good(unit)]


def _host_run(source: FieldSource, sample: Sequence[EncodedField], device: torch.device, threads: int) -> Callable[[], None]:
    def one(encoded: EncodedField) -> None:
        planes = [read_plane(file) for file in encoded.field.files]
        if device.type == "cuda":
            torch.from_numpy(np.stack(planes)).pin_memory().to(device, non_blocking=True)

    def run() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, sample))

    return run


def _dali_run(
    source: FieldSource, sample: Sequence[EncodedField], device: torch.device, how: str, threads: int
) -> Callable[[], None]:
    decoder, most = plane_decoder(source, device, how, threads), fields_per_group(source)

    def run() -> None:
        with ThreadPoolExecutor(threads) as pool:
            contents = list(pool.map(lambda encoded: source.contents(encoded.field), sample))
        for start in range(0, len(contents), most):
            if any(planes is None for planes in decoder.decode(contents[start : start + most])):
                raise ValueError("cannot be decoded")

    return run


def _rate(run: Callable[[], None], fields: int, device: torch.device) -> float | None:
    """Fields per second, after one run for threads and buffers; None where it cannot be done."""
    try:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except (ImageError, RuntimeError, ValueError, TypeError):
        return None
    return fields / (time.perf_counter() - start)
