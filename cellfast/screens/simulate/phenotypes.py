"""What cells look like and how each mechanism of action changes it: named parameters, their baseline, their effects."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LOG, LINEAR = "log", "linear"


@dataclass(frozen=True)
class Parameter:
    """One phenotype parameter: the baseline, how effects combine with it, and how much single cells vary.

    ``log`` parameters are multiplied, value = baseline · exp(response · effect + variation); ``linear`` ones are added to,
    value = max(0, baseline + response · effect + variation). ``variation`` is the standard deviation between cells.
    """

    baseline: float
    kind: str
    variation: float
    meaning: str


PARAMETERS: dict[str, Parameter] = {
    "cell_size": Parameter(37.0, LOG, 0.16, "mean radius of the cell, px at scale 1"),
    "cell_elongation": Parameter(1.25, LOG, 0.14, "square root of the ratio of its axes"),
    "cell_irregularity": Parameter(0.09, LINEAR, 0.03, "amplitude of the smooth deviations of its outline"),
    "protrusion": Parameter(0.28, LINEAR, 0.08, "height of the corners of its outline, relative to the radius"),
    "nucleus_size": Parameter(17.0, LOG, 0.11, "mean radius of the nucleus, px at scale 1"),
    "nucleus_elongation": Parameter(1.14, LOG, 0.07, "square root of the ratio of its axes"),
    "nucleus_lobes": Parameter(0.03, LINEAR, 0.015, "amplitude of lobes in the outline of the nucleus"),
    "chromatin_fine": Parameter(0.11, LINEAR, 0.03, "contrast of fine chromatin texture"),
    "chromatin_coarse": Parameter(0.13, LINEAR, 0.04, "contrast of coarse chromatin texture"),
    "nucleoli": Parameter(0.30, LINEAR, 0.10, "depth of the nucleoli in the DNA channel"),
    "dna": Parameter(1.0, LOG, 0.20, "brightness of the DNA stain"),
    "tubulin": Parameter(1.0, LOG, 0.24, "brightness of tubulin"),
    "filaments": Parameter(95.0, LOG, 0.15, "number of microtubules drawn"),
    "curl": Parameter(0.10, LOG, 0.15, "change of a microtubule's direction, rad per px^0.5 at scale 1"),
    "spread": Parameter(0.9, LINEAR, 0.15, "deviation of a microtubule's start from the radial direction, rad"),
    "bundling": Parameter(0.15, LINEAR, 0.08, "share of microtubules that run in bundles"),
    "tubulin_diffuse": Parameter(0.32, LINEAR, 0.10, "unpolymerised, even tubulin, relative to the filaments"),
    "perinuclear": Parameter(0.55, LINEAR, 0.15, "tubulin ring around the nucleus"),
    "aggresome": Parameter(0.02, LINEAR, 0.02, "one bright spot of tubulin beside the nucleus"),
    "actin": Parameter(1.0, LOG, 0.24, "brightness of actin"),
    "cortex": Parameter(1.0, LOG, 0.20, "actin at the cell border"),
    "fibres": Parameter(11.0, LOG, 0.25, "number of stress fibres drawn"),
    "ruffles": Parameter(0.40, LINEAR, 0.12, "unevenness of the cortex"),
    "puncta": Parameter(2.0, LOG, 0.40, "number of actin spots"),
    # Chances of a cell to be in a state; the effect is added for responding cells.
    "mitotic": Parameter(0.03, LINEAR, 0.0, "probability of metaphase"),
    "monopolar": Parameter(0.0, LINEAR, 0.0, "probability of a monopolar spindle"),
    "apoptotic": Parameter(0.015, LINEAR, 0.0, "probability of apoptosis"),
    "fragmented": Parameter(0.008, LINEAR, 0.0, "probability of several micronuclei"),
    "binucleate": Parameter(0.025, LINEAR, 0.0, "probability of two nuclei"),
}
NAMES: tuple[str, ...] = tuple(PARAMETERS)
INDEX: dict[str, int] = {name: position for position, name in enumerate(NAMES)}
BASELINE = np.array([parameter.baseline for parameter in PARAMETERS.values()])
IS_LOG = np.array([parameter.kind == LOG for parameter in PARAMETERS.values()])
VARIATION = np.array([parameter.variation for parameter in PARAMETERS.values()])
# Upper bounds of single cells: beyond them outlines cross themselves or one cell fills the field.
UPPER = np.full(len(NAMES), np.inf)
for _name, _bound in {
    "cell_size": 68.0,
    "cell_elongation": 2.2,
    "cell_irregularity": 0.3,
    "protrusion": 0.9,
    "nucleus_size": 30.0,
    "nucleus_elongation": 1.7,
    "nucleus_lobes": 0.35,
    "chromatin_fine": 0.5,
    "chromatin_coarse": 0.6,
    "nucleoli": 0.8,
    "filaments": 220.0,
    "bundling": 0.85,
    "fibres": 60.0,
    "puncta": 60.0,
    "ruffles": 1.0,
}.items():
    UPPER[INDEX[_name]] = _bound

# Effects of a complete response. `density` is the number of cells in the well, as log; the rest are parameters above.
MOA_EFFECTS: dict[str, dict[str, float]] = {
    "Actin disruptors": {
        "cell_size": -0.28, "protrusion": 0.30, "cell_irregularity": 0.08, "fibres": -1.6, "puncta": 2.4,
        "cortex": -0.7, "ruffles": 0.4, "binucleate": 0.22, "nucleus_elongation": -0.06, "spread": 0.25,
        "density": -0.35,
    },
    "Aurora kinase inhibitors": {
        "nucleus_size": 0.26, "nucleus_lobes": 0.15, "cell_size": 0.26, "chromatin_coarse": 0.10, "binucleate": 0.20,
        "fragmented": 0.08, "mitotic": -0.03, "filaments": 0.2, "density": -0.45,
    },
    "Cholesterol-lowering": {
        "cell_elongation": 0.38, "cell_size": -0.24, "protrusion": 0.42, "fibres": -0.5, "perinuclear": 0.5,
        "tubulin_diffuse": 0.25, "nucleus_size": -0.10, "apoptotic": 0.04, "spread": -0.3, "density": -0.35,
    },
    "DNA damage": {
        "nucleus_size": 0.22, "nucleus_elongation": 0.05, "chromatin_fine": -0.06, "chromatin_coarse": -0.06,
        "nucleoli": 0.30, "cell_size": 0.20, "fibres": 0.7, "perinuclear": 0.15, "mitotic": -0.03, "density": -0.30,
    },
    "DNA replication": {
        "nucleus_size": 0.14, "chromatin_fine": 0.13, "chromatin_coarse": 0.14, "nucleoli": -0.18,
        "nucleus_lobes": 0.04, "cell_elongation": 0.10, "curl": 0.25, "apoptotic": 0.03, "mitotic": -0.02,
        "density": -0.40,
    },
    "Eg5 inhibitors": {
        "monopolar": 0.52, "mitotic": 0.02, "apoptotic": 0.07, "fragmented": 0.05, "cell_size": -0.08, "fibres": -0.3,
        "density": -0.40,
    },
    "Epithelial": {
        "cortex": 0.65, "ruffles": -0.25, "protrusion": -0.18, "cell_irregularity": -0.04, "cell_elongation": -0.14,
        "fibres": -0.8, "cell_size": 0.08, "curl": 0.35, "perinuclear": -0.2, "density": 0.05,
    },
    "Kinase inhibitors": {
        "cell_elongation": 0.20, "fibres": 0.5, "cortex": -0.35, "puncta": 1.0, "nucleus_elongation": 0.12,
        "filaments": -0.25, "bundling": 0.12, "ruffles": 0.25, "density": -0.15,
    },
    "Microtubule destabilizers": {
        "filaments": -2.2, "tubulin_diffuse": 0.75, "perinuclear": -0.25, "curl": 1.0, "cell_size": -0.10,
        "fragmented": 0.32, "mitotic": 0.09, "nucleus_lobes": 0.08, "fibres": 0.45, "cell_elongation": -0.10,
        "apoptotic": 0.03, "density": -0.35,
    },
    "Microtubule stabilizers": {
        "bundling": 0.55, "filaments": 0.15, "curl": -0.9, "spread": 0.65, "tubulin_diffuse": -0.20,
        "perinuclear": -0.15, "fragmented": 0.34, "mitotic": 0.08, "nucleus_lobes": 0.06, "apoptotic": 0.03,
        "density": -0.35,
    },
    "Protein degradation": {
        "aggresome": 1.1, "perinuclear": 0.40, "cell_size": -0.20, "cell_elongation": 0.16, "nucleus_size": -0.05,
        "nucleus_lobes": 0.05, "chromatin_coarse": 0.06, "protrusion": 0.15, "apoptotic": 0.06, "density": -0.40,
    },
    "Protein synthesis": {
        "nucleoli": -0.28, "nucleus_size": -0.14, "cell_size": -0.16, "filaments": -0.45, "chromatin_fine": -0.05,
        "chromatin_coarse": -0.05, "cortex": -0.3, "puncta": -0.7, "perinuclear": 0.2, "tubulin_diffuse": 0.2,
        "density": -0.30,
    },
}  # fmt: skip
MOA_NAMES: tuple[str, ...] = tuple(MOA_EFFECTS)


@dataclass(frozen=True)
class TreatmentEffect:
    """What one treatment does: effects [K] of a complete response, its strength, the share of cells that respond."""

    effects: np.ndarray
    density: float
    strength: float
    responder_fraction: float


NO_EFFECT = TreatmentEffect(np.zeros(len(NAMES)), 0.0, 0.0, 0.0)


def compound_effects(moa: str, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """The effects [K] of one compound of ``moa`` and on cell density (log): the MoA's, changed a little by the compound."""
    effects = np.zeros(len(NAMES))
    scale = np.exp(rng.normal(0.0, 0.22, len(NAMES)))
    # Off-target effects: small shifts in parameters that the MoA leaves alone, in units of the variation between cells.
    off_target = rng.normal(0.0, 0.22, len(NAMES)) * VARIATION
    for name, value in MOA_EFFECTS[moa].items():
        if name != "density":
            effects[INDEX[name]] = value
    changed = effects != 0
    return np.where(changed, effects * scale, off_target), MOA_EFFECTS[moa].get("density", 0.0) * float(
        np.exp(rng.normal(0.0, 0.3))
    )


def draw_phenotypes(
    treatment: TreatmentEffect, num_cells: int, well_shift: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Parameters of ``num_cells`` cells of a treated well: (values float64 [N, K], response float64 [N]).

    A well is a mixture: each cell responds with probability ``responder_fraction``; a responder's response is the strength times
    a log-normal factor, a non-responder's a twentieth of the strength. ``well_shift`` [K], in units of variation, moves all cells.
    """
    responds = rng.random(num_cells) < treatment.responder_fraction
    factor = np.exp(rng.normal(0.0, 0.25, num_cells))
    response = treatment.strength * np.where(responds, factor, 0.05)
    noise = rng.standard_normal((num_cells, len(NAMES))) * VARIATION + well_shift * VARIATION
    moved = response[:, None] * treatment.effects + noise
    values = np.where(IS_LOG, BASELINE * np.exp(np.where(IS_LOG, moved, 0.0)), BASELINE + moved)
    return np.clip(values, 0.0, UPPER), response
