"""Simulated screens in BBBC021's layout: design, phenotypes, cells, fields, files."""

from __future__ import annotations

from cellfast.screens.simulate.design import PRESETS, SimulationConfig, design_screen, with_options
from cellfast.screens.simulate.drawing import draw_cell
from cellfast.screens.simulate.phenotypes import MOA_NAMES
from cellfast.screens.simulate.tables import IMAGE_COLUMNS, SimulationSummary
from cellfast.screens.simulate.write import simulate_screen

__all__ = [
    "IMAGE_COLUMNS",
    "MOA_NAMES",
    "PRESETS",
    "SimulationConfig",
    "SimulationSummary",
    "design_screen",
    "draw_cell",
    "simulate_screen",
    "with_options",
]
