"""Memory that minibatches use in turn."""

from __future__ import annotations

from typing import Any

import torch


class Buffer:
    """Memory for one minibatch; on a GPU, ``host`` is pinned and ``crops`` lies on the device, on a CPU they are the same."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.host = torch.empty(shape, dtype=dtype, pin_memory=cuda)
        self.crops = torch.empty(shape, dtype=dtype, device=device) if cuda else self.host
        self.array = self.host.numpy()
        # CUDA events: the copy to the device has ended; whoever uses the crops has done so. The memory may be that of tensors which
        # kernels in this stream still read: the first copy waits for those too.
        self.copied: Any = None
        self.used: Any = torch.cuda.current_stream(device).record_event() if cuda else None
