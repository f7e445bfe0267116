"""The training step as one recorded CUDA graph: for minibatches so small that launching kernels takes longer than running
them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cellfast.errors import CellfastError, option
from cellfast.training.gradient_cache import ViewPieces
from cellfast.training.step import TrainingStep

_WARM_UP = 3


class GraphedStep(TrainingStep):
    """`TrainingStep` whose forward and backward passes are recorded with the first minibatch and replayed with every later one.

    Clipping and the optimiser run outside the graph: the learning rate stays an ordinary number. Arguments as `TrainingStep`;
    CUDA, one process, one piece, minibatches of one shape.

    Raises:
        CellfastError: a CPU, several processes, or a ``chunk_size``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        reason = None
        if self.device.type != "cuda":
            reason = f"they need a GPU, and this runs on {self.device}"
        elif isinstance(self.module, torch.nn.parallel.DistributedDataParallel):
            reason = "they are for one process"
        elif self.chunk_size is not None:
            reason = "a minibatch in pieces (chunk_size) is not recorded"
        if reason:
            raise CellfastError(f"{option('cuda_graphs', True)} cannot be used: {reason}")
        self._graph: torch.cuda.CUDAGraph | None = None

    def compute_loss(self, views: Tensor | ViewPieces) -> Tensor:
        """The loss of a minibatch of views; its gradients are already in the parameters."""
        assert isinstance(views, Tensor)
        if self._graph is None:
            self._record(views)
        assert self._graph is not None
        if views.shape != self._views.shape:
            raise CellfastError(f"the recorded step takes views {list(self._views.shape)}, got {list(views.shape)}")
        self._views.copy_(views)
        self._graph.replay()
        # The next replay writes over the recorded loss.
        return self._loss.clone()

    def _backward(self, loss: Tensor) -> None:
        pass

    def _record(self, views: Tensor) -> None:
        self._views = views.clone()
        # The warm-up's passes move BatchNorm's running averages; recording itself computes nothing.
        buffers = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        here, side = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self.optimizer.zero_grad(set_to_none=True)
                super().compute_loss(self._views).backward()
        here.wait_stream(side)
        # Without gradients the recorded pass makes its own and writes, not adds to, them at every replay.
        self.optimizer.zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        # Not the default, under which what the loader's thread does meanwhile (pinned memory, events) ends the recording with an
        # error.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            loss = super().compute_loss(self._views)
            loss.backward()
        self._loss = loss.detach()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
