"""Tables of an HDF5 file of ours: datasets of its own only, of the types they should have, no larger than the file."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
from h5py import h5d, h5g, h5l, h5o, h5s

from cellfast.errors import CellfastError
from cellfast.screens import sealed

# What a link that is not to an object of the same file is called.
_LINKS = {h5l.TYPE_SOFT: "SoftLink", h5l.TYPE_EXTERNAL: "ExternalLink"}


def datasets_of(group: h5g.GroupID, path: Path, prefix: str = "") -> dict[str, h5d.DatasetID]:
    """The datasets of a file and of its groups by name ("cells/field"); what would make HDF5 open another file or follow a path
    is refused.

    A screen has hundreds of plates with twenty datasets each, so they are opened once and in h5py's low-level interface.
    """
    links: list[tuple[str, int]] = []
    group.links.iterate(lambda name, info: links.append((name.decode(), info.type)), info=True)
    found = {}
    for name, kind in links:
        if kind != h5l.TYPE_HARD:
            raise CellfastError(
                f"{path}: '{prefix}{name}' is a {_LINKS.get(kind, 'link of another kind')}; links are refused in a crop store, "
                "as they can lead to other files"
            )
        item = h5o.open(group, name.encode())
        if isinstance(item, h5d.DatasetID):
            layout = item.get_create_plist()
            if layout.get_layout() == h5d.VIRTUAL or layout.get_external_count() > 0:
                raise CellfastError(f"{path}: '{prefix}{name}' keeps its data in other files; that is refused in a crop store")
            found[prefix + name] = item
        elif isinstance(item, h5g.GroupID) and not prefix:
            found |= datasets_of(item, path, f"{name}/")
    return found


def values_of(dataset: h5d.DatasetID, path: Path, dtype: np.dtype | None) -> np.ndarray:
    """All values of a dataset of this type; ``None``: text, as an array of ``str`` objects."""
    is_text = h5py.check_string_dtype(dataset.dtype) is not None
    if is_text != (dtype is None) or (dtype is not None and dataset.dtype != dtype):
        raise sealed.DamagedFile(f"{path}: {dataset.name.decode()} is {dataset.dtype}, expected {dtype or 'text'}")
    sealed.check_sizes(h5py.Dataset(dataset), path)
    values = np.empty(dataset.shape, dtype=dataset.dtype)
    dataset.read(h5s.ALL, h5s.ALL, values)
    if not is_text:
        return values
    text = np.empty(values.shape, dtype=object)
    for place, value in np.ndenumerate(values):
        text[place] = value.decode()
    return text
