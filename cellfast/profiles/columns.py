"""Which column of a table is the plate, the well, the compound …, and which columns are features."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from cellfast.errors import CellfastError

PLATE, WELL, SITE = "Metadata_Plate", "Metadata_Well", "Metadata_Site"
BATCH, COMPOUND, CONCENTRATION, MOA = "Metadata_Batch", "Metadata_Compound", "Metadata_Concentration", "Metadata_MoA"

#: Canonical metadata columns in the order they are written.
CANONICAL = (PLATE, WELL, SITE, BATCH, COMPOUND, CONCENTRATION, MOA)

#: Short names accepted by ``--column NAME=COLUMN``.
SHORT_NAMES = {
    "plate": PLATE,
    "well": WELL,
    "site": SITE,
    "batch": BATCH,
    "compound": COMPOUND,
    "concentration": CONCENTRATION,
    "moa": MOA,
}

# Names in use in the field, compared after lower-casing and after removing Image_/Metadata_ prefixes; the first match of a row
# wins.
_ALIASES: dict[str, tuple[str, ...]] = {
    PLATE: ("plate", "plate_name", "platename", "plate_id", "plateid", "plate_barcode", "assay_plate_barcode", "barcode"),
    WELL: ("well", "well_name", "wellname", "well_id", "wellid", "well_position", "wellposition", "plate_well"),
    SITE: ("site", "site_id", "field", "field_id", "fieldid", "fov"),
    BATCH: ("batch", "batch_id", "batch_name", "week"),
    COMPOUND: (
        "compound",
        "compound_name",
        "compoundname",
        "compound_id",
        "drug",
        "perturbation",
        "pert_iname",
        "pert_name",
        "broad_sample",
        "jcp2022",
    ),
    CONCENTRATION: (
        "concentration",
        "concentration_um",
        "compound_concentration",
        "conc",
        "conc_um",
        "dose",
        "dose_um",
        "pert_dose",
        "mmoles_per_liter",
    ),
    MOA: ("moa", "mechanism", "mechanism_of_action", "moa_name"),
}

# Channel suffixes of the image tables of BBBC021 and its kin: Image_Metadata_Plate_DAPI.
_CHANNEL_SUFFIX = re.compile(r"_(dapi|hoechst|dna|tubulin|actin|er|rna|agp|mito)$")

# Per-object and per-image bookkeeping that is never a feature, whatever the table calls it.
_BOOKKEEPING = {
    "imagenumber",
    "objectnumber",
    "object_number",
    "tablenumber",
    "replicate",
    "object_count",
    "cell",
    "cell_id",
    "cellid",
    "file",
    "filename",
    "index",
    "unnamed: 0",
    "center_x",
    "center_y",
    "location_center_x",
    "location_center_y",
    "nuclei_location_center_x",
    "nuclei_location_center_y",
    "image_name",
    "class_name",
    "target",
    "count_cells",
    "count_nuclei",
    "count_cytoplasm",
    "row",
    "column",
    "col",
}

_EMBEDDING = re.compile(r"^h\d+$")
_CELLPROFILER = re.compile(r"^(Cells|Cytoplasm|Nuclei)_", re.IGNORECASE)


def plain_name(column: str) -> str:
    """The column name in lower case without leading ``Image_`` and ``Metadata_``, e.g. ``Image_Metadata_Plate_DAPI`` →
    ``plate_dapi``.
    """
    return re.sub(r"^((image|metadata)_)+", "", column.strip().lower())


def parse_column_overrides(overrides: Iterable[str]) -> dict[str, str]:
    """``["compound=Metadata_JCP2022"]`` → ``{"Metadata_Compound": "Metadata_JCP2022"}``.

    Raises:
        CellfastError: not ``NAME=COLUMN`` or NAME is none of plate, well, site, batch, compound, concentration, moa.
    """
    chosen: dict[str, str] = {}
    for text in overrides:
        name, _, column = text.partition("=")
        if name.strip().lower() not in SHORT_NAMES or not column:
            raise CellfastError(f"--column must be NAME=COLUMN with NAME one of {', '.join(SHORT_NAMES)}; got '{text}'.")
        chosen[SHORT_NAMES[name.strip().lower()]] = column
    return chosen


def find_metadata_columns(
    columns: Sequence[str], overrides: Mapping[str, str] | None = None, where: str = "the table"
) -> dict[str, str]:
    """Map canonical metadata names to the columns of a table that hold them; what is not there is left out.

    Order of preference: an override, the canonical name itself, then the aliases of the field in their listed order, with or
    without ``Image_``/``Metadata_`` prefixes, then the same with a channel suffix (``Image_Metadata_Plate_DAPI``).

    Raises:
        CellfastError: an override names a column that the table does not have.
    """
    found: dict[str, str] = {}
    overrides = overrides or {}
    for canonical, column in overrides.items():
        if column not in columns:
            listed = ", ".join(list(columns)[:30])
            raise CellfastError(f"--column: {where} has no column '{column}'; its columns begin with: {listed}.")
        found[canonical] = column
    taken = set(found.values())
    plain: dict[str, str] = {}
    for column in columns:
        if not _CELLPROFILER.match(column) and column not in taken:
            plain.setdefault(plain_name(column), column)
    stripped: dict[str, str] = {}
    for name, column in plain.items():
        stripped.setdefault(_CHANNEL_SUFFIX.sub("", name), column)
    for canonical, aliases in _ALIASES.items():
        if canonical in found:
            continue
        if canonical in columns:
            found[canonical] = canonical
            continue
        for names in (plain, stripped):
            match = next((names[alias] for alias in aliases if alias in names), None)
            if match is not None:
                found[canonical] = match
                break
    return found


def infer_features(
    numeric_columns: Sequence[str],
    metadata_columns: Iterable[str],
    patterns: Sequence[str] = (),
    where: str = "the table",
) -> list[str]:
    """The feature columns of a table, in its order.

    ``patterns`` are prefixes or regular expressions matched at the start of the name; a column is a feature when any of them
    matches. Without patterns: the embedding columns ``h000…`` if there are any; else the CellProfiler columns (``Cells_``,
    ``Cytoplasm_``, ``Nuclei_``); else every numeric column that is not metadata (``Metadata_``, ``Image_``, a recognised
    metadata column, an object or image number).

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
            raise CellfastError(f"--features: not a prefix or regular expression: {error}.") from None
        chosen = [c for c in candidates if any(p.match(c) for p in compiled)]
        if not chosen:
            raise CellfastError(
                f"--features {' '.join(patterns)} matches no numeric column of {where}; its numeric columns begin with: "
                f"{', '.join(candidates[:20]) or 'none'}."
            )
        return chosen
    embedding = [c for c in candidates if _EMBEDDING.match(c)]
    if embedding:
        return embedding
    cellprofiler = [c for c in candidates if _CELLPROFILER.match(c)]
    if cellprofiler:
        return cellprofiler
    rest = [c for c in candidates if not c.lower().startswith("image_") and plain_name(c) not in _BOOKKEEPING]
    if not rest:
        raise CellfastError(
            f"No feature columns found in {where}: expected h000…, Cells_/Cytoplasm_/Nuclei_… or other numeric columns "
            f"besides the metadata; "
            f"found {', '.join(list(numeric_columns)[:20]) or 'no numeric column'}. Name them with --features."
        )
    return rest


def normalize_well(well: str) -> str:
    """Well names as ``A01``: ``a1``, ``A1`` and ``A01`` are one well; other text is returned as it is (stripped).

    Raises nothing: plate formats up to 1536 wells (rows ``A``-``Z``, ``AA``-``AF``).
    """
    match = re.fullmatch(r"\s*([A-Za-z]{1,2})\s*0*([1-9]\d?)\s*", well)
    return f"{match[1].upper()}{int(match[2]):02d}" if match else well.strip()


def batch_of_plate(plate: str, pattern: str = r"^(Week\d+)_") -> str | None:
    """The batch in a plate name: the first group of ``pattern`` (BBBC021: ``Week1_22123`` → ``Week1``), or None where it does
    not match.
    """
    match = re.search(pattern, plate)
    if match is None:
        return None
    return match[1] if match.re.groups else match[0]
