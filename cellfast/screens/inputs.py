"""What a plate was made from, file by file, so that a rerun keeps what is unchanged and says what is not."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cellfast.errors import CellfastError
from cellfast.printable import masked
from cellfast.screens.field_store_files import PROTOCOL, store_and_key
from cellfast.storage.urls import file_system, is_url

if TYPE_CHECKING:
    from cellfast.screens.image_table import Field
    from cellfast.screens.locations import LocationSource

# What a file system tells of a file's content beside its size, the best first.
_TIMES = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
# Options whose change is no other wish but another input: the plate is made again without being asked.
_INPUTS = {
    "field_table": "its fields, their files or their treatments are others in the tables",
    "fields": "its fields, their files or their treatments are others in the tables",
    "crop_table": "its crops or their treatments are others in the index",
    "locations": "the locations are others",
    "illumination": "the illumination functions are others",
}


def digest(value: Any) -> str:
    """SHA-256 of ``value`` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class FileTimes:
    """Size and time of change of files, each folder of a remote store listed once."""

    def __init__(self) -> None:
        self._folders: dict[str, dict[str, list[Any]]] = {}

    def of(self, file: str) -> list[Any]:
        """[size, time] of a file; empty where it is not there."""
        if not file:
            return []
        if not is_url(file):
            return _stat(file)
        if file.startswith(f"{PROTOCOL}://"):
            try:
                return _stat(store_and_key(file)[0])
            except CellfastError:
                return []
        folder, _, name = file.rpartition("/")
        if folder not in self._folders:
            self._folders[folder] = _listing(folder)
        return self._folders[folder].get(name, [])


def _stat(file: str) -> list[Any]:
    try:
        found = os.stat(file)
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns]


def _listing(folder: str) -> dict[str, list[Any]]:
    try:
        fs, key = file_system(folder)
        fs.invalidate_cache(key)
        entries = fs.ls(key, detail=True)
    except (OSError, CellfastError):
        return {}
    return {
        str(entry["name"]).rsplit("/", 1)[-1]: [entry.get("size"), next((str(entry[k]) for k in _TIMES if k in entry), "")]
        for entry in entries
    }


def field_inputs(fields: Sequence[Field], locations: LocationSource, times: FileTimes) -> dict[str, str]:
    """``{"A01 site 1": "<images> <locations>"}``: digests of the names, sizes and times of each field's images and of the file of
    its cells."""
    record = {}
    for one in fields:
        own = locations.file(one)
        found = [(masked(file, opaque=False), times.of(file)) for file in one.files]
        cells = digest([masked(own, opaque=False), times.of(own)])[:16] if own else ""
        record[f"{one.well} site {one.site}"] = f"{digest(found)[:16]} {cells}".strip()
    return record


def crop_inputs(crops: Iterable[tuple[str, int, str]], times: FileTimes) -> dict[str, str]:
    """As `field_inputs`, of (well, site, file)."""
    files: dict[str, list[Any]] = {}
    for well, site, file in crops:
        files.setdefault(f"{well} site {site}", []).append((file, times.of(str(file))))
    return {place: digest(found)[:16] for place, found in files.items()}


def changed_options(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(inputs that changed, in words; names of options that differ) of two descriptions of a plate."""
    inputs: list[str] = []
    options: list[str] = []
    for name in sorted(set(before) | set(now)):
        old, new = before.get(name), now.get(name)
        if old != new:
            same_kind = name in _INPUTS and old is not None and new is not None and _undated(old) == _undated(new)
            (inputs if same_kind else options).append(_INPUTS[name] if same_kind else name)
    return inputs, options


def _undated(text: Any) -> str:
    """A description without the digest at its end, or the digest's place alone."""
    return re.sub(r"(?:[0-9]+ functions)?(?:, sha256)?(?:^| )[0-9a-f]{16,64}$", "", str(text))


def changed_files(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """What changed between two records of `field_inputs`, in words; None: nothing."""
    differ = [place for place in now if before.get(place) != now[place]]
    gone = [place for place in before if place not in now]
    if not differ and not gone:
        return None
    parts = [(before.get(place, "").split(), now[place].split()) for place in differ]
    what = [
        word
        for word, yes in (
            ("images", any(old[:1] != new[:1] for old, new in parts)),
            ("locations", any(old[1:] != new[1:] for old, new in parts)),
        )
        if yes
    ]
    count = len(differ) + len(gone)
    return f"the {' and '.join(what) or 'files'} of {count:,} of its {len(now):,} fields changed, such as {(differ or gone)[0]}"
