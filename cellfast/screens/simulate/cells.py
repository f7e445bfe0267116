"""Drawing cells: outlines, chromatin, microtubules, actin, all cells of a field at once with array operations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from cellfast.screens.simulate.phenotypes import INDEX

DNA, TUBULIN, ACTIN = 0, 1, 2
STATES = ("interphase", "mitotic", "monopolar", "apoptotic", "fragmented", "binucleate")
INTERPHASE, MITOTIC, MONOPOLAR, APOPTOTIC, FRAGMENTED, BINUCLEATE = range(len(STATES))


@dataclass
class Cells:
    """The cells of one field, as columns: centres in canvas px, phenotype values [N, K], states [N], orientation [N] in rad."""

    y: np.ndarray
    x: np.ndarray
    values: np.ndarray
    state: np.ndarray
    orientation: np.ndarray
    scale: float

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.values[:, INDEX[name]]

    @property
    def rounded(self) -> np.ndarray:
        return (self.state == MITOTIC) | (self.state == MONOPOLAR) | (self.state == APOPTOTIC)

    @property
    def cell_radius(self) -> np.ndarray:
        """Mean radius of the cells in px; rounded cells have pulled in."""
        shrink = np.where(self.state == APOPTOTIC, 0.42, np.where(self.rounded, 0.60, 1.0))
        return self["cell_size"] * shrink * self.scale

    @property
    def nucleus_radius(self) -> np.ndarray:
        """Mean radius of the DNA in px."""
        factor = np.array([1.0, 0.72, 0.86, 0.62, 1.12, 1.1])[self.state]
        return self["nucleus_size"] * factor * self.scale


def draw_states(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The state of each cell (index into ``STATES``), drawn with the probabilities in its phenotype values [N, K]."""
    chances = np.stack([values[:, INDEX[name]] for name in STATES[1:]], axis=1)
    bounds = np.cumsum(chances / np.maximum(1.0, chances.sum(axis=1, keepdims=True) / 0.97), axis=1)
    drawn = rng.random(len(values))[:, None]
    return np.where(drawn[:, 0] < bounds[:, -1], 1 + (drawn >= bounds).sum(axis=1), INTERPHASE)


class NoiseBank:
    """A tile of smooth noise per grain (fine, coarse), zero mean and unit variance, cut at random places for each field."""

    def __init__(self, scale: float, seed: np.random.SeedSequence, size: int = 1024) -> None:
        rng = np.random.default_rng(seed)
        self.size = size
        self._tiles: list[np.ndarray] = []
        for sigma in (1.3 * scale, 3.6 * scale, 9.0 * scale):
            tile = ndimage.gaussian_filter(rng.standard_normal((size, size), dtype=np.float32), max(sigma, 0.6), mode="wrap")
            # Twice in both directions: a cut from anywhere is a view, without copying.
            self._tiles.append(np.tile(tile / tile.std(), (2, 2)))

    def cut(self, grain: int, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """A float32 array of ``shape`` from tile ``grain`` (0 fine, 1 coarse, 2 broad), wrapped round at the edges."""
        top, left = (int(offset) for offset in rng.integers(0, self.size, 2))
        if max(shape) <= self.size:
            return self._tiles[grain][top : top + shape[0], left : left + shape[1]]
        rows, columns = ((np.arange(length) + offset) % self.size for length, offset in zip(shape, (top, left)))
        return self._tiles[grain][rows[:, None], columns]


def _outlines(
    radius: np.ndarray,
    elongation: np.ndarray,
    angle: np.ndarray,
    waves: np.ndarray,
    corners: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Radius by angle, float32 [N, A]: an ellipse with smooth waves (harmonics 2 to 6) and pointed corners."""
    # One angle per px of a typical circumference.
    num_angles = 256 if len(radius) == 0 or np.median(radius) < 40 else 1024
    theta = np.linspace(-np.pi, np.pi, num_angles, endpoint=False, dtype=np.float32)
    radius, elongation, angle, waves, corners = (a.astype(np.float32) for a in (radius, elongation, angle, waves, corners))
    turned = theta[None] - angle[:, None]
    stretch = elongation[:, None]
    shape = 1.0 / np.sqrt((np.cos(turned) / stretch) ** 2 + (np.sin(turned) * stretch) ** 2)
    count = len(radius)
    for harmonic in range(2, 7):
        phase, size = rng.uniform(0, 2 * np.pi, count).astype(np.float32), rng.standard_normal(count, dtype=np.float32)
        shape = shape * (1 + (waves * size)[:, None] / harmonic**0.5 * np.cos(harmonic * theta[None] + phase[:, None]))
    if np.any(corners > 0):
        for _ in range(5):
            place, height, width = rng.uniform(-np.pi, np.pi, count), rng.random(count) ** 1.5, rng.uniform(0.10, 0.30, count)
            place, height, width = place.astype(np.float32), height.astype(np.float32), width.astype(np.float32)
            away = np.abs((theta[None] - place[:, None] + np.pi) % (2 * np.pi) - np.pi)
            shape = shape + (corners * height * 1.6)[:, None] * np.exp(-away / width[:, None])
        shape = shape / (1 + 0.45 * corners)[:, None]
    return (np.clip(shape, 0.3, 2.6) * radius[:, None]).astype(np.float32)


def _relative_distance(outline: np.ndarray, half: int, dy: np.ndarray, dx: np.ndarray) -> np.ndarray:
    """Distance from the centre over the outline's radius in that direction, float32 [N, 2·half+1, 2·half+1]; 1 is the border."""
    axis = np.arange(-half, half + 1, dtype=np.float32)
    yy = axis[None, :, None] - dy[:, None, None].astype(np.float32)
    xx = axis[None, None, :] - dx[:, None, None].astype(np.float32)
    num_angles = outline.shape[1]
    angle = ((np.arctan2(yy, xx) + np.float32(np.pi)) * np.float32(num_angles / (2 * np.pi))).astype(np.int32) % num_angles
    border = np.take_along_axis(outline, angle.reshape(len(outline), -1), axis=1).reshape(angle.shape)
    return np.sqrt(yy * yy + xx * xx) / border


def _windows(cells: Cells, half: int, shape: tuple[int, int]) -> list[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """For each cell the part of the canvas its patch covers, and the part of the patch that lies on the canvas."""
    windows = []
    for cy, cx in zip(np.floor(cells.y).astype(int), np.floor(cells.x).astype(int)):
        y0, y1, x0, x1 = max(cy - half, 0), min(cy + half + 1, shape[0]), max(cx - half, 0), min(cx + half + 1, shape[1])
        y1, x1 = max(y1, y0), max(x1, x0)
        canvas = (slice(y0, y1), slice(x0, x1))
        patch = (slice(y0 - cy + half, y1 - cy + half), slice(x0 - cx + half, x1 - cx + half))
        windows.append((canvas, patch))
    return windows


@dataclass
class Territory:
    """Who owns each canvas pixel: label int32 [H, W] (−1: nobody), depth (1 at the owner's border), distance to its edge in px."""

    label: np.ndarray
    depth: np.ndarray
    edge_px: np.ndarray


def divide_canvas(cells: Cells, shape: tuple[int, int], rng: np.random.Generator) -> Territory:
    """Give each pixel to the cell it lies deepest in: cells that meet share a border instead of overlapping."""
    radius = cells.cell_radius
    rounded = cells.rounded
    outline = _outlines(
        radius,
        np.where(rounded, 1.0 + 0.05 * rng.random(len(cells)), cells["cell_elongation"]),
        cells.orientation,
        np.where(rounded, 0.02, cells["cell_irregularity"]),
        np.where(rounded, 0.0, cells["protrusion"]),
        rng,
    )
    half = int(np.ceil(min(outline.max(), 2.4 * radius.max()))) + 1
    relative = _relative_distance(outline, half, cells.y % 1, cells.x % 1)
    # Far from every cell: any number well beyond a border will do, and unlike infinity it can be subtracted.
    first = np.full(shape, 1e3, np.float32)
    second = np.full(shape, 1e3, np.float32)
    label = np.full(shape, -1, np.int32)
    for i, (canvas, patch) in enumerate(_windows(cells, half, shape)):
        mine = relative[i][patch]
        if rounded[i]:
            # Rounded cells lie on top of their neighbours.
            mine = np.where(mine < 1, mine * np.float32(0.35), mine)
        best, next_best = first[canvas], second[canvas]
        wins = (mine < best) & (mine < 1)
        next_best[...] = np.where(wins, best, np.minimum(next_best, mine))
        np.copyto(best, mine, where=wins)
        np.copyto(label[canvas], i, where=wins)
    inside = label >= 0
    depth = np.where(inside, first, 1.0)
    gap = np.minimum(1.0 - first, 0.5 * (second - first))
    edge = np.where(inside, gap, 0.0) * radius.astype(np.float32)[label]
    return Territory(label, depth, np.maximum(edge, 0).astype(np.float32))


def draw_dna(cells: Cells, shape: tuple[int, int], noise: NoiseBank, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The DNA channel and the nuclear mask, float32 [H, W] each; a nucleus of the baseline is about 1 bright."""
    radius, state, count = cells.nucleus_radius, cells.state, len(cells)
    elongation = np.where(
        state == MITOTIC, 1.65, np.where(np.isin(state, (MONOPOLAR, APOPTOTIC)), 1.05, cells["nucleus_elongation"])
    )
    lobes = np.where(np.isin(state, (MITOTIC, APOPTOTIC)), 0.05, cells["nucleus_lobes"])
    outline = _outlines(radius, elongation, cells.orientation + rng.normal(0, 0.3, count), lobes, np.zeros(count), rng)
    half = int(np.ceil(max(outline.max(), 1.75 * radius.max()))) + 2
    level = _relative_distance(outline, half, cells.y % 1, cells.x % 1)
    distance = (1.0 - level) * radius.astype(np.float32)[:, None, None]
    _split_nuclei(distance, cells, radius, half, rng)
    soft = np.clip(distance / max(1.6 * cells.scale, 0.9) + 0.5, 0, 1)
    # A flattened ellipsoid: brightness rises quickly from the border and is nearly even inside.
    body = soft * (0.72 + 0.28 * np.clip(distance / radius.astype(np.float32)[:, None, None], 0, 1) ** 0.5)
    ring = state == MONOPOLAR
    if ring.any():
        body[ring] = soft[ring] * np.exp(-(((level[ring] - 0.72) / 0.27) ** 2)) * 1.1
    body *= _nucleoli(cells, radius, half, rng)
    bright = cells["dna"] * np.array([1.0, 2.1, 1.9, 2.6, 1.0, 1.0])[state]
    canvas, mask = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    fine, coarse = noise.cut(0, shape, rng), noise.cut(1, shape, rng)
    contrast = np.where(np.isin(state, (MITOTIC, MONOPOLAR, APOPTOTIC)), 1.5, 1.0)
    a_fine, a_coarse = cells["chromatin_fine"] * contrast, cells["chromatin_coarse"] * contrast
    for i, (place, patch) in enumerate(_windows(cells, half, shape)):
        texture = 1 + np.float32(a_fine[i]) * fine[place] + np.float32(a_coarse[i]) * coarse[place]
        painted = body[i][patch] * np.maximum(texture, 0.1) * np.float32(bright[i])
        np.maximum(canvas[place], painted, out=canvas[place])
        np.maximum(mask[place], soft[i][patch], out=mask[place])
    return canvas, mask


def _split_nuclei(distance: np.ndarray, cells: Cells, radius: np.ndarray, half: int, rng: np.random.Generator) -> None:
    """Replace the distance [N, P, P] of cells with two nuclei, micronuclei or apoptotic bodies by that of several discs, in place."""
    axis = np.arange(-half, half + 1, dtype=np.float32)
    for state, least, most, spread, low, high in ((BINUCLEATE, 2, 2, 0.62, 0.66, 0.76), (FRAGMENTED, 3, 6, 0.72, 0.26, 0.58),
                                                  (APOPTOTIC, 2, 5, 0.60, 0.30, 0.62)):  # fmt: skip
        for i in np.flatnonzero(cells.state == state):
            pieces = int(rng.integers(least, most + 1))
            angle = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(pieces) / pieces + rng.normal(0, 0.2, pieces)
            away = spread * radius[i] * rng.uniform(0.8, 1.2, pieces)
            size = radius[i] * rng.uniform(low, high, pieces)
            merged = np.full(distance.shape[1:], -np.inf, np.float32)
            for a, d, s in zip(angle, away, size):
                yy = axis - np.float32(cells.y[i] % 1 + d * np.sin(a))
                xx = axis - np.float32(cells.x[i] % 1 + d * np.cos(a))
                np.maximum(merged, np.float32(s) - np.sqrt(yy[:, None] ** 2 + xx[None] ** 2), out=merged)
            distance[i] = merged


def _nucleoli(cells: Cells, radius: np.ndarray, half: int, rng: np.random.Generator) -> np.ndarray:
    """Factor float32 [N, P, P] that darkens two or three spots of each nucleus."""
    axis = np.arange(-half, half + 1, dtype=np.float32)
    factor = np.ones((len(cells), 2 * half + 1, 2 * half + 1), np.float32)
    depth = np.where(cells.rounded, 0.0, cells["nucleoli"]).astype(np.float32)
    for spot in range(3):
        present = 1.0 if spot < 2 else (rng.random(len(cells)) < 0.5)
        angle, away = rng.uniform(0, 2 * np.pi, len(cells)), radius * 0.62 * np.sqrt(rng.random(len(cells)))
        size = (radius * rng.uniform(0.14, 0.24, len(cells))).astype(np.float32)
        rows = np.exp(-(((axis[None] - (away * np.sin(angle))[:, None]) / size[:, None]) ** 2)).astype(np.float32)
        columns = np.exp(-(((axis[None] - (away * np.cos(angle))[:, None]) / size[:, None]) ** 2)).astype(np.float32)
        factor -= (depth * present).astype(np.float32)[:, None, None] * rows[:, :, None] * columns[:, None, :]
    return np.maximum(factor, 0.1)
