"""Composing fields: where cells lie, debris, focus, haze, illumination, camera noise, plate and week effects."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from cellfast.screens.simulate.cells import ACTIN, DNA, TUBULIN, Cells, NoiseBank, draw_states
from cellfast.screens.simulate.drawing import draw_cells
from cellfast.screens.simulate.phenotypes import BASELINE, INDEX, NAMES, TreatmentEffect, draw_phenotypes

# Measured on BBBC021 (DAPI, tubulin, actin): camera values of empty field, of a typical cell above it, and the noise there.
BACKGROUND = np.array([760.0, 980.0, 880.0])
BRIGHTNESS = np.array([3400.0, 3300.0, 3900.0])
READ_NOISE = 44.0
CAMERA_STEP = 16  # a 12-bit camera stored in the upper bits of 16
CAMERA_MAX = 4095 * CAMERA_STEP


@dataclass(frozen=True)
class Optics:
    """How a plate was imaged, per channel [3]: gain, background, blur in px at scale 1, illumination centre and falloff."""

    gain: np.ndarray
    background: np.ndarray
    blur_px: np.ndarray
    haze: np.ndarray
    falloff: np.ndarray
    centre: np.ndarray  # [3, 2], relative to the field's half size
    shot: float
    density: float  # log of the factor on cell number
    shift: np.ndarray  # [K], what the plate does to all its cells, in units of the variation between cells


def draw_optics(week: np.random.SeedSequence, plate: np.random.SeedSequence) -> Optics:
    """The optics of a plate: effects of its week and, smaller, of the plate itself."""
    w, p = np.random.default_rng(week), np.random.default_rng(plate)
    return Optics(
        gain=np.exp(w.normal(0, 0.28, 3) + p.normal(0, 0.16, 3)),
        background=BACKGROUND * np.exp(w.normal(0, 0.10, 3) + p.normal(0, 0.05, 3)),
        blur_px=0.65 + w.gamma(2.0, 0.12, 3) + p.gamma(2.0, 0.08, 3),
        haze=np.clip(0.16 + w.normal(0, 0.05, 3) + p.normal(0, 0.02, 3), 0.03, 0.4),
        falloff=np.clip(0.22 + w.normal(0, 0.05, 3) + p.normal(0, 0.02, 3), 0.05, 0.45),
        centre=w.normal(0, 0.18, (3, 2)) + p.normal(0, 0.05, (3, 2)),
        shot=float(14.0 * np.exp(p.normal(0, 0.15))),
        density=float(w.normal(0, 0.10) + p.normal(0, 0.08)),
        shift=w.normal(0, 0.30, len(NAMES)) + p.normal(0, 0.18, len(NAMES)),
    )


@dataclass(frozen=True)
class PlaceEffect:
    """What a place does to its wells: shift [K] in units of the variation between cells, log of gain [3], log of cell number."""

    shift: np.ndarray
    gain: np.ndarray
    density: float


def draw_place_effects(week: np.random.SeedSequence, strength: float) -> dict[str, PlaceEffect]:
    """The effects of a week's plates on wells by the ``edge`` (evaporation, temperature), along the ``row`` and the ``column`` (dispensing)."""
    rng = np.random.default_rng(week)
    return {
        name: PlaceEffect(
            strength * rng.normal(0, size, len(NAMES)),
            strength * rng.normal(0, 0.4 * size, 3),
            strength * float(rng.normal(mean, 0.05)),
        )
        for name, size, mean in (("edge", 0.25, -0.10), ("row", 0.10, 0.0), ("column", 0.10, 0.0))
    }


def at_place(optics: Optics, effects: dict[str, PlaceEffect], position: int) -> Optics:
    """The optics of a plate's well at ``position`` (``design.well_position``) of 8 × 12: edge effects fall off by e with each row or
    column inwards, the others run evenly from −1 to 1 over the plate.
    """
    row, column = divmod(position, 12)
    inwards = min(row, 7 - row, column, 11 - column)
    for name, share in (("edge", np.exp(-inwards)), ("row", (row - 3.5) / 3.5), ("column", (column - 5.5) / 5.5)):
        its = effects[name]
        optics = replace(
            optics,
            shift=optics.shift + share * its.shift,
            gain=optics.gain * np.exp(share * its.gain),
            density=optics.density + share * its.density,
        )
    return optics


@dataclass(frozen=True)
class FieldTruth:
    """The cells whose nucleus centre lies between the field's outermost pixel centres: centres in px (column x, row y of pixel centres), state, response."""

    x: np.ndarray
    y: np.ndarray
    state: np.ndarray
    response: np.ndarray
    responds: np.ndarray


def place_cells(
    count: int, shape: tuple[int, int], spacing: float, reach: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Up to ``count`` centres at least ``spacing`` px apart; a third about ``reach`` px from an earlier one, so that cells touch."""
    height, width = shape
    y, x = np.empty(count), np.empty(count)
    placed = 0
    for _ in range(count):
        for _attempt in range(12):
            if placed and rng.random() < 0.35:
                near, angle = int(rng.integers(placed)), rng.uniform(0, 2 * np.pi)
                away = reach * rng.uniform(0.8, 1.4)
                cy, cx = y[near] + away * np.sin(angle), x[near] + away * np.cos(angle)
                if not (0 <= cy < height and 0 <= cx < width):
                    continue
            else:
                cy, cx = rng.uniform(0, height), rng.uniform(0, width)
            if placed == 0 or np.min((y[:placed] - cy) ** 2 + (x[:placed] - cx) ** 2) >= spacing**2:
                y[placed], x[placed] = cy, cx
                placed += 1
                break
    return y[:placed], x[:placed]


def draw_field(
    treatment: TreatmentEffect,
    optics: Optics,
    well: np.random.SeedSequence,
    field: np.random.SeedSequence,
    *,
    cells_per_field: float,
    field_size: tuple[int, int],
    scale: float,
    noise: NoiseBank,
) -> tuple[np.ndarray, FieldTruth]:
    """Draw one field: (uint16 [3, H, W] in the order DAPI, tubulin, actin; its cells)."""
    shared, rng = np.random.default_rng(well), np.random.default_rng(field)
    well_shift = optics.shift + shared.normal(0, 0.22, len(NAMES))
    well_gain = np.exp(shared.normal(0, 0.12, 3))
    well_focus = shared.gamma(1.5, 0.16)
    density = np.exp(treatment.density * min(treatment.strength, 1.3) + optics.density + shared.normal(0, 0.15))

    # Cells outside the field reach into it: the canvas has a margin on each side.
    margin = int(np.ceil(0.8 * BASELINE[INDEX["cell_size"]] * scale))
    height, width = field_size
    shape = (height + 2 * margin, width + 2 * margin)
    expected = cells_per_field * density * shape[0] * shape[1] / (height * width)
    reach = 1.45 * BASELINE[INDEX["cell_size"]] * scale
    y, x = place_cells(int(rng.poisson(expected)), shape, 1.85 * BASELINE[INDEX["nucleus_size"]] * scale, reach, rng)
    values, response = draw_phenotypes(treatment, len(y), well_shift, rng)
    # Neighbours align: the orientation follows a smooth field.
    broad = noise.cut(2, shape, rng)
    orientation = 1.6 * broad[y.astype(int), x.astype(int)] + rng.normal(0, 0.5, len(y))
    cells = Cells(y, x, values, draw_states(values, rng), orientation, scale)
    drawn = draw_cells(cells, shape, noise, rng)
    _add_debris(drawn, scale, rng)
    image = _expose(drawn, optics, well_gain, well_focus + rng.gamma(1.0, 0.06), scale, margin, rng)

    # Between the first and the last pixel centre: inside by every convention. The tables print three decimals.
    row, column = np.round(y - margin, 3), np.round(x - margin, 3)
    inside = (row >= 0) & (row <= height - 1) & (column >= 0) & (column <= width - 1)
    responds = response > 0.1 * treatment.strength
    truth = FieldTruth(
        x[inside] - margin,
        y[inside] - margin,
        cells.state[inside],
        response[inside],
        (responds & (treatment.strength > 0))[inside],
    )
    return image, truth


def _add_debris(drawn: np.ndarray, scale: float, rng: np.random.Generator) -> None:
    """Add dust, cell fragments and bright clumps, in place: mostly out of focus, some in all channels."""
    _, height, width = drawn.shape
    area = height * width / (1024 * 1280 * scale**2)
    for _ in range(int(rng.poisson(9.0 * area))):
        radius = scale * np.exp(rng.normal(1.1, 0.5))
        half = int(np.ceil(3 * radius)) + 1
        cy, cx = rng.uniform(0, height), rng.uniform(0, width)
        y0, y1, x0, x1 = (
            max(int(cy) - half, 0),
            min(int(cy) + half + 1, height),
            max(int(cx) - half, 0),
            min(int(cx) + half + 1, width),
        )
        rows, columns = np.arange(y0, y1) - cy, np.arange(x0, x1) - cx
        turn, stretch = rng.uniform(0, np.pi), rng.uniform(1.0, 1.8)
        along = (np.cos(turn) * columns[None] + np.sin(turn) * rows[:, None]) / stretch
        across = (np.cos(turn) * rows[:, None] - np.sin(turn) * columns[None]) * stretch
        blob = np.exp(-((along**2 + across**2) / radius**2)).astype(np.float32)
        brightness = rng.gamma(1.2, 0.8, 3) * (rng.random(3) < np.array([0.45, 0.6, 0.7]))
        drawn[:, y0:y1, x0:x1] += brightness.astype(np.float32)[:, None, None] * blob


def _expose(
    drawn: np.ndarray,
    optics: Optics,
    well_gain: np.ndarray,
    defocus_px: float,
    scale: float,
    margin: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Blur, haze, illumination, background, shot and read noise, 12 bits; uint16 [3, H, W] without the margin."""
    height, width = drawn.shape[1] - 2 * margin, drawn.shape[2] - 2 * margin
    inner = (slice(margin, margin + height), slice(margin, margin + width))
    rows = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    columns = np.linspace(-1, 1, width, dtype=np.float32)[None]
    image = np.empty((3, height, width), np.uint16)
    for channel in (DNA, TUBULIN, ACTIN):
        sharp = drawn[channel]
        blurred = ndimage.gaussian_filter(sharp, float(np.hypot(optics.blur_px[channel], defocus_px)) * scale, truncate=3)[inner]
        haze = _wide_blur(sharp, 11.0 * scale)[inner]
        share = np.float32(optics.haze[channel])
        signal = (1 - share) * blurred + share * haze
        cy, cx = optics.centre[channel]
        away = (rows - np.float32(cy)) ** 2 + (columns - np.float32(cx)) ** 2
        illumination = 1 - np.float32(optics.falloff[channel]) * 0.5 * away
        gain = np.float32(optics.gain[channel] * well_gain[channel] * BRIGHTNESS[channel])
        camera = (signal * gain + np.float32(0.35 * optics.background[channel])) * np.maximum(illumination, 0.2)
        # 65 % of the background is the camera's offset, which illumination and shot noise do not touch.
        spread = np.sqrt(np.maximum(camera, 0) * np.float32(optics.shot) * 0.5 + np.float32(READ_NOISE**2 * 0.75))
        camera += np.float32(0.65 * optics.background[channel]) + spread * rng.standard_normal((height, width), dtype=np.float32)
        image[channel] = np.clip(np.rint(camera / CAMERA_STEP), 0, CAMERA_MAX // CAMERA_STEP).astype(np.uint16) * CAMERA_STEP
    return image


def _wide_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian blur of large ``sigma`` px, computed on means of 4 × 4 px; float32, same shape."""
    height, width = image.shape
    padded = np.pad(image, ((0, -height % 4), (0, -width % 4)), mode="edge")
    small = padded.reshape(padded.shape[0] // 4, 4, padded.shape[1] // 4, 4).mean(axis=(1, 3))
    small = ndimage.gaussian_filter(small, sigma / 4, truncate=3)
    return np.repeat(np.repeat(small, 4, axis=0), 4, axis=1)[:height, :width]
