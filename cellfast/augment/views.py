"""Two random views of every cell, made on the device: one composed warp, any number of channels, 8- or 16-bit input.

The order of operations is fixed: intensity scaling to [0, 1] → ONE bilinear ``grid_sample`` for crop, zoom, flips, rotation,
translation and elastic displacement → Gaussian blur → brightness and contrast → gain and shift per channel → noise → clamp to [0,
1]. One compiled operator does all of it in one pass over each cell (``method="fused"``, csrc/augment); ``method="torch"`` is the
same in plain PyTorch, which the operator equals to rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cellfast.augment.config import AugmentConfig
from cellfast.augment.parameters import NOISE_STARTS, NOISE_STEP, ParameterDraws, ViewParameters
from cellfast.errors import CellfastError, option
from cellfast.ops.augment import PADDINGS, missing_on

METHODS = ("fused", "torch")
# Cells that the plain form handles at a time on a CPU: their float32 intermediates stay in the last-level cache. On a GPU the
# chunk only bounds memory.
_CPU_CHUNK = 64
_GPU_CHUNK = 1024


class TwoViews:
    """Make two views of each cell of a minibatch, seeded, on the device that holds the crops.

    Args:
        config: an :class:`AugmentConfig`, or the name of a preset.
        num_channels: C, any number.
        crop_size: S, the stored crop's edge in pixels.
        output_size: s, the edge of a view; at most S.
        memory_format: ``torch.channels_last`` writes the views in that layout directly.
        method: ``fused`` (the compiled operator) or ``torch`` (plain PyTorch, to compare with); equal to rounding.

    Raises:
        CellfastError: sizes that do not fit together, or an unknown method.

    Source: Chen et al. 2020 (SimCLR); Perakis et al. 2021 for the set of transforms; parameters drawn by Kornia's generators.
    """

    def __init__(
        self, config: AugmentConfig | str, num_channels: int, crop_size: int, output_size: int, *,
        memory_format: torch.memory_format = torch.contiguous_format, method: str = "fused",
    ) -> None:  # fmt: skip
        if method not in METHODS:
            raise CellfastError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        self.config = AugmentConfig.preset(config) if isinstance(config, str) else config
        _check_sizes(num_channels, crop_size, output_size)
        self.num_channels, self.crop_size, self.output_size = num_channels, crop_size, output_size
        self.memory_format, self.method = memory_format, method
        self.chunk_size: int | None = None  # cells per pass of the plain form; None chooses by device
        self._draws = ParameterDraws(self.config, num_channels, crop_size, output_size)
        self._constants: dict[tuple[str, torch.device], torch.Tensor] = {}
        kernel = self.config.blur_kernel_px
        if self.config.blur_p > 0 and kernel // 2 >= output_size:
            raise CellfastError(
                f"augment.blur_kernel_px {kernel} is too wide for views of {output_size} px: use at most {2 * output_size - 1}"
            )

    def __call__(self, crops: torch.Tensor, low: torch.Tensor, high: torch.Tensor, *, seed: int) -> torch.Tensor:
        """Return float32 [2B, C, s, s] in [0, 1]: rows 0:B are the first view of cells 0:B, rows B:2B the second.

        Equivalent to ``x = clamp((crops − low) / (high − low), 0, 1)`` followed by the module's operations in their order, each
        drawn per view. The same seed gives the same views (the draws are made on the CPU, whatever the device); torch's and
        numpy's global random states are neither read nor changed.

        Args:
            crops: uint8, uint16 or float32 [B, C, S, S].
            low, high: [C], or [B, C] for scaling per plate; in the crops' units. A range below one count is taken as one count.
            seed: any integer.

        Raises:
            CellfastError: a shape, dtype or scaling that does not fit.
        """
        return self.apply(crops, low, high, self.draw(crops.shape[0] if crops.ndim else 0, seed))

    def apply(self, crops: torch.Tensor, low: torch.Tensor, high: torch.Tensor, parameters: ViewParameters) -> torch.Tensor:
        """The views that ``parameters`` describe, as :meth:`__call__` returns them: a minibatch made in pieces is
        ``apply(crops[cells], …, parameters.of_cells(cells))`` with the parameters of the whole.

        Raises:
            CellfastError: as :meth:`__call__`, or parameters of another number of cells.
        """
        _check_crops(crops, self.num_channels, self.crop_size)
        low, inverse = _scaling(low, high, crops)
        batch, s = crops.shape[0], self.output_size
        if parameters.matrix.shape[0] != 2 * batch:
            raise CellfastError(f"the parameters are those of {parameters.matrix.shape[0] // 2} cells, got {batch} crops")
        views = torch.empty(
            (2 * batch, self.num_channels, s, s), dtype=torch.float32, device=crops.device, memory_format=self.memory_format
        )
        if batch == 0:
            return views
        with torch.no_grad(), torch.autocast(crops.device.type, enabled=False):
            if self.method == "fused":
                self._fused(crops, low, inverse, parameters, views)
            else:
                self._in_chunks(crops, low, inverse, parameters, views)
        return views

    def _fused(
        self, crops: torch.Tensor, low: torch.Tensor, inverse: torch.Tensor, parameters: ViewParameters, views: torch.Tensor
    ) -> None:
        device, shape = crops.device, crops.shape[:2]
        if (why := missing_on(device)) is not None:
            raise CellfastError(f"the views cannot be made on {device}: {why}; TwoViews(..., method='torch') needs no operator")
        p = parameters.on(device)
        torch.ops.cellfast.augment_views(
            crops.contiguous(),
            low.expand(shape).contiguous(),
            inverse.expand(shape).contiguous(),
            p.matrix,
            p.gain,
            p.contrast,
            p.offset,
            p.elastic,
            p.elastic_row,
            None if p.elastic is None else self._constant("elastic", device),
            p.blur_sigma,
            self.config.blur_kernel_px,
            p.noise_std,
            p.noise_start,
            None if p.noise_std is None else self._constant("noise", device),
            NOISE_STEP,
            PADDINGS[self.config.padding],
            self.config.inverted,
            views,
        )

    def _in_chunks(
        self, crops: torch.Tensor, low: torch.Tensor, inverse: torch.Tensor, p: ViewParameters, views: torch.Tensor
    ) -> None:
        batch = crops.shape[0]
        # [2, B, C, s, s] as a view of either memory layout.
        halves = views.unflatten(0, (2, batch))
        chunk = self.chunk_size or (_CPU_CHUNK if crops.device.type == "cpu" else _GPU_CHUNK)
        grid_matrix = self._grid_matrix(p.matrix).unflatten(0, (2, batch))
        for start in range(0, batch, chunk):
            cells = slice(start, min(start + chunk, batch))
            x = _scaled(crops[cells], low if low.ndim == 1 else low[cells], inverse if inverse.ndim == 1 else inverse[cells])
            if self.config.inverted:
                x = torch.where(x < 0.5 / 255, 0.0, 256 / 255 - x)
            halves[:, cells].copy_(self._views_of(x, grid_matrix, p, cells, batch))

    def draw(self, batch: int, seed: int) -> ViewParameters:
        """The parameters that a call with ``batch`` cells and ``seed`` uses."""
        return self._draws.draw(batch, seed)

    def _grid_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        """Rescale pixel matrices [n, 2, 3] to ``grid_sample`` coordinates: −1 and 1 are the stored crop's outer edges."""
        size = self.crop_size
        # The output's centre lies where centre_crop puts it, so that the identity warp is the central crop.
        middle = (self.output_size - 1) / 2 + _window_start(size, self.output_size)
        grid = matrix * (2.0 / size)
        grid[:, :, 2] += (2.0 * middle + 1.0) / size - 1.0
        return grid

    def _views_of(self, x: torch.Tensor, grid_matrix: torch.Tensor, p: ViewParameters, cells: slice, batch: int) -> torch.Tensor:
        """Both views of a chunk of scaled cells ``x`` [k, C, S, S] as [2, k, C, s, s]."""
        k, s, device = x.shape[0], self.output_size, x.device

        def of_chunk(values: torch.Tensor) -> torch.Tensor:
            # [2B, …] of all cells → [k, 2, …] of these, on the device: a cell's two views share one input image.
            return values.unflatten(0, (2, batch))[:, cells].transpose(0, 1).contiguous().to(device, non_blocking=True)

        grid = _affine_grid(grid_matrix[:, cells].transpose(0, 1).contiguous().to(device, non_blocking=True), s)
        if p.elastic is not None and p.elastic_row is not None:
            self._displace(grid.view(2 * k, s, s), p.elastic, p.elastic_row.unflatten(0, (2, batch))[:, cells].T.reshape(-1))
        points = torch.view_as_real(grid).view(k, 2 * s, s, 2)
        v = F.grid_sample(x, points, mode="bilinear", padding_mode=self.config.padding, align_corners=False)
        v = v.view(k, self.num_channels, 2, s, s)
        if p.blur_sigma is not None:
            self._blur(v, p.blur_sigma.unflatten(0, (2, batch))[:, cells])
        if p.gain is not None:
            gain = of_chunk(p.gain).transpose(1, 2)  # [k, C, 2]
            offset = None if p.offset is None else of_chunk(p.offset).transpose(1, 2)
            if p.contrast is not None:
                contrast = of_chunk(p.contrast).transpose(1, 2)
                turned = v.mean((3, 4)).mul_(1 - contrast).mul_(gain)
                offset = turned if offset is None else turned.add_(offset)
                gain = gain * contrast
            # Two passes with a scalar per plane are faster on a CPU than one addcmul with broadcasting.
            v.mul_(gain[..., None, None])
            if offset is not None:
                v.add_(offset[..., None, None])
        if p.noise_std is not None and p.noise_start is not None:
            std = of_chunk(p.noise_std)[:, None, :].expand(k, self.num_channels, 2)
            start = of_chunk(p.noise_start).transpose(1, 2)
            windows = self._constant("noise", device).as_strided((NOISE_STARTS, s * s), (NOISE_STEP, 1))
            noise = windows.index_select(0, start.reshape(-1)).view_as(v)
            v.add_(noise.mul_(std[..., None, None]))
        v.clamp_(0.0, 1.0)
        if self.config.inverted:
            v.neg_().add_(256 / 255)
        return v.permute(2, 0, 1, 3, 4)

    def _displace(self, grid: torch.Tensor, noise: torch.Tensor, row: torch.Tensor) -> None:
        """Add the elastic displacement to the points ``grid`` (complex, [2k, s, s]) of those views whose ``row`` is not −1."""
        (view,) = torch.nonzero(row >= 0, as_tuple=True)
        if len(view) == 0:
            return
        basis = self._constant("elastic", grid.device)
        field = basis @ noise[row[view]].to(grid.device) @ basis.T
        view = view.to(grid.device)
        grid[view] = torch.complex(field[:, 0], field[:, 1]).mul_(2.0 / self.crop_size).add_(grid[view])

    def _blur(self, v: torch.Tensor, sigma: torch.Tensor) -> None:
        """Blur in place the views of ``v`` [k, C, 2, s, s] whose ``sigma`` [2, k] is positive.

        Equivalent to ``kornia.filters.gaussian_blur2d`` with reflected borders, as two products with the banded matrices of its
        separable kernel: faster than a depthwise convolution with a kernel per sample.
        """
        view, cell = torch.nonzero(sigma, as_tuple=True)
        if len(cell) == 0:
            return
        from kornia.filters import get_gaussian_kernel1d

        s, channels = self.output_size, self.num_channels
        kernel = get_gaussian_kernel1d(self.config.blur_kernel_px, sigma[view, cell][:, None])
        band = (kernel.to(v.device) @ self._constant("blur", v.device)).view(-1, s, s)
        view, cell = view.to(v.device), cell.to(v.device)
        picked = v[cell, :, view]  # [n, C, s, s]
        rows = torch.bmm(picked.view(-1, channels * s, s), band.transpose(1, 2)).view(-1, channels, s, s)
        v[cell, :, view] = torch.matmul(band[:, None], rows)

    def _constant(self, name: str, device: torch.device) -> torch.Tensor:
        """A constant tensor, made once per device."""
        key = (name, device)
        if key not in self._constants:
            if name == "elastic":
                assert self._draws.elastic_basis is not None
                value = self._draws.elastic_basis
            elif name == "blur":
                value = _band_basis(self.output_size, self.config.blur_kernel_px)
            else:
                value = _noise_bank(self.output_size)
            self._constants[key] = value.to(device)
        return self._constants[key]


def center_crop(
    crops: torch.Tensor, low: torch.Tensor, high: torch.Tensor, output_size: int, *,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> torch.Tensor:  # fmt: skip
    """The scaled central window, float32 [B, C, s, s] in [0, 1]: the deterministic form for embedding and validation.

    Equivalent to ``clamp((crops − low) / (high − low), 0, 1)[..., o:o+s, o:o+s]`` with o = S//2 − s//2: the stored centroid pixel
    S//2 lands on s//2. Arguments and errors as in :meth:`TwoViews.__call__`.
    """
    if crops.ndim != 4:
        raise CellfastError(f"crops must have shape [B, C, S, S], got {list(crops.shape)}")
    _check_sizes(crops.shape[1], crops.shape[2], output_size)
    _check_crops(crops, crops.shape[1], crops.shape[2])
    low, inverse = _scaling(low, high, crops)
    start = _window_start(crops.shape[2], output_size)
    window = crops[:, :, start : start + output_size, start : start + output_size]
    return _scaled(window, low, inverse).contiguous(memory_format=memory_format)


def _noise_bank(output_size: int) -> torch.Tensor:
    # Drawing afresh for every view would cost more than the warp (torch draws normals one by one on a CPU).
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NOISE_STARTS * NOISE_STEP + output_size * output_size, generator=generator)


def _affine_grid(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """``F.affine_grid`` for matrices [k, v, 2, 3] over centred pixel positions, as complex x + iy: [k, v, s, s]."""
    position = torch.arange(size, dtype=torch.float32, device=matrix.device) - (size - 1) / 2
    # (x, y) as one complex number: the sum of a row term and a column term is then a single vectorised pass (14x F.affine_grid on
    # a CPU).
    terms = torch.complex(matrix[:, :, 0], matrix[:, :, 1])  # [k, v, 3]
    column = terms[:, :, 0, None, None] * position
    row = terms[:, :, 1, None, None] * position[:, None] + terms[:, :, 2, None, None]
    return row + column


def _band_basis(size: int, kernel: int) -> torch.Tensor:
    """[kernel, s·s]: a 1-D kernel times this is the [s, s] matrix that filters a row of s pixels with reflected borders."""
    basis = torch.zeros(kernel, size, size)
    out = torch.arange(size)
    for tap in range(kernel):
        source = (out + tap - kernel // 2).abs()
        source = torch.where(source >= size, 2 * (size - 1) - source, source)
        basis[tap, out, source] += 1.0
    return basis.view(kernel, size * size)


def _window_start(crop_size: int, output_size: int) -> int:
    return crop_size // 2 - output_size // 2


def _scaled(crops: torch.Tensor, low: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    x = torch.empty(crops.shape, dtype=torch.float32, device=crops.device).copy_(crops)
    return x.sub_(low[..., None, None]).mul_(inverse[..., None, None]).clamp_(0.0, 1.0)


def _scaling(low: torch.Tensor, high: torch.Tensor, crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = (torch.as_tensor(value).to(torch.float32) for value in (low, high))
    shapes = ([crops.shape[1]], [crops.shape[0], crops.shape[1]])
    if list(low.shape) not in shapes or low.shape != high.shape:
        got = f"{list(low.shape)} and {list(high.shape)}"
        raise CellfastError(f"low and high must both have shape [C] = {shapes[0]} or [B, C] = {shapes[1]}, got {got}")
    # Looking at values that already lie on a GPU would make it wait; there the caller has them from a checked place.
    if low.device.type == "cpu" and high.device.type == "cpu" and not bool(((high >= low) & torch.isfinite(high - low)).all()):
        raise CellfastError(
            f"the intensity scaling needs finite low <= high for every channel, got low {low.tolist()}, high {high.tolist()}"
        )
    low, high = low.to(crops.device), high.to(crops.device)
    return low, 1.0 / (high - low).clamp_min(1.0 if crops.dtype != torch.float32 else torch.finfo(torch.float32).tiny)


def _check_sizes(num_channels: int, crop_size: int, output_size: int) -> None:
    if num_channels < 1 or output_size < 1:
        raise CellfastError(f"num_channels and output_size must be at least 1, got {num_channels} and {output_size}")
    if output_size > crop_size:
        raise CellfastError(
            f"output_size {output_size} px is larger than the stored crops ({crop_size} px): choose output_size {crop_size} "
            f"or less, or ingest the screen again with {option('crop_size', output_size)} or more"
        )


def _check_crops(crops: torch.Tensor, num_channels: int, crop_size: int) -> None:
    if crops.ndim != 4 or tuple(crops.shape[1:]) != (num_channels, crop_size, crop_size):
        raise CellfastError(f"crops must have shape [B, {num_channels}, {crop_size}, {crop_size}], got {list(crops.shape)}")
    if crops.dtype not in (torch.uint8, torch.uint16, torch.float32):
        raise CellfastError(f"crops must be uint8, uint16 or float32, got {crops.dtype}")
