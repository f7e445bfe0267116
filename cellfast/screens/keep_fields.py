"""Keeps the images of a screen in one HDF5 file, encoded as they are, in place of the folder they came from."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlparse

from cellfast.errors import CellfastError, option
from cellfast.progress import Progress
from cellfast.screens.field_cells import fields_by_plate
from cellfast.screens.field_store import write_field_store
from cellfast.screens.field_store_files import store_url
from cellfast.screens.image_table import ImageTable
from cellfast.storage.urls import is_url


def check_not_there(path: Path, *, force: bool) -> None:
    """Raise `CellfastError` where ``path`` must not be written."""
    if path.suffix.lower() not in (".h5", ".hdf5"):
        raise CellfastError(
            f"{option('keep_fields', path)}: the file's name must end in .h5, by which {option('image_root')} knows a field store"
        )
    if path.exists() and not force:
        raise CellfastError(
            f"{option('keep_fields', path)} is there already; choose another name, or {option('force', True)} to write it again"
        )


def keep_fields(table: ImageTable, image_root: str, path: Path, *, show_progress: bool = True) -> tuple[int, list[str]]:
    """Write the field store of a table's images; returns how many fields it has, and what was left out or stored anew, one line
    each.

    The files keep the names they have under ``image_root``, so that the store as ``image_root`` reads the same table from the
    store.

    Raises:
        CellfastError: no field can be kept; nothing is then written.
    """
    fields = [one for plate in fields_by_plate(table).values() for one in plate]
    with Progress("keep fields", len(fields), "fields", enabled=show_progress) as progress:
        notes = write_field_store(
            path,
            [one.files for one in fields],
            table.channel_names,
            names=[[name_under(file, image_root) for file in one.files] for one in fields],
            leave_out=True,
            progress=progress.advance,
        )
    return len(fields) - sum(note.startswith("left out") for note in notes), notes


def keep_fields_told(table: ImageTable, image_root: str, path: Path, most: int = 12) -> list[str]:
    """`keep_fields`; returns what it did in lines for the user, the first ``most`` notes of them."""
    count, notes = keep_fields(table, image_root, path)
    lines = [f"  {note}" for note in notes[:most]]
    if len(notes) > most:
        lines.append(f"  … and {len(notes) - most} more")
    return [*lines, f"{count:,} of {len(table.fields):,} fields kept in {path}"]


def name_under(file: str, image_root: str) -> str:
    """The file's name relative to the root, with ``/``; of one that lies elsewhere its whole path."""
    if Path(image_root).is_file():
        image_root = store_url(image_root)
    if is_url(file):
        root = image_root.rstrip("/")
        if file.startswith(root):
            return file[len(root) :].strip("/")
        return unquote(urlparse(file).path).strip("/")
    if not file:
        return ""
    root = os.path.abspath(image_root)
    inside = os.path.commonpath([root, os.path.abspath(file)]) == root
    return (os.path.relpath(file, root) if inside else os.path.abspath(file)).replace(os.sep, "/").strip("/")
