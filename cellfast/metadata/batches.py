"""The experimental batch of a plate: as a table says, else from the plate's name."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pandas as pd

from cellfast.errors import CellfastError, option
from cellfast.metadata.columns import BATCH, PLATE, SITE, WELL
from cellfast.metadata.names import check_batch

DEFAULT_BATCH_REGEX = r"^(Week\d+)_"

#: Between the plates, or batches, of a treatment.
SEPARATOR = ";"


def batch_of_plate(plate: str, pattern: str | None = None) -> str | None:
    """Group 1 (or all) of ``pattern`` in the plate's name, ``Week1`` of ``Week1_22123`` by default; None where it does not match.

    Raises:
        CellfastError: not a regular expression, or what it gives cannot name a batch.
    """
    try:
        found = re.search(pattern or DEFAULT_BATCH_REGEX, plate)
    except re.error as error:
        raise CellfastError(f"{option('batch_regex', pattern)} is not a regular expression: {error}.") from None
    if found is None:
        return None
    return check_batch(found.group(1) if found.re.groups else found.group(0)) or None


def batches_of_plates(plates: list[str], pattern: str | None = None) -> tuple[dict[str, str], str]:
    """Plate → batch from the plates' names, and in words where it came from.

    With ``pattern`` every plate must match. Without one ``^(Week\\d+)_`` is tried, and a plate that does not match is its own
    batch.

    Raises:
        CellfastError: ``pattern`` matches none, or not all, of the plates; not a regular expression.
    """
    # Profiles of treatments list the plates they are made of: P1;P2.
    single = dict.fromkeys(one for plate in plates for one in plate.split(SEPARATOR))
    found = {plate: batch_of_plate(plate, pattern) for plate in single}
    missed = [plate for plate, batch in found.items() if batch is None]
    if pattern and missed:
        share = "none" if len(missed) == len(found) else f"not all, {len(missed)} of {len(found)} missed,"
        raise CellfastError(
            f"{option('batch_regex', pattern)} matches {share} of the plates, such as '{missed[0]}': give one that matches every "
            "plate's name."
        )
    if len(missed) == len(found):
        source = "plate name (no batch column, and no Week prefix in the plate names)"
    else:
        source = f"plate name, pattern {pattern or '^(Week[0-9]+)_'}"
    batch = {plate: its or plate for plate, its in found.items()}
    return {plate: SEPARATOR.join(dict.fromkeys(batch[one] for one in plate.split(SEPARATOR))) for plate in plates}, source


def batches_as_said(said: Iterable[tuple[str, str]], pattern: str | None = None) -> dict[str, str]:
    """Plate → batch of (plate, batch or ``""``) as tables say them: ``pattern`` in the plate's name, else as said, else
    `batches_of_plates`.

    Raises:
        CellfastError: a plate of two batches, a name that cannot name a folder, or a pattern that does not match.
    """
    known: dict[str, str] = {}
    plates: dict[str, None] = {}
    for plate, batch in said:
        plates[plate] = None
        if batch and known.setdefault(plate, batch) != batch:
            raise CellfastError(
                f"plate {plate} is of two batches, {known[plate]} and {batch}: correct the table, or use {option('batch_regex')}"
            )
    found, _ = batches_of_plates([plate for plate in plates if pattern or plate not in known], pattern)
    return {plate: check_batch(found.get(plate) or known[plate]) for plate in plates}


def fill_batches(metadata: pd.DataFrame, pattern: str | None = None) -> tuple[pd.DataFrame, str]:
    """``Metadata_Batch`` filled from the plates' names where it is missing; returns the metadata and where the batch came from.

    With ``pattern`` the column is made anew; without one what a table says is kept, and only the rest is filled.

    Raises:
        CellfastError: as `batches_of_plates`.
    """
    has = BATCH in metadata and (metadata[BATCH] != "").any()
    if PLATE not in metadata:
        if pattern:
            raise CellfastError(
                f"{option('batch_regex', pattern)} takes the batch from the plate's name, and the input has no plates."
            )
        return metadata, "column" if BATCH in metadata else "none"
    if pattern is None and has and (metadata[BATCH] != "").all():
        return metadata, f"column {BATCH}"
    plates = list(dict.fromkeys(metadata[PLATE]))
    missing = plates if not has or pattern else list(dict.fromkeys(metadata.loc[metadata[BATCH] == "", PLATE]))
    batch, source = batches_of_plates(missing, pattern)
    values = metadata[PLATE].map(batch).astype("str")
    if has and not pattern:
        values = metadata[BATCH].where(metadata[BATCH] != "", values).astype("str")
        source = f"column {BATCH}, else {source}"
    metadata = metadata.copy()
    if BATCH in metadata:
        metadata[BATCH] = values
    else:
        at = max((i + 1 for i, c in enumerate(metadata.columns) if c in (PLATE, WELL, SITE)), default=0)
        metadata.insert(at, BATCH, values)
    return metadata, source
