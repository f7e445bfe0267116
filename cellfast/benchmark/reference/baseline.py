"""A plain PyTorch implementation of the method written from the paper (Perakis et al., arXiv 2103.16670), for `worker`.

It stands in where no checkout of the reference implementation is given, and does what a reader of the paper would write with
torchvision, pandas and scikit-learn: one image file per cell, augmentations per image on the CPU, two forward passes, NT-Xent from a
matrix of similarities, mean per well, TVN, median per treatment, one classifier fit per treatment. It is no copy of the reference and
better in places: its loss is one matrix product, pixels do not wrap around, embedding runs without gradients.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
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

    name = "baseline"
    description = "a plain PyTorch implementation written from the paper (no checkout of the reference was given)"

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        torch.manual_seed(job.get("seed", 0))
        self._training: tuple[Network, torch.optim.Optimizer] | None = None
        self._network: Network | None = None

    def versions(self) -> dict[str, str]:
        """Versions of the packages that do the work."""
        import sklearn

        return {"torchvision": torchvision.__version__, "numpy": np.__version__, "pandas": pd.__version__,
                "scikit-learn": sklearn.__version__}  # fmt: skip

    def model(self) -> Network:
        """The network, made once, with random weights."""
        if self._network is None:
            self._network = Network(self.job.get("encoder", "resnet18"), self.job.get("dim", PROJECTION_DIM))
        return self._network

    def load(self) -> int:
        """Decode every file."""
        job = self.job
        data = Strips(job["index"], job["strips"], job["size"], TwoAugmentedViews(job["size"]))
        self.loader = DataLoader(data, batch_size=job["batch_size"], shuffle=True, drop_last=True, num_workers=job["workers"])
        return len(data)

    def augment(self, minibatches: int) -> int:
        """Two augmented views of every cell."""
        cells = 0
        for number, (first, _) in enumerate(self.loader, 1):
            cells += len(first)
            if number == minibatches:
                break
        return cells

    def loss(self, z: Tensor) -> Callable[[], tuple[float, float]]:
        """NT-Xent from the matrix of similarities."""
        half = len(z) // 2

        def run() -> tuple[float, float]:
            leaf = z.detach().clone().requires_grad_()
            value = nt_xent(leaf[:half], leaf[half:])
            value.backward()
            return float(value.detach()), float(leaf.grad.norm())

        return run

    def _update(self, first: Tensor, second: Tensor) -> Tensor:
        if self._training is None:
            network = self.model().train()
            self._training = network, torch.optim.Adam(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        network, optimizer = self._training
        optimizer.zero_grad()
        loss = nt_xent(network(first)[1], network(second)[1])
        loss.backward()
        optimizer.step()
        return loss

    def step(self) -> Callable[[], float]:
        """One training step on two ready views."""
        shape = (self.job["batch_size"], 3, self.job["size"], self.job["size"])
        first, second = torch.randn(shape), torch.randn(shape)
        return lambda: float(self._update(first, second).detach())

    def epoch(self) -> int:
        """One pass over the loader."""
        cells = 0
        self.model().train()
        for first, second in self.loader:
            self._update(first, second)
            cells += len(first)
        return cells

    def train(self, finished: Callable[[int], bool]) -> tuple[int, float]:
        """Epochs until ``finished``."""
        step, loss = 0, float("nan")
        self.model().train()
        while not finished(step):
            for first, second in self.loader:
                loss = float(self._update(first, second).detach())
                step += 1
                if finished(step):
                    break
        return step, loss

    @torch.no_grad()
    def embed(self) -> np.ndarray:
        """h of every cell in evaluation mode."""
        job = self.job
        data = Strips(job["index"], job["strips"], job["size"], plain)
        network = self.model().eval()
        parts = [network(x)[0].numpy() for x in DataLoader(data, batch_size=job["batch_size"], num_workers=job["workers"])]
        return np.concatenate(parts)

    def score(self, features: np.ndarray, metadata: pd.DataFrame) -> tuple[float, float]:
        """NSC and NSCB of means per well, TVN and medians per treatment."""
        return plain_scores(features, metadata)

    def evaluate(self, profiles: np.ndarray, metadata: pd.DataFrame) -> Callable[[], tuple[float, float]]:
        """NSC and NSCB of treatments."""
        columns = (metadata[name].to_numpy() for name in ("compound", "moa", "batch"))
        return partial(plain_accuracies, profiles.astype(np.float64), *columns)

    def agree(self) -> dict[str, Any]:
        """Losses of a few steps on fixed views (the crops and their mirror images), weights and inputs written: see the adapter."""
        job = self.job
        double = torch.float64 if job.get("double") else torch.float32
        data = Strips(job["index"], job["strips"], job["size"], lambda crop: crop)
        # What the reference's pixel conversion does: 8-bit values wrap around.
        mean, std = (torch.tensor(v)[:, None, None] for v in ((0.7469, 0.7403, 0.7307), (0.1548, 0.1594, 0.1706)))
        first = torch.stack([data[i] for i in range(job["batch_size"])]).int()
        first = (((256 - first) % 256).float() / 255 - mean) / std
        torch.save({k: v.clone() for k, v in self.model().state_dict().items()}, job["weights"])
        np.save(job["inputs"], first.numpy(), allow_pickle=False)
        self.model().to(double)
        first = first.to(double)
        losses = [float(self._update(first, first.flip(3)).detach()) for _ in range(job["steps"])]
        self.model().eval()
        with torch.no_grad():
            h = self.model()(first)[0]
        return {"losses": losses, "features": h.flatten()[:64].tolist()}


def plain_scores(features: np.ndarray, metadata: pd.DataFrame, regularisation: float = 1.0) -> tuple[float, float]:
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


def plain_accuracies(profiles: np.ndarray, compounds: np.ndarray, moas: np.ndarray, batches: np.ndarray) -> tuple[float, float]:
    """(NSC, NSCB) of treatments: a classifier fitted anew for each; under NSCB without the MoAs of one batch."""
    from sklearn.neighbors import KNeighborsClassifier

    in_batches = pd.Series(batches).groupby(moas).nunique()
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
            classifier = KNeighborsClassifier(1, algorithm="brute", metric="cosine").fit(x[allowed], moa[allowed])
            correct += int(classifier.predict(x[i : i + 1])[0] == moa[i])
        scores.append(correct / len(x))
    return scores[0], scores[1]
