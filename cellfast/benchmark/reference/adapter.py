"""Drives a user's checkout of the reference implementation (SamriddhiJain/SimCLR-for-cell-profiling) as it is, for `worker`.

Run by the interpreter the user names, with the package versions that code runs on. Nothing of it is copied: its classes and functions
are imported from the checkout's ``src`` folder and called. What is put around them, because the machine lacks it:

* torchvision's ResNets ignore ``pretrained=True`` and start from random weights, as on cellfast's side;
* without a GPU, ``.to("cuda")`` written out in its embedding code goes to the CPU;
* its prints and bars go to /dev/null.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


def source_folder(checkout: str | os.PathLike[str]) -> Path:
    """The folder of the checkout that its modules are imported from."""
    for folder in (Path(checkout) / "src", Path(checkout)):
        if (folder / "simclr.py").is_file() and (folder / "models" / "resnet_simclr.py").is_file():
            return folder
    raise SystemExit(f"{checkout}: expected a checkout of the reference implementation, with src/simclr.py; found none")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with open(os.devnull, "w", encoding="utf-8") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield


def _drawing_of(metrics: Any) -> dict[str, Any]:
    """What its evaluation draws with; a job of the same process before this one may have taken it away."""
    if not hasattr(metrics, "cellfast_drawing"):
        metrics.cellfast_drawing = {name: getattr(metrics, name) for name in ("plt", "sb", "TSNE")}
    return metrics.cellfast_drawing


def _no_downloads() -> None:
    import torchvision.models as models

    for name in ("resnet18", "resnet50", "resnet101"):
        make = getattr(models, name)
        if hasattr(make, "cellfast"):
            continue  # a second job of this process

        @functools.wraps(make)
        def random_weights(*args: Any, make: Callable[..., Any] = make, pretrained: bool = False, **kwargs: Any) -> Any:
            return make(*args, **kwargs)

        random_weights.cellfast = True  # type: ignore[attr-defined]
        setattr(models, name, random_weights)


def _cuda_is_cpu() -> None:
    import torch

    for owner in (torch.Tensor, torch.nn.Module):
        move = owner.to
        if hasattr(move, "cellfast"):
            continue

        @functools.wraps(move)
        def to(self: Any, *args: Any, move: Callable[..., Any] = move, **kwargs: Any) -> Any:
            return move(self, *("cpu" if a == "cuda" else a for a in args), **kwargs)

        to.cellfast = True  # type: ignore[attr-defined]
        owner.to = to


class Implementation:
    """The reference implementation at the checkout's commit; its configuration's values, with the job's sizes."""

    packages = ("torchvision", "albumentations", "opencv-python-headless", "numpy", "pandas", "scikit-learn", "scikit-image")

    def __init__(self, job: dict[str, Any]) -> None:
        import torch

        warnings.simplefilter("ignore")
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("MPLBACKEND", "Agg")
        # Its modules are imported here, in the order its own programs do, so that imports are no part of what is timed.
        sys.path.insert(0, str(source_folder(job["reference_dir"])))
        _no_downloads()
        if not torch.cuda.is_available():
            _cuda_is_cpu()
        with _silent():
            import generate_features
            import simclr
            from data_aug.cell_dataset import CellDataset
            from data_aug.dataset_wrapper_simclr import DataSetWrapperSimCLR
            from feature_eval import profile_metrics
            from loss.nt_xent import NTXentLoss
            from models.resnet_simclr import ResNetSimCLR
        self.features, self.simclr, self.metrics = generate_features, simclr, profile_metrics
        self._drawing = _drawing_of(profile_metrics)
        self.loss_class, self.model_class = NTXentLoss, ResNetSimCLR
        self.wrapper, self.dataset_class = DataSetWrapperSimCLR, CellDataset
        torch.manual_seed(job.get("seed", 0))
        self.job, self.torch, self.device = job, torch, torch.device("cpu")
        self.config = {
            "run_dir": job.get("folder", "."),
            "batch_size": job.get("batch_size"),
            "model": {"out_dim": job.get("dim", 256), "base_model": job.get("encoder", "resnet18")},
            "loss": {"temperature": 0.1, "use_cosine_similarity": True},
            "weight_decay": "10e-6",
            "dataset": {"input_shape": f"({job.get('size')},{job.get('size')},3)", "preload": True},
            "eval_dataset": {"path": job.get("index"), "root_dir": os.path.join(job.get("strips", ""), "")},
        }

    @functools.cached_property
    def _model(self) -> Any:
        with _silent():
            return self.model_class(**self.config["model"]).to(self.device)

    @functools.cached_property
    def _trainer(self) -> Any:
        """Its SimCLR object without the TensorBoard folder its constructor makes."""
        trainer = self.simclr.SimCLR.__new__(self.simclr.SimCLR)
        trainer.config, trainer.device = self.config, self.device
        trainer.nt_xent_criterion = self.loss_class(self.device, self.job["batch_size"], **self.config["loss"])
        return trainer

    @functools.cached_property
    def _optimizer(self) -> Any:
        """The optimiser of its ``train``."""
        return self.torch.optim.Adam(self._model.parameters(), 3e-4, weight_decay=float(self.config["weight_decay"]))

    def model(self) -> Any:
        """The model, made once, with random weights."""
        return self._model

    def load(self) -> int:
        """Its data loaders, which decode every crop into memory first (``preload: True``, as in its configuration)."""
        job = self.job
        with _silent():
            wrapper = self.wrapper(
                job["batch_size"], job["index"], self.config["eval_dataset"]["root_dir"], job["workers"], 0.0,
                self.config["dataset"]["input_shape"], 1, "random", True,
            )  # fmt: skip
            self._loader, _ = wrapper.get_data_loaders()
        return len(self._loader.dataset)

    def minibatches(self) -> Iterator[tuple[Any, int]]:
        """One pass over its training loader."""
        return ((views, len(views[0])) for views, _ in self._loader)

    def pair(self, first: Any, second: Any) -> tuple[Any, Any]:
        """The views of a minibatch."""
        return first, second

    def update(self, views: tuple[Any, Any]) -> float:
        """One of its training steps. (Its learning rate is constant in the first ten epochs, and these runs are shorter.)"""
        self._optimizer.zero_grad()
        loss = self._trainer._step(self._model, *views, 0)
        loss.backward()
        self._optimizer.step()
        return float(loss.detach())

    def nt_xent(self, z: Any) -> Any:
        """Its NT-Xent of rows normalised as its training step does."""
        import torch.nn.functional as F

        if not hasattr(self, "_criterion"):
            with _silent():
                self._criterion = self.loss_class(self.device, len(z) // 2, **self.config["loss"])
        return self._criterion(*(F.normalize(rows, dim=1) for rows in z.chunk(2)))

    def embed(self) -> np.ndarray:
        """h of every crop by its embedding code, crops decoded anew as it does."""
        with _silent():
            loader = self.features.get_data(self.config)
            if self.job["workers"] == 0:
                loader = self.torch.utils.data.DataLoader(loader.dataset, batch_size=self.config["batch_size"], shuffle=False)
            features, _ = self.features.convert_tensor_to_np(self._model, loader)
        return features

    def score(self, features: np.ndarray, metadata: Any) -> tuple[float, float]:
        """Its NSC and NSCB after TVN; without its t-SNE and pictures unless the job asks for them."""
        metrics = self.metrics
        vars(metrics).update(self._drawing)
        if not self.job.get("pictures"):
            nothing = types.SimpleNamespace(savefig=lambda *a, **k: None)
            metrics.plt = types.SimpleNamespace(plot=lambda *a, **k: None, figure=lambda *a, **k: None)
            metrics.sb = types.SimpleNamespace(lmplot=lambda *a, **k: nothing)
            metrics.TSNE = lambda *a, **k: types.SimpleNamespace(fit_transform=lambda c: c[:, :2])
        pictures = os.path.join(self.job.get("folder", "."), "{}.jpg")
        with _silent():
            nsc, nscb = metrics.calculate_nsc_and_nscb(features, metadata, pictures, DO_WHITENING=True, DO_CORAL=True)
        if self.job.get("pictures"):
            metrics.plt.close("all")
        return float(nsc), float(nscb)

    def evaluate(self, profiles: np.ndarray, metadata: Any) -> Callable[[], tuple[float, float]]:
        """Its functions ``nsc`` and ``nscb`` on treatments; they stand inside the one that does all and are taken out of it."""
        import pandas as pd

        columns = list(range(profiles.shape[1]))
        frame = pd.DataFrame({
            "Compound": metadata["compound"], "Concentration": metadata["concentration"], "MOA": metadata["moa"],
            "Batch": metadata["batch"], "MOA_class": pd.factorize(metadata["moa"])[0],
        })  # fmt: skip
        frame = pd.concat([frame, pd.DataFrame(profiles.astype(np.float64), columns=columns)], axis=1)
        inner = {
            code.co_name: types.FunctionType(
                code,
                vars(self.metrics),
                code.co_name,
                None,
                tuple({"feature_ids": types.CellType(columns)}[n] for n in code.co_freevars),
            )
            for code in self.metrics.calculate_nsc_and_nscb.__code__.co_consts
            if isinstance(code, types.CodeType) and code.co_name in ("nsc", "nscb")
        }

        def run() -> tuple[float, float]:
            with _silent():
                treatments, nsc = inner["nsc"](frame.copy())
                _, nscb = inner["nscb"](treatments)
            return float(nsc), float(nscb)

        return run

    def encoder_input(self, count: int) -> Any:
        """The first ``count`` crops through its decoding and its normalisation, without random augmentation."""
        from torchvision import transforms

        normalise = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((0.7469, 0.7403, 0.7307), (0.1548, 0.1594, 0.1706))]
        )
        size = self.job["size"]
        with _silent():
            dataset = self.dataset_class(
                self.job["index"], self.config["eval_dataset"]["root_dir"], (size, size, 3), True, 0, transform=normalise
            )
        return self.torch.stack([dataset[i][0] for i in range(count)])

    def encode(self, x: Any) -> Any:
        """h."""
        return self._model(x)[0]
