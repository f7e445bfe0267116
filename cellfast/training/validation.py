"""Validation on held-out cells: NT-Xent of two views, and whether a cell's nearest neighbour had the same treatment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cellfast.augment import TwoViews, center_crop
from cellfast.data.gather import RowGather
from cellfast.models import SimCLR
from cellfast.ops import ntxent_loss
from cellfast.training.gradient_cache import ViewPieces
from cellfast.training.scaling import PlateScaling

if TYPE_CHECKING:
    from cellfast.screens import Screen


@dataclass(frozen=True)
class ValidationResult:
    """What one validation measured.

    ``loss``: mean NT-Xent. ``retrieval``: share of ``num_queries`` cells whose nearest other-well neighbour (cosine of h) has
        their
    treatment; ``chance``: what a neighbour drawn at random would give. None where no treatment is held out in two wells.
    """

    loss: float
    retrieval: float | None
    chance: float | None
    num_queries: int


class Validation:
    """Measures a model on a fixed set of held-out cells with fixed views.

    Args:
        screen: the screen.
        rows: global rows held out.
        two_views: the training's augmentation.
        scaling: rows (int64 tensor) → (low, high) tensors.
        batch_size: cells per minibatch, as in training: NT-Xent depends on it.
        temperature: as in training.
        most: at most so many cells, drawn by ``seed``.
        chunk_size: encode a minibatch in pieces of so many cells, as in training; the loss is over the whole minibatch all the
            same.
    """

    def __init__(
        self,
        screen: Screen,
        rows: np.ndarray,
        two_views: TwoViews,
        scaling: PlateScaling,
        *,
        batch_size: int,
        temperature: float,
        most: int,
        seed: int,
        device: torch.device,
        amp: bool,
        chunk_size: int | None = None,
    ) -> None:
        generator = np.random.Generator(np.random.PCG64([seed, 0xDA7A]))
        chosen = np.sort(generator.permutation(rows)[:most]) if len(rows) > most else np.sort(rows)
        # Sorted rows come well by well; a minibatch of one well's cells would be a harder task than the training's.
        self.order = generator.permutation(len(chosen))
        self.rows, self.two_views, self.scaling = chosen, two_views, scaling
        self.batch_size, self.temperature, self.seed, self.device, self.amp = batch_size, temperature, seed, device, amp
        self.chunk_size = chunk_size or batch_size
        gather = RowGather(screen)
        crops = np.empty((len(chosen), *gather.row_shape), dtype=gather.dtype)
        gather.copy(chosen, crops)
        gather.close()
        self.crops = torch.from_numpy(crops)
        meta = screen.metadata().iloc[chosen]
        self.well = (meta["Metadata_Plate"].astype(str) + "\0" + meta["Metadata_Well"].astype(str)).factorize()[0]
        named = (meta["Metadata_Compound"] != "").to_numpy()
        treatment = (meta["Metadata_Compound"].astype(str) + "\0" + meta["Metadata_Concentration"].astype(str)).factorize()[0]
        self.treatment = np.where(named, treatment, -1)

    def __len__(self) -> int:
        return len(self.rows)

    @torch.no_grad()
    def measure(self, model: SimCLR) -> ValidationResult:
        """Evaluate ``model`` in evaluation mode; its mode and all random states stay as they were."""
        training = model.training
        model.eval()
        try:
            losses, weights, features = [], [], []
            for number, start in enumerate(range(0, len(self.rows), self.batch_size)):
                index = self.order[start : start + self.batch_size]
                crops, low, high = self._minibatch(index)
                pieces = ViewPieces(
                    self.two_views, crops, low, high, seed=self.seed + 1_000_003 * (number + 1), chunk_size=self.chunk_size
                )
                if len(index) > 1:
                    parts = [self._run(lambda views: model(views)[1], pieces[piece]) for piece in range(len(pieces))]
                    # [2B, D] with the first views of all cells first, as the loss pairs them.
                    z = torch.cat([part.unflatten(0, (2, -1)) for part in parts], dim=1).flatten(0, 1)
                    losses.append(float(ntxent_loss(z, self.temperature)))
                    weights.append(len(index))
                for cells in pieces.cells:
                    bottom, top = (bound if bound.ndim == 1 else bound[cells] for bound in (low, high))
                    plain = center_crop(crops[cells], bottom, top, self.two_views.output_size, memory_format=torch.channels_last)
                    features.append(self._run(model.encode, plain).cpu())
            h = torch.empty((len(self.rows), features[0].shape[1]))
            h[torch.from_numpy(self.order)] = torch.cat(features)
            loss = float(np.average(losses, weights=weights)) if losses else float("nan")
            return ValidationResult(loss, *retrieval(h, self.treatment, self.well))
        finally:
            model.train(training)

    def _run(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            return network(x).float()

    def _minibatch(self, index: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        low, high = self.scaling(torch.from_numpy(self.rows[index]))
        return self.crops[torch.from_numpy(index)].to(self.device), low.to(self.device), high.to(self.device)


def retrieval(h: Tensor, treatment: np.ndarray, well: np.ndarray) -> tuple[float | None, float | None, int]:
    """Share of cells whose nearest neighbour in another well (cosine) has their treatment, the share by chance, and the cells
    counted.

    Args:
        h: features [n, F].
        treatment: int [n], −1: unknown (neither query nor candidate).
        well: int [n].
    """
    known = np.flatnonzero(treatment >= 0)
    if len(known) < 2:
        return None, None, 0
    unit = torch.nn.functional.normalize(h[torch.from_numpy(known)].double() - h.double().mean(0), dim=1)
    of, where = torch.from_numpy(treatment[known]), torch.from_numpy(well[known])
    other = where[:, None] != where[None, :]
    same = of[:, None] == of[None, :]
    candidates, right = other.sum(1), (other & same).sum(1)
    query = right > 0
    if not bool(query.any()):
        return None, None, 0
    nearest = (unit @ unit.T).masked_fill(~other, -torch.inf).argmax(1)
    hits = (of[nearest] == of)[query].double().mean()
    return float(hits), float((right[query] / candidates[query]).mean()), int(query.sum())
