"""Encoded TIFF planes to tensors by DALI, a group at a time; a file that cannot be decoded costs its own field only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellfast.data.dali import dali_type, device_id, require_dali, stream_of
from cellfast.errors import CellfastError

HOW = ("cpu", "mixed")


class PlaneDecoder:
    """Decodes the files of fields to [C, H, W] on ``device``: on the host's threads (``cpu``), or by nvImageCodec's GPU decoders for what they
    can (``mixed``).

    On a GPU the planes are ready in the order of torch's current stream.

    Args:
        dtype: uint8 or uint16, of all files.
        shape: (H, W) of all files.
        planes: the most planes decoded together.

    Raises:
        CellfastError: an unknown ``how``, ``mixed`` without a GPU, or DALI missing.
    """

    def __init__(
        self, dtype: np.dtype, shape: tuple[int, int], planes: int, device: torch.device, *, how: str = "cpu", threads: int = 1
    ) -> None:
        if how not in HOW or (how == "mixed" and device.type != "cuda"):
            raise CellfastError(f"decoding must be cpu, or mixed on a GPU, got {how!r} on {device}")
        self.dtype, self.shape, self.planes, self.device = np.dtype(dtype), tuple(shape), planes, device
        self.how, self.threads = how, threads
        self._dali = require_dali("--decode dali", "--decode host")
        self._pipe: Any = None
        # DALI's first complaint about one field.
        self.failure = ""

    def decode(self, fields: Sequence[Sequence[np.ndarray]]) -> list[Tensor | None]:
        """Planes uint8 or uint16 [C, H, W] of each field, given the bytes of its C files; None for one that cannot be decoded."""
        if not fields:
            return []
        try:
            return self._run(fields)
        except (RuntimeError, ValueError) as error:
            self._pipe = None  # DALI's state is unknown after an error
            if len(fields) == 1:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self.failure = self.failure or " ".join(str(error).split())[:300]
                return [None]
        return [self.decode([field])[0] for field in fields]

    def _run(self, fields: Sequence[Sequence[np.ndarray]]) -> list[Tensor | None]:
        pipe = self._pipe = self._pipe or self._build()
        pipe.feed_input("encoded", [content for field in fields for content in field])
        (output,) = pipe.run(*stream_of(self.device))
        height, width = self.shape
        if {tuple(shape) for shape in output.shape()} != {(height, width, 1)}:
            raise ValueError("a plane of another shape than its header tells")
        planes = torch.from_dlpack(output.as_tensor()).view(-1, height, width)
        return list(planes.split([len(field) for field in fields]))

    def _build(self) -> Any:
        dali, cuda = self._dali, self.device.type == "cuda"
        pipe = dali.Pipeline(
            batch_size=self.planes, num_threads=self.threads, device_id=device_id(self.device), prefetch_queue_depth=1
        )
        with pipe:
            content = dali.fn.external_source(name="encoded", dtype=dali.types.UINT8, ndim=1, batch=True, no_copy=False)
            # Both types are needed: without dtype the result is silently 8-bit.
            images = dali.fn.decoders.image(
                content,
                device=self.how,
                output_type=dali.types.ANY_DATA,
                dtype=dali_type(dali, self.dtype),
                adjust_orientation=False,
            )
            pipe.set_outputs(images.gpu() if cuda and self.how == "cpu" else images)
        pipe.build()
        return pipe
