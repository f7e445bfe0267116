"""What the functions of `cellfast.api` return: each stands for the files it names, and shows what is in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellfast.printable import Shown

if TYPE_CHECKING:
    from cellfast.embedding.run import EmbedSummary
    from cellfast.profiles.build import BuiltProfiles
    from cellfast.profiles.evaluate import Evaluation
    from cellfast.profiles.table import ProfileTable
    from cellfast.screens.simulate import SimulationSummary


@dataclass(repr=False)
class SimulatedImages(Shown):
    """A simulated screen's images and what belongs to them."""

    path: Path
    summary: SimulationSummary

    @property
    def image_csv(self) -> Path:
        """The image table."""
        return self.path / "image.csv"

    @property
    def images(self) -> Path:
        """The folder that its paths are relative to."""
        return self.path / "images"

    @property
    def locations(self) -> Path:
        """The folder of the cells' centres."""
        return self.path / "locations"

    @property
    def moa_csv(self) -> Path:
        """Compound, concentration, MoA."""
        return self.path / "moa.csv"

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        s = self.summary
        return (
            f"simulated images {self.path}: {s.num_cells:,} cells in {s.num_fields:,} fields of {s.num_plates} plates; "
            f"{s.num_treatments} treatments, {s.num_compounds} compounds, {s.num_moas} MoAs"
        )


@dataclass(repr=False)
class Embeddings(Shown):
    """A folder of embeddings: one file per plate, a row per cell (or well)."""

    path: str
    summary: EmbedSummary

    def __fspath__(self) -> str:
        return self.path

    def __str__(self) -> str:
        s = self.summary
        left_out = f"; {s.fields_quarantined} fields could not be used (quarantine.csv)" if s.fields_quarantined else ""
        rows = f"{s.rows:,} rows of {s.num_features} features in {s.plates} plates, {s.cells:,} cells"
        return f"embeddings {self.path}: {rows}{left_out}"


@dataclass(repr=False)
class Profiles(Shown):
    """Profiles in a file.

    Attributes:
        path: the file.
        built: their table, the wells' and the report of how they were made.
    """

    path: Path
    built: BuiltProfiles

    @property
    def table(self) -> ProfileTable:
        """The profiles: ``metadata`` (DataFrame), ``features`` [N, D], ``feature_names``."""
        return self.built.profiles

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        from cellfast.profiles.report import profile_lines

        made = f"profiles {self.path}: {len(self.table)} × {len(self.table.feature_names)} features"
        return "\n".join([made, *profile_lines(self.built.report)])


@dataclass(repr=False)
class Result(Shown):
    """What an evaluation found.

    Attributes:
        path: the result's file, .json.
        evaluation: the evaluated profiles, and a row for each.
        files: everything that was written, pictures first.
    """

    path: Path
    evaluation: Evaluation
    files: list[Path] = field(default_factory=list)

    @property
    def scores(self) -> dict[str, Any]:
        """What the result's file says."""
        return self.evaluation.result

    @property
    def nsc(self) -> float | None:
        """Share of profiles whose nearest neighbour of another compound has their MoA."""
        return self.scores["nsc"]["accuracy"]

    @property
    def nscb(self) -> float | None:
        """The same with neighbours of the same batch left out."""
        return self.scores["nscb"]["accuracy"]

    @property
    def pictures(self) -> list[Path]:
        """The pictures that were written."""
        return [path for path in self.files if path.suffix == ".png"]

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        from cellfast.profiles.report import evaluation_lines

        return "\n".join([*evaluation_lines(self.scores), *(f"written   {path}" for path in self.files)])
