"""The design of a simulated screen: which compound at which concentration lies in which well of which plate."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, field, fields, replace

import numpy as np

from cellfast.errors import CellfastError
from cellfast.screens.simulate.phenotypes import BASELINE, INDEX, MOA_NAMES, NO_EFFECT, TreatmentEffect, compound_effects

ROWS, COLUMNS = "BCDEFG", range(2, 12)  # the outer wells stay empty, as in BBBC021
CONTROL_WELLS = ("B02", "C02", "D02", "E11", "F11", "G11", "B11", "C11", "D11", "E02", "F02", "G02")
TREATED_WELLS = tuple(f"{row}{column:02d}" for row in ROWS for column in range(3, 11)) + tuple(
    well for well in CONTROL_WELLS[::-1]
)  # control wells that are not needed as such come last
CONTROL = "DMSO"
DOSE_RATIO = 1 / 3
TOP_CONCENTRATIONS = (0.3, 1.0, 3.0, 10.0, 30.0)  # µM
# Spawn keys of the random streams; each stream is keyed by what it is about, so that workers may draw fields in any order.
STREAM_FIELD, STREAM_WELL, STREAM_WEEK, STREAM_PLATE, STREAM_COMPOUND, STREAM_NOISE, STREAM_NAMES, STREAM_POSITION = range(8)


@dataclass(frozen=True)
class SimulationConfig:
    """What to simulate.

    Args:
        plates: number of plates in all. weeks: number of experimental batches they are spread over.
        replicates: wells of each treatment, each on another plate of its week (at least 2).
        sites: fields per well. wells: most wells used on a plate, controls included (up to 60).
        controls: DMSO wells per plate (1 to 12).
        moas: names of mechanisms of action (``MOA_NAMES``). compounds_per_moa: at least 2. doses: concentrations per compound.
        cells_per_field: mean number of cells in a field of an untreated well.
        field_size: (height, width) in px. scale: size of cells relative to BBBC021's images (nucleus about 34·scale px across).
        strength: factor on all treatment effects; 0 makes every treatment inactive.
        position: factor on the effects of a well's place on its plate (edge, row, column).
        seed: same seed and options, same bytes. compression: ``none`` or ``lzw``.
    """

    plates: int = 6
    weeks: int = 3
    replicates: int = 2
    sites: int = 2
    wells: int = 60
    controls: int = 6
    moas: tuple[str, ...] = MOA_NAMES
    compounds_per_moa: int = 3
    doses: int = 2
    cells_per_field: float = 35.0
    field_size: tuple[int, int] = (1024, 1280)
    scale: float = 1.0
    strength: float = 1.0
    position: float = 1.0
    seed: int = 0
    compression: str = "none"

    def __post_init__(self) -> None:
        for name, low, high in (
            ("plates", 1, 5000), ("weeks", 1, 30), ("replicates", 2, 100), ("sites", 1, 100), ("wells", 2, 60),
            ("controls", 1, len(CONTROL_WELLS)),
            ("compounds_per_moa", 2, 200), ("doses", 1, 12), ("seed", 0, 2**63 - 1),
        ):  # fmt: skip
            try:
                value = operator.index(getattr(self, name))
            except TypeError:
                raise CellfastError(f"{name} must be a whole number, got {getattr(self, name)!r}") from None
            if not low <= value <= high:
                raise CellfastError(f"{name} must be between {low} and {high}, got {value}")
        for name, low, high in (
            ("cells_per_field", 1.0, 5000.0),
            ("scale", 0.2, 4.0),
            ("strength", 0.0, 3.0),
            ("position", 0.0, 5.0),
        ):
            if not low <= getattr(self, name) <= high:
                raise CellfastError(f"{name} must be between {low:g} and {high:g}, got {getattr(self, name)!r}")
        height, width = self.field_size
        if not (64 <= height <= 8192 and 64 <= width <= 8192):
            raise CellfastError(f"field_size must be between 64 × 64 and 8192 × 8192 px, got {height} × {width}")
        if self.compression not in ("none", "lzw"):
            raise CellfastError(f"compression must be none or lzw, got {self.compression!r}")
        unknown = [moa for moa in self.moas if moa not in MOA_NAMES]
        if unknown or not self.moas:
            raise CellfastError(f"unknown MoA {', '.join(map(repr, unknown)) or '(none given)'}; known: {', '.join(MOA_NAMES)}")
        if len(set(self.moas)) != len(self.moas):
            raise CellfastError(f"MoAs must be given once each, got {', '.join(self.moas)}")
        if self.plates < self.weeks * self.replicates:
            raise CellfastError(
                f"{self.plates} plates over {self.weeks} weeks leave fewer than the {self.replicates} plates a week that {self.replicates} "
                f"replicates of a treatment need: give at least {self.weeks * self.replicates} plates, or fewer weeks"
            )
        # Nuclei are placed at least 1.85 radii apart: beyond about 45 % of the closest packing there is no room for more.
        room = 0.45 * height * width / (1.85 * BASELINE[INDEX["nucleus_size"]] * self.scale) ** 2
        if self.cells_per_field > room:
            raise CellfastError(
                f"{self.cells_per_field:g} cells do not fit a field of {height} × {width} px at scale {self.scale:g} "
                f"(at most {room:.0f}): "
                "give fewer cells, larger fields or a smaller scale"
            )

    def stream(self, *key: int) -> np.random.SeedSequence:
        """The random stream of this screen with the given key."""
        return np.random.SeedSequence(self.seed, spawn_key=key)

    def as_dict(self) -> dict[str, object]:
        """The options as JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


PRESETS: dict[str, SimulationConfig] = {
    "small": SimulationConfig(
        plates=4, weeks=2, sites=1, controls=4,
        moas=("Actin disruptors", "DNA damage", "Eg5 inhibitors", "Microtubule destabilizers"),
        compounds_per_moa=2, doses=1, cells_per_field=18.0, field_size=(256, 256), scale=0.6,
    ),
    "demo": SimulationConfig(
        plates=6, weeks=3, sites=2, controls=12,
        moas=("Actin disruptors", "DNA damage", "DNA replication", "Epithelial", "Microtubule stabilizers", "Protein synthesis"),
        compounds_per_moa=3, doses=2, cells_per_field=38.0, field_size=(288, 360), scale=0.6,
    ),
    "bbbc021": SimulationConfig(plates=55, weeks=10, replicates=3, sites=4, compounds_per_moa=3, doses=3, cells_per_field=110.0),
}  # fmt: skip


@dataclass(frozen=True)
class Treatment:
    """One compound at one concentration and what it does; the control has the compound and MoA ``DMSO`` and concentration 0."""

    compound: str
    concentration_um: float
    moa: str
    week: int
    effect: TreatmentEffect = field(repr=False)


@dataclass(frozen=True)
class Plate:
    """One plate: name ``WeekN_PPPPP``, week (from 0), position in the screen, treatment and replicate number of each used well."""

    name: str
    week: int
    position: int
    wells: dict[str, Treatment]
    replicate: dict[str, int]


def well_position(well: str) -> int:
    """The position 0 to 95 of a well of a 96-well plate: ``A01`` is 0, ``A02`` 1, ``B01`` 12."""
    return (ord(well[0]) - ord("A")) * 12 + int(well[1:]) - 1


def make_treatments(config: SimulationConfig) -> list[Treatment]:
    """All treatments of the screen: a compound's doses are all in one week; of a MoA's compounds the first is alone in its week, and the others
    share theirs two by two.

    So a part of the pairs of treatments of a MoA share a week, and every MoA is in two weeks: in BBBC021 156 of 598 pairs do.
    """
    treatments = []
    for moa_position, moa in enumerate(config.moas):
        for number in range(config.compounds_per_moa):
            # The stream is keyed by the MoA's place among all MoAs: a compound is the same whatever else is in the screen.
            rng = np.random.default_rng(config.stream(STREAM_COMPOUND, MOA_NAMES.index(moa), number))
            effects, density = compound_effects(moa, rng)
            top = float(rng.choice(TOP_CONCENTRATIONS))
            half_effect = 0.22 * float(np.exp(rng.normal(0, 0.35)))  # relative to the top concentration
            responders = float(np.clip(rng.normal(0.78, 0.08), 0.55, 0.95))
            name = f"{moa.lower().rstrip('s').replace(' ', '-')}-{number + 1}"
            for dose in range(config.doses):
                relative = DOSE_RATIO**dose
                share = 1 / (1 + (half_effect / relative) ** 1.2)
                effect = TreatmentEffect(effects, density, config.strength * share, responders * (0.7 + 0.3 * share))
                concentration = float(f"{top * relative:.2g}")
                treatments.append(Treatment(name, concentration, moa, (moa_position + (number + 1) // 2) % config.weeks, effect))
    return treatments


def design_screen(config: SimulationConfig) -> list[Plate]:
    """Lay out the screen: controls in columns 2 and 11, each treatment on ``replicates`` plates of its week, in shuffled wells.

    Raises:
        CellfastError: fewer wells than treatments.
    """
    treatments = make_treatments(config)
    control = Treatment(CONTROL, 0.0, CONTROL, -1, NO_EFFECT)
    controls = CONTROL_WELLS[: config.controls]
    free = [well for well in TREATED_WELLS if well not in controls][: max(config.wells - config.controls, 0)]
    plates: list[Plate] = []
    for week in range(config.weeks):
        mine = [treatment for treatment in treatments if treatment.week == week]
        count = config.plates // config.weeks + (week < config.plates % config.weeks)
        # Plates of a week form groups with the same treatments, as BBBC021's replicate plates do; plates left over join the last.
        groups = max(1, count // config.replicates)
        if len(mine) > groups * len(free):
            raise CellfastError(
                f"Week{week + 1} has {len(mine)} treatments ({config.replicates} replicates each) but {groups * len(free)} wells "
                f"for them ({count} plates in {groups} group(s) of replicates, {len(free)} wells a plate beside "
                f"{config.controls} controls): "
                "give more plates or wells, or fewer MoAs, compounds or doses"
            )
        rng = np.random.default_rng(config.stream(STREAM_NAMES, week))
        for number in range(count):
            group = min(number // config.replicates, groups - 1)
            layout = mine[group::groups]
            # Edge effects are not confounded with treatments: every replicate has its own order.
            places = rng.permutation(len(layout))
            wells = {well: control for well in controls}
            wells.update({free[place]: treatment for place, treatment in zip(places, layout)})
            replicate = number - group * config.replicates + 1
            name = f"Week{week + 1}_{20000 + 2000 * (week + 1) + 121 + 20 * number}"
            ordered = dict(sorted(wells.items()))
            plates.append(Plate(name, week, len(plates), ordered, dict.fromkeys(ordered, replicate)))
    if not any(plate.wells for plate in plates):
        raise AssertionError("a screen without wells")
    return plates


def replicates_per_treatment(plates: list[Plate]) -> Counter[tuple[str, float]]:
    """Number of wells of each (compound, concentration)."""
    return Counter((t.compound, t.concentration_um) for plate in plates for t in plate.wells.values())


def with_options(config: SimulationConfig, **options: object) -> SimulationConfig:
    """A copy of ``config`` with those options that are not None."""
    return replace(config, **{name: value for name, value in options.items() if value is not None})
