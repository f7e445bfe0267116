"""Drawing whole cells, all three channels, without optics or noise."""

from __future__ import annotations

import numpy as np

from cellfast.screens.simulate.cells import STATES, Cells, NoiseBank, divide_canvas, draw_dna
from cellfast.screens.simulate.cytoskeleton import draw_actin, draw_tubulin
from cellfast.screens.simulate.phenotypes import BASELINE, INDEX


def draw_cells(cells: Cells, shape: tuple[int, int], noise: NoiseBank, rng: np.random.Generator) -> np.ndarray:
    """Draw all cells of a field without optics or noise: float32 [3, H, W] (DNA, tubulin, actin), typical brightness about 1."""
    if len(cells) == 0:
        return np.zeros((3, *shape), np.float32)
    territory = divide_canvas(cells, shape, rng)
    dna, nuclei = draw_dna(cells, shape, noise, rng)
    return np.stack([dna, draw_tubulin(cells, territory, nuclei, noise, rng), draw_actin(cells, territory, nuclei, noise, rng)])


def draw_cell(size: int, scale: float = 1.0, *, state: str = "interphase", seed: int = 0, **changes: float) -> np.ndarray:
    """Draw one cell in the middle of a float32 [3, size, size] image; ``changes`` set phenotype parameters by name.

    Raises:
        ValueError: an unknown state or parameter name.
    """
    if state not in STATES:
        raise ValueError(f"state must be one of {', '.join(STATES)}, got {state!r}")
    unknown = set(changes) - set(INDEX)
    if unknown:
        raise ValueError(f"unknown phenotype parameters {sorted(unknown)}; known: {', '.join(INDEX)}")
    values = BASELINE.copy()
    for name, value in changes.items():
        values[INDEX[name]] = value
    middle = np.array([size / 2])
    cells = Cells(middle, middle, values[None], np.array([STATES.index(state)]), np.array([0.6]), scale)
    rng = np.random.default_rng(seed)
    return draw_cells(cells, (size, size), NoiseBank(scale, np.random.SeedSequence(seed), 256), rng)
