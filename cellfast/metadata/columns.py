"""Which column of a table is the plate, the well, the compound …, and which columns are features."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from cellfast.errors import CellfastError, option

PLATE, WELL, SITE = "Metadata_Plate", "Metadata_Well", "Metadata_Site"
IMAGE_NUMBER, OBJECT_NUMBER = "Metadata_ImageNumber", "Metadata_ObjectNumber"
CENTER_X, CENTER_Y = "Metadata_Center_X", "Metadata_Center_Y"
BATCH, COMPOUND, CONCENTRATION, MOA = "Metadata_Batch", "Metadata_Compound", "Metadata_Concentration", "Metadata_MoA"

#: Metadata of a cell, in the order of the crop store and of embeddings.
CELL_COLUMNS = (
    PLATE,
    WELL,
    SITE,
    IMAGE_NUMBER,
    OBJECT_NUMBER,
    CENTER_X,
    CENTER_Y,
    BATCH,
    COMPOUND,
    CONCENTRATION,
    MOA,
)
#: Identity of a profile, in the order it is written.
CANONICAL = (PLATE, WELL, SITE, BATCH, COMPOUND, CONCENTRATION, MOA)
#: What a treatment is and does; a plate map brings it to wells.
TREATMENT = (BATCH, COMPOUND, CONCENTRATION, MOA)
#: Columns whose values are names: text as written.
NAMES = (PLATE, WELL, SITE, BATCH, COMPOUND, MOA)

#: Short names of the canonical columns, by which a table's columns may be named.
SHORT_NAMES = {
    "plate": PLATE,
    "well": WELL,
    "site": SITE,
    "batch": BATCH,
    "compound": COMPOUND,
    "concentration": CONCENTRATION,
    "moa": MOA,
}

#: Row and column of a well in two columns; not canonical, they become the well.
ROW, COLUMN = "row", "column"

# Names in use in the field as `plain_name` gives them; the first of a row that a table has wins.
ALIASES: dict[str, tuple[str, ...]] = {
    PLATE: (
        "plate",
        "plate_name",
        "platename",
        "plate_id",
        "plateid",
        "plate_barcode",
        "assay_plate_barcode",
        "barcode",
    ),
    WELL: ("well", "well_name", "wellname", "well_id", "wellid", "well_position", "wellposition", "plate_well"),
    SITE: ("site", "site_id", "siteid", "field", "field_id", "fieldid", "fov", "field_of_view"),
    IMAGE_NUMBER: ("imagenumber", "image_number"),
    BATCH: ("batch", "batch_id", "batch_name", "week"),
    COMPOUND: (
        "compound",
        "compound_name",
        "compoundname",
        "compound_id",
        "drug",
        "treatment_name",
        "perturbation",
        "pert_iname",
        "pert_name",
        "broad_sample",
        "jcp2022",
    ),
    CONCENTRATION: (
        "concentration",
        "compound_concentration",
        "conc",
        "dose",
        "doses",
        "sbs_doses",
        "pert_dose",
        "mmoles_per_liter",  # of the Broad's plate maps, which give µM under this name
    ),
    MOA: ("moa", "mechanism", "mechanism_of_action", "moa_name"),
    ROW: ("row", "well_row", "wellrow"),
    COLUMN: ("column", "col", "well_column", "well_col", "wellcolumn", "wellcol"),
}
# Where a concentration's column names its unit: conc_um, dose (nM).
_UNIT_IN_NAME = re.compile(r"^(?P<name>[a-z_0-9]*?)_*\(?\[?(?P<unit>pm|nm|um|µm|μm|mm)\]?\)?$")

# Channel suffixes of the image tables of BBBC021 and its kin: Image_Metadata_Plate_DAPI.
_CHANNEL_SUFFIX = re.compile(r"_(dapi|hoechst|dna|tubulin|actin|er|rna|agp|mito)$")

# Bookkeeping of objects, images and files: numbers, but never features, whatever else the table holds.
_BOOKKEEPING = re.compile(
    r"^(?:(?:cells|cytoplasm|nuclei|image|metadata|\w+)_)?"
    r"(?:imagenumber|image_number|tablenumber|objectnumber|object_number|number_object_number|location_.*|children_.*_count"
    r"|parent_.*|areashape_boundingbox.*|boundingbox.*|bbox.*|areashape_center_[xyz]|centroid.*|center_[xyz]|areashape_eulernumber"
    r"|eulernumber|euler_number|euler|filename_.*|pathname_.*|url_.*|frame_.*|series_.*|md5digest_.*|height_.*|width_.*|scaling_.*"
    r"|count_.*|executiontime_.*|moduleerror_.*|group_(?:index|number|length)|processingstatus)$"
)
_BOOKKEEPING_NAMES = {
    "replicate",
    "object_count",
    "cell",
    "cell_id",
    "cellid",
    "file",
    "filename",
    "path",
    "index",
    "index_level_0",
    "level_0",
    "unnamed:_0",
    "",
    "label",
    "image_name",
    "class_name",
    "target",
    "cell_count",
    "numcells",
    "num_cells",
    "row",
    "column",
    "col",
}
# Columns that CellProfiler and pycytominer name after a compartment or an image and what was measured there.
_MEASURED = re.compile(
    r"^[A-Za-z0-9]+_(?:AreaShape|Correlation|Granularity|Intensity|Neighbors|RadialDistribution|Texture|ObjectSkeleton|Overlap"
    r"|ImageQuality|Threshold|AreaOccupied|Colocalization|Count|Math|Mean|Median|StDev|Classify|TrackObjects|Worm)_",
    re.IGNORECASE,
)
_EMBEDDING = re.compile(r"^h\d+$")
_COMPARTMENT = re.compile(r"^(Cells|Cytoplasm|Nuclei)_", re.IGNORECASE)


def plain_name(column: str) -> str:
    """The column name in lower case without leading ``Image_`` and ``Metadata_``, blanks and hyphens as underscores.

    ``Image_Metadata_Plate_DAPI`` → ``plate_dapi``, ``Compound Name`` → ``compound_name``.
    """
    return re.sub(r"^((image|metadata)_)+", "", re.sub(r"[\s\-]+", "_", str(column).strip().lower()))


def parse_column_overrides(overrides: Iterable[str]) -> dict[str, str]:
    """``["compound=Metadata_JCP2022"]`` → ``{"Metadata_Compound": "Metadata_JCP2022"}``.

    Raises:
        CellfastError: not ``NAME=COLUMN`` or NAME is none of plate, well, site, batch, compound, concentration, moa; a name
            twice.
    """
    chosen: dict[str, str] = {}
    for text in overrides:
        name, _, column = text.partition("=")
        canonical = SHORT_NAMES.get(name.strip().lower())
        if canonical is None or not column.strip():
            raise CellfastError(
                f"{option('columns')} must be NAME=COLUMN with NAME one of {', '.join(SHORT_NAMES)}; got '{text}'."
            )
        if canonical in chosen:
            raise CellfastError(f"{option('columns')} names {name.strip()} twice: {chosen[canonical]} and {column.strip()}.")
        chosen[canonical] = column.strip()
    return chosen


def check_doubled(columns: Sequence[str], where: str) -> None:
    """Refuse a table with two columns of one name, or with ``_x`` and ``_y`` versions of a column that says what a row is.

    Raises:
        CellfastError: names the columns.
    """
    seen = set(columns)
    doubled = sorted(c for c, times in Counter(columns).items() if times > 1)
    if doubled:
        raise CellfastError(
            f"{where}: two columns are named '{doubled[0]}'"
            + (f", and {len(doubled) - 1} more names are doubled ({', '.join(doubled[1:4])})" if doubled[1:] else "")
            + ". Each column must have a name of its own: remove or rename one."
        )
    identities = {alias for aliases in ALIASES.values() for alias in aliases}
    for column in columns:
        if column.endswith("_x") and f"{column[:-2]}_y" in seen and plain_name(column[:-2]) in identities:
            raise CellfastError(
                f"{where}: '{column}' and '{column[:-2]}_y' are what a join leaves of two columns '{column[:-2]}'. "
                f"Keep the right one and name it '{column[:-2]}'."
            )


def require_column(name: str, columns: Sequence[str], where: str, parameter: str = "columns") -> str:
    """The column called ``name``, letter case aside where only one fits.

    Raises:
        CellfastError: there is none; names the columns that come nearest.
    """
    if name in columns:
        return name
    same = [c for c in columns if c.lower() == name.lower()] or [c for c in columns if plain_name(c) == plain_name(name)]
    if len(same) == 1:
        return same[0]
    near = difflib.get_close_matches(name, list(columns), n=3, cutoff=0.5)
    listed = ", ".join(list(columns)[:30])
    raise CellfastError(
        f"{option(parameter)}: {where} has no column '{name}'{'; near it: ' + ', '.join(near) if near else ''}; its columns "
        f"begin with: {listed}."
    )


def find_columns(columns: Sequence[str], overrides: Mapping[str, str] | None = None, where: str = "the table") -> dict[str, str]:
    """Canonical name → the column of a table that holds it; what is not there is left out.

    Order of preference: an override, the canonical name itself, then `ALIASES` in their order, with or without
    ``Image_``/``Metadata_``, then the same with a channel suffix (``Image_Metadata_Plate_DAPI``). ``ROW`` and ``COLUMN`` are
    given where the table has both and no well.

    Raises:
        CellfastError: an override names a column that the table does not have.
    """
    found = {c: require_column(column, columns, where) for c, column in (overrides or {}).items()}
    taken = set(found.values())
    plain: dict[str, str] = {}
    for column in columns:
        if not _COMPARTMENT.match(column) and column not in taken:
            plain.setdefault(plain_name(column), column)
    stripped: dict[str, str] = {}
    for name, column in plain.items():
        stripped.setdefault(_CHANNEL_SUFFIX.sub("", name), column)
    doses: dict[str, str] = {}
    for name, column in plain.items():
        unit = _UNIT_IN_NAME.match(name)
        if unit and unit["name"] in ALIASES[CONCENTRATION]:
            doses.setdefault(unit["name"], column)
    for canonical, aliases in ALIASES.items():
        if canonical in found:
            continue
        if canonical in columns and canonical not in taken:
            found[canonical] = canonical
            continue
        for names in (plain, stripped, *([doses] if canonical == CONCENTRATION else [])):
            match = next((names[alias] for alias in aliases if alias in names), None)
            if match is not None:
                found[canonical] = match
                break
    if WELL in found or not {ROW, COLUMN} <= set(found):
        found.pop(ROW, None)
        found.pop(COLUMN, None)
    return found


def find_column(table: pd.DataFrame, names: Sequence[str]) -> str | None:
    """The first of ``names`` that is a column of a table, letter case aside."""
    lower = {column.lower(): column for column in table.columns}
    return next((lower[name.lower()] for name in names if name.lower() in lower), None)


def unit_of(column: str) -> str | None:
    """The unit a concentration's column names (``nm`` of ``conc_nM``), or None."""
    found = _UNIT_IN_NAME.match(plain_name(column))
    return found["unit"] if found and found["name"] in ALIASES[CONCENTRATION] else None


def is_bookkeeping(column: str) -> bool:
    """Whether a column counts, places or names objects, images and files, and so is no feature whatever it holds."""
    plain = plain_name(column)
    return plain in _BOOKKEEPING_NAMES or bool(_BOOKKEEPING.match(plain)) or column.startswith("__")


def is_metadata(column: str) -> bool:
    """Whether the column's name says that it is metadata (``Metadata_…``, ``Image_Metadata_…``)."""
    return column.lower().startswith("metadata_") or "_metadata_" in column.lower()


def is_measured(column: str) -> bool:
    """Whether the column's name is an embedding's (``h000``) or a CellProfiler measurement's, and not bookkeeping."""
    if is_bookkeeping(column) or is_metadata(column):
        return False
    return bool(_EMBEDDING.match(column) or _COMPARTMENT.match(column) or _MEASURED.match(column))


def infer_features(
    numeric_columns: Sequence[str], metadata_columns: Iterable[str], patterns: Sequence[str] = (), where: str = "the table"
) -> list[str]:
    """The feature columns of a table, in its order.

    ``patterns`` are prefixes or regular expressions matched at the start of the name; a column is a feature when any of them
    matches. Without patterns: the embedding columns ``h000…`` if there are any; else the CellProfiler measurements (``Cells_``,
    ``Cytoplasm_``, ``Nuclei_``, or any ``<object>_<measurement>_…`` such as ``Image_Texture_…``); else every numeric column that
    is neither metadata nor bookkeeping.

    Raises:
        CellfastError: no column is left, or a pattern is not a regular expression.
    """
    metadata = set(metadata_columns)
    # A pattern may ask for anything numeric, an Image_ measurement for example, but Metadata_ is never a feature.
    candidates = [c for c in numeric_columns if c not in metadata and not c.lower().startswith("metadata_")]
    if patterns:
        try:
            compiled = [re.compile(pattern) for pattern in patterns]
        except re.error as error:
            raise CellfastError(f"{option('features')}: not a prefix or regular expression: {error}.") from None
        # What was asked for is taken, whatever its name says.
        chosen = [c for c in candidates if any(p.match(c) for p in compiled)]
        if not chosen:
            raise CellfastError(
                f"{option('features', ' '.join(patterns))} matches no numeric column of {where}; its numeric columns begin with: "
                f"{', '.join(candidates[:20]) or 'none'}."
            )
        return chosen
    embedding = [c for c in candidates if _EMBEDDING.match(c)]
    if embedding:
        return embedding
    rest = [c for c in candidates if not is_bookkeeping(c) and not is_metadata(c)]
    measured = [c for c in rest if is_measured(c)]
    if measured:
        return measured
    rest = [c for c in rest if not c.lower().startswith("image_")]
    if not rest:
        raise CellfastError(
            f"No feature columns found in {where}: expected h000…, Cells_/Cytoplasm_/Nuclei_… or other numeric columns besides "
            f"the metadata; found {', '.join(list(numeric_columns)[:20]) or 'no numeric column'}. Name them with "
            f"{option('features')}."
        )
    return rest
