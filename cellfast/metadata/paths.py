"""What the path of a file says of plate, well and site, in the layouts of DeepProfiler, CellProfiler and the Cell Painting
Gallery."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from cellfast.errors import CellfastError

Place = tuple[str, str, int]

_WELL = re.compile(r"([A-Za-z]{1,2})0*([0-9]{1,2})")
_SITE = re.compile(r"(?:s|f|site|field)?[_-]?([0-9]{1,15})", re.IGNORECASE)
_PLACE = re.compile(rf"(?:(?P<plate>.+)[_-])?(?P<well>{_WELL.pattern})[_-](?P<site>{_SITE.pattern})", re.IGNORECASE)
# What a centroid file is named after, the best first; "" is a name of well and site alone.
_OBJECTS = ("nuclei", "", "cells")
_NAMED = re.compile(r"(?:(?P<place>.+)[_-])?(?P<objects>nuclei|cells)", re.IGNORECASE)


def deep_profiler_place(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> Place:
    """(plate, well as ``A01``, site) of a file of features.

    ``<plate>/<well>/<site>``, ``<plate>/<well>_<site>``, ``<plate>_<well>_<site>`` and ``<plate>/<well>_<site>/<any>``; ``-``
    serves as ``_`` does, sites are ``1``, ``01`` or ``s1``. The plate of ``<well>_<site>`` is the name of the file's folder,
    ``root`` itself too.

    Args:
        path: the file.
        root: the folder that was given, for the message; None: the file was.

    Raises:
        CellfastError: another layout.
    """
    parts = Path(os.path.abspath(path)).parts
    found = _place_of([*parts[:-1], parts[-1].split(".")[0] if "." in parts[-1][1:] else parts[-1]])
    if found is None:
        shown = os.path.relpath(path, root) if root is not None else path
        raise CellfastError(
            f"{shown}: its path tells no plate, well and site; expected <plate>/<well>/<site>, <plate>/<well>_<site> or "
            "<plate>_<well>_<site>"
        )
    return found


def _place_of(parts: Sequence[str], plates: Collection[str] = ()) -> Place | None:
    """The place that the last names of a path tell, its suffix removed; ``plates``: names that are known to be plates'."""
    folders, name = list(parts[:-1]), parts[-1]
    match = _PLACE.fullmatch(name)
    if match is None and folders and (site := _SITE.fullmatch(name)) and (well := _well(folders[-1])):
        plate, number = _plate_of(folders[:-1], plates), site.group(1)
    elif match is not None:
        well, number = _well(match["well"]), _SITE.fullmatch(match["site"]).group(1)  # type: ignore[union-attr]
        # <plate>/<well>/<well>_<site>: the folder of the well is no plate's.
        above = folders[:-1] if folders and folders[-1] not in plates and _well(folders[-1]) == well else folders
        plate = match["plate"] or _plate_of(above, plates)
    elif folders and _PLACE.fullmatch(folders[-1]):
        return _place_of(folders, plates)
    else:
        return None
    return (plate, well, int(number)) if plate and well else None


def _plate_of(folders: Sequence[str], plates: Collection[str]) -> str:
    known = next((name for name in reversed(folders) if name in plates), None)
    return known or (folders[-1].strip("/\\") if folders else "")


def _well(text: str) -> str | None:
    match = _WELL.fullmatch(text)
    return f"{match.group(1).upper()}{int(match.group(2)):02d}" if match else None


def centroid_place(path: str, plates: Collection[str]) -> tuple[Place, int] | None:
    """(place, rank) of a file of centroids: of several files of one place the one of the lowest rank is meant; None: no such
    file.

    As `deep_profiler_place`, with ``-Nuclei`` or ``-Cells`` after the site or nothing; and CellProfiler's
    ``<plate>-<well>-<site>/Nuclei.csv``.

    Args:
        path: relative to the folder's parent, with ``/``: the folder itself may be a plate's.
        plates: of the image table; the nearest folder of such a name is the plate.
    """
    *folders, name = path.split("/")
    stem = re.sub(r"(?i)\.csv(\.gz)?$", "", name)
    match = _NAMED.fullmatch(stem)
    objects = match["objects"].lower() if match else ""
    if match and match["place"]:
        found = _place_of([*folders, match["place"]], plates)
    elif match:
        found = _place_of(folders, plates) if folders and _PLACE.fullmatch(folders[-1]) else None
    else:
        # A folder <plate>-<well>-<site> also has tables of the image, the experiment, the cytoplasm.
        found = _place_of([*folders, stem], plates) if _PLACE.fullmatch(stem) or _SITE.fullmatch(stem) else None
    return (found, _OBJECTS.index(objects)) if found else None


def plate_of_path(folders: Sequence[str], plates: Collection[str]) -> str | None:
    """The plate whose name is one of the folders', or begins or ends one (``P1_masks``); None: no folder tells.

    The nearest folder counts first, a whole name before a part, a longer plate name before a shorter.
    """
    for whole in (True, False):
        for folder in reversed(folders):
            if whole and folder in plates:
                return folder
            near = [] if whole else [p for p in plates if p and _bounded(p, folder)]
            if near:
                return max(near, key=len)
    return None


def _bounded(plate: str, folder: str) -> bool:
    if folder.startswith(plate):
        return not folder[len(plate)].isalnum()
    # A plate called 1 is not what ends site_1.
    return folder.endswith(plate) and not folder[-len(plate) - 1].isalnum() and not plate.isdigit()


def like_a_plate(folder: str, plates: Collection[str]) -> bool:
    """Whether a folder that is no known plate's is named as one, other digits aside: ``P3`` beside ``P1`` and ``P2``."""
    return any(re.search("[0-9]", p) and re.sub("[0-9]+", "#", p) == re.sub("[0-9]+", "#", folder) for p in plates)
