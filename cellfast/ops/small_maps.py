"""Convolution of maps of a few pixels on a CPU, as matrix products that leave out the padding; imports torch only.

The last maps of a ResNet that sees crops of 96 px are 3 × 3: of the nine taps of a 3 × 3 filter, four, six or nine lie on the
map. A general convolution multiplies the zeros around it too (81 products of [B, C] and [C, O] instead of 49). Here every output
position is the sum over the filter's rows of one product, whose inner side is the run of pixels that the row covers: ``torch.mm``
does the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Where the products are faster than the general convolution (`cellfast benchmark train`): outputs of at most so many
# positions, at least so many channels in and out, minibatches of at least so many cells.
MOST_POSITIONS, FEWEST_CHANNELS, FEWEST_CELLS = 16, 128, 64


def _runs(size: int, out: int, taps: int, stride: int, padding: int) -> list[tuple[int, int, int]]:
    """For each output position along an axis: first pixel, first tap, number of taps that lie on the map."""
    runs = []
    for position in range(out):
        start = position * stride - padding
        tap = max(0, -start)
        runs.append((start + tap, tap, max(0, min(taps, size - start) - tap)))
    return runs


def _products(
    size: Sequence[int], out: Sequence[int], taps: Sequence[int], stride: tuple[int, int], padding: tuple[int, int]
) -> Iterator[tuple[tuple[int, int], tuple[int, slice], tuple[int, slice]]]:
    """(output position), (row, run of columns) of the map, (row, run of columns) of the filter, for every product there is."""
    rows, columns = (_runs(*axis) for axis in zip(size, out, taps, stride, padding))
    for i, (y, tap_y, height) in enumerate(rows):
        for j, (x, tap_x, width) in enumerate(columns):
            for k in range(height if width else 0):
                yield (i, j), (y + k, slice(x, x + width)), (tap_y + k, slice(tap_x, tap_x + width))


class _SmallMaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        pixels, taps = _channels_last(x), _channels_last(weight)
        out = output_size(x, weight, stride, padding)
        values = x.new_empty(x.shape[0], *out, weight.shape[0])
        written: set[tuple[int, int]] = set()
        for (i, j), (y, run), (v, tap) in _products(pixels.shape[1:3], out, taps.shape[1:3], stride, padding):
            inner, outer = pixels[:, y, run].flatten(1), taps[:, v, tap].flatten(1).t()
            if (i, j) in written:
                values[:, i, j].addmm_(inner, outer)
            else:
                torch.mm(inner, outer, out=values[:, i, j])
                written.add((i, j))
        for i in range(out[0]):
            for j in range(out[1]):
                if (i, j) not in written:  # a filter that lies in the padding altogether
                    values[:, i, j] = 0
        ctx.save_for_backward(x, weight)
        ctx.geometry = out, stride, padding
        return values.permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        out, stride, padding = ctx.geometry
        pixels, taps, grads = _channels_last(x), _channels_last(weight), _channels_last(grad)
        of_x = torch.zeros_like(pixels) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(taps) if ctx.needs_input_grad[1] else None
        for (i, j), (y, run), (v, tap) in _products(pixels.shape[1:3], out, taps.shape[1:3], stride, padding):
            here = grads[:, i, j]
            if of_x is not None:
                of_x[:, y, run].flatten(1).addmm_(here, taps[:, v, tap].flatten(1))
            if of_weight is not None:
                of_weight[:, v, tap].flatten(1).addmm_(here.t(), pixels[:, y, run].flatten(1))
        back = [None if g is None else g.permute(0, 3, 1, 2) for g in (of_x, of_weight)]
        return back[0], back[1], None, None


def _channels_last(x: Tensor) -> Tensor:
    """[N, H, W, C] of [N, C, H, W], without a copy where the memory is laid out so."""
    return x.permute(0, 2, 3, 1).contiguous()


def output_size(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the convolution's output."""
    height, width = ((n + 2 * p - k) // s + 1 for n, k, s, p in zip(x.shape[2:], weight.shape[2:], stride, padding))
    return height, width


def conv2d_small_maps(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: tuple[int, int] = (1, 1), padding: tuple[int, int] = (0, 0)
) -> Tensor:
    """A convolution as products of whole minibatches, without the zeros around the map.

    Equivalent to ``F.conv2d(x, weight, bias, stride, padding)`` to rounding. Differentiable once.

    Args:
        x: float32 or float64 [B, C, H, W], fastest in channels_last.
        weight: [O, C, k, l] of the same dtype. bias: [O].

    Returns:
        [B, O, H', W'] in channels_last.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if x.ndim != 4 or weight.ndim != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x [B, C, H, W] and weight [O, C, k, l] must have the same C, got {list(x.shape)} and {list(weight.shape)}"
        )
    if min(output_size(x, weight, stride, padding)) < 1:
        raise ValueError(f"a filter of {list(weight.shape[2:])} does not fit on maps of {list(x.shape[2:])} padded by {padding}")
    out = _SmallMaps.apply(x, weight, stride, padding)
    return out if bias is None else out + bias[:, None, None]


class SmallMapConv2d(nn.Conv2d):
    """``nn.Conv2d`` that takes `conv2d_small_maps` where that is faster: on a CPU, in float32, for small maps and large
    minibatches."""

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of x [B, C, H, W]."""
        if self._is_small(x):
            return conv2d_small_maps(x, self.weight, self.bias, stride=self.stride, padding=self.padding)  # type: ignore[arg-type]
        return super().forward(x)

    def _is_small(self, x: Tensor) -> bool:
        # In bfloat16, and where a graph is recorded, the general convolution is what is wanted.
        if torch.jit.is_tracing() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or x.shape[0] < FEWEST_CELLS:
            return False
        height, width = output_size(x, self.weight, self.stride, self.padding)  # type: ignore[arg-type]
        return 1 <= height * width <= MOST_POSITIONS


def _suits(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.groups == 1
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and module.kernel_size != (1, 1)
        and min(module.in_channels, module.out_channels) >= FEWEST_CHANNELS
    )


def use_small_maps(module: nn.Module, enabled: bool = True) -> nn.Module:
    """Let every convolution in ``module`` that can be one be a `SmallMapConv2d` (or, not ``enabled``, an ``nn.Conv2d`` again), in
    place.

    Parameters and their names stay the same, so files, optimisers and wrappers made before or after see no difference.
    """
    for child in module.modules():
        if enabled and _suits(child):
            child.__class__ = SmallMapConv2d
        elif not enabled and type(child) is SmallMapConv2d:
            child.__class__ = nn.Conv2d  # type: ignore[assignment]
    return module
