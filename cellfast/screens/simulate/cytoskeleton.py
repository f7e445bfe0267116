"""Drawing the cytoskeleton of the cells of a field: microtubules and actin as filaments that fill their cells."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from cellfast.screens.simulate.cells import APOPTOTIC, Cells, NoiseBank, Territory


def _splat(y: np.ndarray, x: np.ndarray, weight: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Add points to a float32 canvas, each shared between its four nearest pixels; points outside are left out."""
    fy, fx = np.floor(y), np.floor(x)
    keep = (fy >= 0) & (fx >= 0) & (fy < shape[0] - 1) & (fx < shape[1] - 1)
    y, x, weight, fy, fx = y[keep], x[keep], weight[keep], fy[keep], fx[keep]
    dy, dx = y - fy, x - fx
    start = fy.astype(np.int64) * shape[1] + fx.astype(np.int64)
    index = np.concatenate([start, start + 1, start + shape[1], start + shape[1] + 1])
    share = np.concatenate([(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx])
    share *= np.tile(weight, 4)
    return np.bincount(index, share, shape[0] * shape[1]).reshape(shape).astype(np.float32)


def trace_filaments(
    label: np.ndarray,
    owner: np.ndarray,
    y: np.ndarray,
    x: np.ndarray,
    angle: np.ndarray,
    weight: np.ndarray,
    curl: np.ndarray,
    length: np.ndarray,
    rng: np.random.Generator,
    *,
    follow_border: bool,
    step: float = 0.8,
) -> np.ndarray:
    """Draw filaments as persistent random walks inside their cells, float32 canvas of ``label``'s shape.

    Args:
        label: int32 [H, W], the owner of each pixel. owner: int [F], the cell of each filament.
        y, x, angle: float [F], start in px and direction in rad. weight: float [F], brightness per px of length.
        curl: float [F], standard deviation of the turn per px^0.5. length: float [F] in px.
        follow_border: at the border of the cell turn along it; otherwise end there.
    """
    height, width = label.shape
    y, x, angle = y.astype(np.float32), x.astype(np.float32), angle.astype(np.float32)
    side = np.where(rng.random(len(y)) < 0.5, np.float32(-1), np.float32(1))
    alive = np.ones(len(y), bool)
    steps = int(np.ceil(length.max() / step)) if len(y) else 0
    turn = (curl * np.sqrt(step)).astype(np.float32)
    path_y, path_x, path_weight = [], [], []
    weight = (weight * step).astype(np.float32)
    for number in range(steps):
        if number % 8 == 0:
            # Walks that ended are dropped now and then, so that the arrays shrink with the number still growing.
            alive &= length > number * step
            keep = np.flatnonzero(alive)
            if len(keep) == 0:
                break
            y, x, angle, side, turn, weight, owner, length = (a[keep] for a in (y, x, angle, side, turn, weight, owner, length))
            alive = np.ones(len(y), bool)
        angle = angle + turn * rng.standard_normal(len(y), dtype=np.float32)
        new_y, new_x = y + np.float32(step) * np.sin(angle), x + np.float32(step) * np.cos(angle)
        row, column = np.clip(new_y.astype(np.int32), 0, height - 1), np.clip(new_x.astype(np.int32), 0, width - 1)
        inside = label[row, column] == owner
        if follow_border:
            angle = np.where(inside, angle, angle + side * np.float32(0.6))
            y, x = np.where(inside, new_y, y), np.where(inside, new_x, x)
        else:
            alive &= inside
            y, x = new_y, new_x
        path_y.append(y)
        path_x.append(x)
        path_weight.append(np.where(inside & alive, weight, np.float32(0)))
    if not path_y:
        return np.zeros(label.shape, np.float32)
    return _splat(np.concatenate(path_y), np.concatenate(path_x), np.concatenate(path_weight), label.shape)


def draw_tubulin(
    cells: Cells, territory: Territory, nuclei: np.ndarray, noise: NoiseBank, rng: np.random.Generator
) -> np.ndarray:
    """The tubulin channel, float32 [H, W]: microtubules, even tubulin, a perinuclear ring, spindles, aggresomes."""
    label, scale, count = territory.label, cells.scale, len(cells)
    radius, nucleus = cells.cell_radius, cells.nucleus_radius
    bundles = np.where(cells.rounded, 0.0, cells["bundling"])
    drawn = np.where(cells.rounded, 40.0, cells["filaments"] * (1 - bundles))
    drawn = np.where(cells.state == APOPTOTIC, 6.0, drawn)
    number = np.maximum(np.rint(drawn * np.sqrt(scale)), 0).astype(int)
    owner = np.repeat(np.arange(count), number)
    total = len(owner)
    # Each bundle carries the microtubules that were not drawn singly.
    share = (1 / (1 - bundles))[owner] * np.exp(rng.normal(0, 0.35, total))
    around = rng.uniform(0, 2 * np.pi, total)
    start = nucleus[owner] * np.where(cells.rounded[owner], 0.15, rng.uniform(0.35, 1.25, total))
    y = cells.y[owner] + start * np.sin(around)
    x = cells.x[owner] + start * np.cos(around)
    angle = around + rng.normal(0, 1, total) * np.where(cells.rounded, 0.1, cells["spread"])[owner]
    length = radius[owner] * np.where(cells.rounded[owner], 0.75, rng.uniform(0.4, 1.3, total))
    curl = cells["curl"][owner] / np.sqrt(scale)
    filaments = trace_filaments(label, owner, y, x, angle, share, curl, length, rng, follow_border=True)
    filaments = ndimage.gaussian_filter(filaments, 0.5 * max(scale, 0.5) + 0.2, truncate=3)
    inside = label >= 0

    def per_pixel(values: np.ndarray) -> np.ndarray:
        return np.where(inside, values.astype(np.float32)[label], np.float32(0))

    border = np.minimum(territory.edge_px / np.float32(2.5 * scale), 1)
    thick = border * (0.35 + 0.65 * np.sqrt(np.maximum(1 - territory.depth, 0)))
    spread = noise.cut(0, label.shape, rng)
    diffuse = per_pixel(cells["tubulin_diffuse"] * np.where(cells.rounded, 2.6, 1.0)) * thick * (1 + 0.10 * spread)
    # Distance from the owner's nucleus, through the nuclear mask's blur: bright just outside it.
    halo = ndimage.gaussian_filter(nuclei, 3.0 * scale, truncate=2.5)
    ring = per_pixel(np.where(cells.rounded, 0.0, cells["perinuclear"])) * halo * (1 - nuclei) * 2.0 * border
    channel = 0.55 * filaments * np.float32(1 / np.sqrt(scale)) + 0.9 * diffuse + 0.55 * ring
    channel *= 1 - 0.22 * nuclei * per_pixel(np.where(cells.rounded, 0.0, 1.0))
    channel *= per_pixel(cells["tubulin"] * np.where(cells.rounded, 1.9, 1.0))
    spot = np.where(cells.rounded, 0.0, cells["aggresome"])
    where = rng.uniform(0, 2 * np.pi, count)
    points = _splat(
        cells.y + 1.25 * nucleus * np.sin(where),
        cells.x + 1.25 * nucleus * np.cos(where),
        spot * cells["tubulin"] * 200 * scale**2,
        label.shape,
    )
    return channel + ndimage.gaussian_filter(points, 3.4 * scale, truncate=2.5)


def draw_actin(cells: Cells, territory: Territory, nuclei: np.ndarray, noise: NoiseBank, rng: np.random.Generator) -> np.ndarray:
    """The actin channel, float32 [H, W]: cortex, stress fibres along the cell, spots, an even part."""
    label, scale, count = territory.label, cells.scale, len(cells)
    radius, inside = cells.cell_radius, territory.label >= 0

    def per_pixel(values: np.ndarray) -> np.ndarray:
        return np.where(inside, values.astype(np.float32)[label], np.float32(0))

    number = np.rint(np.where(cells.rounded, 0, cells["fibres"]) * np.sqrt(scale)).astype(int)
    owner = np.repeat(np.arange(count), number)
    total = len(owner)
    along = np.where(rng.random(total) < 0.5, 0.0, np.pi) + cells.orientation[owner]
    away, around = radius[owner] * 0.85 * np.sqrt(rng.random(total)), rng.uniform(0, 2 * np.pi, total)
    y, x = cells.y[owner] + away * np.sin(around), cells.x[owner] + away * np.cos(around)
    angle = along + rng.normal(0, 0.22, total)
    length = radius[owner] * rng.uniform(0.5, 1.5, total)
    curl = np.full(total, 0.02) / np.sqrt(scale)
    weight = np.exp(rng.normal(0, 0.4, total))
    fibres = trace_filaments(label, owner, y, x, angle, weight, curl, length, rng, follow_border=False)
    fibres = ndimage.gaussian_filter(fibres, 0.75 * scale + 0.2, truncate=3)
    spots = rng.poisson(cells["puncta"])
    owner = np.repeat(np.arange(count), spots)
    away, around = radius[owner] * np.sqrt(rng.random(len(owner))), rng.uniform(0, 2 * np.pi, len(owner))
    y, x = cells.y[owner] + away * np.sin(around), cells.x[owner] + away * np.cos(around)
    row, column = np.clip(y.astype(int), 0, label.shape[0] - 1), np.clip(x.astype(int), 0, label.shape[1] - 1)
    size = np.where(label[row, column] == owner, np.exp(rng.normal(0, 0.5, len(owner))), 0.0)
    puncta = ndimage.gaussian_filter(_splat(y, x, size * 24 * scale**2, label.shape), 1.5 * scale, truncate=3)

    uneven = np.maximum(1 + per_pixel(cells["ruffles"] * 1.2) * noise.cut(1, label.shape, rng), 0.05)
    cortex = np.exp(-((territory.edge_px / np.float32(2.6 * scale)) ** 2)) * inside * uneven
    thick = np.minimum(territory.edge_px / np.float32(2.0 * scale), 1) * (0.5 + 0.5 * np.sqrt(np.maximum(1 - territory.depth, 0)))
    texture = 1 + 0.13 * noise.cut(0, label.shape, rng) + 0.12 * noise.cut(1, label.shape, rng)
    even = thick * np.maximum(texture, 0.2) * per_pixel(np.where(cells.rounded, 1.8, 0.55)) * (1 - 0.35 * nuclei)
    channel = 0.95 * cortex * per_pixel(cells["cortex"]) + 0.55 * fibres * np.float32(1 / np.sqrt(scale)) + 0.9 * puncta + even
    return channel * per_pixel(cells["actin"] * np.where(cells.rounded, 1.6, 1.0))
