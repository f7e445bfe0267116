"""The random draws behind the views, made by Kornia's generators on the CPU from a seed of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from cellfast.augment.config import AugmentConfig, Range
from cellfast.errors import CellfastError

# Noise is read from a bank of 2^20 normal draws, each view and channel from its own random place: this many places, this far
# apart.
NOISE_STEP = 16
NOISE_STARTS = 1 << 16


@dataclass
class ViewParameters:
    """The draws for 2B views, view-major (rows 0:B are the first view), on the CPU in float32; None where the operation is off.

    ``matrix`` [2B, 2, 3] maps an output pixel (x, y, 1), counted from the output's centre, to the sampled point, counted from the
    centre of the same window in the stored crop, both in pixels. ``gain``, ``contrast``, ``offset`` [2B, C] make
    y = gain · (contrast · x + (1 − contrast) · mean(x)) + offset with the mean per view and channel. ``elastic`` [E, 2, m, m] is
    white noise for the E displaced views, ``elastic_row`` [2B] a view's row in it or −1. ``blur_sigma`` [2B] is 0 for no blur.
    ``noise_std`` [2B], ``noise_start`` [2B, C].
    """

    matrix: torch.Tensor
    gain: torch.Tensor | None = None
    contrast: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    elastic: torch.Tensor | None = None
    elastic_row: torch.Tensor | None = None
    blur_sigma: torch.Tensor | None = None
    noise_std: torch.Tensor | None = None
    noise_start: torch.Tensor | None = None

    def of_cells(self, cells: slice) -> ViewParameters:
        """The draws of some of the cells, for a minibatch made in pieces: both views of ``cells``, again view-major."""
        batch = self.matrix.shape[0] // 2

        def part(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values.unflatten(0, (2, batch))[:, cells].flatten(0, 1)

        kept: dict[str, Any] = {name: part(getattr(self, name)) for name in _PER_VIEW}
        return ViewParameters(elastic=self.elastic, **kept)

    def on(self, device: torch.device) -> ViewParameters:
        """The draws on ``device``, dense. To a GPU they travel in two copies from pinned memory: the host waits for neither."""
        names = [name for name in (*_PER_VIEW, "elastic") if getattr(self, name) is not None]
        if device.type == "cpu":
            return ViewParameters(**{name: getattr(self, name).contiguous() for name in names})
        moved: dict[str, torch.Tensor] = {}
        for dtype in (torch.float32, torch.int64):
            mine = {name: getattr(self, name) for name in names if getattr(self, name).dtype == dtype}
            if not mine:
                continue
            # Each begins on a multiple of 128 bytes.
            step = 128 // dtype.itemsize
            room = [-(-values.numel() // step) * step for values in mine.values()]
            packed = torch.empty(sum(room), dtype=dtype, pin_memory=device.type == "cuda")
            for (_, values), at in zip(mine.items(), accumulate(room, initial=0)):
                packed[at : at + values.numel()].view(values.shape).copy_(values)
            there = packed.to(device, non_blocking=True)
            for (name, values), at in zip(mine.items(), accumulate(room, initial=0)):
                moved[name] = there[at : at + values.numel()].view(values.shape)
        return ViewParameters(**moved)


_PER_VIEW = ("matrix", "gain", "contrast", "offset", "elastic_row", "blur_sigma", "noise_std", "noise_start")


class ParameterDraws:
    """Draws :class:`ViewParameters` for a configuration and a geometry.

    Attributes:
        elastic_basis: [s, m] so that ``basis @ noise @ basis.T`` is the displacement in pixels, or None when elastic is off.
    """

    def __init__(self, config: AugmentConfig, num_channels: int, crop_size: int, output_size: int) -> None:
        self.config, self.num_channels, self.crop_size, self.output_size = config, num_channels, crop_size, output_size
        if config.translation_px > crop_size / 2:
            raise CellfastError(
                f"augment.translation_px {config.translation_px:g} is more than half of the stored crop ({crop_size} px)"
            )
        # Here and below: training on views that someone else made needs no Kornia.
        from kornia.augmentation.random_generator import AffineGenerator, ResizedCropGenerator

        shift = config.translation_px / crop_size  # Kornia counts a shift in fractions of the edge
        self._affine = AffineGenerator(degrees=config.rotation_deg, translate=(shift, shift), scale=config.zoom)
        window = (output_size, output_size)
        self._crop = ResizedCropGenerator(window, config.crop_area, config.crop_ratio) if config.crop_area else None
        self.elastic_basis = None
        if config.elastic_p > 0 and config.elastic_rms_px > 0:
            # The basis acts on both axes of the noise, so each carries the square root of the displacement's size.
            self.elastic_basis = math.sqrt(config.elastic_rms_px) * smoothing_basis(output_size, config.elastic_sigma_px)

    def draw(self, batch: int, seed: int) -> ViewParameters:
        """Draw for 2 · ``batch`` views from ``seed`` alone; any integer, negative ones wrap."""
        with _private_generator(seed):
            p = ViewParameters(self._matrices(2 * batch))
            self._photometrics(p, 2 * batch)
            self._fields(p, 2 * batch)
        return p

    def _matrices(self, n: int) -> torch.Tensor:
        c, s = self.config, self.output_size
        affine = self._affine(torch.Size((n, 1, self.crop_size, self.crop_size)))
        angle = torch.deg2rad(affine["angle"].double())
        span = 1.0 / affine["scale"].double()  # [n, 2] sampled pixels per output pixel
        centre = affine["translations"].double()
        if self._crop is not None:
            corners = self._crop(torch.Size((n, 1, s, s)))["src"].double()  # pixel centres of the crop, clockwise
            first, last = corners[:, 0], corners[:, 2]
            span = span * (last - first + 1) / s
            centre = centre + (first + last) / 2 - (s - 1) / 2
        mirror = torch.stack([1.0 - 2.0 * (torch.rand(n) < p) for p in (c.flip_horizontal, c.flip_vertical)], 1)
        cos, sin = torch.cos(angle), torch.sin(angle)
        rotation = torch.stack((torch.stack((cos, -sin), 1), torch.stack((sin, cos), 1)), 1)
        linear = rotation * (span * mirror)[:, None, :]
        if c.anchors_p > 0 and c.anchors_px > 0:
            moved, shift = anchor_affine(n, s, c.anchors_p, c.anchors_px)
            linear, centre = linear @ moved, centre + (linear @ shift[:, :, None])[:, :, 0]
        return torch.cat((linear, centre[:, :, None]), 2).float()

    def _photometrics(self, p: ViewParameters, n: int) -> None:
        c = self.config
        shape = (n, self.num_channels)
        if c.jitter_p > 0 and (c.brightness > 0 or c.contrast > 0):
            on = torch.rand(n) < c.jitter_p
            gain = torch.where(on, _uniform((1 - c.brightness, 1 + c.brightness), n), 1.0)
            contrast = torch.where(on, _uniform((1 - c.contrast, 1 + c.contrast), n), 1.0)
            p.gain, p.contrast = gain[:, None].expand(shape), contrast[:, None].expand(shape)
        if c.channel_p > 0 and (c.channel_gain > 0 or c.channel_shift > 0):
            each = torch.rand(shape) < c.channel_p
            gain = torch.where(each, _uniform((1 - c.channel_gain, 1 + c.channel_gain), shape), 1.0)
            p.gain = gain if p.gain is None else p.gain * gain
            p.offset = torch.where(each, _uniform((-c.channel_shift, c.channel_shift), shape), 0.0)

    def _fields(self, p: ViewParameters, n: int) -> None:
        c = self.config
        if self.elastic_basis is not None:
            on = torch.rand(n) < c.elastic_p
            m = self.elastic_basis.shape[1]
            p.elastic_row = torch.where(on, torch.cumsum(on, 0) - 1, -1)
            p.elastic = torch.randn(int(on.sum()), 2, m, m)
        if c.blur_p > 0:
            sigma = _uniform(c.blur_sigma_px, n)
            p.blur_sigma = torch.where(torch.rand(n) < c.blur_p, sigma, 0.0)
        if c.noise_p > 0 and c.noise_std > 0:
            std = _uniform((0.0, c.noise_std), n)
            p.noise_std = torch.where(torch.rand(n) < c.noise_p, std, 0.0)
            p.noise_start = torch.randint(NOISE_STARTS, (n, self.num_channels))


def anchor_affine(n: int, size: int, p: float, most_px: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear parts [n, 2, 2] and shifts [n, 2], float64, that map a view's pixels, counted from its centre, to those before three
    anchors moved.

    With probability 1 − ``p`` the identity. Equivalent to the inverse of ``cv2.getAffineTransform(anchors, anchors +
    uniform(±most_px))`` with the anchors (c + k, c + k), (c + k, c − k), (c − k, c − k), c = size // 2, k = size // 3.

    Source: the affine in albumentations' ElasticTransform before version 1.4, which the implementation of Perakis et al. uses.
    """
    centre, reach = size // 2 - (size - 1) / 2, size // 3
    high, low = centre + reach, centre - reach
    anchors = torch.tensor([[high, high], [high, low], [low, low]], dtype=torch.float64)
    moved = anchors + _uniform((-most_px, most_px), (n, 3, 2)).double()
    # Anchors that fall on one line have no inverse: such a view stays as it is.
    back, failed = torch.linalg.solve_ex(torch.cat((moved, torch.ones(n, 3, 1, dtype=torch.float64)), 2), anchors.expand(n, 3, 2))
    on = (torch.rand(n) < p) & (failed == 0)
    identity = torch.eye(3, 2, dtype=torch.float64)
    back = torch.where(on[:, None, None], back, identity)  # rows: x, y, 1
    return back[:, :2].transpose(1, 2), back[:, 2]


def smoothing_basis(size: int, sigma: float) -> torch.Tensor:
    """[s, m] so that basis @ white noise [m, m] @ basis.T is Gaussian-smoothed noise of unit variance at each of the s × s
    pixels.

    Equivalent to filtering white noise with a Gaussian of ``sigma`` px, on a lattice of sigma/2: such a field has nothing finer
    to lose.
    """
    step = max(sigma / 2, 1.0)
    reach = math.ceil(3 * sigma / step)
    lattice = torch.arange(-reach, math.ceil((size - 1) / step) + reach + 1, dtype=torch.float64) * step
    weights = torch.exp(-((torch.arange(size, dtype=torch.float64)[:, None] - lattice) ** 2) / (2 * sigma**2))
    return (weights / weights.norm(dim=1, keepdim=True)).float()


def _uniform(bounds: Range, shape: int | tuple[int, ...]) -> torch.Tensor:
    from kornia.augmentation.random_generator import PlainUniformGenerator

    count = shape if isinstance(shape, int) else math.prod(shape)
    generator = PlainUniformGenerator((torch.tensor(bounds), "value", None, None))
    return generator(torch.Size((count,)))["value"].view(shape)


@contextmanager
def _private_generator(seed: int) -> Iterator[None]:
    # Kornia draws from torch's CPU default generator. torch.manual_seed would also reseed every GPU; the CPU generator alone does
    # not.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seed) % (1 << 64))
        yield
