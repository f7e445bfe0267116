"""cellfast's side of the comparison, for `worker`: the library's own parts on the screen of the job.

``recipe`` perakis2021 is the reference's work done by cellfast: the same encoder and stem, augmentations, BatchNorm per view, Adam,
inverted and normalised input. ``default`` is what ``cellfast train`` does without options.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from cellfast.augment import AugmentConfig, TwoViews, center_crop
from cellfast.data import Loader
from cellfast.data.malloc import tune_malloc
from cellfast.losses import NTXentLoss
from cellfast.models import ModelConfig, SimCLR, build_model
from cellfast.ops import ntxent_loss
from cellfast.screens import Screen
from cellfast.training.config import RECIPES, TrainConfig
from cellfast.training.gradient_cache import ViewPieces
from cellfast.training.optimizers import build_optimizer
from cellfast.training.scaling import PlateScaling
from cellfast.training.step import TrainingStep, TwoViewModel, views_seed

CHANNELS = 3


class ReadyPieces(ViewPieces):
    """Pieces of views that are there already, instead of pieces that are made when asked for."""

    def __init__(self, views: torch.Tensor, chunk_size: int) -> None:
        self.num_cells = len(views) // 2
        self.cells = [slice(start, min(start + chunk_size, self.num_cells)) for start in range(0, self.num_cells, chunk_size)]
        self._halves = views.unflatten(0, (2, self.num_cells))

    def __getitem__(self, piece: int) -> torch.Tensor:
        """Views [2k, C, s, s] of the k cells of ``piece``."""
        return self._halves[:, self.cells[piece]].flatten(0, 1).contiguous(memory_format=torch.channels_last)


class Implementation:
    """cellfast, with the values of a recipe and the job's encoder and sizes."""

    packages = ("cellfast", "torchvision", "kornia", "numpy", "numba")

    def __init__(self, job: dict[str, Any]) -> None:
        tune_malloc()
        self.job, self.seed, self._count = job, job.get("seed", 0), 0
        recipe = job.get("recipe", "perakis2021")
        self.config = TrainConfig(**{**RECIPES[recipe], "recipe": recipe, "encoder": job.get("encoder", "resnet18")})

    @cached_property
    def _model(self) -> SimCLR:
        c = self.config
        config = ModelConfig(
            c.encoder, CHANNELS, c.stem, c.projection_dim, c.projection_layers, input_transform=c.input_transform
        )
        return build_model(config, self.seed)

    def model(self) -> SimCLR:
        """The model, made once, with random weights."""
        return self._model

    @cached_property
    def _training(self) -> TrainingStep:
        c, job = self.config, self.job
        optimizer = build_optimizer(self._model.train(), c.optimizer, lr=c.lr, weight_decay=c.weight_decay)
        return TrainingStep(
            TwoViewModel(self._model, per_view=c.batch_norm == "per-view"), NTXentLoss(c.temperature), optimizer,
            device=torch.device("cpu"), amp=job.get("amp", False), chunk_size=job.get("chunk_size"),
        )  # fmt: skip

    @cached_property
    def _screen(self) -> Screen:
        return Screen.open(self.job["screen"])

    @cached_property
    def _scaling(self) -> PlateScaling:
        return PlateScaling(self._screen, self.config.scaling)

    def load(self) -> int:
        """Open the screen and gather every cell into minibatches once."""
        self.__dict__.pop("_screen", None)
        self.__dict__.pop("_scaling", None)
        augment = dict(self.config.augment)
        self.two_views = TwoViews(
            AugmentConfig.preset(augment.pop("preset"), **augment), CHANNELS, self._screen.crop_size, self.job["size"],
            memory_format=torch.channels_last,
        )  # fmt: skip
        for _ in Loader(self._screen, self.job["batch_size"], shuffle=False):
            pass
        self.loader = Loader(self._screen, self.job["batch_size"], shuffle=True, seed=self.seed, drop_last=True)
        return self._screen.num_cells

    def minibatches(self) -> Iterator[tuple[Any, int]]:
        """One pass: cells gathered, two views of each."""
        for batch in self.loader:
            self._count += 1
            low, high = self._scaling(batch.rows)
            seed = views_seed(self.seed, self._count, 0)
            yield self._training.views(self.two_views, batch.crops, low, high, seed=seed), len(batch.rows)

    def pair(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor | ViewPieces:
        """The views of a minibatch; in pieces where the job has a ``chunk_size``."""
        views = torch.cat((first, second)).to(memory_format=torch.channels_last)
        chunk_size = self.job.get("chunk_size")
        return views if chunk_size is None else ReadyPieces(views, chunk_size)

    def update(self, views: torch.Tensor | ViewPieces) -> float:
        """One training step."""
        step = self._training
        double = isinstance(views, torch.Tensor) and views.dtype == torch.float64  # compute_loss turns z to float32
        loss = step.loss(step.module(views)) if double else step.compute_loss(views)
        value = float(loss.detach())
        step.update(loss)
        return value

    def nt_xent(self, z: torch.Tensor) -> torch.Tensor:
        """NT-Xent by the operator."""
        return ntxent_loss(z, 0.1)

    def embed(self) -> np.ndarray:
        """h of every cell in store order, in evaluation mode."""
        from cellfast.embedding.encoder import CropEncoder

        screen = Screen.open(self.job["screen"])
        scaling = PlateScaling(screen, self.config.scaling)
        # What a model file would say, without writing one.
        loaded: Any = SimpleNamespace(
            model=self._model, scaling="screen", low=scaling.low, high=scaling.high, output_size=self.job["size"]
        )
        encoder = CropEncoder(loaded, device=torch.device("cpu"), amp=self.job.get("amp", False))
        values = np.empty((screen.num_cells, encoder.num_features), np.float32)
        start = 0
        for batch in Loader(screen, self.job["batch_size"], shuffle=False):
            values[start : start + len(batch.rows)] = encoder(batch.crops, scaling.low, scaling.high).numpy()
            start += len(batch.rows)
        return values

    def score(self, features: np.ndarray, metadata: Any) -> tuple[float, float]:
        """NSC and NSCB of wells (mean), TVN with λ 1 as the reference's, treatments (median)."""
        from cellfast.profiles.plots import write_pictures

        evaluation = evaluated_wells(features, metadata, ["tvn:lambda=1"])
        if self.job.get("pictures"):
            write_pictures(evaluation, os.path.join(self.job["folder"], "evaluation"))
        return evaluation.result["nsc"]["accuracy"], evaluation.result["nscb"]["accuracy"]

    def evaluate(self, profiles: np.ndarray, metadata: Any) -> Callable[[], tuple[float, float]]:
        """NSC and NSCB of treatments."""
        from cellfast.profiles.evaluate import evaluate_profiles

        table = profile_table(profiles, metadata)

        def run() -> tuple[float, float]:
            result = evaluate_profiles(table, two_numbers()).result
            return result["nsc"]["accuracy"], result["nscb"]["accuracy"]

        return run

    def encoder_input(self, count: int) -> torch.Tensor:
        """The first ``count`` crops, scaled to 0–1; the model's own input transform comes after."""
        batch = next(iter(Loader(self._screen, count, shuffle=False)))
        return center_crop(batch.crops, self._scaling.low, self._scaling.high, self.job["size"])

    def takes_input(self, x: torch.Tensor) -> torch.Tensor:
        """What the encoder sees of ``x``."""
        return self._model.input_transform(x)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """h."""
        return self._model.encode(x)

    def take_weights(self, state: dict[str, torch.Tensor]) -> None:
        """Weights of the reference's or the baseline's model (``features.0…``, ``l1``, ``l2``) to the same places here; all must fit."""
        # torchvision's children in the order in which a Sequential numbers them.
        children = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
        renamed = {}
        for name, value in state.items():
            head, _, rest = name.partition(".")
            if head == "features":
                number, _, rest = rest.partition(".")
                renamed[f"encoder.{children[int(number)]}.{rest}"] = value
            else:
                renamed[f"projection.{ {'l1': 0, 'l2': 2}[head] }.{rest}"] = value
        self._model.load_state_dict(renamed)


def profile_table(features: np.ndarray, metadata: Any) -> Any:
    """``features`` and the metadata a user's file would hold as a table of profiles."""
    from cellfast.metadata.batches import fill_batches
    from cellfast.metadata.canonical import canonical_metadata
    from cellfast.metadata.columns import find_columns
    from cellfast.profiles.table import ProfileTable

    frame = metadata.drop(columns="Replicate", errors="ignore")
    known, _ = fill_batches(canonical_metadata(frame, find_columns(list(frame.columns))))
    return ProfileTable(known, np.ascontiguousarray(features), [f"h{i:03d}" for i in range(features.shape[1])])


def two_numbers() -> Any:
    """The published convention, as the reference has it: equal sets of batches, and profiles that cannot be right count as wrong. No
    intervals and no average precision, which it does not give.
    """
    from cellfast.profiles.evaluate import EvaluationOptions

    return EvaluationOptions(num_permutations=0, average_precision=False, batch_rule="joined", unanswerable="count")


def evaluated_wells(features: np.ndarray, metadata: Any, steps: list[str]) -> Any:
    """Cells' features to NSC and NSCB: means of wells, the normalisation ``steps``, medians of treatments."""
    from cellfast.profiles.build import collapse
    from cellfast.profiles.evaluate import evaluate_profiles
    from cellfast.profiles.normalize import normalize_profiles
    from cellfast.profiles.steps import parse_steps

    wells = collapse(profile_table(features, metadata), ["Metadata_Plate", "Metadata_Well"], "mean")
    wells, _ = normalize_profiles(wells, parse_steps(steps))
    return evaluate_profiles(wells, two_numbers())
