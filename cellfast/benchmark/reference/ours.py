"""cellfast's side of the comparison, for `worker`: the library's own parts on the screen of the job.

``recipe`` perakis2021 is the reference's work done by cellfast: the same encoder and stem, augmentations, BatchNorm per view, Adam,
inverted and normalised input. ``default`` is what ``cellfast train`` does without options.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from cellfast.augment import AugmentConfig, TwoViews, center_crop
from cellfast.data import Loader
from cellfast.data.malloc import tune_malloc
from cellfast.losses import NTXentLoss
from cellfast.model_file import LoadedModel
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

    name = "cellfast"
    description = "cellfast"

    def __init__(self, job: dict[str, Any]) -> None:
        tune_malloc()
        self.job = job
        recipe = job.get("recipe", "perakis2021")
        values = {**RECIPES[recipe], "recipe": recipe, "encoder": job.get("encoder", "resnet18")}
        self.config = TrainConfig(**values)
        self.seed = job.get("seed", 0)
        self._model: SimCLR | None = None
        self._training: TrainingStep | None = None
        self._count = 0

    def versions(self) -> dict[str, str]:
        """Versions of the packages that do the work."""
        from importlib.metadata import version

        from cellfast import __version__

        return {"cellfast": __version__, **{name: version(name) for name in ("torchvision", "kornia", "numpy", "numba")}}

    def model(self) -> SimCLR:
        """The model, made once, with random weights."""
        if self._model is None:
            c = self.config
            self._model = build_model(
                ModelConfig(
                    c.encoder, CHANNELS, c.stem, c.projection_dim, c.projection_layers, input_transform=c.input_transform
                ),
                self.seed,
            )
        return self._model

    def training(self) -> TrainingStep:
        """The training step, made once."""
        if self._training is None:
            c = self.config
            optimizer = build_optimizer(self.model().train(), c.optimizer, lr=c.lr, weight_decay=c.weight_decay)
            module = TwoViewModel(self.model(), per_view=c.batch_norm == "per-view")
            loss = NTXentLoss(c.temperature)
            self._training = TrainingStep(
                module,
                loss,
                optimizer,
                device=torch.device("cpu"),
                amp=self.job.get("amp", False),
                chunk_size=self.job.get("chunk_size"),
            )
        return self._training

    def load(self) -> int:
        """Open the screen and gather every cell into minibatches once."""
        job = self.job
        self.screen = screen = Screen.open(job["screen"])
        self.loader: Loader | None = None
        self.scaling = PlateScaling(screen, self.config.scaling)
        augment = dict(self.config.augment)
        self.two_views = TwoViews(
            AugmentConfig.preset(augment.pop("preset"), **augment), CHANNELS, screen.crop_size, job["size"],
            memory_format=torch.channels_last,
        )  # fmt: skip
        for _ in Loader(screen, job["batch_size"], shuffle=False):
            pass
        return screen.num_cells

    def _minibatches(self) -> Any:
        if self.loader is None:
            self.loader = Loader(self.screen, self.job["batch_size"], shuffle=True, seed=self.seed, drop_last=True)
        for batch in self.loader:
            self._count += 1
            low, high = self.scaling(batch.rows)
            seed = views_seed(self.seed, self._count, 0)
            yield self.training().views(self.two_views, batch.crops, low, high, seed=seed), len(batch.rows)

    def augment(self, minibatches: int) -> int:
        """Gather and two views of every cell."""
        cells = 0
        for number, (_, count) in enumerate(self._minibatches(), 1):
            cells += count
            if number == minibatches:
                break
        return cells

    def loss(self, z: torch.Tensor) -> Callable[[], tuple[float, float]]:
        """NT-Xent by the operator."""

        def run() -> tuple[float, float]:
            leaf = z.detach().clone().requires_grad_()
            value = ntxent_loss(leaf, 0.1)
            value.backward()
            return float(value.detach()), float(leaf.grad.norm())

        return run

    def _update(self, views: torch.Tensor | ViewPieces) -> float:
        step = self.training()
        loss = step.compute_loss(views)
        value = float(loss.detach())
        step.update(loss)
        return value

    def step(self) -> Callable[[], float]:
        """One training step on ready views."""
        shape = (2 * self.job["batch_size"], CHANNELS, self.job["size"], self.job["size"])
        views = torch.rand(shape).to(memory_format=torch.channels_last)
        self.training()
        chunk_size = self.job.get("chunk_size")
        ready = views if chunk_size is None else ReadyPieces(views, chunk_size)
        return lambda: self._update(ready)

    def epoch(self) -> int:
        """One pass: gather, augment, train."""
        cells = 0
        for views, count in self._minibatches():
            self._update(views)
            cells += count
        return cells

    def train(self, finished: Callable[[int], bool]) -> tuple[int, float]:
        """Epochs until ``finished``; the learning rate is constant, as the reference's is in its first ten epochs."""
        step, loss = 0, float("nan")
        while not finished(step):
            for views, _ in self._minibatches():
                loss = self._update(views)
                step += 1
                if finished(step):
                    break
        return step, loss

    def embed(self) -> np.ndarray:
        """h of every cell in store order, in evaluation mode."""
        from cellfast.embedding.embed_store import CropEncoder

        screen = Screen.open(self.job["screen"])
        scaling = PlateScaling(screen, self.config.scaling)
        # What a model file would say, without writing one.
        loaded = SimpleNamespace(
            model=self.model(), scaling="screen", low=scaling.low, high=scaling.high, output_size=self.job["size"]
        )
        encoder = CropEncoder(as_loaded(loaded), device=torch.device("cpu"), amp=self.job.get("amp", False))
        values = np.empty((screen.num_cells, encoder.num_features), np.float32)
        start = 0
        for batch in Loader(screen, self.job["batch_size"], shuffle=False):
            values[start : start + len(batch.rows)] = encoder(batch.crops, scaling.low, scaling.high).numpy()
            start += len(batch.rows)
        self.model().train()
        return values

    def score(self, features: np.ndarray, metadata: Any) -> tuple[float, float]:
        """NSC and NSCB of wells (mean), TVN with λ 1 as the reference's, treatments (median)."""
        from cellfast.profiles.build import collapse
        from cellfast.profiles.evaluate import evaluate_profiles
        from cellfast.profiles.normalize import normalize_profiles
        from cellfast.profiles.steps import RECIPES, parse_steps

        wells = collapse(profile_table(features, metadata), ["Metadata_Plate", "Metadata_Well"], "mean")
        wells, _ = normalize_profiles(wells, parse_steps(RECIPES["perakis2021"]))
        evaluation = evaluate_profiles(wells, two_numbers())
        if self.job.get("pictures"):
            from cellfast.profiles.plots import write_pictures

            write_pictures(evaluation, os.path.join(self.job["folder"], "evaluation"))
        result = evaluation.result
        return result["nsc"]["accuracy"], result["nscb"]["accuracy"]

    def evaluate(self, profiles: np.ndarray, metadata: Any) -> Callable[[], tuple[float, float]]:
        """NSC and NSCB of treatments."""
        from cellfast.profiles.evaluate import evaluate_profiles

        table = profile_table(profiles, metadata)

        def run() -> tuple[float, float]:
            result = evaluate_profiles(table, two_numbers()).result
            return result["nsc"]["accuracy"], result["nscb"]["accuracy"]

        return run

    def agree(self) -> dict[str, Any]:
        """The same steps from the reference's initial weights on the same crops: see the adapter."""
        job = self.job
        screen = Screen.open(job["screen"])
        model = self.model()
        load_reference_weights(model, torch.load(job["weights"], weights_only=True))
        batch = next(iter(Loader(screen, job["batch_size"], shuffle=False)))
        scaling = PlateScaling(screen, self.config.scaling)
        first = center_crop(batch.crops, scaling.low, scaling.high, job["size"])
        seen = model.input_transform(first)
        difference = float((seen - torch.from_numpy(np.load(job["inputs"], allow_pickle=False))).abs().max())
        if job.get("double"):
            # Adam's first steps make much of rounding: in float64 and from the very same inputs only the method is compared.
            model.input_transform = torch.nn.Identity()
            model, first = model.double(), torch.from_numpy(np.load(job["inputs"], allow_pickle=False)).double()
        views = torch.cat((first, first.flip(3))).to(memory_format=torch.channels_last)
        training, losses = self.training(), []
        for _ in range(job["steps"]):
            # As compute_loss, which turns z to float32 first.
            loss = training.loss(training.module(views)) if job.get("double") else training.compute_loss(views)
            losses.append(float(loss.detach()))
            training.update(loss)
        model.eval()
        with torch.no_grad():
            h = model.encode(first)
        return {"losses": losses, "features": h.flatten()[:64].tolist(), "largest_input_difference": difference}


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
    """Options that leave out what the reference does not give: intervals and average precision."""
    from cellfast.profiles.evaluate import EvaluationOptions

    return EvaluationOptions(num_resamples=0, num_permutations=0, average_precision=False)


def as_loaded(values: SimpleNamespace) -> LoadedModel:
    """``values`` as the model that `CropEncoder` takes."""
    return values  # type: ignore[return-value]


# torchvision's children in the order in which a Sequential numbers them.
_CHILDREN = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


def load_reference_weights(model: SimCLR, state: dict[str, torch.Tensor]) -> None:
    """Weights of the reference's or the baseline's model (``features.0…``, ``l1``, ``l2``) → the same places here; all must fit."""
    renamed = {}
    for name, value in state.items():
        head, _, rest = name.partition(".")
        if head == "features":
            number, _, rest = rest.partition(".")
            renamed[f"encoder.{_CHILDREN[int(number)]}.{rest}"] = value
        else:
            renamed[f"projection.{ {'l1': 0, 'l2': 2}[head] }.{rest}"] = value
    model.load_state_dict(renamed)
