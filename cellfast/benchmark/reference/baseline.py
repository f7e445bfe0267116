"""A plain PyTorch implementation of the method written from the paper (Perakis et al., arXiv 2103.16670), for `worker`.

It stands in where no checkout of the reference implementation is given, and does what a reader of the paper would write with
torchvision, pandas and scikit-learn: one image file per cell, augmentations per image on the CPU, two forward passes, NT-Xent from a
matrix of similarities, mean per well, TVN, median per treatment, one classifier fit per treatment. It is no copy of the reference and
better in places: its loss is one matrix product, pixels do not wrap around, embedding runs without gradients.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

TEMPERATURE, PROJECTION_DIM, LEARNING_RATE, WEIGHT_DECAY = 0.1, 256, 3e-4, 1e-5


class Strips(Dataset):
    """Cells from image files, three channels side by side, decoded once when it is made."""

    def __init__(self, index: str, folder: str, size: int, transform: Callable[[Tensor], Any]) -> None:
        from PIL import Image

        self.transform, self.images = transform, []
        for name in pd.read_csv(index)["Image_Name"]:
            with Image.open(os.path.join(folder, name)) as image:
                strip = torch.from_numpy(np.array(image))
            crop = torch.stack(strip.chunk(3, dim=1))
            self.images.append(v2.functional.resize(crop, [size, size], antialias=True) if crop.shape[1] != size else crop)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> Any:
        return self.transform(self.images[number])


class TwoAugmentedViews:
    """A crop uint8 [3, s, s] → two views float32: the paper's augmentations by torchvision."""

    def __init__(self, size: int) -> None:
        odd = max(3, size // 10 // 2 * 2 + 1)
        self.augment = v2.Compose(
            [
                v2.RandomResizedCrop(size, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ElasticTransform(alpha=50.0, sigma=5.0)], p=0.5),
                v2.RandomApply([v2.ColorJitter(0.2, 0.2, 0.2, 0.2)], p=0.8),
                v2.RandomApply([v2.GaussianBlur(odd, (0.1, 2.0))], p=0.5),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((0.5,) * 3, (0.25,) * 3),
            ]
        )

    def __call__(self, crop: Tensor) -> tuple[Tensor, Tensor]:
        return self.augment(crop), self.augment(crop)


def plain(crop: Tensor) -> Tensor:
    """The crop as the encoder sees it without augmentation."""
    return (crop.float() / 255 - 0.5) / 0.25


class Network(nn.Module):
    """A ResNet without its classifier, and a projection head of two linear layers."""

    def __init__(self, encoder: str, dim: int) -> None:
        super().__init__()
        network = getattr(torchvision.models, encoder)(weights=None)
        width = network.fc.in_features
        self.features = nn.Sequential(*list(network.children())[:-1])
        self.l1, self.l2 = nn.Linear(width, width), nn.Linear(width, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.features(x).flatten(1)
        return h, self.l2(F.relu(self.l1(h)))


def nt_xent(first: Tensor, second: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Cross entropy of every row's similarities to all others against its partner's place (equation 1 of the paper)."""
    z = F.normalize(torch.cat((first, second)), dim=1)
    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(float("-inf"))
    half = len(first)
    partner = torch.arange(2 * half).roll(half)
    return F.cross_entropy(similarity, partner)


class Implementation:
    """The plain implementation with the job's encoder and sizes."""

    packages = ("torchvision", "numpy", "pandas", "scikit-learn")

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        torch.manual_seed(job.get("seed", 0))

    @cached_property
    def _network(self) -> Network:
        return Network(self.job.get("encoder", "resnet18"), self.job.get("dim", PROJECTION_DIM))

    @cached_property
    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self._network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def model(self) -> Network:
        """The network, made once, with random weights."""
        return self._network

    def _strips(self, transform: Callable[[Tensor], Any]) -> Strips:
        return Strips(self.job["index"], self.job["strips"], self.job["size"], transform)

    def load(self) -> int:
        """Decode every file."""
        job, data = self.job, self._strips(TwoAugmentedViews(self.job["size"]))
        self.loader = DataLoader(data, batch_size=job["batch_size"], shuffle=True, drop_last=True, num_workers=job["workers"])
        return len(data)

    def minibatches(self) -> Iterator[tuple[Any, int]]:
        """One pass over the loader."""
        return ((views, len(views[0])) for views in self.loader)

    def pair(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The views of a minibatch."""
        return first, second

    def update(self, views: tuple[Tensor, Tensor]) -> float:
        """One training step: a forward pass for each view."""
        self._optimizer.zero_grad()
        loss = nt_xent(*(self._network(view)[1] for view in views))
        loss.backward()
        self._optimizer.step()
        return float(loss.detach())

    def nt_xent(self, z: Tensor) -> Tensor:
        """NT-Xent from the matrix of similarities."""
        return nt_xent(*z.chunk(2))

    @torch.no_grad()
    def embed(self) -> np.ndarray:
        """h of every cell in evaluation mode."""
        network = self._network.eval()
        loader = DataLoader(self._strips(plain), batch_size=self.job["batch_size"], num_workers=self.job["workers"])
        return np.concatenate([network(x)[0].numpy() for x in loader])

    def score(self, features: np.ndarray, metadata: pd.DataFrame) -> tuple[float, float]:
        """NSC and NSCB of means per well, TVN and medians per treatment."""
        return plain_scores(features, metadata)

    def evaluate(self, profiles: np.ndarray, metadata: pd.DataFrame) -> Callable[[], tuple[float, float]]:
        """NSC and NSCB of treatments."""
        columns = (metadata[name].to_numpy() for name in ("compound", "moa", "batch"))
        return partial(plain_accuracies, profiles.astype(np.float64), *columns)

    def encoder_input(self, count: int) -> Tensor:
        """The first ``count`` crops as the reference's encoder sees them: 8-bit values wrap around, then they are normalised."""
        mean, std = (torch.tensor(v)[:, None, None] for v in ((0.7469, 0.7403, 0.7307), (0.1548, 0.1594, 0.1706)))
        data = self._strips(lambda crop: crop)
        crops = torch.stack([data[i] for i in range(count)]).int()
        return (((256 - crops) % 256).float() / 255 - mean) / std

    def encode(self, x: Tensor) -> Tensor:
        """h."""
        return self._network(x)[0]


def plain_scores(features: np.ndarray, metadata: pd.DataFrame, regularisation: float = 1.0) -> tuple[float | None, float | None]:
    """(NSC, NSCB) step by step: group means with pandas, whitening and CORAL with SciPy, a classifier fitted anew per treatment."""
    import scipy.linalg

    names = list(range(features.shape[1]))
    key = ["Metadata_Plate", "Metadata_Well", "compound", "concentration", "moa"]
    table = pd.concat([metadata[key].reset_index(drop=True), pd.DataFrame(features.astype(np.float64), columns=names)], axis=1)
    wells = table.groupby(key, sort=False)[names].mean().reset_index()
    wells["batch"] = wells["Metadata_Plate"].str.split("_").str[0]
    x = wells[names].to_numpy()
    control = (wells["compound"] == "DMSO").to_numpy()
    x = x - x[control].mean(axis=0)
    values, vectors = scipy.linalg.eigh(x[control].T @ x[control] / control.sum())
    x = x @ (vectors / np.sqrt(values + regularisation))
    identity = np.eye(x.shape[1])
    target = np.real(scipy.linalg.sqrtm(x[control].T @ x[control] / control.sum() + regularisation * identity))
    aligned = np.empty_like(x)
    for batch in wells["batch"].unique():
        rows = (wells["batch"] == batch).to_numpy()
        own = x[rows & control]
        source = np.real(scipy.linalg.sqrtm(own.T @ own / len(own) + identity))
        aligned[rows] = x[rows] @ scipy.linalg.inv(source) @ target
    wells[names] = aligned
    treated = wells[~control]
    by = ["compound", "concentration", "moa"]
    table = treated.groupby(by)[names].median().reset_index()
    batches = treated.groupby(by)["batch"].agg(lambda b: ",".join(sorted(set(b)))).to_numpy()
    return plain_accuracies(table[names].to_numpy(), table["compound"].to_numpy(), table["moa"].to_numpy(), batches)


def plain_accuracies(
    profiles: np.ndarray, compounds: np.ndarray, moas: np.ndarray, batches: np.ndarray
) -> tuple[float | None, float | None]:
    """(NSC, NSCB) of treatments: a classifier fitted anew for each; under NSCB without the MoAs of one batch. None: no treatment is left."""
    from sklearn.neighbors import KNeighborsClassifier

    # Single batches, not sets of them: a MoA seen in two weeks is not of one batch, though all its treatments are of both.
    in_batches = (
        pd.DataFrame({"moa": moas, "batch": [b.split(",") for b in batches]}).explode("batch").groupby("moa")["batch"].nunique()
    )
    scores = []
    for not_same_batch in (False, True):
        keep = np.ones(len(profiles), bool)
        if not_same_batch:
            keep = ~np.isin(moas, in_batches[in_batches == 1].index)
        x, compound, moa, batch = (v[keep] for v in (profiles, compounds, moas, batches))
        correct = 0
        for i in range(len(x)):
            allowed = compound != compound[i]
            if not_same_batch:
                allowed &= batch != batch[i]
            if not allowed.any():
                continue
            classifier = KNeighborsClassifier(1, algorithm="brute", metric="cosine").fit(x[allowed], moa[allowed])
            correct += int(classifier.predict(x[i : i + 1])[0] == moa[i])
        scores.append(correct / len(x) if len(x) else None)
    return scores[0], scores[1]
