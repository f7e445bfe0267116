"""Crops to features: a plate's scaling, the model's window, test-time rotations, and minibatches that shrink when memory runs
out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import torch
from torch.fx.experimental.optimization import fuse

from cellfast.augment import center_crop
from cellfast.embedding.cells import CellSource
from cellfast.embedding.options import FEATURES, ROTATIONS
from cellfast.errors import CellfastError, option
from cellfast.model_file import LoadedModel
from cellfast.models import SimCLR
from cellfast.ops.small_maps import use_small_maps


class CropEncoder:
    """Crops → features, in the model's own scaling and window.

    Args:
        model: from `cellfast.load_model`.
        features: ``h`` (encoder output, what is profiled) or ``z`` (projection).
        device: where the encoder runs.
        amp: bfloat16 autocast.
        tta: the mean over 1 view, 4 rotations by right angles, or 8 with their mirror images.
        compile: ``torch.compile`` the network.
        batch_size: with ``compile`` every minibatch is padded to this size; 0: to that of the largest so far.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        features: str = "h",
        device: torch.device,
        amp: bool = False,
        tta: int = 1,
        compile: bool = False,
        batch_size: int = 0,
    ) -> None:
        if features not in FEATURES:
            raise CellfastError(f"features must be h or z, got {features!r}")
        if tta not in ROTATIONS:
            raise CellfastError(f"{option('tta')} must be one of {', '.join(map(str, ROTATIONS))}, got {tta!r}")
        self.loaded, self.features, self.device, self.amp, self.tta = model, features, device, amp, tta
        self.network: SimCLR = model.model.to(device=device, memory_format=torch.channels_last).eval()
        self.num_features = self.network.num_features if features == "h" else self.network.config.projection_dim
        # Batch normalisation folded into the convolutions: the same function to rounding, a pass over each activation less.
        encoder = use_small_maps(copy.deepcopy(self.network.encoder), False)  # folding looks for torch's own convolutions
        self.folded = use_small_maps(fuse(encoder).to(memory_format=torch.channels_last))
        self.compiled = compile
        self._run: Callable[[torch.Tensor], torch.Tensor] = (
            torch.compile(self._features, dynamic=False) if compile else self._features
        )
        self._padded_size = batch_size
        # Called with (old size, new size) when memory ran out and the minibatch was halved.
        self.on_shrink: Callable[[int, int], None] = lambda old, new: None
        self.most = 0

    def __call__(self, crops: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Features float32 [B, F] on the CPU; otherwise as `launch`."""
        return self.launch(crops, low, high).cpu()

    @torch.inference_mode()
    def launch(self, crops: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Features float32 [B, F] on the device, which may still be at work on them, of crops uint8 or uint16 [B, C, S, S]; low,
        high: [C] or [B, C].

        A minibatch that does not fit in memory is halved, and later ones are cut to the size that went through.

        Raises:
            CellfastError: not even one cell fits.
        """
        if len(crops) == 0:
            return torch.empty(0, self.num_features, device=self.device)
        low, high = low.to(self.device), high.to(self.device)
        done: list[torch.Tensor] = []
        start = 0
        while start < len(crops):
            size = min(self.most or len(crops), len(crops) - start)
            cells = slice(start, start + size)
            try:
                features = self._encode(crops[cells], *(bound if bound.ndim == 1 else bound[cells] for bound in (low, high)))
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise CellfastError(
                        f"out of memory on {self.device} with one cell at a time: free memory there, or use "
                        f"{option('device', 'cpu')}"
                    ) from error
                self.most = (size + 1) // 2
                self.on_shrink(size, self.most)
                # What the failed try allocated is freed with its traceback, then the allocator's cache is.
                del error
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            done.append(features)
            start += size
        return done[0] if len(done) == 1 else torch.cat(done)

    def _encode(self, crops: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        crops = crops.to(self.device, non_blocking=True)
        x = center_crop(crops, low, high, self.loaded.output_size, memory_format=torch.channels_last)
        count = len(x)
        if self.compiled:
            self._padded_size = max(self._padded_size, count)
            if count < self._padded_size and not self.most:
                x = torch.cat([x, x.new_zeros(self._padded_size - count, *x.shape[1:])]).contiguous(
                    memory_format=torch.channels_last
                )
        total: torch.Tensor | None = None
        for turn in range(self.tta):
            view = x if turn == 0 else torch.rot90(x, turn % 4, (2, 3))
            if turn >= 4:
                view = view.flip(3)
            out = self._run(view.contiguous(memory_format=torch.channels_last)).float()
            total = out if total is None else total.add_(out)
        assert total is not None
        return (total if self.tta == 1 else total / self.tta)[:count]

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            h = self.folded(self.network.input_transform(x))
            return h if self.features == "h" else self.network.projection(h)


def plate_scaling(model: LoadedModel, source: CellSource) -> Callable[[str], tuple[torch.Tensor, torch.Tensor]]:
    """Plate → (low, high), float32 [C], that the model has its pixels scaled by."""

    @cache
    def of_plate(plate: str) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = (torch.tensor(bound, dtype=torch.float32) for bound in source.plate_scaling(plate))
        return low, high

    return of_plate if model.scaling == "plate" else lambda plate: (model.low, model.high)


def is_out_of_memory(error: BaseException) -> bool:
    """True for what torch and Python raise when an allocation fails, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in text
        for sign in ("not enough memory", "can't allocate memory", "CUDA out of memory", "could not create a memory object")
    )


def feature_names(features: str, count: int) -> list[str]:
    """``h000 … h511``: as many digits as the last needs, at least three."""
    digits = max(3, len(str(count - 1)))
    return [f"{features}{i:0{digits}d}" for i in range(count)]
